"""Which pretrained weights train, and how fast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ftlab.config import (
    BitFitConfig,
    FreezeConfig,
    FullConfig,
    GradualUnfreezeConfig,
    LinearProbeConfig,
    LoRAConfig,
    MethodConfig,
)
from ftlab.errors import ConfigError
from ftlab.methods import make_method
from ftlab.methods.rules import block_numbers, num_blocks
from ftlab.methods.trainable import trainable_parameters
from tests.helpers.classifiers import tiny_bert_classifier
from tests.helpers.models import tiny_llama


def trained(config: MethodConfig, **changes: object) -> tuple[set[str], dict[str, float]]:
    """Names that train, and the factor of each one's rate."""
    model = tiny_llama(num_hidden_layers=4, **changes)
    table = make_method(config).apply(model)
    names = set(trainable_parameters(model))
    scales = table.lr_scales(model)
    assert names == set(scales)
    return names, scales


def blocks_of(names: set[str]) -> set[int]:
    return {int(name.split(".")[2]) for name in names if ".layers." in name}


@pytest.mark.parametrize(
    "config, blocks, others",
    [
        (FreezeConfig(), {3}, {"model.norm.weight"}),
        (FreezeConfig(frozen_fraction=0.5), {2, 3}, {"model.norm.weight"}),
        (FreezeConfig(frozen_fraction=1.0), set(), {"model.norm.weight"}),
        (FreezeConfig(layers="0,2-"), {0, 2, 3}, {"model.norm.weight"}),
        (FreezeConfig(frozen_fraction=0.5, train_head=False), {2, 3}, set()),
        (
            FreezeConfig(frozen_fraction=0.5, train_embeddings=True),
            {2, 3},
            {"model.norm.weight", "model.embed_tokens.weight"},
        ),
    ],
)
def test_what_a_freeze_leaves_to_train(config: FreezeConfig, blocks: set[int], others: set[str]) -> None:
    names, scales = trained(config)
    assert blocks_of(names) == blocks
    assert {name for name in names if ".layers." not in name} == others
    whole = {name for name, _ in tiny_llama(num_hidden_layers=4).named_parameters() if ".layers." in name}
    assert {name for name in names if ".layers." in name} == {n for n in whole if int(n.split(".")[2]) in blocks}
    assert set(scales.values()) == {1.0}


def test_norms_on_their_own() -> None:
    names, _ = trained(FreezeConfig(frozen_fraction=1.0, norms="all"))
    assert names
    assert all(name.endswith("norm.weight") for name in names)
    assert len(names) == 2 * 4 + 1
    names, _ = trained(FreezeConfig(frozen_fraction=0.5, norms="none"))
    assert names
    assert not any("norm" in name for name in names)
    embedding, _ = trained(FreezeConfig(frozen_fraction=1.0, train_head=False, train_embeddings=True))
    assert embedding == {"model.embed_tokens.weight"}


def test_no_norm_trains_in_an_encoder_either() -> None:
    """Its embedding has one."""
    model = tiny_bert_classifier()
    make_method(FreezeConfig(frozen_fraction=0, norms="none", train_embeddings=True)).apply(model)
    names = set(trainable_parameters(model))
    assert "bert.embeddings.word_embeddings.weight" in names
    assert not any("Norm" in name for name in names)


def test_rates_fall_from_the_top_down() -> None:
    _, scales = trained(FullConfig(layer_decay=0.5))
    assert scales["model.norm.weight"] == 1.0
    for block in range(4):
        rates = {rate for name, rate in scales.items() if name.startswith(f"model.layers.{block}.")}
        assert rates == {0.5 ** (3 - block)}
    assert scales["model.embed_tokens.weight"] == 0.5**4


def test_rates_of_ones_own_come_first() -> None:
    names, scales = trained(FullConfig(layer_decay=0.5, rates=["layers.1.mlp:0", "q_proj:0.1", "embed_tokens:2"]))
    assert not any("layers.1.mlp" in name for name in names)
    assert {rate for name, rate in scales.items() if "q_proj" in name} == {0.1}
    assert scales["model.embed_tokens.weight"] == 2.0
    assert scales["model.layers.1.self_attn.k_proj.weight"] == 0.25


def test_lora_plus_and_rates_of_adapters() -> None:
    names, scales = trained(LoRAConfig(rank=2, b_rate=16.0, layer_decay=0.5, rates=["layers.2:0", "layers.3.mlp:3"]))
    assert all(name.endswith(("lora_A", "lora_B")) for name in names)
    assert blocks_of(names) == {0, 1, 3}
    assert scales["model.layers.1.self_attn.q_proj.lora_A"] == 0.25
    assert scales["model.layers.1.self_attn.q_proj.lora_B"] == 4.0
    assert scales["model.layers.3.mlp.up_proj.lora_B"] == 3.0


def test_a_head_of_its_own() -> None:
    names, _ = trained(LinearProbeConfig(), tie_word_embeddings=False)
    assert names == {"lm_head.weight"}
    with pytest.raises(ConfigError, match="head is its token embedding"):
        trained(LinearProbeConfig())


def test_biases() -> None:
    names, _ = trained(BitFitConfig(), attention_bias=True)
    assert len(names) >= 4 * 3
    assert all(name.endswith("bias") for name in names)
    with pytest.raises(ConfigError, match="no biases"):
        trained(BitFitConfig())
    norms, _ = trained(BitFitConfig(train_norms=True))
    assert len(norms) == 2 * 4 + 1


def test_rates_of_biases_fall_from_the_top_down() -> None:
    _, scales = trained(BitFitConfig(layer_decay=0.5, train_norms=True, rates=["k_proj:3"]), attention_bias=True)
    assert scales["model.norm.weight"] == 1.0
    for block in range(4):
        own = {name: rate for name, rate in scales.items() if name.startswith(f"model.layers.{block}.")}
        assert {rate for name, rate in own.items() if "k_proj" not in name} == {0.5 ** (3 - block)}
        assert own[f"model.layers.{block}.self_attn.k_proj.bias"] == 3.0
    alone, scales = trained(BitFitConfig(layer_decay=0.5), attention_bias=True)
    assert alone == trained(BitFitConfig(), attention_bias=True)[0]
    assert set(scales.values()) == {0.125, 0.25, 0.5, 1.0}


def test_rates_of_an_encoders_biases() -> None:
    """The embedding has a bias there, and a new head lies above the blocks."""
    model = tiny_bert_classifier(pooling="pooler")
    scales = make_method(BitFitConfig(layer_decay=0.5)).apply(model).lr_scales(model)
    assert scales.pop("bert.embeddings.LayerNorm.bias") == 0.25
    assert {rate for name, rate in scales.items() if ".layer.0." in name} == {0.5}
    assert {rate for name, rate in scales.items() if ".layer.0." not in name} == {1.0}
    assert {"bert.pooler.dense.bias", "bert.encoder.layer.1.output.LayerNorm.bias", "classifier.weight"} <= set(scales)


@pytest.mark.parametrize(
    "config, expected",
    [
        (GradualUnfreezeConfig(), [{3}, {2}, {1}, {0}]),
        (GradualUnfreezeConfig(first_blocks=0), [set(), {3}, {2}, {1}, {0}]),
        (GradualUnfreezeConfig(first_blocks=2, blocks=2), [{2, 3}, {0, 1}]),
        (GradualUnfreezeConfig(first_blocks=9), [{0, 1, 2, 3}]),
        (GradualUnfreezeConfig(blocks=3, train_embeddings=True), [{3}, {0, 1, 2}, set()]),
    ],
)
def test_stages_go_from_the_top_down(config: GradualUnfreezeConfig, expected: list[set[int]]) -> None:
    model = tiny_llama(num_hidden_layers=4)
    method = make_method(config)
    method.apply(model)
    assert [blocks_of(set(names)) for names in method.stages] == expected
    assert "model.norm.weight" in method.stages[0]
    assert sorted(name for names in method.stages for name in names) == sorted(trainable_parameters(model))
    if config.train_embeddings:
        assert method.stages[-1] == ("model.embed_tokens.weight",)


@pytest.mark.parametrize(
    "config, complaint",
    [
        (FreezeConfig(frozen_fraction=1.0, train_head=False), "nothing trains"),
        (FreezeConfig(layers="4"), "4 blocks, 0 to 3"),
        (FreezeConfig(layers="2-1"), "is no range of"),
        (FreezeConfig(layers="top"), "not a block or a range"),
        (FullConfig(rates=["q_prj:0.5"]), "entry 1 matches no parameter"),
        (FullConfig(rates=["layers:1", "layers.0:0"]), "entry 2 matches no parameter"),
        (FullConfig(rates=["q_proj"]), "PATTERN:FACTOR"),
        (FullConfig(rates=["(:1"]), "not a regular expression"),
        (LoRAConfig(rates=["norm:0.5"]), "entry 1 matches no parameter"),
    ],
)
def test_what_cannot_be_is_refused(config: MethodConfig, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        trained(config)


def test_block_numbers() -> None:
    assert block_numbers("20-29", 30) == frozenset(range(20, 30))
    assert block_numbers("0, 5,28-", 30) == {0, 5, 28, 29}
    with pytest.raises(ConfigError, match=r"28-30 is no range of the model's 30 blocks, 0 to 29"):
        block_numbers("28-30", 30)
    assert num_blocks(tiny_llama(num_hidden_layers=4)) == 4
    assert num_blocks(nn.Linear(2, 2)) == 0


def test_a_frozen_weight_keeps_every_bit_and_costs_nothing() -> None:
    """Below the lowest weight that trains the backward pass keeps no activation."""
    model = tiny_llama(num_hidden_layers=4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    table = make_method(FreezeConfig(frozen_fraction=0.75)).apply(model)
    from ftlab.config import AdamWConfig
    from ftlab.optim.adamw import build_optimizer

    optimizer = build_optimizer(AdamWConfig(lr=0.1, weight_decay=0.1), model, table)
    ids = torch.arange(12)[None]

    def kept(frozen: bool) -> int:
        sizes: list[int] = []
        owned = {p.data_ptr() for p in model.parameters()}

        def pack(x: torch.Tensor) -> torch.Tensor:
            sizes.append(0 if x.data_ptr() in owned else x.numel())
            return x

        if not frozen:
            model.requires_grad_(True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(ids).square().mean()
        loss.backward()
        if not frozen:
            table.apply(model)
            model.zero_grad()
        return sum(sizes)

    whole, partial = kept(False), kept(True)
    assert partial < 0.6 * whole
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
    assert sum(len(state) for state in optimizer.state.values()) == 3 * len(trainable_parameters(model))
