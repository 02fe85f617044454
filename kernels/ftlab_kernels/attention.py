"""Causal attention inside documents that stand end to end, by the kernels that torch has; none of them is ours.

Letters: N positions of all documents together, n those of one, H query heads, K key heads (H a multiple of K), E width
of a head.

    out[t, h] = sum_u softmax_u(scale q[t, h] . k[u, h // (H / K)]) v[u, h // (H / K)],  u <= t, both in one document

2 E H n^2 FLOPs forward and 2.5 times that backward for a document, so what matters is that no work is done between
documents. Three backends:

varlen  torch.nn.attention.varlen: FlashAttention kernels that take the documents' boundaries. fp16, bf16, on a GPU.
        Tiles begin with the documents, nothing is compiled, no mask is built.
flex    torch.nn.attention.flex_attention (arXiv 2412.05496), compiled to Triton, with a mask of blocks that is built
        from the lengths alone and kept for the layouts used last. Tiles of 128 lie across the documents, so some of the
        work at each boundary is masked. Compiled at the first call, and again when N first changes.
sdpa    scaled_dot_product_attention for each run of documents of one length. Runs everywhere; many launches.

What one document's NaN does to another:
varlen  nothing, from its source: what lies outside a document is not loaded. Not tested without a GPU.
flex    it spreads to the other documents of its tile of 128 positions, forward and backward: the weights there are
        exactly 0, but 0 * NaN is NaN. (Without compiling, as in the tests on a CPU, it spreads to all.) Finite values
        never spread.
sdpa    nothing: a document's result is bit for bit that of the document alone.

Equal bits from run to run: flex (Triton) and sdpa on a CPU always; varlen and sdpa on a GPU add up the gradient of q
with atomics unless torch.use_deterministic_algorithms(True) is set, which their FlashAttention kernels obey.

On an H100 `choose_backend` takes varlen for fp16 and bf16 and flex for fp32. Nothing of this was measured here: there
was no GPU. Published for dense causal bf16 with heads of 128 (FlashAttention-3, arXiv 2407.08608): FlashAttention-2
about 370 TFLOP/s forward, Triton 390, FlashAttention-3 650. So flex is about as fast as varlen where documents are
long, and the choice rests on boundaries, isolation and the compiler; where the package of FlashAttention-3 is
installed, `torch.nn.attention.activate_flash_attention_impl("FA3")` changes varlen to those kernels. For runs that must
repeat bit for bit, set torch's flag or give backend="flex".
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from ftlab_kernels.common import HAS_TRITON, INTERPRETED, KernelUnavailableError, ceil_div, why_not_triton

__all__ = ["BACKENDS", "block_mask", "choose_backend", "chosen", "packed_attention", "reference"]

BACKENDS = ("varlen", "flex", "sdpa")
BLOCK = 128  # positions of a tile of flex_attention's masks
LAYOUTS = 8  # how many of the last layouts keep their index tensors, (N / 32)^2 bytes each with flex
HALF_DTYPES = (torch.float16, torch.bfloat16)

_taken: Counter[tuple[str, str]] = Counter()


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor, *, scale: float | None = None
) -> Tensor:
    """The same in plain torch with the [N, N] mask and scores in memory: products in q's dtype, softmax in fp32."""
    flat_q, flat_k, flat_v = _flat(q), _flat(k), _flat(v)
    lengths = _check(flat_q, flat_k, flat_v, lengths)
    keys, values = (x.repeat_interleave(flat_q.shape[1] // flat_k.shape[1], 1) for x in (flat_k, flat_v))
    scores = torch.einsum("the,she->hts", flat_q, keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    document = torch.arange(len(lengths), device=q.device).repeat_interleave(torch.tensor(lengths, device=q.device))
    position = torch.arange(len(document), device=q.device)
    seen = (document[:, None] == document) & (position[:, None] >= position)
    precise = scores.to(torch.promote_types(q.dtype, torch.float32))
    weights = precise.masked_fill(~seen, -torch.inf).softmax(-1).to(v.dtype)
    return torch.einsum("hts,she->the", weights, values).reshape(q.shape)


# The shapes change with every batch: a model that is compiled would be compiled for each of them.
@_disable_dynamo
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int] | Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention inside each document: q's shape and dtype, differentiable (flex on a CPU is not).

    q: [N, H, E], or [B, T, H, E] whose flattened rows are the N positions. k, v: the same with K heads. lengths:
    positions of each document, in order, N in all; or a tensor of their boundaries 0 .. N (cu_seqlens), which has to be
    read: on a GPU that waits for the device, so give numbers where they are at hand. scale: None is E ** -0.5.
    backend: None asks `choose_backend`.
    Errors: ValueError for what does not fit; KernelUnavailableError for a backend that cannot run here.
    """
    flat_q, flat_k, flat_v = _flat(q), _flat(k), _flat(v)
    lengths = _check(flat_q, flat_k, flat_v, lengths)
    if backend is None:
        backend, reason = _choice(q.device, q.dtype, q.shape[-1])
    elif backend in BACKENDS:
        reason = "as asked for"
    else:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    _taken[backend, reason] += 1
    if not lengths:
        return q.clone()
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    run = {"varlen": _varlen, "flex": _flex, "sdpa": _sdpa}[backend]
    return run(flat_q, flat_k, flat_v, lengths, scale).reshape(q.shape)


def choose_backend(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that `packed_attention` takes there; the module's docstring says why."""
    return _choice(torch.device(device), dtype, head_dim)[0]


def chosen() -> dict[tuple[str, str], int]:
    """(backend, why): how many calls have gone there since the process began."""
    return dict(_taken)


def _choice(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    if device.type != "cuda":
        return "sdpa", f"on {device.type} there is no other with gradients"
    no_triton = why_not_triton(device)
    word = str(dtype).removeprefix("torch.")
    if no_triton is None and dtype in HALF_DTYPES and head_dim % 8 == 0 and head_dim <= 192:
        if _varlen_function() is not None and torch.version.hip is None:
            return "varlen", f"{word}, heads of {head_dim}"
        return "flex", "this torch has no varlen_attn that fits"
    if no_triton is None and dtype in (*HALF_DTYPES, torch.float32) and 16 <= head_dim <= 256:
        return "flex", f"varlen takes fp16 and bf16 and heads of up to 192, not {word} and {head_dim}"
    return "sdpa", no_triton or f"the others do not take {word} and heads of {head_dim}"


def _flat(x: Tensor) -> Tensor:
    """[B, T, heads, E] as [N, heads, E], with the elements of a head side by side."""
    x = x.flatten(0, 1) if x.dim() == 4 else x
    return x if x.dim() != 3 or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor) -> tuple[int, ...]:
    """The lengths, once everything fits. q, k, v: flat."""
    if q.dim() != 3 or k.shape != v.shape or k.dim() != 3 or (k.shape[0], k.shape[2]) != (q.shape[0], q.shape[2]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q must be [N, H, E] and k and v [N, K, E], or all with B, T for N; not {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly")
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        raise ValueError("q, k and v must have one dtype and one device")
    if isinstance(lengths, Tensor):
        bounds = [int(bound) for bound in lengths.tolist()]
        if not bounds or bounds[0] != 0:
            raise ValueError(f"cu_seqlens must begin with 0, not {bounds[:1]}")
        lengths = [after - before for before, after in itertools.pairwise(bounds)]
    lengths = tuple(int(length) for length in lengths)
    if min(lengths, default=1) < 1 or sum(lengths) != q.shape[0]:
        raise ValueError(f"documents must have at least one position and {q.shape[0]} in all, not {list(lengths)}")
    return lengths


# --- sdpa -------------------------------------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """Neighbouring documents of one length are a batch: views, no padding."""
    if q.is_cuda and q.dtype == torch.float32 and q.shape[1] != k.shape[1]:
        # No fused CUDA kernel takes grouped fp32 heads; without this, [n, n] scores would be stored.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    outputs = []
    start = 0
    for length, run in itertools.groupby(lengths):
        count = len(list(run))
        part = slice(start, start + count * length)
        queries, keys, values = (x[part].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start += count * length
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


# --- varlen -----------------------------------------------------------------------------------------------------------


@functools.cache
def _varlen_function() -> Callable[..., Tensor] | None:
    """torch's varlen_attn, if there is one that can be causal with a scale of its own."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    return cast("Callable[..., Tensor]", varlen_attn) if {"window_size", "scale"} <= set(takes) else None


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    function = _varlen_function()
    if function is None or q.device.type != "cuda" or q.dtype not in HALF_DTYPES:
        found = "this torch has none" if function is None else f"these are {q.dtype} on {q.device.type}"
        raise KernelUnavailableError(f"varlen_attn takes fp16 and bf16 on a CUDA GPU, and {found}")
    return _call_varlen(function, (q, k, v), lengths, scale)


def _call_varlen(
    function: Callable[..., Tensor], tensors: tuple[Tensor, Tensor, Tensor], lengths: tuple[int, ...], scale: float
) -> Tensor:
    """A window without a left end and with none to the right is the causal mask. torch 2.11 has no grouped heads."""
    q, k, v = tensors
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(function).parameters:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    bounds, longest = _bounds(lengths, q.device), max(lengths)
    return function(q, k, v, bounds, bounds, longest, longest, **options)


@functools.lru_cache(maxsize=LAYOUTS)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """0, n_1, n_1 + n_2, ..., N in int32."""
    with torch.inference_mode(False):  # what is kept may later be part of a training step
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


# --- flex -------------------------------------------------------------------------------------------------------------


@functools.cache
def _flex_function(device_type: str) -> Callable[..., Tensor]:
    """flex_attention, compiled where Triton compiles it. On a CPU torch runs it without: only for small tests."""
    from torch.nn.attention.flex_attention import flex_attention

    function = cast("Callable[..., Tensor]", flex_attention)
    return torch.compile(function) if device_type == "cuda" else function


def _flex(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    if q.is_cuda and (not HAS_TRITON or INTERPRETED):
        raise KernelUnavailableError("flex_attention is compiled by triton, which is not installed or only interprets")
    if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise KernelUnavailableError(f"flex_attention has no gradients on {q.device.type}")
    mask = block_mask(lengths, q.device)
    query, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = _flex_function(q.device.type)(query, keys, values, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


@functools.lru_cache(maxsize=LAYOUTS)
def block_mask(lengths: tuple[int, ...], device: torch.device) -> Any:
    """flex_attention's BlockMask of a layout: what create_block_mask makes, without the [N, N] mask it makes it from.

    Documents stand in order, so the first document of each block of queries and the last of each block of keys decide.
    """
    from torch.nn.attention.flex_attention import BlockMask

    with torch.inference_mode(False):  # what is kept may later be part of a training step
        sizes = torch.tensor(lengths)
        document = torch.arange(len(lengths)).repeat_interleave(sizes)
        total = len(document)
        first_of = (sizes.cumsum(0) - sizes)[document].to(device=device, dtype=torch.int32)

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (key >= first_of[query])

        begins = torch.arange(0, total, BLOCK)
        first, last = document[begins], document[(begins + BLOCK - 1).clamp(max=total - 1)]
        block = torch.arange(ceil_div(total, BLOCK))
        below = block[:, None] > block
        some = (below & (last[None, :] == first[:, None])) | (block[:, None] == block)
        whole = (begins + BLOCK <= total) & (first == last)  # full blocks that hold one document only
        full = below & whole[:, None] & whole & (first[:, None] == first)
        return BlockMask.from_kv_blocks(
            *_ordered(some & ~full),
            *_ordered(full),
            BLOCK_SIZE=BLOCK,
            mask_mod=mask_mod,
            seq_lengths=(total, total),
        ).to(device)


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """bool [query blocks, key blocks] -> counts [1, 1, query blocks] and the indices, those of the True first."""
    counts = dense.sum(-1, dtype=torch.int32)
    indices = dense.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return counts[None, None], indices.to(torch.int32)[None, None].contiguous()
