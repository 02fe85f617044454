"""Training under mimalloc: found, chosen, refused, and without any effect on the numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ftlab import allocator

ROOT = Path(__file__).parent.parent
needs_mimalloc = pytest.mark.skipif(sys.platform != "linux", reason="an allocator is preloaded on Linux only")


def restarted(monkeypatch: pytest.MonkeyPatch, **environment: str) -> list[dict[str, str]]:
    """The environments that the process would have been started again with."""
    seen: list[dict[str, str]] = []
    for name in ("LD_PRELOAD", "FTLAB_ALLOCATOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "execve", lambda path, words, env: seen.append(env))
    allocator.restart_under_mimalloc()
    return seen


@needs_mimalloc
def test_it_is_preloaded_before_what_the_user_preloads(monkeypatch: pytest.MonkeyPatch) -> None:
    (environment,) = restarted(monkeypatch, LD_PRELOAD="/lib/other.so", MIMALLOC_PURGE_DELAY="10")
    assert environment["LD_PRELOAD"] == f"{allocator.find_mimalloc()}:/lib/other.so"
    assert environment["MIMALLOC_PURGE_DELAY"] == "10"


@pytest.mark.parametrize(
    "environment",
    [{"FTLAB_ALLOCATOR": "system"}, {"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, {"LD_PRELOAD": "/x/libmimalloc.so"}],
)
def test_nothing_is_done_twice_or_against_the_users_will(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert restarted(monkeypatch, **environment) == []


def test_without_the_package_nothing_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert allocator.find_mimalloc() is None
    assert restarted(monkeypatch) == []


@needs_mimalloc
def test_the_numbers_are_the_same(tmp_path: Path) -> None:
    """Two real runs; each says in its record what it allocated with."""
    losses = {}
    for name in ("mimalloc", "system"):
        folder = tmp_path / name
        words = ["+experiment=full_tiny", "training.max_steps=3", "evaluation=none", "tracking=disabled"]
        command = [sys.executable, "-m", "ftlab.train", *words, "tracking.log_every_steps=1", f"run_dir={folder}"]
        environment = {**os.environ, "FTLAB_ALLOCATOR": name}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads((folder / "run.json").read_text("utf-8"))["device"]["allocator"] == name
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        losses[name] = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses["mimalloc"] == losses["system"]
    assert len(losses["system"]) == 3
