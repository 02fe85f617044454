"""Several adapters over one model: switched, weighed, or made into one.

    W = W0 + sum_i w_i s_i B_i A_i = W0 + [w_1 s_1 B_1 | ... | w_k s_k B_k] [A_1; ...; A_k]

A weighted sum of low-rank updates is one low-rank update whose rank is the sum of theirs, exactly: nothing is
approximated. (Adding up the A's and the B's apart, as is sometimes done, gives cross terms B_i A_j instead.) DoRA's
update is no such sum and is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ftlab.errors import FtlabError
from ftlab.methods.lora_linear import LoRALinear
from ftlab.methods.peft_folder import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    adapted_layers,
    classifier_heads,
    read_sample,
    read_settings,
    read_tensors,
    same_sample,
    write_folder,
)
from ftlab.operators import TORCH

__all__ = ["Adapter", "AdapterSet", "combined", "read_adapter", "write_adapter"]


@dataclass(frozen=True)
class Adapter:
    """An update: A [r, in] and s B [out, r] of each layer, fp32; and what is known of the base it belongs to."""

    source: str
    factors: dict[str, tuple[Tensor, Tensor]]
    base: str
    sample: dict[str, Tensor] | None


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder of ftlab's or PEFT's.

    Errors: FtlabError if it cannot be read, has tensors beside A and B, is DoRA, or a classifier's.
    """
    if heads := classifier_heads(folder):
        raise FtlabError(
            f"{folder} is a classifier's adapter (modules_to_save={heads}), whose head cannot be added up; score it by "
            f"python -m ftlab.evaluate run=DIR adapter={folder}, or combine adapters of language models"
        )
    settings, tensors = read_settings(folder), read_tensors(folder)
    if settings.dora:
        raise FtlabError(
            f"{folder} is DoRA (use_dora), whose updates do not add up; merge it by python -m ftlab.export instead"
        )
    factors = {}
    for name in adapted_layers(tensors):
        a, b = (tensors.get(f"{PREFIX}{name}.lora_{letter}.weight") for letter in "AB")
        if a is None or b is None or a.shape[:1] != b.shape[1:] or len(a) != settings.rank_of(name):
            raise FtlabError(f"{folder / WEIGHTS}: A and B of {name} do not fit together, or not the rank in {CONFIG}")
        factors[name] = (a.float(), settings.scale_of(name) * b.float())
    known = {f"{PREFIX}{name}.lora_{letter}.weight" for name in factors for letter in "AB"}
    if foreign := sorted(tensors.keys() - known):
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise FtlabError(
            f"{folder / WEIGHTS} holds what is no A or B of a linear layer and would be lost in a sum: {shown}; merge "
            "this adapter in PEFT (merge_and_unload) and give the merged model as model.location"
        )
    if not factors:
        raise FtlabError(f"{folder / WEIGHTS} holds no LoRA adapter")
    return Adapter(str(folder), factors, settings.base, read_sample(folder))


def combined(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The sum of the updates, each times its weight; one of weight 0 takes no rank.

    Errors: FtlabError if two of them belong to different base weights, or nothing is left.
    """
    sample: dict[str, Tensor] = {}
    pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, (a, b) in adapter.factors.items():
            known = None if adapter.sample is None else adapter.sample.get(name)
            other_base = known is not None and name in sample and not same_sample(sample[name], known)
            if other_base or shapes.setdefault(name, (len(b), a.shape[1])) != (len(b), a.shape[1]):
                raise FtlabError(
                    f"{adapter.source} and {adapters[0].source} belong to different base weights ({name} differs); "
                    "combine adapters of one pretrained model"
                )
            if known is not None:
                sample[name] = known
            if weight != 0:
                pieces.setdefault(name, []).append((a, weight * b))
    if not pieces:
        raise FtlabError("weights: all are 0, so nothing is left to combine; the sum is the pretrained model")
    factors = {name: (torch.cat([a for a, _ in ab]), torch.cat([b for _, b in ab], 1)) for name, ab in pieces.items()}
    whole = factors.keys() <= sample.keys()
    kept = {name: sample[name] for name in factors} if whole else None
    return Adapter(" + ".join(adapter.source for adapter in adapters), factors, adapters[0].base, kept)


def write_adapter(adapter: Adapter, directory: Path) -> None:
    """Write a folder that PEFT and ftlab load; alpha is the rank, so that the scale is 1."""
    ranks = {name: len(a) for name, (a, _) in adapter.factors.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != usual}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "target_modules": list(ranks),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    tensors = {}
    for name, (a, b) in adapter.factors.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    write_folder(directory, settings, tensors, adapter.sample or {})


class AdapterSet:
    """Adapters by name over one model, whose weights are there once. At first none acts."""

    def __init__(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        self.adapters = dict(adapters)
        self.leaves: dict[str, LoRALinear] = {}
        combined(list(self.adapters.values()), [1.0] * len(self.adapters))  # they must belong together
        for adapter in self.adapters.values():
            for name, (a, b) in adapter.factors.items():
                if name not in self.leaves:
                    self.leaves[name] = _leaf(model, name, (len(b), a.shape[1]), adapter)
                known = None if adapter.sample is None else adapter.sample.get(name)
                if known is not None and not same_sample(self.leaves[name].base_sample, known):
                    raise FtlabError(f"{adapter.source} was trained on other base weights ({name}.weight differs)")
        for name, leaf in self.leaves.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, leaf)

    def use(self, weights: Mapping[str, float]) -> None:
        """Let the named adapters act together, each times its weight; the others, and those of weight 0, do not."""
        chosen = {name: weight for name, weight in weights.items() if weight != 0}
        factors = {}
        if chosen:
            factors = combined([self.adapters[name] for name in chosen], list(chosen.values())).factors
        for name, leaf in self.leaves.items():
            leaf.enabled = name in factors
            if leaf.enabled:
                device = leaf.weight.device
                leaf.lora_A, leaf.lora_B = (nn.Parameter(x.to(device), requires_grad=False) for x in factors[name])


def _leaf(model: nn.Module, name: str, shape: tuple[int, int], adapter: Adapter) -> LoRALinear:
    """A layer that stands ready for updates of scale 1. Errors: FtlabError if the model has no such linear layer."""
    base = dict(model.named_modules()).get(name)
    if type(base) is LoRALinear or not isinstance(base, nn.Linear) or tuple(base.weight.shape) != shape:
        raise FtlabError(f"{adapter.source} fits another model: there is no plain linear layer {name} of {shape} here")
    leaf = LoRALinear(base, rank=1, alpha=1.0, rslora=False, dropout_p=0.0, generator=torch.Generator())
    leaf.operators, leaf.enabled = getattr(model, "operators", TORCH), False
    return leaf
