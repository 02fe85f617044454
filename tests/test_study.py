"""The studies: their runs compose, a setting is chosen by validation loss on a seed of its own, pages are current."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ftlab.compose import compose
from ftlab.errors import DivergenceError
from ftlab.validate import validate

ROOT = Path(__file__).parent.parent
SIDES = {"commit": "0" * 40, "dirty": False, "device": {"name": "a processor"}, "packages": {"torch": "2"}}


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module(name)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("study", monkeypatch)


@pytest.fixture
def continual(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script("study_continual", monkeypatch)


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    """A page of its own in place of the documentation, so that no test writes there."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text(text)
    monkeypatch.setattr(sys.modules["study"], "DOCS", tmp_path / "docs")


def run_record(loss: float, accuracy: float) -> dict[str, Any]:
    """What a run of these would leave in run.json."""
    names = ("accuracy", "ece", "loss", "exact_match", "token_f1")
    return {
        **SIDES,
        "status": "finished",
        "model": {"name": "m"},
        "data": {"name": "d"},
        "best": {"value": loss},
        "scores": {"final": {name: {"value": accuracy} for name in names}},
        "parameters": [{"trainable": True, "count": 1}, {"trainable": False, "count": 3}],
        "memory": {"peak_rss": 2**30},
    }


def test_every_run_of_every_study_composes(study: ModuleType) -> None:
    for name, plan in study.STUDIES.items():
        for entry in plan.entries:
            for setting in entry.ladder[:1] or ("training.seed=0",):
                words = study.words_of(plan, entry, [setting], study.TUNING_SEED)
                config, _ = compose(words)
                validate(config)
                assert config.training.seed in (study.TUNING_SEED, 0), name


def test_rows_name_rows_of_their_group(study: ModuleType) -> None:
    for plan in study.STUDIES.values():
        names = {(entry.group, entry.name) for entry in plan.entries}
        assert len(names) == len(plan.entries)
        assert {entry.group for entry in plan.entries} == set(dict(plan.groups))
        for entry in plan.entries:
            assert entry.rate_of is None or (entry.group, entry.rate_of) in names
            assert not entry.ladder or entry.start + 3 <= len(entry.ladder)


def test_pages_are_what_their_records_give(
    study: ModuleType, continual: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (study, continual, script("study_soups", monkeypatch)):
        assert module.main(["--check"]) == 0


class Faked:
    """Stands for subprocess.run of a training: the loss is least at one setting, and the seed moves the score."""

    def __init__(self, best: str) -> None:
        self.best, self.calls = best, []  # type: tuple[str, list[list[str]]]

    def __call__(self, command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        words = list(command)
        if words[0] == "git":
            return subprocess.CompletedProcess(words, 0, "0" * 40 + "\n", "")
        self.calls.append(words)
        rate = next(word for word in words if word.startswith("optimizer.lr="))
        given = float(rate.partition("=")[2])
        seed = int(next(word for word in words if word.startswith("training.seed=")).partition("=")[2])
        away = abs(given - float(self.best))
        run_dir = Path(next(word for word in words if word.startswith("run_dir=")).partition("=")[2])
        run_dir.mkdir(parents=True)
        plus = 5.0 if "method=bitfit" in words else 0.0
        (run_dir / "run.json").write_text(json.dumps(run_record(1 + away, 50 + plus + seed + seed % 2 * plus / 10)))
        return subprocess.CompletedProcess(words, 0, "", "")


@pytest.fixture
def plan(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    rates = tuple(f"optimizer.lr={rate}" for rate in ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2"))
    entries = (
        study.Entry("g", "full", ("method=full",), rates, 2),
        study.Entry("g", "BitFit", ("method=bitfit",), rates, 0),
        study.Entry("g", "same rate", ("method=full",), rate_of="BitFit"),
    )
    made = study.Study(
        "T", "toy task", ("Text.",), ("model=minilm",), entries, ("accuracy", "ece", "loss"), (("g", ()),)
    )
    monkeypatch.setitem(study.STUDIES, "toy", made)
    return made


def test_the_grid_widens_until_it_encloses_the_best(
    study: ModuleType, plan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faked = Faked("3e-4")
    monkeypatch.setattr(study.subprocess, "run", faked)
    made = study.study("toy", study.Runs(tmp_path, 2))
    by = {row["name"]: row for row in made["rows"]}
    tried = {name: [run["setting"].partition("=")[2] for run in row["tried"]] for name, row in by.items()}
    assert tried == {
        "full": ["1e-4", "3e-4", "1e-3", "3e-3", "1e-2"],
        "BitFit": ["1e-4", "3e-4", "1e-3"],
        "same rate": [],
    }
    assert by["same rate"]["words"][-1] == by["full"]["words"][-1] == "optimizer.lr=3e-4"
    assert [run["seed"] for run in by["full"]["runs"]] == list(study.SEEDS)
    tuning = [words for words in faked.calls if "training.seed=100" in words]
    assert len(tuning) == 8
    assert len(faked.calls) == 8 + 10, "full and the row with its rate have the same words: one run serves both"
    before = len(faked.calls)
    study.study("toy", study.Runs(tmp_path, 1))
    assert len(faked.calls) == before, "what ended is kept"


def test_the_page_pairs_by_seed_and_says_what_did_not_help(
    study: ModuleType, plan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(study.subprocess, "run", Faked("3e-4"))
    text = " ".join(study.page("toy", study.study("toy", study.Runs(tmp_path, 1))).split())
    mean, low, high = study.interval([55.0, 56.5, 57.0, 58.5, 59.0], [50.0, 51.0, 52.0, 53.0, 54.0])
    assert (mean, round(low, 3), round(high, 3)) == (5.2, 4.86, 5.54)  # by hand: sd 0.2739, t 2.776, n 5
    assert "| BitFit | 25.00 % | 57.2 ± 1.6 | +5.2 [+4.9, +5.5] |" in text
    assert "interval of accuracy: better: BitFit. no different as far as these seeds can tell: same rate." in text
    assert "interval of test loss: worse: BitFit. no different" in text, "a lower loss is better"
    assert "`optimizer.lr=3e-4` [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]" in text


def test_pages_of_techniques_quote_their_row(
    study: ModuleType, plan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    marked = "# Page\n\n<!-- study:toy:BitFit -->\nold\n<!-- /study -->\nrest\n"
    assert "Not measured yet" in study.rewrite(marked, "../results")
    monkeypatch.setattr(study.subprocess, "run", Faked("3e-4"))
    (tmp_path / "toy.json").write_text(json.dumps(study.study("toy", study.Runs(tmp_path / "work", 1))))
    text = study.rewrite(marked, "../results")
    words = " ".join(text.split())
    assert "g: accuracy 57.2 ± 1.6 %, test loss 57.20 ± 1.60 (full: 52.0 ± 1.6 and 52.00 ± 1.58)." in words
    assert "toy task: [all rows](../results/toy.md). <!-- /study --> rest" in words
    assert "old" not in text
    assert study.rewrite(text, "../results") == text


def test_a_setting_that_diverges_loses(
    study: ModuleType, plan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faked = Faked("3e-4")

    def some_fail(command: Sequence[str], **more: Any) -> subprocess.CompletedProcess[str]:
        if "optimizer.lr=1e-3" in command and "training.seed=100" in command:
            return subprocess.CompletedProcess(list(command), 3, "", "error: training diverged: the loss is nan\n")
        return faked(command, **more)

    monkeypatch.setattr(study.subprocess, "run", some_fail)
    made = study.study("toy", study.Runs(tmp_path, 1))
    by = {row["name"]: row for row in made["rows"]}
    assert {run["setting"]: run["validation_loss"] for run in by["BitFit"]["tried"]}["optimizer.lr=1e-3"] is None
    assert by["BitFit"]["words"][-1] == "optimizer.lr=3e-4"
    assert "1e-3 (diverged)" in study.page("toy", made)


def test_a_failed_run_stops_the_study_with_its_words(
    study: ModuleType, plan: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def failing(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        code = 0 if command[0] == "git" else 2
        return subprocess.CompletedProcess(list(command), code, "0" * 40, "no such key")

    monkeypatch.setattr(study.subprocess, "run", failing)
    with pytest.raises(SystemExit, match=r"method=full[^\n]*\nno such key"):
        study.study("toy", study.Runs(tmp_path, 1))


# --- continual -------------------------------------------------------------------------------------------------------


def test_every_run_of_the_chain_composes(continual: ModuleType, tmp_path: Path) -> None:
    for name, way in continual.WAYS.items():
        chain = continual.Chain(tmp_path, name, (way.ladder or (None,))[0], 0)
        for place in range(len(continual.TASKS)):
            compose(chain.words(place))
            (chain.run_dir(place) / "adapter").mkdir(parents=True, exist_ok=True)
            for file in ("adapter/adapter_config.json", "run.json", "config.yaml", "fisher.safetensors"):
                (chain.run_dir(place) / file).write_text("{}")


def test_each_way_names_all_earlier_runs_and_starts_from_the_last(continual: ModuleType, tmp_path: Path) -> None:
    chain = continual.Chain(tmp_path, "replay", "regularizer.replay.share=0.2", 3)
    first, second = chain.run_dir(0), chain.run_dir(1)
    assert first.relative_to(chain.shared).parts == ("medical",)
    assert second.relative_to(chain.shared).parts == ("replay-0.2", "legal")
    assert chain.shared.parts[-1] == "seed-3"
    words = chain.words(2)
    assert f"regularizer.replay.source=[{first},{second}]" in words
    assert f"method.start_from={second}/adapter" in words
    assert not [word for word in chain.words(0) if "replay" in word or "start_from" in word]


class Chained:
    """Stands for the commands of the chain: what is left of a task depends on the way alone, and on the seed."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.trained: list[str] = []

    def __call__(self, module: str, words: Sequence[str]) -> None:
        keys = ("run_dir", "run", "adapter", "out")
        named = dict(word.split("=", 1) for word in words if word.split("=", 1)[0] in keys)
        if module == "ftlab.train":
            if "regularizer.lwf.strength=3" in words:
                raise DivergenceError("the loss is nan")
            folder = Path(named["run_dir"])
            self.trained.append("/".join(folder.parts[-3:]))
            folder.mkdir(parents=True)
            (folder / "run.json").write_text(json.dumps(run_record(1.0, 50.0)))
        elif module == "ftlab.fisher":
            Path(named["run"], "fisher.safetensors").touch()
        else:
            task, after = Path(named["run"]).name, Path(named["adapter"]).parent
            self.asked.append(f"{task} after {after.name}")
            kept = {"nothing": 10.0, "LwF-1": 25.0, "EWC-100": 40.0, "replay-0.2": 45.0}
            value = 60.0 if task == after.name else kept.get(after.parent.name, 5.0)
            seed = float(named["out"].partition("/seed-")[2].partition("/")[0])
            scores = {name: {"value": value + seed} for name in ("exact_match", "loss")}
            content = {"scores": {"after": scores}, "predictions": {"after": [{}] * 7}}
            Path(named["out"]).write_text(json.dumps(content))


@pytest.fixture
def chained(continual: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Chained:
    commands = Chained()
    elsewhere(monkeypatch, tmp_path, "<!-- study:continual:EWC -->\n<!-- /study -->\n")
    monkeypatch.setattr(continual, "command", commands)
    monkeypatch.setattr(continual, "RECORD", tmp_path / "continual.json")
    monkeypatch.setattr(continual, "PAGE", tmp_path / "continual.md")
    return commands


def test_the_chain_asks_each_task_after_each_and_the_page_counts_what_was_lost(
    continual: ModuleType, chained: Chained, tmp_path: Path
) -> None:
    assert continual.main(["--run", "--work", str(tmp_path / "work")]) == 0
    made = json.loads((tmp_path / "continual.json").read_text())
    settings = {row["name"]: row["setting"] for row in made["rows"]}
    assert settings == {
        "nothing": None,
        "EWC": "regularizer.ewc.strength=100",
        "LwF": "regularizer.lwf.strength=1",
        "replay": "regularizer.replay.share=0.2",
    }
    assert {"medical after spam", "legal after spam", "spam after spam", "medical after legal"} <= set(chained.asked)
    assert chained.asked.count("medical after medical") == len(continual.SEEDS), "once a seed, for all ways"
    text = (tmp_path / "continual.md").read_text()
    # (10 + 10 + 60) / 3 and (45 + 45 + 60) / 3, plus the seeds' mean 2; lost 60 - 10 and 60 - 45
    assert "| nothing | 12.0 ± 1.6 | 12.0 ± 1.6 | 62.0 ± 1.6 | 28.7 ± 1.6 |  | 50.0 ± 0.0 | 50.0 ± 0.0 |" in text
    assert "`regularizer.lwf.strength=1` [0.3, 1, 3 (diverged)] |" in text
    assert "held-out examples (7, 7, 7 of the three)" in " ".join(text.split())
    assert "| +23.3 [+23.3, +23.3] | 15.0 ± 0.0 | 15.0 ± 0.0 | 1.00 | `regularizer.replay.share=0.2` [" in text
    assert sys.executable not in text
    sentence = " ".join((tmp_path / "docs/page.md").read_text().split())
    assert "Measured (ewc.strength=100), mean ± standard deviation of 5 seeds" in sentence
    assert "medical 42.0 ± 1.6 (nothing: 12.0 ± 1.6), legal 42.0" in sentence
    assert continual.main(["--check"]) == 0
    (tmp_path / "docs/page.md").write_text("<!-- study:continual:EWC -->\nby hand\n<!-- /study -->\n")
    assert continual.main(["--check"]) == 1
    assert continual.main([]) == 0
    assert continual.main(["--check"]) == 0


def test_a_stopped_chain_goes_on_elsewhere_and_its_page_names_the_missing_seeds(
    continual: ModuleType, chained: Chained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = len(continual.study(tmp_path / "one", 1)["rows"][0]["runs"])
    record, page = tmp_path / "continual.json", tmp_path / "continual.md"
    made = json.loads(record.read_text())
    ewc, replay = made["rows"][1], made["rows"][3]
    replay["runs"] = replay["runs"][:2]
    ewc["setting"], ewc["tried"] = None, {key: value for key, value in ewc["tried"].items() if key.endswith("=10")}
    record.write_text(json.dumps(made))

    assert continual.main([]) == 0
    text = " ".join(page.read_text().split())
    assert "over seeds 0, 1 (of seeds 2, 3, 4 not all is run yet)" in text
    chained.trained.clear()
    again = continual.study(tmp_path / "other", 1)
    assert again["rows"][1]["setting"] == "regularizer.ewc.strength=100"
    assert [len(row["runs"]) for row in again["rows"]] == [before] * 4
    chains = {"/".join(path.split("/")[:2]) for path in chained.trained if not path.endswith("medical")}
    assert chains == {f"seed-{seed}/replay-0.2" for seed in (2, 3, 4)} | {
        f"seed-100/EWC-{strength}" for strength in (100, 1000)
    }

    # What another machine added counts beside what lies in the work folder, and neither is written over.
    record.write_text(json.dumps(made))
    chained.trained.clear()
    continual.study(tmp_path / "other", 1)
    assert not chained.trained
    assert json.loads(record.read_text()) == made, "nothing new, so nothing is written"
    other = json.loads((tmp_path / "other/continual.json").read_text())
    other["rows"][0]["runs"] = other["rows"][0]["runs"][:1]
    (tmp_path / "other/continual.json").write_text(json.dumps(other))
    merged = continual.study(tmp_path / "other", 1)
    assert [len(row["runs"]) for row in merged["rows"]] == [before] * 4
    assert not chained.trained
    other["rows"][1]["setting"] = "regularizer.ewc.strength=10"
    (tmp_path / "third").mkdir()
    (tmp_path / "third/continual.json").write_text(json.dumps(other))
    record.write_text(json.dumps(merged))
    with pytest.raises(SystemExit, match=r"strength=10 where another record has regularizer\.ewc\.strength=100; keep"):
        continual.study(tmp_path / "third", 1)

    replay["runs"] = replay["runs"][:1]
    record.write_text(json.dumps(made))
    page.unlink()
    assert continual.main([]) == 0
    assert not page.exists(), "one seed has no spread"

    monkeypatch.setattr(continual, "COMMON", (*continual.COMMON, "optimizer.lr=1"))
    with pytest.raises(SystemExit, match=r"continual\.json is of other words"):
        continual.study(tmp_path / "other", 1)


def test_a_failed_command_ends_the_study_at_once(
    continual: ModuleType, chained: Chained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def failing(module: str, words: Sequence[str]) -> None:
        asked.append(module)
        if "regularizer=ewc" in words:
            raise SystemExit("no such key")
        chained(module, words)

    monkeypatch.setattr(continual, "command", failing)
    with pytest.raises(SystemExit, match="no such key"):
        continual.study(tmp_path / "work", 1)
    assert asked.count("ftlab.train") <= 4, "what was waiting does not begin"


def test_a_chain_with_a_dirty_run_says_so(continual: ModuleType, chained: Chained, tmp_path: Path) -> None:
    made = continual.study(tmp_path / "work", 1)
    assert "with uncommitted changes" not in continual.page(continual.whole(made))
    made["rows"][2]["runs"][1]["dirty"] = True
    assert "with uncommitted changes" in continual.page(continual.whole(made))


# --- means of weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def soups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = script("study_soups", monkeypatch)
    elsewhere(monkeypatch, tmp_path, "<!-- study:soups:uniform soup -->\n<!-- /study -->\n")
    monkeypatch.setattr(module, "RECORD", tmp_path / "soups.json")
    monkeypatch.setattr(module, "PAGE", tmp_path / "soups.md")
    return module


def test_soups_are_of_the_other_runs_and_all_are_asked_twice(
    soups: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mixed: dict[str, list[str]] = {}
    asked: list[str] = []

    def commands(module: str, words: Sequence[str]) -> None:
        named = dict(word.split("=", 1) for word in words)
        if module == "ftlab.train":
            Path(named["run_dir"]).mkdir(parents=True)
            Path(named["run_dir"], "run.json").write_text(json.dumps(run_record(1.0, 50.0)))
        elif module in ("ftlab.soup", "ftlab.export"):
            runs = [Path(run).name for run in (named.get("runs") or named["run"]).strip("[]").split(",")]
            out = Path(named["out"])
            mixed[out.name] = [*runs, named.get("alpha", "")]
            out.mkdir()
            (out / "soup.json").write_text(json.dumps({"runs": runs[:2]}))
        else:
            weights = Path(named["model"]).name
            asked.append(f"{Path(named['run']).name} {weights}")
            scores = {name: {"value": 60.0 if "uniform" in weights else 50.0} for name in ("exact_match", "loss")}
            Path(named["out"]).write_text(json.dumps({"scores": {"after": scores}}))

    monkeypatch.setattr(soups, "command", commands)
    work = tmp_path / "work"
    assert soups.main(["--run", "--work", str(work)]) == 0
    assert mixed["uniform-soup-1-weights"] == [*(f"seed-{seed}" for seed in (0, 2, 3, 4)), ""]
    assert mixed["WiSE-FT-alpha-=-0.5-3-weights"] == ["seed-3", "0.5"]
    assert mixed["base-weights"] == ["seed-0", "0"]
    assert mixed["one-run-2-weights"] == ["seed-2", ""]
    assert {"seed-3 WiSE-FT-alpha-=-0.5-3-weights", "elsewhere uniform-soup-1-weights"} <= set(asked)
    assert len(asked) == 2 * (1 + len(soups.ROWS) * len(soups.SEEDS))
    assert not [*work.rglob("*-weights")], "they are large"
    text = (tmp_path / "soups.md").read_text()
    assert "| uniform soup | 60.0 ± 0.0 | +10.0 | 60.00 ± 0.00 | 60.000 ± 0.000 | +10.000 |" in text
    assert "| WiSE-FT, alpha = 0.5 | 50.0 ± 0.0 | +0.0 [+0.0, +0.0] |" in text
    assert "took: 1, 2 without 0; 0, 2 without 1;" in text
    sentence = " ".join((tmp_path / "docs/page.md").read_text().split())
    assert (
        "Measured (uniform soup), mean ± standard deviation of 5 seeds: exact match in percent 60.0 ± 0.0 (" in sentence
    )
    assert soups.main(["--check"]) == 0
    before = len(asked)
    soups.study(work, 2)
    assert len(asked) == before, "what ended is kept"
    monkeypatch.setattr(soups, "EXAMPLES", 3)
    soups.study(work, 2)
    assert len(asked) == 2 * before, "other words are another study"


def test_the_runs_of_the_soups_compose(soups: ModuleType) -> None:
    for words in ([*soups.PHRASES, "training.seed=0"], soups.ELSEWHERE):
        config, _ = compose(words)
        validate(config)
    assert config.data.name == "hpo-define"
