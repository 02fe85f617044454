"""AdamW with its moments in 8 bits (after Dettmers et al. 2022, arXiv 2110.02861).

    m = a q |q| / 127^2,  q in -127 .. 127        v = a (q / 255)^4,  q in 0 .. 255

with one scale a for 256 numbers, rounded at random so that it is right in the mean (but a v above 0 never becomes 0):
format and step are those of `ftlab_kernels.adamw`, whose Triton kernel does the same in one pass on a GPU. Here it is
compiled C, one pass too, or plain torch, with the same bits. 2.03 bytes a parameter instead of 8. What is rounded at
random follows from the step and the parameter's place alone, so a resumed run draws the same.
"""

from __future__ import annotations

from typing import Any

import torch
from ftlab_kernels import adamw_cpu
from ftlab_kernels.adamw import Rule, reference_step

__all__ = ["AdamW8bit"]

_CODES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}


class AdamW8bit(torch.optim.Optimizer):
    """torch's AdamW with other states; weights are fp32. native: by compiled C, where the parameters allow it."""

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        *,
        native: bool = False,
    ) -> None:
        self.native = native
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: what torch keeps, and the path."""
        return {**super().__getstate__(), "native": self.native}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step over the parameters that have a gradient."""
        for number, group in enumerate(self.param_groups):
            numbers = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            rule = Rule(**numbers, states="8bit", seed=number)
            moved = [p for p in group["params"] if p.grad is not None]
            step = adamw_cpu.eight_bit_step if self.native and adamw_cpu.takes(moved) else reference_step
            step(moved, [p.grad for p in moved], [self.state[p] for p in moved], rule)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch brings every state to the dtype of its parameter; the codes are brought back, which is exact."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name, dtype in _CODES.items():
                state[name] = state[name].to(dtype)
