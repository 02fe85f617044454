"""Mistakes in the small commands are one line, and are found before any work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ftlab import evaluate, export, generate, open_run
from ftlab.arguments import guarded
from ftlab.config import Config
from ftlab.data.__main__ import main as data_main
from ftlab.errors import ConfigError
from ftlab.training.parallel import Ranks


def raising(error: Exception) -> Callable[[list[str]], int]:
    def command(argv: list[str]) -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("two\nlines"), 2, "two lines"),
        (FileNotFoundError(2, "No such file or directory", "a/b.json"), 1, "a/b.json: No such file or directory"),
        (OSError("no space left"), 1, "no space left"),
    ],
)
def test_an_error_is_one_line(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FTLAB_DEBUG", raising=False)
    assert guarded(raising(error), []) == code
    assert capsys.readouterr().err == f"error: {said}\n"
    monkeypatch.setenv("FTLAB_DEBUG", "1")
    with pytest.raises(type(error)):
        guarded(raising(error), [])


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(raising(ZeroDivisionError()), [])


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_main(["inspect", str(tmp_path / ("x" * 300))]) == 1  # the operating system refuses the name
    assert capsys.readouterr().err.count("\n") == 1


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that gets as far as reading the run fails."""

    def work(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("the mistake was not found before the work")

    monkeypatch.setattr(open_run, "read_config", work)
    monkeypatch.setattr(open_run, "open_run", work)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("main", "words", "expected"),
    [
        (export.main, ["out=no/such/dir"], "out=no/such/dir: there is no folder"),
        (export.main, ["out=file/dir"], "out=file/dir: there is no folder"),
        (export.main, ["out=there"], "out=there exists already"),
        (evaluate.main, ["out=no/such/x.json"], "out=no/such/x.json: there is no folder"),
        (evaluate.main, ["out=there"], "out=there is a folder"),
        (evaluate.main, ["limit=0"], "limit=0: give at least 1"),
        (evaluate.main, ["limit=-3"], "limit=-3: give at least 1"),
        (evaluate.main, ["batch_size=0"], "batch_size=0: give at least 1"),
        (evaluate.main, ["model=nowhere"], "model=nowhere: there is no such folder"),
        (evaluate.main, ["model=there"], "model=there is no whole model, it has no config.json; is it there/model?"),
        (evaluate.main, ["adapter=nowhere"], "adapter=nowhere: there is no such folder"),
        (evaluate.main, ["model=there", "base=only"], "base=only scores the pretrained model alone"),
        (evaluate.main, ["model=there", "adapter=there"], "one of them is scored"),
        (generate.main, ["max_new_tokens=0", "why?"], "max_new_tokens=0: give at least 1"),
    ],
)
def test_a_mistake_is_found_before_any_work(
    main: Callable[[list[str]], int],
    words: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("file").write_text("")
    assert main(["run=nowhere", *words]) == 2
    shown = capsys.readouterr().err
    assert expected in shown
    assert shown.count("\n") == 1


@pytest.mark.usefixtures("no_work")
def test_without_the_mistake_the_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for main in (export.main, evaluate.main):
        with pytest.raises(AssertionError, match="before the work"):
            main(["run=nowhere", "out=new"])


def test_a_folder_that_cannot_be_written_is_found_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ftlab.arguments.os.access", lambda path, mode: False)  # root may write everywhere
    assert evaluate.main(["run=nowhere", f"out={tmp_path}/x.json"]) == 2
    assert "is not writable" in capsys.readouterr().err


def test_an_empty_split_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = {"train": [1], "validation": [], "test": [1]}
    data = SimpleNamespace(splits=SimpleNamespace(**sides), **sides)
    opened = SimpleNamespace(data=lambda: data)
    monkeypatch.setattr(open_run, "open_run", lambda *arguments, **named: opened)
    monkeypatch.setattr(open_run, "read_config", lambda run_dir: (Config(), {}))
    monkeypatch.setattr("ftlab.training.parallel.start_ranks", lambda config: contextlib.nullcontext(Ranks()))
    assert evaluate.main([f"run={tmp_path}", "split=validation"]) == 1
    assert capsys.readouterr().err == (
        f"error: the validation split of the run in {tmp_path} is empty; give another split=...\n"
    )
