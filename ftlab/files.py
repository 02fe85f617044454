"""Files and folders that are either whole or absent, and their hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = [
    "atomic_directory",
    "atomic_path",
    "atomic_write",
    "clean_leftovers",
    "one_place",
    "sha256_bytes",
    "sha256_file",
]

READ_BYTES = 1 << 20


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def default_mode() -> int:
    """Permission bits that a plain `open` would give a new file under the present umask."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling path to write a file at; it becomes `path` when the block ends well.

    A reader sees the old content or the new, never a part, also after a power cut. The parent folder must exist. An
    existing file keeps its permission bits. On any error the old file is untouched and no temporary file is left.
    Several writers, on hosts that share a folder too, do not meet: each has a name of its own, and the last one wins.
    """
    target = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.tmp-", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        mode = stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        mode = default_mode()
    try:
        yield temporary
        fsync_path(temporary)
        temporary.chmod(mode)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(target.parent)


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write a whole file by `atomic_path`. Text is written as UTF-8 with its newlines unchanged."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


def settle_tree(directory: Path) -> None:
    """Flush every file and folder under `directory`, itself included, and give files their ordinary permissions.

    Some libraries write files that only their owner may read; here that would follow the file into a shared folder.
    """
    mode = default_mode()
    for folder, _, names in os.walk(directory):
        for name in names:
            file = Path(folder) / name
            if not file.is_symlink():
                file.chmod(mode | (file.stat().st_mode & 0o111))
                fsync_path(file)
        fsync_path(Path(folder))


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Give a temporary sibling folder that becomes `path` when the block ends well and vanishes when it does not.

    Files and folders are flushed before the rename. A folder already at `path` is moved aside (`.name.old-<pid>`),
    replaced, then deleted; if the replacement fails it is moved back. The parent folder must exist.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    for leftover in (temporary, old):  # of a killed process that had the same id
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        settle_tree(temporary)
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            with suppress(FileNotFoundError):
                old.rename(target)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_path(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def clean_leftovers(directory: Path, names: Iterable[str] = ("*",)) -> None:
    """Remove, or put back, what killed processes left of writing files and folders of these names in `directory`.

    The names may be patterns. Call it where no other process can be writing one of them.
    """
    for name in names:
        for leftover in list(directory.glob(f".{name}.tmp-*")):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
        for moved in list(directory.glob(f".{name}.old-*")):  # killed at a replacement, perhaps between its two renames
            target = directory / moved.name[1:].rsplit(".old-", 1)[0]
            if target.exists():
                shutil.rmtree(moved, ignore_errors=True)
            else:
                moved.rename(target)


def one_place(paths: Iterable[str | Path]) -> tuple[str, str] | None:
    """The first two paths that lead to one place, however they are spelt; None: each leads to its own."""
    seen: dict[Path, str] = {}
    for path in paths:
        first = seen.get(place := Path(path).resolve())
        if first is not None:
            return first, str(path)
        seen[place] = str(path)
    return None


def sha256_bytes(data: bytes) -> str:
    """The sha256 of `data`, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits; reads one mebibyte at a time."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
