"""Means of the weights of several models, and the way between two.

    soup       theta = sum_i w_i theta_i,  sum_i w_i = 1       (Wortsman et al. 2022, arXiv 2203.05482)
    WiSE-FT    theta = (1 - alpha) theta_0 + alpha theta_1     (Wortsman et al. 2021, arXiv 2109.01903, section 3)

A greedy soup (arXiv 2203.05482, recipe 1) tries the models from the best to the worst by themselves and keeps each that
does not make the mean worse.

The weights of a LoRA run are W + s B A: a mean of those is linear in the runs, a mean of A and of B is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ftlab.errors import FtlabError

__all__ = ["Soup", "greedy_soup", "interpolated", "normalised"]

State = Mapping[str, Tensor]


class Soup:
    """A weighted mean of models, which arrive one at a time; in fp32."""

    def __init__(self, state: State | None = None, total: float = 0.0) -> None:
        self.state: dict[str, Tensor] = {} if state is None else dict(state)
        self.total = total

    def with_one(self, state: State, weight: float = 1.0) -> Soup:
        """The mean with another model in it; this one stays as it is."""
        if not self.state:
            return Soup({name: tensor.float().clone() for name, tensor in state.items()}, weight)
        total = self.total + weight
        return Soup(interpolated(self.state, state, weight / total), total)


def interpolated(start: State, end: State, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) start + alpha end, tensor by tensor, in fp32."""
    return {name: torch.lerp(tensor.float(), end[name].float(), alpha) for name, tensor in start.items()}


def normalised(weights: Sequence[float]) -> list[float]:
    """The weights divided by their sum."""
    total = sum(weights)
    return [weight / total for weight in weights]


def greedy_soup(
    losses: Sequence[float], state_of: Callable[[int], State], loss_of: Callable[[State], float]
) -> tuple[Soup, list[int], float]:
    """The greedy soup of models numbered as in `losses`, which are those of each by itself.

    Returns the soup, the numbers of the models in it in the order in which they were taken, and its loss.

    Errors: FtlabError if none of the losses is finite.
    """
    # NaN compares as neither smaller nor larger, so it would stay wherever it stands.
    own = [math.inf if math.isnan(loss) else loss for loss in losses]
    order = sorted(range(len(own)), key=own.__getitem__)
    taken, best = order[:1], own[order[0]]
    if not math.isfinite(best):
        raise FtlabError("kind=greedy: no run has a finite validation loss, so there is none to begin with")
    soup = Soup().with_one(state_of(order[0]))
    for number in order[1:]:
        candidate = soup.with_one(state_of(number))
        loss = loss_of(candidate.state)
        if loss <= best:
            soup, best = candidate, loss
            taken.append(number)
    return soup, taken, best
