"""Compile kernels for a GPU that is not there, and read what the compiler made of them.

    python -m ftlab_kernels.aot               a table of all shipped kernels for sm_80 and sm_90; exit 1 if one is wrong
    python -m ftlab_kernels.aot --markdown    the same as a page, with a table for each operation

Proves that a kernel compiles for its real argument types, how many registers and how much shared memory it takes, that
nothing spills, and which instructions stand in it. Proves nothing about time, races or numbers.

Needs only the triton wheel, which brings ptxas, cuobjdump and nvdisasm. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "ARCHITECTURES",
    "MODULES",
    "Compiled",
    "Shipped",
    "all_shipped",
    "compile_all",
    "compile_shipped",
    "complaints",
    "main",
    "markdown",
    "shipped_by_module",
    "table",
]

ARCHITECTURES = (80, 90)
SHARED_LIMIT = {80: 166_912, 90: 232_448}  # bytes a block may have
REGISTERS = 65_536  # 32-bit registers of a multiprocessor, which one block may not exceed
MODULES = ("dropout", "lora", "adamw", "linear_cross_entropy", "norm", "rope", "glu", "nf4")


@dataclass(frozen=True)
class Shipped:
    """A kernel with the argument types and options that the package really launches it with.

    types: Triton's names of the run-time arguments' types (`*bf16`, `i32`, ...). divisible: the integers among them
    that are multiples of 16, as sizes and strides of real models are; pointers always are. options: block sizes
    (constants) and num_warps, num_stages. expects: for each architecture the SASS instructions of which at least
    one must occur, a tuple of alternatives each. spill_bytes: what may spill, with a reason beside it where it is
    not 0.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    divisible: tuple[str, ...] = ()
    expects: Mapping[int, Sequence[tuple[str, ...]]] = field(default_factory=dict)
    spill_bytes: int = 0
    architectures: tuple[int, ...] = ARCHITECTURES


@dataclass(frozen=True)
class Compiled:
    """What the compiler made: registers a thread, spilled and shared bytes, and how often each instruction occurs."""

    name: str
    arch: int
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: Counter[str]


def shipped_by_module() -> dict[str, list[Shipped]]:
    """The shipped configurations of each operation."""
    import importlib

    return {name: importlib.import_module(f"ftlab_kernels.{name}").shipped() for name in MODULES}


def all_shipped() -> list[Shipped]:
    """Every kernel of the package in every shipped configuration."""
    return [entry for entries in shipped_by_module().values() for entry in entries]


def compile_shipped(entry: Shipped, arch: int) -> Compiled:
    """Compile for sm_<arch> and take the binary apart. Errors: whatever the compiler raises."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launch = {name: value for name, value in entry.options.items() if name in ("num_warps", "num_stages")}
    constants = {**entry.constants, **{n: v for n, v in entry.options.items() if n not in launch}}
    names = list(entry.kernel.arg_names)
    missing = [name for name in names if name not in entry.types and name not in constants]
    if missing:
        raise ValueError(f"{entry.name}: no type or value for {', '.join(missing)}")
    signature = {name: entry.types.get(name, "constexpr") for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in entry.types and (entry.types[name].startswith("*") or name in entry.divisible)
    }
    source = ASTSource(fn=entry.kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)
    return _inspect(entry, arch, built, launch.get("num_warps", 4))


def _inspect(entry: Shipped, arch: int, built: Any, num_warps: int) -> Compiled:
    from triton import knobs

    ptxas = knobs.nvidia.ptxas if arch < 90 else knobs.nvidia.ptxas_blackwell
    cuobjdump = knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(built.asm["cubin"])
        ptx.write_text(built.asm["ptx"], encoding="utf-8")
        usage = _run(cuobjdump, "-res-usage", str(cubin))
        sass = _run(cuobjdump, "-sass", str(cubin))
        target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        verbose = _run(ptxas.path, "-v", target, str(ptx), "-o", str(Path(folder, "again.cubin")))
    registers = re.search(r"REG:(\d+)", usage)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", verbose)
    if registers is None or spills is None:
        raise RuntimeError(f"{entry.name}: cannot read the resource usage that cuobjdump and ptxas print")
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE)
    spilled = int(spills[1]) + int(spills[2])
    shared = int(built.metadata.shared)
    return Compiled(entry.name, arch, num_warps, int(registers[1]), spilled, shared, Counter(found))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def complaints(entry: Shipped, made: Compiled) -> list[str]:
    """What is wrong with a compiled kernel; nothing if it may ship."""
    where = f"{made.name} on sm_{made.arch}"
    found = []
    if made.spill_bytes > entry.spill_bytes:
        found.append(f"{where} spills {made.spill_bytes} bytes, at most {entry.spill_bytes} are allowed")
    if made.shared_bytes > SHARED_LIMIT[made.arch]:
        found.append(f"{where} takes {made.shared_bytes} bytes of shared memory of {SHARED_LIMIT[made.arch]}")
    if made.registers * 32 * made.num_warps > REGISTERS:
        found.append(f"{where} takes {made.registers} registers in {made.num_warps} warps, over {REGISTERS} in all")
    for alternatives in entry.expects.get(made.arch, ()):
        if not any(made.instructions[name] for name in alternatives):
            found.append(f"{where} has none of {', '.join(alternatives)}")
    return found


SHOWN = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "IMAD", "LDG", "STG")


def table(made: Sequence[Compiled]) -> str:
    """A Markdown table: resources and the counts of a few instructions."""
    heads = ("kernel", "sm", "warps", "registers", "spilled B", "shared B", *SHOWN)
    lines = [heads, tuple("---" if n == 0 else "---:" for n in range(len(heads)))]
    for each in made:
        counts = tuple(str(each.instructions[name]) for name in SHOWN)
        resources = (each.arch, each.num_warps, each.registers, each.spill_bytes, f"{each.shared_bytes:,}")
        lines.append((each.name, *map(str, resources), *counts))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PAGE = """# What the compiler makes of the kernels

The kernels that the package launches, with the argument types, block sizes and warps that it launches them with,
compiled for sm_80 (A100) and sm_90 (H100) by triton {version} and the ptxas that comes with it. Nothing was run for
this page: it says what a kernel takes and which instructions stand in it, and nothing about time.

registers: of a thread (at most 255, and 65,536 in a block). spilled B: bytes of registers written to memory and read
back. shared B: bytes of a block (at most {limits}). The other columns count
instructions of the binary: HGMMA and HMMA are products by tensor cores on sm_90 and sm_80, UTMALDG and LDGSTS
asynchronous copies into shared memory, IMAD integer multiplications, LDG and STG loads and stores of global memory.

Written by `python scripts/kernel_table.py`.
"""


def markdown(made: Mapping[str, Sequence[Compiled]]) -> str:
    """A page with a table for each operation. made: what was compiled, by module."""
    import triton

    limits = " and ".join(f"{limit:,} on sm_{arch}" for arch, limit in SHARED_LIMIT.items())
    parts = [PAGE.format(version=triton.__version__, limits=limits)]
    parts += [f"## {name}\n\n{table(each)}\n" for name, each in made.items()]
    return "\n".join(parts)


def compile_all() -> tuple[dict[str, list[Compiled]], list[str]]:
    """Every shipped kernel for each of its architectures, by module, and what is wrong with them."""
    made: dict[str, list[Compiled]] = {}
    wrong: list[str] = []
    for module, entries in shipped_by_module().items():
        pairs = [(entry, compile_shipped(entry, arch)) for entry in entries for arch in entry.architectures]
        made[module] = [built for _, built in pairs]
        wrong += [line for pair in pairs for line in complaints(*pair)]
    return made, wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Compile everything, print the table or the page, and what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m ftlab_kernels.aot", description="Compile every shipped kernel.")
    parser.add_argument("--markdown", action="store_true", help="print a page with a table for each operation")
    options = parser.parse_args(argv)
    made, wrong = compile_all()
    text = markdown(made) if options.markdown else table([built for each in made.values() for built in each]) + "\n"
    print(text, end="")
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
