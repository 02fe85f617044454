from __future__ import annotations

import json
from typing import Any

import pytest

from ftlab.errors import FtlabError
from ftlab.models.configuration import LlamaConfig, RopeScaling
from tests.helpers.models import tiny_config

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def test_defaults_of_a_short_config() -> None:
    config = LlamaConfig.from_hf(BASE)
    assert (config.num_key_value_heads, config.head_dim) == (4, 16)
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-6, 10000.0, False)


def test_a_published_config_with_fields_that_are_off_or_do_not_matter() -> None:
    fields = BASE | {
        "_name_or_path": "x",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "is_llama_config": True,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "quantization_config": {},
        "use_cache": True,
    }
    config = LlamaConfig.from_hf(fields)
    assert config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert (config.rope_theta, config.head_dim, config.num_key_value_heads) == (500000.0, 32, 2)
    assert config.tie_word_embeddings


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"sliding_window": 4096},
        {"pretraining_tp": 2},
        {"attention_dropout": 0.1},
        {"quantization_config": {"quant_method": "gptq"}},
        {"partial_rotary_factor": 0.5},
        {"rope_interleaved": True},
        {"model_type": "mistral"},
        {"logit_scale": 0.1},
        {"num_local_experts": 8},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_field_that_changes_the_maths_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(FtlabError, match=f"^here: .*{next(iter(changes))}") as error:
        LlamaConfig.from_hf(BASE | changes, "here")
    assert "\n" not in str(error.value)


def test_another_architecture_is_told_which_there_are() -> None:
    said = "^here: model_type is 'roberta'; implemented are llama, and bert for data with labels$"
    with pytest.raises(FtlabError, match=said):
        LlamaConfig.from_hf(BASE | {"model_type": "roberta"}, "here")


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ({"rope_type": "yarn", "factor": 2.0}, "'yarn'"),
        ({"rope_type": "linear"}, "needs factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs high_freq_factor, low_freq_factor"),
        ({"rope_type": "linear", "factor": 2.0, "attention_factor": 2.0}, "attention_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("linear", "must be an object"),
    ],
)
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_unknown_rope_is_refused(field: str, rope: object, message: str) -> None:
    with pytest.raises(FtlabError, match=message):
        LlamaConfig.from_hf(BASE | {field: rope})


def test_old_and_new_rope_fields_say_the_same() -> None:
    old = LlamaConfig.from_hf(BASE | {"rope_theta": 5e5, "rope_scaling": LLAMA3})
    new = LlamaConfig.from_hf(BASE | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}})
    both = BASE | {"rope_theta": 5e5, "rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}
    assert old == new == LlamaConfig.from_hf(both)
    assert LlamaConfig.from_hf(BASE | {"rope_scaling": {"type": "linear", "factor": 2}}).rope_scaling == RopeScaling(
        "linear", 2
    )
    with pytest.raises(FtlabError, match="contradicts"):
        LlamaConfig.from_hf(both | {"rope_theta": 1e4})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": None}, "missing num_hidden_layers"),
        ({"vocab_size": "big"}, "vocab_size is 'big'"),
        ({"num_attention_heads": 3}, "not a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "even number"),
        ({"num_hidden_layers": 0}, "positive integer"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FtlabError, match=message):
        LlamaConfig.from_hf(BASE | changes)


@pytest.mark.parametrize(
    "scaling", [None, RopeScaling("linear", 2.0), RopeScaling("llama3", 8.0, 1.0, 4.0, 64)], ids=str
)
def test_round_trip(scaling: RopeScaling | None) -> None:
    config = tiny_config(rope_scaling=scaling, attention_bias=True, mlp_bias=True, eos_token_id=[1, 2], rope_theta=5e5)
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf("bfloat16")))) == config
