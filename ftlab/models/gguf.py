"""GGUF files: metadata, and llama tensors under Hugging Face's names.

The `gguf` package turns quantised blocks into numbers. Its reader is not used: it maps the whole file and makes a
quarter of a million small arrays of the vocabulary, more memory than the weights of a small model.

Format: magic, version, counts, then key/value metadata, then per tensor (name, dims, type, offset), then aligned data;
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Dims are written innermost first.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from ftlab.errors import FtlabError
from ftlab.models.configuration import LlamaConfig, RopeScaling
from ftlab.models.llama import rotary_frequencies

__all__ = ["GGUFFile", "GGUFLlama", "is_gguf"]

MAGIC = b"GGUF"
CHUNK_WEIGHTS = 2 << 20  # weights dequantised in one go; in fp32, with what numpy needs on the way, some 30 MB
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
# llama.cpp stores llama3's rope scaling as one divisor per frequency; these are the published settings, by factor.
LLAMA3_FACTORS = (8.0, 32.0, 16.0)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. shape: outermost first; offset: bytes from the start of the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one innermost row; quantised blocks never cross rows."""
        block, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * size


class Reader:
    """Reads the header, refusing to run past the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.left = size

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        self.left -= count
        if self.left < 0:
            raise ValueError("the file ends in its header")
        return self.file.read(count)

    def scalar(self, layout: str) -> Any:
        """One number or boolean in struct's notation."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        """A UTF-8 string behind its length; bytes that are no UTF-8 are kept as surrogates."""
        return self.take(self.scalar("<Q")).decode("utf-8", errors="surrogateescape")

    def value(self, kind: int) -> Any:
        """A metadata value; arrays become lists."""
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, count = self.scalar("<I"), self.scalar("<Q")
            if inner in SCALARS:
                layout = SCALARS[inner]
                return [item for (item,) in struct.iter_unpack(layout, self.take(count * struct.calcsize(layout)))]
            if count > self.left:  # every element takes at least a byte
                raise ValueError("the file ends in its header")
            return [self.value(inner) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"unknown metadata type {kind}")
        return self.scalar(SCALARS[kind])


class GGUFFile:
    """The header of a GGUF file: `metadata` by key and `tensors` by name; the weights stay on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                self._read_header(Reader(file, size), size)
        except (OSError, ValueError, struct.error) as error:
            raise FtlabError(f"{path}: cannot be read as GGUF: {error}; download the file again") from None

    def _read_header(self, reader: Reader, size: int) -> None:
        if reader.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = reader.scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported (only little-endian 2 and 3)")
        num_tensors, num_keys = reader.scalar("<Q"), reader.scalar("<Q")
        for _ in range(num_keys):
            key = reader.string()
            self.metadata[key] = reader.value(reader.scalar("<I"))
        entries = []
        for _ in range(num_tensors):
            name, num_dims = reader.string(), reader.scalar("<I")
            dims = [reader.scalar("<Q") for _ in range(num_dims)]
            entries.append((name, tuple(reversed(dims)), reader.scalar("<I"), reader.scalar("<Q")))
        alignment = self.metadata.get("general.alignment", 32)
        data = -(-(size - reader.left) // alignment) * alignment
        for name, shape, kind, offset in entries:
            tensor_type = GGMLQuantizationType(kind)
            info = TensorInfo(shape, tensor_type, data + offset)
            if not shape or shape[-1] % GGML_QUANT_SIZES[tensor_type][0]:
                raise ValueError(f"tensor {name} has shape {shape}, which {tensor_type.name} cannot hold")
            if info.offset + prod(shape[:-1]) * info.row_bytes > size:
                raise ValueError(f"the file ends inside tensor {name}")
            self.tensors[name] = info

    def need(self, key: str) -> Any:
        """A metadata value that must be there."""
        if key not in self.metadata:
            raise FtlabError(f"{self.path}: the metadata has no {key}")
        return self.metadata[key]

    def chunks(self, name: str) -> Iterator[Tensor]:
        """A tensor's values, fp32, in consecutive slices of its first dimension.

        The file is read by offset, not mapped, so that what was read does not count as memory.
        """
        info = self.tensors[name]
        rows = prod(info.shape[:-1])
        step = max(1, CHUNK_WEIGHTS // info.shape[-1])
        with self.path.open("rb") as file:
            file.seek(info.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                raw = np.frombuffer(file.read(count * info.row_bytes), np.uint8).reshape(count, info.row_bytes)
                values = torch.from_numpy(np.array(dequantize(raw, info.type), np.float32))
                yield values if len(info.shape) > 1 else values[0]


def is_gguf(path: Path) -> bool:
    """Whether a file begins like a GGUF file."""
    with path.open("rb") as file:
        return file.read(4) == MAGIC


class GGUFLlama:
    """A llama in a GGUF file, under Hugging Face's parameter names.

    llama.cpp rotates neighbouring rows of q and k where Hugging Face rotates rows half a head apart, so its files hold
    those rows interleaved; they are put back in order here.
    """

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self.file = GGUFFile(path)
        self._names = {
            hf_name(name): name
            for name in self.file.tensors
            if name != ROPE_FACTORS  # part of the configuration
        }
        for name, info in self.file.tensors.items():
            if info.type.name not in TYPES:
                raise FtlabError(f"{path}: tensor {name} is {info.type.name}; only {', '.join(TYPES)} are read")
        self.shapes = {name: self.file.tensors[stored].shape for name, stored in self._names.items()}
        self.config = self._read_config()

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Slices of a tensor. A slice of q or k holds whole heads once put back in order."""
        heads = 0
        if name.endswith(("q_proj.weight", "q_proj.bias")):
            heads = self.config.num_attention_heads
        elif name.endswith(("k_proj.weight", "k_proj.bias")):
            heads = self.config.num_key_value_heads
        slices = self.file.chunks(self._names[name])
        if heads:
            whole = torch.cat(list(slices))
            by_pair = whole.view(heads, self.config.head_dim // 2, 2, *whole.shape[1:])
            yield by_pair.transpose(1, 2).reshape(whole.shape)
        else:
            yield from slices

    def _read_config(self) -> LlamaConfig:
        """The configuration in the metadata; FtlabError for what is not implemented."""
        file, where = self.file, self.where
        architecture = file.need("general.architecture")
        if architecture != "llama":
            raise FtlabError(f"{where}: the architecture is {architecture!r}; only llama is implemented")
        if file.metadata.get("llama.expert_count", 0):
            raise FtlabError(f"{where}: llama.expert_count: mixtures of experts are not implemented; use a dense model")
        if (kind := file.metadata.get("llama.rope.scaling.type", "none")) not in ("none", "linear"):
            raise FtlabError(f"{where}: llama.rope.scaling.type {kind!r} is not implemented; use a model without it")
        heads = file.need("llama.attention.head_count")
        hidden = file.need("llama.embedding_length")
        head_dim = file.metadata.get("llama.attention.key_length", hidden // heads)
        for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
            if file.metadata.get(key, head_dim) != head_dim:
                raise FtlabError(f"{where}: {key} is {file.metadata[key]}, not the head's {head_dim}: not implemented")
        vocab = self.shapes.get("model.embed_tokens.weight")
        if vocab is None:
            raise FtlabError(f"{where}: missing tensor token_embd.weight")
        scaling = None
        if kind == "linear":
            scaling = RopeScaling("linear", float(file.need("llama.rope.scaling.factor")))
        config = LlamaConfig(
            vocab_size=vocab[0],
            hidden_size=hidden,
            intermediate_size=file.need("llama.feed_forward_length"),
            num_hidden_layers=file.need("llama.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=file.metadata.get("llama.attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=shortest_decimal(file.need("llama.attention.layer_norm_rms_epsilon")),
            rope_theta=shortest_decimal(file.metadata.get("llama.rope.freq_base", 10000.0)),
            rope_scaling=scaling,
            tie_word_embeddings="lm_head.weight" not in self.shapes,
            attention_bias=any(name.endswith("_proj.bias") and ".self_attn." in name for name in self.shapes),
            mlp_bias=any(name.endswith("_proj.bias") and ".mlp." in name for name in self.shapes),
            max_position_embeddings=file.metadata.get("llama.context_length", 2048),
            bos_token_id=file.metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_id=file.metadata.get("tokenizer.ggml.eos_token_id"),
            pad_token_id=file.metadata.get("tokenizer.ggml.padding_token_id"),
        )
        return with_rope_factors(config, file) if ROPE_FACTORS in file.tensors else config


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name stays as it is."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in IN_BLOCK:
        return f"model.layers.{parts[1]}.{IN_BLOCK[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in TOP:
        return f"{TOP[parts[0]]}.{parts[1]}"
    return name


def shortest_decimal(value: float) -> float:
    """The shortest decimal with the same fp32 value: a stored 1e-5 reads as 9.999999747378752e-06 otherwise."""
    return float(str(np.float32(value)))


def with_rope_factors(config: LlamaConfig, file: GGUFFile) -> LlamaConfig:
    """Find the llama3 rope scaling whose frequencies are those of the file's `rope_freqs`; FtlabError if none is."""
    factors = torch.cat(list(file.chunks(ROPE_FACTORS)))
    plain = rotary_frequencies(config)
    for factor in LLAMA3_FACTORS:
        candidate = LlamaConfig(**{**config.__dict__, "rope_scaling": RopeScaling("llama3", factor)})
        scaled = rotary_frequencies(candidate)
        if factors.shape == plain.shape and torch.allclose(plain / factors, scaled, rtol=1e-5, atol=0):
            return candidate
    raise FtlabError(
        f"{file.path}: {ROPE_FACTORS} is none of the llama3 rope scalings known here; "
        "use the model's safetensors folder, whose config.json says what it is"
    )
