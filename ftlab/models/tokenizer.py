"""Text to token ids and back: byte-level BPE from a GGUF file, a tokenizer.json, or built here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from ftlab.errors import FtlabError
from ftlab.files import atomic_write, sha256_bytes
from ftlab.models.checkpoint import read_json
from ftlab.models.gguf import GGUFFile, is_gguf

__all__ = ["CHATML", "Tokenizer", "byte_tokenizer", "load_tokenizer"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Special tokens that end a turn in the families of models that have them.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")
# Where nothing names the end token: the first of these that is a special token of the vocabulary.
END_OF_TEXT = (*END_OF_TURN, "<|end_of_text|>", "<|endoftext|>", "</s>")

# How text is cut before BPE, by the name that llama.cpp gives the tokenizer (`tokenizer.ggml.pre`).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # llama.cpp's token types


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens with a role. stop_ids: what ends a generation; eos_id is one of them."""

    eos_id: int
    bos_id: int | None
    pad_id: int
    stop_ids: frozenset[int]


class Tokenizer:
    """A `tokenizers` backend with the roles of its special tokens and the model's chat template.

    `vocab_size` is one more than the highest id, gaps included; a model may have more rows than that.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special: SpecialTokens, chat_template: str | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_id = special.eos_id
        self.bos_id = special.bos_id
        self.pad_id = special.pad_id
        self.stop_ids = special.stop_ids
        self.chat_template = chat_template
        self.vocab_size = ids_of(backend)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of `text`; no BOS or EOS is added.

        A special token's own spelling, such as "<|im_end|>", is plain text unless `allow_special`: what a user writes
        cannot end a turn. A byte that the vocabulary has no token for (SmolLM2: a few control characters) is left out,
        as everywhere this vocabulary is used.
        """
        self._backend.encode_special_tokens = not allow_special
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def token(self, id: int) -> str:
        """The vocabulary's spelling of one id; ValueError for an id that it does not have."""
        token: str | None = self._backend.id_to_token(id)
        if token is None:
            raise ValueError(f"the vocabulary has no id {id}")
        return token

    def check_rows(self, rows: int, location: str) -> None:
        """FtlabError if the model at `location`, which has embeddings for `rows` ids, lacks some of this vocabulary."""
        if self.vocab_size > rows:
            raise FtlabError(
                f"the tokenizer needs {self.vocab_size} embeddings and the model {location} has {rows}; give the "
                "tokenizer that belongs to it in model.tokenizer"
            )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides its output, the chat template included."""
        return sha256_bytes(json.dumps([self._backend.to_str(), self._settings()], sort_keys=True).encode())

    def _settings(self) -> dict[str, Any]:
        return {
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "pad_id": self.pad_id,
            "stop_ids": sorted(self.stop_ids),
            "chat_template": self.chat_template,
        }

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json, which transformers reads too."""
        folder = Path(directory)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.token(self.eos_id),
            "pad_token": self.token(self.pad_id),
            "clean_up_tokenization_spaces": False,
        }
        if self.bos_id is not None:
            config["bos_token"] = self.token(self.bos_id)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        generation = {"eos_token_id": sorted(self.stop_ids), "pad_token_id": self.pad_id}
        atomic_write(folder / "tokenizer.json", self._backend.to_str(pretty=True) + "\n")
        atomic_write(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        atomic_write(folder / "generation_config.json", json.dumps(generation, indent=2) + "\n")


def ids_of(backend: tokenizers.Tokenizer) -> int:
    """One more than the highest id: the backend's own size counts tokens, and added ones may stand beyond a gap."""
    return 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)


def special_ids(backend: tokenizers.Tokenizer) -> dict[str, int]:
    """Spelling -> id of the tokens that are marked special."""
    return {token.content: id for id, token in backend.get_added_tokens_decoder().items() if token.special}


def assign_roles(
    backend: tokenizers.Tokenizer, eos: list[int], bos_id: int | None, pad_id: int | None, where: str
) -> SpecialTokens:
    """Check the ids, and add end-of-turn tokens to what stops a generation. Without a pad token EOS pads."""
    special = special_ids(backend)
    if not eos:
        eos = [special[token] for token in END_OF_TEXT if token in special][:1]
    if not eos:
        raise FtlabError(
            f"{where}: nothing says which token ends a text; name it as eos_token in tokenizer_config.json"
        )
    for id in (*eos, bos_id, pad_id):
        if id is not None and (id < 0 or backend.id_to_token(id) is None):
            raise FtlabError(f"{where}: a special token has id {id}, but the vocabulary ends at {ids_of(backend) - 1}")
    turns = {special[token] for token in END_OF_TURN if token in special}
    return SpecialTokens(eos[0], bos_id, eos[0] if pad_id is None else pad_id, frozenset(eos) | turns)


# --- GGUF ----------------------------------------------------------------------------------------------------------


def cut_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Cut at a pattern, then spell bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def set_pre_tokenizer(backend: tokenizers.Tokenizer, name: str, where: str) -> None:
    """Cut text the way the vocabulary's merges were learnt; FtlabError for a name that is not known."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "gpt-2":
        backend.pre_tokenizer = byte_level
    elif name == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif name == "llama-bpe":
        backend.pre_tokenizer = cut_by(LLAMA3_PATTERN)
    elif name == "qwen2":
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = cut_by(QWEN2_PATTERN)
    else:
        raise FtlabError(
            f"{where}: tokenizer.ggml.pre {name!r} is not implemented (only gpt-2, smollm, llama-bpe, qwen2); "
            "set model.tokenizer to the model's tokenizer.json"
        )


def gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a GGUF file: byte-level BPE only."""
    file, where = GGUFFile(path), str(path)
    if (kind := file.need("tokenizer.ggml.model")) != "gpt2":
        raise FtlabError(
            f"{where}: tokenizer.ggml.model {kind!r} is not implemented (only gpt2, byte-level BPE); "
            "set model.tokenizer to the model's tokenizer.json"
        )
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    tokens: list[str] = file.need("tokenizer.ggml.tokens")
    types: list[int] = file.metadata.get("tokenizer.ggml.token_type", [])
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise FtlabError(f"{where}: tokenizer.ggml.tokens names a token twice")
    if (types and len(types) != len(tokens)) or BYTE in types:
        raise FtlabError(f"{where}: tokenizer.ggml.token_type does not fit a byte-level vocabulary")
    merges = [tuple(merge.split(" ")) for merge in file.need("tokenizer.ggml.merges")]
    try:
        backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the backend raises plain Exception
        raise FtlabError(f"{where}: tokenizer.ggml.merges do not fit the vocabulary: {error}") from None
    set_pre_tokenizer(backend, pre, where)
    backend.decoder = decoders.ByteLevel()
    for number, special in ((CONTROL, True), (USER_DEFINED, False)):
        named = [token for token, kind in zip(tokens, types, strict=False) if kind == number]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in named])
    ids = [file.metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    special_tokens = assign_roles(
        backend,
        [id for id in ids if id is not None],
        file.metadata.get("tokenizer.ggml.bos_token_id"),
        file.metadata.get("tokenizer.ggml.padding_token_id"),
        where,
    )
    return Tokenizer(backend, special_tokens, file.metadata.get("tokenizer.chat_template"))


# --- tokenizer.json ------------------------------------------------------------------------------------------------


def find_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else `chat_template` of tokenizer_config.json (of several named ones: default)."""
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise FtlabError(f"{folder / 'tokenizer_config.json'}: chat_template is {type(template).__name__}, not text")
    return template


def json_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json, with the roles in the files beside it: tokenizer_config, generation_config, config."""
    folder, where = path.parent, str(path)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the backend raises plain Exception
        raise FtlabError(f"{where}: cannot be read as a tokenizer: {error}") from None

    def beside(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).exists() else {}

    config = beside("special_tokens_map.json") | beside("tokenizer_config.json")

    def role(name: str) -> int | None:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            return None
        id: int | None = backend.token_to_id(token)
        if id is None:
            raise FtlabError(f"{folder / 'tokenizer_config.json'}: {name} {token!r} is not in the vocabulary")
        return id

    eos_id = role("eos_token")
    if eos_id is None:  # BERT's tokenizers name the token that ends a text so
        eos_id = role("sep_token")
    eos = [] if eos_id is None else [eos_id]
    for name in ("generation_config.json", "config.json"):
        listed = beside(name).get("eos_token_id")
        eos += [] if listed is None else listed if isinstance(listed, list) else [listed]
    bos_id = role("cls_token") if role("bos_token") is None else role("bos_token")
    special = assign_roles(backend, list(dict.fromkeys(eos)), bos_id, role("pad_token"), where)
    return Tokenizer(backend, special, find_chat_template(folder, config))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a GGUF file, in a folder with tokenizer.json, or in a tokenizer.json."""
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.exists():
        raise FtlabError(f"{path}: no such file; a tokenizer is read from a GGUF file or a tokenizer.json")
    return gguf_tokenizer(path) if is_gguf(path) else json_tokenizer(path)


# --- built here ----------------------------------------------------------------------------------------------------


def byte_tokenizer() -> Tokenizer:
    """One token per byte (id = the byte), then <|im_start|>, <|im_end|> and <|pad|>; ChatML as its template."""
    alphabet = byte_spellings()
    backend = tokenizers.Tokenizer(BPE(vocab={token: byte for byte, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ("<|im_start|>", "<|im_end|>", "<|pad|>")
    backend.add_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return Tokenizer(backend, SpecialTokens(257, None, 258, frozenset({257})), CHATML)


def byte_spellings() -> list[str]:
    """The printable character that byte-level BPE spells each byte with (GPT-2's table), by byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(moved)) for byte in range(256)]
