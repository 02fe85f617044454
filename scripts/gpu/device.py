"""The GPU itself: its name and clocks, C, F at the shapes in question, and what two tricks with cuBLAS cost."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gpu import records
from gpu.goals import LORA_SHAPES
from gpu.measure import gradients, normal, ratio
from gpu.section import Section

__all__ = ["run"]

ROWS, RANK = 8192, 16


def run(section: Section) -> None:
    """All of it."""
    section.item("clocks before", records.smi)
    section.measure_limits((8192, 8192, 8192))
    shapes = {"48x32": (48, 32)} if section.smoke else LORA_SHAPES
    rows = 40 if section.smoke else ROWS
    for name, (columns, features) in shapes.items():
        section.item(f"matmul {name}", functools.partial(section.bench.matmul_rate, rows, columns, features))
    for name, (columns, features) in shapes.items():
        section.item(f"tricks {name}", functools.partial(tricks, section, rows, columns, features))
    section.item("head", lambda: section.bench.matmul_rate(*((40, 32, 56) if section.smoke else (ROWS, 4096, 128256))))
    section.item("clocks after", records.smi)


def tricks(section: Section, rows: int, columns: int, features: int) -> dict[str, Any]:
    """cuBLAS with r more columns against without, and with a sum that is there already.

    Where [x | s] [W | scale B]^T costs little more than x W^T, an adapter's term costs nothing else; and where addmm
    into its own summand does, a term that is written first costs one writing and one reading.
    """
    device, wide = section.device, columns + RANK
    x, weight = normal((rows, columns), device), normal((features, columns), device)
    xs, weights = normal((rows, wide), device), normal((features, wide), device)
    view, weight_view = xs[:, :columns], weights[:, :columns]
    out = torch.empty(rows, features, dtype=x.dtype, device=device)
    summand = normal((rows, features), device)
    leaf = x.clone().requires_grad_()
    dy = normal((rows, features), device)
    calls = {
        "mm": lambda: torch.mm(x, weight.t(), out=out),
        "mm, K + 16": lambda: torch.mm(xs, weights.t(), out=out),
        "mm of views with room": lambda: torch.mm(view, weight_view.t(), out=out),
        "addmm, out=summand": lambda: torch.addmm(summand, x, weight.t(), out=summand),
        "addmm, beta=0": lambda: torch.addmm(out, x, weight.t(), beta=0, out=out),
        "dX": lambda: torch.mm(dy, weight),
        "linear, fwd+bwd": gradients(lambda a: torch.nn.functional.linear(a, weight), [leaf], [leaf], [dy]),
    }
    times = section.bench.compare(calls)
    others = ("mm, K + 16", "mm of views with room", "addmm, out=summand", "addmm, beta=0")
    return {
        "shape": {"M": rows, "K": columns, "N": features, "r": RANK},
        "times": times,
        "over mm": {name: ratio(times, name, "mm") for name in others},
    }
