"""The compiled C of a CPU: every function against fp64 truth, and what it promises beside its numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from ftlab_kernels import cpu, dropout, nf4
from ftlab_kernels.adapted import Adapted
from ftlab_kernels.random import draw_seed, mask_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.kernels import harness
from tests.kernels.cpu_cases import (
    CASES,
    DTYPES,
    SEED,
    adapted_of,
    attention_case,
    cross_entropy_case,
    dropout_case,
    lora_case,
    lora_tensors,
    norm_case,
    rope_case,
    swiglu_case,
)
from tests.kernels.harness import name_of, random, strided

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
every_shape = pytest.mark.parametrize("shape", list(itertools.product((1, 17, 257), (5, 37, 576))), ids=str)
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These functions are for a CPU, also where there is a GPU."""
    monkeypatch.setattr(harness, "device", lambda: torch.device("cpu"))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


# --- against fp64 truth -----------------------------------------------------------------------------------------------


@every_dtype
@every_shape
@pytest.mark.parametrize("added", [False, True], ids=["plain", "added"])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_norm(dtype: torch.dtype, shape: tuple[int, int], added: bool, trains: bool) -> None:
    norm_case(dtype, shape, added, trains).judge()


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (2, 9, 4, 2, 10), (1, 257, 3, 1, 64), (17, 2, 9, 3, 6)], ids=str)
@pytest.mark.parametrize("rows", [None, 1])
def test_rope(dtype: torch.dtype, shape: tuple[int, int, int, int, int], rows: int | None) -> None:
    rope_case(dtype, shape, rows=rows).judge()


@every_dtype
@pytest.mark.parametrize("blocks", [0, 1, 7, 130])
def test_nf4(dtype: torch.dtype, blocks: int) -> None:
    """Bit for bit: one product a number, rounded once."""
    codes = torch.arange(blocks * 32).mul(37).to(torch.uint8).view(blocks, 32)
    magnitudes = torch.exp(4 * random(blocks))
    assert torch.equal(cpu.nf4_dequantise(codes, magnitudes, dtype), nf4.reference(codes, magnitudes, dtype))
    apart = torch.stack([codes, codes], 1)[:, 0]
    assert torch.equal(cpu.nf4_dequantise(apart, magnitudes, dtype), nf4.reference(codes, magnitudes, dtype))
    with pytest.raises(ValueError, match="codes must be uint8"):
        cpu.nf4_dequantise(codes, torch.ones(blocks + 1), dtype)
    with pytest.raises(ValueError, match="nf4_dequantise takes tensors of fp32, or of bf16, on a CPU, not float16"):
        cpu.nf4_dequantise(codes, magnitudes, torch.float16)


@every_dtype
@every_shape
def test_swiglu(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    swiglu_case(dtype, shape).judge()


@every_dtype
@every_shape
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_dropout(dtype: torch.dtype, shape: tuple[int, int], p: float) -> None:
    dropout_case(dtype, shape, p).judge()


@every_dtype
@every_shape
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_lora(dtype: torch.dtype, shape: tuple[int, int], p: float) -> None:
    """Several adapters of different ranks and scales, with and without a bias, everything trained."""
    lora_case(dtype, shape, p).judge()


@every_dtype
@pytest.mark.parametrize("frozen", ["Wb", "Wbx", "WbA", "WbB", "ABb", "WAB"])
def test_lora_with_parts_frozen(dtype: torch.dtype, frozen: str) -> None:
    lora_case(dtype, (17, 37), 0.1, frozen=frozen).judge()


@every_dtype
def test_lora_of_one_layer_and_of_other_dimensions(dtype: torch.dtype) -> None:
    lora_case(dtype, (3, 5, 37), 0.1, [(24, 1)]).judge()
    lora_case(dtype, (37,), 0.1, [(24, 4)]).judge()


@every_dtype
@pytest.mark.parametrize("prefix", [0, 3, 40])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("T", [1, 17, 129])
def test_attention(dtype: torch.dtype, T: int, heads: tuple[int, int], prefix: int) -> None:
    attention_case(dtype, (16 if T == 1 else 2, *heads, T, prefix, 5 if T == 17 else 16)).judge()


@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (17, 37), (257, 259), (5, 5003)], ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0, 4e3])
def test_cross_entropy(dtype: torch.dtype, shape: tuple[int, int], scale: float) -> None:
    """Of large losses the last bit is more than the harness's absolute term."""
    case = cross_entropy_case(dtype, shape, scale)
    case.judge(absolute=max(1e-6, 1.2e-7 * float(case.inputs["logits"].abs().max())))


@every_dtype
def test_logits_of_ten_thousand(dtype: torch.dtype) -> None:
    """The loss is the distance, and the gradient is 1 and -1 or nothing at all."""
    logits = torch.full((3, 40), -1e4, dtype=dtype)
    logits[0, 7] = logits[1, 7] = 1e4
    large = float(logits[0, 7])
    losses = cpu.cross_entropy_(logits, torch.tensor([7, 39, 0]), gradient=True)
    assert losses.tolist()[:2] == [0, 2 * large]
    assert float(losses[2]) == pytest.approx(math.log(40), rel=1e-6)
    assert float(logits[0].abs().max()) < 1e-30
    assert (float(logits[1, 7]), float(logits[1, 39])) == (1.0, -1.0)


@every_dtype
@pytest.mark.parametrize("name", [name for name in CASES if name != "cross_entropy"])
def test_strided_rows(name: str, dtype: torch.dtype) -> None:
    CASES[name](dtype, layout=strided).judge()


@every_dtype
def test_nothing_in_a_batch(dtype: torch.dtype) -> None:
    cases = [
        norm_case(dtype, (0, 37)),
        norm_case(dtype, (0, 37), added=False),
        rope_case(dtype, (0, 9, 4, 2, 10)),
        rope_case(dtype, (0, 9, 4, 2, 10), rows=1),
        rope_case(dtype, (2, 0, 4, 2, 10)),
        swiglu_case(dtype, (0, 37)),
        dropout_case(dtype, (0, 37)),
        lora_case(dtype, (0, 37)),
        lora_case(dtype, (3, 0, 37)),
        attention_case(dtype, (0, 4, 2, 9, 5, 10)),
        attention_case(dtype, (2, 4, 2, 0, 5, 10)),
        cross_entropy_case(dtype, (0, 37)),
    ]
    for case in cases:
        case.judge()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 33), st.integers(1, 70), st.floats(0.001, 0.9), st.sampled_from(DTYPES))
def test_any_shape(rows: int, width: int, p: float, dtype: torch.dtype) -> None:
    """On a few elements torch's own error may be 0 by luck, so the absolute term is a few units in the last place."""
    cases = [
        norm_case(dtype, (rows, width)),
        swiglu_case(dtype, (rows, width)),
        dropout_case(dtype, (rows, width), p),
        lora_case(dtype, (rows, width), p, [(width % 7 + 1, rows % 5 + 1)]),
        rope_case(dtype, (rows % 3 + 1, rows, 2 * (width % 3 + 1), 2, 2 * (width % 9 + 1))),
        attention_case(dtype, (1 + width % 2, 4, 2, rows, width % 11, 1 + width % 16)),
        cross_entropy_case(dtype, (rows, width)),
    ]
    with mock.patch.dict(harness.ABSOLUTE, {torch.float32: 1e-4, torch.bfloat16: 0.05}):
        for case in cases:
            case.judge()


# --- the same bits ----------------------------------------------------------------------------------------------------


class TorchOnOneThread(TorchDispatchMode):
    """Inside, torch's own operations run on one thread, whatever number the compiled C has.

    Products of torch are oneMKL's, which may split a long sum over threads: fp32 [11, 257] [257, 144] has other last
    bits with two of them on some processors.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.set_num_threads(threads)


@every_dtype
@every_case
def test_the_same_bits_in_every_run_and_with_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    cases = [CASES[name](dtype)]
    if name in ("norm", "swiglu", "dropout", "lora", "cross_entropy"):
        cases.append(CASES[name](dtype, (257, 144)))
    for case in cases:
        first = case.run()
        assert_same(case.run(), first)
        torch.set_num_threads(2)
        try:
            assert_same(case.run(), case.run())
            with TorchOnOneThread():
                assert_same(case.run(), first)
        finally:
            torch.set_num_threads(1)


@every_dtype
@every_case
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """Every dtype inside is chosen by hand, also when backward is called inside autocast."""
    case = CASES[name](dtype)
    outside = case.run()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(case.run(), outside)


@pytest.mark.parametrize("shape", [(17, 37), (3, 1), (5, 16), (257, 129)], ids=str)
@pytest.mark.parametrize("p", [1e-5, 0.1, 0.5, 0.99999])
@pytest.mark.parametrize("number", [0, -1, 2**63 - 1, -(2**63), 12345])
def test_the_mask_is_that_of_every_kernel(shape: tuple[int, int], p: float, number: int) -> None:
    seed = torch.tensor([number])
    _, bits = cpu._drop(torch.ones(shape), p, seed)
    assert torch.equal(bits, mask_bytes(seed, *shape, p))


@every_dtype
def test_dropout_rounds_as_torch_does(dtype: torch.dtype) -> None:
    x = random(64, 41, dtype=dtype, scale=3.0)
    assert torch.equal(cpu.dropout(x, 0.3, seed=SEED), dropout.reference(x, 0.3, SEED))


def test_without_a_seed_the_mask_follows_torchs_generator() -> None:
    x = torch.ones(9, 40)
    layers = adapted_of(lora_tensors(40))
    for call in (lambda: cpu.dropout(x, 0.5), lambda: cpu.lora_linears(x, layers, p=0.5)[0]):
        torch.manual_seed(3)
        first, second = call(), call()
        torch.manual_seed(3)
        assert torch.equal(call(), first)
        assert not torch.equal(first, second)
    torch.manual_seed(3)
    seed = draw_seed(x.device)
    torch.manual_seed(3)
    assert torch.equal(cpu.dropout(x, 0.5), cpu.dropout(x, 0.5, seed=seed))


@every_dtype
def test_gradients_under_activation_checkpointing(dtype: torch.dtype) -> None:
    """A block of all functions, with dropout whose mask has to be drawn again."""
    tensors = lora_tensors(36, [(36, 3), (36, 4)], dtype)
    cos, sin = random(1, 7, 1, 3, seed=8).cos(), random(1, 7, 1, 3, seed=8).sin()
    norm_weight = random(36, seed=9)

    def block(x: Tensor, *values: Tensor) -> Tensor:
        normed, x = cpu.add_rms_norm(x, x, values[-1], 1e-5)
        first, second = cpu.lora_linears(normed, adapted_of(dict(zip(tensors, values, strict=False))), p=0.3)
        q, k = cpu.rope(first.view(2, 7, 6, 6), second.view(2, 7, 6, 6), cos, sin)
        mixed = cpu.causal_attention(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2))
        mixed = cpu.dropout(mixed.transpose(1, 2).reshape(2, 7, 36), 0.2)
        return cpu.swiglu(cpu.rms_norm(x, values[-1], 1e-5), mixed)

    def gradients(checkpointed: bool) -> tuple[dict[str, Tensor], Tensor]:
        leaves = [t.clone().requires_grad_() for t in (random(2, 7, 36, dtype=dtype), *tensors.values(), norm_weight)]
        torch.manual_seed(5)
        out = checkpoint(block, *leaves, use_reentrant=False) if checkpointed else block(*leaves)
        out.backward(random(2, 7, 36, dtype=dtype, seed=6))
        return {str(i): leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}, torch.get_rng_state()

    plain, state = gradients(False)
    again, state_again = gradients(True)
    assert len(plain) == len(tensors) + 2
    assert_same(again, plain)
    assert torch.equal(state, state_again)


# --- what is kept, and what is refused --------------------------------------------------------------------------------


def kept_bytes(function: Callable[[], Any], known: list[Tensor]) -> int:
    """Bytes of all storages that autograd keeps, without those of `known`."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function()
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del outputs
    return sum(storages.values())


@every_dtype
def test_lora_keeps_the_mask_and_the_low_product(dtype: torch.dtype) -> None:
    """Beyond x and the weights: one bit an element of x, and at most 4 bytes a row and rank."""
    M, K = 257, 576
    x = random(M, K, dtype=dtype).requires_grad_()
    tensors = lora_tensors(K, dtype=dtype)
    known = [x, *(tensor.requires_grad_() for tensor in tensors.values())]
    ranks = sum(len(tensor) for name, tensor in tensors.items() if name[0] == "A")
    cast = sum(tensor.numel() * x.element_size() for name, tensor in tensors.items() if name[0] in "AB")
    found = kept_bytes(lambda: cpu.lora_linears(x, adapted_of(tensors), p=0.1), known)
    assert M * K // 8 < found <= M * K // 8 + 4 * M * ranks + cast
    found = kept_bytes(lambda: cpu.lora_linears(x, adapted_of(tensors), p=0.1, training=False), known)
    assert found <= 4 * M * ranks + cast


@every_dtype
def test_the_others_keep_their_inputs(dtype: torch.dtype) -> None:
    x, y = (random(64, 48, dtype=dtype, seed=i).requires_grad_() for i in range(2))
    weight = random(48).requires_grad_()
    assert kept_bytes(lambda: cpu.rms_norm(x, weight, 1e-5), [x, weight]) == 64 * 4
    normed: list[Tensor] = []
    add = lambda: normed.extend(cpu.add_rms_norm(x, y, weight, 1e-5))  # noqa: E731
    assert kept_bytes(add, [weight]) == 64 * 4 + x.numel() * x.element_size()  # the sum, which is an output
    assert kept_bytes(lambda: cpu.swiglu(x, y), [x, y]) == 0
    assert kept_bytes(lambda: cpu.dropout(x, 0.5), []) == 64 * 6


@every_dtype
def test_nan_stays_in_its_row(dtype: torch.dtype) -> None:
    """Rows as wide as a model's: torch's own bf16 product of odd widths lets the next row's NaN in."""
    bad = 3

    def poisoned(name: str, shape: tuple[int, ...], inputs: tuple[str, ...]) -> None:
        case = CASES[name](dtype, shape)
        clean = case.run()
        for tensor in (case.inputs[each] for each in inputs):
            tensor[bad] = math.nan
        found = case.run()
        for key, tensor in clean.items():
            if len(tensor) != shape[0]:
                continue  # the gradient of a weight is a sum over rows
            others = torch.arange(shape[0]) != bad
            assert torch.equal(found[key][others], tensor[others]), (name, key)
        assert bool(found["out0"][bad].isnan().any()), name

    poisoned("norm", (17, 64), ("x",))
    poisoned("rope", (5, 3, 4, 2, 8), ("q", "k"))
    poisoned("swiglu", (17, 64), ("gate",))
    poisoned("dropout", (17, 64), ("x",))
    poisoned("lora", (17, 64), ("x",))
    poisoned("attention", (5, 4, 2, 9, 5, 8), ("q",))
    poisoned("cross_entropy", (17, 64), ("logits",))


@every_dtype
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_values_that_are_no_numbers_end_as_torchs_do(value: float, dtype: torch.dtype) -> None:
    x = random(2, 40, dtype=dtype)
    x[0, 5] = value
    weight, labels = torch.ones(40), torch.tensor([1, 2])
    assert bool(cpu.rms_norm(x, weight, 1e-5)[0, 5].isnan())
    assert bool(cpu.cross_entropy_(x.clone(), labels, gradient=True).isfinite()[0]) == (value == -math.inf)
    gate = cpu.swiglu(x, torch.ones_like(x))
    assert bool(gate[1].isfinite().all())
    assert not bool(gate[0, 5].isfinite())
    assert bool(gate[0, 6:].isfinite().all())


def test_what_the_library_would_misread_is_refused() -> None:
    x, weight, half = random(4, 6), torch.ones(6), random(4, 6, dtype=torch.float16)
    layer = Adapted(random(5, 6), None, random(2, 6), random(5, 2), 1.0)
    cos = torch.ones(1, 3, 1, 2)
    q = random(2, 3, 2, 4)
    for call, message in [
        (lambda: cpu.rms_norm(half, weight, 1e-5), "rms_norm takes tensors of fp32, or of bf16, .*float16 on cpu"),
        (lambda: cpu.rms_norm(x.to("meta"), weight, 1e-5), "float32 on meta"),
        (lambda: cpu.rms_norm(x, torch.ones(5), 1e-5), "shapes that do not fit"),
        (lambda: cpu.add_rms_norm(x, x.bfloat16(), weight, 1e-5), "bfloat16 on cpu and float32 on cpu"),
        (lambda: cpu.add_rms_norm(x, x[:3], weight, 1e-5), r"fit together: \(4, 6\), \(3, 6\)"),
        (lambda: cpu.swiglu(x, x[:, :5]), "shapes that do not fit"),
        (lambda: cpu.dropout(half, 0.5), "float16"),
        (lambda: cpu.dropout(x, 1.0), r"in \[0, 1\)"),
        (lambda: cpu.lora_linears(x.double(), [layer]), "float64"),
        (lambda: cpu.lora_linears(x, [layer], p=1.0), r"in \[0, 1\)"),
        (lambda: cpu.lora_linears(x, [Adapted(*vars(layer).values())], p=-0.1), r"in \[0, 1\)"),
        (lambda: cpu.rope(q, q[:, :2], cos, cos), "shapes that do not fit"),
        (lambda: cpu.rope(q, q, cos[:, :2], cos[:, :2]), "shapes that do not fit"),
        (lambda: cpu.rope(random(2, 3, 2, 5), random(2, 3, 2, 5), cos, cos), "shapes that do not fit"),
        (lambda: cpu.causal_attention(q, q[:, :, :1], q[:, :, :1]), "shapes that do not fit"),
        (lambda: cpu.causal_attention(q, q, q[:, :2]), "shapes that do not fit"),
        (lambda: cpu.cross_entropy_(x, torch.zeros(4, dtype=torch.int32), gradient=False), "shapes that do not fit"),
        (lambda: cpu.cross_entropy_(x, torch.tensor([0, 1, 2, 6]), gradient=False), r"0 to 6 are not all in \[0, 6\)"),
        (lambda: cpu.cross_entropy_(x, torch.tensor([0, 1, 2, -100]), gradient=False), "-100 to 2"),
        (lambda: cpu.cross_entropy_(x.t(), torch.zeros(6, dtype=torch.int64), gradient=True), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_nothing_to_drop_and_nothing_to_adapt() -> None:
    x = random(3, 5)
    assert cpu.dropout(x, 0.0) is x
    assert cpu.dropout(x, 0.5, training=False) is x
    state = torch.get_rng_state()
    cpu.lora_linears(x, adapted_of(lora_tensors(5)), p=0.0)
    cpu.lora_linears(x, adapted_of(lora_tensors(5)), p=0.5, training=False)
    assert torch.equal(torch.get_rng_state(), state)
