"""The real SmolLM2-135M-Instruct against transformers, on real text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ftlab.assets import resolve
from ftlab.models.attention import Documents
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.generation import generate
from ftlab.models.llama import LlamaForCausalLM
from ftlab.models.loading import load_model
from ftlab.models.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.models import SMOLLM2

pytestmark = pytest.mark.network

TEXTS = [
    "Hypertension, also known as high blood pressure, is a long-term medical condition in which the blood pressure in "
    "the arteries is persistently elevated. High blood pressure usually does not cause symptoms itself.",
    "The quick brown fox jumps over the lazy dog, then sleeps for 12 hours.",
    "def mean(values):\n    return sum(values) / len(values)\n",
]
QUESTIONS = [
    "What is the medical term for a runny nose?",
    "Give me the clinical name for high blood sugar, and say what it means for a patient.",
    "List three fruits.",
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return load_model(resolve(SMOLLM2))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve(SMOLLM2))


@pytest.fixture(scope="module")
def theirs(model: LlamaForCausalLM) -> Any:
    """transformers' model with a configuration of its own and the same tensors."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 100000.0, "rope_type": "default"},
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        built = transformers.LlamaForCausalLM(config)
    built.model.rotary_emb = type(built.model.rotary_emb)(config)  # its frequencies are no parameters
    missing, unexpected = built.load_state_dict(model.state_dict(), strict=False, assign=True)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    built.tie_weights()
    return built.eval()


def chat(tokenizer: Tokenizer, question: str) -> list[int]:
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.encode(text, allow_special=True)


@pytest.mark.slow
def test_transformers_reads_the_same_tensors_from_the_file(model: LlamaForCausalLM) -> None:
    """Its own dequantisation, names and permutation of q and k."""
    path = resolve(SMOLLM2)
    loaded = transformers.LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@torch.inference_mode()
def test_logits_on_real_text(model: LlamaForCausalLM, tokenizer: Tokenizer, theirs: Any) -> None:
    rows = [tokenizer.encode(text) for text in TEXTS]
    ids = [id for row in rows for id in row]
    packed = model(torch.tensor([ids]), documents=Documents.from_lengths([len(row) for row in rows]))
    for row, part in zip(rows, packed[0].split([len(row) for row in rows]), strict=True):
        expected = theirs(input_ids=torch.tensor([row])).logits[0]
        # 30 layers of rounding in another order: logits of size 10 to 20 differ by some 1e-5 of that.
        torch.testing.assert_close(model(torch.tensor([row]))[0], expected, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-3)


def test_greedy_answers_token_for_token(model: LlamaForCausalLM, tokenizer: Tokenizer, theirs: Any) -> None:
    prompts = [chat(tokenizer, question) for question in QUESTIONS]
    options = {"max_new_tokens": 16, "stop_ids": tokenizer.stop_ids, "pad_id": tokenizer.pad_id}
    ours = generate(model, prompts, **options)
    assert generate(model, prompts[:1], use_cache=False, **options) == ours[:1]
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generated = theirs.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=16, do_sample=False, pad_token_id=2, eos_token_id=2
    )
    for answer, row in zip(ours, generated[:, width:].tolist(), strict=True):
        assert answer == (row[: row.index(2)] if 2 in row else row)
    assert min(map(len, ours)) < 16, "one answer should end by itself"


def test_bf16_file_for_transformers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = load_model(resolve(SMOLLM2), dtype=torch.bfloat16)
    save_safetensors(model, tmp_path)
    tokenizer.save(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * 134_515_008 + 100_000
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text)


@pytest.mark.slow
def test_tokenizer_against_the_gguf_reading_of_transformers(tokenizer: Tokenizer) -> None:
    """Its reading does not set numbers apart first, which these texts do not notice: no merge here has a digit."""
    path = resolve(SMOLLM2)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (
        *TEXTS,
        "Élève naïve, ﬁancé, e\u0301 combining, ПРИВЕТ мир",
        "高血压是一种常见的慢性疾病，患病率约为30%。",
        "  runs \t of\t\twhitespace\n\n\n   and trailing   ",
        "def f(x):\r\n    return {\"a\": x**2, 'b': [1, 22, 333]}  # comment\r\n",
        "<|im_start|>user\nHi 12345<|im_end|>\n",
    ):
        assert tokenizer.encode(text, allow_special=True) == theirs(text, add_special_tokens=False)["input_ids"], text
