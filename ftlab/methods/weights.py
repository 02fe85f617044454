"""What the methods that move pretrained weights have in common: they keep, merge and read back a whole model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from ftlab.errors import FtlabError
from ftlab.files import atomic_directory
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.heads import AnyModel, Classifier, refill
from ftlab.models.loading import load_model

__all__ = ["WholeModel"]


class WholeModel:
    """All of a method but `apply`: what trained is saved with what did not, as a model of its own."""

    keeps_base = False
    stages: tuple[tuple[str, ...], ...] = ()

    def save(self, model: nn.Module, directory: Path, base: str) -> None:
        """Write config.json and model.safetensors, which transformers loads; `base` is not needed."""
        with atomic_directory(directory) as folder:
            save_safetensors(_readable(model), folder)

    def load(self, model: nn.Module, directory: Path) -> None:
        """Read every weight from such a folder. Errors: FtlabError if its configuration or tensors differ."""
        target = _readable(model)
        if isinstance(target, Classifier):
            refill(target, directory)
            return
        saved = load_model(directory, dtype=torch.float32, device=target.head_weight.device)
        if saved.config != target.config:
            raise FtlabError(
                f"{directory}: config.json describes another model than the one to be filled; use that one"
            )
        target.load_state_dict(saved.state_dict())

    def merge(self, model: nn.Module) -> dict[str, float]:
        """Nothing to fold in: the update is in the weights already."""
        return {}

    def unmerge(self, model: nn.Module) -> None:
        """Nothing was folded in."""

    def merged(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

    def disabled(self, model: nn.Module) -> AbstractContextManager[None]:
        """Not possible: FtlabError, since the pretrained weights were overwritten."""
        raise FtlabError(
            "the method overwrites the pretrained weights, so they cannot be had back by switching it off; "
            "load the base model again"
        )


def _readable(model: nn.Module) -> AnyModel:
    if not isinstance(model, AnyModel):
        raise FtlabError(f"this method reads and writes llamas and classifiers, not {type(model).__name__}")
    return model
