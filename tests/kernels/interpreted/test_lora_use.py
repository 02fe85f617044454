"""LoRA linears in use: what they keep, checkpointing, autocast, buffers with room, and which way is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ftlab_kernels import lora, lora_plan
from ftlab_kernels.adapted import Adapted
from ftlab_kernels.common import INTERPRETED
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.harness import device, random
from tests.kernels.interpreted.test_lora import layers_of, seed, tensors


@pytest.fixture(autouse=True)
def _own_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choices of one test are unknown to the next, and to the user."""
    monkeypatch.setenv(lora_plan.CACHE_VARIABLE, str(tmp_path / "kernels"))
    monkeypatch.delenv(lora_plan.PATH_VARIABLE, raising=False)
    lora_plan.forget()


def trained(named: dict[str, Tensor], *frozen: str) -> dict[str, Tensor]:
    return {name: x.detach().requires_grad_(not name.startswith(frozen)) for name, x in named.items()}


# --- memory -----------------------------------------------------------------------------------------------------------


def kept_beyond_inputs(named: dict[str, Tensor], **options: Any) -> int:
    """Bytes of the tensors that a call keeps for its backward pass and that are none of its inputs."""
    inputs = {x.untyped_storage().data_ptr() for x in named.values()}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        outputs = lora.lora_linears(named["x"], layers_of(named), **options)
    del outputs
    return sum(kept.values())


@pytest.mark.parametrize("path", ["cublas", "triton"])
@pytest.mark.parametrize("layers", [[(40, 8)], [(40, 16), (24, 16), (24, 16)]], ids=len)
def test_only_the_mask_and_s_are_kept(layers: list[tuple[int, int]], path: str) -> None:
    """M K / 8 + 4 M r bytes at most (KERNELS G2), in 16 bits a half of the last; nothing of M K or M N elements."""
    rows, columns, ranks = 33, 64, sum(rank for _, rank in layers)
    named = trained(tensors(rows, columns, layers, torch.bfloat16), "weight")
    expected = 2 * rows * ranks
    assert kept_beyond_inputs(named, p=0.0, path=path) == expected
    assert kept_beyond_inputs(named, p=0.1, path=path) == expected + rows * columns // 8
    assert expected + rows * columns // 8 <= rows * columns // 8 + 4 * rows * ranks


def test_a_frozen_out_scale_keeps_no_more() -> None:
    named = trained(tensors(33, 64, [(40, 8)], torch.bfloat16, dora=True), "weight", "out_scale")
    assert kept_beyond_inputs(named, p=0.1) == 2 * 33 * 8 + 33 * 8
    named = trained(tensors(33, 64, [(40, 8)], torch.bfloat16, dora=True), "weight")
    assert kept_beyond_inputs(named, p=0.1) == 2 * 33 * 8 + 33 * 8 + 2 * 33 * 40


# --- checkpointing and autocast ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("path", ["cublas", "triton", "augmented"])
def test_checkpointing_changes_no_bit(path: str, reentrant: bool) -> None:
    named = trained(tensors(19, 40, [(24, 4), (16, 4)]), "weight")
    leaves = [x for x in named.values() if x.requires_grad]
    ups = [random(19, features, seed=2) for features in (24, 16)]

    def block(x: Tensor) -> tuple[Tensor, ...]:
        torch.rand(3, device=x.device)  # another operation that moves the generator
        return lora.lora_linears(x, layers_of({**named, "x": x}), p=0.3, path=path)

    def gradients(around: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        torch.manual_seed(11)
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(around(named["x"]), ups)
        after = torch.rand(2, device=device())  # the generator stands where it stood without checkpointing
        return [*(leaf.grad for leaf in leaves if leaf.grad is not None), after]

    plain = gradients(block)
    again = gradients(lambda x: checkpoint(block, x, use_reentrant=reentrant))
    assert len(plain) == len(leaves) + 1
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_computes_in_its_dtype(inside: bool) -> None:
    """x in fp32 is cast, outputs are bf16, gradients have the dtype of what they belong to; backward inside or not."""
    named = trained(tensors(9, 24, [(16, 4)], bias=True, dora=True))
    up = random(9, 16, dtype=torch.bfloat16, seed=2)
    with torch.autocast(device().type, dtype=torch.bfloat16):
        (out,) = lora.lora_linears(named["x"], layers_of(named), p=0.2, seed=seed())
        if inside:
            found = torch.autograd.grad(out, list(named.values()), up)
    if not inside:
        found = torch.autograd.grad(out, list(named.values()), up)
    assert out.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in found] == [x.dtype for x in named.values()]
    x = named["x"].detach().bfloat16().requires_grad_()
    (by_hand,) = lora.lora_linears(x, layers_of(named), p=0.2, seed=seed())
    assert torch.equal(out, by_hand)
    leaves = [x, *list(named.values())[1:]]
    for ours, theirs in zip(found, torch.autograd.grad(by_hand, leaves, up), strict=True):
        assert torch.equal(ours, theirs.to(ours.dtype))


# --- buffers with room ------------------------------------------------------------------------------------------------


def augmented(named: dict[str, Tensor], x_has_room: bool) -> tuple[dict[str, Tensor], lora.Augmented]:
    """The named tensors with weights, and x where wanted, in buffers with room."""
    layers = layers_of(named)
    ranks = [len(layer.lora_A) for layer in layers]
    held = [lora.AugmentedWeight(layer.weight, sum(ranks), sum(ranks[:i])) for i, layer in enumerate(layers)]
    moved = {**named, **{f"weight{i}": each.weight for i, each in enumerate(held)}}
    if x_has_room:
        moved["x"] = lora.room_for(named["x"], sum(ranks))
        moved["x"].copy_(named["x"])
    return moved, lora.Augmented(held, x_has_room)


@pytest.mark.parametrize("x_has_room", [False, True])
def test_buffers_with_room_give_the_same(x_has_room: bool) -> None:
    named = tensors(10, 24, [(16, 5), (8, 3)], torch.bfloat16, bias=True)
    moved, buffers = augmented(named, x_has_room)
    for p in (0.0, 0.4):
        results = []
        for tensors_, options in ((named, {"path": "augmented"}), (moved, {"augmented": buffers})):
            leaves = trained(tensors_, "weight")
            outputs = lora.lora_linears(leaves["x"], layers_of(leaves), p=p, seed=seed(), **options)
            ups = [torch.ones_like(out) for out in outputs]
            wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
            results.append([*outputs, *torch.autograd.grad(outputs, wanted, ups)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_buffers_with_room_are_not_copied() -> None:
    named = tensors(10, 24, [(16, 5), (8, 3)])
    moved, buffers = augmented(named, True)
    assert all(held.weight.untyped_storage().data_ptr() == held.buffer.data_ptr() for held in buffers.weights)
    leaves = trained(moved, "weight", "x")
    assert kept_beyond_inputs(leaves, p=0.0, augmented=buffers) == 0  # s stands in x's buffer
    assert torch.equal(moved["x"], named["x"])
    assert torch.equal(moved["weight0"], named["weight0"])


def test_a_buffer_serves_several_calls_before_the_backward_pass() -> None:
    """B's columns are written anew, which is no change of the weight that the first call keeps."""
    named, buffers = augmented(tensors(6, 24, [(16, 5)]), False)
    leaves = trained(named, "weight")
    first, second = (lora.lora_linears(leaves["x"], layers_of(leaves), augmented=buffers)[0] for _ in range(2))
    (first + second).sum().backward()
    assert leaves["lora_B0"].grad is not None


def test_buffers_that_do_not_fit_are_refused() -> None:
    named, buffers = augmented(tensors(6, 24, [(16, 5)]), False)
    with pytest.raises(ValueError, match="no room"):
        lora.lora_linears(named["x"], layers_of(named), augmented=lora.Augmented(buffers.weights, True))
    with pytest.raises(ValueError, match="of its shape"):
        lora.lora_linears(named["x"], layers_of(named), augmented=lora.Augmented([]))


# --- which way --------------------------------------------------------------------------------------------------------

DEVICE = "a GPU, triton 1, torch 2"


def product(rows: int = 5000, kind: str = "forward") -> lora_plan.Product:
    return lora_plan.Product(kind, rows, 4096, 1024, 16, torch.bfloat16, torch.device("cpu"))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretend to time: a candidate gives its own microseconds. Returns what was timed so far."""
    names: list[str] = []

    def time(candidate: Callable[[], Any], device: torch.device) -> float:
        name, microseconds = candidate()
        names.append(name)
        return float(microseconds)

    monkeypatch.setattr(lora_plan, "_can_time", lambda device: True)
    monkeypatch.setattr(lora_plan, "_time", time)
    monkeypatch.setattr(lora_plan, "_device_key", lambda device: DEVICE)
    return names


def ways(cublas: float, triton: float) -> dict[str, Callable[[], Any]]:
    return {"cublas": lambda: ("cublas", cublas), "triton": lambda: ("triton", triton)}


def test_the_faster_way_is_taken_and_remembered(timed: list[str]) -> None:
    assert lora_plan.plan(product(), ways(20, 10)) == "triton"
    assert lora_plan.plan(product(kind="input gradient"), ways(10, 20)) == "cublas"
    assert len(timed) == 4
    assert lora_plan.plan(product(8000), ways(1, 2)) == "triton"  # the same bucket of rows
    assert lora_plan.plan(product(9000), ways(1, 2)) == "cublas"  # the next
    assert len(timed) == 6
    key = "forward M<=8192 N=4096 K=1024 r=16 bfloat16"
    assert lora_plan.chosen()[key] == {
        "path": "triton",
        "from": "measured",
        "microseconds": {"cublas": 20.0, "triton": 10.0},
    }


def test_later_runs_take_the_same_way(timed: list[str]) -> None:
    lora_plan.plan(product(), ways(20, 10))
    lora_plan.plan(product(100), ways(10, 20))
    lora_plan.forget()
    assert lora_plan.plan(product(), ways(1, 2)) == "triton"
    assert lora_plan.plan(product(100), ways(2, 1)) == "cublas"
    assert len(timed) == 4
    assert {entry["from"] for entry in lora_plan.chosen().values()} == {"file"}
    assert [path.name for path in lora_plan.cache_file().parent.iterdir()] == ["lora_plan.json"]


@pytest.mark.parametrize(
    "content",
    ["", "[", "[]", "3", json.dumps({DEVICE: 3}), json.dumps({DEVICE: {product().key: {"path": "abacus"}}})],
)
def test_a_file_that_makes_no_sense_is_measured_again(content: str, timed: list[str]) -> None:
    lora_plan.cache_file().parent.mkdir(parents=True)
    lora_plan.cache_file().write_text(content, "utf-8")
    assert lora_plan.plan(product(), ways(20, 10)) == "triton"
    assert json.loads(lora_plan.cache_file().read_text("utf-8"))[DEVICE][product().key]["path"] == "triton"


def test_other_devices_and_versions_are_left_alone(timed: list[str]) -> None:
    other = {"another GPU": {product().key: {"path": "cublas", "microseconds": {}}}}
    lora_plan.cache_file().parent.mkdir(parents=True)
    lora_plan.cache_file().write_text(json.dumps(other), "utf-8")
    assert lora_plan.plan(product(), ways(20, 10)) == "triton"
    assert json.loads(lora_plan.cache_file().read_text("utf-8"))["another GPU"] == other["another GPU"]


def test_a_folder_that_cannot_be_written(timed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(lora_plan.CACHE_VARIABLE, str(tmp_path / "file" / "below"))
    assert lora_plan.plan(product(), ways(20, 10)) == "triton"


def test_a_way_that_fails_is_not_taken(timed: list[str]) -> None:
    def fail() -> None:
        raise RuntimeError("out of resource: shared memory")

    assert lora_plan.plan(product(), {**ways(20, 10), "triton": fail}) == "cublas"
    (entry,) = lora_plan.chosen().values()
    assert entry["failed"] == {"triton": "RuntimeError: out of resource: shared memory"}


def test_what_is_asked_for_is_taken(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert lora_plan.plan(product(), ways(20, 10), lora_plan.requested("cublas")) == "cublas"
    monkeypatch.setenv(lora_plan.PATH_VARIABLE, "triton")
    assert lora_plan.requested(None) == "triton"
    assert lora_plan.requested("cublas") == "cublas"
    monkeypatch.setenv(lora_plan.PATH_VARIABLE, "fast")
    with pytest.raises(ValueError, match="FTLAB_LORA_PATH must be one of"):
        lora_plan.requested(None)
    assert not timed


def test_where_nothing_can_be_timed_cublas_is_taken_and_not_remembered(
    timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As inside the capture of a CUDA graph."""
    monkeypatch.setattr(lora_plan, "_can_time", lambda device: False)
    assert lora_plan.plan(product(), ways(20, 10)) == "cublas"
    monkeypatch.setattr(lora_plan, "_can_time", lambda device: True)
    assert lora_plan.plan(product(), ways(20, 10)) == "triton"


def test_a_call_says_which_way_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    named = trained(tensors(6, 24, [(16, 5)]), "weight")
    for path in ("triton", "cublas"):
        monkeypatch.setenv(lora_plan.PATH_VARIABLE, path)
        lora.lora_linear(named["x"], layers_of(named)[0], p=0.1).sum().backward()
        found = lora.chosen()
        assert {key.partition(" M<=")[0] for key in found} == {"forward", "input gradient, masked"}
        assert {(entry["path"], entry["from"]) for entry in found.values()} == {(path, "requested")}


@pytest.mark.skipif(INTERPRETED, reason="times on a GPU")
def test_both_ways_are_timed_on_a_gpu() -> None:
    x, weight = (random(512, 256, dtype=torch.bfloat16, seed=n).requires_grad_() for n in range(2))
    layer = Adapted(weight.detach(), None, random(16, 256).requires_grad_(), random(512, 16).requires_grad_(), 1.0)
    lora.lora_linear(x, layer, p=0.1).sum().backward()
    found = lora.chosen()
    assert len(found) == 2
    assert all(set(entry["microseconds"]) == {"cublas", "triton"} for entry in found.values())
    lora_plan.forget()
    lora.lora_linear(x, layer, p=0.1)
    assert all(entry["from"] == "file" for entry in lora.chosen().values())
    lora_plan.forget()
    lora_plan.cache_file().unlink()
    graph, number = torch.cuda.CUDAGraph(), seed()
    with torch.cuda.graph(graph):
        lora.lora_linear(x.detach(), layer, p=0.1, seed=number)
    assert all(entry["from"] == "default" for entry in lora.chosen().values())
