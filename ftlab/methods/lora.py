"""LoRA as a method: which layers get an adapter, and the adapter's folder in PEFT's format."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ftlab.config import LoRAConfig
from ftlab.errors import ConfigError, FtlabError
from ftlab.methods.lora_linear import LoRALinear
from ftlab.methods.peft_folder import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Settings,
    config_for,
    first_match,
    overrides,
    read_sample,
    read_settings,
    read_tensors,
    same_sample,
    write_folder,
)
from ftlab.methods.rules import adapter_table
from ftlab.methods.trainable import ParameterRow, TrainableTable
from ftlab.models.heads import head_layers, head_parameters
from ftlab.operators import TORCH
from ftlab.patterns import pattern_numbers

__all__ = ["LoRA", "apply_lora", "lora_leaves", "quantised_rows"]


class LoRA:
    """Low-rank adapters on the layers of `config.targets`; nothing else trains."""

    keeps_base = True
    stages: tuple[tuple[str, ...], ...] = ()

    def __init__(self, config: LoRAConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed

    def apply(self, model: nn.Module) -> TrainableTable:
        """Put adapters on the targets and freeze everything else."""
        apply_lora(model, self.config, self.seed)
        table = adapter_table(model, self.config)
        table.apply(model)
        return table

    def save(self, model: nn.Module, directory: Path, base: str) -> None:
        """Write a folder that PEFT loads: adapter_config.json and adapter_model.safetensors (fp32).

        It belongs to the pretrained weights, with PiSSA too, whose adapter is of twice the rank. A third file holds a
        few numbers of each adapted base weight, by which `load` knows the base again.
        """
        leaves = _applied(model)
        if any(leaf.merged for leaf in leaves.values()):
            raise FtlabError("the adapter is merged into its base; unmerge it before saving")
        tensors = {f"{n}.{part}": t for n, leaf in leaves.items() for part, t in leaf.peft_tensors().items()}
        tensors |= {name: parameter.detach() for name, parameter in head_parameters(model).items()}
        sample = {name: leaf.base_sample for name, leaf in leaves.items()}
        write_folder(directory, peft_settings(self.config, list(leaves), base, head_layers(model)), tensors, sample)

    def load(self, model: nn.Module, directory: Path) -> None:
        """Read an adapter, of ftlab or of PEFT, into a model that `apply` has prepared.

        Errors: FtlabError if the model has no adapters or merged ones, if rank, alpha, rslora or dora differ, if
        tensors are missing, left over or of another shape, or if the adapter was trained on other base weights.
        """
        leaves = _applied(model)
        if any(leaf.merged for leaf in leaves.values()):
            raise FtlabError(f"{directory}: the model's present adapter is merged; unmerge it before loading another")
        settings = read_settings(directory, head_layers(model))
        _check_settings(self.config, settings, model, directory)
        saved = read_tensors(directory)
        head = {f"{PREFIX}{name}": parameter.detach() for name, parameter in head_parameters(model).items()}
        expected = {f"{PREFIX}{n}.{part}": t for n, leaf in leaves.items() for part, t in leaf.peft_tensors().items()}
        expected |= head
        problems = [f"missing {name}" for name in expected.keys() - saved.keys()]
        problems += [f"unexpected {name}" for name in saved.keys() - expected.keys()]
        problems += [
            f"{name} is {list(saved[name].shape)}, the model has {list(expected[name].shape)}"
            for name in expected.keys() & saved.keys()
            if saved[name].shape != expected[name].shape
        ]
        if problems:
            shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise FtlabError(
                f"{directory / WEIGHTS} does not fit the model: {shown}; use the method and model it has"
                f"{_settings_for(directory, model, self.config)}"
            )
        _check_base(leaves, directory)
        for name, leaf in leaves.items():
            start = f"{PREFIX}{name}."
            leaf.load_peft_tensors({part: saved[start + part] for part in leaf.peft_tensors()})
        for name, parameter in head.items():
            parameter.copy_(saved[name])

    def switch_off(self, model: nn.Module) -> None:
        """Leave the updates out from now on."""
        for leaf in _applied(model).values():
            leaf.enabled = False

    def merge(self, model: nn.Module) -> dict[str, float]:
        """Fold every adapter into its weight, in fp32. Returns each layer's relative rounding error."""
        return {name: leaf.merge() for name, leaf in _applied(model).items()}

    def unmerge(self, model: nn.Module) -> None:
        """Put the untouched base weights back, bit for bit."""
        for leaf in _applied(model).values():
            leaf.unmerge()

    def merged(self, model: nn.Module) -> nn.Module:
        """`model` with each merged adapter layer replaced by a plain linear layer."""
        leaves = _applied(model)
        unmerged = [name for name, leaf in leaves.items() if not leaf.merged]
        if unmerged:
            raise FtlabError(
                f"the adapter of {unmerged[0]} is not merged; call merge first or its update would be lost"
            )
        for name, leaf in leaves.items():
            _replace(model, name, leaf.plain())
        return model

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """Leave the updates out. Errors: FtlabError if they are merged."""
        leaves = list(_applied(model).values())
        if any(leaf.merged for leaf in leaves):
            raise FtlabError("the adapter is merged into its base; unmerge it before disabling it")
        before = [leaf.enabled for leaf in leaves]
        try:
            for leaf in leaves:
                leaf.enabled = False
            yield
        finally:
            for leaf, enabled in zip(leaves, before, strict=True):
                leaf.enabled = enabled


def apply_lora(model: nn.Module, config: LoRAConfig, seed: int) -> list[str]:
    """Replace each target by a `LoRALinear` that takes over its weight; returns the names in the model's order.

    A target is a regular expression that matches a layer's whole name or its last parts (`q_proj`, `mlp.up_proj`).
    A is drawn from a generator of its own, so the same seed gives the same adapters whatever was drawn before.
    Errors: a model with adapters already, a target that matches nothing or something other than a linear layer, and
    layers whose weight is used without calling them.
    """
    if lora_leaves(model):
        raise FtlabError("the model has LoRA adapters already; a second set on top would train in place of the first")
    names = _matched(model, config.targets)
    for key in ("ranks", "alphas"):
        _refuse_idle(key, pattern_numbers(key, getattr(config, key)), names)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        rank, alpha = rank_and_alpha(config, name)
        leaf = LoRALinear(
            base,
            rank=rank,
            alpha=alpha,
            rslora=config.rslora,
            dropout_p=config.dropout,
            generator=generator,
        )
        if config.init == "pissa":
            leaf.take_principal()
        if config.dora:
            leaf.add_magnitude()
        if config.quantize == "nf4":
            leaf.quantise()
        leaf.operators = getattr(model, "operators", TORCH)
        _replace(model, name, leaf)
    return names


def lora_leaves(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapter layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def quantised_rows(model: nn.Module) -> list[ParameterRow]:
    """A row for the weights that are no parameters any more because they are quantised; none if there are none."""
    packed = [leaf.packed for leaf in lora_leaves(model).values() if leaf.packed is not None]
    if not packed:
        return []
    count = sum(weight.shape[0] * weight.shape[1] for weight in packed)
    bits = 8 * sum(weight.nbytes for weight in packed) / count
    return [ParameterRow(f"weights in NF4, {bits:.3f} bits each", False, len(packed), count, 1.0)]


def rank_and_alpha(config: LoRAConfig, name: str) -> tuple[int, float]:
    """r and alpha of a layer."""
    rank = first_match(pattern_numbers("ranks", config.ranks), name, config.rank)
    return int(rank), first_match(pattern_numbers("alphas", config.alphas), name, config.alpha)


def _refuse_idle(key: str, numbers: Mapping[str, float], names: Sequence[str]) -> None:
    for pattern in numbers:
        if not any(first_match({pattern: 1}, name, 0) for name in names):
            raise ConfigError(
                f"method.{key}: {pattern!r} matches none of the adapted layers, such as {', '.join(names[:3])}"
            )


def peft_settings(config: LoRAConfig, names: list[str], base: str, head: tuple[str, ...] = ()) -> dict[str, Any]:
    """adapter_config.json. Plain targets stay as they are; patterns become the list of matched names.

    head: the layers of a classifier's head, which are saved whole beside the adapters.
    PiSSA's update has twice the rank: alpha grows with it, so that the scale stays.
    """
    plain = all(re.fullmatch(r"[\w.]+", target) for target in config.targets)
    ranks, alphas = pattern_numbers("ranks", config.ranks), pattern_numbers("alphas", config.alphas)
    more = 2 if config.init == "pissa" else 1
    more_alpha = math.sqrt(more) if config.rslora else more
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": more * config.rank,
        "lora_alpha": _number(more_alpha * config.alpha),
        "rank_pattern": {pattern: int(more * rank) for pattern, rank in ranks.items()},
        "alpha_pattern": {pattern: _number(more_alpha * alpha) for pattern, alpha in alphas.items()},
        "use_rslora": config.rslora,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.targets) if plain else names,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": list(head) or None,
        "use_dora": config.dora,
    }


def _number(value: float) -> float:
    """A whole number as an int, as PEFT writes it."""
    return int(value) if float(value).is_integer() else value


def _matched(model: nn.Module, targets: list[str]) -> list[str]:
    """Names of the linear layers that the targets match, in the model's order."""
    modules = {name: module for name, module in model.named_modules() if name}
    wanted: set[str] = set()
    for target in targets:
        try:
            pattern = re.compile(rf"(?:.*\.)?(?:{target})")
        except re.error as error:
            raise ConfigError(f"method.targets: {target!r} is not a regular expression: {error}") from error
        found = [name for name in modules if pattern.fullmatch(name)]
        if not found:
            linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, nn.Linear)}
            near = difflib.get_close_matches(target.rpartition(".")[2], linear, n=3, cutoff=0.3) or sorted(linear)[:8]
            raise ConfigError(f"method.targets: {target!r} matches no layer; the nearest are {', '.join(near)}")
        other = [name for name in found if not isinstance(modules[name], nn.Linear)]
        if other:
            kind = type(modules[other[0]]).__name__
            raise ConfigError(
                f"method.targets: {target!r} matches {other[0]}, which is a {kind} and not a linear layer; "
                "make the pattern end in the name of linear layers"
            )
        wanted.update(found)
    if heads := sorted(wanted & set(head_layers(model))):
        raise ConfigError(
            f"method.targets: {heads[0]} is the head, which trains whole; an adapter on it would do nothing for it"
        )
    names = [name for name in modules if name in wanted]
    _refuse_shared(model, names)
    return names


def _refuse_shared(model: nn.Module, names: list[str]) -> None:
    """An adapter on a layer whose weight is read directly (the LM head) or shared would not act everywhere."""
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    head = getattr(model, "head_weight", None)
    for name in names:
        weight = model.get_submodule(name).weight
        if weight is head or owners[id(weight)] > 1:
            raise ConfigError(
                f"method.targets: the weight of {name} is the LM head or shared with another layer; an adapter there "
                "would not act wherever the weight is used, so it cannot be a target"
            )


def _applied(model: nn.Module) -> dict[str, LoRALinear]:
    leaves = lora_leaves(model)
    if not leaves:
        raise FtlabError("the model has no LoRA adapters; call the method's apply on it first")
    return leaves


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _check_settings(config: LoRAConfig, settings: Settings, model: nn.Module, directory: Path) -> None:
    """The folder's settings must make the adapters that the model has."""
    ours = peft_settings(config, [], "")
    differing: dict[str, None] = {}
    for name in lora_leaves(model):
        pairs = (
            ("r", "rank_pattern", settings.rank_of(name), first_match(ours["rank_pattern"], name, ours["r"])),
            (
                *("lora_alpha", "alpha_pattern", settings.alpha_of(name)),
                first_match(ours["alpha_pattern"], name, ours["lora_alpha"]),
            ),
        )
        for key, pattern, there, here in pairs:
            if not math.isclose(there, here, rel_tol=1e-9):
                by_layer = bool(ours[pattern] or (settings.ranks if key == "r" else settings.alphas))
                what = f"{pattern} of {name}" if by_layer else key
                differing[f"{what} is {there:g}, here {here:g}"] = None
    for key, flag in (("use_rslora", settings.rslora), ("use_dora", settings.dora)):
        if flag != ours[key]:
            differing[f"{key} is {flag}, here {ours[key]}"] = None
    if differing:
        raise FtlabError(
            f"{directory / CONFIG} was written by other settings: {'; '.join(list(differing)[:5])}; use the settings "
            f"of that run{_settings_for(directory, model, config)}"
        )


def _settings_for(directory: Path, model: nn.Module, config: LoRAConfig) -> str:
    """The words that make the folder's adapters, behind a colon; nothing if this model cannot have them."""
    try:
        wanted = overrides(config_for(directory, model, config), config)
    except FtlabError:
        return ""
    return f": {wanted}" if wanted else ""


def _check_base(leaves: dict[str, LoRALinear], directory: Path) -> None:
    """The base weights must be those that the adapter was trained on, up to the rounding of their dtype."""
    saved: dict[str, Tensor] | None = read_sample(directory)
    for name, leaf in leaves.items():
        if saved is not None and not same_sample(leaf.base_sample, saved.get(name)):
            raise FtlabError(
                f"{directory} was trained on other base weights ({name}.weight differs); "
                f"load the model named in {CONFIG}, unmerged"
            )
