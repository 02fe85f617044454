"""Compile native.c on this machine, once, and call it with tensors.

The library takes about a second to compile and is kept in `$FTLAB_KERNELS_CACHE`, else
`$XDG_CACHE_HOME/ftlab_kernels`, else `~/.cache/ftlab_kernels`, under a hash of the source, the compiler, its flags
and the processor. It needs a C compiler (`$CC`, else cc, gcc or clang); `why_not_native` says what is missing where
there is none. OpenMP's threads are torch's own: torch has loaded its libgomp before, and a process has one library of
that name.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["SUFFIXES", "NativeError", "cache_folder", "call", "library", "why_not_native"]

SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
SOURCES = ("native.c", "native_ops.h")
FLAGS = ("-O3", "-std=c11", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
FOR_THIS_CPU = ("-march=native", "-mcpu=native")  # the first that the compiler takes
_WIDE = "-mprefer-vector-width=512"


class NativeError(RuntimeError):
    """The library cannot be had here; the message says why."""


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    own = os.environ.get("FTLAB_KERNELS_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "ftlab_kernels"


def why_not_native() -> str | None:
    """Why the library cannot be had here; None if it can. Compiles it if that was not done yet."""
    try:
        library()
    except NativeError as error:
        return str(error)
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The library, compiled if need be. Errors: NativeError."""
    if platform.system() != "Linux":
        raise NativeError(f"the native kernels are built on Linux only, this is {platform.system()}")
    compiler = find_compiler()
    source = b"".join(Path(__file__).with_name(name).read_bytes() for name in SOURCES)
    identity = "\n".join([_version(compiler), " ".join(FLAGS), _WIDE, _processor()]).encode()
    path = cache_folder() / f"native-{hashlib.sha256(source + identity).hexdigest()[:20]}.so"
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            pass  # cut short by a full disk, or from another system: made again below
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        build(compiler, path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeError(f"the native kernels cannot be kept in {path.parent}: {error}") from error


def find_compiler() -> str:
    """The C compiler's path. Errors: NativeError if there is none."""
    wanted = os.environ.get("CC")
    for name in (wanted,) if wanted else ("cc", "gcc", "clang"):
        found = shutil.which(name)
        if found:
            return found
    raise NativeError(f"no C compiler was found ({wanted or 'cc, gcc, clang'})")


def build(compiler: str, path: Path) -> None:
    """Compile into `path`, which appears complete or not at all. Errors: NativeError with the compiler's words."""
    said = ""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        for tune in ((FOR_THIS_CPU[0], _WIDE), (FOR_THIS_CPU[0],), (FOR_THIS_CPU[1],)):
            source = str(Path(__file__).with_name(SOURCES[0]))
            command = [compiler, *FLAGS, *tune, "-o", str(made), source, "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                with made.open("rb") as written:
                    os.fsync(written.fileno())
                made.replace(path)
                return
            said = said or done.stderr.strip()
    raise NativeError(f"{compiler} does not compile the native kernels: {(said.splitlines() or ['no message'])[0]}")


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return done.stdout


def _processor() -> str:
    """What -march=native depends on: the processor's feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


@functools.cache
def _function(name: str, dtype: torch.dtype) -> Any:
    function = getattr(library(), f"{name}_{SUFFIXES[dtype]}")
    function.restype = None
    return function


def call(name: str, dtype: torch.dtype, *arguments: Tensor | int | float | None) -> None:
    """Call a function of the library: tensors by address, whole numbers as int64, others as float, None as NULL.

    Errors: ValueError for a tensor that is not contiguous or not on the CPU: the library would read other memory.
    """
    _function(name, dtype)(*map(_converted, arguments))


def _converted(argument: Tensor | int | float | None) -> Any:
    if isinstance(argument, Tensor):
        if not argument.is_contiguous() or argument.device.type != "cpu":
            raise ValueError(f"a native kernel needs contiguous CPU tensors, not {tuple(argument.stride())}")
        return ctypes.c_void_p(argument.data_ptr())
    if argument is None:
        return None
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
