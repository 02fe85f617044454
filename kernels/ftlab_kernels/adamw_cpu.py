"""AdamW with 8-bit moments on a CPU: `ftlab_kernels.adamw`'s step in compiled C, one pass beside that of the norm.

Bit for bit `reference_step` with states="8bit", from which tests take what is right: every operation rounds alike, and
the random bits are a function of seed, step and element. In plain torch a step is some hundred passes over memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftlab_kernels.adamw import Rule
from ftlab_kernels.adamw_kernels import PLACE_SHIFT
from ftlab_kernels.native import call, library

__all__ = ["eight_bit_step", "takes"]


def takes(params: Sequence[Tensor]) -> bool:
    """Whether these are what the C knows: fp32 and contiguous, on the CPU."""
    return all(p.dtype == torch.float32 and p.device.type == "cpu" and p.is_contiguous() for p in params)


@torch.no_grad()
def eight_bit_step(
    params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[dict[str, Any]], rule: Rule
) -> Tensor:
    """One step; params and states (empty at first) change in place, unless the norm is not finite. Gives the norm.

    The place of a parameter among `params` is that of its random bits. Errors: ValueError for other parameters than
    `takes` allows, a rule without 8-bit moments, and gradients or states of another shape; NativeError where there is
    no compiler. No weight has moved then.
    """
    if not takes(params) or rule.states != "8bit":
        raise ValueError("the C step is that of contiguous fp32 parameters on a CPU, with 8-bit moments")
    if [p.shape for p in params] != [g.shape for g in grads] or len(states) != len(params):
        raise ValueError("each parameter needs a gradient of its own shape, and a state")
    library()
    grads = [g.float().contiguous() for g in grads]
    norm: Tensor = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(g) for g in grads] or [torch.zeros(())])
    )
    if not bool(torch.isfinite(norm)):
        return norm
    for p, state in zip(params, states, strict=True):
        rule.fill(state, p)
    lr, (beta_1, beta_2) = float(rule.lr), rule.betas
    for place, (p, g, state) in enumerate(zip(params, grads, states, strict=True)):
        state["step"] += 1
        t = int(state["step"])
        moments = (state[name] for name in ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax"))
        random = (rule.seed ^ (t << 32), place << PLACE_SHIFT)
        rates = (beta_1, 1 - beta_1, beta_2, 1 - beta_2)
        scales = (1 - beta_2**t, rule.eps, lr * rule.weight_decay, lr / (1 - beta_1**t))
        call("adamw_8bit", p.dtype, p, g, *moments, p.numel(), *random, *map(float, (*rates, *scales)))
    torch.autograd.graph.increment_version(params)  # as torch does for what it changes in place
    return norm
