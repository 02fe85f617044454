"""Token-weighted loss and perplexity of a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ftlab.data.loader import Batch
from ftlab.errors import FtlabError
from ftlab.models.generation import evaluating

__all__ = ["evaluate_loss", "perplexity"]


def perplexity(loss: float) -> float:
    """exp(loss), with `loss` in nats per token; inf where a double overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def evaluate_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    loss_sum: Callable[[nn.Module, Batch], Tensor],
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Mean negative log-likelihood over all supervised tokens, whatever the batches and ranks they came in.

        loss = sum_ranks sum_batches loss_sum(batch) / sum_ranks sum_batches num_supervised(batch)

    Nats and tokens are summed in fp64 and divided once, so the result does not depend on how examples were grouped.
    Each rank passes its own share of the batches; a share may be empty. Only the two sums are kept: no logits.

    Args:
        model: put in evaluation mode, and every submodule back into its own mode afterwards. Pass the bare module, not
            a DDP wrapper: ranks may run different numbers of batches.
        batches: on any device; each is moved to the model's.
        loss_sum: the loss of a batch summed over its supervised positions, in nats.
        sum_over_ranks: sums a tensor over the ranks and returns it; the identity for one process.

    Returns:
        loss: nats per supervised token.
        perplexity: exp(loss).
        tokens: supervised tokens over all ranks.

    Raises:
        FtlabError: no rank has a supervised token.
    """
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    nats = torch.zeros((), dtype=torch.float64, device=device)  # stays on the device: no wait for it in each batch
    tokens = 0
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            nats += loss_sum(model, batch.to(device)).double()
            tokens += int(batch.num_supervised)
        totals = sum_over_ranks(torch.stack([nats, torch.full_like(nats, tokens)]))
        total_nats, total_tokens = totals.tolist()
    if total_tokens == 0:
        raise FtlabError(
            "nothing to evaluate: the split has no supervised token; give it records (data.validation, data.test or "
            "the split fractions) or set evaluation.times=0 and evaluation.test=false"
        )
    loss = total_nats / total_tokens
    return {"loss": loss, "perplexity": perplexity(loss), "tokens": total_tokens}
