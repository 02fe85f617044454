"""Runs that the tests of this folder look at."""

from __future__ import annotations

import pytest

from tests.helpers.runs import Runs


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))
