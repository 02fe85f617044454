from __future__ import annotations

import io
import math
import os
import pty
import re
import subprocess
import sys
import threading

import pytest

from ftlab.training.progress import Progress, duration, memory_size, score_lines

VALUES = {"loss": 1.23456, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 812.3, "memory_bytes": 1.5 * 2**30}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_say_everything() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(stream=out, clock=clock)
    progress.begin(500, start_step=100)
    clock.now += 60.0
    progress.update(130, VALUES)  # 30 steps in 60 s: 370 more take 740 s
    progress.update(500, {"loss": math.nan})
    progress.message("[a message] with brackets")
    progress.close()
    assert out.getvalue().splitlines() == [
        "step 130/500  loss 1.2346  lr 1.0e-03  812 tokens/s  1.50 GiB  ETA 12 min 20 s",
        "step 500/500  loss nan",
        "[a message] with brackets",
    ]


def test_phases_say_what_goes_on_and_how_long_it_took() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(stream=out, clock=clock)
    with progress.phase("data"):
        clock.now += 0.5
    with progress.phase("training"), progress.phase("validation"):
        for done in range(0, 60, 10):
            clock.now += 7.0
            progress.count(done, 60)
    progress.count(1, 2)  # outside of a phase: nothing to say
    with pytest.raises(KeyError), progress.phase("test_final"):
        raise KeyError
    assert out.getvalue().splitlines() == [
        "reading the data ...",
        "validation ...",
        "validation: 20 of 60",
        "validation: 50 of 60",
        "validation: 42.0 s",
        "training: 42.0 s",
        "test split, trained model ...",
    ]


def test_other_ranks_are_silent() -> None:
    out = io.StringIO()
    progress = Progress(enabled=False, stream=out)
    progress.begin(10)
    progress.update(1, VALUES)
    with progress.phase("validation"):
        progress.count(1, 2)
    progress.message("text")
    progress.summary({"scores": {"final": {"loss": {"value": 1.0, "low": None}}}})
    progress.close()
    assert out.getvalue() == ""


def test_summary_shows_before_and_after() -> None:
    out = io.StringIO()
    record = {
        "scores": {
            "base": {"exact_match": {"value": 0.0, "low": 0.0, "high": 1.26}},
            "final": {
                "exact_match": {"value": 20.7, "low": 16.5, "high": 25.6},
                "loss": {"value": 1.25, "low": None, "high": None},
                "bleu": {"value": 0.0, "low": 0.0, "high": 0.0},
            },
        },
        "timings": {"training": 300.0, "validation": 30.0, "test_final": 20.0},
        "memory": {"peak_rss": 2**31},
    }
    Progress(stream=out).summary(record)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[1] == ["exact_match", "0.0", "(0.0-1.3)", "20.7", "(16.5-25.6)"]
    assert lines[2] == ["loss", "-", "1.250"]
    assert lines[3] == ["bleu", "-", "0.0"]
    assert " ".join(lines[4]) == "time 5 min 20 s, peak memory 2.00 GiB"  # validation is part of training
    empty = io.StringIO()
    Progress(stream=empty).summary({"status": "failed"})
    assert empty.getvalue() == ""


@pytest.mark.parametrize("value", [math.nan, "nan"])  # run.json has it as text
def test_a_score_that_is_not_finite(value: float | str) -> None:
    lines = score_lines("test", {"after": {"accuracy": {"value": value, "low": value, "high": value}}})
    assert lines[1].split() == ["accuracy", "nan"]


def test_bars_on_a_terminal() -> None:
    reader, writer = pty.openpty()
    shown: list[bytes] = []

    def collect() -> None:
        try:
            while block := os.read(reader, 65536):
                shown.append(block)
        except OSError:  # Linux reports the end of a terminal as an error
            return

    thread = threading.Thread(target=collect)
    thread.start()
    with os.fdopen(writer, "w", encoding="utf-8") as terminal:
        progress = Progress(stream=terminal)
        with progress.phase("model"):
            progress.message("[not] markup")
        progress.begin(20)
        with progress.phase("training"):
            progress.update(10, VALUES)
            with progress.phase("validation"):
                progress.count(5, 8)
        progress.close()
        progress.message("afterwards")
        progress.begin(3)
        progress.update(1, VALUES)
    thread.join(10)
    os.close(reader)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(shown).decode())
    for part in (
        "[not] markup",
        "step 10/20",
        "loss 1.2346",
        "1.50 GiB",
        "5 of 8",
        "afterwards",
        "step 1/3",
    ):
        assert part in text
    assert b"\x1b[?25h" in b"".join(shown)  # the cursor is shown again


def test_nobody_reads() -> None:
    """A reader that goes away, as with `| head`, changes neither the run nor its exit status."""
    code = """
import sys
from ftlab.training.progress import Progress
progress = Progress()
for step in range(2000):
    progress.update(step, {"loss": 1.0})
progress.close()
print("done", file=sys.stderr)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == "done\n"
        assert process.wait(60) == 0


def test_closed_missing_and_narrow_streams() -> None:
    closed = io.StringIO()
    closed.close()
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for stream in (closed, ascii_only):
        progress = Progress(stream=stream)
        progress.begin(3)
        progress.update(1, VALUES)
        progress.message("caf\u00e9")
        progress.close()
    ascii_only.flush()
    assert b"caf?" in ascii_only.buffer.getvalue()  # type: ignore[attr-defined]


DURATIONS = {0.25: "0.2 s", 59.9: "59.9 s", 59.97: "1 min 0 s", 187.4: "3 min 7 s", 3723: "1 h 2 min"}


@pytest.mark.parametrize(("seconds", "text"), DURATIONS.items())
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_memory_size() -> None:
    assert memory_size(3 * 2**29) == "1.50 GiB"
    assert memory_size(2**29) == "512 MiB"
    assert memory_size(2**19) == "0.5 MiB"
