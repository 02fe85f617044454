"""Decoders, attention, tokenizers, reading and writing checkpoints, generation with a cache."""

from __future__ import annotations

from ftlab.models.attention import Documents
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.configuration import LlamaConfig, RopeScaling
from ftlab.models.generation import generate
from ftlab.models.llama import KVCache, LlamaForCausalLM
from ftlab.models.loading import load_model, random_llama
from ftlab.models.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

__all__ = [
    "Documents",
    "KVCache",
    "LlamaConfig",
    "LlamaForCausalLM",
    "RopeScaling",
    "Tokenizer",
    "byte_tokenizer",
    "generate",
    "load_model",
    "load_tokenizer",
    "random_llama",
    "save_safetensors",
]
