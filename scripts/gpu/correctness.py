"""The tests of every kernel on this device in every dtype, and G12: the same bits in every run, one mask anywhere."""

from __future__ import annotations

import collections
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu.measure import normal
from gpu.records import ROOT
from gpu.section import Section

__all__ = ["run", "summarize"]

TESTS = "tests/kernels/interpreted"
SMOKE_TESTS = [f"{TESTS}/test_dropout.py", "-k", "test_output_and_gradient and 16"]
WORKERS = 12
MARGIN = 8.0  # seconds kept for what comes after the tests
DTYPES = ("float32", "float16", "bfloat16", "float64")


def run(section: Section) -> None:
    """G12 by itself first: it takes seconds."""
    section.item("same bits", lambda: repeats(section), needs=15)
    section.item("same masks", lambda: masks(section), needs=3)
    section.item("tests", lambda: tests(section), needs=20)


# --- the tests --------------------------------------------------------------------------------------------------------


def tests(section: Section) -> dict[str, Any]:
    """pytest over the interpreter's tests, here on the device; several workers, since compiling takes the time."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
        words += ["-p", "gpu.pytest_lines"]
        # A warning of another version of torch or triton is no error of a kernel.
        words += ["-W", "default", "--no-network", "--tb=short"]
        workers = 0 if section.smoke else min(WORKERS, os.cpu_count() or 1)
        if workers > 1 and importlib.util.find_spec("xdist") is not None:
            words += ["-n", str(workers)]
        words += SMOKE_TESTS if section.smoke else [TESTS]
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "FTLAB_LINES": str(lines), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment.pop("PYTEST_XDIST_WORKER", None)  # of a pytest that started this: it would make pytest_lines silent
        if not section.smoke:
            environment.pop("TRITON_INTERPRET", None)
        limit = 600.0 if section.smoke else max(section.left - MARGIN, 10.0)
        status: int | str
        try:
            done = subprocess.run(
                words, cwd=ROOT, env=environment, timeout=limit, check=False, capture_output=True, text=True
            )
            status, tail = done.returncode, (done.stdout + done.stderr)[-3000:]
        except subprocess.TimeoutExpired:
            status, tail = f"stopped after {limit:.0f} s", ""
        content = lines.read_text("utf-8") if lines.exists() else ""
    found = summarize(json.loads(line) for line in content.splitlines())
    complete = status in (0, 1) and found["ran"] > 0
    why = f"pytest ended with {status}; {found['ran']} of {found['collected']} tests ran"
    section.figure("G12a", float(len(found["failed"])) if complete else None, why)
    return {"command": words[1:], "exit": status, **found, **({} if complete else {"output": tail})}


def summarize(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts by outcome, file and dtype, what failed by name, and the slowest."""
    by_file: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    by_dtype: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    counts: collections.Counter[str] = collections.Counter()
    failed: dict[str, str] = {}
    seconds: dict[str, float] = {}
    collected = 0
    for line in lines:
        if line["kind"] == "collected":
            collected = max(collected, line["count"])
            continue
        name, outcome = line["name"], line["outcome"]
        counts[outcome] += 1
        by_file[name.split("::")[0].rpartition("/")[2]][outcome] += 1
        for dtype in DTYPES:
            # bfloat16 does not count as float16.
            if re.search(rf"(?<![a-z]){dtype}(?!\d)", name.partition("[")[2]):
                by_dtype[dtype][outcome] += 1
        if outcome == "failed":
            failed[name] = line["why"] or ""
        seconds[name] = line["seconds"]
    slowest = sorted(seconds, key=lambda name: -seconds[name])[:10]
    return {
        "collected": collected or sum(counts.values()),
        "ran": sum(counts.values()),
        "counts": dict(counts),
        "by_file": {name: dict(count) for name, count in sorted(by_file.items())},
        "by_dtype": {name: dict(count) for name, count in sorted(by_dtype.items())},
        "failed": failed,
        "slowest": {name: seconds[name] for name in slowest},
    }


# --- the same bits ----------------------------------------------------------------------------------------------------


def repeats(section: Section) -> dict[str, Any]:
    """Every operation twice, forward and backward, from the same seed: which outputs or gradients differ."""
    found: dict[str, str] = {}
    for name, case in cases(section).items():
        try:
            first, second = ([x.clone() for x in case()] for _ in range(2))
            same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
            found[name] = "equal" if all(same) else f"results {[n for n, equal in enumerate(same) if not equal]} differ"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    differing = [name for name, result in found.items() if result != "equal"]
    section.figure("G12b", float(len(differing)))
    return {"operations": found}


def cases(section: Section) -> dict[str, Callable[[], list[Tensor]]]:
    """By operation, a call that gives its outputs and gradients at a size that many programs share."""
    from ftlab_kernels import linear_cross_entropy, lora, nf4, norm
    from ftlab_kernels.adapted import Adapted
    from ftlab_kernels.dropout import dropout

    device = section.device
    M, K, N, V = (12, 24, 24, 40) if section.smoke else (4096, 2048, 4096, 32000)
    x, r = (normal((M, K), device).requires_grad_() for _ in range(2))
    weight = normal((N, K), device, K**-0.5)
    A, B = (normal(shape, device, 0.02).requires_grad_() for shape in ((16, K), (N, 16)))
    layer = Adapted(weight, None, A, B, 2.0)
    gain = (1 + normal((K,), device, 0.1)).requires_grad_()
    seed = torch.tensor([1234567], dtype=torch.int64, device=device)
    head = normal((V, K), device, K**-0.5).requires_grad_()
    labels = torch.randint(V, (M,), device=device)
    codes = torch.randint(256, (M, nf4.BLOCK // 2), device=device, dtype=torch.uint8)
    magnitudes = 1 + normal((M,), device, 0.1).float()
    up = {width: normal((M, width), device) for width in (K, N)}

    def both(outputs: Any, wanted: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [*outputs, *torch.autograd.grad(outputs, wanted, upstream)]

    def by_path(path: str) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            return both(lora.lora_linears(x, [layer], p=0.1, seed=seed, path=path), [x, A, B], [up[N]])

        return call

    def cross_entropy() -> list[Tensor]:
        loss = linear_cross_entropy.linear_cross_entropy(x, head, labels)
        return both(loss, [x, head], [torch.ones_like(loss)])

    return {
        "dropout": lambda: both(dropout(x, 0.1, seed=seed), [x], [up[K]]),
        "lora, cublas": by_path("cublas"),
        "lora, triton": by_path("triton"),
        "linear cross entropy": cross_entropy,
        "rms norm": lambda: both(norm.rms_norm(x, gain, 1e-5), [x, gain], [up[K]]),
        "add + rms norm": lambda: both(norm.add_rms_norm(x, r, gain, 1e-5), [x, r, gain], [up[K], up[K]]),
        "layer norm": lambda: both(norm.layer_norm(x, gain, None, 1e-5), [x, gain], [up[K]]),
        "swiglu": lambda: swiglu(x, r, up[K]),
        "rope": lambda: rope(section),
        "nf4": lambda: [nf4.nf4_dequantise(codes, magnitudes, torch.bfloat16)],
        "packed attention": lambda: attention(section),
        **{f"adamw, {name}": functools.partial(adamw, section, options) for name, options in ADAMW.items()},
    }


ADAMW: dict[str, dict[str, Any]] = {
    "fp32": {},
    "stochastic": {"rounding": "stochastic"},
    "split": {"rounding": "split"},
    "8-bit": {"rounding": "stochastic", "states": "8bit"},
}


def swiglu(gate: Tensor, up: Tensor, upstream: Tensor) -> list[Tensor]:
    from ftlab_kernels import glu

    out = glu.swiglu(gate, up)
    return [out, *torch.autograd.grad(out, [gate, up], upstream)]


def seeded(section: Section, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The same values in every call."""
    generator = torch.Generator(section.device).manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device=section.device).normal_(0, 1, generator=generator)


def rope(section: Section) -> list[Tensor]:
    from ftlab_kernels import rope as kernel

    tokens, head = (12, 16) if section.smoke else (2048, 128)
    q, k = (seeded(section, 1, tokens, heads, head, seed=heads).requires_grad_() for heads in (4, 2))
    angles = seeded(section, 1, tokens, 1, head // 2, dtype=torch.float32)
    outputs = kernel.rope(q, k, angles.cos(), angles.sin())
    return [*outputs, *torch.autograd.grad(outputs, [q, k], [seeded(section, *x.shape, seed=7) for x in (q, k)])]


def attention(section: Section) -> list[Tensor]:
    """torch's own kernels do the work here, which promise equal bits under its flag alone."""
    from ftlab_kernels.attention import packed_attention

    tokens, head = (12, 16) if section.smoke else (2048, 128)
    q, k, v = (seeded(section, 1, tokens, heads, head, seed=n).requires_grad_() for n, heads in enumerate((4, 2, 2)))
    lengths = (tokens // 2, tokens // 3, tokens - tokens // 2 - tokens // 3)
    torch.use_deterministic_algorithms(True)
    try:
        out = packed_attention(q, k, v, lengths)
        return [out, *torch.autograd.grad(out, [q, k, v], seeded(section, *out.shape, seed=9))]
    finally:
        torch.use_deterministic_algorithms(False)


def adamw(section: Section, options: Mapping[str, Any]) -> list[Tensor]:
    """Three steps of a few tensors."""
    from ftlab_kernels.adamw import FusedAdamW

    dtype = torch.bfloat16 if options else torch.float32
    sizes = (300, 17) if section.smoke else (1_000_003, 4096, 17)
    params = [seeded(section, size, seed=size, dtype=dtype).requires_grad_() for size in sizes]
    optimizer = FusedAdamW(params, lr=1e-2, max_grad_norm=1.0, **options)
    for step in range(3):
        for p in params:
            p.grad = seeded(section, len(p), seed=step, dtype=dtype)
        optimizer.step()
    return [p.detach() for p in params]


# --- the same mask ----------------------------------------------------------------------------------------------------


def masks(section: Section) -> dict[str, Any]:
    """The mask that a kernel draws, the one its backward applies and that of torch on the CPU, bit for bit."""
    from ftlab_kernels import lora_launch
    from ftlab_kernels.common import ceil_div
    from ftlab_kernels.dropout import dropout
    from ftlab_kernels.random import GROUP, keep_scale, mask_bytes, unpack_mask

    found: dict[str, int] = {}
    shapes = [(5, 24), (7, 13)] if section.smoke else [(1024, 4096), (257, 1003)]
    for rows, columns in shapes:
        for number, p in ((3, 0.1), (2**62 + 5, 0.5)):
            where = f"{rows}x{columns}, p={p}"
            truth = mask_bytes(torch.tensor([number]), rows, columns, p)
            keep = unpack_mask(truth, columns).to(section.device)
            seed = torch.tensor([number], device=section.device)
            ones = torch.ones(rows, columns, device=section.device).requires_grad_()
            out = dropout(ones, p, seed=seed)
            (gradient,) = torch.autograd.grad(out, ones, torch.ones_like(out))
            drawn = torch.zeros(rows, ceil_div(columns, GROUP), dtype=torch.uint8, device=section.device)
            x, A = seeded(section, rows, columns), seeded(section, 16, columns)
            s = torch.empty(rows, 16, dtype=x.dtype, device=section.device)
            lora_launch.project(x, A, s, factor=keep_scale(p), mask=drawn, seed=seed, p=p)
            found[f"dropout forward, {where}"] = int(((out != 0) != keep).sum())
            found[f"dropout backward, {where}"] = int(((gradient != 0) != keep).sum())
            found[f"lora's packed mask, {where}"] = int((drawn.cpu() != truth).sum())
    section.figure("G12c", float(sum(count > 0 for count in found.values())))
    return {"differing": found}
