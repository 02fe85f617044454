"""LoRA weights between PEFT's names and layout and those of torchtune and of LitGPT.

Every function takes and gives a state: names to tensors. PEFT's A is [rank, in] and its B [out, rank].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["litgpt_to_peft", "peft_to_litgpt", "peft_to_torchtune"]

PREFIX = "base_model.model.model.layers."
TORCHTUNE = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}
LITGPT = {  # one layer of LitGPT -> the layers whose weights lie in it one below the other
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "mlp.fc_1": ("mlp.gate_proj",),
    "mlp.fc_2": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


def peft_to_torchtune(state: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """torchtune rotates neighbouring dimensions of q and k, PEFT's Llama those half a head apart: B's rows move."""
    changed = {}
    for name, value in state.items():
        layer, module, matrix = parts(name)
        if matrix == "lora_B" and module in ("self_attn.q_proj", "self_attn.k_proj"):
            value = value.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()
        changed[f"layers.{layer}.{TORCHTUNE[module]}.{matrix.lower()}.weight"] = value
    return changed


def peft_to_litgpt(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The matrices of q, k and v one below the other; the rest as it is."""
    layers = sorted({int(parts(name)[0]) for name in state})
    return {
        f"transformer.h.{layer}.{target}.{matrix}": torch.cat([state[peft_name(layer, m, matrix)] for m in modules])
        for layer in layers
        for target, modules in LITGPT.items()
        for matrix in ("lora_A", "lora_B")
    }


def litgpt_to_peft(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back. like: an adapter in PEFT's layout, for the shapes."""
    changed = {}
    for layer in sorted({int(parts(name)[0]) for name in like}):
        for target, modules in LITGPT.items():
            for matrix in ("lora_A", "lora_B"):
                names = [peft_name(layer, module, matrix) for module in modules]
                joined = state[f"transformer.h.{layer}.{target}.{matrix}"]
                pieces = joined.split([like[name].shape[0] for name in names])
                changed |= {name: piece.contiguous() for name, piece in zip(names, pieces, strict=True)}
    return changed


def parts(name: str) -> tuple[str, str, str]:
    """The layer, the module in it and the matrix that a name of PEFT's stands for."""
    layer, _, rest = name.removeprefix(PREFIX).partition(".")
    module, _, matrix = rest.removesuffix(".weight").rpartition(".")
    return layer, module, matrix


def peft_name(layer: int, module: str, matrix: str) -> str:
    """What `parts` takes apart."""
    return f"{PREFIX}{layer}.{module}.{matrix}.weight"
