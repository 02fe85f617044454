"""The wheel carries conf/, and a command composes from it outside any checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built by the backend itself (no network), unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(folder / done.stdout.split()[-1]) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_every_yaml_is_in_the_wheel(unpacked: Path) -> None:
    ours = {file.relative_to(ROOT / "conf") for file in (ROOT / "conf").rglob("*.yaml")}
    assert len(ours) > 25
    assert {file.relative_to(unpacked / "ftlab" / "conf") for file in (unpacked / "ftlab" / "conf").rglob("*")} >= ours
    assert (unpacked / "ftlab" / "data" / "examples" / "capitals.jsonl").is_file()
    assert list(unpacked.glob("ftlab-*.dist-info/licenses/LICENSE"))


def run_unpacked(unpacked: Path, folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """`python -m ftlab.train` with the unpacked wheel in front of any installed ftlab."""
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-m", "ftlab.train", *argv]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_command_composes_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    done = run_unpacked(unpacked, tmp_path, "--info", "searchpath")
    assert done.returncode == 0, done.stderr
    assert f"file://{unpacked}/ftlab/conf" in done.stdout
    done = run_unpacked(unpacked, tmp_path, "+experiment=full_tiny", "--cfg", "job")
    assert "name: full_tiny" in done.stdout
    assert run_unpacked(unpacked, tmp_path, "method.rnk=1").returncode == 2


def test_without_conf_the_command_says_so(unpacked: Path, tmp_path: Path) -> None:
    """The negative case: a wheel built without conf/ does not work."""
    (unpacked / "ftlab" / "conf").rename(unpacked / "ftlab" / "hidden")
    try:
        done = run_unpacked(unpacked, tmp_path, "--cfg", "job")
    finally:
        (unpacked / "ftlab" / "hidden").rename(unpacked / "ftlab" / "conf")
    assert done.returncode == 1
    assert done.stderr.startswith("error: conf/config.yaml was found neither in")


def test_every_dependency_has_one_exact_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pinned["torch"] == "2.13.0"
    assert not [version for version in pinned.values() if "+" in version]
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        name = requirement.split(">=")[0].split("[")[0]
        assert name in pinned, name
