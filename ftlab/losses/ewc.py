"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3).

    strength / 2 * sum over past tasks k, parameters i of F_ki (theta_i - theta*_ki)^2

F is the diagonal Fisher information of task k and theta* the weights that it ended with (`ftlab.losses.fisher`). Under
LoRA theta is the effective weight W + s B A: what earlier tasks need is protected whatever parametrisation moves it.
The cost: B A, made a block of rows at a time.

A head is protected where the model has the same (`ftlab.models.heads.Head.facts`); that of another task is left out.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftlab.config import EWCConfig
from ftlab.errors import FtlabError
from ftlab.losses.fisher import FILE, FisherFacts, read_fisher
from ftlab.losses.penalties import AdapterLeaf, Penalty
from ftlab.losses.products import sum_over_product
from ftlab.models.heads import head_facts, is_head, is_pooler

__all__ = ["EWC", "of_another_head"]

_SAME = 2.0**-7  # a base stored in bf16 and the anchor it was rounded from agree to this


@dataclass
class _Held:
    """One parameter and one task: F, and what the distance to theta* is the weight, or the update, plus.

    offset: - theta* for a weight; for an update the pretrained weight minus theta*, or None where they are the same.
    """

    name: str
    fisher: Tensor
    offset: Tensor | None


class EWC(Penalty):
    """The pull to the tasks of finished runs. F is kept in bf16, offsets in fp32, on the parameters' device.

    left_out: a line for each run whose head is another task's.

    Errors: FtlabError if a run has no Fisher information, knows another model, or protects nothing that trains.
    """

    name = "ewc"

    def __init__(self, model: nn.Module, config: EWCConfig) -> None:
        self.strength = config.strength
        self._digest = hashlib.sha256()
        self.held: list[_Held] = []
        self.left_out: list[str] = []
        for source in config.source:
            self._add(model, Path(source) / FILE)

    def _add(self, model: nn.Module, path: Path) -> None:
        fisher, anchors, facts = read_fisher(path)
        self._digest.update(repr((facts, sorted(fisher))).encode())
        parameters = dict(model.named_parameters())
        adapted = _adapters(model)
        found = 0
        if other_head := of_another_head(fisher, facts, model):
            self.left_out.append(
                f"regularizer.ewc: the head in {path} is another task's (other labels or pooling): left out"
            )
        for name, values in fisher.items():
            if name in other_head:
                continue
            leaf = adapted.get(name)
            weight = parameters.get(name) if leaf is None else leaf.pretrained_weight()
            if weight is None or weight.shape != values.shape:
                raise FtlabError(
                    f"regularizer.ewc: {path} is of another model ({name} {list(values.shape)} is not here); start "
                    "from the model that its run ended with"
                )
            self._digest.update(values.view(torch.uint8).numpy().data)
            if leaf is None and not weight.requires_grad:
                continue  # frozen: it stays where it is
            found += 1
            anchor = anchors[name].to(weight.device)
            offset: Tensor | None = -anchor
            if leaf is not None:
                pretrained = weight.detach().float()
                offset = None if torch.allclose(pretrained, anchor, _SAME, 1e-6) else pretrained - anchor
            self.held.append(_Held(name, values.to(weight.device), offset))
        if not found:
            raise FtlabError(
                f"regularizer.ewc: nothing that trains here was measured in {path}; train the same weights, or "
                "adapters on the same layers"
            )

    def value(self, model: nn.Module) -> Tensor:
        """The penalty; fp32 scalar."""
        parameters = dict(model.named_parameters())
        adapted = _adapters(model)
        terms = [self._term(parameters.get(held.name), adapted.get(held.name), held) for held in self.held]
        return 0.5 * self.strength * torch.stack(terms).sum()

    def _term(self, weight: Tensor | None, leaf: AdapterLeaf | None, held: _Held) -> Tensor:
        if leaf is not None and (product := leaf.product()) is not None:
            return sum_over_product(product, held.offset, functools.partial(_weighted_block, held.fisher))
        pieces = functools.partial(_weighted, weight, leaf, held)
        # Only the parameters are kept for the backward pass, not a difference as large as they are.
        term: Tensor = checkpoint(pieces, use_reentrant=False, preserve_rng_state=False)
        return term

    def fingerprint(self) -> str:
        """16 hexadecimal digits over names and Fisher information of every task."""
        return self._digest.hexdigest()[:16]


def of_another_head(names: Iterable[str], facts: FisherFacts, model: nn.Module) -> set[str]:
    """Those of a file's weights that belong to a head which `model` does not have, with the pooler that it reads."""
    if facts.head == head_facts(model):
        return set()
    own = {name for name, _ in model.named_parameters()}
    return {name for name in names if is_head(name) or (is_pooler(name) and name not in own)}


def _weighted(weight: Tensor | None, leaf: AdapterLeaf | None, held: _Held) -> Tensor:
    """sum F (theta - theta*)^2 of one parameter: fp32 scalar."""
    with torch.autocast(held.fisher.device.type, enabled=False):
        moved = leaf.delta_weight() if leaf is not None else weight
        assert moved is not None
        distance = moved.float() if held.offset is None else moved.float() + held.offset
        return (distance.square() * held.fisher).sum()


def _weighted_block(fisher: Tensor, distance: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    weighted = distance * fisher[rows]
    return torch.dot(weighted.view(-1), distance.view(-1)), weighted.mul_(2)


def _adapters(model: nn.Module) -> dict[str, AdapterLeaf]:
    """The layer that carries an update, by the name of its weight."""
    found: Sequence[tuple[str, nn.Module]] = list(model.named_modules())
    return {f"{name}.weight": module for name, module in found if isinstance(module, AdapterLeaf)}
