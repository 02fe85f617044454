"""G7, G8: linear head and cross entropy, forward and backward, against torch and Liger."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from ftlab_kernels.linear_cross_entropy import linear_cross_entropy
from torch import Tensor

from gpu import peers
from gpu.measure import Call, Unavailable, median, normal, pick, ratio
from gpu.section import Section

__all__ = ["run"]

ROWS, WIDTH, VOCABULARY = 8192, 4096, 128256
IGNORED = -100
ROUNDS = 30
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(section: Section) -> None:
    """The frozen head, its half of the labels, the trained head, and torch.compile last."""
    sizes = (24, 32, 56) if section.smoke else (ROWS, WIDTH, VOCABULARY)
    section.measure_limits(sizes)
    case = Head(section, *sizes)
    section.item("frozen", case.frozen, needs=12)
    section.item("half ignored", case.half, needs=5)
    section.item("trained", case.trained, needs=8)
    section.item("compiled", case.compiled, needs=15)


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As transformers has it: logits in bf16, softmax in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")


def by_liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = peers.liger("liger_fused_linear_cross_entropy")(hidden, weight, labels, reduction="sum")
    return loss


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Every row has a label, so nothing has to be counted."""
    return linear_cross_entropy(hidden, weight, labels, ignore_index=None)


class Head:
    """Hidden states, a head and labels."""

    def __init__(self, section: Section, rows: int, width: int, vocabulary: int) -> None:
        self.section, self.shape = section, {"N": rows, "D": width, "V": vocabulary}
        device = section.device
        self.hidden = normal((rows, width), device).requires_grad_()
        self.weight = normal((vocabulary, width), device, width**-0.5)
        self.labels = torch.randint(vocabulary, (rows,), device=device)

    def call(self, loss: Loss, *, trained: bool = False, labels: Tensor | None = None) -> Call:
        weight = self.weight.requires_grad_(trained)
        wanted = [self.hidden, weight] if trained else [self.hidden]
        chosen = self.labels if labels is None else labels
        return lambda: torch.autograd.grad(loss(self.hidden, weight, chosen), wanted)

    def compare(self, losses: dict[str, Loss], *, trained: bool = False) -> dict[str, Any]:
        """Times and peak memory. No graph: it would keep the memory of every contestant, and these calls are long."""
        bench = self.section.bench
        calls = {name: self.call(loss, trained=trained) for name, loss in losses.items()}
        times = bench.compare(calls, rounds=ROUNDS, warm_up=2, graph=False)
        extra = {name: bench.peak_extra(call) for name, call in calls.items() if times[name].get("wall")}
        ratios = {f"{other} / ours": ratio(times, other, "ours") for other in calls if other != "ours"}
        return {"shape": self.shape, "times": times, "ratios": ratios, "peak_extra_bytes": extra}

    def losses(self, **more: Loss) -> dict[str, Loss]:
        found: dict[str, Loss] = {"ours": ours, "torch": eager, **more}
        if peers.has("liger_kernel"):
            found["Liger (Triton)"] = by_liger
        return found

    def frozen(self) -> dict[str, Any]:
        figure = self.section.figure
        found = self.compare(self.losses())
        times = found["times"]
        figure("G7a", pick(times, "ours"), times["ours"].get("error"))
        extra = found["peak_extra_bytes"].get("ours")
        figure("G7b", None if extra is None else extra / 1e9, "no device memory to measure")
        gain = found["ratios"]["torch / ours"]
        figure("G7c", None if gain is None else gain["median"], times["torch"].get("error"))
        gain = found["ratios"].get("Liger (Triton) / ours")
        why = times.get("Liger (Triton)", {}).get("error", "liger-kernel is not installed")
        figure("G7d", None if gain is None else gain["median"], why)
        return found

    def half(self) -> dict[str, Any]:
        """Every other label ignored, the rows counted on the device; against all rows in the same rounds."""
        labels = self.labels.clone()
        labels[::2] = IGNORED

        def counting(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORED)

        calls = {"all": self.call(ours), "half": self.call(counting, labels=labels)}
        calls["torch, half"] = self.call(eager, labels=labels)
        times = self.section.bench.compare(calls, rounds=ROUNDS, warm_up=2, graph=False)
        share = median(times, "half") / median(times, "all")
        self.section.figure("G7e", share)
        ratios = {"half / all": ratio(times, "half", "all"), "torch, half / half": ratio(times, "torch, half", "half")}
        return {"shape": self.shape, "times": times, "ratios": ratios}

    def trained(self) -> dict[str, Any]:
        found = self.compare(self.losses(), trained=True)
        self.section.figure("G8a", pick(found["times"], "ours"), found["times"]["ours"].get("error"))
        extra = found["peak_extra_bytes"].get("ours")
        accumulator = 4 * self.shape["V"] * self.shape["D"]
        beyond = None if extra is None else (extra - accumulator) / 1e9
        self.section.figure("G8b", beyond, "no device memory to measure")
        return {**found, "fp32_gradient_bytes": accumulator}

    def compiled(self) -> dict[str, Any]:
        """torch.compile of the eager composition, with the frozen head."""
        by_compiler = peers.compiled(eager, smoke=self.section.smoke)
        found = self.compare({"ours": ours, "torch.compile": by_compiler})
        if "error" in found["times"]["torch.compile"]:
            raise Unavailable(found["times"]["torch.compile"]["error"])
        return found
