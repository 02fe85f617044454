"""Causal attention: the one function, over plain rows, packed documents or a cache.

Shapes: B rows, T query positions, S key positions, H query heads, K key/value heads, D width of a head,
N = B*T positions of a flattened batch, P positions of a batch padded document by document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from ftlab.operators import TORCH, Operators

__all__ = ["Documents", "attention"]

MAX_PADDING = 0.25  # share of a bucket's positions that may be padding
MAX_SHORT = 128  # longest document whose scores are kept in memory when training on a CPU


@dataclass(frozen=True)
class Bucket:
    """Documents of similar length, attended to by one kernel call as a right-padded [count, longest] batch."""

    count: int
    longest: int


@dataclass(frozen=True)
class Layout:
    """Where the positions of a flattened batch go in its buckets, and back.

    gather: int64 [P], for each padded position the flattened position it is filled from; a padding position repeats the
        first token of its own document, so that nothing of one document, NaN included, ever stands in another's row.
    inverse: int64 [N], for each flattened position its place among the padded ones.
    position_ids: int64 [N], position inside its document.
    """

    gather: Tensor
    inverse: Tensor
    position_ids: Tensor

    def to(self, device: torch.device) -> Layout:
        """The same on `device`."""
        return Layout(*(index.to(device, non_blocking=True) for index in self.__dict__.values()))


class Documents:
    """Where each document lies in a flattened batch: documents stand end to end and fill it.

    `lengths` are tokens per document, in order; their sum is B * T. With `shared_prefix` the first document is the
    beginning of all the others, which see it whole and count their positions on from its end. The index tensors are
    computed once, on first use, and travel with `to`.
    """

    def __init__(
        self, lengths: tuple[int, ...], device: torch.device, layout: Layout | None = None, shared_prefix: bool = False
    ) -> None:
        self.lengths = lengths
        self.device = device
        self.shared_prefix = shared_prefix
        self.total = sum(lengths)
        first = [0] if shared_prefix else []
        # Stable: ties keep their order.
        self.order = first + sorted(range(len(first), len(lengths)), key=lambda index: -lengths[index])
        self.buckets = [Bucket(1, lengths[0])] if shared_prefix else []
        self.buckets += make_buckets([lengths[index] for index in self.order[len(first) :]])
        # One length for all: the flattened batch already is the padded batch and nothing has to move.
        self.uniform = len(set(lengths)) == 1 and not shared_prefix
        self._layout = layout

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", *, shared_prefix: bool = False
    ) -> Documents:
        """Documents of these lengths; a length under 1, or a prefix of nothing, raises ValueError."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"every document needs at least one token, got lengths {list(lengths)}")
        if shared_prefix and len(lengths) < 2:
            raise ValueError("a shared prefix needs a document that goes on from it")
        return cls(tuple(int(length) for length in lengths), torch.device(device), None, shared_prefix)

    def to(self, device: torch.device | str) -> Documents:
        """The same documents with their index tensors on `device`."""
        device = torch.device(device)
        if device == self.device:
            return self
        return Documents(self.lengths, device, self.layout.to(device), self.shared_prefix)

    @property
    def layout(self) -> Layout:
        """The index tensors, on `device`; computed on first use."""
        if self._layout is None:
            layout = make_layout(self.lengths, self.order, self.buckets)
            if self.shared_prefix:
                layout.position_ids[self.lengths[0] :] += self.lengths[0]
            self._layout = layout.to(self.device)
        return self._layout

    @property
    def position_ids(self) -> Tensor:
        """int64 [N]: position of each token inside its document, the shared prefix included."""
        return self.layout.position_ids

    def __repr__(self) -> str:
        return f"Documents({len(self.lengths)} documents, {self.total} tokens, {len(self.buckets)} buckets)"


def make_buckets(descending: list[int]) -> list[Bucket]:
    """Cut lengths sorted from long to short into buckets, a new one when padding would exceed MAX_PADDING."""
    buckets: list[Bucket] = []
    count = tokens = longest = 0
    for length in descending:
        if count and tokens + length < (1 - MAX_PADDING) * longest * (count + 1):
            buckets.append(Bucket(count, longest))
            count = tokens = 0
        if count == 0:
            longest = length
        count += 1
        tokens += length
    buckets.append(Bucket(count, longest))
    return buckets


def make_layout(lengths: tuple[int, ...], order: list[int], buckets: list[Bucket]) -> Layout:
    """The index tensors of `Layout`, on the CPU."""
    lengths_M = torch.tensor(lengths)  # M documents
    starts_M = lengths_M.cumsum(0) - lengths_M
    total = sum(lengths)
    position_ids = torch.arange(total) - starts_M.repeat_interleave(lengths_M)
    inverse = torch.empty(total, dtype=torch.int64)
    gathers = []
    first_document = first_slot = 0
    for bucket in buckets:
        members = torch.tensor(order[first_document : first_document + bucket.count])
        column = torch.arange(bucket.longest)
        real = column < lengths_M[members, None]  # [count, longest]
        source = starts_M[members, None] + torch.where(real, column, 0)
        slot = torch.arange(first_slot, first_slot + bucket.count * bucket.longest).view_as(source)
        inverse[source[real]] = slot[real]
        gathers.append(source.flatten())
        first_document += bucket.count
        first_slot += bucket.count * bucket.longest
    return Layout(torch.cat(gathers), inverse, position_ids)


class PadDocuments(torch.autograd.Function):
    """x_N* -> x_P*: lay documents out in their buckets.

    Every flattened position stands exactly once among the real padded ones, and no gradient reaches the padding (real
    queries never see it and its own outputs are dropped), so the backward is a plain gather instead of a scatter-add.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Tensor, inverse: Tensor) -> Tensor:
        """Gather rows of x."""
        ctx.save_for_backward(inverse)
        return x.index_select(0, gather)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Gather the gradient back."""
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class UnpadDocuments(torch.autograd.Function):
    """y_P* -> y_N*: the inverse of PadDocuments; padding is dropped and its gradient is zero."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, inverse: Tensor) -> Tensor:
        """Gather rows of y."""
        ctx.save_for_backward(inverse)
        ctx.padded = y.shape[0]
        return y.index_select(0, inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Put each gradient in its place; places are distinct, so a copy is enough."""
        (inverse,) = ctx.saved_tensors
        out = grad.new_zeros(ctx.padded, *grad.shape[1:])
        return out.index_copy_(0, inverse, grad), None


def sdpa(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    causal: bool,
    mask_BTS: Tensor | None = None,
    operators: Operators = TORCH,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for grouped heads: query head h reads key head h // (H / K). Returns [B, T, H, D].

    causal: query t sees the keys 0 .. S - T + t. dropout_p: on the softmax, by torch's own attention; on a CPU that
    keeps the scores [H, T, S] in memory.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    q, k, v = q_BTHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
    mask = None if mask_BTS is None else mask_BTS[:, None]
    if T == 1 and K != H and not causal and dropout_p == 0:
        # The queries of a group share keys and mask: as extra query positions they need no copy of the cache.
        if mask is not None:
            mask = mask.expand(B, 1, H // K, -1)
        out = F.scaled_dot_product_attention(q.reshape(B, K, H // K, D), k, v, attn_mask=mask)
        return out.reshape(B, 1, H, D)
    if dropout_p > 0 and operators.path != "torch":
        operators.taken["causal_attention", "torch, for attention dropout"] += 1
    elif causal and dropout_p == 0 and T <= MAX_SHORT and q.device.type == "cpu" and q.requires_grad:
        return operators.causal_attention(q, k, v).transpose(1, 2)
    S = k.shape[2]
    if causal and S > T:  # torch's own causal mask begins at the first key, this one at key S - T
        mask, causal = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T), False
    grouped = K != H
    if grouped and q.is_cuda and q.dtype == torch.float32:
        # No fused CUDA kernel takes grouped fp32 heads; without this, [T, T] scores would be stored.
        k, v, grouped = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1), False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=causal, enable_gqa=grouped
    )
    return out.transpose(1, 2)


def document_attention(
    q_BTHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    documents: Documents,
    operators: Operators = TORCH,
    dropout_p: float = 0.0,
) -> Tensor:
    """Causal attention inside each document, and to the whole shared prefix if there is one. Returns [B, T, H, D].

    The shapes change with every batch, so a compiled block is compiled around this call rather than for each of them.
    """
    # The note to the compiler imports it when it is first called, a second that only torch.compile should cost.
    inside = _outside_compiled if torch.compiler.is_compiling() else _document_attention
    return inside(q_BTHD, k_BTKD, v_BTKD, documents, operators, dropout_p)


def _document_attention(
    q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, documents: Documents, operators: Operators, dropout_p: float
) -> Tensor:
    """Documents go into right-padded buckets. With a causal kernel no real query sees the padding behind it, so no mask
    is built and each document's result is bitwise independent of every other document.
    """
    B, T = q_BTHD.shape[:2]
    if documents.total != B * T:
        raise ValueError(f"the documents hold {documents.total} tokens but the batch holds {B} x {T}")
    if operators.packed_attention is not None and not documents.shared_prefix and dropout_p == 0:
        return operators.packed_attention(q_BTHD, k_BTKD, v_BTKD, documents.lengths)
    flat = [x.flatten(0, 1) for x in (q_BTHD, k_BTKD, v_BTKD)]
    if documents.uniform:
        bucket = documents.buckets[0]
        q, k, v = (x.view(bucket.count, bucket.longest, *x.shape[1:]) for x in flat)
        out = sdpa(q, k, v, causal=True, operators=operators, dropout_p=dropout_p)
        return out.reshape(q_BTHD.shape)
    layout = documents.layout
    q_P, k_P, v_P = (  # torch gives Function.apply no types
        PadDocuments.apply(x, layout.gather, layout.inverse)  # type: ignore[no-untyped-call]
        for x in flat
    )
    sizes = [bucket.count * bucket.longest for bucket in documents.buckets]
    outputs: list[Tensor] = []
    prefix: list[Tensor] = []
    for bucket, q, k, v in zip(documents.buckets, q_P.split(sizes), k_P.split(sizes), v_P.split(sizes), strict=True):
        shaped = [x.view(bucket.count, bucket.longest, *x.shape[1:]) for x in (q, k, v)]
        if prefix:
            before = [x.expand(bucket.count, *x.shape[1:]) for x in prefix]
            shaped[1:] = [torch.cat(both, dim=1) for both in zip(before, shaped[1:], strict=True)]
        elif documents.shared_prefix:
            prefix = shaped[1:]
        outputs.append(sdpa(*shaped, causal=True, operators=operators, dropout_p=dropout_p).flatten(0, 1))
    out_N: Tensor = UnpadDocuments.apply(torch.cat(outputs), layout.inverse)  # type: ignore[no-untyped-call]
    return out_N.view(q_BTHD.shape)


_outside_compiled = _disable_dynamo(_document_attention)


def attention(
    q_BTHD: Tensor,
    k_BSKD: Tensor,
    v_BSKD: Tensor,
    *,
    documents: Documents | None = None,
    mask_BTS: Tensor | None = None,
    operators: Operators = TORCH,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of T queries to S keys, the queries being the last T positions. Returns [B, T, H, D] in q's dtype.

    documents: causal inside each document; S must be T and there may be no mask.
    mask_BTS: bool, True where a query may look; every query needs at least one True. [B, 1, S] is enough when T is 1.
    neither: causal over the whole row (T == S), or one query that sees every key (T == 1).
    """
    if documents is not None:
        if mask_BTS is not None or q_BTHD.shape[1] != k_BSKD.shape[1]:
            raise ValueError("packed documents take neither a mask nor a cache")
        return document_attention(q_BTHD, k_BSKD, v_BSKD, documents, operators, dropout_p)
    T, S = q_BTHD.shape[1], k_BSKD.shape[1]
    if mask_BTS is None and T not in (1, S):
        raise ValueError(f"{T} queries over {S} keys need an explicit mask")
    causal = mask_BTS is None and T > 1
    return sdpa(q_BTHD, k_BSKD, v_BSKD, causal=causal, mask_BTS=mask_BTS, operators=operators, dropout_p=dropout_p)
