"""Small tokenizers: bytes with a BOS, and bytes with merges that reach across the edges of messages."""

from __future__ import annotations

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers.models import BPE

from ftlab.models.tokenizer import CHATML, SpecialTokens, Tokenizer, byte_spellings

MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("a", "b"), (":", "Ġ"), ("ç", "±"), ("t", "Ċ")]
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|pad|>", "<s>", "</s>")


def merging_tokenizer(*, bos: bool = True, pad_is_eos: bool = False, eos: str = "<|im_end|>") -> Tokenizer:
    """Bytes 0 to 255, six merges, then the special tokens; no cut before BPE, so every merge that can happen does."""
    vocab = {token: byte for byte, token in enumerate(byte_spellings())}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    ids = {token: backend.token_to_id(token) for token in SPECIAL}
    special = SpecialTokens(
        eos_id=ids[eos],
        bos_id=ids["<s>"] if bos else None,
        pad_id=ids[eos] if pad_is_eos else ids["<|pad|>"],
        stop_ids=frozenset({ids[eos]}),
    )
    return Tokenizer(backend, special, CHATML)
