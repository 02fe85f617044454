"""Sizes that keep the code readable. A budget that hurts is a sign to split by concern."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

from ftlab import config as configs
from ftlab.compose import compose, conf_dir

ROOT = Path(__file__).parent.parent
FILE_LINES = 600
LOOP_LINES = 400
FUNCTION_LINES = 80
PARAMETERS = 8

EXPERIMENTS = sorted(file.stem for file in (conf_dir() / "experiment").glob("*.yaml"))


def sources() -> list[Path]:
    folders = (ROOT / "ftlab", ROOT / "kernels", ROOT / "tests", ROOT / "scripts")
    return sorted(file for folder in folders for file in folder.rglob("*.py"))


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_triton_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


def over_budget(source: str, name: str, lines: int = FILE_LINES) -> list[str]:
    """What of a source file is larger than allowed."""
    found = []
    count = source.count("\n")
    if count > lines:
        found.append(f"{name}: {count} lines, at most {lines}")
    for node in functions(source):
        length = (node.end_lineno or 0) - node.lineno + 1
        arguments = node.args
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        # A Triton kernel takes bare pointers, sizes and strides: there is no object to pass instead.
        names = [] if is_triton_kernel(node) else names
        parameters = len([argument for argument in names if argument not in ("self", "cls")])
        if length > FUNCTION_LINES:
            found.append(f"{name}:{node.lineno} {node.name}: {length} lines, at most {FUNCTION_LINES}")
        if parameters > PARAMETERS:
            found.append(f"{name}:{node.lineno} {node.name}: {parameters} parameters, at most {PARAMETERS}")
    return found


def test_sizes() -> None:
    found = [line for file in sources() for line in over_budget(file.read_text("utf-8"), str(file.relative_to(ROOT)))]
    assert not found, "\n".join(found)


def test_the_loop_is_short() -> None:
    loop = ROOT / "ftlab" / "training" / "loop.py"
    assert not over_budget(loop.read_text("utf-8"), loop.name, LOOP_LINES - 1)


def test_too_much_is_noticed() -> None:
    assert over_budget("x = 1\n" * 601, "long")
    assert not over_budget("x = 1\n" * 600, "fits")
    assert over_budget("def f():\n" + "    x = 1\n" * 80, "long function")
    assert not over_budget("def f():\n" + "    x = 1\n" * 79, "fits")
    assert over_budget("def f(a, b, c, d, /, e, f, g, *, h, i): ...", "nine parameters")
    assert not over_budget("@triton.jit\ndef f(a, b, c, d, e, f, g, h, i): ...", "a kernel's pointers")
    assert not over_budget("class C:\n    def f(self, a, b, c, d, e, f, g, h): ...", "eight and self")


def listed_experiments(text: str) -> list[str]:
    """Entries of a defaults list that name an experiment."""
    entries = (yaml.safe_load(text) or {}).get("defaults", [])
    keys = [key for entry in entries for key in (entry if isinstance(entry, dict) else [entry])]
    return [str(key) for key in keys if "experiment" in str(key)]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_holds_only_overrides(name: str) -> None:
    text = (conf_dir() / "experiment" / f"{name}.yaml").read_text("utf-8")
    assert text.startswith("# @package _global_\n")
    assert not listed_experiments(text)
    assert f"+experiment={name}" in text, "the header says the command"


def test_an_experiment_in_an_experiment_is_noticed() -> None:
    assert listed_experiments("defaults:\n  - override /experiment: lora_medical\n  - _self_\n")
    assert listed_experiments("defaults:\n  - /experiment/lora_medical\n")
    assert not listed_experiments("defaults:\n  - override /method: lora\n  - _self_\n")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_composes_and_validates(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the earlier run lies that one of them goes on from
    for file in ("adapter/adapter_config.json", "run.json", "config.yaml", "fisher.safetensors"):
        Path("runs/medical", file).parent.mkdir(parents=True, exist_ok=True)
        Path("runs/medical", file).write_text("{}")
    config, resolved = compose([f"+experiment={name}"])
    assert config.name == name
    assert resolved["name"] == name


def test_every_yaml_names_its_dataclass_first() -> None:
    files = [file for file in conf_dir().rglob("*.yaml") if file.parent.name not in ("experiment", "help")]
    for file in files:
        first = yaml.safe_load(file.read_text("utf-8"))["defaults"][0]
        assert str(first).startswith("base_"), file


def inheritance(cls: type) -> int:
    """How many dataclasses deep a class is."""
    return sum(is_dataclass(base) for base in cls.__mro__)


def test_configs_inherit_one_level_deep() -> None:
    classes = [cls for cls in vars(configs).values() if isinstance(cls, type) and is_dataclass(cls)]
    assert {cls.__name__ for cls in classes if inheritance(cls) > 2} == set()

    class Deeper(configs.LoRAConfig):
        pass

    assert inheritance(Deeper) > 2
