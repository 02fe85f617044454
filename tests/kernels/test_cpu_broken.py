"""Deliberately broken copies of the compiled C: the checks of its functions must notice each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from ftlab_kernels import cpu, dropout, native, nf4
from ftlab_kernels.adamw import Rule
from ftlab_kernels.random import mask_bytes

from tests.kernels import harness
from tests.kernels.cpu_cases import (
    SEED,
    attention_case,
    cross_entropy_case,
    dropout_case,
    lora_case,
    norm_case,
    rope_case,
    swiglu_case,
)
from tests.kernels.eight_bit_cases import steps_case, tiny_case
from tests.kernels.harness import noticed

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "device", lambda: torch.device("cpu"))


@contextlib.contextmanager
def library_of(folder: Path, old: str = "", new: str = "") -> Iterator[None]:
    """Inside, `cpu` calls a library of the sources with `old` replaced by `new`. `old` must occur."""
    sources = {name: (native.FOLDER / name).read_text("utf-8") for name in native.SOURCES}
    assert any(old in text for text in sources.values()), f"there is no {old!r}; the test needs another place"
    for name, text in sources.items():
        (folder / name).write_text(text.replace(old, new), "utf-8")
    with (
        mock.patch.object(native, "FOLDER", folder),
        mock.patch.object(native, "FLAGS", ("-O0", *native.FLAGS[1:])),  # a tenth of the time to compile
        mock.patch.dict("os.environ", {"FTLAB_KERNELS_CACHE": str(folder)}),
    ):
        yield


def check_mask() -> None:
    bits = cpu._drop(torch.ones(5, 37), 0.3, SEED)[1]
    assert torch.equal(bits, mask_bytes(SEED, 5, 37, 0.3))


def check_rounding() -> None:
    x = harness.random(64, 41, dtype=BF16, scale=3.0)
    assert torch.equal(cpu.dropout(x, 0.3, seed=SEED), dropout.reference(x, 0.3, SEED))


def check_sure() -> None:
    """Logits that are nearly certain of their label: p - 1 has to keep its digits."""
    logits = torch.zeros(4, 16, dtype=BF16)
    logits[:, 3] = torch.tensor([7.0, 8.0, 9.0, 10.0])
    truth = logits.double().softmax(-1)[:, 3] - 1
    cpu.cross_entropy_(logits, torch.full((4,), 3), gradient=True)
    torch.testing.assert_close(logits[:, 3].double(), truth, rtol=2**-7, atol=0)


def check_nf4() -> None:
    codes = torch.arange(3 * 32).mul(37).to(torch.uint8).view(3, 32)
    magnitudes = torch.tensor([0.3, 1.7, 40.0])
    for dtype in (torch.float32, BF16):
        assert torch.equal(cpu.nf4_dequantise(codes, magnitudes, dtype), nf4.reference(codes, magnitudes, dtype))


CHECKS: dict[str, Callable[[], None]] = {
    "nf4": check_nf4,
    "norm": lambda: norm_case().judge(),
    "norm alone": lambda: norm_case(added=False).judge(),
    "norm of many rows": lambda: norm_case(shape=(257, 37)).judge(),
    "norm bf16": lambda: norm_case(BF16).judge(),
    "rope": lambda: rope_case().judge(),
    "swiglu": lambda: swiglu_case().judge(),
    "dropout": lambda: dropout_case().judge(),
    "dropout 48": lambda: dropout_case(shape=(17, 48)).judge(),
    "lora": lambda: lora_case().judge(),
    "lora 48": lambda: lora_case(shape=(17, 48)).judge(),
    "attention": lambda: attention_case().judge(),
    "cross entropy": lambda: cross_entropy_case().judge(),
    "cross entropy bf16": lambda: cross_entropy_case(BF16).judge(),
    "eight bits": lambda: steps_case(Rule(lr=2e-3, weight_decay=0.1, eps=1e-6, states="8bit", seed=3)),
    "eight bits, tiny": tiny_case,
    "mask": check_mask,
    "rounding": check_rounding,
    "sure": check_sure,
}
MUTANTS = {
    "no 1 / (1 - p)": ("? scale * LOAD(x", "? LOAD(x", "dropout", "lora"),
    "no 1 / (1 - p) in the sum": ("scale * LOAD(in +", "LOAD(in +", "lora"),
    "the mask the other way round": ("pair >> j & 1 ?", "~pair >> j & 1 ?", "dropout", "dropout 48", "lora", "lora 48"),
    "no last element": ("d < D; d++) STORE(y + d, bits", "d < D - 1; d++) STORE(y + d, bits", "dropout", "lora"),
    "no last block": ("h < D / 16;", "h < D / 16 - 1;", "dropout", "dropout 48", "lora", "lora 48"),
    "no last row": ("m < M; m++) FN(masked_row)", "m < M - 1; m++) FN(masked_row)", "dropout", "lora"),
    "a round less": ("round < 7", "round < 6", "mask", "dropout", "lora"),
    "another row's mask": ("(uint64_t)(m * G), G", "(uint64_t)(m * G + 1), G", "mask", "dropout", "lora"),
    "bits beyond the width": ("if (D % 8) bits", "if (0) bits", "mask"),
    "no eps": ("(float)D + eps)", "(float)D)", "norm", "norm alone", "norm bf16"),
    "no mean": ("total / (float)D + eps", "total + eps", "norm", "norm alone", "norm bf16"),
    "no residual": (" + LOAD(residual + m * D + d)", "", "norm"),
    "no weight": ("* scale * w[d]);", "* scale);", "norm", "norm alone", "norm bf16"),
    "no gradient of the sum": (" + LOAD(dsum + row + d)", "", "norm"),
    "no pull towards the mean": (" - LOAD(s + row + d) * pull)", ")", "norm", "norm alone", "norm bf16"),
    "a block of rows forgotten": ("first += BLOCK)", "first += BLOCK + 1)", "norm of many rows"),
    "turned the same way back": ("s = sign * sine[", "s = sine[", "rope"),
    "one angle for all": ("cosine[n * half + i]", "cosine[n * half]", "rope"),
    "no gate's own slope": ("* s * (1.0f + z * (1.0f - s)))", "* s)", "swiglu"),
    "a shorter exponential": ("p = p * r + 1.6666665459e-1f;", "", "swiglu", "attention", "cross entropy"),
    "no prefix": ("seen = offset + row % T_rows + 1", "seen = row % T_rows + 1", "attention"),
    "a look ahead": ("seen = offset + row % T_rows + 1", "seen = offset + T_rows", "attention"),
    "no projection of the gradient": ("(LOAD(dweights + at + j) - dot)", "LOAD(dweights + at + j)", "attention"),
    "no factor": ("factor * LOAD(weights", "LOAD(weights", "attention"),
    "no onehot": ("exp_(shifted) * scale - 1.0f", "exp_(shifted) * scale", "cross entropy", "cross entropy bf16"),
    "onehot elsewhere": ("STORE(row + labels[c]", "STORE(row + (labels[c] + 1) % V", "cross entropy"),
    "onehot after rounding": ("exp_(shifted) * scale - 1.0f", "LOAD(row + labels[c]) - 1.0f", "sure"),
    "halves of a byte swapped": ("2 * i] = table[code >> 4]", "2 * i] = table[code & 15]", "nf4"),
    "no magnitude": ("levels[k] * magnitudes[b]", "levels[k]", "nf4"),
    "a level too few": ("k < 16; k++) STORE(table", "k < 15; k++) STORE(table", "nf4"),
    "m without its sign": ("m[i] < 0 ? -q : q", "q", "eight bits"),
    "a v of code 0": ("x > 0 && q < 1 ? 1 : q", "q", "eight bits", "eight bits, tiny"),
    "the random bits of m for v": ("2 * (bits[i] >> 8) + 1", "2 * (bits[i] & 0xFF) + 1", "eight bits"),
    "the same random bits in each block": ("counter + (uint64_t)(at / 8)", "counter", "eight bits"),
    "the scale of m not stored": (
        "*scale = largest;\n}\n\n// Codes and scale of a block of v",
        "}\n\n//",
        "eight bits",
    ),
    "codes of m but the first not stored": (
        "memcpy(m_codes + at, m_block, (size_t)width)",
        "memcpy(m_codes + at, m_block, 1)",
        "eight bits",
    ),
    "no decay": (" - decay * p[at + i]", "", "eight bits"),
    "eps under the root": ("/ corrected) + eps", "/ corrected + eps)", "eight bits"),
    "tiny blocks kept": ("largest > tiny ? largest : 0.0f", "largest", "eight bits, tiny"),
    "products in another order": (
        "rate_2 * (g[at + i] * g[at + i])",
        "rate_2 * g[at + i] * g[at + i]",
        "eight bits",
    ),
    "rounded towards zero": ("? bits >> 16 | 0x40 : nearest", "? bits >> 16 | 0x40 : bits >> 16", "rounding"),
}


def test_an_unbroken_copy_passes_every_check(tmp_path: Path) -> None:
    with library_of(tmp_path):
        for check in CHECKS.values():
            check()
    assert list(tmp_path.glob("*.so")), "it was the copy that was checked"


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_broken_copy_is_noticed(mutant: str, tmp_path: Path) -> None:
    old, new, *names = MUTANTS[mutant]
    with library_of(tmp_path, old, new):
        native.library()  # it compiles: what is noticed is not a mistake of C
        for name in names:
            assert noticed(CHECKS[name]), name
