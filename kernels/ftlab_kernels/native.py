"""Compile native.c on this machine, once, and call it with tensors.

The library takes about a second to compile and is kept in `$FTLAB_KERNELS_CACHE`, else
`$XDG_CACHE_HOME/ftlab_kernels`, else `~/.cache/ftlab_kernels`, under a hash of the source, the compiler, its flags
and the processor. It needs a C compiler (`$CC`, else cc, gcc or clang); `why_not_native` says what is missing where
there is none. OpenMP's threads are torch's own: torch has loaded its libgomp before, and a process has one library of
that name.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["SUFFIXES", "NativeError", "cache_folder", "call", "library", "why_not_native"]

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
SOURCES = ("native.c", "native_adamw.h", "native_ops.h")
FOLDER = Path(__file__).parent  # where they lie
FLAGS = (
    *("-O3", "-std=c11", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"),
    "-ffp-contract=off",  # gcc's default for c11 and not clang's: products and sums round apart, as torch's do
)
FOR_THIS_CPU = ("-march=native", "-mcpu=native")  # the first that the compiler takes
_WIDE = "-mprefer-vector-width=512"
_SEAL_BYTES = hashlib.sha256().digest_size


class NativeError(RuntimeError):
    """The library cannot be had here; the message says why."""


def cache_folder() -> Path:
    """Where compiled libraries are kept. Errors: NativeError where there is no home."""
    own = os.environ.get("FTLAB_KERNELS_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(shared) if shared else Path.home() / ".cache") / "ftlab_kernels"
    except RuntimeError as error:
        raise NativeError(f"no folder to keep the native kernels in ({error}); set FTLAB_KERNELS_CACHE") from error


def why_not_native() -> str | None:
    """Why the library cannot be had here; None if it can. Compiles it if that was not done yet."""
    try:
        library()
    except NativeError as error:
        return str(error)
    return None


def library() -> ctypes.CDLL:
    """The library, compiled if need be. Errors: NativeError."""
    return _library(FOLDER)


@functools.cache
def _library(folder: Path) -> ctypes.CDLL:
    """The library of the sources in `folder`."""
    if platform.system() != "Linux":
        raise NativeError(f"the native kernels are built on Linux only, this is {platform.system()}")
    compiler, cache = find_compiler(), cache_folder()
    path = cache / f"native-{_identity(folder, compiler)}.so"
    try:
        if _is_whole(path):
            with contextlib.suppress(OSError):  # from another system that shares this folder: made again
                return ctypes.CDLL(str(path))
        cache.mkdir(parents=True, exist_ok=True)
        build(compiler, path, folder)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"the native kernels cannot be kept in {cache}: {error}") from error


def find_compiler() -> tuple[str, ...]:
    """The C compiler's path, and the arguments that $CC gives it. Errors: NativeError if there is none."""
    wanted = shlex.split(os.environ.get("CC", ""))
    for name, *arguments in [wanted] if wanted else [["cc"], ["gcc"], ["clang"]]:
        found = shutil.which(name)
        if found:
            return (found, *arguments)
    raise NativeError(f"no C compiler was found ({wanted[0] if wanted else 'cc, gcc, clang'})")


def build(compiler: Sequence[str], path: Path, folder: Path | None = None) -> None:
    """Compile the sources in `folder` (this one's) into `path`, which appears complete or not at all.

    Errors: NativeError with the compiler's words; OSError where `path` cannot be written.
    """
    source = str((folder or FOLDER) / SOURCES[0])
    said: list[str] = []
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch, path.name)
        for tune in ((FOR_THIS_CPU[0], _WIDE), (FOR_THIS_CPU[0],), (FOR_THIS_CPU[1],)):
            done = _run([*compiler, *FLAGS, *tune, "-o", str(made), source, "-lm"])
            if done.returncode == 0:
                _seal(made)
                made.replace(path)
                return
            lines = done.stderr.strip().splitlines() or ["no message"]
            said.append(next((line for line in lines if "error" in line), lines[0]))
    raise NativeError(f"{compiler[0]} does not compile the native kernels: {'; '.join(dict.fromkeys(said))}")


def _seal(path: Path) -> None:
    """Put the hash of a library behind it, where the loader does not look, and all of it on the disk."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    with path.open("ab") as written:
        written.write(digest)
        written.flush()
        os.fsync(written.fileno())


def _is_whole(path: Path) -> bool:
    """Whether a sealed library is there as it was made: to load one that was cut short can kill the process."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-_SEAL_BYTES]).digest() == content[-_SEAL_BYTES:]


def _identity(folder: Path, compiler: Sequence[str]) -> str:
    """What the library's bytes depend on, in 20 letters."""
    source = b"".join((folder / name).read_bytes() for name in SOURCES)
    words = "\n".join([_run([*compiler, "--version"]).stdout, *compiler, *FLAGS, _WIDE, _processor()])
    return hashlib.sha256(source + words.encode()).hexdigest()[:20]


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise NativeError(f"{command[0]} cannot be run: {error.strerror or error}") from error


def _processor() -> str:
    """What -march=native depends on: the processor's feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


@functools.cache
def _function(found: ctypes.CDLL, name: str, dtype: torch.dtype) -> Any:
    function = getattr(found, f"{name}_{SUFFIXES[dtype]}")
    function.restype = None
    return function


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Call a function of the library: tensors by address, whole numbers as int64, others as float, None as NULL.

    Errors: ValueError for a tensor that is not contiguous or not on the CPU: the library would read other memory.
    """
    _function(library(), name, dtype)(*map(_converted, arguments))


def _converted(argument: Tensor | int | float | None) -> Any:
    if isinstance(argument, Tensor):
        if not argument.is_contiguous() or argument.device.type != "cpu":
            raise ValueError(f"a native kernel needs contiguous CPU tensors, not {tuple(argument.stride())}")
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return None
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
