"""R-Drop against KL divergences by torch, one pass against the next."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab.losses.cross_entropy import supervised_cross_entropy, supervised_rows
from ftlab.losses.r_drop import r_drop, symmetric_kl
from ftlab.models.noise import Noise, disturb
from tests.helpers.training import collate, gradients, ragged_examples, tiny_llama

BATCH = collate(ragged_examples(6), 6)[0]


def by_torch(one: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    log_p, log_q = ((rows @ weight.T).log_softmax(-1) for rows in (one, other))
    forth = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return forth + F.kl_div(log_p, log_q, reduction="sum", log_target=True)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_symmetric_kl_is_torchs(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(rows, 8, generator=generator).requires_grad_() for rows in (11, 11, 23)]
    ours, theirs = symmetric_kl(*inputs, chunk), by_torch(*inputs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    found, expected = torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_and_its_gradient_are_those_of_two_passes() -> None:
    model = tiny_llama().train()
    disturb(model, Noise(residual=0.2))
    torch.manual_seed(0)
    r_drop(model, BATCH, 16, strength=3.0).backward()
    found = gradients(model)
    model.zero_grad()
    torch.manual_seed(0)
    (one, labels), (other, _) = (supervised_rows(model, BATCH) for _ in range(2))
    assert not torch.equal(one, other)
    weight = model.head_weight
    nats = [F.cross_entropy(rows @ weight.T, labels, reduction="sum") for rows in (one, other)]
    (0.5 * sum(nats) + 0.75 * by_torch(one, other, weight)).backward()  # type: ignore[union-attr]
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


def test_without_noise_it_is_the_plain_loss() -> None:
    model = tiny_llama().train()
    plain = supervised_cross_entropy(model, BATCH, 16)
    torch.testing.assert_close(r_drop(model, BATCH, 16, strength=3.0), plain)


def test_a_batch_without_a_label_gives_every_parameter_a_gradient() -> None:
    model = tiny_llama().train()
    disturb(model, Noise(residual=0.2))
    labels = torch.full_like(BATCH.labels, -100)
    r_drop(model, BATCH.__class__(**{**vars(BATCH), "labels": labels}), 16, strength=3.0).backward()
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(bool(gradient.any()) for gradient in found.values())
