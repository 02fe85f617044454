"""Means of runs and the way from the base to a run: the weights written are those of the formula."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ftlab import build, evaluate
from ftlab.compose import compose
from ftlab.errors import FtlabError
from ftlab.methods.interpolation import Soup, greedy_soup, interpolated, normalised
from ftlab.methods.lora import lora_leaves
from ftlab.models.loading import load_model
from ftlab.open_run import open_run
from ftlab.session import train
from ftlab.soup import main
from ftlab.training.parallel import Ranks

State = dict[str, Tensor]
TINY = ["+experiment=full_tiny", "tracking=disabled", "evaluation=loss_only", "training.max_steps=4"]


def finished(folder: Path, words: list[str], settings: dict[str, list[str]]) -> Path:
    """The folder, with a run for each of the settings."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ftlab.session.write_report", lambda run_dir: run_dir)
        for name, overrides in settings.items():
            assert train(*compose([*words, f"run_dir={folder / name}", *overrides])) == 0
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `one` and `two` (full), `lora`, and those that do not go with them."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {
        "one": [],
        "two": ["training.seed=1", "optimizer.lr=1e-3"],
        "lora": ["method=lora", "method.rank=2", "optimizer.lr=1e-2"],
        "half": ["method=lora", "precision=bf16", "training.max_steps=1"],
        "quantised": ["method=qlora", "method.rank=2", "optimizer.lr=1e-2"],
        "other_base": ["model.init_seed=7"],
        "other_data": ["data.split_seed=5"],
    }
    return finished(folder, TINY, settings)


def full(runs: Path, name: str) -> State:
    return load_file(runs / name / "model/model.safetensors")


def base(runs: Path) -> State:
    opened = open_run(runs / "one", base=True)
    model = build.build_model(opened.config, opened.tokenizer, Ranks(), dtype=torch.float32)
    return dict(model.state_dict())


def lora(runs: Path) -> State:
    """W + s B A from the files of the adapter."""
    adapter = load_file(runs / "lora/adapter/adapter_model.safetensors")
    settings = json.loads((runs / "lora/adapter/adapter_config.json").read_text())
    state = base(runs)
    for name in [key for key in adapter if key.endswith("lora_A.weight")]:
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        update = adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + settings["lora_alpha"] / settings["r"] * update
    return state


def cooked(runs: Path, out: Path, names: list[str], *settings: str) -> tuple[State, dict[str, Any]]:
    assert main([f"runs=[{','.join(str(runs / name) for name in names)}]", f"out={out}", *settings]) == 0
    return load_file(out / "model.safetensors"), json.loads((out / "soup.json").read_text())


def assert_close(ours: State, theirs: State) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-5)


def test_a_uniform_soup_is_the_mean(runs: Path, tmp_path: Path) -> None:
    found, facts = cooked(runs, tmp_path / "out", ["one", "two"])
    one, two = full(runs, "one"), full(runs, "two")
    assert any(not torch.equal(one[name], tensor) for name, tensor in two.items())
    assert_close(found, {name: (tensor + two[name]) / 2 for name, tensor in one.items()})
    assert facts["weights"] == [0.5, 0.5]
    assert facts["runs"] == [str(runs / "one"), str(runs / "two")]
    model = load_model(tmp_path / "out")
    assert_close(dict(model.state_dict()), found)


def test_full_and_lora_runs_mix_by_their_effective_weights(runs: Path, tmp_path: Path) -> None:
    found, facts = cooked(runs, tmp_path / "out", ["one", "lora", "two"], "weights=[1,2,1]")
    states = [full(runs, "one"), lora(runs), full(runs, "two")]
    assert facts["weights"] == [0.25, 0.5, 0.25]
    assert_close(found, {n: 0.25 * states[0][n] + 0.5 * states[1][n] + 0.25 * states[2][n] for n in found})


@pytest.mark.parametrize("name", ["one", "lora"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_wise_ft_lies_between_the_base_and_the_run(runs: Path, tmp_path: Path, name: str, alpha: float) -> None:
    found, facts = cooked(runs, tmp_path / "out", [name], f"alpha={alpha}")
    start, end = base(runs), lora(runs) if name == "lora" else full(runs, name)
    assert_close(found, {key: (1 - alpha) * start[key] + alpha * end[key] for key in start})
    losses = facts["validation_loss"]
    assert alpha != 0 or losses["out"] == pytest.approx(losses["base"])


def test_the_way_to_a_quantised_run_begins_at_its_quantised_base(runs: Path, tmp_path: Path) -> None:
    found, _ = cooked(runs, tmp_path / "out", ["quantised"], "alpha=0.3")
    leaves = lora_leaves(open_run(runs / "quantised", base=False).model)
    assert leaves
    for name, leaf in leaves.items():
        expected = leaf._base() + 0.3 * leaf.scale * (leaf.lora_B @ leaf.lora_A)
        torch.testing.assert_close(found[f"{name}.weight"], expected, atol=1e-6, rtol=1e-5)


def test_the_losses_are_those_of_the_runs(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, facts = cooked(runs, tmp_path / "out", ["one", "two"])
    lines = (json.loads(line) for line in (runs / "one/metrics.jsonl").read_text().splitlines())
    record = json.loads((runs / "one/run.json").read_text())
    validation = {line["step"]: line["loss"] for line in lines if line["split"] == "validation"}
    expected = validation[record["best"]["step"]]
    assert facts["validation_loss"]["runs"][str(runs / "one")] == pytest.approx(expected, rel=1e-5)
    assert f"{expected:.4f}  {runs / 'one'}" in capsys.readouterr().out


def test_the_facts_of_a_run_that_diverged_are_json(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftlab.soup._Kitchen.loss_of", lambda self, state: math.nan)
    both = f"runs=[{runs / 'one'},{runs / 'two'}]"
    assert main([both, f"out={tmp_path / 'out'}"]) == 0
    facts = json.loads((tmp_path / "out/soup.json").read_text(), parse_constant=pytest.fail)
    assert facts["validation_loss"]["out"] == "nan"
    assert set(facts["validation_loss"]["runs"].values()) == {"nan"}


def scored(run: Path, *words: str) -> float:
    out = run.parent / "scores.json"
    assert evaluate.main([f"run={run}", "split=validation", f"out={out}", *words]) == 0
    return float(json.loads(out.read_text())["scores"]["after"]["loss"]["value"])


def test_a_soup_and_another_run_are_scored_on_the_data_of_a_run(runs: Path, tmp_path: Path) -> None:
    _, facts = cooked(runs, tmp_path / "out", ["one", "lora"])
    losses = facts["validation_loss"]
    assert scored(runs / "one", f"model={tmp_path / 'out'}") == pytest.approx(losses["out"], abs=1e-4)
    # a LoRA run, whose own weights are stored otherwise, asks a fully trained one
    assert scored(runs / "lora", f"model={runs / 'one/model'}") == pytest.approx(scored(runs / "one"), abs=1e-4)
    assert len({round(scored(runs / "one", f"model={runs / name}"), 4) for name in ("one/model", "two/model")}) == 2


def test_a_whole_model_and_the_base_beside_it_are_stored_alike(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLAB_BF16", "always")

    def dtypes(**how: Any) -> set[torch.dtype]:
        return {parameter.dtype for parameter in open_run(runs / "half", **how).model.parameters()}

    assert torch.bfloat16 in dtypes(base=False)
    for base in (False, True):
        assert dtypes(base=base, whole=runs / "one/model") == {torch.float32}


def test_a_greedy_soup_of_runs_is_no_worse_than_the_best_of_them(runs: Path, tmp_path: Path) -> None:
    found, facts = cooked(runs, tmp_path / "out", ["one", "two", "lora"], "kind=greedy")
    losses = facts["validation_loss"]
    assert losses["out"] <= min(losses["runs"].values()) + 1e-6
    assert facts["runs"][0] == min(losses["runs"], key=losses["runs"].__getitem__)
    states = {
        str(runs / "one"): full(runs, "one"),
        str(runs / "two"): full(runs, "two"),
        str(runs / "lora"): lora(runs),
    }
    kept = [states[name] for name in facts["runs"]]
    assert_close(found, {name: sum(state[name] for state in kept) / len(kept) for name in found})


def test_greedy_takes_what_does_not_make_it_worse() -> None:
    """One weight, loss (x - 1)^2. From the best, 1.5: the mean with 0.4 is nearer to 1; those with 0 and 9 are not."""
    values = [9.0, 0.4, 0.0, 1.5]

    def state_of(number: int) -> State:
        return {"x": torch.tensor([values[number]])}

    def loss_of(state: Any) -> float:
        return float((state["x"] - 1).square())

    losses = [loss_of(state_of(number)) for number in range(4)]
    soup, taken, loss = greedy_soup(losses, state_of, loss_of)
    assert taken == [3, 1]
    assert float(soup.state["x"]) == pytest.approx(0.95)
    assert loss == pytest.approx(0.05**2, rel=1e-4)


def test_a_run_that_diverged_is_not_the_best() -> None:
    """A loss that is not a number compares as neither smaller nor larger."""
    values = [math.nan, 2.0, 1.5]

    def state_of(number: int) -> State:
        return {"x": torch.tensor([values[number]])}

    def loss_of(state: Any) -> float:
        return float((state["x"] - 1).square())

    for order in itertools.permutations(range(3)):
        losses = [loss_of(state_of(number)) for number in order]
        soup, taken, loss = greedy_soup(losses, lambda place, order=order: state_of(order[place]), loss_of)
        assert [values[order[place]] for place in taken] == [1.5]
        assert (float(soup.state["x"]), loss) == (1.5, 0.25)
    with pytest.raises(FtlabError, match="no run has a finite validation loss"):
        greedy_soup([math.nan, math.inf], state_of, loss_of)


def test_the_sum_of_weights_does_not_matter() -> None:
    states = [{"x": torch.tensor([1.0])}, {"x": torch.tensor([3.0])}, {"x": torch.tensor([5.0])}]
    soup = Soup()
    for state, weight in zip(states, [2.0, 4.0, 2.0], strict=True):
        soup = soup.with_one(state, weight)
    assert float(soup.state["x"]) == pytest.approx(3.0)
    assert normalised([2.0, 4.0, 2.0]) == [0.25, 0.5, 0.25]
    assert float(interpolated(states[0], states[2], 0.25)["x"]) == pytest.approx(2.0)
    assert float(states[0]["x"]) == 1.0


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with classifiers of one base: two of all weights, an adapter, and those that do not go with them."""
    folder = tmp_path_factory.mktemp("classifiers")
    words = ["data=topics", "model=tiny_bert_random", "tracking=disabled", "training.max_steps=4", "evaluation.times=1"]
    topics = (Path(build.__file__).parent / "data/examples/topics.jsonl").read_text().splitlines()
    lists = [{**row, "label": [row["label"]]} for row in map(json.loads, topics)]
    (folder / "lists.jsonl").write_text("\n".join(map(json.dumps, lists)) + "\n")
    settings = {
        "one": ["method=full"],
        "two": ["method=full", "optimizer.lr=1e-2"],
        "lora": ["method=lora_bert", "method.rank=2", "optimizer.lr=1e-2"],
        "several": ["method=full", "data.labels=multi", f"data.train={folder / 'lists.jsonl'}"],
        "last": ["method=full", "head.pooling=last"],
        "explicit": ["method=full", "head.pooling=mean"],
    }
    return finished(folder, words, settings)


def test_classifiers_mix_with_their_heads(classifiers: Path, tmp_path: Path) -> None:
    found, facts = cooked(classifiers, tmp_path / "out", ["one", "two"])
    one, two = full(classifiers, "one"), full(classifiers, "two")
    assert not torch.equal(one["classifier.weight"], two["classifier.weight"])
    assert_close(found, {name: (tensor + two[name]) / 2 for name, tensor in one.items()})
    losses = facts["validation_loss"]
    assert scored(classifiers / "one") == pytest.approx(losses["runs"][str(classifiers / "one")], abs=1e-4)
    assert scored(classifiers / "lora", f"model={tmp_path / 'out'}") == pytest.approx(losses["out"], abs=1e-4)
    _, facts = cooked(classifiers, tmp_path / "greedy", ["one", "two", "lora"], "kind=greedy")
    assert facts["validation_loss"]["out"] <= min(facts["validation_loss"]["runs"].values()) + 1e-6


def test_between_the_base_and_a_classifier_the_head_is_the_classifiers(classifiers: Path, tmp_path: Path) -> None:
    found, _ = cooked(classifiers, tmp_path / "out", ["one"], "alpha=0.25")
    start, end = dict(open_run(classifiers / "one", base=True).model.state_dict()), full(classifiers, "one")
    expected = {name: torch.lerp(tensor, end[name], 0.25) for name, tensor in start.items()}
    expected |= {name: end[name] for name in ("classifier.weight", "classifier.bias")}
    assert_close(found, expected)


def test_a_head_that_was_read_has_a_place_to_begin(classifiers: Path, tmp_path: Path) -> None:
    words = ["data=topics", "model=minilm", f"model.location={classifiers / 'one/model'}", "model.tokenizer=bytes"]
    words += ["method=full", "tracking=disabled", "training.max_steps=4", "evaluation.times=1", "optimizer.lr=1e-2"]
    finished(tmp_path, words, {"on": []})
    found, _ = cooked(tmp_path, tmp_path / "out", ["on"], "alpha=0.25")
    start, end = full(classifiers, "one"), full(tmp_path, "on")
    assert not torch.equal(start["classifier.weight"], end["classifier.weight"])
    assert_close(found, {name: torch.lerp(tensor, end[name], 0.25) for name, tensor in start.items()})


def test_an_implied_pooling_is_the_explicit_one(classifiers: Path, tmp_path: Path) -> None:
    _, facts = cooked(classifiers, tmp_path / "out", ["one", "explicit"])
    assert len(facts["runs"]) == 2


@pytest.mark.parametrize(
    ("other", "reason"), [("several", "labels"), ("last", "makes a vector of a text in another way")]
)
def test_classifiers_of_other_heads_are_refused(
    classifiers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str, reason: str
) -> None:
    runs = f"runs=[{classifiers / 'one'},{classifiers / other}]"
    assert main([runs, f"out={tmp_path / 'out'}"]) != 0
    assert reason in capsys.readouterr().err


REFUSED: list[tuple[Callable[[Path], list[str]], str]] = [
    (lambda r: ["runs=[]"], "it names no run"),
    (lambda r: [f"runs=[{r}/one,{r}/one]"], "are one run; name each once"),
    (lambda r: [f"runs=[{r}/one,{r}/two,{r}/../{r.name}/one/]", "kind=greedy"], "are one run; name each once"),
    (lambda r: [f"runs=[{r}/one]"], "one run with alpha=1 is that run itself"),
    (lambda r: [f"runs=[{r}/one,{r}/two]", "alpha=1.5"], "give a number from 0"),
    (lambda r: [f"runs=[{r}/one,{r}/two]", "kind=best"], "give uniform or greedy"),
    (lambda r: [f"runs=[{r}/one,{r}/two]", "weights=[1]"], "1 for 2 runs"),
    (lambda r: [f"runs=[{r}/one,{r}/two]", "weights=[1,0]"], "each must be above 0"),
    (lambda r: [f"runs=[{r}/one,{r}/two]", "weights=[1,x]"], "give numbers"),
    (lambda r: [f"runs=[{r}/one,{r}/two]", "weights=[1,2]", "kind=greedy"], "kind=greedy takes equal parts"),
    (lambda r: [f"runs=[{r}/one,{r}/twoo]"], "did you mean"),
    (lambda r: [f"runs=[{r}/one,{r}/other_base]"], "began from other base models"),
    (lambda r: [f"runs=[{r}/one,{r}/other_data]", "kind=greedy"], "give runs on the same data, or kind=uniform"),
]


@pytest.mark.parametrize(("arguments", "reason"), REFUSED)
def test_what_cannot_be_mixed_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Any, reason: str
) -> None:
    assert main([*arguments(runs), f"out={tmp_path / 'out'}"]) != 0
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
