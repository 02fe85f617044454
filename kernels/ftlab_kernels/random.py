"""The dropout mask of every kernel: a pure function of (seed, element), the same on a GPU, in the interpreter and here.

Letters: M rows, K columns, G = ceil(K / 8) groups of a row.

The mask of x [M, K] is uint8 [M, G]: bit j of byte g of row m is 1 where x[m, 8 g + j] is kept; bits beyond K are 0.
One call of Philox4x32 with 7 rounds (Salmon et al., SC 2011; key: the 64-bit seed, counter: m G + g) gives 128 bits,
16 for each of the 8 elements of a group: element j uses the low half of word j / 2 if j is even, else the high half,
and is kept where that number is at least `threshold(p)`. So p is rounded to a multiple of 2^-16, and the scale of
what is kept uses the rounded p, which keeps the mean exact.

Differs from a float a element (torch, Triton's `tl.rand`): an eighth of the generator's work, and one bit an element is
enough to have the mask again in the backward pass.

A seed is an int64 tensor of one element on the kernel's device. `draw_seed` takes it from torch's generator of that
device, so that it follows `torch.manual_seed`, activation checkpointing (which restores the generator before it
recomputes), resumed runs and CUDA graphs without any state of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ftlab_kernels.common import ceil_div, tl, triton

__all__ = [
    "GROUP",
    "draw_seed",
    "expand_mask",
    "keep_byte",
    "keep_scale",
    "mask_bytes",
    "philox_reference",
    "threshold",
    "unpack_mask",
]

GROUP = 8
ROUNDS = 7
LEVELS = 1 << 16
_ROUNDS = tl.constexpr(ROUNDS)
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_WORD = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Of 65536 equally likely numbers, how many are dropped; p is in [0, 1)."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability must be in [0, 1), not {p}")
    return min(round(p * LEVELS), LEVELS - 1)


def keep_scale(p: float) -> float:
    """What the kept elements are multiplied by: 1 / (1 - p) with the p that is really used."""
    return LEVELS / (LEVELS - threshold(p))


def draw_seed(device: torch.device) -> Tensor:
    """A new seed from torch's default generator of `device`: int64 [1]. No host synchronisation."""
    return torch.empty(1, dtype=torch.int64, device=device).random_()


# --- in plain torch ---------------------------------------------------------------------------------------------------


def _multiply(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * x for int64 tensors that hold 32-bit words."""
    low_half, high_half = x & 0xFFFF, x >> 16
    low, high = a * low_half, a * high_half  # each below 2^48
    total_low = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total_low >> 32), total_low & _WORD


def philox_reference(seed: int, counter: Tensor, rounds: int = ROUNDS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: four int64 tensors of 32-bit words, for a key and int64 counters (their upper two words are 0)."""
    key_0, key_1 = seed & _WORD, (seed >> 32) & _WORD
    c0, c1 = counter & _WORD, (counter >> 32) & _WORD
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(rounds):
        high_0, low_0 = _multiply(_ROUND_A, c0)
        high_2, low_2 = _multiply(_ROUND_B, c2)
        c0, c1, c2, c3 = high_2 ^ c1 ^ key_0, low_2, high_0 ^ c3 ^ key_1, low_0
        key_0, key_1 = (key_0 + _KEY_A) & _WORD, (key_1 + _KEY_B) & _WORD
    return c0, c1, c2, c3


def mask_bytes(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The packed mask of a [rows, columns] tensor: uint8 [rows, ceil(columns / 8)]. The reference of every kernel."""
    groups = ceil_div(columns, GROUP)
    counter = torch.arange(rows * groups, dtype=torch.int64, device=seed.device)
    words = philox_reference(int(seed.item()), counter)
    packed = torch.zeros_like(counter)
    for lane in range(GROUP):
        number = (words[lane // 2] >> 16 * (lane % 2)) & 0xFFFF
        packed |= (number >= threshold(p)).to(torch.int64) << lane
    packed = packed.view(rows, groups)
    if columns % GROUP and rows:
        packed[:, -1] &= (1 << columns % GROUP) - 1
    return packed.to(torch.uint8)


def unpack_mask(packed: Tensor, columns: int) -> Tensor:
    """bool [rows, columns], True where kept, from a packed mask."""
    lanes = torch.arange(GROUP, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> lanes) & 1).flatten(-2)[..., :columns].bool()


# --- in a kernel ------------------------------------------------------------------------------------------------------


@triton.jit
def keep_byte(seed, group, drop_below):
    """The packed mask of a block of groups: int32, in 0..255.

    seed: int64 scalar. group: int64 block of m G + g. drop_below: `threshold(p)`, int32.

    In few instructions, since passes over memory wait for it: a 32 x 32 -> 64 bit product is one instruction where its
    two halves are two, and two 16-bit numbers are compared at a time.
    """
    key_0, key_1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    w0, w1 = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    w2 = tl.zeros_like(w0)
    w3 = w2
    for _ in tl.static_range(_ROUNDS):
        a, b = w0.to(tl.uint64) * 0xD2511F53, w2.to(tl.uint64) * 0xCD9E8D57
        w0, w1 = (b >> 32).to(tl.uint32) ^ w1 ^ key_0.to(tl.uint32), b.to(tl.uint32)
        w2, w3 = (a >> 32).to(tl.uint32) ^ w3 ^ key_1.to(tl.uint32), a.to(tl.uint32)
        key_0 = (key_0 + 0x9E3779B9) & 0xFFFFFFFF
        key_1 = (key_1 + 0xBB67AE85) & 0xFFFFFFFF
    limit = tl.full((), drop_below, tl.uint32) * 0x10001
    low, inverse = limit & 0x7FFF7FFF, limit ^ 0xFFFFFFFF
    flags = _at_least(w0, low, inverse) | (_at_least(w1, low, inverse) << 2)
    flags |= (_at_least(w2, low, inverse) << 4) | (_at_least(w3, low, inverse) << 6)
    return ((flags | (flags >> 15)) & 0xFF).to(tl.int32)


@triton.jit
def _at_least(word, low, inverse):
    """Bits 0 and 16: whether the lower and the upper half of word are at least the limit's.

    low: the lower 15 bits of both halves of the limit; inverse: all its bits inverted.
    """
    carry = (word | 0x80008000) - low  # bit 15 of a half is set where its lower 15 bits are at least the limit's
    return (((word & inverse) | ((word ^ inverse) & carry)) >> 15) & 0x10001


@triton.jit
def expand_mask(byte, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bytes [ROWS, COLUMNS / 8] -> int1 [ROWS, COLUMNS]: which elements are kept."""
    lanes = tl.arange(0, 8)
    bits = (byte.to(tl.int32)[:, :, None] >> lanes[None, None, :]) & 1
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0
