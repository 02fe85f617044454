"""How the C library is built, kept and called: once, whole, and with a reason where it cannot be had."""

from __future__ import annotations

import functools
import os
import platform
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from ftlab_kernels import native
from ftlab_kernels.native import NativeError, call, library, why_not_native

from ftlab.errors import ConfigError
from ftlab.operators import TORCH, select

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; what was loaded before is forgotten, and remembered again afterwards."""
    folder = tmp_path / "kernels"
    monkeypatch.setenv("FTLAB_KERNELS_CACHE", str(folder))
    monkeypatch.setattr(native, "FLAGS", ("-O0", *native.FLAGS[1:]))
    monkeypatch.setattr(native, "_library", functools.cache(native._library.__wrapped__))
    return folder


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The compiler's calls that made something."""
    made: list[list[str]] = []
    run = native._run

    def spy(command: list[str]) -> subprocess.CompletedProcess[str]:
        if "-o" in command:
            made.append(command)
        return run(command)

    monkeypatch.setattr(native, "_run", spy)
    return made


def forget() -> None:
    native._library.cache_clear()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def works() -> None:
    """The library rounds and multiplies."""
    y = torch.empty(5)
    call("masked", torch.float32, torch.arange(5.0), y, torch.tensor([0b10111], dtype=torch.uint8), 2.0, 1, 5)
    assert y.tolist() == [0, 2, 4, 0, 8]


def program(path: Path, text: str) -> Path:
    """An executable script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# --- built once and kept ----------------------------------------------------------------------------------------------


def test_it_is_compiled_once(cache: Path, commands: list[list[str]]) -> None:
    library()
    works()
    assert len(files(cache)) == len(commands) == 1
    assert files(cache)[0].startswith("native-")
    first = (cache / files(cache)[0]).stat().st_mtime_ns
    library()
    forget()
    library()
    works()
    assert len(commands) == 1
    assert (cache / files(cache)[0]).stat().st_mtime_ns == first


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FTLAB_KERNELS_CACHE", str(tmp_path / "own"))
    assert native.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("FTLAB_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert native.cache_folder() == tmp_path / "shared" / "ftlab_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / ".cache" / "ftlab_kernels"


def test_without_a_home_it_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FTLAB_KERNELS_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", nowhere)
    assert "set FTLAB_KERNELS_CACHE" in str(why_not_native())


@pytest.mark.parametrize("flags, source", [(("-DOTHER",), ""), ((), "// another comment\n")], ids=["flags", "source"])
def test_another_source_or_flag_is_another_library(
    flags: tuple[str, ...], source: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library()
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in native.SOURCES:
        (folder / name).write_text((native.FOLDER / name).read_text() + source)
    monkeypatch.setattr(native, "FOLDER", folder)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, *flags))
    library()
    works()
    assert len(files(cache)) == 2


def built(cache: Path) -> Path:
    """The library, just made."""
    library()
    forget()
    return cache / files(cache)[0]


def elsewhere(cache: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> Path:
    """Another cache with these bytes as the library: what a process has loaded once it finds again by its path."""
    other = cache.with_name("other")
    other.mkdir()
    monkeypatch.setenv("FTLAB_KERNELS_CACHE", str(other))
    path = other / files(cache)[0]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9999])
def test_a_library_that_was_cut_short_is_made_again(
    share: float, cache: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To load some of these would end the process by SIGBUS."""
    whole = built(cache).read_bytes()
    path = elsewhere(cache, monkeypatch, whole[: int(share * len(whole))])
    library()
    works()
    assert len(commands) == 2
    assert files(path.parent) == [path.name]
    assert native._is_whole(path)


def test_a_changed_byte_is_noticed(cache: Path) -> None:
    path = built(cache)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    other = cache / "other.so"
    other.write_bytes(content)
    assert native._is_whole(path)
    assert not native._is_whole(other)
    assert not native._is_whole(cache / "missing.so")


def test_a_library_of_another_system_is_made_again(
    cache: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, but nothing that this system can load."""
    built(cache)
    native._seal(elsewhere(cache, monkeypatch, b"\x7fELF of another world"))
    library()
    works()
    assert len(commands) == 2


def test_two_processes_at_once(cache: Path) -> None:
    code = (
        "import torch; from ftlab_kernels import native; native.FLAGS = ('-O0', *native.FLAGS[1:])\n"
        "input(); native.library(); y = torch.empty(2)\n"
        "native.call('swiglu', torch.float32, torch.zeros(2), torch.ones(2), y, 2); print(y.tolist())"
    )
    run = functools.partial(
        subprocess.Popen, [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    processes = [run() for _ in range(2)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate()[0] == "[0.0, 0.0]\n"
        assert process.returncode == 0
    assert len(files(cache)) == 1
    assert native._is_whole(cache / files(cache)[0])


def test_threads_are_torchs_own() -> None:
    """One OpenMP library in the process: with two, torch.set_num_threads would not count for the C."""
    code = (
        "from ftlab_kernels.native import library; library()\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


# --- where it cannot be had -------------------------------------------------------------------------------------------


def refused(reason: str) -> None:
    """The library is not to be had for `reason`; a run takes torch and says why, and one that insists is stopped."""
    with pytest.raises(NativeError, match=reason):
        library()
    operators, line = select("auto", CPU)
    assert operators is TORCH
    assert line.startswith("kernels: torch, because ")
    assert str(why_not_native()) in line
    with pytest.raises(ConfigError, match=r"kernels=native: .*; use kernels=auto, .* or kernels=reference"):
        select("native", CPU)


def test_no_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    refused(r"no C compiler was found \(cc, gcc, clang\)")
    monkeypatch.setenv("CC", "my-cc -O2")
    refused(r"no C compiler was found \(my-cc\)")
    assert not cache.exists()


def test_the_compiler_may_bring_arguments(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CC="ccache gcc" is common."""
    real = native.find_compiler()[0]
    wrapper = program(tmp_path / "wrapper", 'shift; exec "$@"')
    monkeypatch.setenv("CC", f"{wrapper} -x {real} -DHERE")
    assert native.find_compiler() == (str(wrapper), "-x", real, "-DHERE")
    library()
    works()


def test_a_compiler_that_fails_is_quoted(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = program(tmp_path / "cc", "echo 'a warning' >&2; echo 'native.c: error: no omp.h' >&2; exit 1")
    monkeypatch.setenv("CC", str(compiler))
    refused(f"{compiler} does not compile the native kernels: native.c: error: no omp.h$")
    assert files(cache) == []
    program(tmp_path / "cc", "exit 1")
    refused("does not compile the native kernels: no message$")


def test_a_compiler_that_does_not_know_some_flags_is_asked_without_them(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = native.find_compiler()[0]
    refuse = 'case "$*" in *vector-width*) echo "error: unknown flag" >&2; exit 1;; esac'
    monkeypatch.setenv("CC", str(program(tmp_path / "cc", f'{refuse}\nexec {real} "$@"')))
    library()
    works()


def test_a_compiler_that_cannot_run(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_bytes(b"\x00\x01")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    refused(f"{compiler} cannot be run: Exec format error")


def test_a_cache_that_cannot_be_written(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    refused(f"cannot be kept in {cache}: ")


def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native.os, "fsync", full)
    refused("cannot be kept in .*No space left on device")
    assert files(cache) == []


def test_another_system(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    refused("built on Linux only, this is Darwin")


def test_a_kept_library_needs_no_writing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library()
    forget()

    def readonly(*arguments: object, **named: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(native.Path, "mkdir", readonly)
    monkeypatch.setattr(native.tempfile, "TemporaryDirectory", readonly)
    library()
    works()


# --- calling it -------------------------------------------------------------------------------------------------------


def test_what_has_no_address_to_read_on_from_is_refused() -> None:
    x = torch.ones(4, 6)
    for wrong in (x.t(), x[:, :3], x.expand(2, 4, 6)):
        with pytest.raises(ValueError, match="needs contiguous CPU tensors"):
            call("swiglu", torch.float32, wrong, x, x, 24)
    with pytest.raises(ValueError, match="needs contiguous CPU tensors"):
        call("swiglu", torch.float32, x.to("meta"), x, x, 24)
    with pytest.raises(AttributeError):
        call("no_such_function", torch.float32, x)


# --- both wheels carry the sources ------------------------------------------------------------------------------------


@pytest.mark.parametrize("project", [ROOT, ROOT / "kernels"], ids=["ftlab", "ftlab-kernels"])
def test_the_sources_are_in_the_wheel_and_compile_there(project: Path, tmp_path: Path) -> None:
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        wheel.extractall(tmp_path / "site")
    package = tmp_path / "site" / "ftlab_kernels"
    for name in native.SOURCES:
        assert (package / name).read_bytes() == (native.FOLDER / name).read_bytes()
    code = (
        "from ftlab_kernels import native; native.FLAGS = ('-O0', *native.FLAGS[1:]); native.library()\n"
        "print(native.FOLDER)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "site"),
        "FTLAB_KERNELS_CACHE": str(tmp_path / "kernels"),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == f"{package}\n", done.stderr
    assert len(files(tmp_path / "kernels")) == 1
