#!/usr/bin/env python3
"""What each part of the CPU path is worth: single operations and whole training steps, side by side in one process.

    python scripts/bench_cpu.py --out docs/results/cpu.json
    python scripts/bench_cpu.py --tiny --repeats 2                no download; its numbers mean nothing

Operations: ftlab_kernels' C against the same in plain torch, forward and backward, at the shapes of SmolLM2-135M with
the tokens of one step; AdamW's step with 8-bit moments. Steps: LoRA on SmolLM2-135M in bf16, 8 examples of HPO
definitions a step, by

- `torch`: kernels=reference;     `native`: kernels=native;
- `native+prefix`: data.share_prefix=true as well;
- `upper`: native+prefix with LoRA on the upper third of the layers;     `upper+cache`: its frozen activations kept.

A round runs every contestant once, in turn; figures are medians over the rounds, ratios are those of one round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from ftlab_kernels import cpu, nf4  # noqa: E402
from ftlab_kernels.adamw import Rule, reference_step  # noqa: E402
from ftlab_kernels.adamw_cpu import eight_bit_step  # noqa: E402
from ftlab_kernels.adapted import Adapted  # noqa: E402
from torch import Tensor  # noqa: E402

from ftlab import build  # noqa: E402
from ftlab.compose import compose  # noqa: E402
from ftlab.data.loader import RowLoader  # noqa: E402
from ftlab.files import atomic_write  # noqa: E402
from ftlab.operators import select, torch_path  # noqa: E402
from ftlab.training.loop import train_step  # noqa: E402
from ftlab.training.parallel import Ranks, Replica, start_ranks  # noqa: E402
from ftlab.training.precision import Precision  # noqa: E402
from ftlab.training.record import describe_machine  # noqa: E402
from scripts.bench_peers import beginning, now  # noqa: E402

__all__ = ["main", "operations", "summary", "table"]

EXAMPLES, BATCH = 160, 8
SMOLLM2 = {"tokens": 576, "width": 576, "hidden": 1536, "heads": 9, "kv_heads": 3, "head": 64, "rank": 16}
SMALL = {"tokens": 24, "width": 32, "hidden": 48, "heads": 4, "kv_heads": 2, "head": 8, "rank": 4}


def operations(sizes: dict[str, int], dtype: torch.dtype) -> dict[str, dict[str, Callable[[], object]]]:
    """For each operation, by contestant, a call that runs it forward and backward; of AdamW a step."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    N, D, F, E, r = (sizes[key] for key in ("tokens", "width", "hidden", "head", "rank"))
    x, residual, weight = draw(N, D), draw(N, D), draw(D)
    gate, up = draw(N, F), draw(N, F)
    q, k = draw(1, N, sizes["heads"], E), draw(1, N, sizes["kv_heads"], E)
    angles = torch.rand(1, N, 1, E // 2, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    count, length = N // 24, 24
    shape = [(count, heads, length, E) for heads in (sizes["heads"], sizes["kv_heads"], sizes["kv_heads"])]
    qkv = [draw(*each) for each in shape]
    outs = (sizes["heads"] * E, sizes["kv_heads"] * E, sizes["kv_heads"] * E)
    adapted = [Adapted(draw(out, D).detach(), None, draw(r, D), draw(out, r), 2.0) for out in outs]

    def both(function: Callable[..., Any], *inputs: Any) -> Callable[[], object]:
        wanted = [tensor for tensor in inputs if isinstance(tensor, Tensor) and tensor.requires_grad]
        wanted += [t for item in inputs if isinstance(item, list) for a in item for t in (a.lora_A, a.lora_B)]

        def call() -> object:
            outputs = function(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return torch.autograd.grad(outputs, wanted, [torch.ones_like(out) for out in outputs])

        return call

    def pair(name: str, *inputs: Any) -> dict[str, Callable[[], object]]:
        return {"torch": both(getattr(torch_path, name), *inputs), "native": both(getattr(cpu, name), *inputs)}

    codes = torch.randint(256, (F * D // nf4.BLOCK, nf4.BLOCK // 2), dtype=torch.uint8, generator=generator)
    quantised = (codes, torch.rand(len(codes), generator=generator), dtype)
    rule = Rule(states="8bit")
    adapters = [torch.randn(shape, generator=generator) for each in adapted for shape in ((r, D), each.lora_B.shape)]

    def stepped(step: Callable[..., object]) -> Callable[[], object]:
        params, states = [p.clone() for p in adapters], [dict[str, Any]() for _ in adapters]
        return lambda: step(params, adapters, states, rule)

    return {
        "AdamW, 8-bit moments (q, k, v)": {"torch": stepped(reference_step), "native": stepped(eight_bit_step)},
        "nf4_dequantise": {
            "torch": lambda: nf4.reference(*quantised),
            "native": lambda: cpu.nf4_dequantise(*quantised),
        },
        "add_rms_norm": pair("add_rms_norm", x, residual, weight, 1e-5),
        "rope": pair("rope", q, k, cos, sin),
        "swiglu": pair("swiglu", gate, up),
        "causal_attention": pair("causal_attention", *qkv),
        "lora_linears (q, k, v; p = 0.1)": {
            "torch": both(lambda x, layers: torch_path.lora_linears(x, layers, 0.1), x, adapted),
            "native": both(lambda x, layers: cpu.lora_linears(x, layers, p=0.1), x, adapted),
        },
    }


def steps(tiny: bool, ranks: Ranks) -> dict[str, Callable[[int], float]]:
    """By contestant, a call that takes one optimizer step of the given number and returns its tokens."""
    model = ["model=tiny_random", "data=capitals"] if tiny else ["model=smollm2_135m", "data=hpo_define"]
    examples = 32 if tiny else EXAMPLES
    common = [
        *model,
        *(f"data.limit_train={examples}", "data.limit_validation=8", "data.limit_test=8", "data.max_length=512"),
        *("data.template=model", "data.packing=false", "data.shuffle=false", f"data.batch_size={BATCH}"),
        *(f"data.micro_batch_size={BATCH}", "method=lora", "method.rank=16", "method.dropout=0.1", "precision=bf16"),
        f"parallel.threads={torch.get_num_threads()}",
        "parallel.device=cpu",
    ]
    upper = r"method.targets=['layers\.1\..*_proj']" if tiny else r"method.targets=['layers\.2[0-9]\..*_proj']"
    wanted = {
        "torch": ["kernels=reference"],
        "native": ["kernels=native"],
        "native+prefix": ["kernels=native", "data.share_prefix=true"],
        "upper": ["kernels=native", "data.share_prefix=true", upper],
        "upper+cache": ["kernels=native", "data.share_prefix=true", upper, "training.activation_cache_gib=1"],
    }
    return {name: contestant([*common, *extra], ranks) for name, extra in wanted.items()}


def contestant(overrides: list[str], ranks: Ranks) -> Callable[[int], float]:
    """A model of its own with its method, data and optimizer."""
    config, _ = compose(overrides)
    tokenizer = build.build_tokenizer(config)
    data = build.build_data(config, tokenizer)
    loader: RowLoader = build.build_loader(config, data, tokenizer)
    precision = Precision(config.precision, ranks.device)
    base, method = build.build_base(config, tokenizer, ranks, None)
    built = build.build_training(config, base, method, precision)
    base.train()
    replica = Replica(base, built.objective, ranks)

    def step(number: int) -> float:
        rows = loader.global_batch(0, number % loader.steps_in_epoch(0))
        batches = [loader.collate(rows)]
        return train_step(replica, built.optimizer, batches, precision=precision, max_grad_norm=1.0).tokens

    return step


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure_operations(sizes: dict[str, int], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each call: {operation: {contestant: one a round}}, the contestants in turn."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, calls in operations(sizes, torch.bfloat16).items():
        for call in calls.values():
            timed(call)
        found[name] = {who: [] for who in calls}
        for _ in range(repeats):
            for who, call in calls.items():
                found[name][who].append(timed(call))
    return found


def measure_steps(tiny: bool, rounds: int, ranks: Ranks) -> dict[str, list[float]]:
    """Seconds per token of each contestant, one figure a round of all its batches, the first round left out."""
    contestants = steps(tiny, ranks)
    batches = (32 if tiny else EXAMPLES) // BATCH
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, step in contestants.items():
            begin = time.perf_counter()
            tokens = sum(step(index) for index in range(batches))
            if number:
                found[name].append((time.perf_counter() - begin) / tokens)
            print(f"round {number}: {name}", file=sys.stderr, flush=True)
    return found


def summary(seconds: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """By contestant: median seconds, and how many times as fast as the baseline: median, lowest and highest round."""
    rows = {}
    for name, values in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds[baseline], values, strict=True)]
        rows[name] = {
            "seconds": statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
        }
    return rows


def table(content: dict[str, Any]) -> str:
    """The record as text."""
    lines = [f"{content['device']['name']}, {content['device']['threads']} threads; x torch, median (lowest - highest)"]
    for name, rows in [*content["operations"].items(), ("a step, tokens/s", content["steps"])]:
        for who, row in rows.items():
            if who != "torch":
                label = name if len(rows) == 2 else f"{name}: {who}"
                lines.append(f"{label:<45} {row['ratio']:5.2f}  ({row['ratio_low']:.2f} - {row['ratio_high']:.2f})")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="bench_cpu.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=30, help="rounds of each operation (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of whole epochs (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="two random layers: no download")
    parser.add_argument("--out", type=Path, help="write the JSON record here")
    chosen = parser.parse_args(argv)
    if min(chosen.repeats, chosen.rounds) < 1:
        parser.error("--repeats and --rounds are at least 1")
    os.environ["FTLAB_BF16"] = "always"  # the steps as the operations, on any processor
    started = beginning()
    config, _ = compose(["model=tiny_random", "data=capitals", "parallel.device=cpu"])
    with start_ranks(config.parallel) as ranks:
        _, line = select("native", ranks.device)
        print(line, file=sys.stderr)
        singles = measure_operations(SMALL if chosen.tiny else SMOLLM2, chosen.repeats)
        content = {
            "format": 1,
            "name": "bench_cpu",
            "command": " ".join(["python", "scripts/bench_cpu.py", *(sys.argv[1:] if argv is None else argv)]),
            **started,
            "device": describe_machine(ranks.device, ranks.world),
            "packages": {"torch": torch.__version__},
            "operations": {name: summary(seconds, "torch") for name, seconds in singles.items()},
            "steps": summary(measure_steps(chosen.tiny, chosen.rounds, ranks), "torch"),
            "finished": now(),
        }
    print(table(content))
    if chosen.out is not None:
        atomic_write(chosen.out, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
