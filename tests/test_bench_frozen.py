"""The benchmark of freezing: what it runs composes, a round is compared with itself, and its table says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftlab.compose import compose
from scripts import bench_frozen, readme_results


@pytest.mark.parametrize("tiny", [False, True])
def test_every_arm_composes(tiny: bool) -> None:
    for model, arms in bench_frozen.ARMS.items():
        assert arms[0][0] == "full"
        for _, arm in arms:
            config, _ = compose(bench_frozen.words(model, arm, tiny))
            assert config.training.max_steps == bench_frozen.STEPS
            assert config.training.preflight, "it counts the activations"


def run(model: str, arm: str, repeat: int, seconds: float, size: int) -> dict[str, Any]:
    memory = {
        "weights": 100,
        "gradients": size,
        "optimizer": 2 * size,
        "activations": 5 * size,
        "peak_rss": 1000 + size,
    }
    about = {"model": model, "arm": arm, "repeat": repeat, "waited": 0.0, "load_before": 0.0}
    return {**about, "seconds": seconds, **memory, "trained": size, "total": 100}


def runs() -> list[dict[str, Any]]:
    found = []
    for repeat, full in enumerate((1.0, 4.0)):  # the second round fell on a slower moment
        for model, arms in bench_frozen.ARMS.items():
            for name, _ in arms:
                share = 1.0 if name == "full" else 0.5
                found.append(run(model, name, repeat, full * share, int(100 * share)))
    return found


def test_ratios_are_taken_within_a_round() -> None:
    row = bench_frozen.summarize(runs())["MiniLM"]["lower half frozen"]
    assert (row["time"], row["time_low"], row["time_high"]) == (0.5, 0.5, 0.5)
    assert row["step_memory"] == row["activations"] == row["trained"] == 0.5
    assert row["peak"] == pytest.approx(1050 / 1100)


def test_a_run_is_read_from_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def trained(command: list[str], **_: Any) -> Any:
        folder = Path(command[-1].partition("=")[2])
        folder.mkdir()
        times = (10.0, 19.0, 20.0, 21.5, 22.5)  # the first gap is warming up
        lines = [{"split": "train", "time": time} for time in times] + [{"split": "validation", "time": 99.0}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "run.json").write_text(json.dumps({"memory": {}}))
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(bench_frozen.subprocess, "run", trained)
    assert bench_frozen.run_arm(["method=full"], tmp_path / "run")["seconds"] == 1.0


def test_a_run_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = type("Done", (), {"returncode": 2, "stderr": "a traceback\nerror: no such key\n"})
    monkeypatch.setattr(bench_frozen, "beginning", dict)
    monkeypatch.setattr(bench_frozen.subprocess, "run", lambda *_, **__: failed)
    assert bench_frozen.main(["--tiny"]) == 1
    assert capsys.readouterr().err.endswith("error: no such key\n")


def test_the_table_has_a_row_an_arm() -> None:
    device = {"kind": "cpu", "name": "a processor", "threads": 2, "memory_bytes": 2**30}
    record = {"command": "c", "commit": "0" * 40, "device": device, "runs": runs()}
    text = readme_results.frozen_table(record | {"summary": bench_frozen.summarize(runs())})
    assert "| BitFit | 50.00 % | 0.50 | 0.50 to 0.50 | 0.500 | 0.500 | 0.95 |" in text
    assert text.count("| full | 100.00 % | 1.00 |") == 2
    assert "2 rounds." in text
