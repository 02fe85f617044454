"""Which way the large products of `ftlab_kernels.lora` go: each way is timed once for a shape on the device at hand.

cuBLAS multiplies faster than a Triton kernel, which needs fewer passes over memory; which gain is larger depends on the
shape, the GPU and the versions. So the first call with a shape runs both ways on its own tensors and keeps what is
faster, here and in a file for later runs, so that those take the same way and give the same bits.

A shape is M rounded up to a power of two, N, K, R, the dtype and what else the product does. The file is
`lora_plan.json` in $FTLAB_KERNELS_CACHE or ~/.cache/ftlab_kernels; its entries hold for one GPU name, one triton and
one torch. What cannot be read is measured again. $FTLAB_LORA_PATH=cublas, triton or augmented decides without
measuring. Inside a CUDA graph capture and where nothing can be timed, an unknown shape takes cuBLAS.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ftlab_kernels.common import HAS_TRITON, INTERPRETED, next_power_of_2, triton

__all__ = ["DEFAULT", "PATHS", "Product", "cache_file", "chosen", "forget", "plan", "requested"]

PATHS = ("cublas", "triton", "augmented")
DEFAULT = "cublas"
PATH_VARIABLE = "FTLAB_LORA_PATH"
CACHE_VARIABLE = "FTLAB_KERNELS_CACHE"
WARM_UPS, REPEATS = 3, 9

Candidates = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Product:
    """A product with M = rows, N = features, K = columns. kind: forward or input_gradient, and what else it does."""

    kind: str
    rows: int
    features: int
    columns: int
    rank: int
    dtype: torch.dtype
    device: torch.device

    @property
    def key(self) -> str:
        """The shape as it is looked up, with the rows in their bucket."""
        sizes = f"M<={next_power_of_2(self.rows)} N={self.features} K={self.columns} r={self.rank}"
        return f"{self.kind} {sizes} {str(self.dtype).removeprefix('torch.')}"


_known: dict[str, dict[str, dict[str, Any]]] = {}  # device -> product -> {path, microseconds}
_reported: dict[str, dict[str, Any]] = {}


def requested(path: str | None) -> str | None:
    """The way that an argument or else $FTLAB_LORA_PATH asks for; None if neither does. Errors: ValueError."""
    wanted = path or os.environ.get(PATH_VARIABLE) or None
    if wanted is not None and wanted not in PATHS:
        where = "path" if path else f"${PATH_VARIABLE}"
        raise ValueError(f"{where} must be one of {', '.join(PATHS)}, not {wanted!r}")
    return wanted


def plan(product: Product, candidates: Candidates, wanted: str | None = None) -> str:
    """The name of the candidate to take.

    candidates: by name, functions that compute the product on the tensors of this call; they are called several times
    where the shape is new. wanted: a name that decides (`requested`).
    """
    if wanted is not None:
        return _report(product, wanted, "requested")
    device = _device_key(product.device)
    if device not in _known:
        _known[device] = _read().get(device, {})
    entry = _known[device].get(product.key)
    if entry is not None and entry["path"] in candidates:
        return _report(product, entry["path"], entry.get("from", "file"), entry)
    if not _can_time(product.device):
        return _report(product, DEFAULT, "default")
    times, failed = {}, {}
    for name, candidate in candidates.items():
        try:
            times[name] = round(_time(candidate, product.device), 2)
        except Exception as error:  # such as a GPU with too little shared memory: the other way may do
            failed[name] = f"{type(error).__name__}: {error}"
    path = min(times, key=lambda name: times[name], default=DEFAULT)
    entry = {"path": path, "microseconds": times, **({"failed": failed} if failed else {})}
    _known[device][product.key] = {**entry, "from": "measured"}
    if times:
        _write(device, product.key, entry)
    return _report(product, path, "measured", entry)


def chosen() -> dict[str, dict[str, Any]]:
    """What every product of this process took last: {product: {path, from, ...}}, for a run's summary.

    from: measured, file, requested or default. microseconds: of every way that was timed. failed: what went wrong with
    a way.
    """
    return {key: dict(entry) for key, entry in _reported.items()}


def forget() -> None:
    """Drop what this process knows and has reported; the file stays."""
    _known.clear()
    _reported.clear()


def _report(product: Product, path: str, source: str, entry: Mapping[str, Any] | None = None) -> str:
    _reported[product.key] = {**(entry or {}), "path": path, "from": source}
    return path


# --- timing -----------------------------------------------------------------------------------------------------------


def _can_time(device: torch.device) -> bool:
    return device.type == "cuda" and not INTERPRETED and not torch.cuda.is_current_stream_capturing()


def _time(candidate: Callable[[], Any], device: torch.device) -> float:
    """Median microseconds."""
    with torch.cuda.device(device):
        for _ in range(WARM_UPS):
            candidate()
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS)]
        for start, end in zip(starts, ends, strict=True):
            start.record()
            candidate()
            end.record()
        torch.cuda.synchronize()
    return 1000 * float(statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)))


@functools.cache
def _device_key(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, triton {triton.__version__ if HAS_TRITON else 'none'}, torch {torch.__version__}"


# --- the file ---------------------------------------------------------------------------------------------------------


def cache_file() -> Path:
    """Where the choices are kept."""
    folder = os.environ.get(CACHE_VARIABLE)
    return (Path(folder) if folder else Path.home() / ".cache" / "ftlab_kernels") / "lora_plan.json"


def _read() -> dict[str, dict[str, dict[str, Any]]]:
    """The entries of the file that make sense; none if there is no such file or it is broken."""
    try:
        content = json.loads(cache_file().read_text("utf-8"))
    except (OSError, RuntimeError, ValueError):  # RuntimeError: no home folder
        return {}
    if not isinstance(content, dict):
        return {}
    return {
        device: {key: entry for key, entry in entries.items() if _makes_sense(entry)}
        for device, entries in content.items()
        if isinstance(entries, dict)
    }


def _makes_sense(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("path") in PATHS and isinstance(entry.get("microseconds"), dict)


def _write(device: str, key: str, entry: dict[str, Any]) -> None:
    """Add an entry to what the file holds now, in one step; a folder that cannot be written is no error."""
    content = _read()
    content.setdefault(device, {})[key] = entry
    with contextlib.suppress(OSError, RuntimeError):
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(content, stream, indent=1, sort_keys=True)
            Path(temporary).replace(file)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
