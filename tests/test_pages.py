"""What the pages name is there: links, keys of the configuration, folders."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ftlab.schema import NOT_HASHED
from tests.helpers.pages import PAGES, README, ROOT, named


def links(text: str) -> list[str]:
    """Relative targets of links and images, without anchors."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(([^)\s]+)\)", outside)
    return [target.split("#")[0] for target in targets if "://" not in target and not target.startswith("#")]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    dead = [target for target in links(page.read_text("utf-8")) if not (page.parent / target).exists()]
    assert not dead


def unknown_keys(text: str) -> list[str]:
    """Words in backticks that look like keys of the configuration and are none, nor the beginning of one."""
    known = set(
        re.findall(r"^\| `([a-z0-9_.]+)` \|", (ROOT / "docs/configuration.md").read_text("utf-8"), re.MULTILINE)
    )
    known |= {key.rpartition(".")[0] for key in known}
    groups = {key.partition(".")[0] for key in known if "." in key}
    words = re.findall(r"`([a-z_]+(?:\.[a-z0-9_]+)+)(?:=[^`]*)?`", text)
    return [key for key in words if key.partition(".")[0] in groups and key not in known]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_key_that_a_page_names_exists(page: Path) -> None:
    assert not unknown_keys(page.read_text("utf-8"))


def test_a_key_that_does_not_exist_is_noticed() -> None:
    assert unknown_keys("`head.label_smoothing`, `optimizer.lr=1`, `regularizer.ewc`") == ["head.label_smoothing"]


def test_a_dead_link_is_noticed() -> None:
    assert links("see [a](docs/a.md#top), ![b](c.png), [d](https://e.f) and [g](#here)\n") == ["docs/a.md", "c.png"]
    assert links("```\n[no](link.md)\n```\n") == []


def tree(text: str) -> list[str]:
    """The folders that the README's table of folders lists."""
    return re.findall(r"^\| `([\w./]+/)` \|", text, re.MULTILINE)


def folders_in_git() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {line.split("/")[0] + "/" for line in listed.splitlines() if "/" in line}


def test_the_tree_is_the_tree() -> None:
    listed = tree(README.read_text("utf-8"))
    assert [folder for folder in listed if not (ROOT / folder).is_dir()] == []
    if (ROOT / ".git").exists():
        assert folders_in_git() == {folder for folder in listed if folder.count("/") == 1}
    packages = {f"ftlab/{init.parent.name}/" for init in (ROOT / "ftlab").glob("*/__init__.py")}
    assert packages == {folder for folder in listed if folder.startswith("ftlab/") and folder != "ftlab/"}


def test_every_page_can_be_reached_from_the_readme() -> None:
    reachable, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        if page in reachable:
            continue
        reachable.add(page)
        targets = [(page.parent / target).resolve() for target in links(page.read_text("utf-8"))]
        waiting += [target for target in targets if target.suffix == ".md" and target.is_file()]
    assert set(PAGES) <= reachable


def test_options_that_change_nothing_are_the_ones_that_are_not_hashed() -> None:
    """docs/resume.md names them."""
    section = (ROOT / "docs/resume.md").read_text("utf-8").split("## What may change")[1].split("\n## ")[0]
    for key in NOT_HASHED:
        assert f"`{key}`" in section or key in ("output_dir", "run_dir", "resume"), key
