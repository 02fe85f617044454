"""What a record says of its origin, and writing it in one piece. Needs neither torch nor ftlab."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "ROOT", "commit", "now", "packages", "read", "smi", "write", "write_text"]

FORMAT = 1
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "liger-kernel", "bitsandbytes", "unsloth", "pytest")
SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def commit() -> dict[str, Any]:
    """commit: of git here, else $FTLAB_COMMIT, else None. dirty: whether tracked files differ; None without git."""
    try:
        found = _git("rev-parse", "HEAD").strip()
        dirty: bool | None = bool(_git("status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.SubprocessError):
        found, dirty = os.environ.get("FTLAB_COMMIT", ""), None
    return {"commit": found or None, "dirty": dirty}


def _git(*words: str) -> str:
    answer = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=20)
    return answer.stdout


def packages() -> dict[str, str | None]:
    """Versions of Python and of what is compared; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def smi() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU's clocks, heat and power; it is only asked, nothing is set."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        words = [program, f"--query-gpu={SMI}", "--format=csv,noheader", "--id=0"]
        answer = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    values = [word.strip() for word in answer.stdout.strip().split(",")]
    return dict(zip(SMI.split(","), values, strict=False))


def read(path: Path) -> dict[str, Any] | None:
    """A record; None if there is none or it is broken."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("name") == "gpu_suite" else None


def write(path: Path, content: dict[str, Any]) -> None:
    """A record as JSON; a section that is stopped in the middle of it leaves the last one."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
