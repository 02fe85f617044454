"""scripts/run.sh and scripts/test.sh install once, only when something changed, and pass their arguments on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Stands in for .venv/bin/python: pip is noted instead of run, the program prints its arguments one a line.
PYTHON = """#!/usr/bin/env bash
if [ "$1 $2 $3" = "-m pip --version" ]; then exit 0; fi
if [ "$1 $2" = "-m pip" ]; then echo "$*" >>"{log}"; exit "${{FAIL:-0}}"; fi
if [ "$1" = "-c" ]; then exec "{python}" "$@"; fi
printf '%s\\n' "$@"
echo "home ${{HOME:-none}}"
"""


class Checkout:
    """A copy of the scripts in a folder with a space, and a virtual environment that only notes what is asked of it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.venv = self.root / ".venv"
        self.log = folder / "pip.log"
        shutil.copytree(ROOT / "scripts", self.root / "scripts", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        (self.venv / "bin").mkdir(parents=True)
        python = self.venv / "bin" / "python"
        python.write_text(PYTHON.format(log=self.log, python=sys.executable), "utf-8")
        python.chmod(0o755)

    def call(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {"PATH": os.environ["PATH"], "HOME": str(self.root)}
        command = [str(self.root / "scripts" / script), *arguments]
        return subprocess.run(
            command, env={**inherited, **environment}, cwd="/", capture_output=True, text=True, check=False
        )

    def installs(self) -> list[str]:
        return self.log.read_text("utf-8").splitlines() if self.log.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_the_first_call_installs_and_the_second_does_not(checkout: Checkout) -> None:
    assert checkout.call("run.sh").returncode == 0
    first, second = checkout.installs()
    assert "torch==2.13.0" in first, "torch goes first, by its pin"
    assert ".[test]" in second
    assert "constraints.txt" in second
    assert checkout.call("run.sh").returncode == 0
    assert len(checkout.installs()) == 2


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_change_installs_again(name: str, checkout: Checkout) -> None:
    checkout.call("run.sh")
    with (checkout.root / name).open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    checkout.call("test.sh")
    assert len(checkout.installs()) == 4


def test_a_failed_install_is_tried_again(checkout: Checkout) -> None:
    failed = checkout.call("run.sh", FAIL="1")
    assert failed.returncode == 1
    assert failed.stdout == ""
    assert failed.stderr.splitlines()[-1].startswith("error: torch could not be installed")
    assert not (checkout.venv / ".ftlab-stamp").exists()
    assert checkout.call("run.sh").returncode == 0
    assert (checkout.venv / ".ftlab-stamp").exists()


def test_arguments(checkout: Checkout) -> None:
    assert checkout.call("run.sh").stdout.splitlines()[:3] == ["-m", "ftlab.train", "+experiment=lora_medical"]
    given = ["method.rank=4", "data.system=two words"]
    assert checkout.call("run.sh", *given).stdout.splitlines()[:4] == ["-m", "ftlab.train", *given]
    said = checkout.call("test.sh", "-k", "a or b").stdout.splitlines()
    ours = ["-m", "pytest", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    ours += ["--durations", "25", "--durations-min", "5"]
    assert said[: len(ours) + 2] == [*ours, "-k", "a or b"], "the caller's come last, so that they win"


@pytest.mark.parametrize("home", ["", "/nowhere/at/all"])
def test_a_home_that_is_not_there(home: str, checkout: Checkout) -> None:
    assert checkout.call("run.sh", HOME=home).stdout.splitlines()[-1] == f"home {checkout.venv}/home"
    assert checkout.call("run.sh").stdout.splitlines()[-1] == f"home {checkout.root}"


def test_a_python_that_is_too_old(checkout: Checkout) -> None:
    shutil.rmtree(checkout.venv)
    refused = checkout.call("run.sh", PYTHON="/bin/false")
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == ["error: PYTHON=/bin/false is not Python 3.11 or newer"]
    assert not (checkout.venv / ".ftlab-stamp").exists()
