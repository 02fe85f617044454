"""Every kernel compiles for the GPUs it is meant for, without spilling and with the instructions it is meant to have.

No GPU is needed. The first configuration of each kernel is compiled in the fast suite, all of them with --long.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ftlab_kernels import aot
from ftlab_kernels.aot import Compiled, Shipped, complaints
from ftlab_kernels.common import HAS_TRITON, INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="compiles kernels, which needs plain triton")

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "ftlab_kernels"


def cases() -> list[Any]:
    """Every configuration for every architecture; all but each kernel's first are slow."""
    found: list[Any] = []
    if INTERPRETED or not HAS_TRITON:
        return found
    seen = set()
    for entry in aot.all_shipped():
        for arch in entry.architectures:
            marks = [pytest.mark.slow] if (entry.kernel, arch) in seen else []
            seen.add((entry.kernel, arch))
            found.append(pytest.param(entry, arch, id=f"{entry.name}-sm{arch}", marks=marks))
    return found


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing comes from the user's cache of compiled kernels, nothing goes there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@functools.cache
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_table", ROOT / "scripts" / "kernel_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("entry", "arch"), cases())
def test_compiles_and_may_ship(entry: Shipped, arch: int) -> None:
    """No complaint, and its row of docs/kernels-compiled.md is what the compiler gives."""
    made = aot.compile_shipped(entry, arch)
    assert not complaints(entry, made)
    assert made.registers > 0
    assert made.instructions.total() > 10
    assert made.instructions["EXIT"]
    row = aot.table([made])
    page = script().PAGE.read_text("utf-8")
    wanted = script().configurations(row)[-1] + "|"
    assert wanted in page, "run python scripts/kernel_table.py"
    if script().made_with(page) == importlib.metadata.version("triton"):
        assert row.splitlines()[-1] in page, "run python scripts/kernel_table.py"


def test_the_page_has_the_rows_of_what_is_shipped_and_no_others() -> None:
    page = script().PAGE.read_text("utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in page.splitlines() if line.startswith("| ")]
    found = [(name, arch) for name, arch in rows if arch.isdigit()]
    assert found == [(entry.name, str(arch)) for entry in aot.all_shipped() for arch in entry.architectures]
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == list(aot.MODULES)


def defined_and_launched() -> tuple[set[str], set[str]]:
    """Names of the package's kernels and device functions, and of what stands before [grid](...) in it."""
    defined, launched = set(), set()
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                jit = any(ast.unparse(each).startswith("triton.jit") for each in node.decorator_list)
                defined |= {node.name} if jit else set()
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value).rpartition(".")[2])
    return defined, launched


def test_every_kernel_that_is_launched_is_compiled_here() -> None:
    defined, launched = defined_and_launched()
    assert len(defined & launched) > 10
    assert {entry.kernel.__name__ for entry in aot.all_shipped()} == defined & launched


def test_names_are_unique() -> None:
    names = Counter((entry.name, arch) for entry in aot.all_shipped() for arch in entry.architectures)
    assert [name for name, count in names.items() if count > 1] == []


def test_what_may_spill_is_little() -> None:
    assert [entry.name for entry in aot.all_shipped() if entry.spill_bytes > 64] == []


# --- what a complaint is ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def entry() -> Shipped:
    return importlib.import_module("ftlab_kernels.dropout").shipped()[0]


def made(**changes: Any) -> Compiled:
    fine = Compiled("k", 90, 8, 128, 0, 1024, Counter({"HGMMA": 8, "LDG": 4, "EXIT": 1}))
    return dataclasses.replace(fine, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spill_bytes": 8}, "k on sm_90 spills 8 bytes, at most 0 are allowed"),
        ({"shared_bytes": 232_449}, "232449 bytes of shared memory of 232448"),
        ({"arch": 80, "shared_bytes": 166_913}, "166913 bytes of shared memory of 166912"),
        ({"registers": 255, "num_warps": 16}, "255 registers in 16 warps, over 65536"),
        ({"instructions": Counter({"HMMA": 8, "LDGSTS": 2})}, "k on sm_90 has none of HGMMA"),
        ({"instructions": Counter({"HGMMA": 8})}, "k on sm_90 has none of UTMALDG, LDGSTS, LDG"),
    ],
)
def test_each_fault_is_a_complaint(changes: dict[str, Any], words: str, entry: Shipped) -> None:
    wanted = dataclasses.replace(entry, expects={90: (("HGMMA",), ("UTMALDG", "LDGSTS", "LDG"))})
    assert complaints(wanted, made()) == []
    found = complaints(wanted, made(**changes))
    assert len(found) == 1
    assert words in found[0]


def test_at_the_limits_nothing_is_wrong(entry: Shipped) -> None:
    assert complaints(entry, made(shared_bytes=232_448, registers=256)) == []
    assert complaints(dataclasses.replace(entry, spill_bytes=8), made(spill_bytes=8)) == []


def test_a_real_kernel_without_tensor_cores_is_noticed(entry: Shipped) -> None:
    wanted = dataclasses.replace(entry, expects={80: (("HMMA",),), 90: (("HGMMA",), ("STG",))})
    compiled = aot.compile_shipped(wanted, 90)
    assert complaints(wanted, compiled) == [f"{entry.name} on sm_90 has none of HGMMA"]
    assert {"LDG", "STG", "IMAD", "EXIT"} <= set(compiled.instructions)
    assert "" not in compiled.instructions


def test_a_real_kernel_that_spills_is_noticed() -> None:
    """Two products of 64 x 64 in the registers of one warp."""
    triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")

    @triton.jit
    def greedy(x_ptr, y_ptr, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at[:, None] * BLOCK + at[None, :])
        y = tl.dot(x, x)
        z = tl.dot(x, tl.trans(x))
        tl.store(y_ptr + at[:, None] * BLOCK + at[None, :], tl.exp(y) + tl.exp(z) * y)

    wanted = Shipped("greedy", greedy, {"x_ptr": "*fp16", "y_ptr": "*fp32"}, {}, {"BLOCK": 64, "num_warps": 1})
    compiled = aot.compile_shipped(wanted, 80)
    assert any("greedy on sm_80 spills" in line for line in complaints(wanted, compiled))


def test_an_argument_without_a_type_is_an_error(entry: Shipped) -> None:
    types = {name: word for name, word in entry.types.items() if name != "rows"}
    with pytest.raises(ValueError, match="no type or value for rows"):
        aot.compile_shipped(dataclasses.replace(entry, types=types), 80)


# --- the command and the page -----------------------------------------------------------------------------------------


@pytest.fixture
def only_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "MODULES", ("dropout",))


@pytest.mark.usefixtures("only_dropout")
def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert aot.main([]) == 0
    plain = capsys.readouterr().out
    assert plain.startswith("| kernel | sm | warps | registers |")
    assert plain.count("\n") == 2 + 2 * 2
    assert aot.main(["--markdown"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("# ")
    assert f"## dropout\n\n{plain}" in page
    assert page.endswith("|\n")
    monkeypatch.setattr(aot, "SHARED_LIMIT", {80: -1, 90: 232_448})
    assert aot.main([]) == 1
    assert capsys.readouterr().err.count("error: ") == 2


@pytest.mark.usefixtures("only_dropout")
def test_an_old_page_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script().compiled_page()
    monkeypatch.setattr(script(), "compiled_page", lambda: text)
    page = tmp_path / "page.md"
    arguments = ["--page", str(page)]
    assert script().main([*arguments, "--check"]) == 1, "there is none"
    assert script().main(arguments) == 0
    assert script().main([*arguments, "--check"]) == 0
    assert page.read_text("utf-8") == text
    row = next(line for line in text.splitlines() if line.startswith("| dropout"))
    for column, elsewhere in ((1, 1), (3, 1), (4, 0), (6, 0)):  # registers are another triton's own business
        cells = row.split("|")
        cells[column] = " 77 "
        changed = text.replace(row, "|".join(cells))
        page.write_text(changed)
        assert script().main([*arguments, "--check"]) == 1
        page.write_text(changed.replace("by triton 3", "by triton 2"))
        assert script().main([*arguments, "--check"]) == elsewhere
    page.write_text("# something else\n")
    capsys.readouterr()
    assert script().main([*arguments, "--check"]) == 1
    assert "does not say which triton" in capsys.readouterr().err


@pytest.mark.usefixtures("only_dropout")
def test_a_page_is_not_written_of_kernels_that_may_not_ship(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "SHARED_LIMIT", {80: -1, 90: 232_448})
    assert script().main(["--page", str(tmp_path / "page.md")]) == 1
    assert "dropout forward on sm_80 takes" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
