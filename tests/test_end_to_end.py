"""The command as a user types it: files, resume after any kill, two ranks, sweeps, mistakes; no download."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

TINY = ["+experiment=full_tiny", "tracking=disabled", "method=lora", "method.rank=4", "method.dropout=0.2"]
SHORT = ["training.max_steps=12", "evaluation.generate=false", "data.limit_test=10", "tracking.log_every_steps=1"]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "FTLAB_OFFLINE": "1", "COLUMNS": "200", **extra}


def command(*overrides: str) -> list[str]:
    return [sys.executable, "-m", "ftlab.train", *TINY, *SHORT, *overrides]


def run(*overrides: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*overrides), cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=120, check=False
    )


def ended(run_dir: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    return record


def trace(run_dir: Path) -> list[tuple[int, float, str]]:
    """(step, loss, digest of all examples so far) of every training line."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["data_digest"]) for line in lines if line["split"] == "train"]


def assert_same_run(one: Path, other: Path) -> None:
    assert trace(one) == trace(other)
    ours, theirs = (
        load_file(one / "adapter/adapter_model.safetensors"),
        load_file(other / "adapter/adapter_model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    assert ended(one)["scores"] == ended(other)["scores"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed; its process must not have imported the other frameworks or torch's compiler,
    or opened a socket."""
    folder = tmp_path_factory.mktemp("finished")
    program = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('the network is blocked')\n"
        "socket.socket.connect = refuse\n"
        "from ftlab.train import main\n"
        f"code = main({command('run_dir=run')[3:]!r})\n"
        "bad = {'transformers', 'peft', 'accelerate', 'trl', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not bad, bad\n"
        "raise SystemExit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run"


def test_a_run_leaves_everything(finished: Path) -> None:
    record = ended(finished)
    assert record["status"] == "finished"
    assert record["steps"] == 12
    assert record["scores"].keys() == {"base", "final"}
    for name in ("config.yaml", "metrics.jsonl", "report.html", "adapter/adapter_config.json"):
        assert (finished / name).stat().st_size > 0
    losses = [loss for _, loss, _ in trace(finished)]
    assert losses[-1] < losses[0]
    assert record["parameters"]
    assert record["memory"]["peak_rss"] > 0


def test_the_same_command_again_does_nothing(finished: Path) -> None:
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    again = run(f"run_dir={finished}", cwd=finished.parent)
    assert again.returncode == 0
    assert "already finished" in again.stdout
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before


def test_another_configuration_in_its_folder_is_refused(finished: Path) -> None:
    other = run(f"run_dir={finished}", "optimizer.lr=0.5", cwd=finished.parent)
    assert other.returncode == 1
    assert "optimizer.lr: 0.001 -> 0.5" in other.stderr
    assert "Traceback" not in other.stderr


def kill_when(process: subprocess.Popen[str], run_dir: Path, lines: int, signum: int) -> None:
    """Send a signal as soon as so many lines of metrics are there."""
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= lines:
            break
        time.sleep(0.005)
    process.send_signal(signum)


def test_settings_that_failed_hold_no_folder(finished: Path, tmp_path: Path) -> None:
    failed = run("run_dir=run", "method.targets=[q_porj]", cwd=tmp_path)
    assert failed.returncode == 2
    assert "q_porj" in failed.stderr
    assert ended(tmp_path / "run")["status"] == "failed"
    corrected = run("run_dir=run", cwd=tmp_path)
    assert corrected.returncode == 0, corrected.stderr
    assert_same_run(tmp_path / "run", finished)
    assert ended(tmp_path / "run")["reason"] == ended(finished)["reason"]
    trained = tmp_path / "trained"
    shutil.copytree(finished, trained)
    (trained / "run.json").write_text(json.dumps(ended(finished) | {"status": "failed"}))
    refused = run("run_dir=trained", "optimizer.lr=0.5", cwd=tmp_path)
    assert "holds a run with another configuration" in refused.stderr


@pytest.mark.parametrize(
    "signum, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["kill", "term", "ctrl-c"]
)
def test_stopped_and_resumed_is_bit_equal(finished: Path, tmp_path: Path, signum: int, code: int) -> None:
    settings = ["run_dir=run", "checkpoint.every_steps=1"]
    process = subprocess.Popen(
        command(*settings), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    kill_when(process, tmp_path / "run", 5, signum)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, output + errors
    if signum != signal.SIGKILL:
        assert ended(tmp_path / "run")["status"] == "interrupted"
        assert "Traceback" not in errors
    resumed = run(*settings, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed after step" in resumed.stdout
    assert_same_run(tmp_path / "run", finished)


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    overrides = ["run_dir=run", "method.dropout=0.0", "checkpoint.load_best=false"]
    one = run(*overrides, cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    (tmp_path / "run").rename(tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    two = subprocess.run(
        [*torchrun, "-m", "ftlab.train", *TINY, *SHORT, *overrides],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert two.returncode == 0, two.stderr
    ours, theirs = ended(tmp_path / "run"), ended(tmp_path / "one")
    assert ours["device"]["world_size"] == 2
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()].count("run") == 1
    for (step, loss, digest), (_, reference, expected) in zip(
        trace(tmp_path / "run"), trace(tmp_path / "one"), strict=True
    ):
        assert loss == pytest.approx(reference, rel=1e-4), step
        assert digest == expected
    for who in ("base", "final"):
        assert ours["scores"][who]["loss"]["value"] == pytest.approx(theirs["scores"][who]["loss"]["value"], rel=1e-4)


def test_resumed_elsewhere_from_a_checkpoint(finished: Path, tmp_path: Path) -> None:
    """resume=PATH, also from another run's folder: the best weights come along."""
    stopped = run("run_dir=one", "checkpoint.every_steps=1", "checkpoint.keep_last=20", cwd=tmp_path)
    assert stopped.returncode == 0, stopped.stderr
    other = run("run_dir=two", "resume=one/checkpoints/step-00000008", cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    assert [step for step, _, _ in trace(tmp_path / "two")] == [9, 10, 11, 12]
    assert trace(tmp_path / "two") == trace(finished)[8:]
    assert ended(tmp_path / "two")["scores"] == ended(finished)["scores"]


def test_changed_data_are_refused(tmp_path: Path) -> None:
    """The path is the same and so is the configuration, but not what stands in the file."""
    rows = [{"prompt": f"Number after {n}?", "completion": str(n + 1)} for n in range(60)]
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    settings = ["data=files", "data.train=mine.jsonl", "run_dir=run", "training.max_steps=2", "data.template=plain"]
    assert run(*settings, cwd=tmp_path).returncode == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    evaluate = [sys.executable, "-m", "ftlab.evaluate", "run=../run"]
    assert subprocess.run(evaluate, cwd=elsewhere, env=environment(), check=False).returncode == 0
    data.write_text("\n".join(json.dumps(row) for row in reversed(rows[1:])))
    again = run(*settings, cwd=tmp_path)
    assert again.returncode == 1
    assert "the data changed since this run began" in again.stderr
    scored = subprocess.run(evaluate, cwd=elsewhere, env=environment(), capture_output=True, text=True, check=False)
    assert scored.returncode == 1
    assert "data changed" in scored.stderr


@pytest.mark.parametrize("limit, code", [(60_000, 0), (500, 1)], ids=["checkpoints", "everything"])
def test_a_disk_that_refuses_is_told_in_a_line(tmp_path: Path, limit: int, code: int) -> None:
    """Files over a size fail: the checkpoints alone, which costs only them, or everything, which ends the run."""
    import resource

    done = subprocess.run(
        command("run_dir=run", "checkpoint.every_steps=4"),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if code:
        assert "File too large" in done.stderr
        return
    assert "checkpoint of step 4 could not be written" in done.stdout
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    assert any("could not be written" in line for line in ended(tmp_path / "run")["warnings"])


def test_a_sweep_makes_one_folder_a_trial(tmp_path: Path) -> None:
    done = run(
        "-m",
        "regularizer.l2_sp.strength=0,1e-2",
        "schedule=cosine,linear",
        "training.max_steps=3",
        "evaluation.baseline=false",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    folders = [path.parent for path in (tmp_path / "runs").glob("*/run.json")]
    assert len(folders) == 4
    hashes = {ended(folder)["config_hash"] for folder in folders}
    assert len(hashes) == 4
    for folder in folders:
        has_penalty = "penalty/l2_sp" in (folder / "metrics.jsonl").read_text()
        assert has_penalty == (ended(folder)["config"]["regularizer"]["l2_sp"]["strength"] > 0)


def test_strength_zero_is_the_run_without_it(finished: Path, tmp_path: Path) -> None:
    done = run("run_dir=run", "regularizer=l2_sp", "regularizer.l2_sp.strength=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", finished)


def test_an_unwritable_folder_is_said_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run("output_dir=file", cwd=tmp_path)
    assert done.returncode == 1
    assert "file" in done.stderr
    assert "output_dir" in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluate_in_bf16_scores_what_training_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLAB_BF16", "always")
    done = run("run_dir=run", "precision=bf16", "training.max_steps=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = ["run=run", "base=also", "out=again.json"]
    again = subprocess.run(
        [sys.executable, "-m", "ftlab.evaluate", *words], cwd=tmp_path, env=environment(), check=False
    )
    assert again.returncode == 0
    scores = json.loads((tmp_path / "again.json").read_text())["scores"]
    for now, then in (("before", "base"), ("after", "final")):
        assert scores[now]["loss"]["value"] == ended(tmp_path / "run")["scores"][then]["loss"]["value"]


def test_evaluate_and_generate_read_the_run(finished: Path) -> None:
    def call(module: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", module, *words],
            cwd=finished.parent,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    table = call("ftlab.evaluate", "run=run", "base=also", "out=again.json")
    assert "before" in table
    again = json.loads((finished.parent / "again.json").read_text())["scores"]
    for now, then in (("before", "base"), ("after", "final")):
        expected = ended(finished)["scores"][then]["loss"]["value"]
        assert again[now]["loss"]["value"] == pytest.approx(expected, rel=1e-6)
    question = ("max_new_tokens=4", "What is the capital of France?")
    answer = call("ftlab.generate", "run=run", *question)
    if (finished / "adapter").is_dir():
        assert call("ftlab.generate", "run=run", f"adapter={finished / 'adapter'}", *question) == answer
    call("ftlab.export", "run=run", "out=exported")
    assert (finished.parent / "exported" / "model.safetensors").exists()
