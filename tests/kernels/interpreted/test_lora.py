"""LoRA linears: outputs and gradients of every way, layouts, and the mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from ftlab_kernels import dropout, lora, lora_launch
from ftlab_kernels.adapted import Adapted
from ftlab_kernels.common import INTERPRETED, KernelUnavailableError
from ftlab_kernels.random import keep_scale, mask_bytes, unpack_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.harness import DTYPES, device, judge, name_of, random, strided

PATHS = ("cublas", "triton", "augmented")
# In fp32 sums run in another order than torch's: a few units in the last place of outputs near 8.
ABSOLUTE = {torch.float32: 4e-6, torch.float16: 1e-4, torch.bfloat16: 1e-4}


def seed(number: int = 0x1234_5678_9ABC_DEF0) -> Tensor:
    return torch.tensor([number], dtype=torch.int64, device=device())


def tensors(
    rows: int,
    columns: int,
    layers: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    dora: bool = False,
) -> dict[str, Tensor]:
    """x and, for each (features, rank), weight, lora_A, lora_B (fp32), bias, out_scale (fp32), numbered."""
    found = {"x": random(rows, columns, dtype=dtype)}
    for i, (features, rank) in enumerate(layers):
        found[f"weight{i}"] = random(features, columns, dtype=dtype, scale=columns**-0.5, seed=10 * i + 1)
        found[f"lora_A{i}"] = random(rank, columns, scale=columns**-0.5, seed=10 * i + 2)
        found[f"lora_B{i}"] = random(features, rank, scale=rank**-0.5, seed=10 * i + 3)
        if bias:
            found[f"bias{i}"] = random(features, dtype=dtype, seed=10 * i + 4)
        if dora:
            found[f"out_scale{i}"] = 1 + random(features, scale=0.3, seed=10 * i + 5)
    return found


def layers_of(named: dict[str, Tensor]) -> list[Adapted]:
    """Scales differ from layer to layer and are no powers of two."""
    return [
        Adapted(
            named[f"weight{i}"],
            named.get(f"bias{i}"),
            named[f"lora_A{i}"],
            named[f"lora_B{i}"],
            0.7 + 0.6 * i,
            named.get(f"out_scale{i}"),
        )
        for i in range(sum(name.startswith("weight") for name in named))
    ]


def on(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function of the named tensors, as `judge` calls it."""
    return lambda **named: function(named["x"], layers_of(named), **options)


def check(
    module: Any = lora,
    path: str = "cublas",
    p: float = 0.3,
    wanted: Callable[[str], bool] = lambda name: True,
    absolute: float | None = None,
    **shape: Any,
) -> None:
    shape = {"rows": 17, "columns": 37, "layers": [(20, 5)], **shape}
    named = tensors(**shape)
    ups = [
        random(shape["rows"], features, dtype=named["x"].dtype, seed=7 + i)
        for i, (features, _) in enumerate(shape["layers"])
    ]
    judge(
        on(module.lora_linears, p=p, seed=seed(), path=path),
        on(lora.reference, p=p, seed=seed()),
        named,
        ups,
        [name for name in named if wanted(name)],
        absolute=ABSOLUTE[named["x"].dtype] if absolute is None else absolute,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "shape",
    [
        {"rows": 1, "columns": 8, "layers": [(1, 1)]},
        {"rows": 17, "columns": 37, "layers": [(20, 5)], "bias": True},
        {"rows": 31, "columns": 64, "layers": [(24, 16), (8, 16), (8, 16)]},
        {"rows": 29, "columns": 131, "layers": [(19, 64), (7, 3)], "bias": True, "dora": True},
        {"rows": 13, "columns": 40, "layers": [(17, 8)], "dora": True},
    ],
    ids=lambda shape: f"{shape['rows']}x{shape['columns']}x{len(shape['layers'])}",
)
def test_outputs_and_gradients(shape: dict[str, Any], path: str, dtype: torch.dtype) -> None:
    check(path=path, dtype=dtype, **shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("path", ["cublas", "triton"])
def test_several_blocks_in_every_direction(path: str, dtype: torch.dtype) -> None:
    """All sizes odd. The blocks of fp32 are small: fewer rows are enough."""
    rows, columns, features = (97, 69, 101) if dtype == torch.float32 else (257, 133, 277)
    check(path=path, dtype=dtype, rows=rows, columns=columns, layers=[(features, 9)])


def test_more_parts_than_are_read_at_once() -> None:
    check(rows=300, columns=9, layers=[(9, 3), (9, 40)])


@pytest.mark.parametrize("path", ["cublas", "triton"])
def test_parts_of_several_blocks(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(lora_launch, "PROGRAMS", 4)
    check(path=path, dtype=torch.bfloat16, rows=300, columns=130, layers=[(260, 6), (40, 33)], dora=True)


@pytest.mark.parametrize("path", ["cublas", "triton"])
def test_whole_blocks(path: str) -> None:
    """Nothing to mask but rows: the loads without conditions."""
    check(path=path, dtype=torch.bfloat16, rows=130, columns=256, layers=[(256, 16)])


@pytest.mark.parametrize("path", PATHS)
def test_without_dropout(path: str) -> None:
    check(path=path, p=0.0, columns=48, layers=[(20, 5), (33, 70)])


@pytest.mark.parametrize("path", PATHS)
def test_nearly_everything_dropped(path: str) -> None:
    check(path=path, p=0.98, rows=40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_more_ranks_than_one_launch_takes(dtype: torch.dtype) -> None:
    """The second launch of the pass over x reads the mask that the first drew."""
    check(dtype=dtype, columns=40, layers=[(16, 150), (24, 130)])


@pytest.mark.parametrize("keep", ["x", "lora_A0", "lora_B0", "weight0", "bias0", "out_scale0"])
def test_only_one_gradient(keep: str) -> None:
    for path in ("cublas", "triton"):
        check(path=path, bias=True, dora=True, wanted=lambda name: name == keep)


def test_the_tiles_of_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_launch, "_hopper", lambda device: True)
    check(path="triton", dtype=torch.float16, rows=140, columns=270, layers=[(280, 6)])
    check(path="triton", dtype=torch.float16, bias=True, dora=True)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
    st.sampled_from([0.0, 0.1, 0.6]),
    st.sampled_from(PATHS),
    st.booleans(),
)
def test_any_shape(rows: int, columns: int, layers: list[tuple[int, int]], p: float, path: str, more: bool) -> None:
    # Of a few elements torch's own error may be 0 by luck; they are as large as 50 where there is one column.
    shape = {"rows": rows, "columns": columns, "layers": layers, "bias": more, "dora": more}
    check(path=path, p=p, absolute=3e-5, **shape)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_strided_rows_are_read_right(path: str) -> None:
    named = tensors(9, 24, [(16, 4)], bias=True)
    plain = on(lora.lora_linears, p=0.5, seed=seed(), path=path)
    apart = {name: strided(x) for name, x in named.items()}
    assert torch.equal(plain(**apart)[0], plain(**named)[0])
    ups = [strided(random(9, 16, seed=3))]
    names = list(named)
    judge(lambda **given: plain(**{n: strided(x) for n, x in given.items()}), on(lora.reference, p=0.5, seed=seed()),
          named, ups, names)  # fmt: skip


def test_transposed_inputs() -> None:
    named = tensors(24, 24, [(24, 24)])
    turned = {name: x.t() for name, x in named.items()}
    judge(on(lora.lora_linears, p=0.4, seed=seed(), path="triton"), on(lora.reference, p=0.4, seed=seed()),
          turned, [random(24, 24, seed=5).t()], list(turned))  # fmt: skip


@pytest.mark.parametrize("leading", [(), (3,), (2, 5), (2, 1, 3)], ids=str)
def test_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    named = tensors(max(torch.Size(leading).numel(), 1), 21, [(10, 3)])
    flat = lora.lora_linears(named["x"], layers_of(named), p=0.2, seed=seed())[0]
    shaped = lora.lora_linears(named["x"].view(*leading, 21), layers_of(named), p=0.2, seed=seed())[0]
    assert shaped.shape == (*leading, 10)
    assert torch.equal(shaped.reshape(-1, 10), flat)


def test_one_layer() -> None:
    named = tensors(5, 16, [(8, 2)])
    (layer,) = layers_of(named)
    one = lora.lora_linear(named["x"], layer, p=0.2, seed=seed())
    assert torch.equal(one, lora.lora_linears(named["x"], [layer], p=0.2, seed=seed())[0])


def test_no_rows() -> None:
    named = {name: x.requires_grad_() for name, x in tensors(0, 16, [(8, 2), (4, 2)], bias=True).items()}
    outputs = lora.lora_linears(named["x"], layers_of(named), p=0.5)
    assert [out.shape for out in outputs] == [(0, 8), (0, 4)]
    found = torch.autograd.grad(outputs, list(named.values()), [torch.empty_like(out) for out in outputs])
    assert all(bool((gradient == 0).all()) for gradient in found)


def test_an_unused_output() -> None:
    named = {name: x.requires_grad_() for name, x in tensors(6, 16, [(8, 2), (4, 2)]).items()}
    outputs = lora.lora_linears(named["x"], layers_of(named), p=0.5, seed=seed())
    outputs[0].sum().backward()
    assert named["lora_A0"].grad is not None
    assert torch.count_nonzero(named["lora_A0"].grad)
    assert named["lora_A1"].grad is None or not torch.count_nonzero(named["lora_A1"].grad)


# --- mask -------------------------------------------------------------------------------------------------------------


def kept_bytes(function: Callable[[], Any]) -> list[Tensor]:
    """The uint8 tensors that a call keeps for its backward pass."""
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        function()
    return [x for x in found if x.dtype == torch.uint8]


@pytest.mark.parametrize("columns", [1, 7, 8, 63, 128, 300])
@pytest.mark.parametrize("number", [0, -1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0])
def test_the_mask_is_that_of_dropout(columns: int, number: int) -> None:
    named = {name: x.requires_grad_() for name, x in tensors(2, 3 * columns, [(4, 2)]).items()}
    named = {**named, "x": named["x"].detach().view(6, columns).requires_grad_()}
    named["weight0"], named["lora_A0"] = named["weight0"][:, :columns], named["lora_A0"][:, :columns]
    for p in (0.0001, 0.25, 0.5, 0.9999):
        (ours,) = kept_bytes(lambda p=p: lora.lora_linears(named["x"], layers_of(named), p=p, seed=seed(number)))
        (theirs,) = kept_bytes(lambda p=p: dropout.dropout(named["x"], p, seed=seed(number)))
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, mask_bytes(seed(number), 6, columns, p))


def test_one_mask_for_all_layers() -> None:
    """Each adapter sees the same drop(x): with A = I, B = I and W = 0 every output is drop(x)."""
    x, eye = random(11, 16), torch.eye(16, device=device())
    layer = Adapted(torch.zeros_like(eye), None, eye, eye, 1.0)
    outputs = lora.lora_linears(x, [layer, layer, layer], p=0.4, seed=seed())
    keep = unpack_mask(mask_bytes(seed(), 11, 16, 0.4), 16)
    for out in outputs:
        torch.testing.assert_close(out, torch.where(keep, x * keep_scale(0.4), 0.0))


def test_what_is_dropped_may_be_infinite() -> None:
    keep = unpack_mask(mask_bytes(seed(), 5, 32, 0.5), 32)
    named = tensors(5, 32, [(8, 2)])
    named["weight0"] = torch.zeros_like(named["weight0"])
    full = torch.where(keep, named["x"], torch.full_like(named["x"], 3e38))
    given = lora.lora_linears(full, layers_of(named), p=0.5, seed=seed(), path="triton")[0]
    assert torch.equal(given, lora.lora_linears(named["x"], layers_of(named), p=0.5, seed=seed(), path="triton")[0])


def test_evaluation_and_seeds() -> None:
    named = tensors(6, 24, [(8, 4)])
    call = on(lora.lora_linears)
    assert torch.equal(call(**named)[0], on(lora.lora_linears, p=0.5, training=False)(**named)[0])
    torch.manual_seed(4)
    first, second = (on(lora.lora_linears, p=0.5)(**named)[0] for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(on(lora.lora_linears, p=0.5)(**named)[0], first)
    assert not torch.equal(first, second)


# --- discipline -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_twice(path: str) -> None:
    named = {
        n: x.requires_grad_() for n, x in tensors(200, 96, [(80, 9), (48, 40)], torch.bfloat16, True, True).items()
    }
    ups = [random(200, features, dtype=torch.bfloat16, seed=3) for features in (80, 48)]

    def once() -> list[Tensor]:
        outputs = lora.lora_linears(named["x"], layers_of(named), p=0.3, seed=seed(), path=path)
        return [*outputs, *torch.autograd.grad(outputs, list(named.values()), ups)]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


def test_the_reference_by_finite_differences() -> None:
    named = {n: x.double().requires_grad_() for n, x in tensors(3, 5, [(4, 2), (3, 2)], bias=True, dora=True).items()}
    names = list(named)
    function = lambda *values: lora.reference(  # noqa: E731
        dict(zip(names, values, strict=True))["x"], layers_of(dict(zip(names, values, strict=True))), p=0.3, seed=seed()
    )
    assert torch.autograd.gradcheck(function, tuple(named.values()))


def test_what_is_refused() -> None:
    named = tensors(4, 16, [(8, 2)])
    (layer,) = layers_of(named)
    with pytest.raises(ValueError, match="at least one"):
        lora.lora_linears(named["x"], [])
    with pytest.raises(ValueError, match="x has 15 columns"):
        lora.lora_linears(named["x"][:, :15], [layer])
    with pytest.raises(ValueError, match="must be fp32, fp16 or bf16"):
        lora.lora_linears(named["x"].double(), [layer])
    with pytest.raises(ValueError, match="must be floating and"):
        lora.lora_linears(named["x"], [Adapted(layer.weight, None, layer.lora_A, layer.lora_B[:, :1], 1.0)])
    with pytest.raises(ValueError, match="in \\[0, 1\\)"):
        lora.lora_linears(named["x"], [layer], p=1.0)
    with pytest.raises(ValueError, match="path must be one of"):
        lora.lora_linears(named["x"], [layer], path="fast")
    with pytest.raises((KernelUnavailableError, ValueError)):
        lora.lora_linears(named["x"].to("meta"), [layer], p=0.5)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="takes 30 GB and a GPU")
def test_more_elements_than_an_int32_counts() -> None:
    rows, columns, features = 2**20 + 3, 2056, 2064
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device=device())
    named = tensors(1, columns, [(features, 8)], torch.bfloat16)
    layers = layers_of(named)
    for path in ("cublas", "triton"):
        whole = lora.lora_linears(x, layers, path=path)[0]
        assert torch.equal(whole[-64:], lora.lora_linears(x[-64:], layers, path=path)[0])
        del whole
