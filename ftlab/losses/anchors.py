"""Pretrained weights that a penalty is held to, read from memory-mapped files instead of being kept.

A tensor of the checkpoint itself is used where one holds the very values (bf16 and fp16 count: fp32 holds them
exactly). What none holds, of a GGUF file, a random model or renamed tensors, is written once to the cache as fp32, in a
file whose name is a hash of its content: runs from the same weights share it and a resumed run finds it again.

Mapped pages are read when a step needs them and belong to the page cache: the system drops them when memory is short.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ftlab.assets import cache_folder
from ftlab.errors import FtlabError
from ftlab.files import atomic_path
from ftlab.models.checkpoint import find_shards, opened

__all__ = ["content_hash", "mapped"]

FOLDER = "anchors"


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits over names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def mapped(weights: Mapping[str, Tensor], base: Path | None) -> dict[str, Tensor]:
    """The values of `weights`, which must be what they are in this moment, as views of files.

    base: the checkpoint that the model was read from. Errors: FtlabError for a file in the cache that holds something
    else, or a cache that cannot be written.
    """
    found = {} if base is None or not base.is_dir() else _of_checkpoint(weights, base)
    rest = {name: weight.detach().float() for name, weight in weights.items() if name not in found}
    if rest:
        found |= _of_cache(rest)
    return {name: found[name] for name in weights}


def _of_checkpoint(weights: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Those that `folder` holds, under the parameter's name or the last parts of it."""
    found: dict[str, Tensor] = {}
    for path in find_shards(folder):
        with opened(path) as file:
            keys = set(file.keys())
            for name, weight in weights.items():
                parts = name.split(".")
                for key in (".".join(parts[at:]) for at in range(len(parts))):
                    if key in keys and _same(tensor := file.get_tensor(key), weight):
                        found[name] = tensor
                        break
    return found


def _of_cache(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    path = cache_folder() / FOLDER / f"{content_hash(weights)}.safetensors"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file({name: weight.cpu().contiguous() for name, weight in weights.items()}, str(temporary))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FtlabError(
            f"regularizer.l2_sp.anchor: mmap cannot write {path} ({reason}); make room there, name "
            "another folder in FTLAB_CACHE, or give anchor=cpu"
        ) from error
    with opened(path) as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    if found.keys() != weights.keys() or not all(_same(found[name], weight) for name, weight in weights.items()):
        raise FtlabError(f"regularizer.l2_sp.anchor: {path} does not hold what its name says; delete it")
    return found


def _same(tensor: Tensor, weight: Tensor) -> bool:
    """Whether a tensor of a file is the weight, bit for bit."""
    ours = weight.detach().cpu().float()
    return tensor.shape == ours.shape and tensor.is_floating_point() and torch.equal(tensor.float(), ours)
