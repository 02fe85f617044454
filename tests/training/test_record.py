"""run.json: whole at every moment, valid JSON whatever the numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from ftlab.errors import FtlabError
from ftlab.training.record import RunRecord, describe_machine


def test_fields_are_merged_one_level_deep(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.update(timings={"data": 1.0}, steps=3)
    record.update(timings={"model": 2.0}, steps=4)
    assert json.loads(record.path.read_text()) == {"timings": {"data": 1.0, "model": 2.0}, "steps": 4}


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.update(scores={"base": {"perplexity": {"value": math.inf, "low": None}}}, losses=[math.nan, 1.0])
    assert json.loads(record.path.read_text()) == {
        "scores": {"base": {"perplexity": {"value": "inf", "low": None}}},
        "losses": ["nan", 1.0],
    }


def test_begin_and_end(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.begin("name", "hash", torch.device("cpu"), 1)
    assert record.status == "running"
    started = record.content["started"]
    again = RunRecord(tmp_path)
    again.begin("name", "hash", torch.device("cpu"), 1)
    assert again.content["started"] == started  # a resumed run began when it first began
    again.end("finished")
    content = json.loads(record.path.read_text())
    assert content["status"] == "finished"
    assert content["packages"]["torch"] == torch.__version__


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    RunRecord(tmp_path, enabled=False).update(steps=1)
    assert not (tmp_path / "run.json").exists()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(FtlabError, match=r"run\.json is not valid JSON"):
        RunRecord(tmp_path)


def test_the_machine_is_described_without_its_name() -> None:
    import platform

    described = describe_machine(torch.device("cpu"), 1)
    assert described["cpu_cores"] >= 1
    assert platform.node() not in json.dumps(described) or not platform.node()
