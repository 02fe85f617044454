"""Anchors in memory-mapped files: the same bits as anchors in memory, and none of the process's memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftlab.compose import compose
from ftlab.config import AdamWConfig, FreezeConfig, FullConfig, LoRAConfig
from ftlab.errors import ConfigError, FtlabError
from ftlab.losses.anchors import mapped
from ftlab.losses.penalties import L2SP, DecoupledL2SP
from ftlab.methods import make_method
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.loading import load_model
from ftlab.optim.adamw import build_optimizer
from ftlab.session import train
from tests.helpers.classifiers import tiny_bert_classifier
from tests.helpers.models import tiny_llama
from tests.losses.test_penalties import jiggle


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FTLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(cache: Path) -> list[Path]:
    return sorted(cache.glob("anchors/*"))


def file_of(tensor: Tensor) -> tuple[str, int]:
    """The file that a tensor's memory is a mapping of ("" for none), and the kB of that mapping that are private."""
    lines = Path("/proc/self/smaps").read_text("utf-8").splitlines()
    at, found, private = tensor.data_ptr(), "", 0
    inside = False
    for line in lines:
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= at < high
            found = (rest[4] if len(rest) > 4 else "") if inside else found
        elif inside and first == "Private_Dirty:":
            private += int(rest[0])
    return found, private


def both(model: nn.Module, kind: type[L2SP], base: Path | None) -> tuple[L2SP, L2SP]:
    return kind(model, 0.3, rules=["mlp:2"]), kind(model, 0.3, rules=["mlp:2"], anchor="mmap", base=base)


def assert_same_bits(kept: L2SP, files: L2SP, model: nn.Module) -> None:
    jiggle(model)
    gradients = []
    for penalty in (kept, files):
        model.zero_grad()
        L2SP.value(penalty, model).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert torch.equal(kept.value(model), files.value(model))
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None)
        assert gradient is None or torch.equal(gradient, gradients[1][name])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", [FullConfig(), FreezeConfig(frozen_fraction=0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_of_the_checkpoint_itself(
    method: FullConfig | FreezeConfig, dtype: torch.dtype, tmp_path: Path, cache: Path
) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    save_safetensors(tiny_llama(), folder, dtype)
    model = load_model(folder)
    make_method(method).apply(model)
    kept, files = both(model, L2SP, folder)
    assert files.anchors.keys() == kept.anchors.keys()
    assert_same_bits(kept, files, model)
    for anchor in files.anchors.values():
        assert anchor.dtype == dtype
        assert file_of(anchor) == (str(folder / "model.safetensors"), 0)
    assert not written(cache)
    assert file_of(next(iter(kept.anchors.values())))[0] != str(folder / "model.safetensors")


def test_names_of_an_encoder_and_tensors_that_the_checkpoint_calls_otherwise(tmp_path: Path, cache: Path) -> None:
    model = tiny_bert_classifier()
    make_method(FullConfig()).apply(model)
    held = L2SP(model, 0.3).anchors
    inside = {name.partition(".")[2]: tensor.clone() for name, tensor in held.items()}
    renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in inside.items()}
    assert renamed.keys() != inside.keys()
    save_file(renamed, str(tmp_path / "model.safetensors"))
    kept, files = L2SP(model, 0.3), L2SP(model, 0.3, anchor="mmap", base=tmp_path)
    assert_same_bits(kept, files, model)
    (file,) = written(cache)
    assert load_file(file).keys() == {name for name in held if name.endswith("LayerNorm.weight")}
    for name, anchor in files.anchors.items():
        assert file_of(anchor)[0] == str(file if name in load_file(file) else tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", [L2SP, DecoupledL2SP])
def test_what_no_checkpoint_holds_is_written_once(kind: type[L2SP], cache: Path) -> None:
    model = tiny_llama()
    make_method(FullConfig()).apply(model)
    kept, files = both(model, kind, None)
    (file,) = written(cache)
    when = file.stat().st_mtime_ns
    assert all(file_of(anchor) == (str(file), 0) for anchor in files.anchors.values())
    assert files.fingerprint() == kept.fingerprint() == file.stem
    again = both(model, kind, None)[1]
    assert written(cache) == [file]
    assert file.stat().st_mtime_ns == when
    assert again.fingerprint() == files.fingerprint()
    assert_same_bits(kept, files, model)
    assert both(model, kind, None)[1].fingerprint() != files.fingerprint(), "other weights have another file"


def test_adapters_need_no_file(cache: Path) -> None:
    model = tiny_llama()
    make_method(LoRAConfig(rank=2)).apply(model)
    assert not L2SP(model, 0.3, anchor="mmap").anchors
    assert not written(cache)


def test_a_spoilt_file_and_a_cache_that_cannot_be_written_are_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"a": torch.ones(3)}
    mapped(weights, None)
    (file,) = written(cache)
    save_file({"a": torch.zeros(3)}, str(file))
    with pytest.raises(FtlabError, match="delete it"):
        mapped(weights, None)
    (tmp_path / "no_folder").write_text("a file", "utf-8")
    monkeypatch.setenv("FTLAB_CACHE", str(tmp_path / "no_folder"))
    with pytest.raises(FtlabError, match="give anchor=cpu"):
        mapped(weights, None)


def test_the_fused_optimizer_refuses_anchors_elsewhere() -> None:
    model = tiny_llama()
    table = make_method(FullConfig()).apply(model)
    pulls = {p: (torch.empty_like(p, device="meta"), 1.0) for p in model.parameters()}
    with pytest.raises(ConfigError, match=r"regularizer\.l2_sp\.anchor"):
        build_optimizer(AdamWConfig(), model, table, path="triton", pulls=pulls)


@pytest.mark.parametrize("mode", ["coupled", "decoupled"])
@pytest.mark.parametrize("method", ["full", "freeze", "gradual_unfreeze"])
def test_a_run_is_bit_for_bit_that_of_anchors_in_memory(method: str, mode: str, tmp_path: Path) -> None:
    def weights(anchor: str) -> dict[str, Tensor]:
        words = ["+experiment=full_tiny", "evaluation=none", "tracking=disabled", "training.preflight=false"]
        words += [f"method={method}", "training.max_steps=4", f"run_dir={tmp_path / anchor}"]
        words += ["regularizer.l2_sp.strength=0.5", f"regularizer.l2_sp.mode={mode}"]
        assert train(*compose([*words, f"regularizer.l2_sp.anchor={anchor}"])) == 0
        return load_file(tmp_path / anchor / "model" / "model.safetensors")

    kept = weights("cpu")
    for name, tensor in weights("mmap").items():
        assert torch.equal(tensor, kept[name]), name
