"""run.json: the record of a run, written whole and atomically at each change."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from ftlab.allocator import allocator_name
from ftlab.errors import FtlabError
from ftlab.files import atomic_write
from ftlab.training.precision import keeps_bf16

__all__ = ["RunRecord", "describe_machine", "peak_device_bytes", "peak_rss_bytes", "reset_peaks", "writable"]

_PACKAGES = ("ftlab", "torch", "numpy", "tokenizers", "safetensors", "gguf", "hydra-core", "sacrebleu", "rouge-score")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe_machine(device: torch.device, world: int) -> dict[str, Any]:
    """What the run ran on, without anything that identifies the machine itself."""
    import psutil

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "kind": device.type,
        "name": name,
        "cpu_cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "allocator": allocator_name(),
        "bf16": keeps_bf16(device),
        "world_size": world,
    }


def peak_rss_bytes() -> int:
    """The largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peaks(device: torch.device) -> None:
    """Count peak memory from now on; where the system cannot, the peak stays that of the whole process."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_bytes(device: torch.device) -> int:
    """The most memory that tensors took on the GPU so far, in bytes; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


class RunRecord:
    """The content of run.json; only the main rank writes it."""

    def __init__(self, run_dir: Path, *, enabled: bool = True, content: dict[str, Any] | None = None) -> None:
        self.path = run_dir / "run.json"
        self._enabled = enabled
        self.content: dict[str, Any] = content or {}
        if content is None and self.path.exists():
            try:
                self.content = json.loads(self.path.read_text("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise FtlabError(
                    f"{self.path} is not valid JSON ({error}); move the run folder away, or give another run_dir"
                ) from None

    @property
    def status(self) -> str | None:
        """running, finished, interrupted, failed; None before the first start."""
        return self.content.get("status")

    def begin(self, name: str, config_hash: str, device: torch.device, world: int) -> None:
        """Fill in what is known at the start."""
        self.update(
            format=1,
            name=name,
            status="running",
            command=_command(world),
            started=self.content.get("started", _now()),
            commit=_git("rev-parse", "HEAD"),
            dirty=bool(_git("status", "--porcelain", "--untracked-files=no")),
            packages=_versions(),
            device=describe_machine(device, world),
            config_hash=config_hash,
        )

    def update(self, **fields: Any) -> None:
        """Change some fields and write the file; dictionaries are merged one level deep."""
        for key, value in fields.items():
            old = self.content.get(key)
            self.content[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        if self._enabled:
            text = json.dumps(writable(self.content), indent=2, ensure_ascii=False, allow_nan=False)
            atomic_write(self.path, text + "\n")

    def try_update(self, **fields: Any) -> str:
        """Like `update`, for the end of a run that already failed: a disk error is returned as text, else ""."""
        try:
            self.update(**fields)
        except OSError as error:
            return f"{self.path} could not be written ({error.strerror or error})"
        return ""

    def end(self, status: str) -> str:
        """Note how the run ended and when, as `try_update` does."""
        return self.try_update(status=status, finished=_now())


def _command(world: int) -> str:
    """The command line that started this, as a user would type it."""
    start = (
        ["python"] if world == 1 else ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", str(world))]
    )
    return " ".join([*start, "-m", _module_name(), *(shlex.quote(argument) for argument in sys.argv[1:])])


def writable(value: Any) -> Any:
    """Content as JSON can hold it: a number that is not finite becomes the text nan, inf or -inf."""
    if isinstance(value, dict):
        return {key: writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [writable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _module_name() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return spec.name if spec is not None else "ftlab.train"
