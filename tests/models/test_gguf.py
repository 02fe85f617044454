from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from ftlab.errors import FtlabError
from ftlab.models.configuration import RopeScaling
from ftlab.models.gguf import GGUFFile, is_gguf
from ftlab.models.llama import rotary_frequencies
from ftlab.models.loading import load_model
from tests.helpers.gguf import write_gguf
from tests.helpers.models import random_ids, tiny_config, tiny_llama


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 16},
        {"attention_bias": True, "mlp_bias": True, "rope_scaling": None},
    ],
    ids=["tied", "untied, wide heads", "biases"],
)
def test_fp32_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = tiny_llama(**changes)
    write_gguf(tmp_path / "m.gguf", model)
    loaded = load_model(tmp_path / "m.gguf")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.rms_norm_eps == 1e-6  # not 9.999999974752427e-07, its fp32 value
    torch.testing.assert_close(loaded(random_ids(2, 7)), model(random_ids(2, 7)), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_type_is_dequantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("ftlab.models.gguf.CHUNK_WEIGHTS", 1000)  # several slices a tensor
    model = tiny_llama(tie_word_embeddings=False, head_dim=32)
    write_gguf(tmp_path / "m.gguf", model, kind)
    loaded = load_model(tmp_path / "m.gguf", dtype=dtype).state_dict()
    for name, tensor in model.state_dict().items():
        want = tensor
        if tensor.ndim > 1:
            quantisation = GGMLQuantizationType[kind]
            want = torch.from_numpy(np.array(dequantize(quantize(tensor.numpy(), quantisation), quantisation)))
        assert torch.equal(loaded[name], want.to(dtype)), name
        assert loaded[name].dtype == dtype


def test_rows_of_q_and_k_are_put_back(tmp_path: Path) -> None:
    """The broken variant: a file whose rows were never interleaved loads, and computes something else."""
    model = tiny_llama()
    write_gguf(tmp_path / "right.gguf", model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.helpers.gguf.interleave", lambda weight, heads: weight)
        write_gguf(tmp_path / "wrong.gguf", model)
    ids = random_ids(1, 8)
    torch.testing.assert_close(load_model(tmp_path / "right.gguf")(ids), model(ids))
    assert not torch.allclose(load_model(tmp_path / "wrong.gguf")(ids), model(ids), atol=1e-2)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recognised_by_its_divisors(tmp_path: Path, factor: float) -> None:
    plain = tiny_config(rope_theta=500000.0, head_dim=64)
    scaling = RopeScaling("llama3", factor)
    scaled = tiny_config(rope_theta=500000.0, head_dim=64, rope_scaling=scaling)
    divisors = (rotary_frequencies(plain) / rotary_frequencies(scaled)).numpy()
    model = tiny_llama(rope_theta=500000.0, head_dim=64)
    write_gguf(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": divisors})
    assert load_model(tmp_path / "m.gguf").config.rope_scaling == scaling
    write_gguf(tmp_path / "x.gguf", model, tensors={"rope_freqs.weight": divisors * np.float32(1.5)})
    with pytest.raises(FtlabError, match=r"rope_freqs\.weight is none of the llama3 rope scalings"):
        load_model(tmp_path / "x.gguf")


def test_linear_rope(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=metadata)
    assert load_model(tmp_path / "m.gguf").config.rope_scaling == RopeScaling("linear", 4.0)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"general.architecture": "gemma"}, "architecture is 'gemma'"),
        ({"llama.expert_count": 8}, "llama.expert_count"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count is 4"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length is 4"),
        ({"llama.block_count": None}, "no llama.block_count"),
        ({"llama.block_count": 1}, r"unexpected model\.layers\.1"),
        ({"llama.block_count": 3}, r"missing model\.layers\.2"),
        ({"llama.feed_forward_length": 32}, r"misshapen model\.layers\.0\.mlp"),
    ],
    ids=str,
)
def test_what_is_not_implemented_or_does_not_fit_is_named(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=metadata)
    with pytest.raises(FtlabError, match=message) as error:
        load_model(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(error.value)


def test_unknown_tensors_and_types_are_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", tiny_llama(), tensors={"blk.0.attn_sinks.weight": np.zeros(4, np.float32)})
    with pytest.raises(FtlabError, match=r"unexpected blk\.0\.attn_sinks\.weight"):
        load_model(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", tiny_llama(), "Q5_0")
    with pytest.raises(FtlabError, match=r"is Q5_0; only F32, F16"):
        load_model(tmp_path / "b.gguf")


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata={"tokenizer.ggml.tokens": ["a", "b"]})
    content = (tmp_path / "m.gguf").read_bytes()
    for cut in (5, 9, 30, 200, 700, 1500, 3000, len(content) - 40):
        (tmp_path / "cut.gguf").write_bytes(content[:cut])
        with pytest.raises(FtlabError, match="cannot be read as GGUF"):
            load_model(tmp_path / "cut.gguf")
    (tmp_path / "old.gguf").write_bytes(content[:4] + b"\1" + content[5:])
    with pytest.raises(FtlabError, match="version 1"):
        GGUFFile(tmp_path / "old.gguf")


def test_metadata_of_every_type(tmp_path: Path) -> None:
    values = {"a.text": "é新", "a.count": 7, "a.flag": True, "a.number": 0.5, "a.words": ["x", "y"], "a.list": [1, 2]}
    write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=values)
    assert is_gguf(tmp_path / "m.gguf")
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert {key: metadata[key] for key in values} == values
    assert metadata["general.architecture"] == "llama"
