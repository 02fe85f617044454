"""Packed documents never see one another: same logits and gradients as each alone, and bitwise isolation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab.models.attention import Documents
from ftlab.models.llama import LlamaForCausalLM
from tests.helpers.models import random_ids, tiny_llama

LENGTHS = [7, 3, 12, 1, 9]
STARTS = [0, 7, 10, 22, 23]
TOTAL = sum(LENGTHS)


def packed(model: LlamaForCausalLM, ids_1N: Tensor) -> Tensor:
    return model(ids_1N, documents=Documents.from_lengths(LENGTHS))


def positions_only(model: LlamaForCausalLM, ids_1N: Tensor) -> Tensor:
    """The broken variant: positions start again at each document, attention runs through all of them."""
    return model(ids_1N, position_ids_BT=Documents.from_lengths(LENGTHS).position_ids[None])


def gradients(model: LlamaForCausalLM, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def check_equal_to_each_alone(forward: object) -> None:
    model = tiny_llama()
    ids = random_ids(1, TOTAL)
    targets = random_ids(1, TOTAL, seed=1)[0]
    logits = forward(model, ids)[0]  # type: ignore[operator]
    alone = torch.cat([model(part)[0] for part in ids.split(LENGTHS, dim=1)])
    torch.testing.assert_close(logits, alone)
    together = gradients(model, F.cross_entropy(logits, targets, reduction="sum"))
    for got, want in zip(together, gradients(model, F.cross_entropy(alone, targets, reduction="sum")), strict=True):
        torch.testing.assert_close(got, want)


def check_isolation(forward: object) -> None:
    """Other tokens in one document leave the bits of all other documents as they are; so does NaN."""
    model = tiny_llama()
    ids = random_ids(1, TOTAL)
    before = forward(model, ids)  # type: ignore[operator]
    for document, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        changed = ids.clone()
        changed[:, start : start + length] = (changed[:, start : start + length] + 100) % 259
        after = forward(model, changed)  # type: ignore[operator]
        inside = torch.arange(TOTAL).ge(start) & torch.arange(TOTAL).lt(start + length)
        assert torch.equal(after[:, ~inside], before[:, ~inside]), f"document {document} leaks"
        assert not torch.equal(after[:, inside], before[:, inside])


def test_packed_equals_each_alone() -> None:
    check_equal_to_each_alone(packed)
    with pytest.raises(AssertionError):
        check_equal_to_each_alone(positions_only)


def test_perturbing_one_document_leaves_the_others_bits() -> None:
    check_isolation(packed)
    with pytest.raises(AssertionError, match="leaks"):
        check_isolation(positions_only)


def test_gradient_of_one_document_reaches_no_other() -> None:
    model = tiny_llama()
    embedding = model.model.embed_tokens(random_ids(1, TOTAL)).detach()

    def reached(documents: Documents | None) -> Tensor:
        leaf = embedding.clone().requires_grad_()
        hook = model.model.embed_tokens.register_forward_hook(lambda *_: leaf)
        try:
            model(random_ids(1, TOTAL), documents=documents)[0, 10:22].sum().backward()
        finally:
            hook.remove()
        assert leaf.grad is not None
        return leaf.grad[0].abs().sum(-1).nonzero().flatten()

    assert reached(Documents.from_lengths(LENGTHS)).tolist() == list(range(10, 22))
    assert reached(None).tolist() == list(range(22))  # without documents, those before are reached


def test_nan_in_one_document_stays_there() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    ids = random_ids(1, TOTAL)
    ids[ids == 5] = 6
    ids[0, 23] = 5  # the first token of the last document
    documents = Documents.from_lengths(LENGTHS)
    broken = model.hidden_states(ids, documents=documents).isnan().any(-1)[0]
    assert broken.nonzero().flatten().tolist() == list(range(23, TOTAL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_order_do_not_matter(dtype: torch.dtype) -> None:
    """The same documents as two rows of 16, or in another order, give the same numbers."""
    model = tiny_llama().to(dtype)
    ids = random_ids(1, TOTAL)
    one_row = packed(model, ids)[0]
    two_rows = model(ids.view(2, 16), documents=Documents.from_lengths(LENGTHS)).flatten(0, 1)
    torch.testing.assert_close(one_row, two_rows, rtol=0, atol=0)
    parts = ids.split(LENGTHS, dim=1)
    order = [3, 0, 4, 2, 1]
    shuffled = model(
        torch.cat([parts[i] for i in order], dim=1), documents=Documents.from_lengths([LENGTHS[i] for i in order])
    )[0]
    for place, part in zip(order, shuffled.split([LENGTHS[i] for i in order]), strict=True):
        torch.testing.assert_close(part, one_row[STARTS[place] : STARTS[place] + LENGTHS[place]])
