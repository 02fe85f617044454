"""A sweep runs every combination, survives failures, and leaves a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlab.compose import run_command, run_folder
from ftlab.config import Config
from ftlab.errors import FtlabError
from ftlab.files import atomic_write
from ftlab.studies.sweep import Trial, best_value, read_rows, read_trials, score_text, write_sweep, write_trial

PAIR = ("-m", "+experiment=full_tiny", "training.seed=0,1")
SWEEP = ("-m", "+experiment=full_tiny", "training.seed=0,1", "schedule=cosine,linear")


def finish(folder: Path, loss: float) -> None:
    """What a finished run leaves behind, as far as a sweep reads it."""
    folder.mkdir(parents=True)
    scores = {"final": {"exact_match": {"value": 25.0, "low": 20.0, "high": 30.0, "signature": "x"}}}
    best = {"step": 3, "metric": "loss", "value": loss}
    atomic_write(folder / "run.json", json.dumps({"status": "finished", "best": best, "scores": scores}))
    atomic_write(folder / "report.html", "<p>report</p>")


class Runs:
    """A task that counts its calls and fails where it is told to."""

    def __init__(self, failure: BaseException | int | None = None, seed: int = 1) -> None:
        self.folders: list[Path] = []
        self.failure = failure
        self.seed = seed

    def __call__(self, config: Config, resolved: dict[str, Any]) -> int:
        folder = run_folder(config, resolved)
        self.folders.append(folder)
        if self.failure is not None and config.training.seed == self.seed:
            if isinstance(self.failure, int):
                return self.failure
            raise self.failure
        finish(folder, loss=1.0 + len(self.folders))
        return 0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sweep_folder(folder: Path) -> Path:
    (found,) = (folder / "runs" / "sweeps").iterdir()
    return found


def test_every_combination_runs_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = Runs()
    assert run_command(SWEEP, runs) == 0
    assert len(set(runs.folders)) == 4
    content = json.loads((sweep_folder(folder) / "sweep.json").read_text("utf-8"))
    assert content["shared"] == ["+experiment=full_tiny"]
    assert content["swept"] == ["training.seed", "schedule"]
    assert [run["validation_loss"] for run in content["runs"]] == [2.0, 3.0, 4.0, 5.0]
    page = (sweep_folder(folder) / "sweep.html").read_text("utf-8")
    assert page.count('<tr class="best">') == 1
    report = page.split('<a href="')[1].split('"')[0]
    assert (sweep_folder(folder) / report).is_file()
    shown = capsys.readouterr().out
    assert "run 4/4: +experiment=full_tiny training.seed=1 schedule=linear" in shown
    assert "linear" in shown


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [(FtlabError("no space"), 1, "no space"), (RuntimeError("boom"), 1, "RuntimeError: boom"), (3, 3, "failed")],
)
def test_a_failure_does_not_stop_the_others(
    failure: BaseException | int, code: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(failure, seed=0)
    assert run_command(PAIR, runs) == code
    assert len(runs.folders) == 2
    trials = read_trials(sweep_folder(folder))
    assert [trial.exit_code for trial in trials] == [code, 0]
    shown = capsys.readouterr()
    assert "run 1 (+experiment=full_tiny training.seed=0) failed" in shown.out
    assert message in shown.out
    assert message in (sweep_folder(folder) / "sweep.html").read_text("utf-8")


@pytest.mark.parametrize(("stop", "code"), [(130, 130), (143, 143), (KeyboardInterrupt(), 130)])
def test_the_user_stops_the_whole_sweep(stop: BaseException | int, code: int, folder: Path) -> None:
    runs = Runs(stop, seed=0)
    assert run_command(PAIR, runs) == code
    assert len(runs.folders) == 1
    content = json.loads((sweep_folder(folder) / "sweep.json").read_text("utf-8"))
    assert [run["status"] for run in content["runs"]] == ["interrupted"]


def test_a_sweep_in_a_file(folder: Path) -> None:
    (folder / "mine" / "experiment").mkdir(parents=True)
    text = (
        "# @package _global_\ndefaults:\n  - override /model: tiny_random\n  - override /data: capitals\n  - _self_\n"
        "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      training.seed: 0,1,2\n"
    )
    (folder / "mine" / "experiment" / "seeds.yaml").write_text(text, "utf-8")
    runs = Runs()
    assert run_command(["--config-dir", "mine", "+experiment=seeds"], runs) == 0
    assert len(set(runs.folders)) == 3


def test_two_ranks_share_folders_and_only_one_records(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials on two ranks: two run folders, one sweep folder."""
    argv = ("-m", "+experiment=full_tiny", "training.seed=0,1")
    folders: list[Path] = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run_command(argv, lambda config, resolved: folders.append(run_folder(config, resolved))) == 0
    assert len(folders) == 4
    assert len(set(folders)) == 2
    assert len(read_trials(sweep_folder(folder))) == 2


def test_an_unwritable_folder_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs").write_text("a file", "utf-8")
    assert run_command(PAIR, Runs()) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: runs/sweeps")
    assert "give output_dir=" in shown
    assert shown.count("\n") == 1


def test_a_trial_without_a_run_folder(tmp_path: Path) -> None:
    write_trial(tmp_path, Trial(0, ["a=1"], 1, "lost <b>", str(tmp_path / "absent")))
    (row,) = read_rows(read_trials(tmp_path))
    assert row.status == "failed"
    assert row.validation_loss is None
    assert best_value(tmp_path / "absent") is None
    write_sweep(tmp_path, [row.trial])
    assert "lost &lt;b&gt;" in (tmp_path / "sweep.html").read_text("utf-8")


def test_validation_loss_when_another_metric_decides(tmp_path: Path) -> None:
    lines = [{"step": step, "split": "validation", "loss": 3.0 - step} for step in (1, 2)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "spl'
    atomic_write(tmp_path / "metrics.jsonl", text)
    atomic_write(tmp_path / "run.json", json.dumps({"best": {"step": 1, "metric": "bleu", "value": 20.0}}))
    (row,) = read_rows([Trial(0, [], 0, "", str(tmp_path))])
    assert row.validation_loss == 2.0


def test_score_text() -> None:
    assert score_text({"value": 21.25, "low": 18.0, "high": 24.5}) == "21.25 [18, 24.5]"
    assert score_text({"value": 0.5}) == "0.5"
    assert score_text(None) == ""
