"""The pages keep their word: commands parse and run, examples work.

A fenced block `bash` holds commands. Every one of them goes through the real command line with the task replaced
(so a misspelt key, a missing file or a wrong type fails), and is then run, small, in the order of its page, in a folder
where the page's named examples (```python group_lasso.py) have been saved. Lines of other blocks that begin with a
program of ours are commands too. A command that nothing here can check is a failure.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ftlab.combine import CombineArguments
from ftlab.compose import command, compose, run_command
from ftlab.evaluate import EvaluateArguments
from ftlab.export import ExportArguments
from ftlab.fisher import FisherArguments
from ftlab.generate import GenerateArguments
from ftlab.soup import SoupArguments
from tests.helpers.pages import PAGES, README, ROOT, named

SETTINGS = {
    "combine": CombineArguments,
    "evaluate": EvaluateArguments,
    "export": ExportArguments,
    "fisher": FisherArguments,
    "generate": GenerateArguments,
    "soup": SoupArguments,
}
PROGRAMS = ("python -m", "python scripts/", "torchrun", "scripts/")


# --- reading pages ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: ```language name."""

    language: str
    name: str
    text: str


def blocks(text: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)[ ]?(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(match[1], match[2], match[3]) for match in found]


def commands(text: str) -> list[list[str]]:
    """The words of each command of a page, in order."""
    found = []
    fence = ""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            fence = "" if fence else line.strip("`").split(" ")[0] or "text"
            continue
        indented = not fence and line.startswith("    ") and line.strip().startswith(PROGRAMS)
        if (fence == "bash" or indented) and (words := shlex.split(line, comments=True)):
            found.append(words)
    return found


WITH_COMMANDS = [page for page in PAGES if commands(page.read_text("utf-8"))]


# --- checking commands ------------------------------------------------------------------------------------------------


class UncheckedError(Exception):
    """No check knows this command."""


def split_command(words: list[str]) -> tuple[str, list[str]]:
    """What of ours is called (train, evaluate, ..., test.sh) and its arguments."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words[1:])
        if not options.module:
            raise UncheckedError(shlex.join(words))
        words = ["python", "-m", options.training_script, *options.training_script_args]
    if words[0] == "scripts/run.sh":
        return "train", words[1:] or ["+experiment=lora_medical"]
    if words[0].startswith(("scripts/", ".ci/")):
        return words[0], words[1:]
    if words[:2] == ["python", "-m"] and words[2].startswith("ftlab."):
        return words[2].removeprefix("ftlab."), words[3:]
    if words[0] == "python" and words[1].startswith("scripts/"):
        return words[1], words[2:]
    if words[:2] == ["python", "-m"] and words[2].startswith("ftlab_kernels."):
        return f"kernels/{words[2].replace('.', '/')}.py", words[3:]
    if words[0] == "TRITON_INTERPRET=1" and words[1:4] == ["python", "-m", "pytest"]:
        return "scripts/test.sh", words[4:]
    if words == ["source", ".venv/bin/activate"]:
        return "activate", []
    raise UncheckedError(shlex.join(words))


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a command through the real parsing of its program. Raises, or fails an assertion, if it is wrong."""
    what, arguments = split_command(words)
    if what == "train":
        # A sweep's combinations are all composed and checked; what launches them is left out.
        with monkeypatch.context() as patched:
            patched.setattr(command, "launch", lambda composer, overrides, job: 0)
            assert run_command(arguments, lambda config, resolved: 0) == 0, shlex.join(words)
    elif what in SETTINGS:
        command_line = importlib.import_module("ftlab.arguments").parse(SETTINGS[what], arguments, what)
        assert command_line[1] or what != "generate", "a prompt is missing"
    elif what == "data":
        with monkeypatch.context() as patched:
            patched.setattr("ftlab.data.__main__.inspect", lambda options: None)
            assert importlib.import_module("ftlab.data.__main__").main(arguments) == 0
    elif what == "assets":
        assets = importlib.import_module("ftlab.assets")
        assert arguments
        assert all(assets.parse_location(location) for location in arguments)
    elif what == "activate":
        assert 'venv="${FTLAB_VENV:-$root/.venv}"' in (ROOT / "scripts" / "_env.sh").read_text("utf-8")
    else:
        check_script(what, arguments)


def check_script(script: str, arguments: list[str]) -> None:
    """A script that exists and whose source knows every flag; files given to it exist."""
    source = (ROOT / script).read_text("utf-8")
    for word in arguments:
        if word.startswith("--"):
            assert word.split("=")[0] in source, f"{script} has no {word}"
        elif word.startswith(("tests/", "scripts/")):
            assert (ROOT / word).exists(), word


@pytest.mark.parametrize(
    "wrong",
    [
        "python -m ftlab.train +experiment=lora_medicla",
        "python -m ftlab.train +experiment=lora_medical method.rnk=8",
        "python -m ftlab.train data=files data.train=absent.jsonl",
        "python -m ftlab.train -m +experiment=full_tiny training.seed=0,x",
        "scripts/run.sh +experiment=full_tiny optimizer.lr=abc",
        "torchrun --nprocs-per-node 2 -m ftlab.train +experiment=full_tiny",
        "torchrun --nproc-per-node 2 -m ftlab.train +experiment=full_tiny method.rank=0",
        "python -m ftlab.evaluate run=runs/first splitt=test",
        "python -m ftlab.generate run=runs/first",
        "python -m ftlab.data inspekt capitals",
        "python -m ftlab.trian",
        "scripts/test.sh --no-netwrok",
        "scripts/test.sh tests/absent.py",
        "python scripts/absent.py",
        "python -m ftlab_kernels.absent",
        "python -m ftlab_kernels.aot --absent",
        "TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted/test_absent.py",
        "make all",
    ],
)
def test_a_wrong_command_is_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((Exception, SystemExit)):
        check(shlex.split(wrong), monkeypatch)


# --- running them, small ----------------------------------------------------------------------------------------------

TINY = {
    "model": "tiny_random",
    "model.num_layers": "1",
    "model.hidden_size": "32",
    "data.template": "plain",
    "data.batch_size": "2",
    "data.micro_batch_size": "1",
    "data.max_length": "256",
    "data.row_length": "256",
    "data.limit_train": "8",
    "data.limit_validation": "2",
    "data.limit_test": "2",
    "evaluation.times": "1",
    "evaluation.generate": "false",
    "evaluation.bootstrap": "100",
    "evaluation.max_new_tokens": "4",
    "training.max_steps": "2",
    "training.preflight": "false",
    "parallel.threads": "1",
    "tracking": "disabled",
    "schedule.warmup_steps": "null",
    "checkpoint.every_steps": "1",
    "checkpoint.metric": "loss",
}
# Settings of a page that make no sense beside these.
TOO_LARGE = ("model.location=", "tracking.", "method.layers=")
FETCHED = (  # labelled sources that are downloaded: topics stand for them
    "data=hpo_organ",
    "data=privacy_policy",
    "data=spam_assassin",
    "data=icd10_chapter",
    "data=home_intents",
    "data=home_intents_zh",
)
SWEPT_VALUES = 2  # values that are kept of the first swept key; of further keys the first alone


def small(arguments: list[str]) -> list[str]:
    """The same command line on a tiny random model: two steps, a handful of examples, no download."""
    kept: list[str] = []
    swept = 0
    ours = dict(TINY) | tiny_classifier(arguments)
    ours = {key: value for key, value in ours.items() if value}
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals or word.startswith("-"):
            kept.append(word)
        elif word == "+experiment=classify_medical":
            kept += ["data=topics", "method=lora_bert"]
        elif word in FETCHED:
            kept.append("data=topics")
        elif key == "+experiment":
            kept += ["+experiment=full_tiny", *(["method=lora"] if value.startswith("lora") else [])]
        elif key == "resume" and value not in ("auto", "never"):
            kept.append(f"resume={newest_checkpoint(Path(value).parent)}")
        elif key not in ours and not word.startswith(TOO_LARGE):
            if "-m" in arguments and re.fullmatch(r"[^\[\](){}']+", value) and "," in value:
                swept += 1
                value = ",".join(value.split(",")[: SWEPT_VALUES if swept == 1 else 1])
            kept.append(f"{key}={value}")
    if not any(word.startswith(("data=", "+experiment=")) for word in kept):
        kept.append("data=capitals")
    return [*kept, *(f"{key}={value}" for key, value in ours.items())]


def tiny_classifier(arguments: list[str]) -> dict[str, str]:
    """What of TINY is other for a command whose data have labels; an empty value leaves the key out."""
    if not {"data=topics", "data=labelled", *FETCHED, "+experiment=classify_medical"} & set(arguments):
        return {}
    decoder = {"model=smollm2_135m", "model=tiny_random"} & set(arguments)
    shots = any(word.startswith("data.shots=") for word in arguments)
    asked = any(word.startswith("data.instruction=") for word in arguments)
    limit = {"data.limit_train": ""} if shots else {}
    start = next((word.partition("=")[2] for word in arguments if word.startswith("model.location=runs/")), None)
    goes_on = {"model": "minilm", "model.location": start, "model.num_layers": "", "model.hidden_size": ""}
    return {
        "model": "tiny_random" if decoder else "tiny_bert_random",
        "data.template": "" if not asked else "plain",
        **limit,
        **(goes_on if start else {}),
    }


def newest_checkpoint(folder: Path) -> Path:
    return max(entry for entry in folder.iterdir() if entry.name.startswith("step-"))


def execute(words: list[str]) -> int | None:
    """Run a command in this process, small; None: it needs a download, two processes or a whole suite."""
    what, arguments = split_command(words)
    if words[0] == "torchrun" or what not in ("train", "data", *SETTINGS):
        return None
    if what != "train" and any(
        word.startswith(("hpo", "privacy", "spam", "icd10", "home_", "pypi:", "npm:", "hf:")) for word in arguments
    ):
        return None
    if what == "train" and not any(word.startswith("-") for word in arguments):
        return int(importlib.import_module("ftlab.session").train(*compose(small(arguments))))  # as the command does
    module = importlib.import_module("ftlab.data.__main__" if what == "data" else f"ftlab.{what}")
    return int(module.main(small(arguments) if what == "train" else arguments))


def save_examples(page: Path, folder: Path) -> None:
    """Save the named blocks of a page, and a my.jsonl in case that it speaks of one without showing it."""
    shutil.copy(ROOT / "ftlab/data/examples/capitals.jsonl", folder / "my.jsonl")
    for block in blocks(page.read_text("utf-8")):
        if block.name:
            (folder / block.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.name).write_text(block.text, "utf-8")


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder whose modules can be imported, and are forgotten afterwards."""
    monkeypatch.setenv("FTLAB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@contextlib.contextmanager
def placeholder_checkpoint(words: list[str]) -> Iterator[None]:
    """The checkpoint that `resume=path` of a page names, for as long as the command line is checked."""
    paths = [Path(word.removeprefix("resume=")) for word in words if word.startswith("resume=") and "/" in word]
    for path in paths:
        path.mkdir(parents=True)
    yield
    for path in paths:
        path.rmdir()


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=named)
def test_commands_of_a_page_work_in_their_order(
    page: Path, story: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_examples(page, story)
    if page != README:  # drawing the curves is half of so small a run
        monkeypatch.setattr("ftlab.session.write_report", lambda run_dir: run_dir)
    for words in commands(page.read_text("utf-8")):
        with placeholder_checkpoint(words):
            check(words, monkeypatch)
        code = execute(words)
        captured = capsys.readouterr()
        assert not code, shlex.join(words) + "\n" + captured.out + captured.err
    PROMISES.get(named(page), lambda folder: None)(story)


def records(folder: Path) -> list[dict[str, Any]]:
    """run.json of every run, the last started one last."""
    files = sorted((folder / "runs").glob("*/run.json"), key=lambda file: file.stat().st_mtime_ns)
    return [json.loads(file.read_text("utf-8")) for file in files]


def readme_promises(folder: Path) -> None:
    assert (folder / "runs/first/report.html").stat().st_size > 0
    assert (folder / "runs/first/adapter/adapter_config.json").exists()
    assert (folder / "runs/first.1/report.html").exists(), "resume=never sets the earlier run aside"
    assert (folder / "exported/model.safetensors").exists()
    assert json.loads((folder / "scores.json").read_text("utf-8"))["scores"].keys() == {"before", "after"}
    (mine,) = [record for record in records(folder) if record["name"] == "mine"]
    assert (mine["data"]["train"], mine["data"]["validation"], mine["data"]["test"]) == (4, 1, 0)
    lasso = [path for path in (folder / "runs").glob("*/metrics.jsonl") if "penalty/group_lasso" in path.read_text()]
    assert len(lasso) == 1, "the sweep's second run is the command before it; its first one, of strength 0, has none"


def sweep_promises(folder: Path) -> None:
    """The folders and files of docs/sweeps.md, and that nothing is run twice."""
    sweeps = sorted((folder / "runs/sweeps").iterdir(), key=lambda entry: entry.stat().st_mtime_ns)
    content = json.loads((sweeps[0] / "sweep.json").read_text("utf-8"))
    assert content["swept"] == ["regularizer.l2_sp.strength"]
    assert content["runs"][0].keys() == {"trial", "status", "validation_loss", "scores"}
    assert (sweeps[0] / "sweep.html").exists()
    assert (sweeps[0] / "trials/0000.json").exists()
    assert (sweeps[0] / "multirun.yaml").exists()
    again, more = (json.loads((entry / "sweep.json").read_text("utf-8"))["runs"] for entry in sweeps[-2:])
    assert [run["trial"]["run_dir"] for run in again] == [run["trial"]["run_dir"] for run in more]
    assert not list((folder / "runs").glob("full_tiny-*.1")), "nothing was run twice"


def regularizer_promises(folder: Path) -> None:
    metrics = [path.read_text("utf-8") for path in (folder / "runs").glob("*/metrics.jsonl")]
    assert any("penalty/l2_sp" in text for text in metrics)
    assert any("penalty/even_spread" in text for text in metrics)


PROMISES: dict[str, Callable[[Path], None]] = {
    "README.md": readme_promises,
    "docs/sweeps.md": sweep_promises,
    "docs/regularizer.md": regularizer_promises,
}


# --- generated numbers ------------------------------------------------------------------------------------------------


def load_script() -> ModuleType:
    """scripts/readme_results.py as a module."""
    spec = importlib.util.spec_from_file_location("readme_results", ROOT / "scripts" / "readme_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_run(folder: Path, seed: int, exact: float, **changes: Any) -> Path:
    """A run folder with what a record takes of it."""
    score = {"value": exact, "low": exact - 3, "high": exact + 3, "signature": ""}
    content = {
        "name": "job",
        "status": "finished",
        "dirty": False,
        "commit": "c" * 40,
        "command": f"python -m ftlab.train +experiment=job output_dir=elsewhere training.seed={seed}",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": f"2026-01-01T00:0{seed + 3}:30+00:00",
        "device": {"kind": "cpu", "name": "A CPU", "threads": 2, "memory_bytes": 8 << 30, "world_size": 1},
        "seeds": {"training": seed},
        "data": {"test": 300},
        "memory": {"peak_rss": (2 << 30) + (seed << 29), "peak_device": 0},
        "scores": {"base": {"exact_match": {**score, "value": 0.0}}, "final": {"exact_match": score}},
        "config": {"output_dir": f"runs{seed}", "optimizer": {"lr": 1.0}, "training": {"seed": seed, "epochs": 1}},
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({**content, **changes}), "utf-8")
    return folder


def test_the_readme_shows_what_the_records_say() -> None:
    text = README.read_text("utf-8")
    assert load_script().rewrite(text, ROOT / "docs" / "results") == text, "run scripts/readme_results.py"


def test_experiments_begin_with_what_their_records_say() -> None:
    assert load_script().main(["--check"]) == 0, "run scripts/readme_results.py"


def test_an_experiment_gets_its_measured_lines_and_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script()
    experiments, results = tmp_path / "experiment", tmp_path / "results"
    results.mkdir()
    experiments.mkdir()
    monkeypatch.setattr(script, "EXPERIMENTS", experiments)
    monkeypatch.setattr(script, "PAGES", ())
    plain = (
        "# @package _global_\n# A job.\n#   python -m ftlab.train +experiment=job\ndefaults:\n  - _self_\nname: job\n"
    )
    file = experiments / "job.yaml"
    file.write_text(plain)
    where = ["--results", str(results)]
    assert script.main([*where, "--check"]) == 0
    assert (
        script.block("experiments", results).strip().splitlines()[-1]
        == "| `job` | A job | not measured yet | | | | | |"
    )

    runs = [str(fake_run(tmp_path / f"run{seed}", seed, 20.0 + seed)) for seed in (2, 0, 1)]
    assert script.main([*where, "--record", "job", *runs]) == 0
    text = file.read_text()
    said = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))
    assert "Measured with seeds 0, 1, 2 at commit cccccccccc on A CPU, 2 threads, 8 GiB: exact match on 300" in said
    assert "0.0 % before, 21.0 % after (sd 1.0, 20.0 to 22.0); 4.5 minutes (3.5 to 5.5), 3.0 GiB at the peak." in said
    assert all(len(line) <= 118 for line in text.splitlines())
    assert text.endswith("\ndefaults:\n  - _self_\nname: job\n")
    row = script.block("experiments", results, "results").strip().splitlines()[-1]
    assert row == "| `job` | A job | [exact match, %](results/job.json) | 0.0 | 21.0 ± 1.0 | 4.5 | 3.0 | 3 |"
    assert script.main([*where, "--check"]) == 0
    file.write_text(text.replace("\ndefaults:", "\n# A word of the author's.\ndefaults:"))
    assert script.main(where) == 0
    assert "\n# A word of the author's.\n# Measured with" in file.read_text()
    file.write_text(text.replace("21.0 %", "99.0 %"))
    assert script.main([*where, "--check"]) == 1, "a figure that was changed by hand"
    (results / "job.json").unlink()
    assert script.main(where) == 0
    assert file.read_text() == plain
    score = {"value": 12.345, "low": None, "high": None, "signature": ""}
    run = fake_run(tmp_path / "only-loss", 0, 0.0, scores={"base": {}, "final": {"perplexity": score}})
    assert script.main([*where, "--record", "job", str(run)]) == 0
    assert "perplexity on 300 held-out examples 12.35 after; 3.5 minutes, 2.0 GiB" in file.read_text().replace(
        "\n#", ""
    )
    assert "[perplexity](docs/results/job.json) |  | 12.35 |" in script.block("experiments", results)
    file.write_text("name: job\n")
    assert script.main(where) == 1


def test_a_table_is_made_of_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script()
    page, results = tmp_path / "page.md", tmp_path / "results"
    results.mkdir()
    page.write_text("before\n<!-- results:job -->\nstale\n<!-- /results -->\nafter\n", "utf-8")
    where = ["--readme", str(page), "--results", str(results)]
    assert script.main([*where, "--check"]) == 1
    assert script.main(where) == 0
    assert "Not measured yet" in page.read_text("utf-8")
    runs = [str(fake_run(tmp_path / f"run{seed}", seed, 20.0 + seed)) for seed in (2, 0, 1)]
    assert script.main([*where, "--record", "job", *runs]) == 0
    text = page.read_text("utf-8")
    assert "| exact match, % | 0.0 | 21.0 | 1.0 | 20.0 to 22.0 |" in text
    assert "| minutes | | 4.5 | 1.0 | 3.5 to 5.5 |" in text
    assert "| peak memory, GiB | | 2.50 | 0.50 | 2.00 to 3.00 |" in text
    assert "`python -m ftlab.train +experiment=job`, training.seed=0, 1, 2, commit cccccccccc" in text
    assert "20.0 (17.0 to 23.0) with seed 0" in text
    assert "elsewhere" not in (results / "job.json").read_text("utf-8")
    assert (text.startswith("before\n"), text.endswith("after\n")) == (True, True)
    assert script.main([*where, "--check"]) == 0
    page.write_text(text.replace("21.0", "31.0"), "utf-8")
    capsys.readouterr()
    assert script.main([*where, "--check"]) == 1
    assert "not what the records give" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"status": "interrupted"}, "interrupted"),
        ({"dirty": True}, "uncommitted"),
        ({"commit": "d" * 40}, "more than one commit"),
        ({"config": {"optimizer": {"lr": 2.0}, "training": {"seed": 1, "epochs": 1}}}, "more than one configuration"),
    ],
)
def test_only_repetitions_make_a_record(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    runs = [fake_run(tmp_path / "zero", 0, 20.0), fake_run(tmp_path / "one", 1, 21.0, **changes)]
    with pytest.raises(ValueError, match=message):
        load_script().make_record(runs)


# --- the rest of the pages --------------------------------------------------------------------------------------------


PYTHON = [(page, block) for page in PAGES for block in blocks(page.read_text("utf-8")) if block.language == "python"]


@pytest.mark.parametrize(
    "page, block", PYTHON, ids=lambda value: named(value) if isinstance(value, Path) else value.name
)
def test_python_of_a_page_runs(page: Path, block: Block, story: Path) -> None:
    save_examples(page, story)
    exec(compile(block.text, f"{named(page)}:{block.name}", "exec"), {"__name__": "example"})


def test_the_regularizer_of_the_readme_is_short() -> None:
    (example,) = [block for block in blocks(README.read_text("utf-8")) if block.name == "group_lasso.py"]
    assert len([line for line in example.text.splitlines() if line.strip()]) < 20
