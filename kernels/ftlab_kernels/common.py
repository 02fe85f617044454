"""What every kernel file needs: Triton if it is there, casts that are also right in the interpreter, sizes and checks.

Triton's interpreter (TRITON_INTERPRET=1, set before this package is imported) runs kernels on CPU tensors with NumPy.
It knows no bf16 arithmetic: it works on the raw bits and truncates when it rounds. So every kernel widens what it loads
to fp32 at once, multiplies matrices through `dot`, and rounds through `cast`, which are exact there and compile to the
plain instruction on a GPU.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # no wheel for this platform: the references still work
    from ftlab_kernels import _without_triton as triton
    from ftlab_kernels._without_triton import language as tl

    HAS_TRITON = False

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "KernelUnavailableError",
    "cast",
    "ceil_div",
    "dot",
    "fp32",
    "next_power_of_2",
    "require_triton",
    "rounded",
    "runs_triton",
    "tl",
    "triton",
    "why_not_triton",
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)
LEAST_CAPABILITY = (8, 0)  # bf16 tensor cores and asynchronous copies


class KernelUnavailableError(RuntimeError):
    """A Triton kernel was asked for where it cannot run; the message says why."""


def why_not_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of this device; None if they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if INTERPRETED:
        return None if device.type == "cpu" else f"the interpreter runs kernels on the CPU, not on {device.type}"
    if device.type != "cuda":
        return f"Triton kernels run on CUDA GPUs, not on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"this GPU has compute capability {major}.{minor}, at least 8.0 is needed"
    return None


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels can run on tensors of this device."""
    return why_not_triton(device) is None


def require_triton(*tensors: Tensor) -> None:
    """Raise KernelUnavailableError unless a kernel can run on these tensors, which must be on one device."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"the tensors of one kernel must be on one device, not on {sorted(map(str, devices))}")
    for device in devices:
        reason = why_not_triton(device)
        if reason is not None:
            raise KernelUnavailableError(reason)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for positive b."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n (1 for n < 2)."""
    return 1 << max(n - 1, 0).bit_length()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to `dtype` and widened again: what a kernel that stores in `dtype` and reads it back works with."""
    return x.to(dtype).to(x.dtype)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 block -> `dtype`, to nearest even, NaN kept."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, nearest.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32; a and b of one dtype. fp32 operands are multiplied in full precision, not in TF32."""
    if _INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def fp32(x):
    """A scalar argument as fp32. Inductor passes Python floats as fp64, which would widen all that they touch."""
    return tl.full((), x, tl.float32)  # tl.to_tensor came with triton 3.7
