from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ftlab.data.labelled import LabelledExample
from ftlab.errors import ConfigError, FtlabError
from ftlab.losses.classification import classification_loss
from ftlab.models.bert import load_bert
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.heads import (
    BertClassifier,
    Classifier,
    Head,
    LlamaClassifier,
    fresh_layers,
    head_in,
    head_layers,
    pool,
    read_head,
    refill,
)
from ftlab.models.labels import LabelSet, label_text
from ftlab.models.loading import load_model
from tests.helpers.classifiers import (
    LABELS,
    MULTI,
    NUMBER,
    batch_of,
    shake,
    texts,
    tiny_bert_classifier,
    tiny_llama_classifier,
)
from tests.helpers.models import tiny_llama


def assert_one_loss_and_its_gradients(ours: Classifier, theirs: Any, **inputs: torch.Tensor) -> None:
    """The cross-entropy of both on the usual batch, and the gradient of every parameter."""
    batch = batch_of(texts())
    loss = classification_loss(ours, batch, "single") / len(batch.labels)
    expected = theirs(batch.input_ids, attention_mask=batch.mask.long(), labels=batch.labels, **inputs).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    named = dict(theirs.named_parameters())
    assert named.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, named[name].grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def test_pooling_by_hand() -> None:
    h = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert pool(h, mask, "mean").tolist() == [[2, 3], [7, 8]]
    assert pool(h, mask, "cls").tolist() == [[0, 1], [6, 7]]
    assert pool(h, mask, "last").tolist() == [[4, 5], [8, 9]]
    h[1, 2] = torch.nan  # what stands behind a text must not matter
    assert pool(h, mask, "mean")[1].tolist() == [7, 8]


@pytest.mark.parametrize(
    "model",
    [
        tiny_bert_classifier(),
        tiny_bert_classifier(pooling="cls"),
        tiny_bert_classifier(pooling="pooler"),
        tiny_llama_classifier(),
        tiny_llama_classifier(pooling="mean"),
    ],
    ids=["mean", "cls", "pooler", "llama last", "llama mean"],
)
def test_a_text_is_judged_alone_whatever_it_is_batched_with(model: Classifier) -> None:
    model.eval()
    examples = texts()
    together, padded = model(batch_of(examples)), model(batch_of(examples, multiple=16))
    alone = torch.cat([model(batch_of([example])) for example in examples])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(padded, alone)


def test_an_encoder_with_its_pooler_is_transformers_classifier(tmp_path: Path) -> None:
    ours = tiny_bert_classifier(pooling="pooler").eval()
    shake(ours)
    save_safetensors(ours, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == {0: "heart", 1: "kidney", 2: "skin"}
    assert set(theirs.state_dict()) == set(ours.state_dict())
    batch = batch_of(texts())
    expected = theirs(batch.input_ids, attention_mask=batch.mask.long(), token_type_ids=batch.token_types).logits
    torch.testing.assert_close(ours(batch), expected)
    assert_one_loss_and_its_gradients(ours, theirs, token_type_ids=batch.token_types)


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_is_transformers_classifier(tied: bool, tmp_path: Path) -> None:
    ours = tiny_llama_classifier(tie_word_embeddings=tied, pad_token_id=0).eval()
    shake(ours)
    save_safetensors(ours, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert set(theirs.state_dict()) == set(ours.state_dict())
    batch = batch_of(texts())
    torch.testing.assert_close(ours(batch), theirs(batch.input_ids, attention_mask=batch.mask.long()).logits)
    assert_one_loss_and_its_gradients(ours, theirs)


def test_the_head_is_drawn_by_its_seed_alone() -> None:
    bert = tiny_bert_classifier().bert
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = BertClassifier(bert, Head(LABELS, "mean", seed=3)), BertClassifier(bert, Head(LABELS, "mean", seed=4))
    assert torch.equal(torch.get_rng_state(), state)
    again = BertClassifier(bert, Head(LABELS, "mean", seed=3))
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, two.classifier.weight)
    assert not one.classifier.bias.any()


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "pooler"])
def test_padding_beyond_the_positions_is_cut_off(pooling: str) -> None:
    """Rows are padded to a multiple, which the 40 positions need not be; tokens there are an error."""
    model = tiny_bert_classifier(pooling=pooling).eval()
    whole = LabelledExample("long", [2] * 40, [False] * 40, False, [0] * 40, 1)
    wide, narrow = (batch_of([*texts(), whole], multiple=multiple) for multiple in (16, 1))
    assert (wide.input_ids.shape[1], narrow.input_ids.shape[1]) == (48, 40)
    assert torch.equal(model(wide), model(narrow))
    longer = LabelledExample("longer", [2] * 41, [False] * 41, False, [0] * 41, 1)
    with pytest.raises(FtlabError, match="the encoder has 40 positions"):
        model(batch_of([longer], multiple=16))


def test_poolings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="reads the first token, which in a decoder"):
        LlamaClassifier(tiny_llama(), Head(LABELS, "cls"))
    with pytest.raises(ConfigError, match="loaded with its pooler"):
        BertClassifier(tiny_bert_classifier().bert, Head(LABELS, "pooler"))


def test_a_saved_classifier_comes_back_and_another_is_refused(tmp_path: Path) -> None:
    model = tiny_bert_classifier()
    shake(model)
    save_safetensors(model, tmp_path)
    other = tiny_bert_classifier(seed=9)
    refill(other, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(FtlabError, match="ftlab_pooling"):
        refill(tiny_bert_classifier(pooling="cls"), tmp_path)
    with pytest.raises(FtlabError, match="id2label"):
        refill(tiny_bert_classifier(LabelSet("single", ("heart", "kidney", "eye"))), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["classifier.bias"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(FtlabError, match=r"missing classifier\.bias"):
        refill(other, tmp_path)


# --- a whole classifier as the start of another ----------------------------------------------------------------------


def started_from(folder: Path, head: Head) -> Classifier:
    """A classifier whose body and head are read from a folder."""
    model: Classifier
    if json.loads((folder / "config.json").read_text())["model_type"] == "bert":
        model = BertClassifier(load_bert(folder, pooler=head.pooling == "pooler"), head)
    else:
        model = LlamaClassifier(load_model(folder, classifier=True), head)
    read_head(model, folder)
    return model.eval()


@pytest.mark.parametrize(
    "model",
    [
        tiny_bert_classifier(),
        tiny_bert_classifier(MULTI, pooling="pooler"),
        tiny_bert_classifier(NUMBER, pooling="cls"),
        tiny_llama_classifier(),
        tiny_llama_classifier(MULTI, pooling="mean", tie_word_embeddings=False),
    ],
    ids=["mean", "pooler multi", "cls number", "llama", "llama mean multi untied"],
)
def test_body_and_head_are_read_from_our_folder(model: Classifier, tmp_path: Path) -> None:
    shake(model.eval())
    save_safetensors(model, tmp_path)
    found = head_in(tmp_path)
    assert found is not None
    assert found.facts() == model.head.facts()
    again = started_from(tmp_path, replace(found, seed=9))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert head_layers(again) == head_layers(model) == fresh_layers(model)
    assert fresh_layers(again) == (), "it has a first value to be held to"


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_body_and_head_are_read_from_transformers_folder(kind: str, tmp_path: Path) -> None:
    ours: Classifier = tiny_bert_classifier(pooling="pooler") if kind == "encoder" else tiny_llama_classifier()
    save_safetensors(ours, tmp_path / "config")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "config")
    del config.ftlab_pooling
    config.problem_type, config.pad_token_id = None, 0
    theirs = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    found = head_in(tmp_path / "theirs")
    assert found == Head(LABELS, "pooler" if kind == "encoder" else "last")
    batch = batch_of(texts())
    types = {"token_type_ids": batch.token_types} if kind == "encoder" else {}
    expected = theirs(batch.input_ids, attention_mask=batch.mask.long(), **types).logits
    torch.testing.assert_close(started_from(tmp_path / "theirs", found)(batch), expected)


def test_other_folders_have_no_head_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    save_safetensors(tiny_llama(), tmp_path / "text")
    assert head_in(tmp_path / "text") is None
    assert head_in(tmp_path / "text" / "model.safetensors") is None
    model = tiny_bert_classifier()
    save_safetensors(model, tmp_path / "labels")
    config = tmp_path / "labels" / "config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps(fields | {"ftlab_pooling": "max"}))
    with pytest.raises(FtlabError, match="ftlab_pooling='max' is none of mean, cls, pooler, last"):
        head_in(tmp_path / "labels")
    config.write_text(json.dumps(fields | {"architectures": ["BertForTokenClassification"]}))
    with pytest.raises(FtlabError, match=r"unexpected classifier\.bias"):
        load_bert(tmp_path / "labels")
    config.write_text(json.dumps(fields))
    with pytest.raises(FtlabError, match=r"misshapen classifier\.bias \(3,\) instead of \(2,\)"):
        read_head(tiny_bert_classifier(LabelSet("single", ("a", "b"))), tmp_path / "labels")


def test_a_head_is_read_as_it_is_whatever_its_body_is_stored_in(tmp_path: Path) -> None:
    model = tiny_bert_classifier()
    shake(model)
    save_safetensors(model, tmp_path)
    half = BertClassifier(load_bert(tmp_path, dtype=torch.bfloat16), Head(LABELS, "mean"))
    assert half.classifier.weight.dtype == torch.bfloat16
    read_head(half, tmp_path)
    assert torch.equal(half.classifier.weight, model.classifier.weight)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_labels_are_sorted_and_become_targets() -> None:
    single = LabelSet.of("single", ["b", "a", "b", "c"])
    assert single.names == ("a", "b", "c")
    assert single.target("b", "x") == 1
    multi = LabelSet.of("multi", [("b", "a"), (), ("c",)])
    assert multi.target(("c", "a"), "x") == (1.0, 0.0, 1.0)
    assert multi.target((), "x") == (0.0, 0.0, 0.0)
    assert LabelSet.of("regression", [1.0]).target(2.5, "x") == 2.5
    assert LabelSet.from_dict(json.loads(json.dumps(multi.as_dict()))) == multi


@pytest.mark.parametrize("labels", [LABELS, MULTI, NUMBER, LabelSet("multi", ("one",))], ids=str)
def test_labels_come_back_from_a_config(labels: LabelSet) -> None:
    assert LabelSet.from_hf(json.loads(json.dumps(labels.to_hf())), "x") == labels


def test_labels_of_transformers_config_whose_defaults_are_left_out() -> None:
    assert LabelSet.from_hf({}, "x") == LabelSet("single", ("LABEL_0", "LABEL_1"))
    assert LabelSet.from_hf({"id2label": {"0": "LABEL_0"}}, "x") == NUMBER
    names = {"1": "b", "0": "a", **{str(n): f"l{n}" for n in range(2, 12)}}
    assert LabelSet.from_hf({"id2label": names}, "x").names == ("a", "b", *(f"l{n}" for n in range(2, 12)))
    two_numbers = LabelSet.from_hf({"problem_type": "regression"}, "x")
    assert two_numbers.kind == "regression"
    assert two_numbers != NUMBER
    for fields, complaint in (
        ({"id2label": {"1": "a", "2": "b"}}, "from 0 on"),
        ({"id2label": ["a", "b"]}, "from 0 on"),
        ({"problem_type": "ranking"}, "problem_type='ranking' is none of"),
    ):
        with pytest.raises(FtlabError, match=f"where: .*{complaint}"):
            LabelSet.from_hf(fields, "where")


@pytest.mark.parametrize(
    ("kind", "label", "message"),
    [
        ("single", "kidnay", "row 7: no training record has the label 'kidnay'.*did you mean 'kidney'"),
        ("multi", ("heart", "nail"), "row 7: no training record has the label 'nail'"),
    ],
)
def test_a_label_that_training_does_not_have_is_named(kind: str, label: Any, message: str) -> None:
    with pytest.raises(FtlabError, match=message):
        LabelSet(kind, LABELS.names).target(label, "row 7")


def test_one_label_is_no_classifier() -> None:
    with pytest.raises(FtlabError, match=r"\['a'\]: a classifier needs two or more \(data.labels=single\)"):
        LabelSet.of("single", ["a", "a"])
    with pytest.raises(FtlabError, match=r"\[\]: a classifier needs one or more \(data.labels=multi\)"):
        LabelSet.of("multi", [(), ()])
    assert LabelSet.of("multi", [("a",), ()]).names == ("a",)


def test_answers_as_text() -> None:
    assert LABELS.predicted([0.1, 0.7, 0.2]) == "kidney"
    assert LabelSet("multi", LABELS.names).predicted([0.5, 0.49, 0.9]) == "heart, skin"
    assert LabelSet("multi", LABELS.names).predicted([0.1, 0.2, 0.3]) == label_text(()) == "(none)"
    number = LabelSet("regression", ())
    assert number.predicted([2.5]) == label_text(2.5) == "2.5"
    written = {1234567.0: "1234567", 0.1234567891: "0.1234567891", 2.0: "2", -3.0: "-3", 1e-7: "1e-07", 1e30: "1e+30"}
    assert {value: label_text(value) for value in written} == written
    assert number.predicted([float(torch.tensor(0.1))]) == "0.1", "no more digits than fp32 has"
    assert number.predicted([1234567.0]) == "1234567"
