"""Attention inside packed documents: the backends against an explicit mask, isolation, the mask of blocks, the choice.

Runs on a CPU as far as torch's backends do, and on a GPU with all of them. No Triton kernel of ours is in it, so it is
no matter for the interpreter.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ftlab_kernels import attention as kernel
from ftlab_kernels import common
from ftlab_kernels.common import INTERPRETED, KernelUnavailableError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.harness import DTYPES, assert_close, mutant, name_of, noticed, run

GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if GPU else "cpu")
UNCOMPILED = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

LENGTHS = (5, 1, 7, 7, 3)
LONG = (100, 28, 128, 300, 1, 43)  # tiles of 128 that hold one document, two, part of one, and a last one of 88


def tensors(
    lengths: tuple[int, ...], heads: int = 4, groups: int = 2, width: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths) + heads)

    def draw(count: int) -> Tensor:
        return torch.randn(sum(lengths), count, width, generator=generator).to(dtype).to(DEVICE)

    return {"q": draw(heads), "k": draw(groups), "v": draw(groups)}


def check(
    module: ModuleType = kernel,
    backend: str = "sdpa",
    lengths: tuple[int, ...] = LENGTHS,
    dtype: torch.dtype = torch.float32,
    *,
    groups: int = 2,
    scale: float | None = None,
    gradients: bool = True,
) -> None:
    function = functools.partial(module.packed_attention, lengths=lengths, scale=scale, backend=backend)
    compare(function, tensors(lengths, groups=groups, dtype=dtype), lengths, scale, gradients)


def compare(
    function: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    lengths: tuple[int, ...],
    scale: float | None,
    gradients: bool = True,
) -> None:
    """The bounds of `harness.judge`, but without its guarded memory, which is torch's here and confuses the compiler.

    torch's flash kernels round more than its plain products do, the gradients of grouped heads above all: in 16 bits
    they are allowed 4 times the error.
    """
    exact = functools.partial(kernel.reference, lengths=lengths, scale=scale)
    wide = {name: x.double() for name, x in inputs.items()}
    upstream = [inputs["q"].flip(0)]
    wanted = list(inputs) if gradients else []
    truth = run(exact, wide, [up.double() for up in upstream], wanted)
    eager = run(exact, inputs, upstream, wanted)
    actual = run(function, inputs, upstream, wanted)
    # Documents of one position have no error at all in the reference, so the absolute part counts.
    factor, absolute = (2.0, 4e-6) if inputs["q"].dtype == torch.float32 else (4.0, 1e-3)
    for name in truth:
        assert_close(actual[name], truth[name], eager[name], factor, absolute, name)


# --- against the explicit mask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (1, 1, 1), (6, 6, 6), (31,), (2, 2, 9, 2)], ids=str)
def test_sdpa(lengths: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    check(kernel, "sdpa", lengths, dtype, groups=groups)
    check(kernel, "sdpa", lengths, dtype, groups=groups, scale=0.7)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=8).map(tuple))
def test_sdpa_of_any_layout(lengths: tuple[int, ...]) -> None:
    check(kernel, "sdpa", lengths)


@UNCOMPILED
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("lengths", "scale"), [(LENGTHS, None), (LONG, 0.3), ((128, 128), None)], ids=str)
def test_flex(lengths: tuple[int, ...], scale: float | None, dtype: torch.dtype) -> None:
    """Forward only on a CPU: torch has no backward there."""
    check(kernel, "flex", lengths, dtype, scale=scale, gradients=GPU)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=name_of)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=str)
def test_varlen(lengths: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    check(kernel, "varlen", lengths, dtype, groups=groups)
    check(kernel, "varlen", lengths, dtype, groups=groups, scale=0.7)


def test_rows_and_boundaries_are_other_ways_to_say_the_same() -> None:
    inputs = tensors((5, 7, 4))
    wanted = kernel.packed_attention(**inputs, lengths=(5, 7, 4), backend="sdpa")
    rows = {name: x.view(2, 8, *x.shape[1:]) for name, x in inputs.items()}
    found = kernel.packed_attention(**rows, lengths=[5, 7, 4], backend="sdpa")
    assert torch.equal(found, wanted.view(2, 8, *wanted.shape[1:]))
    bounds = torch.tensor([0, 5, 12, 16], dtype=torch.int32, device=DEVICE)
    assert torch.equal(kernel.packed_attention(**inputs, lengths=bounds, backend="sdpa"), wanted)
    assert torch.allclose(kernel.reference(**rows, lengths=bounds).view_as(wanted), wanted, atol=1e-5)


def test_parts_of_one_tensor() -> None:
    inputs = tensors(LENGTHS)
    fused = torch.cat(list(inputs.values()), 1)
    q, k, v = fused.split([4, 2, 2], 1)
    wanted = kernel.packed_attention(**inputs, lengths=LENGTHS, backend="sdpa")
    assert torch.allclose(kernel.packed_attention(q, k, v, LENGTHS, backend="sdpa"), wanted, atol=1e-6)
    odd = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs.items()}
    assert torch.allclose(kernel.packed_attention(**odd, lengths=LENGTHS, backend="sdpa"), wanted, atol=1e-6)


def test_no_document_at_all() -> None:
    inputs = {name: x[:0].requires_grad_() for name, x in tensors(LENGTHS).items()}
    out = kernel.packed_attention(**inputs, lengths=())
    assert out.shape == (0, 4, 16)
    out.sum().backward()


def test_the_reference_has_the_gradient_of_finite_differences() -> None:
    leaves = [x.double().cpu().requires_grad_() for x in tensors((2, 3), width=3).values()]
    assert torch.autograd.gradcheck(lambda q, k, v: kernel.reference(q, k, v, (2, 3)), leaves)


def test_the_reference_is_each_document_alone() -> None:
    inputs = {name: x.double() for name, x in tensors((3, 5)).items()}
    found = kernel.reference(**inputs, lengths=(3, 5))
    for part in (slice(0, 3), slice(3, 8)):
        q, k, v = (x[part].transpose(0, 1) for x in inputs.values())
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        alone = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert torch.allclose(found[part], alone.transpose(0, 1))


# --- isolation --------------------------------------------------------------------------------------------------------


def outcome(backend: str, lengths: tuple[int, ...], inputs: dict[str, Tensor], gradients: bool) -> list[Tensor]:
    """The output and the gradients of everything, under an upstream gradient of ones."""
    leaves = {name: x.detach().clone().requires_grad_(gradients) for name, x in inputs.items()}
    out = kernel.packed_attention(**leaves, lengths=lengths, backend=backend)
    found = [out.detach()]
    if gradients:
        found += torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    return found


def others(lengths: tuple[int, ...], document: int) -> Tensor:
    """True at the positions of all documents but one."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)) != document


@UNCOMPILED
@pytest.mark.parametrize("backend", kernel.BACKENDS)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_finite_values_never_reach_another_document(backend: str, name: str) -> None:
    if backend == "varlen" and not GPU:
        pytest.skip("needs a GPU")
    dtype = torch.bfloat16 if backend == "varlen" else torch.float32
    inputs = tensors(LENGTHS, dtype=dtype)
    before = outcome(backend, LENGTHS, inputs, backend != "flex" or GPU)
    rest = others(LENGTHS, 2).to(DEVICE)
    inputs[name] = torch.where(rest[:, None, None], inputs[name], inputs[name] * 7 + 1)
    after = outcome(backend, LENGTHS, inputs, backend != "flex" or GPU)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[rest], old[rest])
    assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("backend", ["sdpa", pytest.param("varlen", marks=needs_gpu)])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_stays_in_its_document(backend: str, name: str) -> None:
    inputs = tensors(LENGTHS, dtype=torch.bfloat16 if backend == "varlen" else torch.float32)
    before = outcome(backend, LENGTHS, inputs, gradients=True)
    rest = others(LENGTHS, 2).to(DEVICE)
    inputs[name][~rest] = torch.nan
    after = outcome(backend, LENGTHS, inputs, gradients=True)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[rest], old[rest])
    if name == "v":  # torch's CPU kernel makes zeros of a row whose scores are all NaN
        assert bool(torch.isnan(after[0][~rest]).all())


@UNCOMPILED
def test_nan_does_spread_with_flex() -> None:
    """What the module says of it. If this fails, torch has become better, and the module may say so."""
    inputs = tensors(LONG)
    inputs["v"][130] = torch.nan  # in the document of positions 128 .. 255, which has tile 1 to itself
    inputs["v"][520] = torch.nan  # in that of 256 .. 555, whose last tile is 512 .. 599
    found = torch.isnan(kernel.packed_attention(**inputs, lengths=LONG, backend="flex")).flatten(1).any(1)
    assert bool(found[556:].all()), "the documents after 555 are in the same tile"
    assert bool(found[:128].any()) == (not GPU), "the whole of it without tiles"


@needs_gpu
@pytest.mark.parametrize("backend", kernel.BACKENDS)
def test_equal_bits_from_run_to_run(backend: str) -> None:
    inputs = tensors(LONG, dtype=torch.bfloat16, width=64)
    torch.use_deterministic_algorithms(backend != "flex")
    try:
        first, second = (outcome(backend, LONG, inputs, gradients=True) for _ in "12")
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(old, new) for old, new in zip(first, second, strict=True))


def test_a_document_is_what_it_is_alone() -> None:
    inputs = tensors(LENGTHS)
    whole = outcome("sdpa", LENGTHS, inputs, gradients=True)
    alone = outcome("sdpa", (7,), {name: x[6:13] for name, x in inputs.items()}, gradients=True)
    batched = outcome("sdpa", (7, 7), {name: x[6:20] for name, x in inputs.items()}, gradients=True)
    for packed, single, pair in zip(whole, alone, batched, strict=True):
        assert torch.equal(packed[6:13], single)
        assert torch.equal(packed[6:20], pair)


# --- the mask of blocks -----------------------------------------------------------------------------------------------

layouts = st.lists(st.sampled_from((1, 3, 50, 127, 128, 129, 200, 256, 300)), min_size=1, max_size=6).map(tuple)


def filled(counts: Tensor, indices: Tensor) -> Tensor:
    """bool [query blocks, key blocks] of counts and indices."""
    dense = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row in range(len(dense)):
        dense[row, indices[0, 0, row, : int(counts[0, 0, row])].long()] = True
    return dense


def same_blocks(module: ModuleType, lengths: tuple[int, ...]) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    ours = module.block_mask(lengths, torch.device("cpu"))
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))

    def plain(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document[q] == document[k])

    theirs = create_block_mask(plain, None, None, len(document), len(document), device="cpu")
    assert ours.shape == theirs.shape
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for kind in ("kv", "full_kv", "q", "full_q"):
        pair = [filled(getattr(x, f"{kind}_num_blocks"), getattr(x, f"{kind}_indices")) for x in (ours, theirs)]
        assert torch.equal(*pair), kind
    position = torch.arange(len(document))
    grid = (torch.tensor(0), torch.tensor(0), position[:, None], position[None, :])
    assert torch.equal(ours.mask_mod(*grid), plain(*grid))


@settings(max_examples=25, deadline=None)
@given(layouts)
def test_the_blocks_are_those_that_torch_finds_by_trying(lengths: tuple[int, ...]) -> None:
    same_blocks(kernel, lengths)


def test_layouts_are_kept() -> None:
    kernel.block_mask.cache_clear()
    device = torch.device("cpu")
    first = kernel.block_mask((3, 4), device)
    assert kernel.block_mask((3, 4), device) is first
    assert kernel.block_mask((4, 3), device) is not first
    for size in range(1, kernel.LAYOUTS + 2):
        kernel.block_mask((size,), device)
    assert kernel.block_mask((3, 4), device) is not first, "only the last ones are kept"
    assert kernel._bounds((3, 4), device) is kernel._bounds((3, 4), device)
    assert kernel._bounds((3, 4), device).tolist() == [0, 3, 7]


def test_what_an_evaluation_keeps_can_be_trained_with() -> None:
    kernel.block_mask.cache_clear()
    kernel._bounds.cache_clear()
    device = torch.device("cpu")
    with torch.inference_mode():
        mask, bounds = kernel.block_mask((3, 4), device), kernel._bounds((3, 4), device)
    assert not bounds.is_inference()
    assert not any(x.is_inference() for x in mask.as_tuple() if isinstance(x, Tensor))


@UNCOMPILED
def test_another_layout_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """New documents of the same N find the compiled flex_attention; a new N is compiled once more, for any N."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(kernel, "_flex_function", lambda _: torch.compile(flex_attention, backend=counter))
    for lengths in ((100, 60), (20, 140), (160,), (7, 153)):
        check(kernel, "flex", lengths, gradients=False)
    assert counter.frame_count == 1
    for lengths in ((100, 61), (200, 30), (40, 40, 99), (301,)):
        check(kernel, "flex", lengths, gradients=False)
    assert counter.frame_count <= 3


@UNCOMPILED
def test_inside_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    outer, inner = CompileCounter(), CompileCounter()
    monkeypatch.setattr(kernel, "_flex_function", lambda _: torch.compile(flex_attention, backend=inner))

    @torch.compile(backend=outer)
    def model(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
        return kernel.packed_attention(q * 2, k, v, lengths, backend="flex") + 1

    for lengths in ((6, 10), (9, 7), (16,)):
        inputs = tensors(lengths)
        found = model(**inputs, lengths=lengths)
        exact = kernel.reference(inputs["q"] * 2, inputs["k"], inputs["v"], lengths) + 1
        assert torch.allclose(found, exact, atol=1e-5)
    assert inner.frame_count == 1


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device of compute capability 9.0, as far as asking goes."""
    monkeypatch.setattr(common, "INTERPRETED", False)
    monkeypatch.setattr(common, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(kernel, "_varlen_function", lambda: print)


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize(
    ("dtype", "width", "wanted"),
    [
        (torch.bfloat16, 128, "varlen"),
        (torch.float16, 64, "varlen"),
        (torch.bfloat16, 256, "flex"),
        (torch.bfloat16, 100, "flex"),
        (torch.float32, 128, "flex"),
        (torch.float32, 8, "sdpa"),
        (torch.float32, 512, "sdpa"),
        (torch.float64, 64, "sdpa"),
    ],
)
def test_the_choice_on_an_h100(dtype: torch.dtype, width: int, wanted: str) -> None:
    assert kernel.choose_backend("cuda", dtype, width) == wanted
    assert kernel.choose_backend("cpu", dtype, width) == "sdpa"


@pytest.mark.usefixtures("h100")
def test_the_choice_where_something_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_varlen_function", lambda: None)
    assert kernel.choose_backend("cuda", torch.bfloat16, 128) == "flex"
    monkeypatch.setattr(kernel, "_varlen_function", lambda: print)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert kernel.choose_backend("cuda", torch.bfloat16, 128) == "sdpa"
    monkeypatch.setattr(common, "HAS_TRITON", False)
    assert kernel.choose_backend("cuda", torch.bfloat16, 128) == "sdpa"


def test_what_was_chosen_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_taken", type(kernel._taken)())
    inputs = {name: x.cpu() for name, x in tensors(LENGTHS).items()}
    kernel.packed_attention(**inputs, lengths=LENGTHS)
    kernel.packed_attention(**inputs, lengths=LENGTHS)
    kernel.packed_attention(**inputs, lengths=LENGTHS, backend="sdpa")
    assert kernel.chosen() == {
        ("sdpa", "on cpu there is no other with gradients"): 2,
        ("sdpa", "as asked for"): 1,
    }
    kernel.chosen().clear()
    assert kernel.chosen()


# --- varlen_attn, of which a CPU has only the signature ---------------------------------------------------------------


POSITIONAL = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
OPTIONS = {"return_aux": None, "scale": None, "window_size": (-1, -1)}


def stand_in(options: dict[str, Any]) -> Callable[..., Tensor]:
    """A varlen_attn with the signature of a torch version, which does what the documentation says."""
    kind = inspect.Parameter
    parameters = [kind(name, kind.POSITIONAL_OR_KEYWORD) for name in POSITIONAL]
    parameters += [kind(name, kind.KEYWORD_ONLY, default=default) for name, default in options.items()]
    signature = inspect.Signature(parameters)

    def varlen_attn(*positional: Any, **named: Any) -> Tensor:
        bound = signature.bind(*positional, **named)
        bound.apply_defaults()
        call = bound.arguments
        bounds = call["cu_seq_q"]
        assert call["cu_seq_k"] is bounds
        assert bounds.dtype == torch.int32
        lengths = tuple(bounds.diff().tolist())
        assert call["max_q"] == call["max_k"] == max(lengths)
        assert call["window_size"] == (-1, 0), "causal"
        q, k, v = (call[name] for name in POSITIONAL[:3])
        assert call.get("enable_gqa", False) == (q.shape[1] != k.shape[1])
        return kernel.reference(q, k, v, lengths, scale=call["scale"])

    varlen_attn.__signature__ = signature  # type: ignore[attr-defined]
    return varlen_attn


older = stand_in(OPTIONS)  # torch 2.11
newer = stand_in({**OPTIONS, "enable_gqa": False, "seqused_k": None})  # torch 2.12 and later


@pytest.mark.parametrize("function", [newer, older])
@pytest.mark.parametrize("groups", [2, 4])
def test_how_varlen_is_called(function: Callable[..., Tensor], groups: int) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel._call_varlen(function, (q, k, v), LENGTHS, 0.4)

    compare(call, tensors(LENGTHS, groups=groups), LENGTHS, 0.4)


def test_torchs_varlen_attn_is_found() -> None:
    """pyproject.toml allows torch 2.11 to 2.14, all of which have it."""
    function = kernel._varlen_function()
    assert function is not None
    names = list(inspect.signature(function).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = tensors(LENGTHS).values()
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("23 in all", lambda: kernel.packed_attention(q, k, v, (5, 1))),
        ("23 in all", lambda: kernel.packed_attention(q, k, v, (0, 23))),
        ("23 in all", lambda: kernel.packed_attention(q, k, v, (-1, 24))),
        ("23 in all", lambda: kernel.reference(q, k, v, ())),
        ("begin with 0", lambda: kernel.packed_attention(q, k, v, torch.tensor([1, 23]))),
        ("begin with 0", lambda: kernel.packed_attention(q, k, v, torch.tensor([], dtype=torch.int32))),
        ("k and v \\[N, K, E\\]", lambda: kernel.packed_attention(q, k[:-1], v[:-1], LENGTHS)),
        ("k and v \\[N, K, E\\]", lambda: kernel.packed_attention(q, k, v[:, :1], LENGTHS)),
        ("k and v \\[N, K, E\\]", lambda: kernel.packed_attention(q, k[..., :8], v[..., :8], LENGTHS)),
        ("k and v \\[N, K, E\\]", lambda: kernel.packed_attention(q[0], k[0], v[0], (4,))),
        ("evenly", lambda: kernel.packed_attention(q[:, :3], k, v, LENGTHS)),
        ("one dtype", lambda: kernel.packed_attention(q, k.half(), v.half(), LENGTHS)),
        ("must be one of", lambda: kernel.packed_attention(q, k, v, LENGTHS, backend="flash")),
    ]
    for message, attempt in wrong:
        with pytest.raises(ValueError, match=message):
            attempt()


@pytest.mark.skipif(GPU, reason="they can there")
def test_a_backend_that_cannot_run_here_says_so() -> None:
    q, k, v = tensors(LENGTHS, dtype=torch.bfloat16).values()
    with pytest.raises(KernelUnavailableError, match="CUDA GPU"):
        kernel.packed_attention(q, k, v, LENGTHS, backend="varlen")
    with pytest.raises(KernelUnavailableError, match="no gradients on cpu"):
        kernel.packed_attention(q.requires_grad_(), k, v, LENGTHS, backend="flex")


# --- broken variants --------------------------------------------------------------------------------------------------


def broad(module: ModuleType) -> None:
    check(module)
    check(module, scale=0.7)
    check(module, lengths=(4, 4, 4, 2), groups=4)
    same_blocks(module, LONG)
    same_blocks(module, (200, 100))
    same_blocks(module, (300,))
    inputs = tensors(LENGTHS)
    for function in (newer, older):
        found = module._call_varlen(function, tuple(inputs.values()), LENGTHS, 0.4)
        assert torch.allclose(found, kernel.reference(**inputs, lengths=LENGTHS, scale=0.4), atol=1e-5)


MUTATIONS = {
    "not causal": ("is_causal=True", "is_causal=False"),
    "scale ignored": ("queries, keys, values, is_causal=True, scale=scale", "queries, keys, values, is_causal=True"),
    "documents run together": ("count = len(list(run))", "count, length = 1, length * len(list(run))"),
    "starts at the document before": ("start += count * length", "start += length"),
    "rows mixed": ("out.transpose(1, 2).flatten(0, 1)", "out.flatten(0, 1).transpose(0, 1).reshape(-1, *q.shape[1:])"),
    "varlen not causal": ('"window_size": (-1, 0)', '"window_size": (-1, -1)'),
    "boundaries without 0": ("[0, *itertools.accumulate(lengths)]", "[*itertools.accumulate(lengths), 0]"),
    "grouped heads by turns": (
        "repeat_interleave(q.shape[1] // x.shape[1], 1)",
        "repeat(1, q.shape[1] // x.shape[1], 1)",
    ),
    "grouped heads not said": ('options["enable_gqa"] = True', 'options["enable_gqa"] = False'),
    "mask of all before": ("(key <= query) & (key >= first_of[query])", "key <= query"),
    "mask of what comes after": ("(key <= query) &", "(key <= query + 1) &"),
    "no diagonal": ("| (block[:, None] == block)", ""),
    "every block before": ("below & (last[None, :] == first[:, None])", "below"),
    "full across documents": ("& (first == last)", ""),
    "full at the end": ("whole = (begins + BLOCK <= total) & (first == last)", "whole = first == last"),
    "full blocks twice": ("_ordered(some & ~full)", "_ordered(some)"),
}


@pytest.mark.parametrize(("old", "new"), MUTATIONS.values(), ids=MUTATIONS.keys())
def test_a_broken_variant_is_noticed(old: str, new: str, tmp_path: Path) -> None:
    broken = mutant(kernel, tmp_path, old, new)
    assert noticed(lambda: broad(broken))


def test_the_unbroken_one_passes() -> None:
    broad(kernel)
