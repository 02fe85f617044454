"""The modules of scripts/gpu, which are no package of the tests' path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["SCRIPTS", "SECTIONS", "module"]

SCRIPTS = Path(__file__).parents[2] / "scripts"
SECTIONS = ("device", "correctness", "lora", "adamw", "head", "pointwise", "end_to_end")


def module(name: str) -> ModuleType:
    """gpu_suite, gpu_table, or gpu.NAME."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))
