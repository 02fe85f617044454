"""The llama decoder, with the parameter names of the Hugging Face checkpoint.

Shapes: B rows, T query positions, S key positions, D width of the residual stream, H query heads, K key/value heads,
E width of a head, V vocabulary, N = B*T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftlab.models.attention import Documents, attention
from ftlab.models.configuration import LlamaConfig
from ftlab.models.noise import QUIET, embedding_noise, left_out, own_lengths
from ftlab.operators import TORCH, Operators
from ftlab.operators.dropout import dropout

__all__ = ["KVCache", "LlamaConfig", "LlamaForCausalLM", "RMSNorm", "rotary_frequencies"]


class KVCache:
    """Keys and values of past positions, in buffers made once for `capacity` positions.

    Buffers take the rows, heads and dtype of the first keys that arrive (autocast decides that dtype). `length` is the
    number of positions that every layer holds.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    def append(self, layer: int, k_BTKE: Tensor, v_BTKE: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of T new positions; returns all so far, as views [B, length + T, K, E]."""
        end = self.length + k_BTKE.shape[1]
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions, {end} are needed")
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            shape = (k_BTKE.shape[0], self.capacity, *k_BTKE.shape[2:])
            keys, values = k_BTKE.new_empty(shape), v_BTKE.new_empty(shape)
            self._keys[layer], self._values[layer] = keys, values
        keys[:, self.length : end] = k_BTKE
        values[:, self.length : end] = v_BTKE
        return keys[:, :end], values[:, :end]

    def advance(self, positions: int) -> None:
        """Count positions that every layer has appended."""
        self.length += positions

    def select(self, rows: Tensor) -> None:
        """Keep only these rows (int64 indices); one layer at a time, so that memory falls as it goes."""
        for layer, (keys, values) in enumerate(zip(self._keys, self._values, strict=True)):
            if keys is not None and values is not None:
                self._keys[layer] = keys.index_select(0, rows)
                self._values[layer] = values.index_select(0, rows)


@dataclass(frozen=True)
class Context:
    """What every block needs about the positions; computed once in a forward pass.

    cos, sin: fp32 [B or 1, T, 1, E/2]. mask: bool [B or 1, T, S] or None.
    """

    cos: Tensor
    sin: Tensor
    documents: Documents | None
    mask: Tensor | None
    cache: KVCache | None


def rotary_frequencies(config: LlamaConfig, device: torch.device | str = "cpu") -> Tensor:
    """theta ** (-2i / E) for i < E/2 (arXiv 2104.09864), after rope scaling; fp32 [E/2], radians per position."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    # llama3: wavelengths beyond original / low are stretched by factor, those under original / high are kept, and in
    # between the share of the unstretched frequency falls linearly in original / wavelength.
    wavelengths = 2 * math.pi / frequencies
    ratio = scaling.original_max_position_embeddings / wavelengths
    kept = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def make_mask(mask_BS: Tensor | None, T: int, S: int, device: torch.device) -> Tensor | None:
    """bool [B or 1, T, S], True where a query may look; None where plain causal attention says it already.

    A padding query sees itself, so that its row is finite: its value reaches no real position.
    """
    if mask_BS is None and T in (1, S):
        return None
    query_T1 = torch.arange(S - T, S, device=device)[:, None]
    key_S = torch.arange(S, device=device)
    causal_TS = key_S <= query_T1
    return causal_TS[None] if mask_BS is None else (mask_BS[:, None] & causal_TS) | (key_S == query_T1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467), computed in fp32, returned in x's dtype.

    Differs from transformers in half precision only: the weight is applied before rounding, not after.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.operators = TORCH

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.operators.rms_norm(x, self.weight, self.eps)

    def add(self, stream: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of stream + update, and that sum; [..., D] each. Without an update the stream stays as it is."""
        if update is None:
            return self(stream), stream
        return self.operators.add_rms_norm(update, stream, self.weight, self.eps)


class Linear(nn.Linear):
    """A linear layer that draws no values of its own: they come from a checkpoint or from `loading.initialise`."""

    def reset_parameters(self) -> None:
        """Leave the weights as they were allocated."""


class Embedding(nn.Embedding):
    """An embedding that draws no values of its own, like `Linear`."""

    def reset_parameters(self) -> None:
        """Leave the weights as they were allocated."""


def project(x: Tensor, layers: Sequence[nn.Module]) -> tuple[Tensor, ...]:
    """The outputs of linear layers that read the same x: in one pass where their class can do that (`together`)."""
    kind = type(layers[0])
    together = getattr(kind, "together", None)
    if together is not None and all(type(layer) is kind for layer in layers):
        outputs: tuple[Tensor, ...] = together(layers, x)
        return outputs
    return tuple(layer(x) for layer in layers)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.operators = TORCH
        self.noise = QUIET
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = Linear(width, config.num_attention_heads * config.head_dim, bias=bias)
        self.k_proj = Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.v_proj = Linear(width, config.num_key_value_heads * config.head_dim, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, width, bias=bias)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        B, T, _ = x_BTD.shape
        q_BTHE, k_BTKE, v_BTKE = (
            out.view(B, T, -1, self.head_dim) for out in project(x_BTD, (self.q_proj, self.k_proj, self.v_proj))
        )
        q_BTHE, k_BSKE = self.operators.rope(q_BTHE, k_BTKE, context.cos, context.sin)
        v_BSKE = v_BTKE
        if context.cache is not None:
            k_BSKE, v_BSKE = context.cache.append(self.layer, k_BSKE, v_BSKE)
        out = attention(
            q_BTHE,
            k_BSKE,
            v_BSKE,
            documents=context.documents,
            mask_BTS=context.mask,
            operators=self.operators,
            dropout_p=self.noise.attention if self.training else 0.0,
        )
        projected: Tensor = self.o_proj(out.reshape(B, T, -1))
        return projected


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.operators = TORCH
        self.noise = QUIET
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        hidden = self.operators.swiglu(*project(x, (self.gate_proj, self.up_proj)))
        out: Tensor = self.down_proj(dropout(hidden, self.noise.hidden if self.training else 0.0))
        return out


class Block(nn.Module):
    """One decoder layer: h + attention(norm(h)), then h + mlp(norm(h)).

    The last sum is left to the next norm, which makes it in the same pass: a block takes the stream and the update that
    is still to be added to it, and returns both. With stochastic depth that update is of the whole block, and the
    caller scales it: the factor differs from block to block, and compiled blocks have their constants in common.
    """

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.noise = QUIET
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h_BTD: Tensor, update_BTD: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """[B, T, D] each -> [B, T, D] each."""
        noise = self.noise if self.training else QUIET
        normed_BTD, h_BTD = self.input_layernorm.add(h_BTD, update_BTD)
        attended_BTD = dropout(self.self_attn(normed_BTD, context), noise.residual)
        normed_BTD, between_BTD = self.post_attention_layernorm.add(h_BTD, attended_BTD)
        out_BTD = dropout(self.mlp(normed_BTD), noise.residual)
        if noise.depth > 0:
            return h_BTD, attended_BTD + out_BTD
        return between_BTD, out_BTD


class Decoder(nn.Module):
    """The parameters under `model.` in the checkpoint."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LlamaForCausalLM(nn.Module):
    """A llama with its head.

    With tied embeddings the head has no parameter of its own and `state_dict` no `lm_head.weight`: there is one tensor,
    so the pair cannot drift apart. A new model is on the meta device, without memory or values: `load_model` and
    `random_llama` give models to use. Nothing is held in buffers, so a model is complete once its parameters are.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_blocks = False
        self.operators = TORCH
        self.noise = QUIET
        self.lm_head: nn.Linear | None = None
        with torch.device("meta"):
            self.model = Decoder(config)
            if not config.tie_word_embeddings:
                self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks. To compile one in place: `block.compile()`; parameter names stay as they are."""
        return self.model.layers

    def use(self, operators: Operators) -> None:
        """Compute everything between the matrix products by these operators, adapters included."""
        for module in self.modules():
            if hasattr(module, "operators"):
                module.operators = operators  # type: ignore[assignment]

    def hf_config(self, dtype: str) -> dict[str, Any]:
        """The fields of its config.json; `dtype` like "float32"."""
        return self.config.to_hf(dtype)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the weight of the LM head, or the embedding it is tied to."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, h: Tensor) -> Tensor:
        """[..., D] after the final norm -> [..., V]."""
        out: Tensor = F.linear(h, self.head_weight) if self.lm_head is None else self.lm_head(h)
        return out

    def hidden_states(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        documents: Documents | None = None,
        cache: KVCache | None = None,
        mask_BS: Tensor | None = None,
        entry: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """The residual stream after the final norm, [B, T, D].

        input_ids_BT: int64 token ids. position_ids_BT: int64; None counts from 0 in each document, from the first
        real token of a padded row, or on from the cache. documents: packed documents that never see one another.
        cache: holds the S - T positions before these, and takes these T. mask_BS: bool, True at real tokens, over all
        S positions; left padding is how it is meant. entry: (layer, stream [B, T, D] that enters it), as `stream_at`
        gives it: the embedding and the blocks below are left out.
        """
        context = self._context(input_ids_BT, position_ids_BT, documents, cache, mask_BS)
        first, h_BTD = (0, self._embed(input_ids_BT, documents)) if entry is None else entry
        h_BTD, update_BTD = self._run_blocks(h_BTD, first, len(self.model.layers), context)
        if cache is not None:
            cache.advance(input_ids_BT.shape[1])
        out: Tensor = self.model.norm.add(h_BTD, update_BTD)[0]
        return self._before_head(out)

    def _before_head(self, h_BTD: Tensor) -> Tensor:
        return dropout(h_BTD, self.noise.head if self.training else 0.0)

    def stream_at(self, layer: int, input_ids_BT: Tensor) -> Tensor:
        """The residual stream that enters block `layer`, [B, T, D], for rows of plain causal tokens."""
        context = self._context(input_ids_BT, None, None, None, None)
        h_BTD, update_BTD = self._run_blocks(self.model.embed_tokens(input_ids_BT), 0, layer, context)
        return h_BTD if update_BTD is None else h_BTD + update_BTD

    def frozen_depth(self) -> int:
        """How many blocks from the first on neither train nor draw dropout; 0 if the embedding trains."""
        if self.model.embed_tokens.weight.requires_grad or self.noise.below_head:
            return 0
        for depth, block in enumerate(self.model.layers):
            dropout = any(getattr(module, "dropout_p", 0) > 0 for module in block.modules())
            if dropout or any(parameter.requires_grad for parameter in block.parameters()):
                return depth
        return len(self.model.layers)

    def _embed(self, input_ids_BT: Tensor, documents: Documents | None) -> Tensor:
        """The embeddings [B, T, D], disturbed in training mode."""
        h_BTD: Tensor = self.model.embed_tokens(input_ids_BT)
        if not self.training:
            return h_BTD
        if self.noise.neftune > 0:
            h_BTD = embedding_noise(h_BTD, own_lengths(documents, *input_ids_BT.shape), self.noise.neftune)
        return dropout(h_BTD, self.noise.embedding)

    def _run_blocks(self, h_BTD: Tensor, first: int, end: int, context: Context) -> tuple[Tensor, Tensor | None]:
        """The stream after blocks first .. end - 1, and the update that is still to be added to it."""
        run = self._block_runner(context.cache)
        update_BTD: Tensor | None = None
        random_depth = self.training and self.noise.depth > 0
        for number, block in enumerate(self.model.layers[first:end], first):
            keep = self.noise.keep(number, len(self.model.layers))
            if random_depth and float(torch.rand(())) >= keep:
                h_BTD = left_out(h_BTD, block)
                continue
            h_BTD, update_BTD = run(block, h_BTD, update_BTD, context)
            if random_depth:
                assert update_BTD is not None  # a block returns one
                update_BTD = update_BTD / keep
        return h_BTD, update_BTD

    def _context(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None,
        documents: Documents | None,
        cache: KVCache | None,
        mask_BS: Tensor | None,
    ) -> Context:
        """What the blocks need of these positions."""
        B, T = input_ids_BT.shape
        device = input_ids_BT.device
        past = 0 if cache is None else cache.length
        if documents is not None and (cache is not None or mask_BS is not None):
            raise ValueError("packed documents take neither a cache nor a mask")
        if mask_BS is not None and mask_BS.shape != (B, past + T):
            raise ValueError(f"the mask is {tuple(mask_BS.shape)}, the keys are {(B, past + T)}")
        if position_ids_BT is None:
            if documents is not None:
                position_ids_BT = documents.position_ids.view(B, T)
            elif mask_BS is not None:
                position_ids_BT = (mask_BS.cumsum(1) - 1).clamp_(min=0)[:, past:]
            else:
                position_ids_BT = torch.arange(past, past + T, device=device)[None]
        angles = position_ids_BT[:, :, None, None] * rotary_frequencies(self.config, device)
        mask_BTS = make_mask(mask_BS, T, past + T, device)
        return Context(angles.cos(), angles.sin(), documents, mask_BTS, cache)

    def _block_runner(self, cache: KVCache | None) -> Callable[[nn.Module, Tensor, Tensor | None, Context], Any]:
        """How this forward pass calls its blocks."""
        if cache is not None:
            # A compiled block would be compiled again as the cache grows: decoding runs the plain one.
            return lambda block, *arguments: block.forward(*arguments)
        if self.checkpoint_blocks and self.training and torch.is_grad_enabled():
            # The RNG state is kept so that recomputed dropout draws the same masks.
            return lambda block, *arguments: checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=True)
        return lambda block, *arguments: block(*arguments)

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        documents: Documents | None = None,
        cache: KVCache | None = None,
        mask_BS: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V]; arguments as in `hidden_states`."""
        return self.logits(self.hidden_states(input_ids_BT, position_ids_BT, documents, cache, mask_BS))
