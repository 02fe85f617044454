"""Hugging Face checkpoints: config.json with safetensors, in one file or sharded; read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ftlab.errors import FtlabError
from ftlab.files import atomic_path, atomic_write
from ftlab.models.configuration import LlamaConfig

__all__ = [
    "SafetensorsFiles",
    "SafetensorsFolder",
    "Saveable",
    "TensorFiles",
    "TensorSource",
    "read_json",
    "save_safetensors",
]

CHUNK_BYTES = 16 << 20  # how much of a file is looked at in one go
FLOATING = {"F64", "F32", "F16", "BF16"}
CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class TensorFiles(Protocol):
    """Tensors on disk, whatever their format, under Hugging Face's parameter names."""

    where: str
    shapes: dict[str, tuple[int, ...]]

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The tensor in consecutive slices of its first dimension, in any floating dtype."""
        ...


class TensorSource(TensorFiles, Protocol):
    """A llama's tensors and its configuration."""

    config: LlamaConfig


class Saveable(Protocol):
    """A model that can be written as a Hugging Face folder."""

    def state_dict(self) -> dict[str, Any]:
        """The tensors by name."""

    def hf_config(self, dtype: str) -> dict[str, Any]:
        """The fields of its config.json."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; FtlabError when it cannot be read or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FtlabError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FtlabError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise FtlabError(f"{path}: holds a JSON {type(content).__name__}, expected an object")
    return content


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, with its errors as FtlabError."""
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise FtlabError(f"{path}: cannot be read as safetensors: {error}") from None


class SafetensorsFiles:
    """A folder with model.safetensors, or the shards that model.safetensors.index.json lists.

    skip: names of tensors that are passed over unread.
    """

    def __init__(self, folder: Path, skip: re.Pattern[str] | None = None) -> None:
        self.where = str(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for path, expected in find_shards(folder).items():
            with opened(path) as file:
                names = set(file.keys())
                if expected is not None and names != expected:
                    raise FtlabError(
                        f"{path}: does not hold what {INDEX} says: {describe_names(names ^ expected)}; "
                        "download the folder again"
                    )
                for name in names:
                    if skip is not None and skip.fullmatch(name):
                        continue
                    part = file.get_slice(name)
                    if part.get_dtype() not in FLOATING:
                        raise FtlabError(f"{path}: tensor {name} is {part.get_dtype()}; quantised weights are not read")
                    self.shapes[name] = tuple(part.get_shape())
                    self._files[name] = path

    def chunks(self, name: str) -> Iterator[Tensor]:
        """Slices of a tensor. The file is opened for each, because its mapped pages count as memory until it closes."""
        shape = self.shapes[name]
        rows = shape[0] if shape else 1
        row_bytes = 8 * max(1, torch.Size(shape).numel() // max(1, rows))
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, rows, step):
            with opened(self._files[name]) as file:
                yield file.get_slice(name)[start : start + step] if shape else file.get_tensor(name)


class SafetensorsFolder(SafetensorsFiles):
    """The same with a llama's config.json."""

    def __init__(self, folder: Path) -> None:
        self.config = LlamaConfig.from_hf(read_json(folder / CONFIG), str(folder / CONFIG))
        super().__init__(folder)


def find_shards(folder: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a folder, with the tensors the index promises in each (None: there is no index)."""
    if (folder / SINGLE).exists():
        return {folder / SINGLE: None}
    if not (folder / INDEX).exists():
        raise FtlabError(f"{folder}: has neither {SINGLE} nor {INDEX}; only safetensors are read, never pickles")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise FtlabError(f"{folder / INDEX}: weight_map must be an object of file names")
    shards: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        # A plain name in this folder: it may be a link (a hub's cache is made of them), but not a path elsewhere.
        if Path(file).name != file or file in ("", ".", ".."):
            raise FtlabError(f"{folder / INDEX}: the entry {file!r} of {name} leaves the folder")
        names = shards.setdefault(folder / file, set())
        if names is not None:
            names.add(name)
    return shards


def describe_names(names: set[str], limit: int = 5) -> str:
    """A few names in order, and how many more there are."""
    listed = sorted(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def state_to_save(model: Saveable, dtype: torch.dtype | None) -> Mapping[str, Tensor]:
    """The model's tensors in one dtype (None: the widest among them), contiguous, on the CPU."""
    state = model.state_dict()
    if on_meta := {name for name, tensor in state.items() if tensor.is_meta}:
        raise FtlabError(f"the model has no values to save for {describe_names(on_meta)}")
    if dtype is None:
        dtypes = {tensor.dtype for tensor in state.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in state.items()}


def save_safetensors(model: Saveable, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors, which transformers loads, into an existing or new folder.

    All tensors are written in `dtype`; None keeps the one they have, or fp32 when they differ. Tied embeddings are
    written once. Each file appears whole or not at all; wrap the call in `atomic_directory` for the pair of them.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    state = state_to_save(model, dtype)
    with atomic_path(folder / SINGLE) as temporary:
        save_file(dict(state), str(temporary), metadata={"format": "pt"})
    name = str(next(iter(state.values())).dtype).removeprefix("torch.")
    atomic_write(folder / CONFIG, json.dumps(model.hf_config(name), indent=2) + "\n")
