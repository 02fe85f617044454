"""What lies between a model's matrix products, and who computes it: torch, compiled C on a CPU, Triton on a GPU."""

from ftlab.operators.base import NAMES, TORCH, Operators
from ftlab.operators.select import KERNELS, describe, select

__all__ = ["KERNELS", "NAMES", "TORCH", "Operators", "describe", "select"]
