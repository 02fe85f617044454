"""Runs the kernels' tests in Triton's interpreter: a process each, because TRITON_INTERPRET counts when importing.

They start when a session begins to run tests and go on beside the others, which use one core; each waits for its own.
"""

from __future__ import annotations

import pytest

from tests.kernels import conftest


@pytest.mark.parametrize("file", conftest.FILES)
def test_in_the_interpreter(file: str, request: pytest.FixtureRequest) -> None:
    done = conftest.outcome(file, request.config)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
