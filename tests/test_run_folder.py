"""A run's folder: how an interrupted run goes on in it, what may not be moved out of it, what a kill leaves there."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftlab import train
from ftlab.build import with_absolute_paths
from ftlab.compose import compose
from ftlab.files import sha256_bytes
from ftlab.training.hooks import Hook
from ftlab.training.run_dir import needed_within

TINY = ["+experiment=full_tiny", "tracking=disabled", "method=lora", "method.rank=2", "evaluation=loss_only"]
TINY += ["training.max_steps=4", "training.preflight=false", "checkpoint.every_steps=1", "checkpoint.keep_last=9"]


def run(folder: Path, *overrides: str) -> int:
    return train.main([*TINY, *overrides, f"run_dir={folder}"])


def record_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    return content


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_result(one: Path, other: Path) -> None:
    ours, theirs = adapter(one), adapter(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder) == 0
    return folder


@pytest.fixture
def first(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "first"))


class CtrlC(Hook):
    """Comes during the third step."""

    def after_step(self, state: Any, run: Any, result: Any) -> None:
        if state.counters.step == 3:
            os.kill(os.getpid(), signal.SIGINT)


# --- going on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["auto", "never", "path"])
def test_what_is_said_at_ctrl_c_goes_on_from_there(
    resume: str, whole: Path, first: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if resume == "auto":
        shutil.rmtree(first)
    given = f"{first}/checkpoints/step-00000001" if resume == "path" else resume
    with monkeypatch.context() as patch:
        patch.setattr("ftlab.session.build.build_hooks", lambda *_: [CtrlC()])
        assert run(first, f"resume={given}") == 130
    said = capsys.readouterr().out
    command = "the same command" + ("" if resume == "auto" else f" with resume=auto in place of resume={given}")
    assert f"; {command} goes on from what is saved" in said.replace("\n", " ")
    assert f"{command[0].upper()}{command[1:]} goes on." in (first / "report.html").read_text("utf-8")

    folders = names(first.parent)
    assert run(first) == 0
    assert names(first.parent) == folders, "nothing was set aside"
    assert record_of(first)["resumed_from"][-1] == 3
    assert_same_result(first, whole)


def test_until_something_is_saved_a_checkpoint_is_given_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without it the run would begin at step 1."""
    given = f"resume={whole}/checkpoints/step-00000002"
    with monkeypatch.context() as patch:
        patch.setattr("ftlab.session.Replica", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert run(tmp_path / "run", given) == 130
    assert "; the same command goes on from what is saved" in capsys.readouterr().out.replace("\n", " ")
    assert run(tmp_path / "run", given) == 0
    assert record_of(tmp_path / "run")["resumed_from"] == [2]
    assert_same_result(tmp_path / "run", whole)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_disk_that_fails_is_told_with_the_command_that_goes_on(
    resume: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Any, *_: Any) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("ftlab.session._Session._settle", full)
    assert run(tmp_path / "run", f"resume={resume}") == 1
    command = "the same command" + ("" if resume == "auto" else " with resume=auto in place of resume=never")
    assert f"somewhere: No space left on device; put that right and give {command} again" in capsys.readouterr().err


# --- what may not be moved away --------------------------------------------------------------------------------------


def settled(folder: Path, *words: str) -> dict[str, Any]:
    return with_absolute_paths(compose([*TINY, f"run_dir={folder}", *words])[1])


def test_what_a_run_reads_in_its_folder_is_found(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(first.parent)
    (first / "model").mkdir()
    for name in ("model/config.json", "tokenizer.json", "mine.jsonl", "plain.jinja", "fisher.safetensors"):
        (first / name).write_text("{}")
    Path("link").symlink_to(first)
    pinned = f"first/mine.jsonl#sha256={sha256_bytes(b'{}')}"
    ewc, replay = ["regularizer.ewc.source=[first]"], ["regularizer.replay.source=[link]"]
    files = ["data=files", "data.train=first/mine.jsonl", "data.template=plain"]
    cases = [
        (["method.start_from=first/adapter"], f"method.start_from={first}/adapter"),
        (["method.start_from=link/adapter"], f"method.start_from={first.parent}/link/adapter"),
        (["model=smollm2_135m", "model.location=first/model"], f"model.location={first}/model"),
        (["model.tokenizer=file:first/tokenizer.json"], f"model.tokenizer={first}/tokenizer.json"),
        ([*ewc, "regularizer.ewc.strength=1"], f"regularizer.ewc.source={first}"),
        ([*replay, "regularizer.replay.share=0.1"], f"regularizer.replay.source={first.parent}/link"),
        (files, f"data.train={first}/mine.jsonl"),
        ([files[0], f"data.train='{pinned}'", files[2]], f"data.train={pinned}"),
        (["data.template=first/plain.jinja"], f"data.template={first}/plain.jinja"),
        ([*ewc, "regularizer.ewc.strength=0"], None),
        ([*replay, "regularizer.replay.share=0"], None),
        (["model.tokenizer=bytes"], None),
    ]
    for words, found in cases:
        assert needed_within(first, settled(first, *words)) == found, words
        assert needed_within(first.with_name("first.1"), settled(first, *words)) is None, words
    assert needed_within(Path(), settled(first)) is None, "builtin data, and names that are no paths"


def test_it_is_not_set_aside_and_nobody_is_told_to(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = f"method.start_from={first / 'adapter'}"
    before = (first / "run.json").read_bytes()
    assert run(first, start) == 1
    said = capsys.readouterr().err
    assert "holds a run with another configuration" in said
    assert said.rstrip().endswith("give another run_dir")

    assert run(first, start, "resume=never") == 2
    said = capsys.readouterr().err
    assert f"error: {start}: that stands in {first}, which resume=never would move away; give another run_dir" in said
    assert names(first.parent) == ["first"]
    assert (first / "run.json").read_bytes() == before

    assert run(first, "optimizer.lr=0.5") == 1
    assert "or resume=never to set that run aside" in capsys.readouterr().err


def test_a_finished_run_of_files_in_its_folder_is_not_offered_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Number after {n}?", "completion": str(n + 1)} for n in range(30)]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data=files", f"data.train={folder}/mine.jsonl", "data.template=plain"]
    assert run(folder, *words, "resume=never") == 0, "there is no earlier run to be moved"
    capsys.readouterr()
    assert run(folder, *words) == 0
    said = capsys.readouterr().out
    assert "already finished" in said
    assert "resume=never" not in said
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    assert run(folder, *words) == 1
    said = capsys.readouterr().err
    assert "the data changed since this run began" in said
    assert said.rstrip().endswith("; restore what it was, or give another run_dir")


# --- what a kill leaves ----------------------------------------------------------------------------------------------


def test_what_a_killed_process_left_is_removed_or_put_back(first: Path) -> None:
    kept = names(first)
    (first / ".adapter.tmp-1").mkdir()
    (first / ".adapter.tmp-1" / "adapter_model.safetensors").write_text("half")
    (first / ".model.tmp-22").mkdir()
    (first / ".run.json.tmp-abc").write_text("{")
    (first / "predictions").mkdir()
    (first / "predictions" / ".final.jsonl.tmp-x").write_text("")
    (first / "adapter").rename(first / ".adapter.old-1")  # between the two renames of a replacement
    of_others = [".fisher.safetensors.tmp-9", ".scores.json.tmp-9"]
    for name in of_others:  # ftlab.fisher and ftlab.evaluate hold no lock, and may be writing
        (first / name).write_text("")
    assert run(first) == 0
    assert names(first) == sorted([*kept, *of_others, "predictions"])
    assert names(first / "predictions") == []
    assert adapter(first)


def test_a_process_that_runs_there_keeps_its_files(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first / ".adapter.tmp-1").mkdir()
    with (first / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(first) == 1
    assert "another process is running" in capsys.readouterr().err
    assert (first / ".adapter.tmp-1").is_dir()
