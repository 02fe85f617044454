"""A classifier as a user makes one: trained, resumed, scored again, exported, reported, refused where it must be."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ftlab import classify, evaluate, export, fisher, generate, train
from ftlab.config import LabelledDataConfig
from ftlab.data.labelled import collate_labelled, labelled_record
from ftlab.data.records import Record, Splits
from ftlab.errors import FtlabError
from ftlab.models.heads import Classifier
from ftlab.open_run import open_run

TINY = ["data=topics", "model=tiny_bert_random", "tracking=disabled", "data.test_fraction=0.3", "evaluation.times=2"]
LORA = ["method=lora_bert", "method.rank=4", "optimizer.lr=1e-2", "method.dropout=0.1"]
LORA += ["regularizer.dropout.residual=0.1", "regularizer.stochastic_depth=0.2"]


def trained(run_dir: Path, *overrides: str) -> dict[str, Any]:
    assert train.main([*TINY, *overrides, f"run_dir={run_dir}"]) == 0
    record: dict[str, Any] = json.loads((run_dir / "run.json").read_text())
    assert record["status"] == "finished"
    return record


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "run"
    trained(folder, *LORA, "training.max_steps=12", "checkpoint.every_steps=4", "checkpoint.keep_last=9")
    return folder


def test_the_record_has_labels_scores_and_tables(finished: Path) -> None:
    record = json.loads((finished / "run.json").read_text())
    assert record["labels"] == {"kind": "single", "names": ["cooking", "sport", "weather"]}
    final = record["scores"]["final"]
    assert set(final) == {"loss", "accuracy", "macro_f1", "micro_f1", "mcc", "auroc", "ece"}
    assert final["macro_f1"]["low"] <= final["macro_f1"]["value"] <= final["macro_f1"]["high"]
    for who in ("base", "final"):
        tables = record["classification"][who]
        matrix = torch.tensor(tables["confusion"])
        assert int(matrix.sum()) == record["data"]["test"] == sum(row["count"] for row in tables["reliability"])
        hits = 100 * float(matrix.trace()) / record["data"]["test"]
        assert record["scores"][who]["accuracy"]["value"] == pytest.approx(hits)
    line = json.loads((finished / "predictions" / "final.jsonl").read_text().splitlines()[0])
    assert sum(line["scores"]) == pytest.approx(1, abs=1e-4)
    assert line["reference"] in record["labels"]["names"]


def test_the_report_shows_them(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert re.search(r'class="headline">Accuracy on \d+ test records', page)
    assert 'id="confusion"' in page
    assert 'aria-label="Reliability diagram"' in page
    assert "Loss (nats per text)" in page
    assert "No answers were generated" not in page
    assert "nats per token" not in page
    assert page.count("1 cooking") == 1


def test_evaluate_gives_the_runs_own_scores(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    assert evaluate.main([f"run={finished}", "base=also", f"out={out}"]) == 0
    record, again = json.loads((finished / "run.json").read_text()), json.loads(out.read_text())
    assert again["scores"]["after"] == record["scores"]["final"]
    assert again["scores"]["before"] == record["scores"]["base"]
    assert len(again["predictions"]["after"]) == record["data"]["test"]


def test_a_resumed_run_is_the_same_run(finished: Path, tmp_path: Path) -> None:
    checkpoint = finished / "checkpoints" / "step-00000004"
    same = ["training.max_steps=12", "checkpoint.every_steps=4", "checkpoint.keep_last=9"]
    record = trained(tmp_path / "resumed", *LORA, *same, f"resume={checkpoint}")
    assert record["resumed_from"] == [4]
    ours, theirs = (
        load_file(folder / "adapter/adapter_model.safetensors") for folder in (tmp_path / "resumed", finished)
    )
    assert any("classifier" in name for name in ours)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_that_diverges_says_so_and_leaves_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "scores.json"
    wild = ["method=full", "optimizer.lr=1e20", "optimizer.max_grad_norm=null", "training.max_steps=3"]
    assert train.main([*TINY, *wild, f"run_dir={run_dir}"]) == 3
    told = capsys.readouterr().err
    assert "error: the trained model's scores on the test split are not finite (loss, accuracy, " in told
    assert "Traceback" not in told
    record = json.loads((run_dir / "run.json").read_text())
    assert record["status"] == "failed"
    assert "not finite" in record["reason"]
    assert record["scores"]["final"]["macro_f1"]["value"] == "nan"
    assert not (run_dir / "predictions" / "final.jsonl").exists()
    assert "Labels of the untouched model" in (run_dir / "report.html").read_text()
    assert evaluate.main([f"run={run_dir}", "base=also", f"out={out}"]) == 0
    assert re.search(r"^accuracy +\S+ \(.*\) +nan$", capsys.readouterr().out, re.MULTILINE)
    assert json.loads(out.read_text())["scores"]["after"]["accuracy"]["low"] == "nan"
    last = ["evaluation.test=false", "checkpoint.load_best=false", f"run_dir={tmp_path / 'untested'}"]
    for again in (False, True):
        assert train.main([*TINY, *wild, *last]) == 3, f"also a second time: {again}"
        assert "scores on the validation split are not finite (loss, accuracy, " in capsys.readouterr().err


def test_it_learns(tmp_path: Path) -> None:
    record = trained(
        tmp_path / "run", "method=full", "optimizer.lr=3e-3", "training.epochs=25", "evaluation.times=0",
        "checkpoint.load_best=false",
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[0] > 0.9
    assert losses[-1] < 0.2
    assert record["scores"]["final"]["accuracy"]["value"] > record["scores"]["base"]["accuracy"]["value"]


@pytest.mark.parametrize("labels", ["multi", "regression"])
def test_the_other_kinds_of_label(labels: str, tmp_path: Path) -> None:
    rows = [
        {"text": f"{'red ' * (i % 3)}{'blue ' * (i % 2)}{i}", "label": i % 3 + 0.5}
        if labels == "regression"
        else {"text": f"number {i}", "label": ["red"] * (i % 2) + ["blue"] * (i % 3 == 0)}
        for i in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metric = {"multi": "macro_f1", "regression": "mse"}[labels]
    record = trained(
        tmp_path / "run", "data=labelled", f"data.train={path}", f"data.labels={labels}", "training.max_steps=6",
        "method=full", "optimizer.lr=1e-2", f"checkpoint.metric={metric}",
    )  # fmt: skip
    assert metric in record["scores"]["final"]
    assert record["best"]["metric"] == metric
    if labels == "regression":
        assert record["scores"]["final"]["mse"]["value"] == pytest.approx(record["scores"]["final"]["loss"]["value"])
        assert "squared error" in (tmp_path / "run" / "report.html").read_text()
    assert evaluate.main([f"run={tmp_path / 'run'}"]) == 0


def test_texts_as_long_as_the_encoder_has_positions(tmp_path: Path) -> None:
    """Batches are padded to a multiple, in training and in evaluation, and the positions are none."""
    rows = [{"text": f"{i:02}".ljust(60 if i % 2 else 3, "x"), "label": "ab"[i % 2]} for i in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data=labelled", f"data.train={path}", "method=full", "training.max_steps=2"]
    found = []
    for positions in (61, 64):
        record = trained(tmp_path / f"{positions}", *data, f"model.max_positions={positions}", "data.max_length=61")
        found.append(record["data"]["train_tokens"])
    assert found[0] == found[1] > 0
    assert fisher.main([f"run={tmp_path / '61'}", "examples=4"]) == 0
    assert evaluate.main([f"run={tmp_path / '61'}"]) == 0


def test_r_drop_is_part_of_what_a_classifier_learns(tmp_path: Path) -> None:
    words = ("method=full", "training.max_steps=1", "regularizer.dropout.residual=0.1", "evaluation.times=1")
    losses = []
    for strength in (1, 100):
        trained(tmp_path / f"{strength}", *words, f"regularizer.r_drop={strength}")
        lines = (tmp_path / f"{strength}/metrics.jsonl").read_text().splitlines()
        first = next(line for line in map(json.loads, lines) if line["split"] == "train")
        assert first["r_drop/kl"] > 0
        losses.append(first["loss"] - strength * first["r_drop/kl"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4), "the same two passes, and the rest is the divergence"


@pytest.mark.parametrize("model", [("tiny_bert_random", "lora_bert"), ("tiny_random", "lora")])
def test_a_frozen_body_may_be_narrower_than_its_head(
    model: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTLAB_BF16", "always")
    words = [f"model={model[0]}", f"method={model[1]}", "precision=fp32", "precision.frozen=bf16"]
    record = trained(tmp_path / "run", *words, "training.max_steps=2", "evaluation.times=1")
    assert record["steps"] == 2
    assert evaluate.main([f"run={tmp_path / 'run'}"]) == 0


@pytest.mark.parametrize("method", ["bitfit", "linear_probe", "freeze", "full", "lora_bert", "gradual_unfreeze"])
def test_in_half_precision_what_trains_is_wider_than_what_is_frozen(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTLAB_BF16", "always")
    words = [f"method={method}", "precision=bf16", "training.max_steps=3", "evaluation.times=1"]
    record = trained(tmp_path / "run", *words, "evaluation.baseline=false")
    assert record["steps"] == 3
    assert record["skipped_steps"] == 0


def test_a_decoder_classifies_too(tmp_path: Path) -> None:
    record = trained(tmp_path / "run", "model=tiny_random", "method=lora", "training.max_steps=3")
    assert record["parameters"][0]["rule"].startswith("score")
    assert evaluate.main([f"run={tmp_path / 'run'}"]) == 0


def test_export_gives_a_model_that_transformers_reads(tmp_path: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    words = tmp_path / "words"
    write_wordpiece(words)
    run_dir, out = tmp_path / "run", tmp_path / "out"
    trained(run_dir, *LORA, f"model.tokenizer={words}", "head.pooling=pooler", "training.max_steps=3")
    assert export.main([f"run={run_dir}", f"out={out}"]) == 0
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    opened = open_run(run_dir, base=False)
    assert isinstance(opened.model, Classifier)
    assert opened.labels is not None
    assert theirs.config.id2label == dict(enumerate(opened.labels.names))
    batch = collate_labelled(opened.data().test, opened.labels, opened.tokenizer.pad_id)
    with torch.no_grad():
        expected = theirs(batch.input_ids, attention_mask=batch.mask.long()).logits
        torch.testing.assert_close(opened.model(batch), expected, rtol=1e-4, atol=1e-5)
    losses = []
    for words_of_one in ([], [f"model={out}"]):
        file = tmp_path / "scores.json"
        assert evaluate.main([f"run={run_dir}", f"out={file}", *words_of_one]) == 0
        content = json.loads(file.read_text())
        losses.append(content["scores"]["after"]["loss"]["value"])
    assert content["model"] == str(out)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def write_wordpiece(folder: Path) -> None:
    """A tokenizer like BERT's: letters, [CLS] and [SEP]."""
    letters = [chr(code) for code in range(97, 123)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *[f"##{letter}" for letter in letters], "."]
    folder.mkdir()
    tokenizer = transformers.BertTokenizerFast(vocab={word: number for number, word in enumerate(vocab)})
    tokenizer.save_pretrained(folder)


def test_commands_that_need_text_refuse(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main([f"run={finished}", "hello"]) != 0
    assert "this run is a classifier: it gives labels, not text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.packing=true"], "data.packing: each text is a row of its own"),
        (["data.share_prefix=true"], "data.share_prefix"),
        (["data.system=hello"], "data.system"),
        (["data.template=chatml"], "data.template"),
        (["training.activation_cache_gib=1"], "training.activation_cache_gib"),
        (["data.labels=regression", "data.shots=2"], "data.shots: numbers have no classes"),
        (["data.labels=regression", "regularizer.label_smoothing=0.1"], "there is no label to smooth"),
        (["data.labels=regression", "regularizer.r_drop=1"], "R-Drop compares distributions, and a number has none"),
        (["regularizer.r_drop=1"], "the same without dropout; give regularizer.dropout.residual"),
        (["data.shots=2", "data.limit_train=5"], "data.shots: data.limit_train"),
        (["checkpoint.metric=exact_match"], "is none of loss, accuracy"),
        (["data.labels=multi", "checkpoint.metric=mcc"], "is none of loss, subset_accuracy"),
        (["data=capitals"], "model: an encoder gives no text"),
        (["data=capitals", "model=tiny_random", "head.pooling=cls"], "head.pooling: a head of labels needs data"),
        (["data=capitals", "model=tiny_random", "checkpoint.metric=accuracy"], "is none of loss, perplexity"),
        (["data.source=hpo_organ", "data.test=builtin:topics.jsonl"], "source=hpo_organ splits its records"),
        (["data=privacy_policy", "data.labels=multi"], "each record of source=privacy_policy has one label"),
        (["data.instruction=''"], "data.instruction: it is empty"),
        (["data.instruction=Which?"], "model: an encoder gives no text"),
        (["data.instruction=Which?", "model=tiny_random", "head.pooling=mean"], "head.pooling: a head of labels needs"),
        (["data.instruction=Which?", "model=tiny_random", "checkpoint.metric=accuracy"], "is none of loss, perplexity"),
        (["data.instruction=Which?", "model=tiny_random", "data.labels=regression"], "a number is no answer"),
        (["data=hpo_organ", "data.labels=regression"], "organ systems are no numbers"),
        (["head.pooling=cls"], "head.pooling: cls reads the first token, but this tokenizer starts no text"),
        (["model.max_positions=8"], "tokens, but the encoder has 8 positions"),
        (
            ["data.pad_rows=true", "data.row_length=520"],
            "data.row_length: data.pad_rows=true pads to 520 tokens, and the encoder has 512 positions; lower it",
        ),
        (["method=lora"], "method.targets: 'q_proj' matches no layer"),
        (["data.max_length=16"], "over data.max_length=16"),
    ],
)
def test_contradictions_are_named(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*TINY, *overrides, f"run_dir={tmp_path / 'run'}"]) != 0
    assert message in capsys.readouterr().err


def test_an_encoder_folder_is_refused_for_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.utils.logging.disable_progress_bar()
    small = transformers.BertConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(small).save_pretrained(tmp_path / "bert")
    model = ["+experiment=full_tiny", f"run_dir={tmp_path / 'run'}", "model=minilm", "model.tokenizer=bytes"]
    assert train.main([*model, f"model.location={tmp_path / 'bert'}", "tracking=disabled"]) != 0
    assert "is an encoder, which gives no text" in capsys.readouterr().err


def test_labels_that_changed_since_are_refused(tmp_path: Path) -> None:
    rows = [{"text": f"number {i}", "label": "ab"[i % 2]} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained(tmp_path / "run", "data=labelled", f"data.train={path}", "training.max_steps=1", "method=full")
    rows[0]["label"] = "b"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(FtlabError, match="data changed since the run"):
        open_run(tmp_path / "run", base=False).data()


@pytest.mark.network
@pytest.mark.slow
def test_minilm_learns_organ_systems(tmp_path: Path) -> None:
    """Twenty steps of the experiment: far above the most frequent label, which 18 % of the definitions have."""
    sizes = ["data.limit_train=640", "data.limit_validation=50", "data.limit_test=200", "training.max_steps=20"]
    words = ["+experiment=classify_medical", *sizes, "tracking=disabled", f"run_dir={tmp_path / 'run'}"]
    assert train.main(words) == 0
    scores = json.loads((tmp_path / "run" / "run.json").read_text())["scores"]
    assert scores["final"]["accuracy"]["low"] > 40 > scores["base"]["accuracy"]["high"]
    assert scores["final"]["auroc"]["value"] > 85


def test_asked_as_a_conversation_it_is_a_language_model_run(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    causal = ["model=tiny_random", "method=lora", "training.max_steps=2", "evaluation.times=1"]
    trained(first, *causal, "data=capitals", "data.limit_train=20")
    assert fisher.main([f"run={first}", "examples=4"]) == 0
    asked = ["data.instruction=Which topic?", "data.packing=true", "evaluation.generate=true"]
    earlier = [
        f"method.start_from={first / 'adapter'}",
        f"regularizer.replay.source=[{first}]",
        "regularizer.replay.share=0.2",
        f"regularizer.ewc.source=[{first}]",
        "regularizer.ewc.strength=1",
        "regularizer.lwf.strength=0.5",
    ]
    record = trained(second, *causal, *asked, *earlier)
    assert record["labels"] is None
    assert "exact_match" in record["scores"]["final"]
    assert any(note.startswith("replay:") for note in record["data"]["notes"])
    answers = [json.loads(line) for line in (second / "predictions" / "final.jsonl").read_text().splitlines()]
    assert {answer["reference"] for answer in answers} <= {"cooking", "sport", "weather"}
    assert fisher.main([f"run={second}", "examples=4"]) == 0


def asked(labels: list[Any], kind: str = "single") -> tuple[LabelledDataConfig, Splits]:
    """Records with these labels, the last of them in the test split, as answers to an instruction."""
    records: list[Record] = [labelled_record(str(n), f"text {n}", None, label) for n, label in enumerate(labels)]
    data = LabelledDataConfig(train="unused", labels=kind, instruction="Which?")
    return data, Splits(records[:-1], [], records[-1:])


@pytest.mark.parametrize(
    ("kind", "labels", "told"),
    [
        ("single", ["C", "D", "C#"], "cannot tell the labels 'C' and 'C#' apart"),
        ("single", ["1", "-1", "2"], "cannot tell the labels '-1' and '1' apart"),
        ("single", ["A", "b", "a"], "cannot tell the labels 'A' and 'a' apart"),
        ("single", ["a", "?", "b"], "cannot tell the label '?' from an empty answer"),
        ("multi", [("a", "B"), ("b",), ()], "cannot tell the labels 'B' and 'b' apart"),
        ("multi", [("c", "C#"), ("a",)], "cannot tell the labels 'C#' and 'c' apart"),
        ("multi", [("b", "none"), ()], "cannot tell the labels [] and 'none' apart"),
        ("multi", [("a, b",), ("a", "b")], "cannot tell the labels ['a', 'b'] and 'a, b' apart"),
    ],
)
def test_labels_that_exact_match_takes_for_one_are_refused_as_answers(kind: str, labels: list[Any], told: str) -> None:
    data, splits = asked(labels, kind)
    with pytest.raises(FtlabError, match=f"data.instruction: .*{re.escape(told)}"):
        classify.check_answers(data, splits)
    classify.check_answers(replace(data, instruction=None), splits)  # a head tells them by their numbers


def test_labels_that_exact_match_tells_apart_are_answers() -> None:
    classify.check_answers(*asked([("a", "b"), ("b",), ("a b",), ()], "multi"))
    classify.check_answers(*asked(["true", "false", "C", "C++ 17"]))


def test_they_are_refused_before_anything_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"number {i}", "label": ["C", "C#"][i % 2]} for i in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["data=labelled", f"data.train={path}", "model=tiny_random", "method=lora", "training.max_steps=1"]
    run_dir = tmp_path / "asked"
    assert train.main([*TINY, *words, "data.instruction=Which?", f"run_dir={run_dir}"]) == 1
    assert (
        "cannot tell the labels 'C' and 'C#' apart; rename one in the data, or train a head, without data.instruction"
        in capsys.readouterr().err
    )
    assert not json.loads((run_dir / "run.json").read_text()).get("scores")
    trained(tmp_path / "head", *words, "evaluation.times=1")


def test_an_encoder_with_one_kind_of_segment_takes_no_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.utils.logging.disable_progress_bar()
    small = transformers.BertConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        type_vocab_size=1,
    )
    transformers.BertModel(small).save_pretrained(tmp_path / "bert")
    model = ["model=minilm", "model.tokenizer=bytes", f"model.location={tmp_path / 'bert'}", "method=full"]
    for name, pair in (("pairs", {"text_pair": "second"}), ("alone", {})):
        rows = [{"text": f"number {i}", "label": "ab"[i % 2], **pair} for i in range(20)]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run_dir = tmp_path / name
        words = [*model, "data=labelled", f"data.train={path}", "training.max_steps=1", f"run_dir={run_dir}"]
        code = train.main([*TINY, *words])
        said = capsys.readouterr().err
        assert code == (name == "pairs"), said
        if code:
            assert ": has a second text, but the encoder has one kind of segment (type_vocab_size=1)" in said
            assert "join the texts in one field" in said
            assert not json.loads((run_dir / "run.json").read_text()).get("scores")


def test_a_metric_that_validation_cannot_settle_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, labels in (("train", "ab"), ("one", "a")):
        rows = [json.dumps({"text": f"{name} {i}", "label": labels[i % len(labels)]}) + "\n" for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    words = ["data=labelled", f"data.train={tmp_path / 'train.jsonl'}", f"data.validation={tmp_path / 'one.jsonl'}"]
    words += ["data.test_fraction=0", "method=full", "training.max_steps=2", f"run_dir={tmp_path / 'run'}"]
    assert train.main([*TINY[1:3], *words, "checkpoint.metric=auroc"]) == 2
    said = capsys.readouterr().err
    assert "checkpoint.metric: the 8 validation texts and their labels do not settle auroc; give others, or one" in said
    assert train.main([*TINY[1:3], *words, "checkpoint.metric=accuracy"]) == 0
