"""Who trains: one table of ordered rules over parameter names.

The table sets `requires_grad`, gives the optimizer each parameter's share of the learning rate, and through
`requires_grad` decides what a checkpoint holds. Every parameter must fall under a rule and every rule must have a
parameter, so that a renamed layer is an error instead of a silently frozen one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ftlab.errors import ConfigError, FtlabError

__all__ = ["ParameterRow", "Rule", "TrainableTable", "trainable_parameters", "trainable_state_dict"]

_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Rule:
    """Parameters whose whole name matches `pattern` train, at lr_scale times the learning rate, or do not."""

    pattern: str
    trainable: bool
    lr_scale: float = 1.0


@dataclass(frozen=True)
class ParameterRow:
    """What a rule came to: its pattern, whether it trains, its number of tensors and of numbers, its rate's factor."""

    rule: str
    trainable: bool
    tensors: int
    count: int
    lr_scale: float


class TrainableTable:
    """Ordered rules; the first that matches a parameter's whole name decides."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._compiled: list[re.Pattern[str]] = []
        for rule in self.rules:
            try:
                self._compiled.append(re.compile(rule.pattern))
            except re.error as error:
                raise ConfigError(f"trainable rule {rule.pattern!r} is not a regular expression: {error}") from error
            if rule.lr_scale <= 0:
                raise ConfigError(f"trainable rule {rule.pattern!r}: lr_scale is {rule.lr_scale}, must be above 0")

    def assign(self, model: nn.Module) -> dict[str, Rule]:
        """The rule of each parameter, by name; a tensor shared by two layers counts once, under its first name.

        Errors: parameters that no rule covers, and rules that decide for no parameter.
        """
        assignment: dict[str, Rule] = {}
        uncovered: list[str] = []
        used: set[int] = set()
        for name, _ in model.named_parameters():
            for index, pattern in enumerate(self._compiled):
                if pattern.fullmatch(name):
                    assignment[name] = self.rules[index]
                    used.add(index)
                    break
            else:
                uncovered.append(name)
        if uncovered:
            raise FtlabError(f"no trainable rule covers {_shown(uncovered)}; add a rule for them")
        idle = [rule.pattern for index, rule in enumerate(self.rules) if index not in used]
        if idle:
            raise FtlabError(
                f"trainable rule {_shown(idle)} decides for no parameter: it matches none, or an earlier rule takes "
                f"all of its own; the model has {_shown(list(assignment))}"
            )
        return assignment

    def apply(self, model: nn.Module) -> list[ParameterRow]:
        """Set `requires_grad` of every parameter by its rule; one row a rule, in order. Same errors as `assign`."""
        assignment = self.assign(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(assignment[name].trainable)
        return self.rows(model)

    def rows(self, model: nn.Module) -> list[ParameterRow]:
        """What each rule comes to, in order; changes nothing. Same errors as `assign`."""
        sizes: dict[Rule, list[int]] = {rule: [] for rule in self.rules}
        for name, rule in self.assign(model).items():
            sizes[rule].append(model.get_parameter(name).numel())
        return [
            ParameterRow(rule.pattern, rule.trainable, len(counts), sum(counts), rule.lr_scale)
            for rule, counts in sizes.items()
        ]

    def lr_scales(self, model: nn.Module) -> dict[str, float]:
        """The factor of the learning rate of each parameter that trains, by name."""
        return {name: rule.lr_scale for name, rule in self.assign(model).items() if rule.trainable}


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The same tensors detached, for a checkpoint; they share storage with the model."""
    return {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}


def _shown(names: Sequence[str]) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
