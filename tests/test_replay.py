"""Replay as a user has it: from one run to the next, resumed, evaluated from another folder, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ftlab import build, evaluate
from ftlab.compose import compose
from ftlab.errors import ConfigError, FtlabError
from ftlab.session import train

FIXED = ["tracking=disabled", "training.preflight=false", "training.max_steps=6", "evaluation=none"]
CAPITALS = ["+experiment=full_tiny", "data.limit_train=6"]
LABELS = ["data=topics", "model=tiny_bert_random", "data.limit_train=6"]


def run(folder: Path, *words: str) -> dict[str, Any]:
    assert train(*compose([*FIXED, f"run_dir={folder}", *words])) == 0
    record: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    return record


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on some capitals, with a system message of its own."""
    folder = tmp_path_factory.mktemp("earlier") / "first"
    run(folder, *CAPITALS, "data.system=Be brief.", "data.split_seed=3")
    return folder


def other(folder: Path) -> list[str]:
    """A second task: records of one's own."""
    lines = [
        {"messages": [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(8)
    ]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n", "utf-8")
    split = ["data.validation_fraction=0", "data.test_fraction=0"]
    return ["+experiment=full_tiny", "data=files", f"data.train={folder}/sums.jsonl", *split]


def test_from_one_run_to_the_next(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*other(tmp_path), "training.seed=1", "checkpoint.every_steps=3"]
    replay = ["regularizer=replay", f"regularizer.replay.source=[{first}]"]
    run(tmp_path / "plain", *words)
    run(tmp_path / "zero", *words, *replay, "regularizer.replay.share=0")
    plain, zero = weights(tmp_path / "plain"), weights(tmp_path / "zero")
    assert all(torch.equal(plain[name], zero[name]) for name in plain), "a share of 0 is bitwise the run without it"

    record = run(tmp_path / "second", *words, *replay)
    assert any(not torch.equal(plain[name], tensor) for name, tensor in weights(tmp_path / "second").items())
    assert (record["data"]["train"], record["data"]["replayed_in_epoch"]) == (8, 2)
    assert f"each epoch has 8 new examples and 2 of the 6 of {first} (20.0%)" in " ".join(record["data"]["notes"])
    assert "replayed data" in record["inputs"]

    checkpoint = tmp_path / "second" / "checkpoints" / "step-00000003"
    again = run(tmp_path / "again", *words, *replay, f"resume={checkpoint}")
    assert again["resumed_from"] == [3]
    assert again["data_digest"] == record["data_digest"]
    resumed = weights(tmp_path / "again")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights(tmp_path / "second").items())


def test_what_is_replayed_is_the_earlier_runs_training_data_in_this_runs_words(first: Path, tmp_path: Path) -> None:
    replay = ["regularizer=replay", f"regularizer.replay.source=[{first}]", "data.template=chatml"]
    config, _ = compose([*FIXED, *other(tmp_path), *replay])
    tokenizer = build.build_tokenizer(config)
    data = build.build_data(config, tokenizer)
    before, _ = compose([*FIXED, *CAPITALS, "data.system=Be brief.", "data.split_seed=3", "data.template=chatml"])
    own = build.build_data(before, tokenizer).train
    assert [example.id for example in data.replayed] == [f"first/{example.id}" for example in own]
    assert [example.content[1:] for example in data.replayed] == [example.content[1:] for example in own]
    assert "Be brief." in tokenizer.decode(list(data.replayed[0].token_ids))
    assert len(build.build_loader(config, data, tokenizer).examples) == len(data.train) + 6


def test_runs_of_one_name_give_no_two_examples_one_id(first: Path, tmp_path: Path) -> None:
    shutil.copytree(first, tmp_path / "first")
    replay = ["regularizer=replay", f"regularizer.replay.source=[{first},{tmp_path}/first]"]
    config, _ = compose([*FIXED, *other(tmp_path), *replay])
    replayed = build.build_data(config, build.build_tokenizer(config)).replayed
    assert {example.id.partition("/")[0] for example in replayed} == {"1-first", "2-first"}
    assert len({example.id for example in replayed}) == len(replayed) == 12


def test_a_run_with_it_can_be_evaluated_from_any_folder(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(first.parent)
    run(tmp_path / "run", *CAPITALS, "regularizer=replay", "regularizer.replay.source=[first]")
    monkeypatch.chdir(tmp_path)
    assert evaluate.main(["run=run", "out=scores.json", "base=no"]) == 0


def test_classifiers_replay_labels(tmp_path: Path) -> None:
    run(tmp_path / "first", *LABELS, "method=full")
    source = ["regularizer=replay", f"regularizer.replay.source=[{tmp_path}/first]"]
    record = run(tmp_path / "second", *LABELS, "method=full", "data.split_seed=1", *source)
    assert record["data"]["replayed_in_epoch"] == 2

    with pytest.raises(FtlabError, match="learnt labels and this one learns conversations"):
        run(tmp_path / "third", *CAPITALS, *source)
    mine = tmp_path / "mine.csv"
    mine.write_text("text,label\n" + "".join(f"text {n},{'ab'[n % 2]}\n" for n in range(12)), "utf-8")
    with pytest.raises(FtlabError, match=r"first: that run's labels \(single: cooking, sport, weather\) are not this"):
        run(tmp_path / "fourth", "data=labelled", f"data.train={mine}", "model=tiny_bert_random", *source)


def test_what_cannot_be_replayed_is_refused(first: Path, tmp_path: Path) -> None:
    source = ["regularizer=replay", f"regularizer.replay.source=[{first}]"]
    with pytest.raises(FtlabError, match="learnt conversations and this one learns labels"):
        run(tmp_path / "a", *LABELS, *source)
    with pytest.raises(FtlabError, match=r"replay\.source: .*first: .*over data\.max_length=32"):
        run(tmp_path / "b", *other(tmp_path), *source, "data.max_length=32")
    with pytest.raises(FtlabError, match="no earlier example is left"):
        run(tmp_path / "c", *other(tmp_path), *source, "data.max_length=32", "data.too_long=drop")
    run(tmp_path / "sums", *other(tmp_path))
    sums = tmp_path / "sums.jsonl"
    sums.write_text(2 * sums.read_text("utf-8"), "utf-8")
    with pytest.raises(FtlabError, match="changed since that run"):
        run(tmp_path / "d", *CAPITALS, "regularizer=replay", f"regularizer.replay.source=[{tmp_path}/sums]")


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["regularizer=replay"], "names no earlier run"),
        (["regularizer=replay", "regularizer.replay.source=[absent]"], "not a run folder"),
        (["regularizer=replay", "regularizer.replay.source=[FIRST,FIRST]"], "names a run twice"),
        (["regularizer=replay", "regularizer.replay.source=[FIRST,FIRST/]"], r"replay\.source: it names a run twice"),
        (["regularizer=ewc", "regularizer.ewc.source=[FIRST/../first,FIRST]"], r"ewc\.source: it names a run twice"),
        (["regularizer.replay.share=1"], "less than 1"),
    ],
)
def test_the_configuration_is_checked(words: list[str], complaint: str, first: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        compose([*CAPITALS, *(word.replace("FIRST", str(first)) for word in words)])
