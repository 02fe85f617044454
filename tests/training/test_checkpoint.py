"""Checkpoints: whole or not there, and a clear line when the disk or a file fails."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

import ftlab.training.checkpoint as module
from ftlab.errors import FtlabError
from ftlab.training.checkpoint import Checkpoints, read_checkpoint


def content(step: int, best: int = -1) -> dict[str, object]:
    return {"counters": {"step": step, "best_step": best}, "weights": {"w": torch.full((3,), float(step))}}


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, told: list[str]) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", 2, told.append)


def test_keeps_the_newest(checkpoints: Checkpoints) -> None:
    for step in (1, 2, 3):
        assert checkpoints.save(content(step))
    assert checkpoints.steps() == [3, 2]
    newest = checkpoints.newest()
    assert newest is not None
    assert newest["counters"]["step"] == 3


@pytest.mark.parametrize("damage", ["truncate", "flip", "no manifest", "no state", "empty manifest"])
def test_a_damaged_one_is_passed_over_and_told(checkpoints: Checkpoints, told: list[str], damage: str) -> None:
    checkpoints.save(content(1))
    checkpoints.save(content(2))
    folder = checkpoints.folder(2)
    data = (folder / "state.pt").read_bytes()
    if damage == "truncate":
        (folder / "state.pt").write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        (folder / "state.pt").write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "empty manifest":
        (folder / "manifest.json").write_text("")
    else:
        (folder / "state.pt").unlink()
    newest = checkpoints.newest()
    assert newest is not None
    assert newest["counters"]["step"] == 1
    assert len(told) == 1
    assert "step-00000002" in told[0]
    assert "going back" in told[0]


def test_a_replacement_killed_between_its_renames_is_undone(checkpoints: Checkpoints) -> None:
    checkpoints.save(content(1))
    checkpoints.save(content(2))
    checkpoints.folder(2).rename(checkpoints.directory / ".step-00000002.old-77")
    again = Checkpoints(checkpoints.directory, 2, print)
    assert again.steps() == [2, 1]


def test_all_damaged_gives_none(checkpoints: Checkpoints, told: list[str]) -> None:
    checkpoints.save(content(1))
    (checkpoints.folder(1) / "state.pt").write_bytes(b"")
    assert checkpoints.newest() is None
    assert told


def test_a_full_disk_leaves_the_old_ones(
    checkpoints: Checkpoints, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(content(1))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.torch, "save", full)
    assert not checkpoints.save(content(2))
    assert "No space left" in told[0]
    assert checkpoints.steps() == [1]
    assert [entry.name for entry in checkpoints.directory.iterdir()] == ["step-00000001"]


def test_a_manifest_cannot_point_outside(checkpoints: Checkpoints) -> None:
    checkpoints.save(content(1))
    manifest = checkpoints.folder(1) / "manifest.json"
    manifest.write_text(json.dumps({"step": 1, "files": {"../../secret": "0"}}))
    with pytest.raises(FtlabError, match="outside"):
        read_checkpoint(checkpoints.folder(1))


def test_a_pickle_is_refused(checkpoints: Checkpoints) -> None:
    checkpoints.save(content(1))
    folder = checkpoints.folder(1)
    torch.save({"counters": Checkpoints}, folder / "state.pt")
    manifest = {"step": 1, "files": {"state.pt": module.sha256_file(folder / "state.pt")}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FtlabError, match="not a complete checkpoint"):
        read_checkpoint(folder)


def test_best_weights_round_trip_and_stay_while_needed(checkpoints: Checkpoints) -> None:
    weights = {"w": torch.arange(4.0)}
    assert checkpoints.save_best(1, weights)
    checkpoints.save(content(1, best=1))
    assert checkpoints.save_best(2, {"w": torch.zeros(4)})
    checkpoints.save(content(2, best=2))
    assert torch.equal(checkpoints.load_best(1)["w"], weights["w"])  # step-1 is kept, and calls it best
    checkpoints.save(content(3, best=2))
    assert not checkpoints.best_folder(1).exists()
    assert torch.equal(checkpoints.load_best(2)["w"], torch.zeros(4))


def test_non_finite_weights_are_never_the_best(checkpoints: Checkpoints) -> None:
    with pytest.raises(FtlabError, match="not finite"):
        checkpoints.save_best(1, {"w": torch.tensor([1.0, float("nan")])})
    assert not checkpoints.best_folder(1).exists()
