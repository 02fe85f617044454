"""Checkpoints on disk: whole or not there at all.

A checkpoint is a folder `step-00000100` with `state.pt` and `manifest.json` (step, sha256 of each file). It is written
under a temporary name, fsynced and renamed, so a kill at any instant leaves the previous ones untouched. The best
validated weights stand in `best-00000100`, weights only.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ftlab.errors import FtlabError
from ftlab.files import atomic_directory, clean_leftovers, sha256_file

__all__ = ["Checkpoints", "read_checkpoint"]

_STEP = re.compile(r"step-(\d{8})")
_BEST = re.compile(r"best-(\d{8})")


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """The state saved in `folder`, checked against its manifest. Only tensors and plain types are read.

    Raises:
        FtlabError: the checkpoint is damaged or incomplete; the message says how.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        for name, expected in manifest["files"].items():
            if Path(name).name != name:
                raise FtlabError(f"{folder}/manifest.json names {name!r}, which is outside the checkpoint")
            if sha256_file(folder / name) != expected:
                raise FtlabError(f"{folder / name} is damaged: its sha256 is not the one in manifest.json")
        state: dict[str, Any] = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except FtlabError:
        raise
    except Exception as error:
        raise FtlabError(f"{folder} is not a complete checkpoint: {type(error).__name__}: {error}") from None
    return state


class Checkpoints:
    """The checkpoints of one run. Only the main rank calls `save`, `save_best` and `prune`."""

    def __init__(self, directory: Path, keep_last: int, tell: Callable[[str], None], *, main: bool = True) -> None:
        self.directory = directory
        self.keep_last = keep_last
        self._tell = tell
        if main:
            directory.mkdir(parents=True, exist_ok=True)
            clean_leftovers(directory)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, newest first."""
        entries = self.directory.iterdir() if self.directory.exists() else ()
        found = [_STEP.fullmatch(entry.name) for entry in entries]
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def folder(self, step: int) -> Path:
        """Where the checkpoint of `step` stands."""
        return self.directory / f"step-{step:08d}"

    def best_folder(self, step: int) -> Path:
        """Where the best weights, if they are those of `step`, stand."""
        return self.directory / f"best-{step:08d}"

    def save(self, state: dict[str, Any]) -> bool:
        """Write one checkpoint and drop the ones no longer kept. False, with a line told, if the disk refused."""
        step = int(state["counters"]["step"])
        try:
            with atomic_directory(self.folder(step)) as temporary:
                torch.save(state, temporary / "state.pt")
                manifest = {
                    "step": step,
                    "best_step": int(state["counters"]["best_step"]),
                    "files": {"state.pt": sha256_file(temporary / "state.pt")},
                }
                (temporary / "manifest.json").write_text(json.dumps(manifest), "utf-8")
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            self._tell(f"checkpoint of step {step} could not be written ({error}); the previous ones are untouched")
            return False
        self.prune(int(state["counters"]["best_step"]))
        return True

    def save_best(self, step: int, weights: dict[str, torch.Tensor]) -> bool:
        """Write the weights of the best validation so far. False, with a line told, if the disk refused.

        Raises:
            FtlabError: a weight is not finite; such weights are never the best.
        """
        broken = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise FtlabError(f"weights that are not finite cannot be the best: {broken[:3]}")
        try:
            with atomic_directory(self.best_folder(step)) as temporary:
                file = temporary / "w.safetensors"
                save_file({name: tensor.contiguous().cpu() for name, tensor in weights.items()}, file)
                (temporary / "manifest.json").write_text(
                    json.dumps({"step": step, "sha256": sha256_file(file)}), "utf-8"
                )
        except Exception as error:
            self._tell(f"best weights of step {step} could not be written ({error})")
            return False
        return True

    def load_best(self, step: int) -> dict[str, torch.Tensor] | None:
        """The weights written by `save_best`; None, with a line told, if they are missing or damaged."""
        folder = self.best_folder(step)
        try:
            expected = json.loads((folder / "manifest.json").read_text("utf-8"))["sha256"]
            if sha256_file(folder / "w.safetensors") != expected:
                raise ValueError("its sha256 is not the one in manifest.json")
            return load_file(folder / "w.safetensors")
        except (OSError, ValueError, KeyError) as error:
            self._tell(f"the best weights, of step {step}, cannot be read ({error}); the last ones are kept instead")
            return None

    def adopt(self, folder: Path, best_step: int) -> None:
        """Make this run go on from the checkpoint `folder`, of this run or of another one.

        Later checkpoints of this run are moved to `set-aside/`, and the best weights that `folder` refers to are copied
        from beside it.
        """
        match = _STEP.fullmatch(folder.name)
        for step in self.steps():
            if match and step > int(match[1]):
                aside = self.directory / "set-aside"
                aside.mkdir(exist_ok=True)
                shutil.rmtree(aside / self.folder(step).name, ignore_errors=True)
                self.folder(step).rename(aside / self.folder(step).name)
        source = folder.parent / self.best_folder(best_step).name
        if best_step >= 0 and source.exists() and not self.best_folder(best_step).exists():
            with atomic_directory(self.best_folder(best_step)) as temporary:
                shutil.copytree(source, temporary, dirs_exist_ok=True)

    def prune(self, best_step: int) -> None:
        """Delete all but the newest `keep_last` checkpoints, and best weights that no kept checkpoint refers to."""
        for step in self.steps()[self.keep_last :]:
            shutil.rmtree(self.folder(step), ignore_errors=True)
        for entry in self.directory.iterdir():
            match = _BEST.fullmatch(entry.name)
            if match and int(match[1]) not in {best_step, *self._best_steps_of_kept()}:
                shutil.rmtree(entry, ignore_errors=True)

    def _best_steps_of_kept(self) -> set[int]:
        """Older checkpoints may be resumed from if the newest is damaged; what they call best must stay."""
        kept = set()
        for step in self.steps():
            try:
                kept.add(int(json.loads((self.folder(step) / "manifest.json").read_text())["best_step"]))
            except (OSError, KeyError, ValueError):
                continue
        return kept

    def newest(self) -> dict[str, Any] | None:
        """The newest state that can be read; damaged ones are passed over, with a line told for each."""
        for step in self.steps():
            try:
                return read_checkpoint(self.folder(step))
            except FtlabError as error:
                self._tell(f"{error}; going back to the checkpoint before it")
        return None
