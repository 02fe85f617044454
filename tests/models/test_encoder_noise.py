"""Dropout by place, stochastic depth and NEFTune in an encoder and before a classifier's head."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from ftlab.models.bert import BertConfig, BertModel, random_bert
from ftlab.models.heads import BertClassifier, Head, LlamaClassifier
from ftlab.models.noise import Noise, disturb
from tests.helpers.classifiers import LABELS, batch_of, texts, tiny_bert_classifier
from tests.helpers.models import tiny_llama
from tests.models.test_noise import Recorder, assert_dropped

BATCH = batch_of(texts(count=8))
STRENGTHS = [item.name for item in fields(Noise)]


def disturbed(**strengths: float) -> BertClassifier:
    model = tiny_bert_classifier()
    disturb(model, Noise(**strengths))
    return model.train()


def answers(model: BertClassifier, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return model(BATCH).detach()


@pytest.mark.parametrize("name", STRENGTHS)
def test_acts_in_training_mode_alone(name: str) -> None:
    model, plain = disturbed(**{name: 0.5}), disturbed()
    assert not torch.equal(answers(model), answers(plain))
    assert not torch.equal(answers(model, seed=0), answers(model, seed=1))
    assert torch.equal(answers(model.eval()), answers(plain.eval()))


def test_quiet_draws_nothing_and_changes_nothing() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    out = disturbed()(BATCH)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(out, tiny_bert_classifier().train()(BATCH))


def test_dropout_acts_at_its_place() -> None:
    model = disturbed(embedding=0.25)
    norm, stream = Recorder(model.bert.embeddings.LayerNorm), Recorder(model.bert.encoder.layer[0])
    answers(model)
    assert_dropped(norm.seen[0][1], stream.seen[0][0], 0.25)
    model = disturbed(hidden=0.25)
    layer = model.bert.encoder.layer[0]
    inside, dense = Recorder(layer.intermediate.dense), Recorder(layer.output.dense)
    answers(model)
    assert_dropped(torch.nn.functional.gelu(inside.seen[0][1]), dense.seen[0][0], 0.25)
    model = disturbed(residual=0.25)
    layer = model.bert.encoder.layer[0]
    entering, outputs = Recorder(layer), (layer.attention.output, layer.output)
    dense, norms = ([Recorder(output.get_submodule(name)) for output in outputs] for name in ("dense", "LayerNorm"))
    answers(model)
    for residual, update, norm in zip((entering.seen[0][0], norms[0].seen[0][1]), dense, norms, strict=True):
        added = norm.seen[0][0] - residual
        assert_dropped(update.seen[0][1], torch.where(added.abs() > 1e-6, added, 0.0), 0.25)


def test_attention_dropout_is_on_the_probabilities() -> None:
    """Zeroed probabilities alone change what attention gives, so its mean over many masks is that without dropout."""
    model = disturbed(attention=0.25)
    attended = Recorder(model.bert.encoder.layer[0].attention.self)
    for seed in range(100):
        answers(model, seed)
    mean = torch.stack([out for _, out in attended.seen]).mean(0)[BATCH.mask]
    answers(model.eval())
    spread = torch.stack([out for _, out in attended.seen[:-1]]).std(0)[BATCH.mask]
    assert bool((spread > 0).any())
    assert float(((mean - attended.seen[-1][1][BATCH.mask]) / spread.clamp(min=1e-6)).abs().mean()) < 2 / math.sqrt(100)


def test_head_dropout_is_on_the_vector_of_a_text() -> None:
    batch = batch_of(texts(count=200))
    for model in (tiny_bert_classifier(), LlamaClassifier(tiny_llama(vocab_size=61), Head(LABELS, "mean"))):
        disturb(model, Noise(head=0.25))
        entering = Recorder(model.get_submodule(model.layer))
        model.eval()(batch)
        model.train()(batch)
        assert_dropped(entering.seen[0][0], entering.seen[1][0], 0.25)


# --- stochastic depth -------------------------------------------------------------------------------------------------


def encoder(depth: float) -> BertModel:
    model = random_bert(BertConfig(61, 32, 48, 3, 4, max_position_embeddings=40, initializer_range=0.3), seed=0)
    classifier = BertClassifier(model, Head(LABELS, "mean"))
    disturb(classifier, Noise(depth=depth))
    return model.train()


def by_hand(model: BertModel, survivors: list[bool]) -> Tensor:
    """Both norms act in every layer; attention and MLP add their update / keep where the layer survives."""
    h = model.embeddings(BATCH.input_ids, BATCH.token_types, BATCH.mask)
    for number, (layer, survives) in enumerate(zip(model.encoder.layer, survivors, strict=True)):
        scale = (1 / (1 - (number + 1) / 3 * 0.9)) if survives else 0.0
        attention = layer.attention
        h = attention.output.LayerNorm(h + scale * attention.output.dense(attention.self(h, BATCH.mask)))
        inside = torch.nn.functional.gelu(layer.intermediate.dense(h))
        h = layer.output.LayerNorm(h + scale * layer.output.dense(inside))
    return h


def test_layers_are_left_out_whole_and_survivors_scaled() -> None:
    model = encoder(0.9)
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        survivors = [float(torch.rand(())) < 1 - (number + 1) / 3 * 0.9 for number in range(3)]
        seen.add(tuple(survivors))
        torch.manual_seed(seed)
        found = model(BATCH.input_ids, BATCH.mask, BATCH.token_types)
        torch.testing.assert_close(found[BATCH.mask], by_hand(model, survivors)[BATCH.mask], atol=1e-5, rtol=1e-4)
    assert len(seen) > 3


def test_a_layer_left_out_gives_zeros_to_all_but_its_norms() -> None:
    model = encoder(0.9)
    seed = next(seed for seed in range(40) if draws(seed)[0] >= 0.7)
    torch.manual_seed(seed)
    model(BATCH.input_ids, BATCH.mask, BATCH.token_types).square().sum().backward()
    for name, parameter in model.encoder.layer[0].named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == ("LayerNorm" in name), name


def draws(seed: int) -> list[float]:
    torch.manual_seed(seed)
    return [float(torch.rand(())) for _ in range(3)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of torch about itself
@pytest.mark.parametrize("decoder", [False, True])
def test_blocks_of_all_depths_have_compiled_graphs_in_common(decoder: bool) -> None:
    """torch.compile gives up on a function that it compiled for the eighth time.

    A decoder has more: before its attention and after it, and of the first block, which has no update to add.
    """
    model: BertClassifier | LlamaClassifier
    if decoder:
        model = LlamaClassifier(tiny_llama(vocab_size=61, num_hidden_layers=10), Head(LABELS, "last"))
    else:
        config = BertConfig(61, 32, 48, 10, 4, max_position_embeddings=40, initializer_range=0.3)
        model = BertClassifier(random_bert(config, seed=0), Head(LABELS, "mean"))
    disturb(model, Noise(depth=0.2))
    torch._dynamo.reset()
    counter = CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter, dynamic=False)
    model.train()(BATCH)
    assert 0 < counter.frame_count <= (5 if decoder else 1)


# --- NEFTune ----------------------------------------------------------------------------------------------------------


def test_noise_is_bounded_by_the_length_of_each_text() -> None:
    model, alpha = disturbed(neftune=5.0), 5.0
    entering: list[Tensor] = []
    model.bert.embeddings.LayerNorm.register_forward_pre_hook(lambda module, args: entering.append(args[0].detach()))
    answers(model)
    answers(model.eval())
    noise = entering[0] - entering[1]
    for row, real in zip(noise, BATCH.mask, strict=True):
        bound = alpha / math.sqrt(int(real.sum()) * 32)
        assert 0.8 * bound < float(row[real].abs().max()) <= bound * (1 + 1e-5)


# --- recomputed -------------------------------------------------------------------------------------------------------


def test_recomputed_activations_draw_the_same() -> None:
    found = []
    for recompute in (False, True):
        model = disturbed(**dict.fromkeys(STRENGTHS, 0.2))
        model.checkpoint_blocks = recompute
        torch.manual_seed(1)
        model(BATCH).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None, name
        assert torch.equal(gradient, found[1][name]), name  # type: ignore[arg-type]
