"""Dtypes of a run: what is computed in which, what is stored in which, and the loss scaling of fp16.

What trains is stored in fp32 always, so that a small update is never rounded away; what is frozen is stored in
`frozen`; matrix products run in `compute` under autocast.

A processor without instructions for bf16 is given fp32 in its place: torch's products of bf16 are many times slower
than those of fp32 there. FTLAB_BF16=always keeps bf16, for the sake of memory or of the same rounding.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ftlab.config import PrecisionConfig
from ftlab.errors import ConfigError

__all__ = ["Precision", "carried_out", "dtype_of", "keeps_bf16", "readable"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of fp32, bf16 or fp16."""
    return _DTYPES[name]


def keeps_bf16(device: torch.device) -> bool:
    """Whether bf16 is computed as bf16: not on a CPU for which oneDNN has no products of it, unless that is wished."""
    if device.type != "cpu" or os.environ.get("FTLAB_BF16") == "always":
        return True
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch leaves it out
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def carried_out(config: PrecisionConfig, device: torch.device) -> PrecisionConfig:
    """What of the settings a device is given: bf16 becomes fp32 where it is slow, stored weights included.

    Weights stored in bf16 would make their products bf16 too, whatever `compute` is.
    """
    narrow = "bf16" in (config.compute, config.frozen)
    return replace(config, compute="fp32", frozen="fp32") if narrow and not keeps_bf16(device) else config


def readable(config: PrecisionConfig, device: torch.device) -> PrecisionConfig:
    """The settings that a run is read with after training: on a CPU fp32 in place of fp16, which is slow there."""
    half = "fp16" in (config.compute, config.frozen)
    return replace(config, compute="fp32", frozen="fp32") if half and device.type == "cpu" else config


class Precision:
    """Autocast, storage dtypes and the gradient scaler (enabled for fp16 alone).

    note: what the user should know of it; None for nothing. dtypes: the names of `compute` and `frozen`.
    """

    def __init__(self, config: PrecisionConfig, device: torch.device, *, allow_cpu_fp16: bool = False) -> None:
        if config.compute == "fp16" and device.type == "cpu" and not allow_cpu_fp16:
            raise ConfigError(
                "precision.compute=fp16 on a CPU: its half-precision products are up to a hundred times slower than "
                "bf16's; use precision=bf16 or precision=fp32"
            )
        asked, config = config, carried_out(config, device)
        self.note: str | None = None
        if config != asked:
            self.note = (
                "this processor has no instructions for bf16 and is many times faster in fp32, so bf16 is carried out "
                "as fp32, which takes more memory; FTLAB_BF16=always keeps bf16"
            )
        self.compute = dtype_of(config.compute)
        self.frozen = dtype_of(config.frozen)
        self.dtypes = [config.compute, config.frozen]
        self.device = device
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=config.init_scale, enabled=self.compute == torch.float16
        )

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context of every forward pass; nothing at all in fp32."""
        if self.compute == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute)

    def store(self, model: nn.Module) -> None:
        """Bring what trains to fp32 and what is frozen to the frozen dtype, in place."""
        for parameter in model.parameters():
            wanted = torch.float32 if parameter.requires_grad else self.frozen
            if parameter.dtype != wanted:
                parameter.data = parameter.data.to(wanted)

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float | None, *, finite: bool) -> tuple[float, bool]:
        """Clip and update; returns the gradient's norm before clipping, and whether the weights moved.

        finite: whether the loss is; if it or the gradient is not, nothing moves, and fp16's loss scale is lowered.
        An optimizer with a `grad_norm` of its own unscales, measures, clips and decides in its own step.
        """
        own = hasattr(type(optimizer), "grad_norm")
        if not finite and self.scaler.is_enabled():
            _spoil(optimizer)
        norm = math.nan if own else float(self.norm(optimizer, max_norm))
        finite = finite and (own or math.isfinite(norm))
        if finite or self.scaler.is_enabled():
            self.scaler.step(optimizer)  # with fp16 the scaler itself leaves a non-finite step out
            self.scaler.update()
            if own:
                norm = float(optimizer.grad_norm)  # type: ignore[attr-defined]
        return norm, finite and math.isfinite(norm)

    def norm(self, optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
        """Unscale the gradients, clip them to the global `max_norm`, and return the norm before clipping."""
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return clip_gradients(parameters, max_norm)


def _spoil(optimizer: torch.optim.Optimizer) -> None:
    """Make a gradient infinite: the scaler looks at gradients alone, and leaves a step out for no other reason."""
    gradients = (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None)
    if (first := next(gradients, None)) is not None:
        first.fill_(math.inf)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Global L2 norm of the gradients; they are scaled down to `max_norm` where it is exceeded."""
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
