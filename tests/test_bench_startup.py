"""The benchmark of start-up: what its figures mean, what it records, and that it runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ftlab.arguments import parse
from ftlab.compose import compose
from ftlab.generate import GenerateArguments

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def startup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_startup", ROOT / "scripts" / "bench_startup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def a_run(what: str, seconds: float, **phases: float) -> dict[str, Any]:
    run: dict[str, Any] = {"what": what, "repeat": 0, "waited": 0.0, "load_before": 0.1, "seconds": seconds}
    return {**run, "phases": phases} if phases else run


RUNS = [
    a_run("train", 6.0, data=1.0, model=0.5, preflight=2.0),
    a_run("generate", 2.5),
    a_run("train", 9.0, data=1.5, model=0.7, preflight=3.0),
    a_run("generate", 2.0),
    a_run("train", 4.0, data=0.5, model=0.6, preflight=1.0),
    a_run("generate", 5.0),
]
ASKED = {"packages": {"torch": "2"}, "device": {"name": "A CPU"}, "model": {"name": "m"}}


def test_the_summary_is_of_medians_each_against_its_own_limit(startup: ModuleType) -> None:
    summary = startup.summarize(RUNS)
    assert summary["train"] == {
        "median": 6.0,
        "low": 4.0,
        "high": 9.0,
        "limit": 8.0,
        "of_limit": 0.75,
        "phases": {"data": 1.0, "model": 0.6, "preflight": 2.0},
    }
    assert summary["generate"] == {"median": 2.5, "low": 2.0, "high": 5.0, "limit": 4.0, "of_limit": 0.625}


def test_the_table_is_aligned(startup: ModuleType) -> None:
    head, step, token, phases = startup.table(startup.summarize(RUNS)).splitlines()
    assert len(head) == len(step) == len(token)
    assert step.split()[-4:] == ["6.00", "4.00", "9.00", "8"]
    assert token.split()[-4:] == ["2.50", "2.00", "5.00", "4"]
    assert phases == "of the first: data 1.00, model 0.60, preflight 2.00"


def test_every_key_of_the_record_is_explained(startup: ModuleType) -> None:
    content = startup.record(["--repeats", "3"], RUNS, ASKED, startup.beginning())
    assert json.loads(json.dumps(content)) == content
    assert content["command"] == "python scripts/bench_startup.py --repeats 3"
    page = (ROOT / "docs" / "results" / "README.md").read_text("utf-8")
    explained = page.split("`scripts/bench_startup.py`", 1)[1].split("\n## ")[0]
    keys = {**content, **content["runs"][0], **content["summary"], **content["summary"]["train"]}
    assert not [key for key in keys if f"`{key}`" not in explained]


@pytest.mark.parametrize("tiny", [False, True])
def test_what_it_runs_is_what_a_user_types(startup: ModuleType, tiny: bool) -> None:
    words = startup.commands(tiny)
    for name in ("train", "prepare"):
        config, _ = compose(words[name][3:])
        assert not config.evaluation.baseline
    assert config.evaluation.times == 0, "the run to ask is not measured on anything"
    arguments, prompts = parse(GenerateArguments, [*words["generate"][3:], "run=x"], "")
    assert arguments.max_new_tokens == 1
    assert len(prompts) == 1


def test_children_may_keep_their_bytecode(startup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("FTLAB_CACHE", "somewhere")
    assert "PYTHONDONTWRITEBYTECODE" not in startup.environment()
    assert startup.environment()["FTLAB_CACHE"] == "somewhere"


def child(code: str) -> list[str]:
    return ["python", "-c", code]


def test_the_first_byte_counts(startup: ModuleType, tmp_path: Path) -> None:
    code = "import time; print('t', flush=True); time.sleep(0.3)"
    begun, process = startup.start(child(code), tmp_path / "a")
    there = startup.wait_for(tmp_path / "a" / "out.log", process, tmp_path / "a")
    assert process.poll() is None, "it was noticed before the end"
    assert there > begun
    startup.finish(process, tmp_path / "a")


def test_a_child_that_comes_to_nothing_is_one_line(startup: ModuleType, tmp_path: Path) -> None:
    _, process = startup.start(child("raise SystemExit('the last words')"), tmp_path / "train-0")
    with pytest.raises(startup.BenchError, match=r"^train-0 came to nothing: the last words$"):
        startup.wait_for(tmp_path / "train-0" / "out.log", process, tmp_path / "train-0")
    with pytest.raises(startup.BenchError, match="the last words"):
        startup.finish(process, tmp_path / "train-0")


@pytest.mark.parametrize("words", [["--repeats", "0"], ["--wait-idle", "-1"], ["--out", "nowhere/x.json"]])
def test_a_mistake_is_refused_at_once(
    startup: ModuleType, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refusal:
        startup.main(words)
    assert refusal.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.slow
def test_it_measures(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    command = [sys.executable, "scripts/bench_startup.py", "--tiny", "--repeats", "1", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(out.read_text())
    assert [run["what"] for run in content["runs"]] == ["train", "generate"]
    first = content["runs"][0]
    assert 0 < sum(first["phases"].values()) < first["seconds"]
