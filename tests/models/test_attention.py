from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ftlab.models import attention as module
from ftlab.models.attention import Documents, attention, make_buckets

LENGTHS = {
    "ragged": [5, 1, 12, 3, 3, 7, 1],
    "one": [32],
    "equal": [8, 8, 8, 8],
    "singles": [1] * 32,
    "long and short": [29, 1, 1, 1],
}


def qkv(rows: int, columns: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, columns, count, 8, generator=generator).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Softmax written out, one document after the other."""
    heads = q.shape[2] // k.shape[2]
    shape = q.shape
    q, k, v = q.flatten(0, 1), k.flatten(0, 1).repeat_interleave(heads, 1), v.flatten(0, 1).repeat_interleave(heads, 1)
    outputs = []
    for start, length in zip(itertools.accumulate([0, *lengths[:-1]]), lengths, strict=True):
        part = slice(start, start + length)
        scores = torch.einsum("thd,shd->hts", q[part], k[part]) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        outputs.append(torch.einsum("hts,shd->thd", scores.softmax(-1), v[part]))
    return torch.cat(outputs).view(shape)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_documents_equal_one_softmax_per_document(lengths: list[int], kv_heads: int) -> None:
    q, k, v = qkv(2, 16, kv_heads=kv_heads)
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    out = attention(q, k, v, documents=Documents.from_lengths(lengths))
    expected = reference(q, k, v, lengths)
    torch.testing.assert_close(out, expected)
    gradients = torch.autograd.grad(out, (q, k, v), upstream)
    for got, want in zip(gradients, torch.autograd.grad(expected, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(got, want)


def test_gradient_against_finite_differences() -> None:
    q, k, v = (x.detach().double().requires_grad_() for x in qkv(1, 9, heads=2, kv_heads=1))
    documents = Documents.from_lengths([2, 4, 1, 2])
    assert len(documents.buckets) > 1
    torch.autograd.gradcheck(lambda *x: attention(*x, documents=documents), (q, k, v))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast: bool) -> None:
    lengths = LENGTHS["ragged"]
    inputs = qkv(2, 16, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = attention(inputs[0], inputs[1], inputs[2], documents=Documents.from_lengths(lengths))
    assert out.dtype == torch.bfloat16
    expected = reference(*(x.float() for x in inputs), lengths)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    out.float().square().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == x.dtype and x.grad.isfinite().all() for x in inputs)


def test_padding_never_takes_more_than_a_quarter_of_a_bucket() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 200, (int(torch.randint(1, 40, (), generator=generator)),), generator=generator)
        documents = Documents.from_lengths(lengths.tolist())
        descending = sorted(lengths.tolist(), reverse=True)
        assert sum(bucket.count for bucket in documents.buckets) == len(lengths)
        for bucket in documents.buckets:
            members, descending = descending[: bucket.count], descending[bucket.count :]
            assert members[0] == bucket.longest
            assert sum(members) >= 0.75 * bucket.count * bucket.longest
    assert [(b.count, b.longest) for b in make_buckets([100, 100, 100, 60, 10, 9])] == [(4, 100), (2, 10)]


def test_no_mask_is_built_for_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        calls.append((q.shape[0], q.shape[2], options))
        return real(q, k, v, **options)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", spy)
    documents = Documents.from_lengths(LENGTHS["ragged"])
    with torch.no_grad():
        attention(*qkv(2, 16), documents=documents)
    assert [(count, longest) for count, longest, _ in calls] == [(b.count, b.longest) for b in documents.buckets]
    assert all(options["attn_mask"] is None and options["is_causal"] for _, _, options in calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 2, 17, 128, 129])
def test_short_documents_when_training_on_a_cpu_equal_the_fused_kernel(T: int, dtype: torch.dtype) -> None:
    """Error against fp64 at most twice the fused kernel's own, for the output and every gradient."""
    generator = torch.Generator().manual_seed(T)
    inputs = [torch.randn(3, T, heads, 8, generator=generator).to(dtype) for heads in (4, 2, 2)]
    upstream = torch.randn(3, T, 4, 8, generator=generator).to(dtype)

    def results(kind: torch.dtype, fused: bool) -> list[Tensor]:
        q, k, v = (x.detach().to(kind).requires_grad_() for x in inputs)
        if fused:
            args = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*args, is_causal=True, enable_gqa=True).transpose(1, 2)
        else:
            out = module.sdpa(q, k, v, causal=True)
        out.backward(upstream.to(kind))
        return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]

    exact = results(torch.float64, True)
    ours, theirs = results(dtype, False), results(dtype, True)
    for truth, mine, other in zip(exact, ours, theirs, strict=True):
        assert (mine - truth).abs().max() <= 2 * (other - truth).abs().max() + 1e-5
        assert torch.linalg.vector_norm(mine - truth) <= 1.5 * torch.linalg.vector_norm(other - truth) + 1e-5


def test_positions_count_inside_each_document() -> None:
    assert Documents.from_lengths([3, 1, 2]).position_ids.tolist() == [0, 1, 2, 0, 0, 1]


def test_moving_documents_moves_their_index_tensors_once() -> None:
    documents = Documents.from_lengths([3, 1, 2])
    assert documents.to("cpu") is documents
    moved = documents.to("meta")
    assert moved.lengths == documents.lengths
    assert moved.layout.gather.is_meta
    assert moved.to("meta") is moved


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_one_query_over_a_cache_equals_the_last_row_of_plain_attention(masked: bool, kv_heads: int) -> None:
    q, k, v = qkv(3, 6, kv_heads=kv_heads)
    mask_BS = torch.ones(3, 6, dtype=torch.bool)
    if masked:
        mask_BS[0, :4] = False
        mask_BS[2, :1] = False
    out = attention(q[:, -1:], k, v, mask_BTS=mask_BS[:, None] if masked else None)
    for row in range(3):
        real = mask_BS[row]
        alone = attention(q[row : row + 1, real], k[row : row + 1, real], v[row : row + 1, real])
        torch.testing.assert_close(out[row], alone[0, -1:])


def test_misuse_is_refused() -> None:
    q, k, v = qkv(2, 16)
    with pytest.raises(ValueError, match="hold 30 tokens but the batch holds 2 x 16"):
        attention(q, k, v, documents=Documents.from_lengths([30]))
    with pytest.raises(ValueError, match="neither a mask nor a cache"):
        attention(q[:, 8:], k, v, documents=Documents.from_lengths([16]))
    with pytest.raises(ValueError, match="explicit mask"):
        attention(q[:, 8:], k, v)
    for lengths in ([], [3, 0]):
        with pytest.raises(ValueError, match="at least one token"):
            Documents.from_lengths(lengths)
