"""Timing: contestants take turns in every round, and medians with the 20th and 80th percentile are reported.

Two times of a call, each after the L2 cache has been overwritten:

    wall    the host's clock from an idle device to an idle device: what the call costs, launches included
    graph   device events around the replay of a CUDA graph of the call: what its kernels take. None where the call
            cannot be captured, with the reason

A ratio of two contestants is one of medians; its percentiles are those of the rounds' own ratios.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Bench", "Unavailable", "best_time", "gradients", "kept_bytes", "median", "normal", "percentile", "pick"]
__all__ += ["ratio", "reason", "summary"]

Call = Callable[[], object]
FLUSH_BYTES = 256 << 20  # several times the largest L2


class Unavailable(Exception):  # noqa: N818
    """A contestant that cannot run here; the text says why."""


def percentile(values: Sequence[float], share: float) -> float:
    """By linear interpolation; share in 0 .. 1."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: median, p20, p80; and how many rounds."""
    return {
        "median": 1e3 * statistics.median(seconds),
        "p20": 1e3 * percentile(seconds, 0.2),
        "p80": 1e3 * percentile(seconds, 0.8),
        "rounds": len(seconds),
    }


def best_time(times: Mapping[str, Any], names: Sequence[str]) -> str:
    """Which time compares these contestants: graph if each has one, else wall."""
    return "graph" if all((times.get(name) or {}).get("graph") for name in names) else "wall"


def ratio(times: Mapping[str, Any], theirs: str, ours: str) -> dict[str, Any] | None:
    """How many times as long `theirs` takes; None where one of them did not run."""
    if not all((times.get(name) or {}).get("wall") for name in (theirs, ours)):
        return None
    by = best_time(times, (theirs, ours))
    pairs = list(zip(times[theirs]["rounds"][by], times[ours]["rounds"][by], strict=True))
    ratios = [a / b for a, b in pairs]
    return {
        "by": by,
        "median": times[theirs][by]["median"] / times[ours][by]["median"],
        "p20": percentile(ratios, 0.2),
        "p80": percentile(ratios, 0.8),
        "wall": times[theirs]["wall"]["median"] / times[ours]["wall"]["median"],
    }


@dataclass(frozen=True)
class _Plan:
    rounds: int
    flush: bool
    restore: Mapping[str, Call]


@dataclass
class Bench:
    """How calls are timed on `device`. smoke: one round of the host's clock, on a CPU."""

    device: torch.device
    smoke: bool = False

    def __post_init__(self) -> None:
        self._flush: Tensor | None = None

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        """Overwrite the L2 cache."""
        if self.device.type == "cuda":
            if self._flush is None:
                self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)
            self._flush.zero_()

    def compare(
        self,
        calls: Mapping[str, Call],
        *,
        rounds: int = 30,
        warm_up: int = 3,
        graph: bool = True,
        flush: bool = True,
        restore: Mapping[str, Call] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Time contestants in turn: by name {wall, graph, rounds: {wall, graph}} in milliseconds, or {error}.

        A contestant that raises is left out with its reason, and the others go on. restore: by name, what is called
        before each timed call and not timed, for a contestant that writes over its inputs.
        """
        rounds, warm_up = (1, 0) if self.smoke else (rounds, warm_up)
        found: dict[str, dict[str, Any]] = {}
        ready: dict[str, Call] = {}
        for name, call in calls.items():
            try:
                for _ in range(warm_up):
                    call()
                self.synchronize()
                ready[name] = call
            except Exception as error:
                found[name] = {"error": reason(error)}
            if name in found:
                self._recover()
        plan = _Plan(rounds, flush, restore or {})
        for name, seconds in self._rounds(ready, plan, self._wall, found).items():
            found[name] = {"wall": summary(seconds), "graph": None, "rounds": {"wall": [1e3 * s for s in seconds]}}
        if graph and self.device.type == "cuda":
            self._with_graphs(ready, found, plan)
        return {name: found[name] for name in calls}

    def _with_graphs(self, ready: Mapping[str, Call], found: dict[str, dict[str, Any]], plan: _Plan) -> None:
        graphs: dict[str, Call] = {}
        for name, call in ready.items():
            try:
                graphs[name] = captured(call)
            except Exception as error:
                found[name]["no_graph"] = reason(error)
            if "no_graph" in found[name]:
                self._recover()
        for name, seconds in self._rounds(graphs, plan, self._events, found).items():
            found[name]["graph"] = summary(seconds)
            found[name]["rounds"]["graph"] = [1e3 * s for s in seconds]

    def _rounds(
        self, calls: Mapping[str, Call], plan: _Plan, timed: Callable[[Call], float], found: dict[str, dict[str, Any]]
    ) -> dict[str, list[float]]:
        """Each contestant once a round; each round begins with the next one. One that raises leaves, noted in found."""
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(plan.rounds):
            names = list(seconds)
            start = number % max(len(names), 1)
            for name in [*names[start:], *names[:start]]:
                try:
                    if name in plan.restore:
                        plan.restore[name]()
                    if plan.flush:
                        self.flush()
                    seconds[name].append(timed(calls[name]))
                except Exception as error:
                    found[name] = {**found.get(name, {}), "error": reason(error)}
                    del seconds[name]
        return seconds

    def in_turn(
        self, calls: Mapping[str, Call], rounds: int, found: dict[str, dict[str, Any]]
    ) -> dict[str, list[float]]:
        """Seconds of long calls on the host's clock, nothing flushed before them; who raises is noted in found."""
        return self._rounds(calls, _Plan(1 if self.smoke else rounds, False, {}), self._wall, found)

    def _wall(self, call: Call) -> float:
        self.synchronize()
        begin = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - begin

    def _events(self, call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        self.synchronize()
        return 1e-3 * float(start.elapsed_time(end))

    def _recover(self) -> None:
        """After an error, such as a full memory: give back what the frames of the exception held."""
        gc.collect()
        if self.device.type == "cuda":
            with contextlib.suppress(Exception):
                torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def host_time(self, call: Call, rounds: int = 50) -> dict[str, float]:
        """Milliseconds until the host has launched a call, the device idle at its start."""
        rounds = 1 if self.smoke else rounds
        seconds = []
        if not self.smoke:
            call()
        for _ in range(rounds):
            self.synchronize()
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        self.synchronize()
        return summary(seconds)

    def peak_extra(self, call: Call) -> int | None:
        """The most bytes that a call holds beyond what was there before it, its results included; None on a CPU."""
        if self.device.type != "cuda":
            return None
        call()
        self.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    # --- the two limits of a device ---

    def copy_bandwidth(self, size: int = 1 << 30) -> dict[str, Any]:
        """C: bytes read and written a second by `copy_` of a GiB."""
        size = 1 << 16 if self.smoke else size
        source = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        times = self.compare({"copy": lambda: target.copy_(source)})
        return {"bytes": size, "times": times["copy"], "bytes_per_second": 2 * size / (1e-3 * median(times, "copy"))}

    def matmul_rate(self, M: int, K: int, N: int) -> dict[str, Any]:
        """F: FLOP a second of `torch.mm` in bf16, [M, K] [K, N] with the second as a linear layer has it."""
        a, b = normal((M, K), self.device), normal((N, K), self.device)
        out = torch.empty(M, N, dtype=a.dtype, device=self.device)
        times = self.compare({"mm": lambda: torch.mm(a, b.t(), out=out)})
        rate = 2 * M * K * N / (1e-3 * median(times, "mm"))
        return {"shape": [M, K, N], "times": times["mm"], "flop_per_second": rate}


def reason(error: BaseException) -> str:
    """One line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


def captured(call: Call) -> Call:
    """The replay of a CUDA graph of a call, forward and backward."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def normal(
    shape: tuple[int, ...], device: torch.device, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Normal values, made on the device. Never zeros: a GPU multiplies those faster."""
    return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, scale)


def gradients(
    function: Callable[..., Any], inputs: Sequence[Any], wanted: Sequence[Tensor], upstream: Sequence[Tensor]
) -> Call:
    """A call that runs `function` forward and backward for the gradients of `wanted`."""

    def call() -> object:
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, wanted, upstream)

    return call


def kept_bytes(function: Callable[[], object], known: Sequence[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of a call, beyond the storages of `known`."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    total = sum(size for size, _ in kept.values())
    del result
    return total


def pick(times: Mapping[str, Any], name: str) -> float | None:
    """A contestant's median in milliseconds: of its graph, else of the host's clock; None if it did not run."""
    entry = times.get(name) or {}
    best = entry.get("graph") or entry.get("wall")
    return None if best is None else float(best["median"])


def median(times: Mapping[str, Any], name: str) -> float:
    """The same of a contestant that must have run."""
    found = pick(times, name)
    if found is None:
        raise Unavailable(f"{name}: {(times.get(name) or {}).get('error', 'did not run')}")
    return found
