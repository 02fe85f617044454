"""Runs the kernels' tests in Triton's interpreter: a process each, because TRITON_INTERPRET counts when importing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(file: str, request: pytest.FixtureRequest) -> None:
    long = ["--long"] if request.config.getoption("--long") else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *long, str(FOLDER / file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
