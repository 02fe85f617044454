"""LoRA as a method: which layers get an adapter, and the adapter's folder in PEFT's format."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftlab.config import LoRAConfig
from ftlab.errors import ConfigError, FtlabError
from ftlab.files import atomic_directory
from ftlab.methods.lora_linear import LoRALinear
from ftlab.methods.rules import adapter_table
from ftlab.methods.trainable import TrainableTable
from ftlab.models.heads import fresh_layers, fresh_parameters
from ftlab.operators import TORCH

__all__ = ["LoRA", "apply_lora", "lora_leaves"]

_CONFIG, _WEIGHTS, _SAMPLE = "adapter_config.json", "adapter_model.safetensors", "base_sample.safetensors"
_PREFIX = "base_model.model."

# Settings of PEFT that change what the adapter computes and that ftlab does not have.
_UNSUPPORTED = (
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "lora_bias",
)

_SAMPLES = 16  # numbers of each adapted weight that are kept to know the base again
_SAMPLE_RTOL, _SAMPLE_ATOL = 2.0**-7, 1e-6  # the same base in fp32, bf16 or fp16 stays within these


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

        A third file holds a few numbers of each adapted base weight, by which `load` knows the base again.
        """
        leaves = _applied(model)
        if any(leaf.merged for leaf in leaves.values()):
            raise FtlabError("the adapter is merged into its base; unmerge it before saving")
        settings = peft_settings(self.config, list(leaves), base, fresh_layers(model))
        tensors = _peft_tensors(leaves, model)
        weights = {name: p.detach().float().cpu().contiguous() for name, p in tensors.items()}
        with atomic_directory(directory) as folder:
            save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
            save_file({name: _sample(leaf.weight) for name, leaf in leaves.items()}, folder / _SAMPLE)
            (folder / _CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def load(self, model: nn.Module, directory: Path) -> None:
        """Read an adapter into a model that `apply` has prepared.

        Errors: FtlabError if the model has no adapters or merged ones, if rank, alpha or rslora differ, if tensors are
        missing, left over or of another shape, or if the adapter was trained on other base weights.
        """
        leaves = _applied(model)
        if any(leaf.merged for leaf in leaves.values()):
            raise FtlabError(f"{directory}: the model's present adapter is merged; unmerge it before loading another")
        _check_settings(self.config, directory / _CONFIG, fresh_layers(model))
        saved = _read(directory / _WEIGHTS)
        expected = _peft_tensors(leaves, model)
        problems = [f"missing {name}" for name in expected.keys() - saved.keys()]
        problems += [f"unexpected {name}" for name in saved.keys() - expected.keys()]
        problems += [
            f"{name} is {list(saved[name].shape)}, the model has {list(expected[name].shape)}"
            for name in expected.keys() & saved.keys()
            if saved[name].shape != expected[name].shape
        ]
        if problems:
            shown = "; ".join(sorted(problems)[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise FtlabError(f"{directory / _WEIGHTS} does not fit the model: {shown}; use the method and model it has")
        if (directory / _SAMPLE).exists():
            _check_base(leaves, directory / _SAMPLE)
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(saved[name])

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
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        leaf = LoRALinear(
            base,
            rank=config.rank,
            alpha=config.alpha,
            rslora=config.rslora,
            dropout_p=config.dropout,
            generator=generator,
        )
        leaf.operators = getattr(model, "operators", TORCH)
        _replace(model, name, leaf)
    return names


def lora_leaves(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapter layers by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def peft_settings(config: LoRAConfig, names: list[str], base: str, fresh: tuple[str, ...] = ()) -> dict[str, Any]:
    """adapter_config.json. Plain targets stay as they are; patterns become the list of matched names.

    fresh: layers without pretrained values (a classifier's head), which are saved whole beside the adapters.
    """
    plain = all(re.fullmatch(r"[\w.]+", target) for target in config.targets)
    alpha = config.alpha
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if fresh else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": config.rslora,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.targets) if plain else names,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": list(fresh) or None,
        "use_dora": False,
    }


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
    if heads := sorted(wanted & set(fresh_layers(model))):
        raise ConfigError(
            f"method.targets: {heads[0]} is a new head, which trains whole; an adapter on it would do nothing for it"
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


def _peft_tensors(leaves: dict[str, LoRALinear], model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters, and a new head's, under PEFT's names."""
    tensors = {_PREFIX + name: parameter for name, parameter in fresh_parameters(model).items()}
    for name, leaf in leaves.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = leaf.lora_A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = leaf.lora_B
    return tensors


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FtlabError(f"{path} cannot be read: {error}; give the folder that training wrote") from error


def _check_settings(config: LoRAConfig, path: Path, fresh: tuple[str, ...]) -> None:
    """The folder's settings must be those of `config`, and none that ftlab does not have."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FtlabError(f"{path} cannot be read: {error}; give the folder that training wrote") from error
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise FtlabError(f"{path} does not describe a LoRA adapter; its peft_type must be LORA")
    foreign = [key for key in _UNSUPPORTED if settings.get(key)]
    if (settings.get("modules_to_save") or []) != list(fresh):
        foreign.append(f"modules_to_save={settings.get('modules_to_save')} (here {list(fresh) or None})")
    if settings.get("bias", "none") != "none":
        foreign.append("bias")
    if foreign:
        raise FtlabError(f"{path} uses {', '.join(foreign)}, which ftlab does not have; load this adapter with PEFT")
    ours = {"r": config.rank, "lora_alpha": config.alpha, "use_rslora": config.rslora}
    differing = [
        f"{key} is {settings.get(key)}, here {value}" for key, value in ours.items() if settings.get(key) != value
    ]
    if differing:
        raise FtlabError(f"{path} was written by other settings: {'; '.join(differing)}; use the settings of that run")


def _sample(weight: Tensor) -> Tensor:
    """A few evenly spaced numbers of a weight: fp32 [16], or fewer of a smaller weight."""
    flat = weight.detach().reshape(-1)
    index = torch.arange(min(_SAMPLES, len(flat)), device=flat.device) * max(len(flat) // _SAMPLES, 1)
    return flat[index].float().cpu()


def _check_base(leaves: dict[str, LoRALinear], path: Path) -> None:
    """The base weights must be those that the adapter was trained on, up to the rounding of their dtype."""
    saved = _read(path)
    for name, leaf in leaves.items():
        here = _sample(leaf.weight)
        there = saved.get(name)
        if there is None or there.shape != here.shape or not torch.allclose(here, there, _SAMPLE_RTOL, _SAMPLE_ATOL):
            raise FtlabError(
                f"{path.parent} was trained on other base weights ({name}.weight differs); "
                f"load the model named in {_CONFIG}, unmerged"
            )
