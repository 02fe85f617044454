"""A whole decoder with adapters through the Triton kernels: the same loss and gradients as in plain torch."""

from __future__ import annotations

import pytest
import torch
from ftlab_kernels.attention import choose_backend

from ftlab.config import AdamWConfig, LoRAConfig, PrecisionConfig
from ftlab.errors import FtlabError
from ftlab.losses.cross_entropy import supervised_cross_entropy
from ftlab.methods import make_method
from ftlab.methods.trainable import Rule, TrainableTable
from ftlab.models.llama import LlamaForCausalLM
from ftlab.operators import NAMES, TORCH, Operators, describe
from ftlab.operators.checked_path import checked_operators
from ftlab.operators.linear_cross_entropy import reference_cross_entropy
from ftlab.operators.triton_path import triton_operators
from ftlab.optim.adamw import build_optimizer
from ftlab.training.loop import train_step
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from tests.helpers.training import collate, gradients, loss_sum, ragged_examples, tiny_llama
from tests.kernels.harness import device


def adapted(dropout: float = 0.0, rank: int = 4, dora: bool = False) -> LlamaForCausalLM:
    """The tiny model with adapters that already do something."""
    model = tiny_llama().to(device())
    make_method(LoRAConfig(rank=rank, alpha=8.0, dropout=dropout, dora=dora), seed=0).apply(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            drawn = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(drawn)
    return model.train()


def loss_and_gradients(
    model: LlamaForCausalLM, operators: Operators, examples: int = 3
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.use(operators)
    model.zero_grad()
    (batch,) = collate(ragged_examples(examples), examples)
    loss = supervised_cross_entropy(model, batch.to(device()), 16)
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("dora", [False, True])
def test_the_same_loss_and_gradients(dora: bool) -> None:
    model = adapted(dora=dora)
    loss, found = loss_and_gradients(model, TORCH)
    operators = triton_operators(required=True)
    ours, ours_found = loss_and_gradients(model, operators)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-5)
    assert ours_found.keys() == found.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(ours_found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    calls = describe(operators)
    assert calls.keys() >= set(NAMES) - {"causal_attention"}
    assert list(calls.pop("packed_attention")) == [f"torch's {choose_backend(device(), torch.float32, 8)}"]
    assert all(path == "triton" for paths in calls.values() for path in paths)


def test_dropout_is_drawn_and_drawn_again() -> None:
    """The same generator gives the same loss and gradients, bit for bit; another gives others."""
    model, operators = adapted(dropout=0.3), triton_operators(required=True)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(loss_and_gradients(model, operators, 1))
    (first, first_found), (again, again_found), (other, _) = results
    assert torch.equal(first, again)
    assert all(torch.equal(first_found[name], again_found[name]) for name in first_found)
    assert not torch.equal(first, other)


def test_checkpointed_blocks_draw_the_same_masks() -> None:
    model, operators = adapted(dropout=0.3), triton_operators(required=True)
    torch.manual_seed(0)
    _, plain = loss_and_gradients(model, operators, 1)
    model.checkpoint_blocks = True
    torch.manual_seed(0)
    _, recomputed = loss_and_gradients(model, operators, 1)
    for name, gradient in plain.items():
        assert torch.equal(recomputed[name], gradient), name


def test_every_operation_passes_its_check() -> None:
    operators = checked_operators(triton_operators(required=True))
    loss_and_gradients(adapted(dropout=0.1), operators)
    assert operators.log.counts.keys() >= set(NAMES) - {"causal_attention"}
    assert all(worst.ratio <= 1 for worst in operators.log.worst.values())


def test_what_has_no_kernel_is_refused_or_counted() -> None:
    model = adapted(rank=300)
    with pytest.raises(FtlabError, match="rank 300"):
        loss_and_gradients(model, triton_operators(required=True))
    operators = triton_operators()
    loss_and_gradients(model, operators)
    assert list(describe(operators)["lora_linears"]) == ["torch, for rank 300, over 256"]


def test_a_training_run_ends_where_torchs_does() -> None:
    """Five steps with clipping and decay through the loop's own step, by FusedAdamW and by torch's AdamW."""
    ends = []
    for path in ("torch", "triton"):
        model = adapted()
        table = TrainableTable([Rule(r".*lora_[AB]", trainable=True), Rule(".*", trainable=False)])
        table.apply(model)
        config = AdamWConfig(lr=1e-2, weight_decay=0.1, max_grad_norm=0.5)
        optimizer = build_optimizer(config, model, table, path=path)
        ranks = Ranks(device=device())
        replica = Replica(model, loss_sum, ranks)
        precision = Precision(PrecisionConfig(), ranks.device)
        batches = collate(ragged_examples(3), 3)
        results = [
            train_step(replica, optimizer, batches, precision=precision, max_grad_norm=config.max_grad_norm)
            for _ in range(5)
        ]
        assert all(result.applied for result in results)
        ends.append((results, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}))
    (plain, weights), (ours, our_weights) = ends
    for theirs, mine in zip(plain, ours, strict=True):
        assert mine.nats == pytest.approx(theirs.nats, rel=1e-5)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(our_weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_a_step_that_is_not_finite_moves_nothing() -> None:
    model = adapted()
    table = TrainableTable([Rule(r".*lora_[AB]", trainable=True), Rule(".*", trainable=False)])
    table.apply(model)
    optimizer = build_optimizer(AdamWConfig(), model, table, path="triton")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (batch,) = collate(ragged_examples(3), 3)
    loss_sum(model, batch.to(device())).backward()
    next(p for p in model.parameters() if p.requires_grad).grad.fill_(float("inf"))  # type: ignore[union-attr]
    norm, applied = Precision(PrecisionConfig(), device()).step(optimizer, 1.0, finite=True)
    assert not applied
    assert norm == float("inf")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_label_smoothing_goes_through_the_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 32, generator=generator).to(device()).requires_grad_() for n in (9, 50))
    labels = torch.randint(50, (9,), generator=generator).to(device())
    operators = triton_operators(required=True)
    ours = operators.linear_cross_entropy(hidden, weight, labels, 16, 0.2)
    theirs = reference_cross_entropy(hidden, weight, labels, 0.2)
    torch.testing.assert_close(ours, theirs)
    found, expected = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, theirs))
    torch.testing.assert_close(found, expected)
    assert operators.taken["linear_cross_entropy", "triton"] == 1
    log = checked_operators(operators)
    log.linear_cross_entropy(hidden, weight, labels, 16, 0.2).backward()
    assert any("linear_cross_entropy" in line for line in log.log.lines())
