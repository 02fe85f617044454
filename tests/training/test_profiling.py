"""The profile of a run: files, table, report, and no effect on what is learnt."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftlab.compose import compose
from ftlab.session import train
from ftlab.training.profiling import OperatorTime, StepProfiler, table, window

WORDS = [
    *("+experiment=full_tiny", "method=lora", "method.dropout=0.1", "evaluation=none", "tracking=disabled"),
    *("training.preflight=false", "data.limit_train=32", "data.batch_size=2", "data.micro_batch_size=2"),
]


def run(folder: Path, *extra: str) -> dict[str, torch.Tensor]:
    assert train(*compose([*WORDS, f"run_dir={folder}", *extra])) == 0
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_profiled_run(tmp_path: Path) -> None:
    steps = "training.max_steps=8"
    plain = run(tmp_path / "plain", steps)
    profiled = run(tmp_path / "profiled", steps, "tracking.profile=true")
    assert all(torch.equal(plain[name], profiled[name]) for name in plain)
    assert not (tmp_path / "plain" / "profile").exists()
    folder = tmp_path / "profiled" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["top.txt", "trace.json.gz"]
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    rows = json.loads((tmp_path / "profiled" / "run.json").read_text("utf-8"))["profile"]
    assert len(rows) == 20
    assert rows[0]["milliseconds"] == max(row["milliseconds"] for row in rows) > 0
    assert 0 < sum(row["share"] for row in rows) <= 1
    assert rows[0]["operator"] in (tmp_path / "profiled" / "report.html").read_text("utf-8")
    assert rows[0]["operator"][:48] in (folder / "top.txt").read_text("utf-8")


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_too_short_for_the_whole_window_is_profiled_all_the_same(steps: int, tmp_path: Path) -> None:
    run(tmp_path, f"training.max_steps={steps}", "tracking.profile=true")
    assert (tmp_path / "profile" / "trace.json.gz").exists()


def test_the_window_fits_into_the_run() -> None:
    assert window(100) == (2, 1, 4)
    for steps in range(1, 12):
        wait, warmup, active = window(steps)
        assert active >= 1
        assert wait + warmup + active <= steps


def test_an_interruption_inside_the_window_leaves_what_was_seen(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path / "profile", torch.device("cpu"), 100)

    def interrupted() -> None:
        with profiler:
            for step in range(5):
                torch.ones(3) @ torch.ones(3)
                profiler.on_step(step, None, ())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["top.txt", "trace.json.gz"]
    assert profiler.rows


def test_the_table() -> None:
    text = table([OperatorTime("aten::mm", 12.5, 0.5, 3)])
    assert text.splitlines()[1].split() == ["aten::mm", "12.50", "50.0%", "3"]
