"""Imports point downward (docs/architecture.md), and some packages stay out."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ftlab"

FOUNDATION = (
    "allocator",
    "config",
    "errors",
    "files",
    "downloads",
    "assets",
    "patterns",
    "schema",
    "startup",
    "validate",
)
LAYERS = {
    **dict.fromkeys(FOUNDATION, 0),
    "operators": 1,
    "models": 2,
    "data": 3,
    "optim": 4,
    "losses": 5,
    "methods": 6,
    "evaluation": 7,
    "training": 8,
    "studies": 9,
}
COMMANDS = 10  # every other module of the package: the commands, build and compose
ONLY_COMPOSE = ("hydra", "omegaconf")
NEVER = ("transformers", "peft", "accelerate", "trl")


def layer_of(module: str) -> int:
    """Layer of a dotted module name below ftlab."""
    parts = module.split(".")
    if module == "ftlab.data.__main__":
        return COMMANDS
    return -1 if len(parts) == 1 else LAYERS.get(parts[1], COMMANDS)


def imports(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a module imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from ftlab import build` names a module by its alias
                yield node.lineno, f"{name}.{alias.name}" if name == "ftlab" else name


def complaints(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with a module's imports."""
    found = []
    for line, name in imports(source, module, is_package):
        top = name.split(".")[0]
        if top in NEVER:
            found.append(f"{module}:{line} imports {name}, which only tests may")
        if top in ONLY_COMPOSE and not module.startswith("ftlab.compose"):
            found.append(f"{module}:{line} imports {name}, which only ftlab.compose may")
        if top == "ftlab" and layer_of(name) > layer_of(module):
            found.append(f"{module}:{line} imports {name} from a layer above its own")
    return found


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_imports_point_downward() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    found = [
        complaint
        for file in files
        for complaint in complaints(file.read_text("utf-8"), module_name(file), file.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("ftlab.models.llama", "from ftlab.training.loop import fit", "layer above"),
        ("ftlab.models.llama", "def f():\n    from ..data import records", "layer above"),
        ("ftlab.optim.adamw", "from ftlab import build", "layer above"),
        ("ftlab.config", "import ftlab.compose", "layer above"),
        ("ftlab.data.records", "from ftlab.losses import penalties", "layer above"),
        ("ftlab.training.loop", "import omegaconf", "only ftlab.compose"),
        ("ftlab.train", "from hydra import compose", "only ftlab.compose"),
        ("ftlab.build", "import transformers.models", "only tests"),
        ("ftlab.methods.lora", "if TYPE_CHECKING:\n    from peft import LoraConfig", "only tests"),
    ],
)
def test_a_wrong_import_is_noticed(module: str, source: str, expected: str) -> None:
    (complaint,) = complaints(source, module)
    assert expected in complaint


def test_a_right_import_is_not_noticed() -> None:
    assert not complaints("import torch\nfrom ftlab.models.llama import x\nfrom . import state", "ftlab.training.loop")


def test_a_configuration_is_refused_without_torch() -> None:
    code = (
        "import sys; from ftlab.train import main; "
        "assert main(['--cfg', 'job']) == 0 and main(['method.rnk=1']) == 2; "
        "print(sorted({'torch', 'transformers', 'peft', 'matplotlib', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
