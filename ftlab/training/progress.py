"""What a person sees of a run: live bars on a terminal, one plain line at a time elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

__all__ = ["Progress", "duration", "memory_size", "score_lines"]

LABELS = {
    "data": "reading the data",
    "model": "loading the model",
    "preflight": "trying the largest micro-batch",
    "test_base": "test split, untouched model",
    "test_final": "test split, trained model",
}
COUNT_SECONDS = 15.0  # between two plain lines of a count
SHORT_PHASE_SECONDS = 1.0  # a phase that is over sooner leaves no line of its time


def duration(seconds: float) -> str:
    """A time as people write it: 4.2 s, 3 min 7 s, 1 h 2 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def memory_size(size: float) -> str:
    """A number of bytes as GiB, as MiB below 1 GiB, with a decimal below 10 MiB."""
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"


class _Output:
    """A text stream that never raises: once a write fails (closed pipe, closed file) it says nothing more."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
            except (OSError, ValueError):
                self._give_up()
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def isatty(self) -> bool:
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("no stream")
        return self._stream.fileno()

    def _give_up(self) -> None:
        stream, self._stream = self._stream, None
        if stream is sys.__stdout__:
            # Python flushes standard output once more at exit; a reader that went away would turn that into an error.
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.close(null)


class Progress:
    """Progress of a run on standard output; never raises, also when nobody reads it any more.

    Args:
        enabled: False on every rank but the first: shows nothing.
        stream: where to; standard output by default.
        clock: seconds, for estimates.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._enabled = enabled
        self._clock = clock
        self._out = _Output(stream or sys.stdout)
        self._bars: Any = None  # rich.progress.Progress, once something is shown on a terminal
        self._live = enabled and self._out.isatty() and os.environ.get("TERM") != "dumb"
        self._phases: list[_Phase] = []
        self._training: Any = None  # the bar of the steps
        self._total, self._start, self._begun = 0, 0, 0.0

    # --- training ---------------------------------------------------------------------------------------------------

    def begin(self, total_steps: int, start_step: int = 0) -> None:
        """Training starts now, with `start_step` of `total_steps` behind it."""
        self._total, self._start, self._begun = total_steps, start_step, self._clock()
        if self._live:
            self._training = self._bar(f"step {start_step}/{total_steps}", total_steps, start_step)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """`step` is done. Shown of `values`: loss, lr, tokens_per_second and memory_bytes, if they are given.

        Call it once a logging interval: without a terminal each call is a line.
        """
        if not self._enabled:
            return
        parts = _measurements(values)
        done = step - self._start
        if done > 0 and step < self._total:
            remaining = (self._clock() - self._begun) / done * (self._total - step)
            parts.append(f"ETA {duration(remaining)}")
        line = "  ".join(parts)
        if self._training is not None:
            self._bars.update(
                self._training, completed=step, description=f"step {step}/{self._total}", info=line, refresh=True
            )
        else:
            self._print(f"step {step}/{self._total}  {line}")

    # --- phases -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say that a part of the run goes on, and afterwards how long it took. Phases may lie within one another."""
        if not self._enabled:
            yield
            return
        label = LABELS.get(name, name.replace("_", " "))
        quiet = name == "training"  # its steps speak for themselves
        bar = self._bar(label, None, 0) if self._live and not quiet else None
        if bar is None and not quiet:
            self._print(f"{label} ...")
        phase = _Phase(label, self._clock(), bar)
        self._phases.append(phase)
        try:
            yield
        finally:
            self._phases.remove(phase)
            if bar is not None:
                self._bars.remove_task(bar)
            spent = self._clock() - phase.begun
            if spent >= SHORT_PHASE_SECONDS:
                self._print(f"{label}: {duration(spent)}")

    def count(self, done: int, total: int) -> None:
        """`done` of `total` records of the present phase are through."""
        if not self._phases:
            return
        phase = self._phases[-1]
        if phase.bar is not None:
            self._bars.update(phase.bar, completed=done, total=total, info=f"{done} of {total}", refresh=True)
            return
        now = self._clock()
        if now - phase.told >= COUNT_SECONDS:
            phase.told = now
            self._print(f"{phase.label}: {done} of {total}")

    # --- text -------------------------------------------------------------------------------------------------------

    def message(self, text: str) -> None:
        """A line of text above the bars."""
        if self._enabled:
            self._print(text)

    def summary(self, record: Mapping[str, Any]) -> None:
        """The scores before and after, time and memory, from the content of run.json."""
        for line in _summary_lines(record):
            self.message(line)

    def close(self) -> None:
        """Take the bars away. Messages may still follow."""
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._training, self._live = None, None, False

    def _print(self, text: str) -> None:
        if self._bars is not None:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._out.write(text + "\n")
            self._out.flush()

    def _bar(self, label: str, total: int | None, done: int) -> Any:
        """A new bar; starts the live display with the first one. rich is imported only here."""
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bars
            from rich.table import Column

            uncut = Column(no_wrap=True, overflow="ellipsis")  # a narrow terminal loses the end of the line only
            text = TextColumn("{task.description}  {task.fields[info]}", markup=False, table_column=uncut)
            columns = (BarColumn(bar_width=10), text)
            console = Console(file=self._out, force_terminal=True)  # type: ignore[arg-type]
            # Twice a second: the drawing thread shares the cores with training.
            self._bars = Bars(*columns, console=console, refresh_per_second=2)
            self._bars.start()
        return self._bars.add_task(label, total=total, completed=done, info="")


class _Phase:
    """A part of the run that is going on."""

    def __init__(self, label: str, begun: float, bar: Any) -> None:
        self.label, self.begun, self.told, self.bar = label, begun, begun, bar


def _measurements(values: Mapping[str, float]) -> list[str]:
    shown = {"loss": "loss {:.4f}", "lr": "lr {:.1e}", "tokens_per_second": "{:.0f} tokens/s"}
    parts = [form.format(values[name]) for name, form in shown.items() if name in values]
    return [*parts, *([memory_size(values["memory_bytes"])] if "memory_bytes" in values else [])]


def score_lines(title: str, columns: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Scores side by side as aligned text: a heading, then a line per metric. A column is metric -> score."""
    names = list(dict.fromkeys(name for scores in columns.values() for name in scores))
    lines = [f"{title:<14}" + "".join(f"{heading:>22}" for heading in columns) + "   (95 % interval)"]
    for name in names:
        lines.append(f"{name:<14}" + "".join(f"{_score(scores.get(name)):>22}" for scores in columns.values()))
    return lines


def _summary_lines(record: Mapping[str, Any]) -> list[str]:
    """The table of scores as aligned text, then one line of time and memory."""
    scores = record.get("scores", {})
    base, final = scores.get("base", {}), scores.get("final", {})
    lines = score_lines("test split", {"before": base, "after": final}) if final else []
    facts = []
    if timings := record.get("timings", {}):
        nested = timings.get("validation", 0.0) if "training" in timings else 0.0  # lies within training
        facts.append(f"time {duration(sum(timings.values()) - nested)}")
    if peak := record.get("memory", {}).get("peak_rss"):
        facts.append(f"peak memory {memory_size(peak)}")
    if speed := record.get("throughput", {}).get("tokens_per_second"):
        facts.append(f"{speed:.0f} tokens/s")
    return [*lines, *([", ".join(facts)] if facts else [])]


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    if isinstance(score["value"], str) or not math.isfinite(score["value"]):  # run.json has it as text
        return str(score["value"])
    if score.get("low") is None:
        return f"{score['value']:.3f}"
    if score["low"] == score["high"]:  # all records scored alike: resampling them gives no interval
        return f"{score['value']:.1f}"
    return f"{score['value']:.1f} ({score['low']:.1f}-{score['high']:.1f})"
