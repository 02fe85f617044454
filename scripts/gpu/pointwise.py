"""G9, G10: add + RMSNorm, SwiGLU, RoPE, forward and backward, against torch.compile, torch, Liger; attention; NF4."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from ftlab_kernels import norm
from torch import Tensor

from gpu import peers
from gpu.measure import Call, gradients, normal, pick, ratio
from gpu.section import Section

__all__ = ["document_lengths", "run"]

ROWS, WIDTH, HIDDEN = 8192, 4096, 14336
HEADS, KV_HEADS, HEAD = 32, 8, 128
EPS = 1e-5
Contestants = dict[str, Callable[..., Any]]


def run(section: Section) -> None:
    """The three operations; then attention inside packed documents and weights of 4 bits, which have no goals."""
    section.measure_limits()
    smoke = section.smoke
    section.item("add_rms_norm", lambda: add_rms_norm(section, *((6, 32) if smoke else (ROWS, WIDTH))), needs=10)
    section.item("swiglu", lambda: swiglu(section, *((6, 48) if smoke else (ROWS, HIDDEN))), needs=8)
    heads = (24, 4, 2, 16) if smoke else (ROWS, HEADS, KV_HEADS, HEAD)
    section.item("rope", lambda: rope(section, *heads), needs=8)
    section.item("attention", lambda: attention(section, *heads), needs=6)
    section.item("nf4", lambda: nf4_weight(section, 4 if smoke else HIDDEN * WIDTH // 64), needs=6)


def document_lengths(total: int, longest: int) -> list[int]:
    """Documents of mixed lengths that fill `total` tokens: a fixed cycle of lengths, the last one cut."""
    cycle = itertools.cycle([longest // 2, longest // 8, longest // 5, longest // 16, longest, longest // 3])
    found: list[int] = []
    while sum(found) < total:
        found.append(min(max(next(cycle), 1), total - sum(found)))
    return found


def positions(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Of each token inside its document."""
    return torch.cat([torch.arange(length, device=device) for length in lengths])


def compare(section: Section, contestants: Contestants, inputs: list[Tensor], upstream: list[Tensor]) -> dict[str, Any]:
    """Times, host time and memory of all contestants on the same values; what requires a gradient gets one.

    Liger writes over inputs and upstream gradients: it has its own, filled again before every timed call.
    """
    calls: dict[str, Call] = {}
    restore: dict[str, Call] = {}
    for name, function in contestants.items():
        own, ups = inputs, upstream
        if name == "Liger":
            own = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
            ups = [x.clone() for x in upstream]
            restore[name] = refill([*own, *ups], [*inputs, *upstream])
        calls[name] = gradients(function, own, [x for x in own if x.requires_grad], ups)
    times = section.bench.compare(calls, restore=restore)
    ran = {name: call for name, call in calls.items() if times[name].get("wall")}
    # Outputs have the sizes of their upstream gradients, gradients those of what requires them.
    outputs = sum(x.numel() * x.element_size() for x in (*upstream, *(x for x in inputs if x.requires_grad)))
    extra = {name: section.bench.peak_extra(call) for name, call in ran.items()}
    return {
        "times": times,
        "host": {name: section.bench.host_time(call) for name, call in ran.items()},
        "ratios": {f"{other} / ours": ratio(times, other, "ours") for other in contestants if other != "ours"},
        "beyond_outputs_bytes": {name: None if n is None else n - outputs for name, n in extra.items()},
    }


def refill(targets: list[Tensor], sources: list[Tensor]) -> Call:
    """A call that copies every source to its target."""

    def call() -> None:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)

    return call


def judge(section: Section, found: dict[str, Any], goals: dict[str, str]) -> None:
    """goals: of `time`, and of a contestant's time over ours."""
    for other, goal in goals.items():
        if other == "time":
            section.figure(goal, pick(found["times"], "ours"), found["times"]["ours"].get("error"))
            continue
        gain = found["ratios"].get(f"{other} / ours")
        missing = "liger-kernel is not installed" if other == "Liger" else "not measured"
        why = found["times"].get(other, {}).get("error", missing)
        section.figure(goal, None if gain is None else gain["median"], why)


def with_liger(
    contestants: dict[str, Callable[..., Any]], function: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    return {**contestants, "Liger": function} if peers.has("liger_kernel") else contestants


def add_rms_norm(section: Section, rows: int, width: int) -> dict[str, Any]:
    """The norm's weight is frozen, as with LoRA."""
    device = section.device
    x, residual = (normal((rows, width), device).requires_grad_() for _ in range(2))
    weight = 1 + normal((width,), device, 0.1)
    upstream = [normal((rows, width), device) for _ in range(2)]
    contestants: Contestants = {
        "ours": lambda x, r, w: norm.add_rms_norm(x, r, w, EPS),
        "torch": lambda x, r, w: norm.add_reference(x, r, w, EPS),
    }
    contestants["torch.compile"] = peers.compiled(contestants["torch"], smoke=section.smoke)
    contestants = with_liger(contestants, lambda x, r, w: peers.liger("liger_fused_add_rms_norm")(x, r, w, EPS))
    found = compare(section, contestants, [x, residual, weight], upstream)
    judge(section, found, {"time": "G9a", "torch.compile": "G9b", "Liger": "G9c"})
    host = found["host"].get("ours")
    section.figure("G9d", None if host is None else host["median"])
    return {"shape": {"M": rows, "D": width}, **found}


def swiglu(section: Section, rows: int, width: int) -> dict[str, Any]:
    from ftlab_kernels import glu

    gate, up = (normal((rows, width), section.device).requires_grad_() for _ in range(2))
    contestants: Contestants = {"ours": glu.swiglu, "torch": lambda g, u: F.silu(g) * u}
    contestants["torch.compile"] = peers.compiled(contestants["torch"], smoke=section.smoke)
    contestants = with_liger(contestants, lambda g, u: peers.liger("liger_swiglu")(g, u))
    found = compare(section, contestants, [gate, up], [normal((rows, width), section.device)])
    judge(section, found, {"time": "G10a", "Liger": "G10b"})
    extra = found["beyond_outputs_bytes"].get("ours")
    section.figure("G10c", None if extra is None else float(extra), "no device memory to measure")
    return {"shape": {"M": rows, "F": width}, **found}


def rope(section: Section, tokens: int, heads: int, kv_heads: int, head: int) -> dict[str, Any]:
    """Positions that begin anew in each document. Liger takes heads before positions: it gets such a view."""
    from ftlab_kernels import rope as kernel

    device = section.device
    q, k = (normal((1, tokens, count, head), device).requires_grad_() for count in (heads, kv_heads))
    frequencies = 500000.0 ** (-torch.arange(0, head, 2, device=device, dtype=torch.float32) / head)
    angles = positions(document_lengths(tokens, 2048), device)[None, :, None, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    wide = [torch.cat([each, each], -1)[:, :, 0] for each in (cos, sin)]

    def by_liger(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        turned = peers.liger("liger_rope")(q.transpose(1, 2), k.transpose(1, 2), *wide)
        return turned[0].transpose(1, 2), turned[1].transpose(1, 2)

    contestants: Contestants = {
        "ours": lambda q, k: kernel.rope(q, k, cos, sin),
        "torch": lambda q, k: kernel.reference(q, k, cos, sin),
    }
    contestants["torch.compile"] = peers.compiled(contestants["torch"], smoke=section.smoke)
    contestants = with_liger(contestants, by_liger)
    found = compare(section, contestants, [q, k], [normal(tuple(x.shape), device) for x in (q, k)])
    judge(section, found, {"time": "G10d", "Liger": "G10e"})
    extra = found["beyond_outputs_bytes"].get("ours")
    section.figure("G10f", None if extra is None else float(extra), "no device memory to measure")
    return {"shape": {"T": tokens, "H": heads, "K": kv_heads, "E": head}, **found}


def nf4_weight(section: Section, blocks: int) -> dict[str, Any]:
    """A weight of 4 bits in bf16 again, in one go."""
    from ftlab_kernels import nf4

    codes = torch.randint(256, (blocks, nf4.BLOCK // 2), dtype=torch.uint8, device=section.device)
    magnitudes = 1 + normal((blocks,), section.device, 0.1).float()
    functions = {"ours": nf4.nf4_dequantise, "torch": nf4.reference}
    functions["torch.compile"] = peers.compiled(nf4.reference, smoke=section.smoke)
    calls = {name: functools.partial(each, codes, magnitudes, torch.bfloat16) for name, each in functions.items()}
    times = section.bench.compare(calls)
    ratios = {f"{other} / ours": ratio(times, other, "ours") for other in calls if other != "ours"}
    return {"shape": {"blocks": blocks}, "times": times, "ratios": ratios}


def attention(section: Section, tokens: int, heads: int, kv_heads: int, head: int) -> dict[str, Any]:
    """Causal attention inside each of the documents of a row, against one call a document and against none apart."""
    from ftlab_kernels.attention import packed_attention

    device = section.device
    lengths = tuple(document_lengths(tokens, max(tokens // 4, 1)))
    q, k, v = (normal((1, tokens, count, head), device).requires_grad_() for count in (heads, kv_heads, kv_heads))

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        documents = zip(*(x.split(list(lengths), 1) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(*document) for document in documents], 1)

    contestants: Contestants = {
        "ours": lambda q, k, v: packed_attention(q, k, v, lengths),
        "one call a document": apart,
        "one document of all tokens": sdpa,
    }
    upstream = [normal((1, tokens, heads, head), device)]
    wanted = [q, k, v]
    calls = {name: gradients(function, wanted, wanted, upstream) for name, function in contestants.items()}
    times = section.bench.compare(calls)
    ratios = {f"{other} / ours": ratio(times, other, "ours") for other in contestants if other != "ours"}
    return {
        "shape": {"T": tokens, "H": heads, "K": kv_heads, "E": head},
        "lengths": list(lengths),
        "times": times,
        "ratios": ratios,
    }
