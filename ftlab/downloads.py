"""Fetching a wheel: pip finds it, a resumable download brings it.

pip is asked for the address because it knows the user's index, proxies and certificates; no host name is written here.
The download itself is done here because pip can neither continue a broken one nor leave the archive unread.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from os import environ
from pathlib import Path
from typing import BinaryIO, Protocol

from ftlab.errors import FtlabError
from ftlab.files import sha256_file

__all__ = ["RefusedError", "Wheel", "download", "fetch_npm", "fetch_wheel", "find_wheel"]

READ_BYTES = 1 << 18
TIMEOUT_SECONDS = 60.0
ATTEMPTS = 5
# pip's words when it cannot reach the index; all else it says is about the package.
NETWORK_WORDS = (
    *("connection broken", "NewConnectionError", "Max retries exceeded", "ConnectTimeout", "ProxyError"),
    *("Failed to establish", "SSLError", "ReadTimeout", "ConnectionResetError", "Temporary failure"),
)
# npm's codes for the same.
NPM_NETWORK_WORDS = ("ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "EAI_AGAIN", "ENETUNREACH", "ERR_SOCKET")


class RefusedError(Exception):
    """A direct download that cannot work here, where pip's own may (credentials, certificates, proxies)."""


class Advance(Protocol):
    """Takes the bytes present and the bytes expected (None if the server does not say)."""

    def __call__(self, done: int, total: int | None) -> None: ...


@dataclass(frozen=True)
class Wheel:
    """Where a wheel is and its sha256, if the index gives one."""

    url: str
    sha256: str | None

    @property
    def filename(self) -> str:
        """The wheel's own name."""
        return Path(urllib.parse.unquote(urllib.parse.urlsplit(self.url).path)).name


def pip_command() -> list[str]:
    """How to call pip: this interpreter's, else one on the PATH (an environment made without pip has none)."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip", "pip3"):
        if found := shutil.which(name):
            return [found]
    raise FtlabError(f"pip is needed to fetch packages and is not installed: run {sys.executable} -m ensurepip")


def run_pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pip without its update notice and without a prompt."""
    command = [*pip_command(), *arguments, "--disable-pip-version-check", "--no-input", "--retries", "2"]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)


def fetch_wheel(name: str, version: str, folder: Path, progress: bool) -> Path:
    """The wheel of `name` at `version` as a file under `folder`, its hash checked against the index's.

    A partial file of an earlier, broken attempt is continued.

    Raises:
        ConnectionError: the index cannot be reached.
        FtlabError: it has no such wheel, or what came is not what it promised.
    """
    wheel = find_wheel(name, version)
    if wheel is None:
        return pip_download(name, version, folder)
    target = folder / wheel.filename
    try:
        resumed = download(wheel, target, progress)
        if resumed and not matches(wheel, target):  # the earlier part was damaged: once more from the start
            target.unlink()
            download(wheel, target, progress)
    except RefusedError:
        return pip_download(name, version, folder)
    if not matches(wheel, target):
        found = sha256_file(target)
        target.unlink()
        raise FtlabError(
            f"{wheel.filename} has another hash than its index says: expected {wheel.sha256}, got {found}; "
            "nothing was kept"
        )
    return target


def matches(wheel: Wheel, path: Path) -> bool:
    """Whether the file has the hash that the index gave (true if it gave none: the member's hash is checked anyway)."""
    return wheel.sha256 is None or sha256_file(path) == wheel.sha256


def find_wheel(name: str, version: str) -> Wheel | None:
    """Ask pip where the wheel is; None if this pip is too old to say."""
    done = run_pip(
        *("install", "--dry-run", "--ignore-installed", "--no-deps", "--only-binary", ":all:"),
        *("--ignore-requires-python", "--quiet", "--report", "-", f"{name}=={version}"),
    )
    if done.returncode != 0:
        if "no such option" in done.stderr:
            return None
        raise pip_error(f"{name}=={version}", done.stderr)
    try:
        information = json.loads(done.stdout[done.stdout.index("{") :])["install"][0]["download_info"]
        archive = information.get("archive_info", {})
        digest = archive.get("hashes", {}).get("sha256")
        return Wheel(information["url"], digest)
    except (ValueError, KeyError, IndexError):
        return None


def pip_error(wanted: str, stderr: str) -> Exception:
    """ConnectionError if pip could not reach its index, else FtlabError with what it said."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    reason = errors[-1] if errors else (lines[-1] if lines else "no message")
    if any(word in stderr for word in NETWORK_WORDS):
        return ConnectionError("the package index cannot be reached")
    return FtlabError(f"pip finds no wheel of {wanted}: {reason}")


def pip_download(name: str, version: str, folder: Path) -> Path:
    """Let pip download the wheel: slower to recover, but with all of pip's credentials."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        done = run_pip(
            *("download", "--no-deps", "--only-binary", ":all:", "--ignore-requires-python"),
            *("--quiet", "--dest", temporary, f"{name}=={version}"),
        )
        if done.returncode != 0:
            raise pip_error(f"{name}=={version}", done.stderr)
        wheels = list(Path(temporary).glob("*.whl"))
        if len(wheels) != 1:
            raise FtlabError(f"pip downloaded {len(wheels)} wheels of {name}=={version} where 1 was expected")
        return wheels[0].replace(folder / wheels[0].name)


def fetch_npm(name: str, version: str, folder: Path, progress: bool) -> Path:
    """The archive of an npm package as npm fetches it, with the user's registry, proxies and certificates.

    npm checks it against what the registry says; nothing of the package is installed or run.

    Raises:
        ConnectionError: the registry cannot be reached.
        FtlabError: npm is not there, or there is no such package.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FtlabError(
            f"npm is needed to fetch {name} {version} and is not on the PATH: install Node.js, or copy the cache "
            "folder of a machine that has it (FTLAB_CACHE names it)"
        )
    if progress:
        print(f"fetching {name} {version} with npm", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [
            npm,
            "pack",
            f"{name}@{version}",
            "--pack-destination",
            temporary,
            "--loglevel=error",
            "--ignore-scripts",
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False, cwd=temporary
        )
        archives = list(Path(temporary).glob("*.tgz"))
        if done.returncode != 0 or len(archives) != 1:
            said = done.stderr.strip() or "no message"
            if any(word in said for word in NPM_NETWORK_WORDS):
                raise ConnectionError("npm's registry cannot be reached")
            lines = [line.removeprefix("npm error").strip() for line in said.splitlines()]
            raise FtlabError(f"npm finds no {name} {version}: {next(filter(None, lines), said)}")
        return archives[0].replace(folder / archives[0].name)


def download(wheel: Wheel, target: Path, progress: bool) -> bool:
    """Bring `wheel.url` to `target`; whether an earlier partial file was continued.

    The bytes gather in ``<target>.part``, which survives a broken connection and a killed process.

    Raises:
        RefusedError: the server, its certificate or the address wants what only pip has.
        ConnectionError: the connection broke `ATTEMPTS` times without a new byte.
    """
    parts = urllib.parse.urlsplit(wheel.url)
    if parts.scheme == "file":
        shutil.copyfile(urllib.request.url2pathname(parts.path), target)
        return False
    if parts.scheme not in ("http", "https") or "@" in parts.netloc:
        raise RefusedError("needs credentials or another protocol")
    key = hashlib.sha256((wheel.sha256 or wheel.url).encode()).hexdigest()[:12]
    partial = target.with_name(f"{target.name}.{key}.part")
    resumed = partial.exists() and partial.stat().st_size > 0
    with shown(wheel.filename, progress) as advance:
        failures = 0
        while True:
            before = partial.stat().st_size if partial.exists() else 0
            try:
                if receive(wheel.url, partial, advance):
                    break
                raise ConnectionError("it ended early")
            except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
                check_refusal(error)
                after = partial.stat().st_size if partial.exists() else 0
                failures = 0 if after > before else failures + 1
                if failures >= ATTEMPTS:
                    raise ConnectionError(f"the download of {wheel.filename} broke off: {error}") from error
                time.sleep(0.2 * 2**failures)
    partial.replace(target)
    return resumed


def check_refusal(error: Exception) -> None:
    """Raise RefusedError for what another attempt here cannot change."""
    if isinstance(error, urllib.error.HTTPError):
        if error.code < 500 and error.code not in (408, 429):
            raise RefusedError(f"HTTP status {error.code}") from error
    elif isinstance(error, urllib.error.URLError):
        # pip has just reached the index: it may know a proxy or a certificate that this process does not.
        raise RefusedError(str(error.reason)) from error


def ssl_context() -> ssl.SSLContext:
    """The system's certificates plus those the user named for pip."""
    context = ssl.create_default_context()
    for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE"):
        if (path := environ.get(name)) and Path(path).is_file():
            context.load_verify_locations(path)
    return context


def receive(url: str, partial: Path, advance: Advance) -> bool:
    """One request: append to `partial` from where it ends; whether the file is now whole."""
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "ftlab", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    context = ssl_context() if url.startswith("https:") else None
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS, context=context)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the partial file is longer than the file: begin again
            partial.unlink(missing_ok=True)
            return receive(url, partial, advance)
        raise
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0  # the server sends the whole file
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with partial.open("r+b" if start else "wb") as file:
            file.seek(start)
            return copy_stream(response, file, start, total, advance)


def copy_stream(response: HTTPResponse, file: BinaryIO, done: int, total: int | None, advance: Advance) -> bool:
    """Write the body to `file`; whether it reached its announced length."""
    while block := response.read1(READ_BYTES):
        file.write(block)
        done += len(block)
        advance(done, total)
    return total is None or done == total


@contextmanager
def shown(name: str, progress: bool) -> Iterator[Advance]:
    """A progress bar on a terminal, one line elsewhere, nothing if not asked for."""

    def silent(done: int, total: int | None) -> None:
        return None

    if not progress:
        yield silent
        return
    if not sys.stderr.isatty():
        print(f"downloading {name}", file=sys.stderr, flush=True)
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=None)

        def advance(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        yield advance
