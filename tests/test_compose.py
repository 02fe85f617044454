"""Composition is strict: every mistake is one line with the key, the reason and the nearest valid key."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from ftlab.compose import compose, conf_dir, config_hash, run_command, run_folder, to_yaml
from ftlab.config import Config, CosineConfig, FullConfig, LinearConfig, LoRAConfig, from_plain, option_classes
from ftlab.errors import ConfigError, DivergenceError, FtlabError
from ftlab.schema import GROUPS, NOT_HASHED, kind_of, nearest, schema_keys

ROOT = Path(__file__).parent.parent


def refuse(config: Config, resolved: dict[str, Any]) -> int:
    raise AssertionError("the task must not run")


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command line that must be refused; its one line on stderr."""
    assert run_command(argv, refuse) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1, shown.err
    assert not GlobalHydra.instance().is_initialized()
    return shown.err.removeprefix("error: ").rstrip("\n")


METHODS = ", ".join(sorted(file.stem for file in (conf_dir() / "method").glob("*.yaml")))

MISTAKES = {
    # misspelt keys and options
    "method.rnk=3": "method.rnk: no such key; did you mean method.rank?",
    "+method.rnk=3": "method.rnk: no such key; did you mean method.rank?",
    "++method.rnk=3": "method.rnk: no such key; did you mean method.rank?",
    "optmizer.lr=1": "optmizer.lr: no such key; did you mean optimizer.lr?",
    "lr=1": "lr: no such key; did you mean optimizer.lr?",
    "batch_size=4": "batch_size: no such key; did you mean data.batch_size or evaluation.batch_size?",
    "regularizer.l2sp.strength=1": "did you mean regularizer.l2_sp.strength?",
    "regularizer.l2_sp.strenght=1": "did you mean regularizer.l2_sp.strength?",
    "+xyzzy=1": "xyzzy: no such key",
    "mehtod=lora": "mehtod: no such key; did you mean method?",
    "method=lora2": f"method=lora2: no such option; did you mean method=lora? (choices: {METHODS})",
    "method=null": "method=null: no such option",
    "method=[lora,full]": f"no such option (choices: {METHODS})",
    "+method=full": "did you mean method=full?",
    "model@data=tiny_random": "did you mean model=tiny_random?",
    "+experiment=lora_medicl": "did you mean experiment=lora_medical?",
    "experiment=full_tiny": "did you mean +experiment=full_tiny?",
    "+method.rank=4": "did you mean method.rank=4?",
    "hydra.run.dri=x": "hydra.run.dri: no such key; did you mean hydra.run.dir?",
    "schedule.decay_fraction=0.1": "schedule=cosine has no such key; it belongs to schedule=wsd",
    # deletions
    "~method": "method: no option chosen",
    "~method.rank": "method.rank: cannot be deleted",
    "~checkpoint": "checkpoint: cannot be deleted",
    # wrong types
    "optimizer.lr=abc": "optimizer.lr: expected a number, got 'abc'",
    "optimizer.lr=true": "optimizer.lr: expected a number, got True",
    "method.rank=1.5": "method.rank: expected a whole number, got 1.5",
    "training.max_steps=": "training.max_steps: expected a whole number or null, got ''",
    "training.compile=maybe": "training.compile: expected true or false, got 'maybe'",
    "data.template=null": "data.template: expected a text, got null",
    "method.targets=q_proj": "method.targets: expected a list such as [a,b], got 'q_proj'",
    "training=3": "training: expected a mapping of keys, got 3",
    # grammar
    "training.max_steps": "training.max_steps: write key=value",
    "data.train=[a": "data.train=[a: write key=value",
    "method.rank=1,2": "several values need -m",
    "method.rank=${nowhere}": "method.rank: Interpolation key 'nowhere' not found",
    # missing
    "data=files": "data.train: a value is needed (location of the training records); give data.train=...",
    # values
    "method.dropout=1.5": "method.dropout: 1.5 is out of range, must be at least 0 and less than 1",
    "method.rank=0": "method.rank: 0 is out of range, must be at least 1",
    "regularizer.l2_sp.strength=-1e-3": "regularizer.l2_sp.strength: -0.001 is out of range, must be at least 0",
    "optimizer.lr=nan": "optimizer.lr: nan is not a finite number",
    "precision.compute=bf61": "did you mean precision.compute=bf16?",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert MISTAKES[override] in error_of(capsys, override)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--multrun",), "did you mean --multirun?"),
        (("--cfg", "jop"), "--cfg"),
        (("--cfg", "job", "method.rnk=3"), "did you mean method.rank?"),
        (("--config-dir", "/nowhere/at/all"), "/nowhere/at/all: no such folder"),
        (("--config-name", "confg"), "did you mean config?"),
        (("--config-name", "experiment/full_tiny"), "+experiment=..."),
        (("--run", "--multirun"), "exclude each other"),
        (("--experimental-rerun", "job.pickle"), "pickle"),
        (("method=full", "method.rank=3"), "method=full has no such key; it belongs to method=lora"),
        (("-m", "method=lora,lora2"), "method=lora2: no such option; did you mean method=lora?"),
        (("-m", "method.rank=1,2,0"), "method.rank: 0 is out of range"),
        (("-m", "schedule=cosine,wsd", "schedule.decay_fraction=0.1"), "it belongs to schedule=wsd"),
        (("-m", "method.rank=interval(1,2)"), "INTERVAL_SWEEP"),
        (("-m", "parallel.threads=1,2"), "would share the folder"),
        (("training.max_steps=5", "schedule.warmup_steps=5"), "schedule.warmup_steps: a warmup of 5 steps leaves"),
        (
            ("training.max_steps=10", "schedule=wsd", "schedule.warmup_steps=6", "schedule.decay_fraction=0.5"),
            "schedule.decay_fraction: 5 steps of decay and 6 of warmup do not fit into a run of 10",
        ),
        (("-m", "training.max_steps=10,5", "schedule.warmup_steps=6"), "leaves nothing of a run of 5"),
        (("-m", "method.rank=1,2", "run_dir=here"), "leave run_dir unset"),
    ],
)
def test_a_mistake_in_several_words(argv: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in error_of(capsys, *argv)


GLOBAL = "# @package _global_\n"
FILES = {
    "unknown key": (
        f"{GLOBAL}training:\n  seed: 1\n  max_stps: 3\n",
        ":4: training.max_stps: no such key; did you mean",
    ),
    "unknown group key": (f"{GLOBAL}methd:\n  rank: 3\n", ":2: methd: no such key; did you mean method?"),
    "other option": (f"{GLOBAL}method:\n  train_embeddings: true\n", "method=lora has no such key; it belongs to"),
    "wrong type": (
        f"{GLOBAL}training:\n  max_steps: soon\n",
        ":3: training.max_steps: expected a whole number or null",
    ),
    "not a mapping": (f"{GLOBAL}training: 3\n", ":2: training: expected a mapping of keys, got 3"),
    "null": (f"{GLOBAL}data:\n  template: null\n", ":3: data.template: expected a text, got null"),
    "no package line": ("training:\n  max_steps: 3\n", "its first line must be `# @package _global_`"),
    "not YAML": (f"{GLOBAL}training:\n  max_steps: [3\n", ":4: not YAML"),
    "a key twice": (f"{GLOBAL}name: a\nname: b\n", ":3: not YAML: found duplicate key name"),
    "unknown option": (
        f"{GLOBAL}defaults:\n  - override /method: lroa\n",
        ":3: method=lroa: no such option; did you mean",
    ),
    "unknown group": (f"{GLOBAL}defaults:\n  - override /mehtod: lora\n", "did you mean override /method?"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_mistake_in_the_users_own_file(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, expected = FILES[case]
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(text, "utf-8")
    message = error_of(capsys, "--config-dir", str(tmp_path), "+experiment=mine")
    assert str(file) in message
    assert expected in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("defaults: [base_lora, _self_]\nrnk: 3\n", ":2: method.rnk: no such key; did you mean method.rank?"),
        ("rank: 3\n", ":1: method.rank: list one of base_lora, base_full, "),
    ],
)
def test_a_mistake_in_the_users_own_option(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text(text, "utf-8")
    assert f"mine.yaml{expected}" in error_of(capsys, "--config-dir", str(tmp_path), "method=mine")


def test_without_the_dataclass_a_misspelt_key_would_pass(tmp_path: Path) -> None:
    """The negative case: the same mistake in a primary config that lists no dataclass is not seen by Hydra."""
    from hydra import compose as plain_compose
    from hydra import initialize_config_dir

    (tmp_path / "loose.yaml").write_text("method:\n  rank: 3\n", "utf-8")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert plain_compose("loose", ["+method.rnk=3"]).method.rnk == 3


def test_the_users_own_folder_works(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "small.yaml").write_text("defaults: [base_lora, _self_]\nrank: 2\n", "utf-8")
    text = f"{GLOBAL}defaults:\n  - override /method: small\n  - _self_\ntraining:\n  seed: 5\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(text, "utf-8")
    config, _ = compose(["+experiment=mine", "method.alpha=4"], config_dir=tmp_path)
    assert config.method == LoRAConfig(rank=2, alpha=4.0)
    assert config.training.seed == 5


# --- what a good configuration becomes --------------------------------------------------------------------------------


def test_the_task_gets_typed_objects() -> None:
    seen: list[tuple[Config, dict[str, Any]]] = []

    def task(config: Config, resolved: dict[str, Any]) -> int:
        seen.append((config, resolved))
        return 7

    assert run_command(["+experiment=full_tiny", "name=${model.name}-x", "optimizer.lr=1"], task) == 7
    ((config, resolved),) = seen
    assert type(config.method) is FullConfig
    assert isinstance(config.optimizer.lr, float)
    assert config.name == "tiny-random-x"
    assert resolved["schedule"]["kind"] == kind_of(config.schedule) == "cosine"
    assert yaml.safe_load(to_yaml(resolved)) == resolved
    assert from_plain(yaml.safe_load(to_yaml(resolved)), option_classes(config)) == config


@pytest.mark.parametrize(
    ("group", "option"),
    [(file.parent.name, file.stem) for group in GROUPS for file in (conf_dir() / group).glob("*.yaml")],
)
def test_every_option_composes(group: str, option: str) -> None:
    needed = {
        "files": ["data.train=builtin:capitals.jsonl"],
        "ewc": ["regularizer.ewc.strength=0"],
        "replay": ["regularizer.replay.share=0"],
        "mixout": ["method=full"],
        "tiny_bert_random": ["data=topics"],
        "labelled": ["data.train=builtin:topics.jsonl"],
    }
    config, _ = compose([f"{group}={option}", *needed.get(option, [])])
    assert type(getattr(config, group)) in GROUPS[group].values()


def test_yaml_files_do_not_restate_defaults() -> None:
    """One default, in the dataclass: what an option sets differs from its class, or names a choice."""
    names_a_choice = ("name", "mode", "compute", "frozen", "task", "location", "train", "tokenizer")
    for group, options in GROUPS.items():
        for file in (conf_dir() / group).glob("*.yaml"):
            content = yaml.safe_load(file.read_text("utf-8"))
            base = str(content.pop("defaults")[0]).partition("@")[0].removeprefix("base_")
            default = asdict(options[base]())
            for key, value in content.items():
                assert key in names_a_choice or default.get(key) != value, f"{file}: {key}"


# --- the identity of a run --------------------------------------------------------------------------------------------


def test_options_with_equal_keys_have_their_own_hash() -> None:
    hashes = {config_hash(compose([f"schedule={kind}"])[1]) for kind in ("linear", "cosine")}
    assert len(hashes) == 2
    assert asdict(LinearConfig()) == asdict(CosineConfig()), "the dataclasses' values alone would not tell them apart"


def test_the_hash_is_over_what_changes_the_computation() -> None:
    keys = {key.path for key in schema_keys()}
    assert set(NOT_HASHED) <= keys
    one = config_hash(compose([])[1])
    same = ["name=b", "output_dir=elsewhere", "resume=never", "tracking=disabled", "parallel.threads=3"]
    assert config_hash(compose([*same, "checkpoint.every_minutes=1"])[1]) == one
    changes = [
        "training.seed=1",
        "optimizer.lr=0.5",
        "data.limit_train=3",
        "precision=bf16",
        "checkpoint.load_best=false",
    ]
    for override in changes:
        assert config_hash(compose([override])[1]) != one, override


def test_the_hash_does_not_depend_on_how_a_value_is_written() -> None:
    written = ["optimizer.lr=1e-3", "optimizer.lr=0.001", "method.alpha=32", "data.system=null"]
    assert len({config_hash(compose([override])[1]) for override in written}) == 1


def test_the_run_folder() -> None:
    config, resolved = compose(["name=abc", "output_dir=out"])
    assert run_folder(config, resolved) == Path("out") / f"abc-{config_hash(resolved)[:8]}"
    assert run_folder(*compose(["run_dir=exactly/here"])) == Path("exactly/here")


# --- errors of the task -----------------------------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[Config, dict[str, Any]], int]:
    def task(config: Config, resolved: dict[str, Any]) -> int:
        raise error

    return task


@pytest.mark.parametrize(
    ("error", "code"),
    [(FtlabError("no\nspace left"), 1), (ConfigError("no space left"), 2), (DivergenceError("no space left"), 3)],
)
def test_an_error_of_the_task_is_one_line(error: FtlabError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([], raising(error)) == code
    assert capsys.readouterr().err == "error: no space left\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command([], raising(ZeroDivisionError()))


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([], raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FTLAB_DEBUG", "1")
    assert run_command([], raising(FtlabError("no space left"))) == 1
    assert "Traceback" in capsys.readouterr().err


def test_only_rank_zero_speaks_of_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run_command(["method.rnk=1"], refuse) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [[], ["-m", "optimizer.lr=1"]])
def test_what_another_rank_alone_finds_is_said_too(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "3")
    assert run_command(words, raising(FtlabError("no\nspace left"))) == 1
    assert capsys.readouterr().err == "error: rank 3: no space left\n"


def test_hydra_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    monkeypatch.chdir(tmp_path)
    handlers = list(logging.getLogger().handlers)
    assert run_command([], lambda config, resolved: None) == 0
    assert list(tmp_path.iterdir()) == []
    assert Path.cwd() == tmp_path
    assert logging.getLogger().handlers == handlers


# --- showing ----------------------------------------------------------------------------------------------------------


def test_help_names_every_group_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--help"], refuse) == 0
    shown = capsys.readouterr().out
    for group in GROUPS:
        assert f"\n  {group} " in shown
        for file in (conf_dir() / group).glob("*.yaml"):
            assert f" {file.stem} " in shown
    assert "base_" not in shown.replace("base_config", "")
    assert "* cosine" in shown
    assert "-m " in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_cfg_prints_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["--cfg", "job", "data=files", "method.rank=4"], refuse) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["method"]["rank"] == 4
    assert shown["data"]["train"] == "???", "what is missing is shown, not refused"
    assert "hydra" not in shown


@pytest.mark.parametrize("kind", ["defaults", "searchpath", "config"])
def test_info(kind: str, tmp_path: Path) -> None:
    done, _ = ftlab_train(tmp_path, "--info", kind)
    assert done.returncode == 0
    assert "hydra" in done.stdout or "optimizer" in done.stdout


# --- as a program -----------------------------------------------------------------------------------------------------


def ftlab_train(folder: Path, *argv: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """How the program ended, and its seconds of the processor: not of the clock, another test may run beside this one.

    Of this process alone: RUSAGE_CHILDREN also counts whatever other child is collected meanwhile.
    """
    environment = {name: value for name, value in os.environ.items() if name != "FTLAB_DEBUG"}
    command = [sys.executable, "-m", "ftlab.train", *argv]
    with (
        (folder / "out.txt").open("w+", encoding="utf-8") as out,
        (folder / "err.txt").open("w+", encoding="utf-8") as err,
    ):
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=err, env=environment)
        limit = threading.Timer(60, process.kill)
        limit.start()
        _, status, used = os.wait4(process.pid, 0)
        limit.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())
    return done, used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    "argv", [("training.max_steps=1", "schedule.warmup_steps=1"), ("-m", "method.rank=4,8", "schedule=cosine,lineer")]
)
def test_a_mistake_ends_the_program_quickly(argv: tuple[str, ...], tmp_path: Path) -> None:
    done, seconds = ftlab_train(tmp_path, *argv)
    assert seconds < 5
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_help_is_quick(tmp_path: Path) -> None:
    done, seconds = ftlab_train(tmp_path, "--help")
    assert seconds < 3
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m ftlab.train")


def test_nearest() -> None:
    assert nearest("rank", ["method.rank", "training.seed"]) == ["method.rank"]
    assert nearest("xyzzy", ["method.rank", "training.seed"]) == []
