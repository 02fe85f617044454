"""Write a llama as a GGUF file, the way llama.cpp's converter does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from ftlab.models.llama import LlamaForCausalLM

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def stored_name(name: str) -> str:
    """Hugging Face's name -> llama.cpp's."""
    module, kind = name.rsplit(".", 1)
    if module.startswith("model.layers."):
        layer, leaf = module.removeprefix("model.layers.").split(".", 1)
        return f"blk.{layer}.{NAMES[leaf]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """The `permute` of llama.cpp's converter, applied to q and k."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: str = "F32",
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Matrices in `kind`, vectors in F32. `metadata`: more keys, or other values (None: left out); `tensors`: more.

    Returns what a reader should find, under Hugging Face's names.
    """
    config = model.config
    fields: dict[str, Any] = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
    } | (metadata or {})
    writer = GGUFWriter(path, fields.pop("general.architecture", "llama"))
    for key, value in fields.items():
        add_value(writer, key, value)
    expected = {}
    for name, parameter in model.state_dict().items():
        array = parameter.numpy()
        quantisation = GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)
        data = quantize(interleave(array, heads) if heads else array, quantisation)
        writer.add_tensor(stored_name(name), data, raw_dtype=quantisation)
        expected[name] = array
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def add_value(writer: GGUFWriter, key: str, value: Any) -> None:
    """Add a value with the type that llama.cpp gives it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
