"""The study of few labels: its runs compose, it chooses by validation loss, and its page is current."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ftlab.compose import compose

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("study_few_shot", ROOT / "scripts/study_few_shot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["study_few_shot"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_run_composes(script: ModuleType) -> None:
    for entry in script.ENTRIES:
        for setting in entry.settings:
            config, _ = compose([*script.COMMON, *entry.words, setting])
            assert config.data.shots == 8  # type: ignore[attr-defined]


def test_the_page_is_what_the_record_gives(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0


def test_the_setting_of_lowest_validation_loss_meets_the_test_split(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_one(words: list[str], seed: int, folder: Path) -> dict[str, Any]:
        folder.mkdir()
        value = 0.5 if "1e-2" in words[-1] or words[-1].endswith("=1") else 0.7
        record = json.loads(script.RECORD.read_text("utf-8"))
        scores = {name: {"value": value + seed} for name in script.SCORES}
        rows = [{"trainable": True, "count": 1}, {"trainable": False, "count": 3}]
        made: dict[str, Any] = {key: record[key] for key in ("commit", "device", "packages", "model", "data")}
        return {
            **made,
            "dirty": False,
            "best": {"value": value},
            "scores": {"final": scores},
            "parameters": rows,
            "memory": {"peak_rss": 2**30},
        }

    monkeypatch.setattr(script, "run_one", run_one)
    made = script.study(2)
    by_name = {row["name"]: row for row in made["rows"]}
    assert [len(row["tried"]) for row in made["rows"]] == [3] * len(script.ENTRIES)
    assert {run["words"][-1] for run in by_name["linear probe"]["runs"]} == {"optimizer.lr=1e-2"}
    assert [run["seed"] for run in by_name["full, L2-SP"]["runs"]] == list(script.SEEDS)
    assert {run["words"][-1] for run in by_name["full, L2-SP"]["runs"]} == {"regularizer.l2_sp.strength=1"}
    text = script.page(made)
    assert "| linear probe | 25.00 % |" in text
    assert "`optimizer.lr=1e-2` [3e-3, 1e-2, 3e-2]" in text
