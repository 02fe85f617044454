"""Memory while loading, measured in a process of its own. Formats: test_checkpoint.py and test_gguf.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ftlab.assets import resolve
from ftlab.errors import FtlabError
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.configuration import LlamaConfig
from ftlab.models.loading import all_finite, load_model, random_llama
from tests.helpers.models import SMOLLM2

LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")

MEASURE = """
import sys, torch
from ftlab.models.loading import load_model
from safetensors.torch import load_file

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

path, dtype, naive = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3] == "naive"
torch.zeros(10).to(dtype).sum()
before = status("VmRSS")
if naive:
    tensors = list({name: t.to(dtype) for name, t in load_file(path + "/model.safetensors").items()}.values())
else:
    tensors = list(load_model(path, dtype=dtype).parameters())
print((status("VmHWM") - before) / sum(t.numel() * t.element_size() for t in tensors))
"""


def peak_over_weights(path: Path, dtype: str, how: str = "ftlab") -> float:
    """Peak resident memory above the interpreter, in units of the final weights."""
    command = [sys.executable, "-c", MEASURE, str(path), dtype, how]
    root = Path(__file__).parents[2]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 M weights, 175 MB in fp32."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("model")
    save_safetensors(random_llama(config, seed=0), folder)
    return folder


@LINUX
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_holds_little_more_than_the_final_weights(folder: Path, dtype: str) -> None:
    assert 0.9 < peak_over_weights(folder, dtype) < 1.5


@LINUX
def test_the_measure_notices_a_loader_that_holds_the_file_too(folder: Path) -> None:
    assert peak_over_weights(folder, "bfloat16", "naive") > 1.5


@LINUX
@pytest.mark.network
def test_loading_the_real_model_in_bf16() -> None:
    assert 0.9 < peak_over_weights(resolve(SMOLLM2), "bfloat16") < 1.5


@pytest.mark.network
def test_the_real_model_is_complete() -> None:
    model = load_model(resolve(SMOLLM2), dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.rope_theta) == (576, 30, 100000.0)
    assert (config.rms_norm_eps, config.tie_word_embeddings, config.max_position_embeddings) == (1e-5, True, 8192)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(FtlabError, match="no such file or folder"):
        load_model(tmp_path / "absent")
    (tmp_path / "weights.bin").write_bytes(b"\x80\x02")
    with pytest.raises(FtlabError, match="neither a GGUF file nor a folder"):
        load_model(tmp_path / "weights.bin")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    values = torch.linspace(-2, 2, 131).to(dtype)  # longer than the vectors it is compared in, and no multiple of them
    assert all_finite(values)
    for value in (float("nan"), float("inf"), float("-inf")):
        for index in range(len(values)):
            spoilt = values.clone()
            spoilt[index] = value
            assert not all_finite(spoilt), (value, index)
