"""Several adapters over one model: what acts is the weighted sum of their updates, here and in PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftlab import combine
from ftlab.config import LoRAConfig
from ftlab.errors import FtlabError
from ftlab.methods import make_method
from ftlab.methods.adapters import AdapterSet, combined, read_adapter, write_adapter
from ftlab.methods.lora import LoRA, lora_leaves
from ftlab.methods.peft_folder import config_of
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.llama import LlamaForCausalLM
from tests.helpers.classifiers import tiny_bert_classifier
from tests.helpers.models import random_ids, tiny_llama
from tests.methods.test_peft_folders import run, written_by_peft
from tests.methods.test_variants import peft_model

IDS = random_ids(2, 11)
SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "up_proj"]},
    "b": {"rank": 2, "alpha": 3.0, "targets": ["q_proj", "down_proj"], "rslora": True},
    "c": {"rank": 3, "alpha": 3.0, "targets": ["q_proj"], "init": "pissa"},
}
WEIGHTS = {"a": 0.5, "b": -2.0, "c": 1.5}


def saved(folder: Path, **model: Any) -> dict[str, dict[str, Tensor]]:
    """Three adapters in folder/NAME; their updates by layer."""
    updates = {}
    folder.mkdir(exist_ok=True)
    for number, (name, settings) in enumerate(SETTINGS.items()):
        llama = tiny_llama(**model)
        method = make_method(LoRAConfig(**settings), seed=number)
        method.apply(llama)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for leaf in lora_leaves(llama).values():
                leaf.lora_B += 0.1 * torch.randn(leaf.lora_B.shape, generator=generator)
        method.save(llama, folder / name, "file:base")
        updates[name] = {layer: leaf.delta_weight().detach() for layer, leaf in lora_leaves(llama).items()}
    return updates


def plain_sum(updates: dict[str, dict[str, Tensor]], weights: dict[str, float]) -> LlamaForCausalLM:
    """The pretrained model with the weighted updates added to its weights."""
    model = tiny_llama()
    with torch.no_grad():
        for name, weight in weights.items():
            for layer, update in updates[name].items():
                model.get_submodule(layer).weight += weight * update
    return model


def logits(model: LlamaForCausalLM) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS)


@pytest.mark.parametrize("weights", [WEIGHTS, {"a": 1.0}, {"a": 0.0, "c": 0.3}, {"b": 1.0, "a": 1.0}, {}], ids=str)
def test_what_acts_is_the_weighted_sum(weights: dict[str, float], tmp_path: Path) -> None:
    updates = saved(tmp_path)
    model = tiny_llama()
    over = AdapterSet(model, {name: read_adapter(tmp_path / name) for name in SETTINGS})
    assert torch.equal(logits(model), logits(tiny_llama()))
    over.use(dict.fromkeys(SETTINGS, 3.0))
    over.use(weights)
    torch.testing.assert_close(logits(model), logits(plain_sum(updates, weights)), rtol=1e-4, atol=1e-4)
    over.use({})
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_adding_the_factors_apart_is_not_the_sum(tmp_path: Path) -> None:
    """The mistake that the concatenation is there to avoid."""
    saved(tmp_path)
    (a, b), (c, d) = (read_adapter(tmp_path / n).factors["model.layers.0.self_attn.q_proj"] for n in ("a", "c"))
    rank = min(len(a), len(c))
    wrong = (b[:, :rank] + d[:, :rank]) @ (a[:rank] + c[:rank])
    assert float((wrong - (b @ a + d @ c)).norm()) > 0.1 * float((b @ a + d @ c).norm())


def test_the_combined_folder_is_read_by_peft_and_by_ftlab(tmp_path: Path) -> None:
    save_safetensors(tiny_llama(), tmp_path / "base")
    expected = logits(plain_sum(saved(tmp_path), WEIGHTS))
    adapters = [read_adapter(tmp_path / name) for name in WEIGHTS]
    write_adapter(combined(adapters, list(WEIGHTS.values())), tmp_path / "sum")
    with torch.no_grad():
        theirs = peft_model(tmp_path / "base", tmp_path / "sum").eval()(IDS).logits
    torch.testing.assert_close(theirs, expected, rtol=1e-4, atol=1e-4)
    model = tiny_llama()
    method = LoRA(config_of(tmp_path / "sum", model))
    method.apply(model)
    method.load(model, tmp_path / "sum")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    ranks = {name.rpartition(".")[2]: len(leaf.lora_A) for name, leaf in lora_leaves(model).items()}
    assert ranks == {"q_proj": 4 + 2 + 6, "up_proj": 4, "down_proj": 2}
    other = tiny_llama(seed=1)
    method = LoRA(config_of(tmp_path / "sum", other))
    method.apply(other)
    with pytest.raises(FtlabError, match="other base weights"):
        method.load(other, tmp_path / "sum")


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    saved(tmp_path / "other", seed=1)
    pair = [read_adapter(tmp_path / "one" / "a"), read_adapter(tmp_path / "other" / "b")]
    with pytest.raises(FtlabError, match="belong to different base weights"):
        combined(pair, [1.0, 1.0])
    with pytest.raises(FtlabError, match="all are 0"):
        combined(pair[:1], [0.0])
    with pytest.raises(FtlabError, match="other base weights"):
        AdapterSet(tiny_llama(seed=1), {"a": pair[0]})
    with pytest.raises(FtlabError, match="no plain linear layer"):
        AdapterSet(tiny_llama(num_hidden_layers=1), {"a": pair[0]})
    model = tiny_llama()
    method = make_method(LoRAConfig(rank=2, dora=True))
    method.apply(model)
    method.save(model, tmp_path / "dora", "file:base")
    with pytest.raises(FtlabError, match=r"use_dora.*do not add up"):
        read_adapter(tmp_path / "dora")


def test_a_tensor_that_a_sum_would_lose_is_refused_by_name(tmp_path: Path) -> None:
    written_by_peft(tiny_llama(), tmp_path, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(FtlabError, match=r"lost in a sum: .*embed_tokens\.lora_embedding_A\b.*; merge"):
        read_adapter(tmp_path / "adapter")
    written_by_peft(tiny_llama(), tmp_path)
    read_adapter(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    start, state = "base_model.model.model.layers.0.self_attn.", load_file(weights)
    one = torch.ones(1)
    for name in ("q_proj.lora_magnitude_vector", "v_proj.lora_B.weight"):
        save_file(state | {start + name: one}, weights)
        with pytest.raises(FtlabError, match=f"no A or B of a linear layer .*self_attn.{name}; merge"):
            read_adapter(tmp_path / "adapter")


def test_a_classifiers_adapter_is_no_summand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_bert_classifier()
    method = make_method(LoRAConfig(rank=2, targets=["query"]))
    method.apply(model)
    for name in ("a", "b"):
        method.save(model, tmp_path / name, "file:base")
    wanted = (
        r"is a classifier's adapter \(modules_to_save=\['classifier'\]\), whose head cannot be added up; .*evaluate"
    )
    with pytest.raises(FtlabError, match=wanted):
        read_adapter(tmp_path / "a")
    assert combine.main([f"adapters=[{tmp_path / 'a'},{tmp_path / 'b'}]", f"out={tmp_path / 'sum'}"]) != 0
    assert "whose head cannot be added up" in capsys.readouterr().err


def test_a_copy_of_the_model_keeps_what_acts(tmp_path: Path) -> None:
    saved(tmp_path)
    model = tiny_llama()
    over = AdapterSet(model, {"a": read_adapter(tmp_path / "a")})
    over.use({"a": 1.0})
    twin = copy.deepcopy(model)
    over.use({})
    assert not torch.equal(logits(twin), logits(model))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftlab.session.write_report", lambda run_dir: run_dir)
    for seed in (0, 1):
        run(tmp_path / str(seed), f"training.seed={seed}")
    folders = f"adapters=[{tmp_path / '0'},{tmp_path / '1'}]"
    words = [folders, "weights=[0.25,0.75]", f"out={tmp_path / 'sum'}", f"run={tmp_path / '0'}"]
    capsys.readouterr()
    assert combine.main(words) == 0
    shown = capsys.readouterr().out
    assert "layers of rank 8" in shown
    losses = [float(line.split()[2]) for line in shown.splitlines() if line.startswith("validation loss")]
    assert len(losses) == 4
    assert max(losses[1:]) < losses[0]
    run(tmp_path / "small", "method=qlora")
    for wrong, message in [
        ([folders, f"out={tmp_path / 'new'}", f"run={tmp_path / 'small'}"], "its base is quantised"),
        ([folders, f"out={tmp_path / 'sum'}"], "exists already"),
        ([folders, f"out={tmp_path / 'new'}", "weights=[1]"], "give 2 numbers"),
        ([f"adapters=[{tmp_path / '0'}]", f"out={tmp_path / 'new'}"], "at least two folders"),
        ([f"adapters=[{tmp_path / '0'},{tmp_path / '0'}/]", f"out={tmp_path / 'new'}"], "each once"),
        (
            [f"adapters=[{tmp_path / '0'},{tmp_path / '0/adapter'}]", f"out={tmp_path / 'new'}"],
            "0/adapter is named twice",
        ),
        ([f"adapters=[{tmp_path},{tmp_path / '0'}]", f"out={tmp_path / 'new'}"], "has no adapter"),
    ]:
        assert combine.main(wrong) != 0
        assert message in capsys.readouterr().err
