"""G1, G2, G3: the LoRA linear and the LoRA MLP against PEFT, torch.compile and a composition as Unsloth has it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from ftlab_kernels import lora
from ftlab_kernels.adapted import Adapted
from torch import Tensor

from gpu import peers
from gpu.goals import LORA_SHAPES
from gpu.measure import Call, gradients, kept_bytes, normal, ratio
from gpu.section import Section

__all__ = ["run"]

ROWS, RANK, P = 8192, 16, 0.1
PLANS = ("cublas", "triton")


def run(section: Section) -> None:
    """The shapes in the order of what they say; the MLP before the compiled baselines, which take longest."""
    smoke = section.smoke
    section.measure_limits((ROWS, 4096, 4096))
    shapes = {"4096x4096": (64, 48)} if smoke else LORA_SHAPES
    rows = 24 if smoke else ROWS
    for name, (columns, features) in shapes.items():
        section.item(f"linear {name}", functools.partial(linear, section, name, rows, columns, features), needs=12)
        section.item(f"memory {name}", functools.partial(memory, section, name, rows, columns, features), needs=3)
    section.item("mlp", lambda: mlp(section, *((24, 32, 48) if smoke else (ROWS, 4096, 14336))), needs=12)
    for name, (columns, features) in shapes.items():
        section.item(f"compiled {name}", functools.partial(compiled, section, name, rows, columns, features), needs=18)
    section.item("p=0", lambda: without_dropout(section, rows, *next(iter(shapes.values()))), needs=6)
    section.item("ways taken", lambda: {"chosen": lora.chosen()}, needs=0)


class Linear:
    """One frozen weight, its adapter, an input and an upstream gradient."""

    def __init__(self, section: Section, rows: int, columns: int, features: int) -> None:
        device = section.device
        self.x = normal((rows, columns), device).requires_grad_()
        self.weight = normal((features, columns), device, columns**-0.5)
        self.A = normal((RANK, columns), device, columns**-0.5).requires_grad_()
        self.B = normal((features, RANK), device, 0.02).requires_grad_()
        self.dy = normal((rows, features), device)
        self.adapted = Adapted(self.weight, None, self.A, self.B, peers.ALPHA / RANK)

    def frozen(self) -> Call:
        return gradients(lambda x: F.linear(x, self.weight), [self.x], [self.x], [self.dy])

    def ours(self, p: float, path: str | None = None) -> Call:
        """path: None takes the way that lora_plan measured to be the fastest."""

        def function(x: Tensor) -> Tensor:
            return lora.lora_linears(x, [self.adapted], p=p, path=path)[0]

        return gradients(function, [self.x], [self.x, self.A, self.B], [self.dy])

    def ours_wide(self, p: float) -> Call:
        """Adapters stored in fp32, as ftlab trains them: two small casts and fp32 gradients more."""
        A, B = (each.detach().float().requires_grad_() for each in (self.A, self.B))
        layer = Adapted(self.weight, None, A, B, self.adapted.scale)
        return gradients(lambda x: lora.lora_linears(x, [layer], p=p)[0], [self.x], [self.x, A, B], [self.dy])

    def augmented(self, p: float) -> Call:
        """[x | s] and [W | scale B] in buffers with room, as a model that is laid out for it would have them."""
        held = lora.AugmentedWeight(self.weight, RANK)
        x = lora.room_for(self.x.detach(), RANK)
        x.copy_(self.x.detach())
        x.requires_grad_()
        layer = Adapted(held.weight, None, self.A, self.B, self.adapted.scale)
        buffers = lora.Augmented([held], x_has_room=True)

        def function(x: Tensor) -> Tensor:
            return lora.lora_linears(x, [layer], p=p, augmented=buffers)[0]

        return gradients(function, [x], [x, self.A, self.B], [self.dy])

    def peft(self, p: float, *, wide: bool = False, compiled: bool | None = None) -> tuple[Call, str]:
        """PEFT's layer. wide: adapters in fp32. compiled: whether by torch.compile in a smoke run; None: eager."""
        module, adapter, how = peers.peft_linear(self.weight, RANK, p, wide=wide)
        function: Callable[..., Any] = module if compiled is None else peers.compiled(module, smoke=compiled)
        return gradients(function, [self.x], [self.x, *adapter], [self.dy]), how

    def unsloth(self) -> Call:
        A, B = self.A, self.B

        def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            return peers.unsloth_linear(x, peers.Adapter(self.weight, A, B, self.adapted.scale))

        return gradients(function, [self.x, A, B], [self.x, A, B], [self.dy])


def linear(section: Section, name: str, rows: int, columns: int, features: int) -> dict[str, Any]:
    """Ours by every way, the frozen linear alone, and PEFT in eager mode, at p = 0.1."""
    case = Linear(section, rows, columns, features)
    peft, how = case.peft(P)
    wide, _ = case.peft(P, wide=True)
    calls = {"frozen": case.frozen(), "ours": case.ours(P), "PEFT": peft, "PEFT, fp32 adapters": wide}
    calls |= {f"ours, {path}": case.ours(P, path) for path in PLANS}
    calls["ours, fp32 adapters"] = case.ours_wide(P)
    calls["ours, augmented"] = case.augmented(P)
    times = section.bench.compare(calls)
    over = ratio(times, "ours", "frozen")
    gain = ratio(times, "PEFT", "ours")
    section.figure(f"G1a {name}", None if over is None else over["median"] - 1, times["ours"].get("error"))
    section.figure(f"G1b {name}", None if gain is None else gain["median"], times["PEFT"].get("error"))
    ratios = {f"{other} / ours": ratio(times, other, "ours") for other in calls if other != "ours"}
    return {"shape": shape(rows, columns, features, P), "peft": how, "times": times, "ratios": ratios}


def compiled(section: Section, name: str, rows: int, columns: int, features: int) -> dict[str, Any]:
    """The same against torch.compile of PEFT's layer."""
    case = Linear(section, rows, columns, features)
    call, how = case.peft(P, compiled=section.smoke)
    times = section.bench.compare({"ours": case.ours(P), "torch.compile(PEFT)": call})
    gain = ratio(times, "torch.compile(PEFT)", "ours")
    why = times["torch.compile(PEFT)"].get("error")
    section.figure(f"G1c {name}", None if gain is None else gain["median"], why)
    ratios = {"torch.compile(PEFT) / ours": gain}
    return {"shape": shape(rows, columns, features, P), "peft": how, "times": times, "ratios": ratios}


def without_dropout(section: Section, rows: int, columns: int, features: int) -> dict[str, Any]:
    """p = 0, where a composition as Unsloth has it is possible."""
    case = Linear(section, rows, columns, features)
    peft, how = case.peft(0.0)
    calls = {"frozen": case.frozen(), "ours": case.ours(0.0), "PEFT": peft, "Unsloth-style": case.unsloth()}
    times = section.bench.compare(calls)
    ratios = {f"{other} / ours": ratio(times, other, "ours") for other in calls if other != "ours"}
    return {"shape": shape(rows, columns, features, 0.0), "peft": how, "times": times, "ratios": ratios}


def shape(rows: int, columns: int, features: int, p: float) -> dict[str, Any]:
    return {"M": rows, "K": columns, "N": features, "r": RANK, "p": p}


def memory(section: Section, name: str, rows: int, columns: int, features: int) -> dict[str, Any]:
    """What is kept for the backward pass beyond x and the parameters: bytes that autograd holds."""
    case = Linear(section, rows, columns, features)
    module, adapter, how = peers.peft_linear(case.weight, RANK, P)
    known = [case.x, case.weight, case.A, case.B, *adapter]
    kept = {
        "ours": kept_bytes(lambda: lora.lora_linears(case.x, [case.adapted], p=P), known),
        "ours, p=0": kept_bytes(lambda: lora.lora_linears(case.x, [case.adapted]), known),
        "PEFT": kept_bytes(lambda: module(case.x), known),
    }
    section.figure(f"G2a {name}", kept["ours"] / 1e6)
    section.figure(f"G2b {name}", kept["PEFT"] / kept["ours"])
    return {"shape": shape(rows, columns, features, P), "peft": how, "kept_bytes": kept}


def mlp(section: Section, rows: int, width: int, hidden: int) -> dict[str, Any]:
    """gate, up, SwiGLU and down with adapters, p = 0: ours, as Unsloth has it, and PEFT in eager mode."""
    from ftlab_kernels.glu import swiglu

    device, scale = section.device, peers.ALPHA / RANK
    x, dy = normal((rows, width), device).requires_grad_(), normal((rows, width), device)

    def adapter(features: int, columns: int) -> peers.Adapter:
        weight = normal((features, columns), device, columns**-0.5)
        A = normal((RANK, columns), device, columns**-0.5).requires_grad_()
        return peers.Adapter(weight, A, normal((features, RANK), device, 0.02).requires_grad_(), scale)

    parts = (adapter(hidden, width), adapter(hidden, width), adapter(width, hidden))
    gate, up, down = parts
    layers = [Adapted(each.weight, None, each.A, each.B, scale) for each in parts]

    def ours(x: Tensor) -> Tensor:
        return lora.lora_linears(swiglu(*lora.lora_linears(x, layers[:2])), layers[2:])[0]

    module, trained, how = peers.peft_mlp(gate.weight, up.weight, down.weight, RANK)
    wanted = [x, *(tensor for each in parts for tensor in (each.A, each.B))]
    calls = {
        "ours": gradients(ours, [x], wanted, [dy]),
        "Unsloth-style": gradients(lambda x: peers.unsloth_mlp(x, gate, up, down), [x], wanted, [dy]),
        "PEFT + HF": gradients(module, [x], [x, *trained], [dy]),
    }
    times = section.bench.compare(calls)
    for goal, other in (("G3a", "Unsloth-style"), ("G3b", "PEFT + HF")):
        gain = ratio(times, other, "ours")
        section.figure(goal, None if gain is None else gain["median"], times[other].get("error"))
    ratios = {f"{other} / ours": ratio(times, other, "ours") for other in calls if other != "ours"}
    sizes = {"M": rows, "D": width, "F": hidden, "r": RANK, "p": 0.0}
    return {"shape": sizes, "peft": how, "times": times, "ratios": ratios}
