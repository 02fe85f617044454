"""kernels/ is a package of its own: no ftlab in it, importable without triton, one contract for every operation."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import ftlab_kernels
import pytest
from ftlab_kernels import aot

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "kernels"
PACKAGE = PROJECT / "ftlab_kernels"
FILES = sorted(PACKAGE.glob("*.py"))
MODULES = [f"ftlab_kernels.{file.stem}" for file in FILES if file.stem != "__init__"]
OPERATIONS = (*aot.MODULES, "attention")  # which has no kernel of its own
ALLOWED = {"ftlab_kernels", "torch", "triton"} | sys.stdlib_module_names
NEVER = ("ftlab", "hydra", "omegaconf", "wandb", "transformers", "peft", "tokenizers")

# What each operation's reference gives on a small input, in a process that has no triton.
EXAMPLES = {
    "dropout": "dropout.reference(ones(3, 8), 0.5, torch.tensor([1]))",
    "lora": "lora.reference(ones(3, 4), [lora.Adapted(ones(5, 4), None, ones(2, 4), ones(5, 2), 1.0)], p=0.5)",
    "adamw": "adamw.reference_step([ones(3)], [ones(3)], [{}], max_grad_norm=1.0)",
    "linear_cross_entropy": "linear_cross_entropy.reference(ones(3, 4), ones(5, 4), torch.tensor([1, 2, -100]))",
    "norm": "norm.layer_norm_reference(ones(3, 4), norm.add_reference(*[ones(4)] * 3, 1e-6)[0], None, 1e-6)",
    "rope": "rope.reference(*[ones(1, 3, 2, 8)] * 2, *[ones(1, 3, 4)] * 2)",
    "attention": "attention.reference(*[ones(5, 2, 8)] * 3, (3, 2))",
    "nf4": "nf4.reference(torch.zeros(3, 32, dtype=torch.uint8), ones(3), torch.bfloat16)",
    "glu": "glu.geglu_reference(glu.reference(ones(3), ones(3)), ones(3))",
}
WITHOUT_TRITON = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import torch
"""


def python(code: str, **environment: str) -> str:
    """What `code` prints in a new process, which must succeed."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what it imports --------------------------------------------------------------------------------------------------


def imported(source: str) -> Iterator[str]:
    """The top package of every import, also of those inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0] if not node.level else "ftlab_kernels"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_imports_torch_triton_and_the_standard_library(file: Path) -> None:
    assert set(imported(file.read_text("utf-8"))) <= ALLOWED


def test_another_import_is_noticed() -> None:
    source = "from . import random\ndef f():\n    from ftlab.files import atomic_write\n    import torch.nn, numpy"
    assert set(imported(source)) - ALLOWED == {"ftlab", "numpy"}


def test_importing_all_of_it_brings_nothing_of_ftlab() -> None:
    code = f"import {', '.join(MODULES)}, sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    loaded = python(code).split()
    assert "torch" in loaded
    assert "ftlab_kernels" in loaded
    assert [name for name in NEVER if name in loaded] == []


# --- without triton ---------------------------------------------------------------------------------------------------


def test_every_module_imports_without_triton() -> None:
    code = (
        f"{WITHOUT_TRITON}import {', '.join(MODULES)}\nprint(ftlab_kernels.common.HAS_TRITON, 'triton' in sys.modules)"
    )
    assert python(code).split() == ["False", "False"]


def test_every_reference_runs_without_triton() -> None:
    assert set(EXAMPLES) == set(OPERATIONS)
    lines = [f"from ftlab_kernels import {name}\nprint({name!r}, type({code}))" for name, code in EXAMPLES.items()]
    printed = python(f"{WITHOUT_TRITON}from torch import ones\n" + "\n".join(lines))
    assert re.findall(r"^\w+", printed, re.MULTILINE) == list(EXAMPLES)


def test_a_kernel_without_triton_says_what_is_missing() -> None:
    code = f"""{WITHOUT_TRITON}
from ftlab_kernels.common import KernelUnavailableError, runs_triton
from ftlab_kernels.dropout import dropout
assert not runs_triton(torch.device("cpu"))
try:
    dropout(torch.ones(2, 8), 0.5)
except KernelUnavailableError as error:
    print(error)
"""
    assert python(code) == "the package triton is not installed\n"


# --- one contract for every operation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_keeps_the_contract(name: str) -> None:
    """A docstring that opens with letters and equation, a reference, a public function, and what is compiled of it."""
    module = importlib.import_module(f"ftlab_kernels.{name}")
    assert module.__doc__
    assert "Letters: " in module.__doc__
    public = [getattr(module, each) for each in module.__all__]
    functions = [each for each in public if inspect.isfunction(each)]
    references = [each.__name__ for each in functions if "reference" in each.__name__]
    assert references
    if name in aot.MODULES:
        assert "shipped" in module.__all__
        assert module.shipped()
    assert set(module.__all__) - set(references) - {"shipped"}
    assert all(each.__doc__ for each in functions if not each.__name__.startswith("_"))


def test_every_file_with_kernels_is_an_operation_or_part_of_one() -> None:
    """What `python -m ftlab_kernels.aot` does not list would be compiled by nobody."""
    shared = {"common", "random", "_without_triton"}
    with_kernels = {file.stem for file in FILES if re.search(r"^@triton\.jit", file.read_text("utf-8"), re.MULTILINE)}
    parts = tuple(f"{name}_" for name in aot.MODULES)
    assert {name for name in with_kernels - shared if name not in aot.MODULES and not name.startswith(parts)} == set()


def test_kernels_have_no_annotations_but_constexpr() -> None:
    """Triton evaluates annotations, and under `from __future__ import annotations` they are strings."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            words = map(ast.unparse, getattr(node, "decorator_list", []))
            if isinstance(node, ast.FunctionDef) and any(word.startswith("triton.jit") for word in words):
                notes = {ast.unparse(each.annotation) for each in node.args.args if each.annotation is not None}
                assert notes <= {"tl.constexpr"}, f"{file.name}: {node.name}"
                assert node.returns is None


# --- the wheel --------------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wheel = tmp_path / done.stdout.split()[-1]
    info = f"ftlab_kernels-{ftlab_kernels.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"{info}/METADATA").decode()
    ours = {f"ftlab_kernels/{file.name}" for file in PACKAGE.iterdir() if file.is_file()}
    assert {name for name in names if not name.startswith(f"{info}/")} == ours
    assert f"{info}/licenses/LICENSE" in names
    assert "Requires-Dist: torch" in metadata
    assert len(re.findall("^Requires-Dist: ", metadata, re.MULTILINE)) == 2
    assert "# ftlab_kernels" in metadata, "the README is its long description"


def test_both_projects_ask_for_the_same_torch_and_triton() -> None:
    def wanted(path: Path) -> set[str]:
        return set(tomllib.loads(path.read_text("utf-8"))["project"]["dependencies"])

    assert wanted(PROJECT / "pyproject.toml") <= wanted(ROOT / "pyproject.toml")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_examples_of_the_readme_run() -> None:
    """All of them, one after another, in Triton's interpreter and with the CPU in place of the GPU."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (PROJECT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 4
    code = "\n".join(blocks)
    assert '"cuda"' in code
    python(code.replace('"cuda"', '"cpu"'), TRITON_INTERPRET="1")


def test_the_readme_names_every_operation() -> None:
    page = (PROJECT / "README.md").read_text("utf-8")
    for name in OPERATIONS:
        module = importlib.import_module(f"ftlab_kernels.{name}")
        assert f"`{name}.py`" in page
        assert all(f"`{each}`" in page for each in module.__all__ if "reference" in each), name
    for link in re.findall(r"\]\(([^)#\s]+)", page):
        assert "://" in link or (PROJECT / link).exists(), link
