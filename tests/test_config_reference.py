"""docs/configuration.md is what the dataclasses say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from ftlab.schema import schema_keys

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("config_reference", ROOT / "scripts" / "config_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(reference: ModuleType) -> None:
    assert reference.PAGE.read_text("utf-8") == reference.page(), "run python scripts/config_reference.py"


def test_the_page_holds_every_key(reference: ModuleType) -> None:
    page = reference.page()
    keys = [key.path for key in schema_keys() if not hasattr(key.type, "__dataclass_fields__")]
    assert len(keys) > 80
    assert [key for key in keys if f"| `{key}` |" not in page] == []


def test_an_old_page_is_noticed(
    reference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "PAGE", tmp_path / "configuration.md")
    monkeypatch.setattr("sys.argv", ["config_reference.py", "--check"])
    reference.PAGE.write_text(reference.page().replace("peak learning rate", "rate"), "utf-8")
    assert reference.main() == 1
    assert "out of date" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["config_reference.py"])
    assert reference.main() == 0
    monkeypatch.setattr("sys.argv", ["config_reference.py", "--check"])
    assert reference.main() == 0
