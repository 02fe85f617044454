from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ftlab_kernels.native import why_not_native
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ftlab.errors import FtlabError
from ftlab.losses.cross_entropy import supervised_cross_entropy
from ftlab.operators import TORCH, select
from ftlab.operators import linear_cross_entropy as module
from ftlab.operators.linear_cross_entropy import linear_cross_entropy, reference_cross_entropy
from tests.helpers.models import random_ids, tiny_llama


def problem(
    N: int = 37, V: int = 101, D: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def value_and_gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    # An upstream factor other than 1, as the division by the number of tokens makes it.
    return [loss.detach(), *torch.autograd.grad(loss * 0.37, inputs)]


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("block_elements", [1, 300, 1 << 20])
def test_equals_the_reference(chunk: int, block_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", block_elements)
    hidden, weight, labels = problem()
    ours = value_and_gradients(linear_cross_entropy(hidden, weight, labels, chunk), hidden, weight)
    theirs = value_and_gradients(reference_cross_entropy(hidden, weight, labels), hidden, weight)
    torch.testing.assert_close(ours, theirs)


def test_gradients_by_finite_differences() -> None:
    hidden, weight, labels = problem(N=5, V=7, D=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 2), (hidden, weight))


@pytest.mark.parametrize(("hidden_trains", "weight_trains"), [(True, False), (False, True), (False, False)])
def test_only_what_trains_gets_a_gradient(hidden_trains: bool, weight_trains: bool) -> None:
    hidden, weight, labels = problem()
    hidden.requires_grad_(hidden_trains)
    weight.requires_grad_(weight_trains)
    loss = linear_cross_entropy(hidden, weight, labels, 8)
    assert loss.requires_grad == (hidden_trains or weight_trains)
    if loss.requires_grad:
        loss.backward()
    assert (hidden.grad is not None) == hidden_trains
    assert (weight.grad is not None) == weight_trains
    assert torch.equal(loss, linear_cross_entropy(hidden.detach(), weight.detach(), labels, 8))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_no_worse_than_eager(weight_dtype: torch.dtype) -> None:
    """Error against fp64 at most twice that of full bf16 logits followed by an fp32 cross entropy."""
    hidden, weight, labels = problem(N=64, V=500, D=64)
    weight = (weight.detach() / 8).to(weight_dtype).requires_grad_()
    exact_inputs = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    exact = value_and_gradients(reference_cross_entropy(*exact_inputs, labels), *exact_inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = value_and_gradients(linear_cross_entropy(hidden, weight, labels, 16), hidden, weight)
        eager = value_and_gradients(reference_cross_entropy(hidden, weight, labels), hidden, weight)
    assert ours[0].dtype == torch.float32
    assert [t.dtype for t in ours] == [t.dtype for t in eager]
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert (mine - truth).norm() <= 2 * (theirs - truth).norm() + 1e-6 * truth.norm()


def test_confident_and_hopeless_predictions() -> None:
    """p close to 1, where p - 1 cancels, and p that underflows in fp32."""
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[200.0], [-200.0], [180.0]], requires_grad=True)
    labels = torch.tensor([0, 1])
    ours = value_and_gradients(linear_cross_entropy(hidden, weight, labels, 1), hidden, weight)
    assert ours[0] == 400.0
    torch.testing.assert_close(
        ours, value_and_gradients(reference_cross_entropy(hidden, weight, labels), hidden, weight)
    )


def batch_of(labels: Tensor) -> SimpleNamespace:
    ids = random_ids(*labels.shape, seed=3)
    positions = torch.arange(labels.shape[1]).expand_as(labels)
    return SimpleNamespace(input_ids=ids, labels=labels, position_ids=positions, documents=None)


@pytest.mark.parametrize("tied", [True, False])
def test_on_a_model_it_equals_all_logits(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    labels = random_ids(2, 9, seed=5)
    labels[0, :5] = -100
    batch = batch_of(labels)
    names = [name for name, _ in model.named_parameters()]
    inputs = list(model.parameters())
    ours = value_and_gradients(supervised_cross_entropy(model, batch, 4), *inputs)
    logits = model(batch.input_ids)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum")
    for name, mine, theirs in zip(["loss", *names], ours, value_and_gradients(loss, *inputs), strict=True):
        torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("tied", [True, False])
def test_no_label_gives_zero_gradients_everywhere(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    loss = supervised_cross_entropy(model, batch_of(torch.full((2, 6), -100)), 4)
    assert loss == 0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_deterministic_algorithms() -> None:
    hidden, weight, labels = problem()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            value_and_gradients(linear_cross_entropy(hidden, weight, labels, 8), hidden, weight) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class LargestTensor(TorchDispatchMode):
    """The most elements that the result of any operation holds."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize(("dtype", "trains"), [*itertools.product([torch.float32, torch.bfloat16], [False, True])])
def test_no_tensor_is_as_large_as_all_logits(dtype: torch.dtype, trains: bool) -> None:
    N, V, D, chunk = 128, 1000, 16, 16
    hidden, weight, labels = problem(N, V, D)
    weight.requires_grad_(trains)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        with LargestTensor() as ours:
            linear_cross_entropy(hidden, weight, labels, chunk).backward()
        with LargestTensor() as eager:
            reference_cross_entropy(hidden, weight, labels).backward()
    assert ours.elements <= chunk * V
    assert eager.elements == N * V  # the measure does see full logits


def test_chunk_must_be_positive() -> None:
    with pytest.raises(ValueError, match="chunk"):
        linear_cross_entropy(*problem(), chunk=0)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_is_torchs(smoothing: float, native: bool) -> None:
    operators, line = select("auto", torch.device("cpu")) if native else (TORCH, "")
    if native and operators.path != "native":
        pytest.skip(line)
    hidden, weight, labels = problem()
    logits = F.linear(hidden, weight)
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    reference = value_and_gradients(expected, hidden, weight)
    loss = operators.linear_cross_entropy(hidden, weight, labels, 8, smoothing)
    for ours, theirs in zip(value_and_gradients(loss, hidden, weight), reference, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    if native:
        way = "torch, for label smoothing" if smoothing else "native"
        assert {path for name, path in operators.taken if name == "linear_cross_entropy"} == {way}


def test_no_label_smoothing_is_bitwise_the_plain_loss() -> None:
    hidden, weight, labels = problem()
    plain = value_and_gradients(linear_cross_entropy(hidden, weight, labels, 8), hidden, weight)
    zero = value_and_gradients(linear_cross_entropy(hidden, weight, labels, 8, 0.0), hidden, weight)
    assert all(torch.equal(one, other) for one, other in zip(plain, zero, strict=True))


def test_required_native_kernels_refuse_label_smoothing() -> None:
    if why_not_native() is not None:
        pytest.skip(why_not_native() or "")
    operators, _ = select("native", torch.device("cpu"))
    with pytest.raises(FtlabError, match="no C for label smoothing"):
        operators.linear_cross_entropy(*problem(), 8, 0.1)
