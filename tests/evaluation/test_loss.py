from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from ftlab.data.loader import Batch, eval_batches
from ftlab.data.tokenization import Example
from ftlab.errors import FtlabError
from ftlab.evaluation.loss import evaluate_loss, perplexity
from ftlab.losses.cross_entropy import supervised_cross_entropy
from tests.helpers.models import tiny_llama

loss_sum = functools.partial(supervised_cross_entropy, chunk=16)


def examples(count: int = 6) -> list[Example]:
    """Ragged: from 1 to `count` supervised tokens."""
    return [Example(f"e{i}", list(range(40 + i, 45 + 3 * i)), [j > i for j in range(5 + 2 * i)]) for i in range(count)]


def one_rank(totals: Tensor) -> Tensor:
    return totals


def test_loss_is_nats_over_tokens_of_the_whole_split() -> None:
    model, split = tiny_llama(), examples()
    nats, tokens = 0.0, 0
    for example in split:
        ids = torch.tensor([example.token_ids])
        log_probs = model(ids).detach().double().log_softmax(-1)[0]
        for place in range(1, len(example.token_ids)):
            if example.supervised[place]:
                nats -= float(log_probs[place - 1, ids[0, place]])
                tokens += 1
    for batch_size in (1, 4, 100):
        result = evaluate_loss(model, eval_batches(split, batch_size, pad_id=258), loss_sum, one_rank)
        assert result["loss"] == pytest.approx(nats / tokens, rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        assert result["tokens"] == tokens


def test_sums_are_kept_in_double_precision() -> None:
    """2^24 + 1 + ... + 1 is 2^24 in fp32."""
    sums = iter([2.0**24, *[1.0] * 8])
    batches = eval_batches(examples(1) * 9, 1, pad_id=258)
    result = evaluate_loss(tiny_llama(), batches, lambda *_: torch.tensor(next(sums)), one_rank)
    assert result["loss"] * result["tokens"] == 2**24 + 8


class Failing(nn.Module):
    """Dropout that trains, a part frozen in evaluation mode on purpose, and a forward pass that may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.frozen = nn.Dropout(0.5).eval()


@pytest.mark.parametrize("fails", [False, True])
def test_every_submodule_gets_its_own_mode_back(fails: bool) -> None:
    model = Failing().train()
    model.frozen.eval()
    before = {name: module.training for name, module in model.named_modules()}
    seen = []

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        seen.append(([m.training for m in module.modules()], torch.is_inference_mode_enabled()))
        if fails:
            raise RuntimeError("out of memory")
        return torch.tensor(1.0)

    batches = eval_batches(examples(1), 1, pad_id=258)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            evaluate_loss(model, batches, loss, one_rank)
    else:
        evaluate_loss(model, batches, loss, one_rank)
    assert seen == [([False] * 5, True)]
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not torch.is_inference_mode_enabled()
    # The usual way to undo it wakes the part that was meant to stay as it was.
    model.eval()
    model.train()
    assert {name: module.training for name, module in model.named_modules()} != before


def test_training_goes_on_after_an_evaluation() -> None:
    """Nothing that evaluation cached may be an inference tensor: backward would refuse it."""
    model, split = tiny_llama(), examples()
    evaluate_loss(model, eval_batches(split, 4, pad_id=258), loss_sum, one_rank)
    batch = next(eval_batches(split, 6, pad_id=258))
    loss_sum(model, batch).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_rank_without_batches_takes_part() -> None:
    totals: list[Tensor] = []

    def other_rank_has(sums: Tensor) -> Tensor:
        totals.append(sums)
        return sums + torch.tensor([6.0, 3.0], dtype=torch.float64)

    result = evaluate_loss(tiny_llama(), iter(()), loss_sum, other_rank_has)
    assert result == {"loss": 2.0, "perplexity": math.exp(2.0), "tokens": 3.0}
    assert totals[0].tolist() == [0.0, 0.0]


def test_nothing_to_evaluate_is_an_error() -> None:
    def empty() -> Iterator[Batch]:
        yield from ()

    with pytest.raises(FtlabError, match="no supervised token"):
        evaluate_loss(tiny_llama(), empty(), loss_sum, one_rank)


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1000.0) == math.inf
    assert math.isnan(perplexity(math.nan))
