"""What every section works with: its record, the time it has left, and items that survive one another."""

from __future__ import annotations

import gc
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from gpu import goals, records
from gpu.measure import Bench

__all__ = ["Section", "free", "plain"]

Item = dict[str, Any]


class Section:
    """The record of one section, written anew after every item.

    figures: what its goals are judged by. copy, matmul: bandwidth (bytes/s) and rate of products (FLOP/s) measured in
    this process, which the thresholds are scaled by. limit: seconds until the suite stops this process.
    """

    def __init__(self, name: str, out: Path, *, smoke: bool, limit: float, command: str = "") -> None:
        self.name, self.smoke = name, smoke
        self.path = out / f"{name}.json"
        self.started, self.begin, self.limit = records.now(), time.monotonic(), limit
        self.device = torch.device("cpu") if smoke else torch.device("cuda", 0)
        self.bench = Bench(self.device, smoke=smoke)
        self.items: dict[str, Item] = {}
        self.errors: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.figures: dict[str, float] = {}
        self.missing: dict[str, str] = {}
        self.notes: list[str] = []
        self.copy: float | None = None
        self.matmul: float | None = None
        self._head = {
            "format": records.FORMAT,
            "name": "gpu_suite",
            "section": name,
            "smoke": smoke,
            "command": command,
            **records.commit(),
            "packages": records.packages(),
            "device": describe(self.device),
        }
        if smoke:
            self.notes.append("smoke run on a CPU: tiny shapes, one repeat; its figures mean nothing")

    @property
    def left(self) -> float:
        """Seconds until the suite stops this section."""
        return self.limit - (time.monotonic() - self.begin)

    def measure_limits(self, shape: tuple[int, int, int] | None = None) -> None:
        """C, and F at M x K x N = shape: what this GPU does in this process."""

        def measured() -> Item:
            found: Item = {"copy": self.bench.copy_bandwidth()}
            self.copy = found["copy"]["bytes_per_second"]
            if shape is not None:
                found["matmul"] = self.bench.matmul_rate(*((64, 32, 48) if self.smoke else shape))
                self.matmul = found["matmul"]["flop_per_second"]
            return found

        self.item("limits", measured)

    def item(self, name: str, function: Callable[[], Item | None], *, needs: float = 3.0) -> Item | None:
        """Run one measurement and keep what it gives; a failure is noted, and the section goes on.

        needs: seconds it takes; where fewer are left it is skipped.
        """
        if self.left < needs and not self.smoke:
            self.skipped[name] = f"{self.left:.0f} s were left, it needs {needs:.0f}"
            self.write("running")
            return None
        begin = time.monotonic()
        found = None
        try:
            found = function()
        except Exception as error:
            lines = traceback.format_exc().splitlines()[-12:]
            self.errors[name] = "\n".join(lines)[-2000:]
            print(f"{self.name}: {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if found is not None:
            self.items[name] = {**found, "seconds": round(time.monotonic() - begin, 2)}
            print(f"{self.name}: {name}: {time.monotonic() - begin:.1f} s", file=sys.stderr, flush=True)
        free(self.device)
        self.write("running")
        return found

    def figure(self, goal: str, value: float | None, why: str | None = None) -> None:
        """What a goal is judged by, or why there is no such figure."""
        if goal not in goals.GOALS:
            raise KeyError(f"there is no goal {goal}")
        if value is not None:
            self.figures[goal] = value
        elif why is not None:
            self.missing[goal] = why

    def content(self, status: str) -> dict[str, Any]:
        """The record as it stands."""
        judged = goals.verdicts(self.name, self.figures, self.copy, self.matmul, self.missing)
        if self.smoke:
            judged = [{**line, "met": None, "why": "smoke run"} for line in judged]
        return {
            **self._head,
            "status": status,
            "started": self.started,
            "written": records.now(),
            "seconds": round(time.monotonic() - self.begin, 1),
            "limits": {"copy_bytes_per_second": self.copy, "matmul_flop_per_second": self.matmul},
            "notes": self.notes,
            "items": self.items,
            "verdicts": judged,
            "errors": self.errors,
            "skipped": self.skipped,
        }

    def write(self, status: str) -> None:
        """Leave the record as it stands."""
        records.write(self.path, plain(self.content(status)))


def plain(value: Any) -> Any:
    """For JSON: numbers that are not finite become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    json.dumps(value)
    return value


def free(device: torch.device) -> None:
    """Give memory back to the device, so that an item starts from nothing."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(device: torch.device) -> dict[str, Any]:
    """The device, without anything that identifies the machine itself."""
    if device.type != "cuda":
        return {"kind": "cpu", "name": "CPU, Triton's interpreter"}
    found = torch.cuda.get_device_properties(device)
    return {
        "kind": "cuda",
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": getattr(found, "L2_cache_size", None),
        "cuda": torch.version.cuda,
    }
