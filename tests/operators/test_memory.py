"""Peak memory of the head, measured from outside: a process of its own, the kernel's count of its resident pages."""

from __future__ import annotations

import subprocess
import sys

import pytest

TOKENS, VOCABULARY, WIDTH = 2048, 32768, 16

SCRIPT = f"""
import pathlib, resource, sys, torch
from ftlab.operators.linear_cross_entropy import linear_cross_entropy, reference_cross_entropy
torch.set_num_threads(1)
def loss(tokens):
    hidden = torch.randn(tokens, {WIDTH}, requires_grad=True)
    weight = torch.randn({VOCABULARY}, {WIDTH}, requires_grad=True)
    labels = torch.randint({VOCABULARY}, (tokens,))
    if sys.argv[1] == "chunked":
        return linear_cross_entropy(hidden, weight, labels, 64)
    return reference_cross_entropy(hidden, weight, labels)
def peak():
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # ru_maxrss begins with that of the process which started this one
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
loss(2).backward()  # libraries are loaded and their buffers made
before = peak()
loss({TOKENS}).backward()
print(peak() - before)
"""


def peak_bytes(kind: str) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT, kind], capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.parametrize(("kind", "fits"), [("chunked", True), ("all at once", False)])
def test_peak_stays_below_the_size_of_all_logits(kind: str, fits: bool) -> None:
    all_logits = TOKENS * VOCABULARY * 4
    assert (peak_bytes(kind) < all_logits / 4) == fits
