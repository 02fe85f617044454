"""A pytest plugin: a line for each test as it ends, so that a run that is stopped has told what it found.

FTLAB_LINES=FILE python -m pytest -p gpu.pytest_lines ...
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gpu.missing import stand_in

__all__ = ["pytest_collection_finish", "pytest_collectreport", "pytest_runtest_logreport"]

stand_in()  # before the tests are imported


def add(**line: Any) -> None:
    """Append a line; with several workers only their controller writes."""
    path = os.environ.get("FTLAB_LINES")
    if path and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def pytest_collection_finish(session: Any) -> None:
    add(kind="collected", count=len(session.items))


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        add(kind="test", name=report.nodeid, outcome="failed", seconds=0.0, why=last_line(report))


def pytest_runtest_logreport(report: Any) -> None:
    """The call of a test, or its set-up where that decided."""
    if report.when == "call" or report.outcome != "passed":
        why = last_line(report) if report.failed else None
        add(kind="test", name=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), why=why)


def last_line(report: Any) -> str:
    """Where it failed and what the error says, in one line."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = f"{crash.path}:{crash.lineno}: {crash.message}" if crash is not None else str(report.longrepr)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2] if crash is not None else lines[-1:])[:400]
