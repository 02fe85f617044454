"""What a device is given of the dtypes that were asked for."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ftlab import combine, evaluate, export, fisher, generate, soup
from ftlab.compose import compose
from ftlab.config import PrecisionConfig
from ftlab.errors import ConfigError, FtlabError
from ftlab.session import train
from ftlab.training.parallel import Ranks
from ftlab.training.precision import Precision, keeps_bf16
from ftlab.training.record import describe_machine

CPU = torch.device("cpu")
BF16 = PrecisionConfig(compute="bf16", frozen="bf16")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without instructions for bf16."""
    monkeypatch.delenv("FTLAB_BF16", raising=False)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)


def dtypes(config: PrecisionConfig) -> tuple[torch.dtype, torch.dtype]:
    precision = Precision(config, CPU)
    return precision.compute, precision.frozen


@pytest.mark.parametrize(
    "config", [BF16, PrecisionConfig(compute="bf16"), PrecisionConfig(frozen="bf16")], ids=["both", "compute", "frozen"]
)
def test_bf16_is_carried_out_as_fp32_where_it_is_slow(config: PrecisionConfig, slow: None) -> None:
    assert dtypes(config) == (torch.float32, torch.float32)
    assert "FTLAB_BF16=always keeps bf16" in str(Precision(config, CPU).note)
    assert describe_machine(CPU, 1)["bf16"] is False


def test_it_is_kept_where_that_is_wished(slow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLAB_BF16", "always")
    assert dtypes(BF16) == (torch.bfloat16, torch.bfloat16)
    assert Precision(BF16, CPU).note is None
    assert describe_machine(CPU, 1)["bf16"] is True


def test_fp32_needs_no_note(slow: None) -> None:
    assert Precision(PrecisionConfig(), CPU).note is None
    assert keeps_bf16(torch.device("cuda")), "of a GPU torch says by itself what it lacks"


def test_without_onednn_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FTLAB_BF16", raising=False)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert dtypes(BF16) == (torch.float32, torch.float32)


def test_where_onednn_has_it_bf16_is_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FTLAB_BF16", raising=False)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    assert dtypes(BF16) == (torch.bfloat16, torch.bfloat16)


def test_a_run_says_so_and_is_the_run_in_fp32(tmp_path: Path, slow: None) -> None:
    words = ["+experiment=full_tiny", "tracking=disabled", "training.max_steps=3", "method=lora"]
    scores = []
    for name in ("fp32", "bf16"):
        assert train(*compose([*words, f"precision={name}", f"run_dir={tmp_path / name}"])) == 0
        record = json.loads((tmp_path / name / "run.json").read_text("utf-8"))
        assert any("bf16 is carried out as fp32" in line for line in record["warnings"]) == (name == "bf16")
        assert record["config"]["precision"]["compute"] == name, "what was asked for stays in the configuration"
        scores.append(record["scores"])
        assert record["dtypes"] == ["fp32", "fp32"]
        assert evaluate.main([f"run={tmp_path / name}", f"out={tmp_path / name}.json", "base=no"]) == 0
        again = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
        assert again["scores"]["after"]["loss"]["value"] == record["scores"]["final"]["loss"]["value"]
    assert scores[0] == scores[1]


def test_going_on_in_other_dtypes_is_told(
    tmp_path: Path, slow: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    words = ["+experiment=full_tiny", "tracking=disabled", "training.max_steps=4", "precision=bf16"]
    words += ["checkpoint.every_steps=2", "checkpoint.keep_last=9", "evaluation=loss_only"]
    assert train(*compose([*words, f"run_dir={run_dir}"])) == 0
    assert evaluate.main([f"run={run_dir}", "base=no"]) == 0
    assert "here they are" not in capsys.readouterr().err

    monkeypatch.setenv("FTLAB_BF16", "always")
    resume = f"resume={run_dir}/checkpoints/step-00000002"
    assert train(*compose([*words, f"run_dir={tmp_path}/again", resume])) == 0
    warnings = json.loads((tmp_path / "again/run.json").read_text("utf-8"))["warnings"]
    assert any("were fp32 and fp32, from here on they are bf16 and bf16" in line for line in warnings)
    assert evaluate.main([f"run={run_dir}", "base=no"]) == 0
    assert "were fp32 and fp32, here they are bf16 and bf16" in capsys.readouterr().err


def test_processes_on_unlike_processors_are_refused(
    tmp_path: Path, slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, ["bf16", "bf16"]])
    with pytest.raises(FtlabError, match="some processes have a processor that computes in bf16"):
        train(*compose(["+experiment=full_tiny", "tracking=disabled", "precision=bf16", f"run_dir={tmp_path}"]))


HALF = ["+experiment=full_tiny", "tracking=disabled", "training.max_steps=2", "evaluation=loss_only", "precision=fp16"]
HALF += ["precision.init_scale=16"]


@pytest.fixture(scope="module")
def in_fp16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs in half precision, `lora` and `full`, which a GPU would have trained."""
    folder = tmp_path_factory.mktemp("half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ftlab.session.Precision", functools.partial(Precision, allow_cpu_fp16=True))
        for method in ("lora", "full"):
            assert train(*compose([*HALF, f"method={method}", f"run_dir={folder / method}"])) == 0
    assert json.loads((folder / "lora/run.json").read_text("utf-8"))["dtypes"] == ["fp16", "fp16"]
    return folder


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    "command, words",
    [
        (evaluate.main, ["run={run}", "base=also", "out={out}.json", "device=cpu"]),
        (generate.main, ["run={run}", "max_new_tokens=2", "device=cpu", "What?"]),
        (export.main, ["run={run}", "out={out}"]),
        (fisher.main, ["run={run}", "examples=2", "device=cpu"]),
        (soup.main, ["runs=[{run}]", "alpha=0.5", "out={out}", "device=cpu"]),
    ],
    ids=["evaluate", "generate", "export", "fisher", "soup"],
)
def test_a_run_in_fp16_is_read_on_a_cpu(
    command: Callable[[list[str]], int],
    words: list[str],
    method: str,
    in_fp16: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = in_fp16 / method
    assert command([word.format(run=run, out=tmp_path / "out") for word in words]) == 0
    assert "frozen weights were fp16 and fp16, here they are fp32 and fp32" in capsys.readouterr().err
    if command is evaluate.main:
        scores = json.loads((tmp_path / "out.json").read_text("utf-8"))["scores"]
        then = json.loads((run / "run.json").read_text("utf-8"))["scores"]
        for now, before in (("before", "base"), ("after", "final")):
            assert scores[now]["loss"]["value"] == pytest.approx(then[before]["loss"]["value"], rel=1e-2)


def test_adapters_of_fp16_are_combined_on_a_cpu(
    in_fp16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = in_fp16 / "lora"
    shutil.copytree(run / "adapter", tmp_path / "other")
    assert combine.main([f"adapters=[{run},{tmp_path / 'other'}]", f"run={run}", f"out={tmp_path / 'sum'}"]) == 0
    said = capsys.readouterr()
    assert "here they are fp32 and fp32" in said.err
    assert said.out.count("validation loss") == 4


def test_training_in_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"precision\.compute=fp16 on a CPU"):
        Precision(PrecisionConfig(compute="fp16", frozen="fp16"), CPU)
