"""With a frozen base no block input requires a gradient; the reentrant form of checkpointing then trains nothing."""

from __future__ import annotations

import warnings

import pytest
import torch

from ftlab.config import LoRAConfig, PrecisionConfig
from ftlab.errors import FtlabError
from ftlab.methods import make_method
from ftlab.models import llama
from ftlab.training.parallel import Ranks, Replica
from ftlab.training.precision import Precision
from ftlab.training.preflight import preflight
from tests.helpers.training import collate, loss_sum, ragged_examples, tiny_llama


def preflight_with_checkpointing() -> tuple[str, ...]:
    model = tiny_llama()
    make_method(LoRAConfig(rank=4), seed=0).apply(model)
    model.checkpoint_blocks = True
    precision = Precision(PrecisionConfig(), torch.device("cpu"))
    batch = collate(ragged_examples(8), 8)[0]
    return preflight(Replica(model, loss_sum, Ranks()), batch, precision).silent


def test_every_adapter_gets_a_gradient() -> None:
    assert preflight_with_checkpointing() == ()


def test_reentrant_checkpointing_is_refused_before_step_1(monkeypatch: pytest.MonkeyPatch) -> None:
    real = llama.checkpoint

    def reentrant(function, *args, **kwargs):  # type: ignore[no-untyped-def]
        kwargs.pop("use_reentrant", None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return real(function, *args, use_reentrant=True)

    monkeypatch.setattr(llama, "checkpoint", reentrant)
    with pytest.raises((FtlabError, RuntimeError), match=r"grad"):
        preflight_with_checkpointing()
