from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ftlab.errors import FtlabError
from ftlab.models.checkpoint import save_safetensors
from ftlab.models.configuration import LlamaConfig
from ftlab.models.llama import LlamaForCausalLM
from ftlab.models.loading import load_model
from tests.helpers.models import random_ids, tiny_config, tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_safetensors(tiny_llama(tie_word_embeddings=False), tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | changes))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; "__" stands for "."."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> dict[str, str]:
    """Split the folder's tensors over two files; returns the weight map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {name: files[index % 2] for index, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = tiny_llama(tie_word_embeddings=tied, attention_bias=True).to(dtype)
    save_safetensors(model, tmp_path)
    loaded = load_model(tmp_path, dtype=dtype)
    assert loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert all(p.dtype == dtype and p.requires_grad and not p.is_meta for p in loaded.parameters())
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert ("lm_head.weight" in file.keys()) is not tied  # noqa: SIM118 (not a dict)


def test_a_mixture_of_dtypes_is_saved_in_fp32_unless_told(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.model.norm.float()
    save_safetensors(model, tmp_path / "a")
    save_safetensors(model, tmp_path / "b", dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "a" / "model.safetensors").values()} == {torch.float32}
    assert {tensor.dtype for tensor in load_file(tmp_path / "b" / "model.safetensors").values()} == {torch.float16}


def test_saving_over_a_model_keeps_other_files_and_leaves_no_temporary_ones(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    save_safetensors(tiny_llama(seed=1, tie_word_embeddings=False), folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    empty = LlamaForCausalLM(tiny_config())
    with pytest.raises(FtlabError, match=r"no values to save for model\.embed_tokens\.weight"):
        save_safetensors(empty, folder)


def test_sharded_equals_single(folder: Path) -> None:
    single = load_model(folder)
    shard(folder)
    sharded = load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(single.parameters(), sharded.parameters(), strict=True))


@pytest.mark.parametrize("entry", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_an_index_entry_cannot_leave_its_folder(folder: Path, entry: str) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "model.safetensors")
    weight_map = shard(folder)
    write_index(folder, weight_map | {"model.norm.weight": entry})
    with pytest.raises(FtlabError, match=r"of model\.norm\.weight leaves the folder"):
        load_model(folder)


def test_an_index_that_lies_is_refused(folder: Path) -> None:
    weight_map = shard(folder)
    other = next(file for file in set(weight_map.values()) if file != weight_map["model.norm.weight"])
    write_index(folder, weight_map | {"model.norm.weight": other})
    with pytest.raises(FtlabError, match=r"does not hold what .*model\.norm\.weight"):
        load_model(folder)
    write_index(folder, dict.fromkeys(weight_map, "absent.safetensors"))
    with pytest.raises(FtlabError, match=r"absent\.safetensors: cannot be read"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    with pytest.raises(FtlabError, match="weight_map must be an object"):
        load_model(folder)


def test_wrong_tensors_are_named(folder: Path) -> None:
    edit_tensors(
        folder,
        model__norm__weight=None,
        model__layers__0__mlp__up_proj__weight=torch.zeros(64, 31),
        model__extra=torch.zeros(1),
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4),  # old checkpoints have it: ignored
    )
    with pytest.raises(FtlabError) as error:
        load_model(folder)
    message = str(error.value)
    assert "missing model.norm.weight;" in message
    assert "unexpected model.extra;" in message
    assert "misshapen model.layers.0.mlp.up_proj.weight (64, 31) instead of (64, 32)" in message
    assert "inv_freq" not in message


def test_an_untied_model_without_a_head_is_missing_it(folder: Path) -> None:
    edit_tensors(folder, lm_head__weight=None)
    with pytest.raises(FtlabError, match=r"missing lm_head\.weight"):
        load_model(folder)
    edit_config(folder, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_model(folder).state_dict()


def test_a_tied_model_may_store_its_head_but_not_another_one(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(FtlabError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight but they differ"):
        load_model(folder)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder, lm_head__weight=embedding.clone())
    assert load_model(folder).head_weight.shape == embedding.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_values_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    edit_tensors(folder, model__norm__weight=torch.full((32,), value))
    with pytest.raises(FtlabError, match=r"model\.norm\.weight has values that are not finite in torch\.float16"):
        load_model(folder, dtype=torch.float16)


def test_quantised_tensors_are_refused(folder: Path) -> None:
    edit_tensors(folder, model__norm__weight=torch.zeros(32, dtype=torch.int8))
    with pytest.raises(FtlabError, match=r"model\.norm\.weight is I8"):
        load_model(folder)


def test_broken_folders(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(FtlabError, match=r"model\.safetensors: cannot be read as safetensors"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FtlabError, match="never pickles"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(FtlabError, match=r"config\.json: cannot be read as JSON"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FtlabError, match=r"config\.json: no such file"):
        load_model(folder)


def test_large_tensors_are_read_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ftlab.models.checkpoint.CHUNK_BYTES", 1000)
    model = tiny_llama()
    save_safetensors(model, tmp_path)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(loaded(random_ids(1, 6)), model(random_ids(1, 6)), rtol=0, atol=0)


def test_config_of_the_folder_is_read(folder: Path) -> None:
    edit_config(folder, rms_norm_eps=1e-3)
    assert load_model(folder).config.rms_norm_eps == 1e-3
    assert isinstance(load_model(folder).config, LlamaConfig)
    edit_config(folder, hidden_act="relu")
    with pytest.raises(FtlabError, match=r"config\.json: hidden_act='relu'"):
        load_model(folder)
