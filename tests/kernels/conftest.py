"""Starts the interpreter's tests beside the session's own, and lets them be waited for last."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
ROOT = Path(__file__).parents[2]
NAME = "test_in_the_interpreter"

_pool = ThreadPoolExecutor(1)  # one beside the session: that makes two cores
_running: dict[str, Future[subprocess.CompletedProcess[str]]] = {}


def interpret(file: str, long: bool) -> subprocess.CompletedProcess[str]:
    """pytest over one file, in the interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(["--long"] if long else [])]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    return subprocess.run(
        [*command, str(FOLDER / file)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def outcome(file: str, config: pytest.Config) -> subprocess.CompletedProcess[str]:
    """What came of a file; it is run now if it was not begun before."""
    if file not in _running:
        _running[file] = _pool.submit(interpret, file, bool(config.getoption("--long")))
    return _running[file].result()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that wait come last."""
    items.sort(key=lambda item: getattr(item, "originalname", "") == NAME)  # stable


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin with what this session is going to wait for."""
    if session.config.option.collectonly:
        return
    for item in session.items:
        if isinstance(item, pytest.Function) and item.originalname == NAME:
            file = str(item.callspec.params["file"])
            _running[file] = _pool.submit(interpret, file, bool(session.config.getoption("--long")))


def pytest_sessionfinish() -> None:
    """A session that was stopped does not wait for what has not begun."""
    _pool.shutdown(wait=False, cancel_futures=True)
