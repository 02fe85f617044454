"""Adapters that PEFT wrote: read, trained on, scored; and what ftlab does not have is refused by name."""

from __future__ import annotations

import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ftlab import evaluate
from ftlab.build import build_model, build_tokenizer
from ftlab.compose import compose
from ftlab.config import LoRAConfig
from ftlab.errors import ConfigError, FtlabError
from ftlab.methods.lora import LoRA, lora_leaves
from ftlab.methods.peft_folder import config_of, overrides, read_settings
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.llama import LlamaForCausalLM
from ftlab.session import train
from ftlab.training.parallel import Ranks
from tests.helpers.models import random_ids, tiny_llama

IDS = random_ids(2, 11)


def written_by_peft(model: LlamaForCausalLM, folder: Path, **settings: Any) -> Tensor:
    """An adapter of `model` that PEFT made, moved and saved in folder/adapter; the logits of IDS by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    save_safetensors(model, folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        theirs = get_peft_model(
            base, LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | settings))
        )
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "lora_" in name:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            logits: Tensor = theirs.eval()(IDS % model.config.vocab_size).logits
        theirs.save_pretrained(folder / "adapter")
    return logits


KINDS: dict[str, dict[str, Any]] = {
    "a list": {"target_modules": ["q_proj", "down_proj"]},
    "a regular expression": {"target_modules": r".*layers\.1\..*(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "ranks and alphas": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {r"layers\.0\..*q_proj": 2, "q_proj": 6, "up_proj": 3},
        "alpha_pattern": {"self_attn.v_proj": 5, r"model\.layers\.1\.mlp\.up_proj": 2.5},
    },
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "up_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_the_same(kind: str, tmp_path: Path) -> None:
    expected = written_by_peft(tiny_llama(), tmp_path, **KINDS[kind])
    model = tiny_llama()
    method = LoRA(config_of(tmp_path / "adapter", model))
    method.apply(model)
    method.load(model, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS), expected, rtol=1e-4, atol=1e-4)
        assert float((expected - tiny_llama().eval()(IDS)).abs().max()) > 0.05
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    method.save(model, tmp_path / "again", "file:base")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == written.keys()
    assert all(torch.equal(again[name], written[name]) for name in again)


def test_the_settings_are_found(tmp_path: Path) -> None:
    written_by_peft(tiny_llama(), tmp_path, **KINDS["ranks and alphas"])
    config = config_of(tmp_path / "adapter", tiny_llama())
    assert config.targets == ["q_proj", "up_proj", "v_proj"]
    assert config.ranks == [r"layers\.0\..*q_proj:2", "q_proj:6", "up_proj:3"]
    assert overrides(config) == (
        r"method.rank=4 method.alpha=8 'method.targets=[q_proj,up_proj,v_proj]' "
        r"'method.ranks=[layers\.0\..*q_proj:2,q_proj:6,up_proj:3]' "
        r"'method.alphas=[model\.layers\.1\.mlp\.up_proj:2.5,self_attn.v_proj:5]'"
    )
    given, _ = compose([*RUN, *shlex.split(overrides(config))])
    assert isinstance(given.method, LoRAConfig)
    assert (given.method.ranks, given.method.alphas) == (config.ranks, config.alphas)


@pytest.mark.parametrize(
    "kind, ours, said",
    [
        ("plain", LoRAConfig(rank=8, alpha=8.0, targets=["q_proj"], dora=True), "r is 4, here 8; use_dora is False"),
        ("plain", LoRAConfig(rank=4, alpha=8.0, rslora=True, alphas=["q_proj:4"], targets=["q_proj"]), "use_rslora"),
        ("plain", LoRAConfig(rank=4, alpha=8.0, targets=["v_proj", "q_proj"]), "missing .*v_proj"),
        ("plain", LoRAConfig(rank=4, alpha=8.0, targets=["k_proj"]), "unexpected .*q_proj"),
        ("plain", LoRAConfig(rank=2, alpha=8.0, targets=[r"layers\..*\.q_proj"], init="pissa"), "lora_alpha is 8"),
        ("rslora", LoRAConfig(rank=4, alpha=8.0, targets=["q_proj"]), "rank_pattern of .*use_rslora is True"),
        ("ranks and alphas", LoRAConfig(ranks=["up_proj:3"], dora=True), "rank_pattern of"),
        ("dora", LoRAConfig(rank=4, alpha=8.0, targets=["q_proj", "up_proj"]), "use_dora is True, here False"),
    ],
    ids=lambda value: "" if isinstance(value, LoRAConfig) else value,
)
def test_the_settings_of_an_error_are_the_ones_that_work(
    kind: str, ours: LoRAConfig, said: str, tmp_path: Path
) -> None:
    written_by_peft(tiny_llama(), tmp_path, **KINDS.get(kind, {}))
    model, method = tiny_llama(), LoRA(ours)
    method.apply(model)
    with pytest.raises(FtlabError, match=said) as error:
        method.load(model, tmp_path / "adapter")
    assert not any(leaf.lora_B.any() for leaf in lora_leaves(model).values()) or ours.init == "pissa"
    words = [word for word in shlex.split(str(error.value)) if word.startswith("method.")]
    given = [
        word for word in shlex.split(overrides(ours)) if word.split("=")[0] not in {w.split("=")[0] for w in words}
    ]
    config, _ = compose([*RUN, *given, *words])
    assert isinstance(config.method, LoRAConfig)
    model, method = tiny_llama(), LoRA(config.method)
    method.apply(model)
    method.load(model, tmp_path / "adapter")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*lm_head.*, which ftlab.*merge_and_unload"),
        ({"modules_to_save": "lm_head"}, r"modules_to_save=\['lm_head'\], which ftlab"),
        ({"modules_to_save": ["classifier", "score"]}, r"is a classifier's .* no head; .* run on data with labels"),
        ({"fan_in_fan_out": True}, "uses fan_in_fan_out"),
        ({"bias": "lora_only"}, "uses bias"),
        ({"lora_bias": True}, "uses lora_bias"),
        ({"use_of_tomorrow": {"x": 1}}, "uses use_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa .*path_initial_model_for_weight_conversion"),
        ({"peft_type": "LOHA"}, "peft_type must be LORA"),
        ({"r": None}, "incomplete or damaged"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    written_by_peft(tiny_llama(), tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FtlabError, match=message):
        read_settings(tmp_path / "adapter")


def test_a_pickle_and_another_model_are_refused(tmp_path: Path) -> None:
    written_by_peft(tiny_llama(), tmp_path)
    with pytest.raises(FtlabError, match=r"no linear layer model\.layers\.1\.self_attn\.q_proj"):
        config_of(tmp_path / "adapter", tiny_llama(num_hidden_layers=1))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(FtlabError, match=r"adapter_model\.bin, a pickle, .*safe_serialization"):
        config_of(tmp_path / "adapter", tiny_llama())


# --- runs -------------------------------------------------------------------------------------------------------------

RUN = [
    *("+experiment=full_tiny", "method=lora", "method.rank=4", "method.alpha=8", "tracking=disabled"),
    *("evaluation.generate=false", "evaluation.bootstrap=100", "data.limit_train=16", "data.limit_validation=4"),
    *("data.limit_test=4", "training.max_steps=6", "training.preflight=false", "parallel.threads=1"),
]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Train small; run.json."""
    assert train(*compose([*RUN, f"run_dir={folder}", *overrides])) == 0
    record: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return record


def exported(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftlab.session.write_report", lambda run_dir: run_dir)


def test_training_goes_on_from_it_and_evaluate_scores_it(tmp_path: Path) -> None:
    config, _ = compose([*RUN, f"run_dir={tmp_path / 'x'}"])
    model = build_model(config, build_tokenizer(config), Ranks(), dtype=torch.float32)
    written_by_peft(model, tmp_path, target_modules=["q_proj", "v_proj"])
    start = [f"method.start_from={tmp_path / 'adapter'}", "method.targets=[q_proj,v_proj]"]
    still = run(tmp_path / "still", *start, "optimizer.lr=0")
    first = exported(tmp_path)
    assert all(torch.equal(tensor, first[name]) for name, tensor in exported(tmp_path / "still").items())
    moved = run(tmp_path / "moved", *start)
    assert not any(torch.equal(tensor, first[name]) for name, tensor in exported(tmp_path / "moved").items())
    plain = run(tmp_path / "plain")
    before = [record["scores"]["base"]["loss"]["value"] for record in (still, moved, plain)]
    assert before[0] == before[1] == before[2], "the baseline is the pretrained model, not the first adapter"
    assert "first adapter" in still["inputs"]
    found = {}
    for name, words in {"peft's": [f"adapter={tmp_path / 'adapter'}"], "the run's": []}.items():
        out = tmp_path / f"{name}.json"
        assert evaluate.main([f"run={tmp_path / 'still'}", f"out={out}", *words]) == 0
        found[name] = json.loads(out.read_text())["scores"]["after"]["loss"]["value"]
    assert found["peft's"] == found["the run's"] != before[0]


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"method\.start_from: .* has no adapter_config\.json"):
        compose([*RUN, f"method.start_from={tmp_path}"])


@pytest.mark.parametrize("variant", ["dora", "pissa", "qlora", "lora", "lora optimizer.state=8bit"])
def test_resumed_it_is_bit_equal(variant: str, tmp_path: Path) -> None:
    settings = [*f"method={variant}".split(), "method.rank=4", "method.dropout=0.2", "checkpoint.every_steps=3"]
    whole = run(tmp_path / "whole", *settings, "checkpoint.keep_last=4")
    halfway = tmp_path / "whole" / "checkpoints" / "step-00000003"
    resumed = run(tmp_path / "resumed", *settings, f"resume={halfway}")
    assert resumed["resumed_from"] == [3]
    assert whole["scores"] == resumed["scores"] | {"base": whole["scores"]["base"]}
    ours, theirs = exported(tmp_path / "resumed"), exported(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
