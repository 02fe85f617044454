"""`npm:` locations: what a stand-in for npm packs is checked, kept whole, and used without it afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftlab.assets import cache_folder, describe, parse_location, resolve
from ftlab.errors import ConfigError, FtlabError
from ftlab.files import sha256_bytes


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FTLAB_OFFLINE", raising=False)


def npm(digest: str) -> str:
    return f"npm:@scope/demo==1.0.0#sha256={digest}"


@pytest.fixture
def npm_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npm on the PATH that packs `content`, or fails with the text of `failure`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "content").write_bytes(b"an archive")
    script = f"""#!/bin/sh
echo "$@" >> {folder}/calls
if [ -f {folder}/failure ]; then cat {folder}/failure >&2; exit 1; fi
cp {folder}/content "$4/scope-demo-1.0.0.tgz"
"""
    (folder / "npm").write_text(script)
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


def test_an_npm_archive_is_kept_whole_and_used_without_npm_afterwards(npm_command: Path) -> None:
    digest = sha256_bytes(b"an archive")
    path = resolve(npm(digest), progress=False)
    assert path.read_bytes() == b"an archive"
    assert path.relative_to(cache_folder()).as_posix() == f"npm/@scope--demo-1.0.0/{digest[:16]}/package.tgz"
    assert (npm_command / "calls").read_text().startswith("pack @scope/demo@1.0.0 --pack-destination")
    assert resolve(npm(digest), offline=True) == path
    assert describe(npm(digest))["sha256"] == digest
    assert not list((cache_folder() / "partial").iterdir())


def test_an_npm_archive_of_another_hash_is_not_kept(npm_command: Path) -> None:
    with pytest.raises(FtlabError, match=r"the archive has another hash: expected 0000.*nothing was kept"):
        resolve(npm("0" * 64), progress=False)
    assert not list(cache_folder().rglob("*.tgz"))


def test_what_npm_says_is_told(npm_command: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (npm_command / "failure").write_text("npm error code E404\nnpm error 404 Not Found\n")
    with pytest.raises(FtlabError, match=r"npm finds no @scope/demo 1\.0\.0: code E404"):
        resolve(npm("0" * 64), progress=False)
    (npm_command / "failure").write_text("npm error code ECONNREFUSED\n")
    with pytest.raises(FtlabError, match=r"is not in the cache .* and npm's registry cannot be reached"):
        resolve(npm("0" * 64), progress=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(FtlabError, match=r"npm is needed to fetch @scope/demo 1\.0\.0"):
        resolve(npm("0" * 64), progress=False)


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("npm:demo@1.0#sha256=" + "0" * 64, "expected npm:name==version"),
        ("npm:demo==1.0", "must pin its archive"),
        ("npm:../demo==1.0#sha256=" + "0" * 64, "expected npm:name==version"),
    ],
)
def test_npm_locations_are_checked(location: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_location(location)
