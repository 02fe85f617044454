"""Dropout by place, stochastic depth and NEFTune: what each does to the numbers that it touches."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from ftlab.models.attention import Documents, attention
from ftlab.models.llama import LlamaForCausalLM
from ftlab.models.noise import Noise, disturb, embedding_noise, own_lengths
from ftlab.operators import select
from tests.helpers.models import random_ids, tiny_llama

IDS = random_ids(2, 12, seed=3)
STRENGTHS = [item.name for item in fields(Noise)]


def disturbed(**strengths: float) -> LlamaForCausalLM:
    model = tiny_llama(num_hidden_layers=3)
    disturb(model, Noise(**strengths))
    return model.train()


def hidden(model: LlamaForCausalLM, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return model.hidden_states(IDS)


class Recorder:
    """Keeps what a module was given and what it gave."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        module.register_forward_hook(self.record)

    def record(self, module: torch.nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
        self.seen.append((arguments[0].detach(), out.detach()))


@pytest.mark.parametrize("name", STRENGTHS)
def test_acts_in_training_mode_alone(name: str) -> None:
    model, plain = disturbed(**{name: 0.5}), disturbed()
    assert not torch.equal(hidden(model), hidden(plain))
    assert not torch.equal(hidden(model, seed=0), hidden(model, seed=1))
    assert torch.equal(hidden(model.eval()), hidden(plain.eval()))


def test_quiet_draws_nothing_and_changes_nothing() -> None:
    quiet, plain = disturbed(), tiny_llama(num_hidden_layers=3).train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    out = quiet.hidden_states(IDS)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(out, plain.hidden_states(IDS))


def assert_dropped(x: Tensor, dropped: Tensor, p: float) -> None:
    """Each element is zero or divided by 1 - p, and about p of them are zero."""
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (x / (1 - p))[kept])
    share = 1 - float(kept[x != 0].float().mean())
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / x.numel())


def test_embedding_dropout_is_on_the_embeddings() -> None:
    model = disturbed(embedding=0.25)
    stream: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda module, arguments: stream.append(arguments[0].detach()))
    hidden(model)
    assert_dropped(model.model.embed_tokens(IDS).detach(), stream[0], 0.25)


def test_hidden_dropout_is_on_what_enters_the_down_projection() -> None:
    model = disturbed(hidden=0.25)
    mlp = model.model.layers[0].mlp
    gate, up, down = Recorder(mlp.gate_proj), Recorder(mlp.up_proj), Recorder(mlp.down_proj)
    hidden(model)
    activation = torch.nn.functional.silu(gate.seen[0][1]) * up.seen[0][1]
    assert_dropped(activation, down.seen[0][0], 0.25)


def test_residual_dropout_is_on_both_updates() -> None:
    model = disturbed(residual=0.25)
    block = model.model.layers[0]
    attended, mlp = Recorder(block.self_attn), Recorder(block.mlp)
    results: list[tuple[Tensor, Tensor, Tensor]] = []
    block.register_forward_hook(lambda module, arguments, out: results.append((arguments[0], *out)))
    hidden(model)
    h, between, update = (tensor.detach() for tensor in results[0])
    assert_dropped(mlp.seen[0][1], update, 0.25)
    added = between - h
    kept = added.abs() > 1e-6
    torch.testing.assert_close(added[kept], (attended.seen[0][1] / 0.75)[kept], atol=1e-5, rtol=1e-4)
    assert 0.1 < 1 - float(kept.float().mean()) < 0.4


def test_head_dropout_is_on_what_enters_the_head() -> None:
    plain = hidden(disturbed()).detach()
    assert_dropped(plain, hidden(disturbed(head=0.25)).detach(), 0.25)


def causal(q: Tensor, k: Tensor) -> Tensor:
    """The attention probabilities [T, T] of one document with one head."""
    scores = q[0, :, 0] @ k[0, :, 0].T / q.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_dropout_is_on_the_probabilities(packed: bool) -> None:
    """With an identity for values the output of attention is the dropped probabilities themselves."""
    T, p = 24, 0.25
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, T, 1, T, generator=generator).requires_grad_() for _ in range(2))
    v = torch.eye(T).view(1, T, 1, T)
    documents = Documents.from_lengths([10, 14]) if packed else None
    torch.manual_seed(0)
    out = attention(q, k, v, documents=documents, dropout_p=p)[0, :, 0].detach()
    expected = torch.zeros(T, T)
    for part in [slice(0, 10), slice(10, 24)] if packed else [slice(0, T)]:
        expected[part, part] = causal(q[:, part], k[:, part]).detach()
    assert_dropped(expected, out, p)


def test_attention_dropout_is_counted_where_kernels_are_left() -> None:
    operators, line = select("auto", torch.device("cpu"))
    if operators.path != "native":
        pytest.skip(line)
    model = disturbed(attention=0.1)
    model.use(operators)
    hidden(model)
    assert operators.taken["causal_attention", "torch, for attention dropout"] == 3
    assert not any(name == "causal_attention" and path == "native" for name, path in operators.taken)


# --- stochastic depth -------------------------------------------------------------------------------------------------


def test_the_probability_of_survival_falls_linearly() -> None:
    noise = Noise(depth=0.6)
    assert [noise.keep(block, 3) for block in range(3)] == pytest.approx([0.8, 0.6, 0.4])
    assert [Noise().keep(block, 3) for block in range(3)] == [1, 1, 1]


def by_hand(model: LlamaForCausalLM, survivors: list[bool]) -> Tensor:
    """h + f(h) / keep over the surviving blocks, f taken from each block in evaluation mode."""
    model.eval()
    h = model.model.embed_tokens(IDS)
    context = model._context(IDS, None, None, None, None)
    for number, survives in enumerate(survivors):
        if survives:
            stream, update = model.model.layers[number](h, None, context)
            h = h + (stream + update - h) / model.noise.keep(number, len(survivors))
    model.train()
    return model.model.norm(h)


def test_blocks_are_left_out_whole_and_survivors_scaled() -> None:
    model = disturbed(depth=0.9)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        survivors = [float(torch.rand(())) < model.noise.keep(number, 3) for number in range(3)]
        seen.add(tuple(survivors))
        torch.testing.assert_close(hidden(model, seed), by_hand(model, survivors), atol=1e-5, rtol=1e-4)
    assert len(seen) > 3


def test_a_block_left_out_gives_its_parameters_zeros() -> None:
    model = disturbed(depth=0.9)
    for seed in range(20):
        torch.manual_seed(seed)
        if float(torch.rand(())) >= model.noise.keep(0, 3):
            break
    hidden(model, seed).sum().backward()
    gradients = [parameter.grad for parameter in model.model.layers[0].parameters()]
    assert all(gradient is not None and not bool(gradient.any()) for gradient in gradients)


# --- NEFTune ----------------------------------------------------------------------------------------------------------


def test_noise_is_uniform_within_a_bound_set_by_each_documents_own_length() -> None:
    lengths, width, alpha = [4, 100, 24], 64, 5.0
    torch.manual_seed(0)
    documents = Documents.from_lengths(lengths)
    noise = embedding_noise(torch.zeros(1, 128, width), own_lengths(documents, 1, 128), alpha)
    for part, length in zip(noise.split(lengths, dim=1), lengths, strict=True):
        bound = alpha / math.sqrt(length * width)
        assert 0.98 * bound < float(part.abs().max()) <= bound
        assert float(part.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert abs(float(part.mean())) < 0.15 * bound


def test_without_documents_a_row_is_one() -> None:
    torch.manual_seed(0)
    rows = embedding_noise(torch.zeros(2, 8, 4), own_lengths(None, 2, 8), 3.0)
    torch.manual_seed(0)
    lengths = own_lengths(Documents.from_lengths([8, 8]), 2, 8)
    torch.testing.assert_close(rows, embedding_noise(torch.zeros(2, 8, 4), lengths, 3.0))
