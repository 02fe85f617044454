"""The torch profiler over a few steps of a run: a trace to look at, and what took the time.

Steps that compile and fill caches are passed over. The profiler watches and changes no number: a profiled run ends with
the weights of the same run without it.
"""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from ftlab.files import atomic_write

__all__ = ["OperatorTime", "StepProfiler", "table", "window"]

ROWS = 20
_WAIT, _WARMUP, _ACTIVE = 2, 1, 4


@dataclass(frozen=True)
class OperatorTime:
    """What one operator took over all profiled steps, without what it called: milliseconds, share of the sum, calls."""

    operator: str
    milliseconds: float
    share: float
    calls: int


def window(steps: int) -> tuple[int, int, int]:
    """How many of a run's steps are passed over, warm the profiler up, and are recorded; fewer in a short run."""
    wait = min(_WAIT, max(0, steps - 2))
    warmup = min(_WARMUP, max(0, steps - wait - 1))
    return wait, warmup, max(1, min(_ACTIVE, steps - wait - warmup))


def table(rows: Sequence[OperatorTime]) -> str:
    """The rows as text."""
    lines = [f"{'operator':<48} {'ms':>10} {'share':>7} {'calls':>8}"]
    lines += [f"{r.operator[:48]:<48} {r.milliseconds:>10.2f} {100 * r.share:>6.1f}% {r.calls:>8}" for r in rows]
    return "\n".join(lines) + "\n"


class StepProfiler:
    """A context around the loop; `on_step` is the loop's hook.

    Writes trace.json.gz (for Perfetto or chrome://tracing) and top.txt into `folder` when the last recorded step ends,
    or the run does before it. `rows` are the heaviest operators, of the device if it is a GPU; empty until then.
    """

    def __init__(self, folder: Path, device: torch.device, steps: int) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule  # not paid for by other runs

        self.folder, self.device = folder, device
        self.rows: list[OperatorTime] = []
        wait, warmup, active = window(steps)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a run of one step leaves none to warm up with
            steps_of_interest = schedule(wait=wait, warmup=warmup, active=active, repeat=1)
        self._profile = profile(
            activities=activities, schedule=steps_of_interest, on_trace_ready=self._write, acc_events=True
        )

    def __enter__(self) -> StepProfiler:
        self._profile.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def on_step(self, step: int, result: Any, ids: tuple[str, ...]) -> None:
        """One step is over."""
        self._profile.step()

    def as_dicts(self) -> list[dict[str, Any]]:
        """For run.json."""
        return [asdict(row) for row in self.rows]

    def _write(self, profile: Any) -> None:
        self.rows = _heaviest(profile, self.device)
        self.folder.mkdir(exist_ok=True)
        plain = self.folder / "trace.json.partial"
        try:
            profile.export_chrome_trace(str(plain))
            atomic_write(self.folder / "trace.json.gz", gzip.compress(plain.read_bytes(), 6))
        finally:
            plain.unlink(missing_ok=True)
        atomic_write(self.folder / "top.txt", table(self.rows))


def _heaviest(profile: Any, device: torch.device) -> list[OperatorTime]:
    """The operators that took most time themselves, on the device where that is a GPU."""
    key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = [(row.key, float(getattr(row, key)), int(row.count)) for row in profile.key_averages()]
    found = [row for row in found if not row[0].startswith("ProfilerStep")]
    total = sum(spent for _, spent, _ in found) or 1.0
    found.sort(key=lambda row: -row[1])
    return [OperatorTime(name, spent / 1000, spent / total, count) for name, spent, count in found[:ROWS]]
