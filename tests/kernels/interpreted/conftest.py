"""These tests need a device that runs kernels: the interpreter, or a GPU. Elsewhere they are not collected."""

from __future__ import annotations

import os

import pytest
import torch

RUNS = os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()


def pytest_ignore_collect(collection_path: object, config: pytest.Config) -> bool | None:
    return None if RUNS else True
