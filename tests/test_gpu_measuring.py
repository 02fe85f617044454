"""The measurements on a GPU: what a verdict says, how times are taken and compared, and what the peers compute."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.gpu_scripts import SECTIONS, module

# --- goals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal", "measured", "met"),
    [
        ("G1a 4096x4096", 0.16, True),
        ("G1a 4096x14336", 0.101, False),
        ("G1b 4096x4096", 1.39, False),
        ("G1b 14336x4096", 1.20, True),
        ("G1c 4096x14336", 1.17, True),
        ("G2a 4096x4096", 4.72, False),
        ("G2b 4096x4096", 22.0, True),
        ("G3b", 1.24, False),
        ("G4a", 10.15, True),
        ("G4a", 10.16, False),
        ("G4d", 1.6, True),
        ("G5a", 8.2, False),
        ("G5c1", 3.9, True),
        ("G6b", 4, False),
        ("G7a", 26.5, True),
        ("G7e", 0.57, False),
        ("G8a", 45.1, False),
        ("G9a", 0.211, True),
        ("G9d", 0.061, False),
        ("G10c", 0.0, True),
        ("G11a", 15499.0, False),
        ("G11d", 55.0, True),
        ("G12b", 1, False),
    ],
)
def test_a_verdict_at_the_bandwidth_and_rate_that_the_thresholds_assume(goal: str, measured: float, met: bool) -> None:
    goals = module("gpu.goals")
    for copy, matmul in ((None, None), (goals.COPY, goals.MATMUL)):
        line = goals.verdict(goal, measured, copy, matmul)
        assert line["met"] is met
        assert line["bound"] == pytest.approx(line["threshold"])


def test_a_bound_follows_bandwidth_and_rate() -> None:
    goals = module("gpu.goals")

    def bound(key: str, copy: float, matmul: float) -> float:
        value: float = goals.bound(goals.GOALS[key], copy * 1e12, matmul * 1e12)
        return value

    assert bound("G4a", 2.0, 400) == pytest.approx(10.15 * 3 / 2), "bytes alone"
    assert bound("G7a", 3.0, 399) == pytest.approx(26.5 + 21.57), "products twice as slow"
    assert bound("G7a", 1.5, 798) == pytest.approx(21.57 + 2 * (26.5 - 21.57))
    assert bound("G6a", 1.5, 798) == pytest.approx(0.75 + 0.447), "the host is as fast as before"
    assert bound("G11a", 1.5, 399) == pytest.approx(15500 / 2), "a rate falls"
    assert bound("G11a", 3.0, 399) == pytest.approx(1e6 / (1e6 / 15500 * (53.6 + 46.3) / 53.6))
    for key in ("G1a 4096x4096", "G4b", "G8b", "G11d", "G12a"):
        assert bound(key, 1.0, 100) == goals.GOALS[key].threshold, "ratios, bytes and counts stay"


def test_every_goal_has_a_section_and_what_has_no_figure_says_why() -> None:
    goals = module("gpu.goals")
    assert {goal.section for goal in goals.GOALS.values()} == set(SECTIONS) - {"device"}
    assert {re.match(r"G\d+", key)[0] for key in goals.GOALS} == {f"G{n}" for n in range(1, 13)}  # type: ignore[index]
    lines = goals.verdicts("head", {"G7a": 20.0}, None, None, {"G7d": "liger-kernel is not installed"})
    by_goal = {line["goal"]: line for line in lines}
    assert by_goal["G7a"]["met"] is True
    assert (by_goal["G7d"]["met"], by_goal["G7d"]["why"]) == (None, "liger-kernel is not installed")
    assert (by_goal["G8a"]["met"], by_goal["G8a"]["why"]) == (None, "not measured")
    with pytest.raises(KeyError):
        goals.verdicts("head", {"G4a": 1.0}, None, None)


def test_the_work_of_a_training_step() -> None:
    goals = module("gpu.goals")
    llama = goals.DecoderShape(32, 4096, 14336, 32, 8, 128, 128256)
    assert llama.matmul_parameters == pytest.approx(7.505e9, rel=1e-3)
    assert goals.flops_per_token(llama, [4096, 4096]) == pytest.approx(33.8e9, rel=2e-3)
    assert goals.flops_per_token(llama, [2048]) == pytest.approx(31.9e9, rel=2e-3)
    assert 15500 * goals.flops_per_token(llama, [4096]) / goals.PEAK == pytest.approx(0.53, abs=0.005)
    short = goals.flops_per_token(llama, [1024] * 4)
    assert 4 * llama.matmul_parameters < short < goals.flops_per_token(llama, [4096])
    llamas = module("gpu.llamas")
    assert llamas.LLAMAS["llama 8B"].shape == llama
    assert llamas.LLAMAS["llama 1B"].shape.matmul_parameters == pytest.approx(1.236e9, rel=1e-3)


def test_the_sections_fit_into_nine_minutes_and_a_command_of_ten() -> None:
    driver = module("gpu_suite")
    assert tuple(driver.LIMITS) == SECTIONS
    assert sum(driver.LIMITS.values()) <= driver.TOTAL == 9 * 60


# --- timing -----------------------------------------------------------------------------------------------------------


def test_medians_and_percentiles() -> None:
    measure = module("gpu.measure")
    seconds = [0.001 * n for n in range(1, 12)]
    assert measure.summary(seconds) == pytest.approx({"median": 6.0, "p20": 3.0, "p80": 9.0, "rounds": 11})
    assert measure.percentile([4.0], 0.2) == 4.0


def test_a_ratio_is_of_medians_and_its_spread_that_of_the_rounds() -> None:
    measure = module("gpu.measure")

    def entry(wall: list[float], graph: list[float] | None) -> dict[str, Any]:
        seconds = {"wall": [w / 1e3 for w in wall], "graph": [g / 1e3 for g in graph] if graph else None}
        rounds = {name: [1e3 * s for s in values] for name, values in seconds.items() if values}
        return {**{n: measure.summary(v) if v else None for n, v in seconds.items()}, "rounds": rounds}

    times = {"a": entry([2, 4, 6], [1, 2, 3]), "b": entry([1, 1, 2], [1, 1, 1]), "c": entry([8, 8, 8], None)}
    found = measure.ratio(times, "a", "b")
    assert (found["by"], found["median"], found["wall"]) == ("graph", 2.0, 4.0)
    assert found["p20"] == pytest.approx(1.4)
    assert measure.ratio(times, "c", "a")["by"] == "wall", "c has no graph, so clocks are compared with clocks"
    assert measure.ratio({**times, "d": {"error": "no memory"}}, "d", "a") is None
    assert measure.pick(times, "a") == 2.0
    assert measure.pick(times, "c") == 8.0
    with pytest.raises(measure.Unavailable, match="no memory"):
        measure.median({"d": {"error": "no memory"}}, "d")


class FakeGPU:
    """Enough of torch.cuda for the measuring of one: events whose time is a counter, graphs that call again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = 0.0
        self.capturing = False
        here = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at = 0.0

            def record(self) -> None:
                self.at = here.clock

            def elapsed_time(self, other: Event) -> float:
                return other.at - self.at

        class Graph:
            call: Callable[[], object]

            def replay(self) -> None:
                here.clock += 5.0

        @contextlib.contextmanager
        def graph(graph: Graph) -> Iterator[None]:
            here.capturing = True
            yield
            here.capturing = False

        stream = SimpleNamespace(wait_stream=lambda other: None)
        fakes: dict[str, Any] = {
            **{"Event": Event, "CUDAGraph": Graph, "graph": graph, "Stream": lambda: stream},
            **{"current_stream": lambda: stream, "stream": lambda s: contextlib.nullcontext()},
            **{"synchronize": lambda *device: None, "empty_cache": lambda: None},
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_contestants_take_turns_and_one_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = module("gpu.measure")
    gpu = FakeGPU(monkeypatch)
    bench = measure.Bench(torch.device("cuda", 0))
    flushed = []
    bench._flush = SimpleNamespace(zero_=lambda: flushed.append(1))
    order: list[str] = []
    restored: list[str] = []

    def fails() -> None:
        raise MemoryError("no room")

    def cannot_be_captured() -> None:
        if gpu.capturing:
            gpu.capturing = False
            raise RuntimeError("waits for the device")
        order.append("b")

    calls = {"a": lambda: order.append("a"), "b": cannot_be_captured, "c": fails}
    found = bench.compare(calls, rounds=4, warm_up=1, restore={"a": lambda: restored.append("a")})
    assert order[2:10] == ["a", "b", "b", "a", "a", "b", "b", "a"], "each round begins with the next"
    assert found["c"] == {"error": "MemoryError: no room"}
    assert found["a"]["graph"] == {"median": 5.0, "p20": 5.0, "p80": 5.0, "rounds": 4}
    assert found["b"]["graph"] is None
    assert found["b"]["no_graph"] == "RuntimeError: waits for the device"
    assert len(flushed) == 4 * 2 + 4, "before every timed call"
    assert len(restored) == 8


def test_one_that_fails_in_a_later_round_leaves_the_others() -> None:
    measure = module("gpu.measure")
    bench = measure.Bench(torch.device("cpu"))
    calls = iter([1, 1, 0])

    def fails_late() -> None:
        if not next(calls):
            raise MemoryError("no room")

    found = bench.compare({"a": fails_late, "b": lambda: None}, rounds=5, warm_up=1)
    assert "no room" in found["a"]["error"]
    assert "wall" not in found["a"]
    assert found["b"]["wall"]["rounds"] == 5


def test_what_autograd_keeps_is_counted_once_and_without_what_is_there_anyway() -> None:
    measure = module("gpu.measure")
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    kept = measure.kept_bytes(lambda: (x * w).exp(), [x, w])
    assert kept == 8 * 4 * 4, "exp keeps its result; the product keeps x and w"


def test_peers_compute_what_they_stand_for() -> None:
    """The Unsloth-style linear against autograd of the same in plain torch; its kernels need a device."""
    peers = module("gpu.peers")
    torch.manual_seed(0)
    x, W, A, B = (torch.randn(s, dtype=torch.float64) for s in ((5, 6), (7, 6), (2, 6), (7, 2)))
    leaves = [each.requires_grad_() for each in (x, A, B)]
    dy = torch.randn(5, 7, dtype=torch.float64)
    plain = x @ W.t() + 2.0 * (x @ A.t()) @ B.t()
    expected = torch.autograd.grad(plain, leaves, dy)
    out = peers.unsloth_linear(x, peers.Adapter(W, A, B, 2.0))
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, dy), expected)


@pytest.mark.parametrize("package", [True, False])
def test_peft_by_hand_is_peft(package: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    peers = module("gpu.peers")
    if not package:
        monkeypatch.setattr(peers, "has", lambda name: False)
    weight = torch.randn(6, 4).bfloat16()
    layer, adapter, how = peers.peft_linear(weight, 2, 0.0)
    assert ("by hand" in how) is not package
    assert {each.dtype for each in adapter} == {torch.bfloat16}
    wide = peers.peft_linear(weight, 2, 0.1, wide=True)[1]
    assert {each.dtype for each in wide} == {torch.float32}
    x = torch.randn(3, 4).bfloat16()
    A, B = adapter
    expected = x @ weight.t() + (x @ A.t() @ B.t()) * 16.0
    torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=2e-2)
