"""G4, G5, G6: one AdamW step of 1e9 parameters, and of the adapters of an 8B model, against torch's fused one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ftlab_kernels.adamw import FusedAdamW
from torch import Tensor

from gpu.measure import Call, Unavailable, normal, pick, ratio, reason
from gpu.peers import has
from gpu.section import Section

__all__ = ["lora_shapes", "run"]

PARAMETERS = 1_000_000_000
MATRIX = 4096 * 4096
LR, DECAY, CLIP, PULL = 1e-4, 0.01, 1.0, 1e-3
ROUNDS = 30


def run(section: Section) -> None:
    """fp32 first, pair by pair, so that only one pair's moments are in memory."""
    section.measure_limits()
    large = Large(section)
    section.item("fp32", lambda: large.plain(), needs=5)
    section.item("fp32, clip", lambda: large.clipped(), needs=5)
    section.item("448 LoRA tensors", lambda: small(section), needs=6)
    section.item("fp32, L2-SP, clip", lambda: large.pulled(), needs=5)
    section.item("bf16, stochastic", lambda: large.stochastic(), needs=4)
    section.item("bf16, split", lambda: large.split(), needs=5)
    section.item("bf16, 8-bit states", lambda: large.eight_bit(), needs=5)


def pieces(total: int, piece: int) -> list[int]:
    """Sizes of tensors that have `total` elements together."""
    return [piece] * (total // piece) + ([total % piece] if total % piece else [])


def lora_shapes(layers: int, width: int, hidden: int, kv: int, rank: int) -> list[tuple[int, int]]:
    """A and B of q, k, v, o, gate, up, down in every layer of a llama."""
    linears = [(width, width), (width, kv), (width, kv), (width, width), (width, hidden), (width, hidden)]
    linears.append((hidden, width))
    one = [shape for columns, features in linears for shape in ((rank, columns), (features, rank))]
    return one * layers


def parameters(shapes: Sequence[Any], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Tensors with gradients of their own dtype."""
    found = []
    for shape in shapes:
        p = normal(shape if isinstance(shape, tuple) else (shape,), device, 0.02, dtype).requires_grad_()
        p.grad = normal(tuple(p.shape), device, 1e-3, dtype)
        found.append(p)
    return found


def torch_adamw(params: list[Tensor]) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY, fused=True)


def ours(params: list[Tensor], **options: Any) -> FusedAdamW:
    return FusedAdamW(params, lr=LR, weight_decay=DECAY, **options)


def clip_and_step(params: list[Tensor], optimizer: torch.optim.Optimizer) -> Call:
    """torch's way: the norm and the scaling in passes of their own, then the step."""

    def call() -> None:
        torch.nn.utils.clip_grad_norm_(params, CLIP, foreach=True)
        optimizer.step()

    return call


class Large:
    """1e9 parameters; every item makes its own and lets go of them."""

    def __init__(self, section: Section) -> None:
        self.section = section
        self.sizes = pieces(3000, 1024) if section.smoke else pieces(PARAMETERS, MATRIX)

    def make(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return parameters(self.sizes, self.section.device, dtype)

    def compare(self, calls: dict[str, Call]) -> dict[str, Any]:
        # The host's share of 10 ms is small, and a graph would freeze the learning rate.
        times = self.section.bench.compare(calls, rounds=ROUNDS, graph=False, flush=False)
        ratios = {f"{other} / ours": ratio(times, other, "ours") for other in calls if other != "ours"}
        return {"parameters": sum(self.sizes), "times": times, "ratios": ratios}

    def judge(self, found: dict[str, Any], time: str | None, gain: tuple[str, str] | None) -> dict[str, Any]:
        """Goals: one for our time, and one for that of a peer over ours."""
        if time is not None:
            self.section.figure(time, pick(found["times"], "ours"), found["times"]["ours"].get("error"))
        if gain is not None:
            goal, other = gain
            value = found["ratios"][f"{other} / ours"]
            self.section.figure(
                goal, None if value is None else value["median"], found["times"][other].get("error", "no time")
            )
        return found

    def plain(self) -> dict[str, Any]:
        params = self.make()
        found = self.compare({"ours": ours(params).step, "torch fused": torch_adamw(params).step})
        return self.judge(found, "G4a", ("G4b", "torch fused"))

    def clipped(self) -> dict[str, Any]:
        params = self.make()
        theirs = clip_and_step(params, torch_adamw(params))
        found = self.compare({"ours": ours(params, max_grad_norm=CLIP).step, "clip_grad_norm_ + fused": theirs})
        return self.judge(found, None, ("G4c", "clip_grad_norm_ + fused"))

    def pulled(self) -> dict[str, Any]:
        """p -= lr * strength * (p - w0) by foreach before torch's step; ours in the step."""
        params = self.make()
        anchors = [p.detach().to(torch.bfloat16) for p in params]
        mine = ours(params, max_grad_norm=CLIP, anchors={p: (a, PULL) for p, a in zip(params, anchors, strict=True)})
        step = clip_and_step(params, torch_adamw(params))

        def theirs() -> None:
            with torch.no_grad():
                distance = torch._foreach_sub(params, anchors)
                torch._foreach_add_(params, distance, alpha=-LR * PULL)
                del distance
            step()

        found = self.compare({"ours": mine.step, "foreach + clip + fused": theirs})
        return self.judge(found, None, ("G4d", "foreach + clip + fused"))

    def stochastic(self) -> dict[str, Any]:
        params = self.make(torch.bfloat16)
        calls: dict[str, Call] = {"ours": ours(params, rounding="stochastic").step}
        calls["torch fused, all bf16 (rounds to nearest)"] = torch_adamw(params).step
        return self.judge(self.compare(calls), "G5a", None)

    def split(self) -> dict[str, Any]:
        """Against fp32 weights that torch steps and that are then copied to the bf16 weights of the model."""
        params, wide = self.make(torch.bfloat16), self.make()
        optimizer = torch_adamw(wide)
        narrow = [p.detach() for p in params]

        def theirs() -> None:
            optimizer.step()
            with torch.no_grad():
                torch._foreach_copy_(narrow, wide)

        found = self.compare({"ours": ours(params, rounding="split").step, "torch fused fp32 + cast": theirs})
        return self.judge(found, "G5b1", ("G5b2", "torch fused fp32 + cast"))

    def eight_bit(self) -> dict[str, Any]:
        params = self.make(torch.bfloat16)
        calls: dict[str, Call] = {"ours": ours(params, rounding="stochastic", states="8bit").step}
        try:
            calls["bitsandbytes"] = bitsandbytes(params)
        except Unavailable as error:
            self.section.figure("G5c2", None, str(error))
            return self.judge(self.compare(calls), "G5c1", None)
        return self.judge(self.compare(calls), "G5c1", ("G5c2", "bitsandbytes"))


def bitsandbytes(params: list[Tensor]) -> Call:
    """AdamW8bit over the same bf16 parameters."""
    if not has("bitsandbytes"):
        raise Unavailable("bitsandbytes is not installed")
    import bitsandbytes as bnb

    step: Call = bnb.optim.AdamW8bit(params, lr=LR, weight_decay=DECAY).step
    return step


def small(section: Section) -> dict[str, Any]:
    """The adapters of an 8B model at rank 16: what the host does counts, so the wall clock is what is judged."""
    sizes = (1, 32, 48, 16, 4) if section.smoke else (32, 4096, 14336, 1024, 16)
    params = parameters(lora_shapes(*sizes), section.device, torch.float32)
    mine = ours(params, max_grad_norm=CLIP)
    theirs = clip_and_step(params, torch_adamw(params))
    calls = {"ours": mine.step, "clip_grad_norm_ + fused": theirs}
    times = section.bench.compare(calls, rounds=50, graph=False)
    gain = ratio(times, "clip_grad_norm_ + fused", "ours")
    wall = times["ours"].get("wall")
    section.figure("G6a", None if wall is None else wall["median"], times["ours"].get("error"))
    section.figure("G6c", None if gain is None else gain["median"], "no time")
    launched = {name: launches(section, call) for name, call in calls.items() if times[name].get("wall")}
    count = launched.get("ours")
    section.figure("G6b", float(count) if isinstance(count, int) else None, str(count))
    return {
        "tensors": len(params),
        "parameters": sum(p.numel() for p in params),
        "times": times,
        "host": {name: section.bench.host_time(call) for name, call in calls.items() if times[name].get("wall")},
        "launches": launched,
        "ratios": {"clip_grad_norm_ + fused / ours": gain},
    }


def launches(section: Section, call: Callable[[], object]) -> int | str:
    """Kernels of one call, as torch's profiler sees them; else why they could not be counted."""
    if section.device.type != "cuda":
        return "there is no GPU to count on"
    try:
        section.bench.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            section.bench.synchronize()
        names = [e.name for e in profile.events() or [] if str(e.device_type).endswith("CUDA")]
    except Exception as error:
        return reason(error)
    # Copies and fills are no launches of kernels.
    kernels = [name for name in names if not name.lower().startswith(("memcpy", "memset"))]
    return len(kernels) if kernels else "the profiler saw no kernel"
