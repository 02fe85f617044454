"""The goals of the kernels, their thresholds on the GPU at hand, and verdicts. Arithmetic only.

A threshold is stated for C = 3.0 TB/s of copy bandwidth and F = 798 TFLOP/s of bf16 products. A goal says which share
of its time is matrix products and which is moving bytes; the bound here is

    time:  threshold * (1 - matmul - copy + matmul * 798e12 / F + copy * 3.0e12 / C)      rate:  threshold / the same

and a ratio of two measurements, or a number of bytes, stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "COPY",
    "GOALS",
    "LORA_SHAPES",
    "MATMUL",
    "DecoderShape",
    "Goal",
    "bound",
    "flops_per_token",
    "lora_bytes",
    "verdict",
    "verdicts",
]

COPY = 3.0e12  # bytes/s, read and written
MATMUL = 798e12  # FLOP/s
PEAK = 989e12  # FLOP/s: dense bf16 of an H100 SXM and an H200 on paper, what "MFU" divides by


@dataclass(frozen=True)
class Goal:
    """threshold: at COPY and MATMUL. matmul, copy: shares of its time. rate: the threshold is one over a time."""

    section: str
    what: str
    sense: str
    threshold: float
    unit: str = "x"
    matmul: float = 0.0
    copy: float = 0.0
    rate: bool = False


def _time(section: str, what: str, milliseconds: float, matmul: float = 0.0) -> Goal:
    """A time of which `matmul` milliseconds are products and the rest moves bytes."""
    share = matmul / milliseconds
    return Goal(section, what, "<=", milliseconds, "ms", share, 1 - share)


LORA_SHAPES = {"4096x4096": (4096, 4096), "4096x14336": (4096, 14336), "14336x4096": (14336, 4096)}  # K x N
_OVERHEAD = {"4096x4096": 0.16, "4096x14336": 0.10, "14336x4096": 0.14}
_PEFT = {"4096x4096": 1.40, "4096x14336": 1.22, "14336x4096": 1.20}
_COMPILED = {"4096x4096": 1.28, "4096x14336": 1.17, "14336x4096": 1.15}
_GIB, _GB, _MB = 2**30, 1e9, 1e6
# Of the 53.6 us a token takes with every kernel at its limit, 46.3 are matrix products (attention and head included).
_STEP_MATMUL = 46.3 / 53.6


def _goals() -> dict[str, Goal]:
    lora = "lora"
    found = {}
    for shape in LORA_SHAPES:
        linear = f"LoRA linear {shape}, p=0.1, fwd+bwd"
        more = f"{linear}: more than the frozen linear"
        found[f"G1a {shape}"] = Goal(lora, more, "<=", _OVERHEAD[shape], "of it")
        found[f"G1b {shape}"] = Goal(lora, f"{linear}: PEFT eager (bf16 adapters) / ours", ">=", _PEFT[shape])
        found[f"G1c {shape}"] = Goal(lora, f"{linear}: torch.compile(PEFT) / ours", ">=", _COMPILED[shape])
        kept = lora_bytes(8192, LORA_SHAPES[shape][0], 16)
        found[f"G2a {shape}"] = Goal(lora, f"LoRA linear {shape}, p=0.1: kept beyond x", "<=", kept / _MB, "MB")
        found[f"G2b {shape}"] = Goal(lora, f"LoRA linear {shape}, p=0.1: PEFT's kept bytes / ours", ">=", 20.0)
    found |= {
        "G3a": Goal(lora, "LoRA MLP, p=0, fwd+bwd: Unsloth-style / ours", ">=", 1.10),
        "G3b": Goal(lora, "LoRA MLP, p=0, fwd+bwd: PEFT + HF eager / ours", ">=", 1.25),
        "G4a": _time("adamw", "AdamW fp32, 1e9 parameters", 10.15),
        "G4b": Goal("adamw", "AdamW fp32: torch fused / ours", ">=", 1.0),
        "G4c": Goal("adamw", "AdamW fp32 + clip: clip_grad_norm_ and torch fused / ours", ">=", 1.20),
        "G4d": Goal("adamw", "AdamW fp32 + L2-SP (bf16 anchor) + clip: torch foreach / ours", ">=", 1.6),
        "G5a": _time("adamw", "AdamW bf16, stochastic rounding, 1e9 parameters", 8.15),
        "G5b1": _time("adamw", "AdamW bf16, split 16+16 master, 1e9 parameters", 9.6),
        "G5b2": Goal("adamw", "AdamW bf16, split master: torch fused fp32 + bf16 cast / ours", ">=", 1.2),
        "G5c1": _time("adamw", "AdamW bf16, 8-bit states, 1e9 parameters", 3.95),
        "G5c2": Goal("adamw", "AdamW 8-bit: bitsandbytes / ours", ">=", 1.1),
        # 0.447 of the 0.75 ms are bytes; the rest is the host.
        "G6a": Goal("adamw", "AdamW + clip, 448 LoRA tensors, wall clock", "<=", 0.75, "ms", copy=0.447 / 0.75),
        "G6b": Goal("adamw", "AdamW + clip, 448 LoRA tensors: kernels launched", "<=", 3, "launches"),
        "G6c": Goal("adamw", "AdamW + clip, 448 LoRA tensors: torch / ours", ">=", 2.0),
        "G7a": _time("head", "linear CE, frozen head, fwd+bwd", 26.5, 21.57),
        "G7b": Goal("head", "linear CE, frozen head: peak extra memory", "<=", 0.40, "GB"),
        "G7c": Goal("head", "linear CE, frozen head: torch eager / ours", ">=", 1.25),
        "G7d": Goal("head", "linear CE, frozen head: Liger (Triton) / ours", ">=", 1.3),
        "G7e": Goal("head", "linear CE, frozen head: half of the labels ignored / none", "<=", 0.56),
        "G8a": _time("head", "linear CE, trained head, fwd+bwd", 45.0, 32.36),
        "G8b": Goal("head", "linear CE, trained head: peak extra memory beyond the fp32 gradient", "<=", 0.65, "GB"),
        "G9a": _time("pointwise", "add + RMSNorm, fwd+bwd", 0.211),
        "G9b": Goal("pointwise", "add + RMSNorm: torch.compile / ours", ">=", 1.0),
        "G9c": Goal("pointwise", "add + RMSNorm: Liger / ours", ">=", 1.15),
        "G9d": Goal("pointwise", "add + RMSNorm: host time of a fwd+bwd pair", "<=", 0.060, "ms"),
        "G10a": _time("pointwise", "SwiGLU, fwd+bwd", (0.235 + 0.391) / 0.92),
        "G10b": Goal("pointwise", "SwiGLU: Liger / ours", ">=", 1.0),
        "G10c": Goal("pointwise", "SwiGLU: temporaries beyond the outputs", "<=", 0.0, "bytes"),
        "G10d": _time("pointwise", "RoPE, positions of packed documents, fwd+bwd", 2 * 0.0559 / 0.92),
        "G10e": Goal("pointwise", "RoPE: Liger / ours", ">=", 1.0),
        "G10f": Goal("pointwise", "RoPE: temporaries beyond the outputs", "<=", 0.0, "bytes"),
        "G11a": Goal(
            *("end_to_end", "8B LoRA, packed 4096: tokens per second", ">=", 15500.0, "tokens/s"),
            *(_STEP_MATMUL, 1 - _STEP_MATMUL, True),
        ),
        "G11b": Goal("end_to_end", "8B LoRA: ours / HF + PEFT eager SDPA, tokens per second", ">=", 1.6),
        "G11c": Goal("end_to_end", "8B LoRA: ours / HF + PEFT + Liger + torch.compile", ">=", 1.2),
        "G11d": Goal("end_to_end", "8B LoRA, 8192 tokens, nothing recomputed: peak memory", "<=", 55.0, "GiB"),
        "G12a": Goal("correctness", "tests of accuracy on this device that failed", "<=", 0, "tests"),
        "G12b": Goal("correctness", "operations that differ between two runs of one seed", "<=", 0, "operations"),
        "G12c": Goal("correctness", "dropout masks that differ: forward, backward, torch on the CPU", "<=", 0, "masks"),
    }
    return found


def lora_bytes(rows: int, columns: int, rank: int) -> float:
    """What an adapted linear may keep beyond x with dropout: a bit an element of x, and s in at most four bytes."""
    return rows * columns / 8 + 4 * rows * rank


GOALS = _goals()


def bound(goal: Goal, copy: float | None, matmul: float | None) -> float:
    """The threshold on a device of this bandwidth (bytes/s) and rate of products (FLOP/s); None: as stated."""
    slower = 1.0
    if copy is not None:
        slower += goal.copy * (COPY / copy - 1)
    if matmul is not None:
        slower += goal.matmul * (MATMUL / matmul - 1)
    return goal.threshold / slower if goal.rate else goal.threshold * slower


def verdict(
    key: str, measured: float | None, copy: float | None, matmul: float | None, why: str | None = None
) -> dict[str, Any]:
    """One goal's line: met is True or False, or None where nothing was measured (why says the reason)."""
    goal = GOALS[key]
    limit = bound(goal, copy, matmul)
    met = None
    if measured is not None:
        met = measured <= limit if goal.sense == "<=" else measured >= limit
    return {
        "goal": key,
        "what": goal.what,
        "measured": measured,
        "sense": goal.sense,
        "bound": limit,
        "unit": goal.unit,
        "threshold": goal.threshold,
        "met": met,
        "why": (why or "not measured") if measured is None else None,
    }


def verdicts(
    section: str,
    figures: Mapping[str, float],
    copy: float | None,
    matmul: float | None,
    missing: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """All goals of a section in order. missing: by goal, why it has no figure."""
    reasons = missing or {}
    keys = [key for key, goal in GOALS.items() if goal.section == section]
    if unknown := set(figures) - set(keys):
        raise KeyError(f"{section} has no goal {', '.join(sorted(unknown))}")
    return [verdict(key, figures.get(key), copy, matmul, reasons.get(key)) for key in keys]


# --- the work of a training step --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderShape:
    """What the work of a llama depends on."""

    layers: int
    width: int
    hidden: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int

    @property
    def matmul_parameters(self) -> int:
        """Weights that a token is multiplied with, the head included and the embedding not."""
        attention = self.width * self.head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.hidden) + self.width * self.vocabulary


def flops_per_token(shape: DecoderShape, lengths: Sequence[int]) -> float:
    """FLOP of LoRA training a token: 4 a frozen matrix weight, and causal attention with a backward of 2.5 forwards.

    Forward and the gradient of the input; a frozen weight needs no gradient, and the adapters' own are not counted.
    Attention of a document of T tokens: 2 T^2 heads * head FLOP forward in each layer.
    """
    forward = sum(2.0 * length**2 for length in lengths) * shape.heads * shape.head * shape.layers
    return 4.0 * shape.matmul_parameters + 3.5 * forward / sum(lengths)
