from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from ftlab.files import atomic_directory, atomic_path, atomic_write, one_place, sha256_bytes, sha256_file


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_write_replaces_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old\r\n")
    assert path.read_bytes() == b"old\r\n"
    path.chmod(0o640)
    atomic_write(path, "新".encode())
    assert path.read_text(encoding="utf-8") == "新"
    assert path.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["a.txt"]


def test_new_file_has_the_permissions_of_a_plain_open(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    atomic_write(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_directory_appears_whole_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("1")
        assert not target.exists()
    with atomic_directory(target) as folder:
        (folder / "b").write_text("2")
        assert (target / "inner" / "a").read_text() == "1"
    assert names(tmp_path) == ["model"]
    assert names(target) == ["b"]


def test_directory_is_removed_on_failure_and_the_old_one_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")

    def interrupted() -> None:
        with atomic_directory(target) as folder:
            (folder / "b").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["model"]
    assert names(target) == ["a"]


def test_directory_moves_the_old_one_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    with atomic_directory(target) as folder:
        (folder / "a").write_text("1")
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if ".tmp-" in self.name:
            raise OSError("refused")
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="refused"), atomic_directory(target) as folder:
        (folder / "b").write_text("2")
    assert names(tmp_path) == ["model"]
    assert names(target) == ["a"]


def test_hashes(tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == sha256_bytes(data) == hashlib.sha256(data).hexdigest()


def test_files_in_a_folder_get_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    with atomic_directory(tmp_path / "folder") as folder:
        (folder / "private").touch(mode=0o600)
    assert (tmp_path / "folder" / "private").stat().st_mode == plain.stat().st_mode


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two hosts that share a folder two processes may have the same id."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "a.txt"
    with atomic_path(path) as one, atomic_path(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # whose block ended last
    assert names(tmp_path) == ["a.txt"]


def test_two_spellings_of_one_place_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r" / "a").mkdir(parents=True)
    (tmp_path / "link").symlink_to("r")
    assert one_place(["r/a", "r/b", "r"]) is None
    for other in ("r/a", "r/a/", "./r/a", "r/../r/a", "link/a", str(tmp_path / "r" / "a")):
        assert one_place(["r/b", "r/a", other]) == ("r/a", other)
