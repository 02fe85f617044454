"""Penalties: scalars added to the loss that hold the weights back.

L2-SP (arXiv 1802.01483, equation 3, without its factor 1/2):

    strength * sum_k ||theta_k - theta0_k||^2

over every trainable tensor that has a pretrained value theta0, and beta * ||theta||^2 over those that have none. Under
LoRA the base is frozen and the weight that acts is W0 + s B A, so the distance of such a layer is that of the effective
weight, from r x r matrices alone:

    ||s B A||_F^2 = s^2 sum_ij (B^T B)_ij (A A^T)_ij

PiSSA and DoRA give the same distance, of their effective weight from the pretrained one (`AdapterLeaf`).

A penalty of one's own is a subclass of `Penalty` with a name and a value, named in the configuration:

    class Smoothness(Penalty):
        name = "smoothness"

        def __init__(self, model, strength):
            self.strength = strength

        def value(self, model):
            return self.strength * sum(p.square().sum() for p in model.parameters() if p.requires_grad)

    regularizer.extra.smoothness='{_target_: my_module.Smoothness, strength: 0.01}'
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftlab.config import RegularizerConfig
from ftlab.errors import ConfigError, FtlabError
from ftlab.losses.anchors import content_hash, mapped
from ftlab.losses.products import sum_over_product
from ftlab.models.heads import fresh_parameters
from ftlab.patterns import pattern_and_factor

__all__ = ["L1SP", "L2", "L2SP", "AdapterLeaf", "DecoupledL2SP", "Penalty", "build_penalties"]


class Penalty(Protocol):
    """Something added to the loss once per optimizer step, whatever the number of tokens in it."""

    name: str

    def value(self, model: nn.Module) -> Tensor:
        """The penalty, already times its strength: an fp32 scalar with a gradient to what trains."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A short hash of what the penalty remembers; a resumed run must find the same one. Empty: nothing."""
        return ""


@runtime_checkable
class AdapterLeaf(Protocol):
    """A layer whose effective weight is its own weight plus an update made of other parameters."""

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The parameters that make the update."""

    def pretrained_weight(self) -> Tensor:
        """The weight that the update is the distance from: fp32, without a gradient."""

    def delta_squared_norm(self) -> Tensor:
        """||update||_F^2: an fp32 scalar with a gradient."""

    def delta_weight(self) -> Tensor:
        """The update itself: fp32, as large as the weight, with a gradient."""

    def product(self) -> tuple[Tensor, Tensor, float] | None:
        """P [out, k], Q [k, in] and s of an update s P Q: fp32, with gradients. None if the update is no product."""


class L2SP(Penalty):
    """strength * ||theta - theta0||^2 (arXiv 1802.01483), where theta0 is `model` as it is when this is built.

    beta * ||theta||^2 is added over what has no pretrained value: the head of a new classifier. rules: PATTERN:FACTOR,
    matched against whole parts of parameter names (of an adapted layer's weight); the first that matches multiplies the
    strength. anchor: theta0 in `fp32`, in `bf16` (rounded, so the pull is to the rounded values), in fp32 on the
    `cpu`, or in files that are mapped, `mmap` (base: the checkpoint of `model`); adapters and a strength of 0 need
    none. Sums run in fp32, under autocast too. Differs from the paper: no factors 1/2.

    Errors: ConfigError for a rule that is none or matches nothing, and where a strength or beta above 0 has nothing to
    act on; FtlabError where an adapter's own weight trains too.
    """

    name = "l2_sp"

    def __init__(
        self,
        model: nn.Module,
        strength: float,
        *,
        beta: float = 0.0,
        anchor: str = "fp32",
        rules: Sequence[str] = (),
        base: Path | None = None,
    ) -> None:
        self.strength, self.beta = strength, beta
        adapted: set[int] = set()
        layers = []
        for name, leaf in _adapter_leaves(model):
            layers.append(f"{name}.weight")
            ids = {id(parameter) for parameter in leaf.adapter_parameters()}
            adapted |= ids
            both = [n for n, p in leaf.named_parameters() if p.requires_grad and id(p) not in ids and p.ndim > 1]
            if both:
                raise FtlabError(
                    f"regularizer.{self.name}: {name} has an adapter and trains its own {', '.join(both)} as well, so "
                    "the distance of its effective weight is not the sum of the two; freeze one of them"
                )
        self.fresh = tuple(name for name, p in fresh_parameters(model).items() if p.requires_grad)
        held = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in adapted and name not in self.fresh
        }
        self.factors = _factors(f"regularizer.{self.name}.rules", rules, [*held, *layers])
        held = {name: p for name, p in held.items() if strength > 0 and self.factors[name] > 0}
        pulled = bool(held) or (strength > 0 and any(self.factors[layer] > 0 for layer in layers))
        if (strength > 0 or beta > 0) and not pulled and not (beta > 0 and self.fresh):
            raise ConfigError(self._nothing_to_hold())
        dtype = torch.bfloat16 if anchor == "bf16" else torch.float32
        self.anchors: dict[str, Tensor] = (
            mapped(held, base)
            if anchor == "mmap"
            else {
                name: parameter.detach().to("cpu" if anchor == "cpu" else parameter.device, dtype, copy=True)
                for name, parameter in held.items()
            }
        )

    def value(self, model: nn.Module) -> Tensor:
        """The penalty; fp32 scalar. Errors: an anchored parameter that `model` no longer has."""
        parameters = dict(model.named_parameters())
        missing = sorted(self.anchors.keys() - parameters.keys())
        if missing:
            raise FtlabError(f"regularizer.l2_sp: the model no longer has the anchored parameters {', '.join(missing)}")
        terms = [self._times(name, _squared_distance(parameters[name], at)) for name, at in self.anchors.items()]
        terms += [
            self._times(f"{name}.weight", leaf.delta_squared_norm())
            for name, leaf in _adapter_leaves(model)
            if self.strength > 0 and self.factors[f"{name}.weight"] > 0
        ]
        fresh = [parameters[name].float().square().sum() for name in self.fresh if self.beta > 0]
        if not terms and not fresh:
            raise FtlabError("regularizer.l2_sp: the model has no trainable weight to hold back")
        totals = [self.strength * torch.stack(terms).sum()] if terms else []
        totals += [self.beta * torch.stack(fresh).sum()] if fresh else []
        return totals[0] if len(totals) == 1 else totals[0] + totals[1]

    def _nothing_to_hold(self) -> str:
        """Why a strength or beta above 0 acts on nothing, and what to do."""
        key = f"regularizer.{self.name}"
        if self.strength > 0 and self.factors:
            return f"{key}.rules: they let go of every weight that trains; leave one a factor above 0"
        if self.strength == 0:
            return f"{key}.beta: it pulls what has no pretrained value, and nothing of that trains; set it to 0"
        if not self.fresh:
            return f"{key}: the model has no trainable weight to hold back; let some train, or set {key}.strength=0"
        other = f"{key}.beta, which pulls it to zero" if self.name == "l2_sp" else f"{key}.strength=0"
        return (
            f"{key}: only what has no pretrained value trains ({', '.join(self.fresh)}), so there is nothing to hold "
            f"it to; let pretrained weights train too, as method=full does, or set {other}"
        )

    def _times(self, name: str, term: Tensor) -> Tensor:
        factor = self.factors[name]
        return term if factor == 1 else factor * term

    def fingerprint(self) -> str:
        """16 hexadecimal digits over the names, shapes and values of the anchors."""
        return content_hash(self.anchors)


class DecoupledL2SP(L2SP):
    """The same pull in the optimizer's step, as AdamW's decay (arXiv 1711.05101) is to L2:

        theta <- theta - lr * wd * theta - lr * AdamW(gradient) - min(1, 2 lr strength) (theta - theta0)

    What Adam divides gradients by does not divide the pull. It ends at theta0 at most: more would diverge. `value` is
    for the log and has no gradient. Errors: ConfigError with adapters, whose effective weight is no parameter of the
    optimizer.
    """

    def __init__(self, model: nn.Module, strength: float, **options: Any) -> None:
        if _adapter_leaves(model):
            raise ConfigError(
                "regularizer.l2_sp.mode: decoupled moves weights that train themselves, and adapters move the "
                "effective weight; use mode=coupled, or method=full or freeze"
            )
        super().__init__(model, strength, **options)

    def value(self, model: nn.Module) -> Tensor:
        """The penalty, detached; fp32 scalar."""
        with torch.no_grad():
            return super().value(model)

    def pulls(self, model: nn.Module) -> dict[Tensor, tuple[Tensor, float]]:
        """For the optimizer: parameter -> (where to, 2 * strength)."""
        parameters = dict(model.named_parameters())
        found: dict[Tensor, tuple[Tensor, float]] = {
            parameters[name]: (at, 2 * self.strength * self.factors[name]) for name, at in self.anchors.items()
        }
        if self.beta > 0:
            for name in self.fresh:
                found[parameters[name]] = (torch.zeros_like(parameters[name], dtype=torch.float32), 2 * self.beta)
        return found


class L2(Penalty):
    """strength * ||theta||^2 over every tensor that trains; under LoRA over A and B themselves."""

    name = "l2"

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def value(self, model: nn.Module) -> Tensor:
        """The penalty; fp32 scalar."""
        terms = [parameter.float().square().sum() for parameter in model.parameters() if parameter.requires_grad]
        return self.strength * torch.stack(terms).sum()


class L1SP(L2SP):
    """strength * ||theta - theta0||_1 (L1-SP of arXiv 1802.01483), where theta0 is `model` when this is built.

    Under LoRA the distance is that of the effective weight: B A, made a block of rows at a time. Errors: those of L2SP.
    """

    name = "l1_sp"

    def value(self, model: nn.Module) -> Tensor:
        """The penalty; fp32 scalar."""
        parameters = dict(model.named_parameters())
        terms = [(parameters[name].float() - anchor).abs().sum() for name, anchor in self.anchors.items()]
        for _, leaf in _adapter_leaves(model):
            if (product := leaf.product()) is not None:
                terms.append(sum_over_product(product, None, _absolute_of_block))
            else:
                terms.append(checkpoint(_absolute, leaf, use_reentrant=False, preserve_rng_state=False))
        return self.strength * torch.stack(terms).sum()


def _absolute_of_block(elements: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    return elements.abs().sum(), elements.sign()


def _absolute(leaf: AdapterLeaf) -> Tensor:
    return leaf.delta_weight().abs().sum()


def build_penalties(config: RegularizerConfig, model: nn.Module, base: Path | None = None) -> list[Penalty]:
    """The penalties of a configuration, ours first, then `extra` in its order; those of strength 0 are not built.

    Call it when `model` holds the pretrained weights and its trainability is settled. base: where these were read from;
    None: nowhere. An entry of `extra` is
    {_target_: module.Class, ...arguments}: the class is called with the model and the arguments. Errors: ConfigError
    naming the entry that cannot be imported or built, or is not a penalty, or has nothing to act on.
    """
    penalties: list[Penalty] = []
    if (l2_sp := config.l2_sp).strength > 0 or l2_sp.beta > 0:
        kind = DecoupledL2SP if l2_sp.mode == "decoupled" else L2SP
        how: dict[str, Any] = {"beta": l2_sp.beta, "anchor": l2_sp.anchor, "rules": l2_sp.rules, "base": base}
        penalties.append(kind(model, l2_sp.strength, **how))
    if config.l1_sp.strength > 0:
        penalties.append(L1SP(model, config.l1_sp.strength))
    if config.l2.strength > 0:
        penalties.append(L2(config.l2.strength))
    if config.ewc.strength > 0:
        from ftlab.losses.ewc import EWC  # builds on this module

        penalties.append(EWC(model, config.ewc))
    for key, entry in config.extra.items():
        penalty = _instantiate(f"regularizer.extra.{key}", entry, model)
        if penalty is not None:
            penalties.append(penalty)
    names = [penalty.name for penalty in penalties]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"regularizer: two penalties have the same name ({', '.join(names)}); metrics need them apart"
        )
    return penalties


def _instantiate(key: str, entry: Any, model: nn.Module) -> Penalty | None:
    """Build one entry of `extra`; None if it has a strength and that is 0."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("_target_"), str):
        raise ConfigError(f"{key}: needs _target_: module.Class and the arguments of that class")
    arguments = {str(name): value for name, value in entry.items() if name != "_target_"}
    if arguments.get("strength") == 0:
        return None
    target: str = entry["_target_"]
    module_name, _, class_name = target.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}._target_: cannot import {target!r}: {error}; is its module on PYTHONPATH?") from error
    try:
        penalty = factory(model, **arguments)
    except TypeError as error:
        raise ConfigError(f"{key}: {target} does not take these arguments: {error}") from error
    absent = [name for name in ("name", "value", "fingerprint") if not hasattr(penalty, name)]
    if absent:
        raise ConfigError(
            f"{key}._target_: {target} has no {', '.join(absent)}; make it a subclass of ftlab.losses.penalties.Penalty"
        )
    built: Penalty = penalty
    return built


def _factors(key: str, rules: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The factor of each of `names`: that of the first rule that matches whole parts of it, else 1."""
    parsed = [pattern_and_factor(key, entry) for entry in rules]
    found: dict[str, float] = {}
    used = set()
    for name in names:
        which = next((number for number, (pattern, _) in enumerate(parsed) if re.fullmatch(pattern, name)), None)
        found[name] = 1.0 if which is None else parsed[which][1]
        used.add(which)
    if idle := [rules[number] for number in range(len(rules)) if number not in used]:
        held = (
            f", such as {', '.join(names[:3])}"
            if names
            else ": nothing that has a pretrained value trains; leave it out"
        )
        raise ConfigError(f"{key}: {idle[0]!r} matches nothing that is held{held}")
    return found


def _adapter_leaves(model: nn.Module) -> list[tuple[str, Any]]:
    """Name and module of every layer with an adapter."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AdapterLeaf)]


def _squared_distance(parameter: Tensor, anchor: Tensor) -> Tensor:
    # torch gives Function.apply no types
    value: Tensor = _SquaredDistance.apply(parameter, anchor)  # type: ignore[no-untyped-call]
    return value


class _SquaredDistance(torch.autograd.Function):
    """||parameter - anchor||^2 in fp32; the difference is made again in backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(parameter, anchor)
        return (parameter.float() - anchor.to(parameter.device)).square_().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        parameter, anchor = ctx.saved_tensors
        return (parameter.float() - anchor.to(parameter.device)).mul_(2 * upstream).to(parameter.dtype), None
