"""Going on from a whole classifier: its body and head are read, held by EWC and LwF, or the run says what is new."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ftlab import evaluate, export, fisher, soup, train
from ftlab.losses.fisher import FILE, read_fisher
from ftlab.models.heads import head_parameters
from ftlab.open_run import open_run

TINY = ["data=topics", "tracking=disabled", "data.test_fraction=0.3", "evaluation.times=1", "training.preflight=false"]
TINY += ["training.max_steps=3", "optimizer.lr=1e-2", "parallel.threads=1", "evaluation.bootstrap=100"]
DECODER = ["model=tiny_random", "method=lora", "method.rank=2"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftlab.session.write_report", lambda run_dir: run_dir)


def trained(run_dir: Path, *overrides: str) -> dict[str, Any]:
    assert train.main([*TINY, *overrides, f"run_dir={run_dir}"]) == 0
    record: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    assert record["status"] == "finished"
    return record


def weights(run_dir: Path) -> dict[str, Tensor]:
    (file,) = [*run_dir.glob("model/model.safetensors"), *run_dir.glob("adapter/adapter_model.safetensors")]
    return load_file(file)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """Of training."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == "train"]


def from_folder(folder: Path) -> list[str]:
    return ["model=minilm", f"model.location={folder}", "model.tokenizer=bytes"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a whole encoder, whose pooling is not an encoder's usual one; with its Fisher information."""
    folder = tmp_path_factory.mktemp("first") / "run"
    trained(folder, "model=tiny_bert_random", "method=full", "head.pooling=last")
    assert fisher.main([f"run={folder}", "examples=6"]) == 0
    return folder


@pytest.fixture(scope="module")
def other_labels(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Data with as many labels as the topics, of other names."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"text": f"number {i}", "label": ("red", "blue", "green")[i % 3]} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["data=labelled", f"data.train={path}"]


def read_line(record: dict[str, Any]) -> str:
    (line,) = [line for line in record["warnings"] if line.startswith("the head is")]
    return line


@pytest.mark.parametrize("method", ["full", "lora_bert"])
def test_it_begins_where_the_other_ended(method: str, first: Path, tmp_path: Path) -> None:
    record = trained(tmp_path / "second", *from_folder(first / "model"), f"method={method}", "optimizer.lr=0")
    assert read_line(record).startswith("the head is that of model.location (single: cooking, sport, weather)")
    before = json.loads((first / "run.json").read_text())
    assert record["scores"]["base"] == before["scores"]["final"]
    assert record["inputs"]["base model"] == record["model"]["sha256"][:16]
    ours, theirs = weights(tmp_path / "second"), weights(first)
    if method == "full":
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        config = json.loads((tmp_path / "second/model/config.json").read_text())
        assert config["ftlab_pooling"] == "last", "auto is that of the folder"
    else:
        assert torch.equal(ours["base_model.model.classifier.weight"], theirs["classifier.weight"])
    out = tmp_path / "scores.json"
    assert evaluate.main([f"run={tmp_path / 'second'}", "base=also", f"out={out}"]) == 0
    scores = json.loads(out.read_text())["scores"]
    assert scores["before"] == record["scores"]["base"]
    assert scores["after"] == record["scores"]["final"]


def test_a_resumed_run_is_the_same_run(first: Path, tmp_path: Path) -> None:
    words = [*from_folder(first / "model"), "method=lora_bert", "checkpoint.every_steps=1", "checkpoint.keep_last=9"]
    words += ["regularizer.lwf.strength=2", "regularizer.ewc.strength=3", f"regularizer.ewc.source=[{first}]"]
    trained(tmp_path / "whole", *words)
    assert all(line["lwf/kl"] >= 0 and line["penalty/ewc"] >= 0 for line in lines(tmp_path / "whole"))
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000001"
    record = trained(tmp_path / "resumed", *words, f"resume={checkpoint}")
    assert record["resumed_from"] == [1]
    ours, theirs = weights(tmp_path / "resumed"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_decoder_goes_on_too(tmp_path: Path) -> None:
    trained(tmp_path / "first", "model=tiny_random", "method=full")
    words = ["model=smollm2_135m", f"model.location={tmp_path / 'first' / 'model'}", "model.tokenizer=bytes"]
    record = trained(tmp_path / "second", *words, "method=full", "optimizer.lr=0")
    ours, theirs = weights(tmp_path / "second"), weights(tmp_path / "first")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    before = json.loads((tmp_path / "first/run.json").read_text())
    assert record["scores"]["base"] == before["scores"]["final"]


def test_a_finished_run_needs_its_first_adapter_no_more(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    trained(first, *DECODER)
    record = trained(second, *DECODER, f"method.start_from={first / 'adapter'}")
    shutil.rmtree(first)
    out = tmp_path / "scores.json"
    assert evaluate.main([f"run={second}", f"out={out}"]) == 0
    assert json.loads(out.read_text())["scores"]["after"] == record["scores"]["final"]
    assert export.main([f"run={second}", f"out={tmp_path / 'exported'}"]) == 0
    assert soup.main([f"runs=[{second}]", "alpha=0.5", f"out={tmp_path / 'half'}"]) == 0


@pytest.mark.parametrize("model", ["decoder", "encoder", "encoder in bf16", "the head of model.location"])
def test_the_baseline_of_a_classifier_is_the_untouched_model_and_not_the_first_adapters_head(
    model: str, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {
        "decoder": DECODER,
        "encoder": ["model=tiny_bert_random", "method=lora_bert"],
        "encoder in bf16": ["model=tiny_bert_random", "method=lora_bert", "precision=bf16"],
        "the head of model.location": [*from_folder(first / "model"), "method=lora_bert"],
    }[model]
    monkeypatch.setenv("FTLAB_BF16", "always")
    before = trained(tmp_path / "adapter", *words, "training.max_steps=6", "evaluation.times=2")
    words = [*words, f"method.start_from={tmp_path / 'adapter' / 'adapter'}"]
    record = trained(tmp_path / "run", *words, "optimizer.lr=0", "checkpoint.every_steps=1", "checkpoint.keep_last=9")
    out = tmp_path / "scores.json"
    assert evaluate.main([f"run={tmp_path / 'run'}", "base=also", f"out={out}"]) == 0
    scores = json.loads(out.read_text())["scores"]
    assert record["scores"]["base"] == scores["before"] == before["scores"]["base"]
    assert record["scores"]["final"] == scores["after"] == before["scores"]["final"], "the rate is 0"
    assert record["scores"]["base"] != record["scores"]["final"]
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "adapter")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()), "its head is back after it"
    opened = open_run(tmp_path / "run", base=False).model
    head = {f"base_model.model.{name}": parameter for name, parameter in head_parameters(opened).items()}
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in head.items()), "in bf16 too"
    resumed = f"resume={tmp_path / 'run/checkpoints/step-00000001'}"
    again = trained(tmp_path / "again", *words, "optimizer.lr=0", "checkpoint.every_steps=1", resumed)
    assert again["scores"] == record["scores"]


def test_another_fisher_information_is_named_where_a_run_goes_on(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(first, source)
    words = [*from_folder(source / "model"), "method=full", "evaluation.test=false", "checkpoint.every_steps=1"]
    words += [f"regularizer.ewc.source=[{source}]", "regularizer.ewc.strength=1", "regularizer.l2_sp.strength=1"]
    trained(tmp_path / "run", *words)
    assert fisher.main([f"run={source}", "examples=3"]) == 0
    resumed = [f"resume={tmp_path / 'run/checkpoints/step-00000003'}", f"run_dir={tmp_path / 'other'}"]
    capsys.readouterr()
    assert train.main([*TINY, *words, *resumed]) == 1
    said = capsys.readouterr().err
    assert "the penalty ewc holds to something else than in the interrupted run (" in said
    assert "fisher.safetensors in a run of regularizer.ewc.source changed; restore what it was" in said
    assert "l2_sp" not in said


def test_a_classifier_is_no_language_model(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "decoder", *DECODER[:1], "method=linear_probe", "evaluation.test=false")
    for folder, name, complaint in (
        (first, "minilm", "is an encoder, which gives no text; give data with labels and no data.instruction"),
        (
            tmp_path / "decoder",
            "smollm2_135m",
            "is a classifier, which gives labels and no text; give data",
        ),
    ):
        words = [f"model={name}", f"model.location={folder / 'model'}", "model.tokenizer=bytes"]
        code = train.main([*TINY, *words, "data.instruction=Which?", "method=full", f"run_dir={tmp_path / name}"])
        assert code == 2
        assert complaint in capsys.readouterr().err
    assert train.main([*TINY, "model=minilm", f"model.location={first / 'model'}", f"run_dir={tmp_path / 'y'}"]) == 2
    assert "has no tokenizer.json; give the location of the tokenizer" in capsys.readouterr().err


def test_other_labels_or_another_pooling_give_a_new_head_and_ewc_holds_the_body(
    first: Path, other_labels: list[str], tmp_path: Path
) -> None:
    body = from_folder(first / "model")
    record = trained(tmp_path / "pooling", *body, "method=full", "head.pooling=mean", "optimizer.lr=0")
    assert read_line(record) == (
        "the head is new: that of model.location has the pooling last, and head.pooling is mean"
    )
    held = ["regularizer.ewc.strength=1e4", f"regularizer.ewc.source=[{first}]", "optimizer.max_grad_norm=null"]
    record = trained(tmp_path / "labels", *other_labels, *body, "method=full", *held)
    assert read_line(record) == (
        "the head is new: that of model.location has other labels (single: cooking, sport, weather) than these data "
        "(single: blue, green, red)"
    )
    assert any("the head in" in line and "another task's" in line for line in record["warnings"])
    assert all(line["penalty/ewc"] >= 0 for line in lines(tmp_path / "labels"))
    assert fisher.main([f"run={tmp_path / 'labels'}", "examples=3", "decay=0.5"]) == 0
    earlier, _, _ = read_fisher(first / FILE)
    found, _, facts = read_fisher(tmp_path / "labels" / FILE)
    assert found.keys() == earlier.keys()
    assert facts.tasks == 2
    assert facts.head == {"kind": "single", "names": ["blue", "green", "red"], "pooling": "last"}


@pytest.mark.parametrize("method", ["full", "lora_bert"])
def test_ewc_and_lwf_hold_the_classifier_that_the_run_began_with(method: str, first: Path, tmp_path: Path) -> None:
    words = [*from_folder(first / "model"), f"method={method}", "training.seed=1"]
    ewc, lwf = [f"regularizer.ewc.source=[{first}]", "regularizer.ewc.strength"], ["regularizer.lwf.strength"]
    trained(tmp_path / "plain", *words)
    zeros = [*ewc[:-1], f"{ewc[-1]}=0", f"{lwf[-1]}=0"]
    trained(tmp_path / "zero", *words, *zeros)
    plain, zero = weights(tmp_path / "plain"), weights(tmp_path / "zero")
    assert all(torch.equal(plain[name], zero[name]) for name in plain), "strength 0 is bitwise the run without it"
    for keys, scalar, strong, share in ((ewc, "penalty/ewc", 1e4, 0.5), (lwf, "lwf/kl", 50, 0.9)):
        distances = []
        for strength in (1e-6, strong):
            folder = tmp_path / f"{scalar.replace('/', '-')}-{strength}"
            trained(folder, *words, "training.max_steps=8", *keys[:-1], f"{keys[-1]}={strength}")
            distances.append(lines(folder)[-1][scalar] / (strength if keys is ewc else 1))
        assert 0 < distances[1] < share * distances[0], f"{scalar}: the stronger pull ends nearer"


@pytest.mark.parametrize("kind", ["true", "empirical"])
def test_fisher_of_a_lora_run_has_its_layers_and_its_head(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, *DECODER, "method.targets=[q_proj]")
    assert fisher.main([f"run={run}", "examples=4", f"kind={kind}"]) == 0
    found, anchors, facts = read_fisher(run / FILE)
    assert sorted(found) == [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "score.weight",
    ]
    assert all(bool((values > 0).any()) for values in found.values())
    assert torch.equal(anchors["score.weight"], weights(run)["base_model.model.score.weight"])
    assert facts.head == {"kind": "single", "names": ["cooking", "sport", "weather"], "pooling": "last"}


def test_lwf_needs_an_old_head(
    first: Path, other_labels: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strength = "regularizer.lwf.strength=1"
    cases = (
        (["model=tiny_bert_random"], "the weights are random"),
        ([*other_labels, *from_folder(first / "model")], "has other labels"),
        ([*from_folder(first / "model"), "head.pooling=mean"], "has the pooling last, and head.pooling is mean"),
    )
    for number, (words, why) in enumerate(cases):
        assert train.main([*TINY, *words, "method=full", strength, f"run_dir={tmp_path / str(number)}"]) == 2
        said = capsys.readouterr().err
        assert "regularizer.lwf.strength: the head is new (" in said
        assert why in said
        assert "method.start_from=RUN/adapter, or set it to 0" in said
    trained(tmp_path / "adapter", *DECODER)
    start = f"method.start_from={tmp_path / 'adapter' / 'adapter'}"
    record = trained(tmp_path / "second", *DECODER, start, strength)
    assert not [line for line in record["warnings"] if line.startswith("the head is")]
    assert all(line["lwf/kl"] >= 0 for line in lines(tmp_path / "second"))
    assert any(line["lwf/kl"] > 0 for line in lines(tmp_path / "second"))


def test_l2_sp_holds_a_head_that_was_read(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*from_folder(first / "model"), "method=linear_probe", "evaluation.test=false"]
    trained(tmp_path / "held", *words, "regularizer.l2_sp.strength=1")
    assert lines(tmp_path / "held")[-1]["penalty/l2_sp"] > 0
    beta = [*TINY, *words, "regularizer.l2_sp.beta=1", f"run_dir={tmp_path / 'refused'}"]
    assert train.main(beta) == 2
    assert "it pulls what has no pretrained value, and nothing of that trains" in capsys.readouterr().err
