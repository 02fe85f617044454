"""Every method on a classifier: what trains, and that the new head trains, is saved and comes back bit for bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftlab import evaluate, train
from ftlab.config import (
    BitFitConfig,
    FreezeConfig,
    FullConfig,
    GradualUnfreezeConfig,
    LinearProbeConfig,
    LoRAConfig,
    MethodConfig,
)
from ftlab.data.labelled import LabelledExample, collate_labelled
from ftlab.errors import ConfigError, FtlabError
from ftlab.methods import make_method
from ftlab.methods.lora import LoRA
from ftlab.methods.peft_folder import config_of
from ftlab.methods.trainable import trainable_parameters
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.heads import Classifier
from ftlab.open_run import open_run
from tests.helpers.classifiers import batch_of, shake, texts, tiny_bert_classifier, tiny_llama_classifier

BERT_LORA = LoRAConfig(rank=2, alpha=4.0, targets=["query", "key", "value", "dense"])
HEAD = {"classifier.weight", "classifier.bias"}


def trained(config: MethodConfig, model: Classifier | None = None) -> tuple[set[str], dict[str, float]]:
    model = model or tiny_bert_classifier()
    table = make_method(config).apply(model)
    return set(trainable_parameters(model)), table.lr_scales(model)


def test_full_trains_everything() -> None:
    names, _ = trained(FullConfig())
    assert names == {name for name, _ in tiny_bert_classifier().named_parameters()}
    names, _ = trained(FullConfig(train_embeddings=False))
    assert names >= HEAD
    assert not any("embeddings" in name for name in names)


def test_freeze_counts_encoder_layers() -> None:
    names, _ = trained(FreezeConfig(layers="1", train_head=False))
    assert names - HEAD == {n for n, _ in tiny_bert_classifier().named_parameters() if ".layer.1." in n}
    assert names >= HEAD  # nothing else could give it values
    names, _ = trained(FreezeConfig(layers="1", norms="all"))
    assert {n for n in names if ".layer.0." in n} == {
        f"bert.encoder.layer.0.{part}.LayerNorm.{kind}"
        for part in ("attention.output", "output")
        for kind in ("weight", "bias")
    }


def test_linear_probe_and_bitfit() -> None:
    assert trained(LinearProbeConfig())[0] == HEAD
    names, _ = trained(BitFitConfig())
    assert names == HEAD | {n for n, _ in tiny_bert_classifier().named_parameters() if n.endswith("bias")}
    assert trained(LinearProbeConfig(), tiny_llama_classifier())[0] == {"score.weight"}


def test_layer_decay_and_own_rates() -> None:
    _, scales = trained(FullConfig(layer_decay=0.5, rates=["classifier:10"]))
    assert scales["bert.encoder.layer.0.output.dense.weight"] == 0.5
    assert scales["bert.encoder.layer.1.output.dense.weight"] == 1
    assert scales["bert.embeddings.LayerNorm.weight"] == scales["bert.embeddings.word_embeddings.weight"] == 0.25
    assert scales["classifier.weight"] == scales["classifier.bias"] == 10
    _, scales = trained(LoRAConfig(rank=2, targets=["query"], layer_decay=0.5, rates=["classifier:10"]))
    assert scales["bert.encoder.layer.0.attention.self.query.lora_A"] == 0.5
    assert scales["classifier.weight"] == 10


def test_gradual_unfreezing_goes_from_the_head_down() -> None:
    model = tiny_bert_classifier()
    method = make_method(GradualUnfreezeConfig(train_embeddings=True))
    method.apply(model)
    assert set(method.stages[0]) >= HEAD
    assert [any(f".layer.{1 - k}." in name for name in method.stages[k]) for k in (0, 1)] == [True, True]
    assert all("embeddings" in name for name in method.stages[-1])


def test_lora_trains_adapters_and_the_head() -> None:
    names, _ = trained(BERT_LORA)
    assert {n for n in names if "lora_" not in n} == HEAD
    assert sum("lora_A" in n for n in names) == 2 * 6
    with pytest.raises(ConfigError, match="classifier is the head"):
        trained(LoRAConfig(targets=["classifier"]))
    with pytest.raises(ConfigError, match=r"nearest are .*query"):
        trained(LoRAConfig(targets=["quary"]))


@pytest.mark.parametrize(
    "config", [BERT_LORA, FullConfig(), FreezeConfig(), BitFitConfig()], ids=lambda c: type(c).__name__
)
def test_what_was_trained_comes_back_bit_for_bit(config: MethodConfig, tmp_path: Path) -> None:
    model, fresh = tiny_bert_classifier().eval(), tiny_bert_classifier().eval()
    for each in (model, fresh):
        make_method(config).apply(each)
    shake(model)
    make_method(config).save(model, tmp_path / "kept", "base")
    batch = batch_of(texts())
    assert not torch.equal(model(batch), fresh(batch))
    make_method(config).load(fresh, tmp_path / "kept")
    assert torch.equal(model(batch), fresh(batch))


@pytest.mark.parametrize("make", [tiny_bert_classifier, tiny_llama_classifier])
def test_an_adapter_without_its_head_is_refused(make: Any, tmp_path: Path) -> None:
    config = LoRAConfig(rank=2, targets=["query" if make is tiny_bert_classifier else "q_proj"])
    model = make()
    method = make_method(config)
    method.apply(model)
    method.save(model, tmp_path / "kept", "base")
    weights = tmp_path / "kept" / "adapter_model.safetensors"
    state = load_file(weights)
    head = next(name for name in state if "lora_" not in name and name.endswith("weight"))
    save_file({name: value for name, value in state.items() if name != head}, weights)
    with pytest.raises(FtlabError, match=f"missing {head}"):
        method.load(model, tmp_path / "kept")
    settings = tmp_path / "kept" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"modules_to_save": None}))
    with pytest.raises(FtlabError, match="modules_to_save"):
        method.load(model, tmp_path / "kept")


def test_merged_and_plain_compute_the_same() -> None:
    model = tiny_bert_classifier().eval()
    method = make_method(BERT_LORA)
    method.apply(model)
    shake(model)
    batch = batch_of(texts())
    before = model(batch)
    method.merge(model)
    method.merged(model)
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(model(batch), before, rtol=1e-4, atol=1e-5)


def test_peft_computes_the_same(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = tiny_bert_classifier(pooling="pooler").eval()
    save_safetensors(model, tmp_path / "base")
    method = make_method(BERT_LORA, seed=3)
    method.apply(model)
    shake(model)
    method.save(model, tmp_path / "adapter", str(tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = batch_of(texts())
    expected = theirs(batch.input_ids, attention_mask=batch.mask.long(), token_type_ids=batch.token_types).logits
    torch.testing.assert_close(model(batch), expected, rtol=1e-5, atol=1e-5)


def written_by_peft(
    model: Classifier, folder: Path, examples: list[LabelledExample], targets: list[str], whole: list[str] | None = None
) -> Tensor:
    """An adapter of a classifier that PEFT made, moved and saved in folder/adapter; the logits [E, C] by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    save_safetensors(model, folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForSequenceClassification.from_pretrained(folder / "base", dtype=torch.float32)
        base.config.pad_token_id = 0  # by which a decoder of theirs finds the last token
        settings = LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=6, target_modules=targets, modules_to_save=whole)
        theirs = get_peft_model(base, settings).eval()
        shake(theirs)
        batch = collate_labelled(examples, model.head.labels, pad_id=0)
        types = {"token_type_ids": batch.token_types} if "query" in targets else {}
        logits: Tensor = theirs(batch.input_ids, attention_mask=batch.mask.long(), **types).logits.detach()
        theirs.save_pretrained(folder / "adapter")
    assert set(settings.modules_to_save or []) == {"classifier", "score", *(whole or [])}
    return logits


@pytest.mark.parametrize("whole", [None, ["classifier"], ["score"]], ids=str)
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_an_adapter_of_pefts_computes_the_same(kind: str, whole: list[str] | None, tmp_path: Path) -> None:
    model = tiny_bert_classifier(pooling="pooler") if kind == "encoder" else tiny_llama_classifier()
    targets = ["query", "dense"] if kind == "encoder" else ["q_proj", "down_proj"]
    before = model.eval()(batch_of(texts()))
    expected = written_by_peft(model, tmp_path, texts(), targets, whole)
    method = LoRA(config_of(tmp_path / "adapter", model))
    method.apply(model)
    method.load(model, tmp_path / "adapter")
    torch.testing.assert_close(model.eval()(batch_of(texts())), expected, rtol=1e-5, atol=1e-5)
    assert float((expected - before.detach()).abs().max()) > 0.05
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    method.save(model, tmp_path / "again", "base")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == written.keys()
    assert all(torch.equal(again[name], written[name]) for name in again)


def test_other_whole_layers_and_heads_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_bert_classifier(pooling="pooler")
    written_by_peft(model, tmp_path, texts(), ["query"], ["pooler"])
    with pytest.raises(FtlabError, match=r"uses modules_to_save=\['pooler'\], which ftlab does not have"):
        config_of(tmp_path / "adapter", model)
    method = make_method(LoRAConfig(rank=3, alpha=6.0, targets=["query"]))
    method.apply(model)
    with pytest.raises(FtlabError, match=r"uses modules_to_save=\['pooler'\], which ftlab does not have"):
        method.load(model, tmp_path / "adapter")
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"modules_to_save": ["score"]}))
    with pytest.raises(FtlabError, match=r"modules_to_save=\['score'\] does not have the model's head, classifier"):
        method.load(model, tmp_path / "adapter")


def test_runs_start_from_and_score_pefts_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftlab.session.write_report", lambda run_dir: run_dir)
    words = ["data=topics", "model=tiny_random", "method=lora", "method.rank=3", "method.alpha=6"]
    words += ["method.targets=[q_proj,down_proj]", "optimizer.lr=0", "training.max_steps=1", "tracking=disabled"]
    words += ["data.test_fraction=0.3", "training.preflight=false", "evaluation.bootstrap=100", "parallel.threads=1"]
    plain, started, adapter = tmp_path / "plain", tmp_path / "started", tmp_path / "adapter"
    assert train.main([*words, f"run_dir={plain}"]) == 0
    opened = open_run(plain, base=True)
    assert isinstance(opened.model, Classifier)
    expected = written_by_peft(opened.model, tmp_path, opened.data().test, ["q_proj", "down_proj"]).softmax(-1)
    assert evaluate.main([f"run={plain}", f"adapter={adapter}", f"out={tmp_path / 'scores.json'}"]) == 0
    answers = json.loads((tmp_path / "scores.json").read_text())["predictions"]["after"]
    found = torch.tensor([answer["scores"] for answer in answers])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert train.main([*words, f"method.start_from={adapter}", f"run_dir={started}"]) == 0
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (started / "adapter", adapter))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # the learning rate is 0
