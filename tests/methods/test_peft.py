"""The adapter's folder through the library whose format it is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlab.config import LoRAConfig
from ftlab.methods import make_method
from ftlab.models.checkpoint import save_safetensors
from tests.helpers.models import random_ids, tiny_llama
from tests.losses.test_penalties import jiggle


@pytest.mark.parametrize(
    "changes", [{}, {"rslora": True}, {"alpha": 3.5}, {"targets": [r"layers\.1\.mlp\..*_proj", "q_proj"]}], ids=str
)
def test_peft_computes_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    save_safetensors(model, tmp_path / "base")
    method = make_method(LoRAConfig(**({"rank": 4, "alpha": 8.0, "dropout": 0.1} | changes)), seed=3)
    method.apply(model)
    jiggle(model)
    method.save(model, tmp_path / "adapter", str(tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' and peft's own making, except for keys: asserted below
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
        result = theirs.load_adapter(tmp_path / "adapter", adapter_name="default")
    assert not [name for name in result.missing_keys if "lora_" in name]
    assert not result.unexpected_keys
    ids = random_ids(2, 11)
    with torch.no_grad():
        ours = model.eval()(ids)
        with theirs.disable_adapter():
            off = theirs.eval()(ids).logits
        torch.testing.assert_close(ours, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert float((ours - off).abs().max()) > 0.1  # the adapter does something
