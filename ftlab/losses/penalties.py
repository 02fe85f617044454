"""Penalties: scalars added to the loss that hold the weights back.

L2-SP (arXiv 1802.01483, equation 3, without its factor 1/2):

    strength * sum_k ||theta_k - theta0_k||^2

over every trainable tensor that has a pretrained value theta0. Under LoRA the base is frozen and the weight that acts
is W0 + s B A, so the distance of such a layer is that of the effective weight, from r x r matrices alone:

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

import hashlib
import importlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftlab.config import RegularizerConfig
from ftlab.errors import ConfigError, FtlabError

__all__ = ["L1SP", "L2", "L2SP", "AdapterLeaf", "Penalty", "build_penalties"]


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


class L2SP(Penalty):
    """strength * ||theta - theta0||^2 (arXiv 1802.01483), where theta0 is `model` as it is when this is built.

    theta0 costs 4 bytes a trainable parameter and lives on the parameter's device; adapters cost nothing. Sums run in
    fp32, under autocast too. Differs from the paper: no factor 1/2, and no separate pull to zero for new parameters.
    """

    name = "l2_sp"

    def __init__(self, model: nn.Module, strength: float) -> None:
        self.strength = strength
        adapted: set[int] = set()
        for name, leaf in _adapter_leaves(model):
            ids = {id(parameter) for parameter in leaf.adapter_parameters()}
            adapted |= ids
            both = [n for n, p in leaf.named_parameters() if p.requires_grad and id(p) not in ids and p.ndim > 1]
            if both:
                raise FtlabError(
                    f"regularizer.l2_sp: {name} has an adapter and trains its own {', '.join(both)} as well, so the "
                    "distance of its effective weight is not the sum of the two; freeze one of them"
                )
        self.anchors: dict[str, Tensor] = {
            name: parameter.detach().to(torch.float32, copy=True)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in adapted
        }

    def value(self, model: nn.Module) -> Tensor:
        """The penalty; fp32 scalar. Errors: an anchored parameter that `model` no longer has."""
        parameters = dict(model.named_parameters())
        missing = sorted(self.anchors.keys() - parameters.keys())
        if missing:
            raise FtlabError(f"regularizer.l2_sp: the model no longer has the anchored parameters {', '.join(missing)}")
        terms = [_squared_distance(parameters[name], anchor) for name, anchor in self.anchors.items()]
        terms += [leaf.delta_squared_norm() for _, leaf in _adapter_leaves(model)]
        if not terms:
            raise FtlabError("regularizer.l2_sp: the model has no trainable weight to hold back")
        return self.strength * torch.stack(terms).sum()

    def fingerprint(self) -> str:
        """16 hexadecimal digits over the names, shapes and values of the anchors."""
        digest = hashlib.sha256()
        for name, anchor in self.anchors.items():
            digest.update(f"{name}{tuple(anchor.shape)}".encode())
            digest.update(anchor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


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
    """strength * ||theta - theta0||_1 (arXiv 1802.01483, equation 4), where theta0 is `model` when this is built.

    Under LoRA the distance is that of the effective weight: B A of one layer at a time, made in both passes.
    """

    name = "l1_sp"

    def value(self, model: nn.Module) -> Tensor:
        """The penalty; fp32 scalar."""
        parameters = dict(model.named_parameters())
        terms = [(parameters[name].float() - anchor).abs().sum() for name, anchor in self.anchors.items()]
        for _, leaf in _adapter_leaves(model):
            terms.append(checkpoint(_absolute, leaf, use_reentrant=False, preserve_rng_state=False))
        return self.strength * torch.stack(terms).sum()


def _absolute(leaf: AdapterLeaf) -> Tensor:
    return leaf.delta_weight().abs().sum()


def build_penalties(config: RegularizerConfig, model: nn.Module) -> list[Penalty]:
    """The penalties of a configuration, ours first, then `extra` in its order; those of strength 0 are not built.

    Call it when `model` holds the pretrained weights and its trainability is settled. An entry of `extra` is
    {_target_: module.Class, ...arguments}: the class is called with the model and the arguments. Errors: ConfigError
    naming the entry that cannot be imported or built, or is not a penalty.
    """
    penalties: list[Penalty] = []
    if config.l2_sp.strength > 0:
        penalties.append(L2SP(model, config.l2_sp.strength))
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
        return (parameter.float() - anchor).square_().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        parameter, anchor = ctx.saved_tensors
        return (parameter.float() - anchor).mul_(2 * upstream).to(parameter.dtype), None
