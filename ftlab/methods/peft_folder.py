"""An adapter's folder in PEFT's format: adapter_config.json and adapter_model.safetensors.

Which layers have an adapter is read from the names of the tensors, so every way of naming targets that PEFT has (a
list, a regular expression, all-linear, exclude_modules, layers_to_transform) is understood alike. Rank and alpha of a
layer are those of the first entry of rank_pattern and alpha_pattern that matches its name, as in PEFT.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftlab.config import LoRAConfig
from ftlab.errors import FtlabError
from ftlab.files import atomic_directory
from ftlab.methods.lora_linear import LoRALinear
from ftlab.models.heads import head_layers

__all__ = [
    "CONFIG",
    "PREFIX",
    "WEIGHTS",
    "Settings",
    "adapted_layers",
    "classifier_heads",
    "config_for",
    "config_of",
    "first_match",
    "overrides",
    "read_sample",
    "read_settings",
    "read_tensors",
    "same_sample",
    "write_folder",
]

CONFIG, WEIGHTS, SAMPLE = "adapter_config.json", "adapter_model.safetensors", "base_sample.safetensors"
PREFIX = "base_model.model."

# Keys that ftlab understands, or that change nothing of what a loaded adapter of a linear layer computes.
_UNDERSTOOD = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode"),
    *("init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core"),
    *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
    *("target_modules", "task_type", "use_dora", "use_rslora", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "ensure_weight_tying", "modules_to_save"),
}
# What PEFT puts into modules_to_save of every classifier, though a model has but one of them.
_HEADS = ("classifier", "score")
# First values of A and B that also change the base weights, which the folder does not hold.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says of an adapter; ranks and alphas: by patterns of layer names."""

    rank: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    base: str

    def rank_of(self, layer: str) -> int:
        """r of a layer."""
        return int(first_match(self.ranks, layer, self.rank))

    def alpha_of(self, layer: str) -> float:
        """alpha of a layer."""
        return float(first_match(self.alphas, layer, self.alpha))

    def scale_of(self, layer: str) -> float:
        """What the layer's B A is multiplied by."""
        rank = self.rank_of(layer)
        return self.alpha_of(layer) / (math.sqrt(rank) if self.rslora else rank)


def first_match(patterns: Mapping[str, float], layer: str, otherwise: float) -> float:
    """The number of the first pattern that matches a layer's whole name or its last parts."""
    for pattern, number in patterns.items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", layer):
            return number
    return otherwise


def read_settings(folder: Path, whole: Sequence[str] = ()) -> Settings:
    """whole: the model's heads, which modules_to_save must name; the name of a head it does not have may stand beside.

    Errors: FtlabError if it is no LoRA adapter, uses what ftlab does not have, or has another head than the model.
    """
    path = folder / CONFIG
    found = _read_config(path)
    saved = _saved_whole(found)
    foreign = [key for key in sorted(found) if found[key] and key not in _UNDERSTOOD]
    if found.get("bias", "none") != "none":
        foreign.append("bias")
    if others := [name for name in saved if name not in (*_HEADS, *whole)]:
        foreign.append(f"modules_to_save={others}")
    if foreign:
        raise FtlabError(
            f"{path} uses {', '.join(foreign)}, which ftlab does not have; load this adapter with PEFT, or merge it "
            "there (merge_and_unload) and give the merged model as model.location"
        )
    if saved and not whole:
        raise FtlabError(
            f"{path} is a classifier's (modules_to_save={saved}), but the model here has no head; give the adapter to "
            "a run on data with labels"
        )
    if absent := [name for name in whole if name not in saved]:
        raise FtlabError(
            f"{path}: modules_to_save={found.get('modules_to_save')} does not have the model's head, {absent[0]}; "
            "give an adapter of such a classifier"
        )
    start = found.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        raise FtlabError(
            f"{path}: init_lora_weights={start} means that PEFT changed the base weights too; save it from PEFT with "
            "path_initial_model_for_weight_conversion, which makes it an adapter of the pretrained weights"
        )
    try:
        return Settings(
            rank=int(found["r"]),
            alpha=float(found["lora_alpha"]),
            rslora=bool(found.get("use_rslora")),
            dora=bool(found.get("use_dora")),
            dropout=float(found.get("lora_dropout") or 0.0),
            ranks={str(key): int(value) for key, value in (found.get("rank_pattern") or {}).items()},
            alphas={str(key): float(value) for key, value in (found.get("alpha_pattern") or {}).items()},
            base=str(found.get("base_model_name_or_path")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FtlabError(
            f"{path} is incomplete or damaged ({type(error).__name__}: {error}); write it again"
        ) from error


def classifier_heads(folder: Path) -> list[str]:
    """The heads that modules_to_save names, of which the folder has one; empty in an adapter of a language model.

    Errors: FtlabError if it is no LoRA adapter.
    """
    return [name for name in _saved_whole(_read_config(folder / CONFIG)) if name in _HEADS]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FtlabError(f"{path} cannot be read: {error}; give a folder that training or PEFT wrote") from error
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        raise FtlabError(f"{path} does not describe a LoRA adapter; its peft_type must be LORA")
    return found


def _saved_whole(found: Mapping[str, Any]) -> list[Any]:
    """The names in modules_to_save."""
    names = found.get("modules_to_save") or []
    return names if isinstance(names, list) else [names]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the adapter by its name in the file. Errors: FtlabError if it cannot be read."""
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise FtlabError(
            f"{folder} holds adapter_model.bin, a pickle, which ftlab never opens; save it from PEFT with "
            "safe_serialization=True"
        )
    return _load(path)


def read_sample(folder: Path) -> dict[str, Tensor] | None:
    """A few numbers of each adapted base weight, by layer; None in a folder that ftlab did not write."""
    return _load(folder / SAMPLE) if (folder / SAMPLE).exists() else None


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FtlabError(f"{path} cannot be read: {error}; give a folder that training or PEFT wrote") from error


def write_folder(
    directory: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], base_sample: Mapping[str, Tensor]
) -> None:
    """Write the folder, whole or not at all. tensors: by layer name and PEFT's name of the part."""
    weights = {f"{PREFIX}{name}": tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_directory(directory) as folder:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        if base_sample:
            save_file(dict(base_sample), folder / SAMPLE)
        text = json.dumps(dict(sorted(settings.items())), indent=2)  # the order inside of patterns means something
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def adapted_layers(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the layers that have an A."""
    end = ".lora_A.weight"
    return [name.removeprefix(PREFIX).removesuffix(end) for name in tensors if name.endswith(end)]


def config_of(folder: Path, model: nn.Module) -> LoRAConfig:
    """The method's settings that make such adapters on `model`. Errors: FtlabError on an adapter of another model."""
    settings, layers = read_settings(folder, head_layers(model)), adapted_layers(read_tensors(folder))
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if absent := sorted(set(layers) - set(linear)) or ([] if layers else ["any layer"]):
        raise FtlabError(
            f"{folder} has no adapter that fits this model: no linear layer {absent[0]}; use its own model"
        )
    ends = {name.rpartition(".")[2] for name in layers}
    whole = [name for name in linear if name.rpartition(".")[2] in ends]
    targets = sorted(ends) if set(whole) == set(layers) else [re.escape(name) for name in sorted(layers)]
    return LoRAConfig(
        rank=settings.rank,
        alpha=settings.alpha,
        rslora=settings.rslora,
        dora=settings.dora,
        dropout=settings.dropout,
        targets=targets,
        ranks=[f"{pattern}:{rank}" for pattern, rank in settings.ranks.items()],
        alphas=[f"{pattern}:{_plain(alpha)}" for pattern, alpha in settings.alphas.items()],
    )


def config_for(folder: Path, model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """`config` with what it takes to make the folder's adapters on `model`, on which it has made its own.

    Errors: FtlabError on an adapter of another model.
    """
    theirs = config_of(folder, model)
    keys = ("rank", "alpha", "rslora", "dora", "ranks", "alphas", "init", "targets")
    wanted = replace(config, **{key: getattr(theirs, key) for key in keys})
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    return replace(wanted, targets=config.targets) if adapted == {*adapted_layers(read_tensors(folder))} else wanted


def overrides(config: LoRAConfig, instead_of: LoRAConfig | None = None) -> str:
    """The settings that are not those of `instead_of` (None: the defaults), as one gives them on the command line."""
    given, words = instead_of or LoRAConfig(), []
    for item in fields(config):
        value = getattr(config, item.name)
        if value != getattr(given, item.name):
            if isinstance(value, list):
                text = f"[{','.join(map(str, value))}]"
            elif isinstance(value, float):
                text = str(_plain(value))
            else:
                text = str(value).lower() if isinstance(value, bool) else str(value)
            words.append(f"method.{item.name}={text}")
    return " ".join(f"'{word}'" if "[" in word else word for word in words)


def _plain(value: float) -> float:
    """A whole number as an int."""
    return int(value) if float(value).is_integer() else value


def same_sample(here: Tensor, there: Tensor | None) -> bool:
    """Whether two samples are of the same weight, in fp32, bf16 or fp16."""
    return there is not None and there.shape == here.shape and torch.allclose(here, there, rtol=2.0**-7, atol=1e-6)
