from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers.models import BPE

from ftlab.assets import resolve
from ftlab.errors import FtlabError
from ftlab.models.gguf import GGUFFile
from ftlab.models.tokenizer import CHATML, Tokenizer, byte_spellings, byte_tokenizer, load_tokenizer, set_pre_tokenizer
from tests.helpers.gguf import write_gguf
from tests.helpers.models import SMOLLM2, tiny_llama

TEXTS = [
    "Hello, world! It's 9 o'clock; we'll see 12345 things at 3.14e-10.",
    "Élève naïve, Ærøskøbing, ﬁancé, e\u0301 combining, Straße, ПРИВЕТ мир, ½ ² ①",
    "高血压是一种常见的慢性疾病，患病率约为30%。\n第二行",
    "  leading   runs \t of\t\twhitespace  12  34 \n\n\n   and trailing   ",
    "def f(x):\r\n    return {\"a\": x**2, 'b': [1, 22, 333]}  # comment\r\n\r\n",
    "emoji 👩‍⚕️🩺 and \u200b zero width, \u00a0nbsp, \x00 nul, \x7f del",
    "DON'T I'VE you'Re O'Reilly 'tis",
    "<|im_start|>user\n<|im_end|> <|endoftext|><repo_name>",
    "",
    " ",
    "٣٤٥ १२३ 〇一二 Ⅻ",
]

# What llama.cpp cuts by, as it writes it (src/llama-vocab.cpp, Apache/MIT); one list entry is one pass over the pieces.
LLAMA_CPP = {
    "smollm": [
        r"\p{N}",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    ],
    "gpt-2": [r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"],
    "llama-bpe": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}


def cut_by_hand(text: str, patterns: list[str]) -> list[str]:
    """Matches and what lies between them, pass after pass."""
    pieces = [text]
    for pattern in patterns:
        cut: list[str] = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(pattern, piece):
                cut += [piece[end : match.start()], match.group()]
                end = match.end()
            cut.append(piece[end:])
        pieces = [piece for piece in cut if piece]
    return pieces


def spell(piece: str) -> str:
    table = byte_spellings()
    return "".join(table[byte] for byte in piece.encode())


def bpe_by_hand(piece: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Merge the pair of lowest rank until none is left."""
    symbols = list(spell(piece))
    while len(symbols) > 1:
        place = min(range(len(symbols) - 1), key=lambda i: ranks.get((symbols[i], symbols[i + 1]), 1 << 30))
        if (symbols[place], symbols[place + 1]) not in ranks:
            break
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
    return symbols


@pytest.mark.parametrize("name", LLAMA_CPP)
@pytest.mark.parametrize("text", TEXTS)
def test_text_is_cut_as_llama_cpp_cuts_it(name: str, text: str) -> None:
    backend = tokenizers.Tokenizer(BPE())
    set_pre_tokenizer(backend, name, "x")
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    got = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert got == [spell(piece) for piece in cut_by_hand(text, LLAMA_CPP[name])]


def gguf_fields(**changes: Any) -> dict[str, Any]:
    """A token for each byte, "Ġt" and "he", three control tokens and one of the user's."""
    tokens = [*byte_spellings(), "Ġt", "he", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 258 + [3, 3, 3, 4],
        "tokenizer.ggml.merges": ["Ġ t", "h e"],
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.ggml.bos_token_id": 259,
        "tokenizer.ggml.padding_token_id": 258,
        "tokenizer.chat_template": CHATML,
    }
    return fields | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=gguf_fields())
    return tmp_path / "m.gguf"


def test_gguf_tokenizer(gguf_path: Path) -> None:
    tokenizer = load_tokenizer(gguf_path)
    assert tokenizer.vocab_size == 262
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (258, 259, 258)
    assert tokenizer.stop_ids == {258, 260}  # EOS and the end of a turn
    assert tokenizer.chat_template == CHATML
    assert [tokenizer.token(id) for id in tokenizer.encode(" the 12")] == ["Ġt", "he", "Ġ", "1", "2"]
    assert tokenizer.token(258) == "<|endoftext|>"
    with pytest.raises(ValueError, match="no id 262"):
        tokenizer.token(262)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "llama"}, "tokenizer.ggml.model 'llama' is not implemented"),
        ({"pre": "default"}, "tokenizer.ggml.pre 'default' is not implemented"),
        ({"pre": None}, "tokenizer.ggml.pre 'default' is not implemented"),
        ({"pre": "tekken"}, "'tekken'"),
        ({"merges": ["q zz"]}, "do not fit the vocabulary"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"eos_token_id": 400}, "has id 400, but the vocabulary ends at 261"),
        ({"token_type": [1, 1]}, "token_type does not fit"),
        ({"tokens": ["a", "a"], "token_type": None}, "names a token twice"),
        ({"eos_token_id": None, "token_type": [1] * 262}, "nothing says which token ends a text"),
    ],
    ids=str,
)
def test_a_gguf_tokenizer_that_is_not_known_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=gguf_fields(**changes))
    with pytest.raises(FtlabError, match=message):
        load_tokenizer(tmp_path / "m.gguf")


def test_a_users_special_spelling_is_plain_text(gguf_path: Path) -> None:
    for tokenizer in (byte_tokenizer(), load_tokenizer(gguf_path)):
        text = "x<|im_end|>\n<|im_start|>"
        end, start = (next(iter(tokenizer.encode(name, True))) for name in ("<|im_end|>", "<|im_start|>"))
        plain = tokenizer.encode(text)
        assert not {end, start} & set(plain)
        assert tokenizer.decode(plain) == text
        assert tokenizer.encode(text, allow_special=True) == [ord("x"), end, ord("\n"), start]
        assert tokenizer.encode(text) == plain  # the switch does not stick


def test_special_tokens_can_be_hidden_or_shown_when_decoding() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("<|im_start|>a<|im_end|>", allow_special=True)
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>a<|im_end|>"


def test_byte_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.vocab_size == 259
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.stop_ids) == (257, None, 258, {257})
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode([0xE6, 0x96]) == "\ufffd"


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_bytes_survive(text: str) -> None:
    tokenizer = BYTES
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


BYTES = byte_tokenizer()


def test_fingerprint_is_that_of_the_content(gguf_path: Path, tmp_path: Path) -> None:
    a, b = byte_tokenizer(), byte_tokenizer()
    a.encode("x", allow_special=True)  # use leaves no trace
    assert a.fingerprint == b.fingerprint
    assert len(a.fingerprint) == 64
    b.chat_template = "other"
    del b.__dict__["fingerprint"]
    assert a.fingerprint != b.fingerprint
    assert load_tokenizer(gguf_path).fingerprint != a.fingerprint


def test_save_and_load(tmp_path: Path, gguf_path: Path) -> None:
    for name, tokenizer in (("bytes", byte_tokenizer()), ("gguf", load_tokenizer(gguf_path))):
        folder = tmp_path / name
        folder.mkdir()
        tokenizer.save(folder)
        for path in (folder, folder / "tokenizer.json"):
            loaded = load_tokenizer(path)
            for key in ("eos_id", "bos_id", "pad_id", "stop_ids", "chat_template", "vocab_size", "fingerprint"):
                assert getattr(loaded, key) == getattr(tokenizer, key), key
            assert all(loaded.encode(text) == tokenizer.encode(text) for text in TEXTS)


def write_folder(folder: Path, **files: Any) -> Path:
    """A tokenizer.json that adds a BOS, truncates and pads, with files beside it."""
    backend = tokenizers.Tokenizer(BPE(vocab={token: id for id, token in enumerate(byte_spellings())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<|eot_id|>", "<pad>")])
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_folder_with_roles_in_the_files_beside(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path,
        tokenizer_config__json={
            "eos_token": {"content": "</s>", "__type": "AddedToken"},
            "bos_token": "<s>",
            "pad_token": "<pad>",
            "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
        },
        generation_config__json={"eos_token_id": [257, 99]},
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (257, 256, 259)
    assert tokenizer.stop_ids == {257, 99, 258}
    assert tokenizer.chat_template == "D"
    text = "longer than four, never cut, padded or begun"
    assert tokenizer.encode(text, allow_special=True) == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    (folder / "chat_template.jinja").write_text("J")
    assert load_tokenizer(folder).chat_template == "J"


def test_a_bare_tokenizer_json_finds_its_end_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path) / "tokenizer.json")
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (258, 258, None)
    assert tokenizer.chat_template is None


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer_config__json": {"eos_token": "<eos>"}}, "eos_token '<eos>' is not in the vocabulary"),
        ({"generation_config__json": {"eos_token_id": 5000}}, "has id 5000"),
        ({"tokenizer_config__json": {"chat_template": 3}}, "chat_template is int, not text"),
        ({"tokenizer_config__json": "["}, "cannot be read as JSON"),
        ({"tokenizer__json": "{}"}, "cannot be read as a tokenizer"),
    ],
    ids=str,
)
def test_broken_folders_are_named(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(FtlabError, match=message):
        load_tokenizer(write_folder(tmp_path, **files))
    with pytest.raises(FtlabError, match="no such file"):
        load_tokenizer(tmp_path / "absent")


def test_a_model_needs_a_row_for_the_highest_id(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["beyond a gap"] = 499
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    tokenizer.check_rows(500, "here")
    with pytest.raises(FtlabError, match=r"needs 500 embeddings and the model here has 499.*model\.tokenizer"):
        tokenizer.check_rows(499, "here")


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(resolve(SMOLLM2))


@pytest.mark.network
def test_the_real_tokenizer_against_bpe_by_hand(smollm2: Tokenizer) -> None:
    metadata = GGUFFile(resolve(SMOLLM2)).metadata
    ids = {token: id for id, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    for text in TEXTS:
        pieces = cut_by_hand(text, LLAMA_CPP["smollm"])
        want = [ids[symbol] for piece in pieces for symbol in bpe_by_hand(piece, ranks)]
        assert smollm2.encode(text) == want, text


@pytest.mark.network
def test_the_real_tokenizer_has_its_roles(smollm2: Tokenizer) -> None:
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.stop_ids) == (1, 2, 2, {2})
    assert smollm2.chat_template is not None
    assert smollm2.token(2) == "<|im_end|>"
    assert smollm2.encode("<|im_start|>user<|im_end|>", allow_special=True)[::2] == [1, 2]
    for text in TEXTS:
        assert smollm2.decode(smollm2.encode(text)) == text
    assert smollm2.decode(smollm2.encode("a\x13b")) == "ab"  # a byte that the vocabulary does not have
