"""G11: whole training steps of LoRA on llamas of 1B and 8B with random weights, against transformers and PEFT.

A step: forward, backward, clipping and AdamW over 2 rows of 4096 tokens, every token supervised but the last of a
document. rows: one document fills a row, so that every contestant computes the same attention. documents: documents of
mixed lengths packed into the rows; ftlab isolates them, and the attention it is credited with is that of the documents.

    tokens/s = tokens of the step / median seconds of a step on the host's clock
    MFU = tokens/s * FLOP per token (`goals.flops_per_token`: 4 a frozen weight, causal attention) / 989e12

All contestants of a model share its frozen weights in memory and take turns step by step. peak memory: of one step,
weights included, nothing recomputed. Where two rows do not fit, transformers gets one; `tokens` says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gpu import peers
from gpu.goals import PEAK, flops_per_token
from gpu.llamas import LLAMAS, SMOKE_LLAMA, FtlabRun, HfRun, batch_of
from gpu.measure import Unavailable, reason, summary
from gpu.pointwise import document_lengths
from gpu.section import Section, free

__all__ = ["figures", "run"]

ROWS, TOKENS = 2, 4096
WARM_UP = 2
STEPS = {"llama 8B": 8, "llama 1B": 20, "tiny": 1}


@dataclass(frozen=True)
class Stepper:
    """A call that takes a step of so many tokens, and what to try where it does not fit in memory."""

    step: Callable[[], float]
    tokens: int
    smaller: Callable[[], Stepper] | None = None


Contestants = dict[str, Callable[[], Stepper]]


@dataclass(frozen=True)
class Setting:
    """One table of contestants."""

    model: str
    dropout: float
    layout: str


def run(section: Section) -> None:
    """The 8B model first, without dropout: its goals; then 1B, with dropout, packed documents, compiled baselines."""
    section.measure_limits((8192, 4096, 14336))
    smoke = section.smoke
    first, second = ("tiny", "tiny") if smoke else ("llama 8B", "llama 1B")
    settings = [
        (Setting(first, 0.0, "rows"), 25.0),
        (Setting(second, 0.1, "documents"), 10.0),
        (Setting(second, 0.0, "rows"), 12.0),
        (Setting(first, 0.1, "documents"), 20.0),
        (Setting(second, 0.1, "rows"), 12.0),
        (Setting(second, 0.0, "documents"), 10.0),
    ]
    for setting, needs in settings[:2] if smoke else settings:
        name = f"{setting.model}, p={setting.dropout}, {setting.layout}"
        section.item(name, functools.partial(compare, section, setting), needs=needs)
    name = f"{first}, p=0.0, rows, compiled"
    section.item(name, functools.partial(compare, section, Setting(first, 0.0, "rows"), compiled=True), needs=35)


def compare(section: Section, setting: Setting, *, compiled: bool = False) -> dict[str, Any]:
    """All contestants of one setting, in turn; what does not fit in memory is noted and left out."""
    llama = SMOKE_LLAMA if setting.model == "tiny" else LLAMAS[setting.model]
    rows, tokens = (1, 12) if section.smoke else (ROWS, TOKENS)
    lengths = [tokens] * rows
    if setting.layout == "documents":
        lengths = [length for _ in range(rows) for length in document_lengths(tokens, tokens // 2)]
    batch = batch_of(llama.config, rows, tokens, lengths, section.device)
    shared = FtlabRun(llama, section.device, setting.dropout)

    def ftlab(kernels: str) -> Stepper:
        return Stepper(shared.stepper(kernels, batch), batch.num_tokens)

    def hf(**options: Any) -> Stepper:
        if options.get("liger") and not peers.has("liger_kernel"):
            raise Unavailable("liger-kernel is not installed")
        run = HfRun(shared, setting.dropout, smoke=section.smoke, **options)
        one = batch_of(llama.config, 1, tokens, [tokens], section.device)
        return Stepper(run.stepper(batch), batch.num_tokens, lambda: Stepper(run.stepper(one), one.num_tokens))

    contestants: Contestants = {"ftlab, triton": lambda: ftlab("triton")}
    if compiled:
        contestants["HF + PEFT, compiled"] = lambda: hf(compiled=True)
        contestants["HF + PEFT + Liger, compiled"] = lambda: hf(compiled=True, liger=True)
    else:
        contestants["ftlab, reference"] = lambda: ftlab("reference")
        if setting.layout == "rows":
            contestants["HF + PEFT, eager SDPA"] = hf
    found = measure(section, contestants, STEPS[setting.model])
    work = flops_per_token(llama.shape, lengths)
    for entry in found.values():
        if "tokens_per_second" in entry:
            entry["mfu"] = entry["tokens_per_second"] * work / PEAK
            if section.matmul is not None:
                entry["share_of_measured_matmul"] = entry["tokens_per_second"] * work / section.matmul
    if setting.model in ("llama 8B", "tiny") and setting.dropout == 0 and setting.layout == "rows":
        figures(section, found, compiled=compiled)
    return {
        "setting": {**asdict(setting), "rows": rows, "row_tokens": tokens, "documents": len(lengths), "rank": 16},
        "flops_per_token": work,
        "contestants": found,
        "ftlab": {"adapters": "fp32, bf16 autocast over a bf16 base", "kernels": shared.taken()},
        "hf": "bf16 adapters and base, no autocast, AdamW fused, clip_grad_norm_",
    }


def figures(section: Section, found: dict[str, dict[str, Any]], *, compiled: bool) -> None:
    """What G11 is judged by."""
    ours = found["ftlab, triton"]
    speed, why = ours.get("tokens_per_second"), ours.get("error")
    if compiled:
        missing = "liger-kernel is not installed" if not peers.has("liger_kernel") else "not measured"
        other = found.get("HF + PEFT + Liger, compiled", {})
        theirs = other.get("tokens_per_second")
        gain = speed / theirs if speed and theirs else None
        section.figure("G11c", gain, other.get("error", missing))
        return
    section.figure("G11a", speed, why)
    theirs = found["HF + PEFT, eager SDPA"].get("tokens_per_second")
    gain = speed / theirs if speed and theirs else None
    section.figure("G11b", gain, found["HF + PEFT, eager SDPA"].get("error", why))
    peak = ours.get("peak_bytes")
    section.figure("G11d", None if peak is None else peak / 2**30, why or "no device memory to measure")


def measure(section: Section, contestants: Contestants, steps: int) -> dict[str, dict[str, Any]]:
    """Steps in turn: {name: {step, tokens, tokens_per_second, peak_bytes, loss}} or {error}."""
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, Stepper] = {}
    for name, make in contestants.items():
        found[name], stepper = first_steps(section, make)
        if stepper is not None:
            ready[name] = stepper
        free(section.device)
    # A step waits for the device itself, to know the loss.
    turns = section.bench.in_turn({name: stepper.step for name, stepper in ready.items()}, steps, found)
    for name, seconds in turns.items():
        times = summary(seconds)
        found[name] |= {"step": times, "tokens_per_second": ready[name].tokens / (1e-3 * times["median"])}
    return found


def first_steps(section: Section, make: Callable[[], Stepper]) -> tuple[dict[str, Any], Stepper | None]:
    """Warm up, and measure the memory of one step; in a smaller batch if this one does not fit."""
    smaller = None
    try:
        stepper = make()
        smaller = stepper.smaller
        return warmed(section, stepper), stepper
    except torch.OutOfMemoryError as error:
        problem = reason(error)
    except Exception as error:
        return {"error": reason(error)}, None
    free(section.device)
    if smaller is None:
        return {"error": problem}, None
    entry, fitting = first_steps(section, smaller)
    return {**entry, "larger": problem}, fitting


def warmed(section: Section, stepper: Stepper) -> dict[str, Any]:
    cuda = section.device.type == "cuda"
    for _ in range(0 if section.smoke else WARM_UP):
        stepper.step()
    if cuda:
        section.bench.synchronize()
        torch.cuda.reset_peak_memory_stats()
    loss = stepper.step()
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {"tokens": stepper.tokens, "peak_bytes": peak, "loss": loss}
