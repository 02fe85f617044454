"""Triton kernels for fine-tuning, usable without ftlab: torch and triton are all they need.

Each operation is a file with a plain torch reference, the Triton kernel, an autograd Function and one public function
of torch's signature.
"""

__version__ = "0.1.0"
