"""Tiny random llamas against transformers: logits, loss and every gradient in fp32, at assert_close's defaults."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from ftlab.models.attention import Documents
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.configuration import LlamaConfig, RopeScaling
from ftlab.models.generation import generate
from ftlab.models.llama import LlamaForCausalLM
from ftlab.models.loading import load_model, random_llama
from ftlab.models.tokenizer import byte_tokenizer
from tests.helpers.gguf import write_gguf
from tests.helpers.models import random_ids, tiny_config, tiny_llama

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 16)
CASES: dict[str, dict[str, Any]] = {
    "grouped, tied": {},
    "multi-head, untied": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "one kv head": {"num_key_value_heads": 1},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "linear rope": {"rope_scaling": RopeScaling("linear", 4.0)},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 16, "tie_word_embeddings": False, "rms_norm_eps": 1e-3},
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def theirs_of(model: LlamaForCausalLM) -> Any:
    """transformers' model with the same configuration, given to it in its own terms, and the same tensors."""
    config = model.config
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_scaling is not None:
        rope |= dataclasses.asdict(config.rope_scaling)
        if config.rope_scaling.rope_type == "linear":
            rope = {key: rope[key] for key in ("rope_theta", "rope_type", "factor")}
    fields = dataclasses.asdict(config) | {"rope_parameters": rope}
    for name in ("rope_theta", "rope_scaling"):
        del fields[name]
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    state = dict(model.state_dict())
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


def compare_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    expected = dict(theirs.named_parameters())
    got = dict(ours.named_parameters())
    assert got.keys() == expected.keys()
    for name, parameter in got.items():
        assert parameter.grad is not None, name
        assert expected[name].grad is not None, name
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_logits_loss_and_gradients(changes: dict[str, Any]) -> None:
    model = tiny_llama(**changes)
    theirs = theirs_of(model)
    ids, labels = random_ids(2, 24), random_ids(2, 24, seed=1)
    labels[0, :10] = -100
    logits = model(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = theirs(input_ids=ids, labels=labels)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(loss, expected.loss)
    loss.backward()
    expected.loss.backward()
    compare_gradients(model, theirs)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_packed_documents_equal_their_separate_rows(changes: dict[str, Any]) -> None:
    """One packed row of ours against one row for each document of theirs: logits and summed gradients."""
    lengths = [9, 4, 17, 1, 5]
    model = tiny_llama(**changes)
    theirs = theirs_of(model)
    ids = random_ids(1, sum(lengths))
    targets = random_ids(1, sum(lengths), seed=1)
    logits = model(ids, documents=Documents.from_lengths(lengths))
    expected = torch.cat([theirs(input_ids=part).logits for part in ids.split(lengths, dim=1)], 1)
    torch.testing.assert_close(logits, expected)
    for output in (logits, expected):
        F.cross_entropy(output[0], targets[0]).backward()
    compare_gradients(model, theirs)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_greedy_generation_token_for_token(changes: dict[str, Any]) -> None:
    model = tiny_llama(seed=4, **({"initializer_range": 0.4} | changes))
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 11, 1, 7)]
    ours = generate(model, prompts, max_new_tokens=16, stop_ids=(), pad_id=0)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    theirs = theirs_of(model).generate(input_ids=ids, attention_mask=mask, **options)
    assert ours == theirs[:, width:].tolist()


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_loads_in_transformers(tmp_path: Path, changes: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_llama(**changes).to(dtype)
    save_safetensors(model, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.dtype == dtype
    state = theirs.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    if model.config.tie_word_embeddings:
        assert theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    ids = random_ids(2, 9)
    if dtype == torch.float32:
        torch.testing.assert_close(model(ids), theirs(input_ids=ids).logits)


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_what_transformers_saves_loads_here(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_llama(**changes)
    theirs_of(model).save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = load_model(tmp_path)
    assert dataclasses.replace(loaded.config, rope_scaling=None) == dataclasses.replace(model.config, rope_scaling=None)
    torch.testing.assert_close(loaded(random_ids(2, 9)), model(random_ids(2, 9)), rtol=0, atol=0)


def test_a_gguf_file_read_by_both(tmp_path: Path) -> None:
    model = tiny_llama(num_key_value_heads=2, tie_word_embeddings=False)
    write_gguf(tmp_path / "m.gguf", model, "Q8_0")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = random_ids(2, 9)
    torch.testing.assert_close(load_model(tmp_path / "m.gguf")(ids), theirs(input_ids=ids).logits)


def test_the_check_notices_a_wrong_model() -> None:
    """The broken variant: neighbouring pairs are rotated instead of pairs half a head apart."""
    model = tiny_llama()
    theirs = theirs_of(model)
    ids = random_ids(1, 12)

    def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ftlab.operators.torch_path.rotate", neighbours)
        logits = model(ids)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logits, theirs(input_ids=ids).logits)


def test_a_saved_tokenizer_loads_in_transformers(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (257, 258, None)
    assert theirs.chat_template == tokenizer.chat_template
    for text in ("Héllo 12", "a<|im_end|>b", "高血压"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text, allow_special=True)
    messages = [{"role": "user", "content": "hi"}]
    want = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == want


def test_configuration_read_by_both(tmp_path: Path) -> None:
    config = tiny_config(rope_scaling=LLAMA3, eos_token_id=[1, 2], bos_token_id=5)
    save_safetensors(random_llama(config, seed=0), tmp_path)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_type"] == "llama3"
    theirs.save_pretrained(tmp_path / "again")
    again = LlamaConfig.from_hf(theirs.to_diff_dict(), "theirs")
    assert again == config
    assert load_model_config(tmp_path / "again") == config


def load_model_config(folder: Path) -> LlamaConfig:
    """The configuration of a folder that transformers wrote."""
    return LlamaConfig.from_hf(json.loads((folder / "config.json").read_text()), str(folder))
