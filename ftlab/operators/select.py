"""Which path a run takes, why, and what is said of it."""

from __future__ import annotations

import torch
from ftlab_kernels.native import why_not_native

from ftlab.errors import ConfigError
from ftlab.operators.base import TORCH, Operators

__all__ = ["KERNELS", "describe", "select"]

KERNELS = ("auto", "triton", "native", "reference", "check")


def select(kernels: str, device: torch.device, *, compiled: bool = False) -> tuple[Operators, str]:
    """The operators of a run on `device`, and a line that says which they are.

    auto: Triton on a GPU, compiled C on a CPU, torch where that cannot be had (the line says why) and where
    torch.compile fuses torch's own operations. triton, native: that, or an error. reference: torch.
    check: what auto takes, with the reference beside every call.

    Raises:
        ConfigError: what was asked for cannot be had here.
    """
    if kernels == "reference":
        return TORCH, "kernels: torch, as asked for"
    best = "triton" if device.type == "cuda" else "native"
    wanted = best if kernels in ("auto", "check") else kernels
    reason = "torch.compile fuses torch's own operations" if compiled else _why_not(wanted, device)
    if reason is None:
        operators = _operators(wanted, required=kernels == wanted)
        if kernels == "check":
            from ftlab.operators.checked_path import checked_operators

            return checked_operators(operators), f"kernels: {wanted}, each call compared with its reference (slow)"
        return operators, f"kernels: {wanted}"
    if kernels == "auto":
        return TORCH, f"kernels: torch, because {reason}"
    raise ConfigError(f"kernels={kernels}: {reason}; use kernels=auto, which takes what there is, or kernels=reference")


def _why_not(path: str, device: torch.device) -> str | None:
    if path == "native":
        if device.type != "cpu":
            return f"the native kernels run on a CPU, not on {device.type}"
        return why_not_native()
    from ftlab_kernels.common import why_not_triton

    return why_not_triton(device)


def _operators(path: str, *, required: bool) -> Operators:
    if path == "native":
        from ftlab.operators.native_path import native_operators

        return native_operators(required=required)
    from ftlab.operators.triton_path import triton_operators

    return triton_operators(required=required)


def describe(operators: Operators) -> dict[str, dict[str, int]]:
    """How often each operation went which way so far: {operation: {path: calls}}."""
    found: dict[str, dict[str, int]] = {}
    for (name, path), count in sorted(operators.taken.items()):
        found.setdefault(name, {})[path] = count
    return found
