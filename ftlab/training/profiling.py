"""The torch profiler over a few steps of a run: a trace to look at, and what took the time.

Steps that compile and fill caches are passed over, and validations too where there is room between them. The profiler
watches and changes no number: a profiled run ends with the weights of the same run without it.
"""

from __future__ import annotations

import contextlib
import gzip
import warnings
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch._C._autograd import DeviceType

from ftlab.files import atomic_write

__all__ = ["OperatorTime", "StepProfiler", "Window", "table", "window"]

ROWS = 20
_FIRST, _ACTIVE = 4, 4  # the first step that is recorded, counted from 1, and how many are


@dataclass(frozen=True)
class OperatorTime:
    """What one operator took over all profiled steps, without the operators that it called.

    milliseconds: of the CPU. device_milliseconds: of the kernels that it launched on the GPU; None on a CPU.
    share: of the time of all operators, on the GPU if there is one. calls: how often.
    """

    operator: str
    milliseconds: float
    share: float
    calls: int
    device_milliseconds: float | None = None

    def __str__(self) -> str:
        heaviest = self.milliseconds if self.device_milliseconds is None else self.device_milliseconds
        return f"{100 * self.share:5.1f} % {heaviest:10.2f} ms  {self.operator}"


@dataclass(frozen=True)
class Window:
    """How many of the coming steps are passed over, warm the profiler up, and are recorded."""

    wait: int
    warmup: int
    active: int


def window(steps: int, validated: Collection[int] = ()) -> Window:
    """Which of the coming `steps` are recorded: four from the fourth on, as many as there are in a shorter run.

    A validation after one of the steps in `validated` (counted from 1) would be recorded together with the next step
    and drown it, so the window lies before or after it, and is shorter where that does not fit. Where every step is
    validated, that is part of the picture.
    """
    first = min(_FIRST, steps)
    longest = min(_ACTIVE, steps - first + 1)
    for active in range(longest, 0, -1):
        for begin in range(first, steps - active + 2):
            if not any(begin - 1 <= step < begin + active - 1 for step in validated):
                return _window(begin, active)
    return _window(first, longest)


def _window(begin: int, active: int) -> Window:
    warmup = min(1, begin - 1)
    return Window(begin - 1 - warmup, warmup, active)


def table(rows: Sequence[OperatorTime]) -> str:
    """The rows as text, with a column for the GPU's time if there is one."""
    on_gpu = any(row.device_milliseconds is not None for row in rows)
    lines = [f"{'operator':<48} {'ms':>10} " + f"{'GPU ms':>10} " * on_gpu + f"{'share':>7} {'calls':>8}"]
    for row in rows:
        gpu = "" if row.device_milliseconds is None else f"{row.device_milliseconds:>10.2f} "
        lines.append(f"{row.operator[:48]:<48} {row.milliseconds:>10.2f} {gpu}{100 * row.share:>6.1f}% {row.calls:>8}")
    return "\n".join(lines) + "\n"


class StepProfiler:
    """A context around the loop; `on_step` is the loop's hook.

    Writes trace.json.gz (for Perfetto or chrome://tracing) and top.txt into `folder` when the last recorded step ends,
    or the run does before it. `rows` are the operators that took most, empty until then; `problem` says in a line why
    something could not be written, which stops no run.
    """

    def __init__(self, folder: Path, device: torch.device, steps: Window) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule  # not paid for by other runs

        self.folder, self.device = folder, device
        self.rows: list[OperatorTime] = []
        self.problem = ""
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with warnings.catch_warnings():  # a run of one step has none to warm up with
            warnings.filterwarnings("ignore", message="Profiler won't be using warmup")
            plan = schedule(wait=steps.wait, warmup=steps.warmup, active=steps.active, repeat=1)
        self._profile: Any = profile(activities=activities, schedule=plan, on_trace_ready=self._write, acc_events=True)

    def __enter__(self) -> StepProfiler:
        self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)

    def on_step(self, step: int, result: Any, ids: tuple[str, ...]) -> None:
        """One step is over."""
        self._profile.step()

    def as_dicts(self) -> list[dict[str, Any]]:
        """For run.json."""
        return [asdict(row) for row in self.rows]

    def _write(self, profile: Any) -> None:
        self.rows = heaviest(profile.key_averages(), self.device)
        plain = self.folder / "trace.json.partial"
        try:
            self.folder.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(plain))
            atomic_write(self.folder / "trace.json.gz", gzip.compress(plain.read_bytes(), 6))
            atomic_write(self.folder / "top.txt", table(self.rows))
        except OSError as error:
            self.problem = f"{error.filename or self.folder}: {error.strerror or error}"
        finally:
            with contextlib.suppress(OSError):
                plain.unlink()


def heaviest(averages: Sequence[Any], device: torch.device) -> list[OperatorTime]:
    """The operators that took most time themselves, by the time of the GPU where there is one.

    averages: the profiler's `key_averages()`. On a GPU it lists the kernels beside the operators that launched them;
    the kernels make the total, also those that no operator launched, and are otherwise left out. Left out too: the
    steps, whose own time is what Python did between the operators.
    """
    on_gpu = device.type == "cuda"
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [row for row in averages if not row.key.startswith("ProfilerStep")]
    operators = [row for row in rows if row.device_type == DeviceType.CPU]
    kernels = [r for r in rows if r.device_type != DeviceType.CPU and not r.is_user_annotation]
    total = sum(getattr(row, key) for row in (kernels if on_gpu else operators)) or 1.0
    operators.sort(key=lambda row: -getattr(row, key))
    return [
        OperatorTime(
            row.key,
            row.self_cpu_time_total / 1000,
            getattr(row, key) / total,
            row.count,
            row.self_device_time_total / 1000 if on_gpu else None,
        )
        for row in operators[:ROWS]
    ]
