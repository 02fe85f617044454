"""The Triton kernels of `ftlab_kernels.adamw`, and the number formats of its weights and moments in plain torch.

Letters: T tensors of one step, C chunks of them, n elements of a tensor.

    norm_partials   the sum of squares of a chunk of the unscaled gradients                    one program a chunk
    finish          norm, clip coefficient, whether anything is not finite; counts the steps   one program
    update          the step of a chunk                                                        one program a chunk

They find their tensors through a table of addresses, int64 [COLUMNS, T], and a table of chunks, int32 [C, 2]: which
tensor, which chunk of it. All arithmetic is fp32 but the bias corrections 1 - beta^t: fp64, because 1 - 0.999 in fp32
has lost four digits. Products that are added stand as fma, so that every variant of a kernel rounds alike.

16-bit weights are read and written as their bits, which is exact wherever a kernel runs:

    stochastic  the upper half of (bits of the fp32 result + r), r uniform in 0 .. 65535: up with the probability that
                keeps the mean, in magnitude, so only the two neighbours occur
    split       w = the fp32 master to nearest, ties away from zero; remainder = its bits - those of w, int16. Of ties
                to even one would leave +32768, which int16 does not hold.

8-bit moments: blocks of 256, each with its largest magnitude a in fp32 (below 1e-30 for m, 1e-37 for v: 0).

    m = a q |q| / 127^2   q in -127 .. 127 (int8)       v = a (q / 255)^4   q in 0 .. 255 (uint8)

Between two codes the choice is random with the mean kept: to the nearest a v that shrinks by 0.1% a step would never
leave its code. A v above 0 never gets code 0, so no m is divided by eps alone. r is 16 bits an element: all of them
round a weight, the lower half m, the upper half v.

Random bits: Philox4x32-7, one call for 8 elements, as in `ftlab_kernels.random`. Key: the seed, its upper half xor the
tensor's step. Counter: 2^40 * the parameter's place in the optimizer + element / 8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ftlab_kernels.common import ceil_div, fp32, tl, triton
from ftlab_kernels.random import GROUP, ROUNDS, philox_reference

__all__ = [
    "ANCHOR",
    "BLOCK",
    "COLUMNS",
    "EWC_ANCHOR",
    "EXP_AVG",
    "EXP_AVG_ABSMAX",
    "EXP_AVG_SQ",
    "EXP_AVG_SQ_ABSMAX",
    "FISHER",
    "GRAD",
    "PARAM",
    "PLACE",
    "REMAINDER",
    "SEED",
    "SIZE",
    "STEP",
    "decode_moments",
    "encode_moments",
    "finish",
    "join_master",
    "norm_partials",
    "random_bits",
    "round_stochastic",
    "split_master",
    "square_root",
    "update",
]

BLOCK = 256  # elements that share the scale of their 8-bit moments
M_TINY, V_TINY = 1e-30, 1e-37  # a smaller scale of a block is 0: what is divided by it would not be finite
PLACE_SHIFT = 40

# Rows of the table of addresses.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, REMAINDER, EXP_AVG_ABSMAX, EXP_AVG_SQ_ABSMAX = range(7)
ANCHOR, FISHER, EWC_ANCHOR, STEP, SIZE, SEED, PLACE = range(7, 14)
COLUMNS = 14

_ROUNDS, _GROUP, _BLOCK = tl.constexpr(ROUNDS), tl.constexpr(GROUP), tl.constexpr(BLOCK)
_SHIFT, _SHIFT_BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)  # 1.5 * 2^23 and its bits
_UNIT, _UNIT_BITS = tl.constexpr(24576.0), tl.constexpr(0x46C00001)  # 1.5 * 2^14, and its bits with 1 / 512
_M_TINY, _V_TINY = tl.constexpr(M_TINY), tl.constexpr(V_TINY)
_PLACE_SHIFT = tl.constexpr(PLACE_SHIFT)
_PARAM, _GRAD, _EXP_AVG, _EXP_AVG_SQ = (tl.constexpr(n) for n in (PARAM, GRAD, EXP_AVG, EXP_AVG_SQ))
_REMAINDER, _M_ABSMAX, _V_ABSMAX = (tl.constexpr(n) for n in (REMAINDER, EXP_AVG_ABSMAX, EXP_AVG_SQ_ABSMAX))
_ANCHOR, _FISHER, _EWC_ANCHOR, _STEP = (tl.constexpr(n) for n in (ANCHOR, FISHER, EWC_ANCHOR, STEP))
_SIZE, _SEED, _PLACE = (tl.constexpr(n) for n in (SIZE, SEED, PLACE))


# --- the formats in plain torch ---------------------------------------------------------------------------------------


def random_bits(seed: int, step: int, place: int, count: int) -> Tensor:
    """The 16 random bits of each of `count` elements in one step: int64 [count] in 0 .. 65535."""
    counter = torch.arange(ceil_div(count, GROUP), dtype=torch.int64) + (place << PLACE_SHIFT)
    words = torch.stack(philox_reference(seed ^ (step << 32), counter), 1)
    return torch.stack((words & 0xFFFF, words >> 16), 2).flatten()[:count]


def round_stochastic(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 x to bf16: up in magnitude where the 16 lower bits of x and the random ones together carry."""
    carried = ((x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + bits.view(x.shape)) & 0xFFFF0000
    signed = torch.where(carried >= 2**31, carried - 2**32, carried).to(torch.int32)
    return torch.where(torch.isnan(x), x, signed.view(torch.float32)).to(torch.bfloat16)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 master as its bf16 (nearest, ties away from zero) and the int16 remainder."""
    bits = master.contiguous().view(torch.int32).to(torch.int64)
    upper = (bits + 0x8000) >> 16  # arithmetic: the sign of the bits stays in place
    remainder = torch.where(torch.isnan(master), 0, bits - (upper << 16))
    upper = torch.where(torch.isnan(master), 0x7FC0, upper)
    halves = torch.where(upper >= 2**15, upper - 2**16, upper).to(torch.int16)
    return halves.view(torch.bfloat16), remainder.to(torch.int16)


def join_master(weight: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master again, bit for bit (a NaN as some NaN)."""
    bits = (weight.contiguous().view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)


def square_root(x: Tensor) -> Tensor:
    """The square root, rounded correctly: torch's own is an ulp off on some processors, and C's never is."""
    return x.double().sqrt().to(x.dtype)


def encode_moments(m: Tensor, v: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flat fp32 moments as int8, uint8 and the two scales of each block of 256. bits: `random_bits`."""
    m_scale, largest = _scales(m.abs(), M_TINY)
    x = m.abs() * torch.where(largest > 0, largest.reciprocal() * 127**2, 0)
    lower = (square_root(x) - 0.5).round()  # to even, so at most x
    up = (2 * (bits & 0xFF) + 1) / 512 * (2 * lower + 1) < x - lower**2
    m_code = (lower + up) * m.sign()
    v_scale, largest = _scales(v, V_TINY)
    x = (square_root(v) * torch.where(largest > 0, square_root(largest).reciprocal() * 255**2, 0)).square()
    lower = (square_root(square_root(x)) - 0.5).round()
    base = lower.square().square()
    up = (2 * (bits >> 8) + 1) / 512 * ((lower + 1).square().square() - base) < x - base
    v_code = (lower + up).maximum((x > 0).to(x.dtype))
    return m_code.to(torch.int8), v_code.to(torch.uint8), m_scale, v_scale


def _scales(size: Tensor, tiny: float) -> tuple[Tensor, Tensor]:
    """The largest of each block of flat magnitudes (0 if it is tiny), by block and by element."""
    blocks = torch.zeros(ceil_div(len(size), BLOCK), BLOCK, dtype=size.dtype, device=size.device)
    blocks.view(-1)[: len(size)] = size
    scale = blocks.amax(1)
    scale = torch.where(scale > tiny, scale, 0)
    return scale, scale.repeat_interleave(BLOCK)[: len(size)]


def decode_moments(m_code: Tensor, v_code: Tensor, m_scale: Tensor, v_scale: Tensor) -> tuple[Tensor, Tensor]:
    """What the codes of flat moments stand for."""
    m, v = m_code.to(m_scale.dtype), v_code.to(v_scale.dtype)
    m_scale, v_scale = (x.repeat_interleave(BLOCK)[: len(m)] for x in (m_scale, v_scale))
    return m * m.abs() * (m_scale / 127**2), (v.square() * (square_root(v_scale) / 255**2)).square()


# --- reading and writing ----------------------------------------------------------------------------------------------


@triton.jit
def _pointer(place, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor whose address stands at `place`. ALIGNED: a multiple of 16, so that 16 bytes are read at a time."""
    pointer = tl.load(place).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _within(BLOCKS: tl.constexpr):
    """Element numbers [BLOCKS, 32, 8]: blocks of 256 elements, of which each group of 8 shares its random words."""
    block, group, lane = tl.arange(0, BLOCKS), tl.arange(0, _BLOCK // _GROUP), tl.arange(0, _GROUP)
    return block[:, None, None] * _BLOCK + group[None, :, None] * _GROUP + lane[None, None, :]


@triton.jit
def _read(pointer, within, left, MASKED: tl.constexpr):
    """Elements of a block; beyond the `left` elements of the chunk zeros. Without a mask reads are 16 bytes wide."""
    if MASKED:
        return tl.load(pointer + within, mask=within < left, other=0)
    else:
        return tl.load(pointer + within)


@triton.jit
def _read_if(there, pointer, within, left, MASKED: tl.constexpr):
    """Elements of a tensor that may not be there (1 or 0), widened; without it zeros, and nothing is read."""
    inside = within < left * there if MASKED else tl.zeros_like(within) < there
    return tl.load(pointer + within, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, within, left, x, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + within, x, mask=within < left)
    else:
        tl.store(pointer + within, x)


@triton.jit
def _random(key, group):
    """16 random bits an element: uint32 [BLOCKS, 32, 8] for the counters [BLOCKS, 32]."""
    w0, w1, w2, w3 = tl.randint4x(key, group, _ROUNDS)
    lane = tl.arange(0, _GROUP)[None, None, :]
    first = tl.where(lane < 2, w0[:, :, None], w1[:, :, None])
    last = tl.where(lane < 6, w2[:, :, None], w3[:, :, None])
    return (tl.where(lane < 4, first, last) >> ((lane & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def _widen(upper):
    """Bits of a bf16 -> the fp32."""
    return (upper.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _round_stochastic(x, random):
    """fp32 -> bits of a bf16, as `round_stochastic`."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(x == x, (bits + random) >> 16, 0x7FC0).to(tl.uint16)


@triton.jit
def _join(upper, remainder):
    return ((upper.to(tl.int32) << 16) + remainder.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _split(x):
    """fp32 -> bits of a bf16 and the remainder, as `split_master`."""
    bits = x.to(tl.int32, bitcast=True)
    upper = (x.to(tl.uint32, bitcast=True) + 0x8000) >> 16
    remainder = bits - (upper << 16).to(tl.int32, bitcast=True)
    return tl.where(x == x, upper, 0x7FC0).to(tl.uint16), tl.where(x == x, remainder, 0).to(tl.int16)


@triton.jit
def _float(n):
    """Integers below 2^22 as fp32, through the bits of 1.5 * 2^23 + n: instructions that convert are slow."""
    return (n.to(tl.int32) + _SHIFT_BITS).to(tl.float32, bitcast=True) - _SHIFT


@triton.jit
def _chance(random):
    """8 bits, from bit 1 on, as (2 r + 1) / 512: of 256 equally likely numbers between 0 and 1."""
    return ((random & 0x1FE) | _UNIT_BITS).to(tl.float32, bitcast=True) - _UNIT


@triton.jit
def _below(x):
    """The integer below x (x itself or x - 1 where x is one), as the bits of 1.5 * 2^23 + it and as fp32."""
    shifted = (x - 0.5) + _SHIFT
    return shifted.to(tl.int32, bitcast=True), shifted - _SHIFT


@triton.jit
def _root(x):
    """Square root of x >= 0 to 3e-7, in a third of the instructions of tl.sqrt; too small for x below 2e-38."""
    return x * tl.rsqrt(tl.maximum(x, 2e-38))


@triton.jit
def _scale(size, tiny):
    """The largest of each block, fp32 [BLOCKS]; 0 if it is tiny."""
    scale = tl.max(tl.max(size, 2), 1)
    return tl.where(scale > tiny, scale, 0.0)


@triton.jit
def _decode_m(code, scale):
    code = _float(code)
    return code * tl.abs(code) * (scale * (1.0 / 16129.0))


@triton.jit
def _decode_v(code, scale):
    code = _float(code)
    root = code * code * (tl.sqrt(scale) * (1.0 / 65025.0))
    return root * root


@triton.jit
def _encode_m(m, random):
    """Codes and scales of m: for x = 127^2 |m| / a from q^2 to (q + 1)^2 up with probability (x - q^2) / (2 q + 1)."""
    scale = _scale(tl.abs(m), _M_TINY)
    x = tl.abs(m) * tl.where(scale > 0, 16129.0 / tl.maximum(scale, _M_TINY), 0.0)[:, None, None]
    bits, lower = _below(_root(x))
    up = _chance(random << 1) * tl.fma(lower, 2.0, 1.0) < tl.fma(-lower, lower, x)
    bits += up.to(tl.int32)
    return tl.where(m < 0, -bits, bits).to(tl.int8), scale  # the lowest byte is the code's


@triton.jit
def _encode_v(v, root, random):
    """Codes and scales of v, of which root is the square root: as of m, for x = 255^4 v / a and fourth powers."""
    scale = _scale(v, _V_TINY)
    y = root * tl.where(scale > 0, 65025.0 * tl.rsqrt(tl.maximum(scale, _V_TINY)), 0.0)[:, None, None]  # sqrt(x)
    bits, lower = _below(_root(y))
    low, width = lower * lower, tl.fma(lower, 2.0, 1.0)
    up = _chance(random >> 7) * (width * tl.fma(low, 2.0, width)) < tl.fma(y, y, -low * low)
    bits += up.to(tl.int32)
    return tl.maximum(bits, tl.where(y > 0, _SHIFT_BITS + 1, _SHIFT_BITS)).to(tl.uint8), scale


# --- the norm ---------------------------------------------------------------------------------------------------------


@triton.jit
def _unscale(inv_scale_ptr, grad_scale_ptr, INV: tl.constexpr, SCALED: tl.constexpr):
    """What the gradients are multiplied by to undo the scaling of the loss."""
    factor = fp32(1.0)
    if INV:
        factor = factor * tl.load(inv_scale_ptr).to(tl.float32)
    if SCALED:
        factor = factor / tl.load(grad_scale_ptr).to(tl.float32)
    return factor


@triton.jit(do_not_specialize=["first", "tensors"])
def norm_partials(
    table_ptr,
    chunks_ptr,
    partials_ptr,
    inv_scale_ptr,
    grad_scale_ptr,
    first,
    tensors,
    chunk,
    GRAD_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INV: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """partials[row] = sum (unscale * g)^2 of the chunk in row first + program. Each thread adds up its own elements."""
    WIDTH: tl.constexpr = BLOCKS * _BLOCK
    row = first + tl.program_id(0)
    tensor = tl.load(chunks_ptr + 2 * row)
    start = tl.load(chunks_ptr + 2 * row + 1).to(tl.int64) * chunk
    end = tl.minimum(tl.load(table_ptr + _SIZE * tensors + tensor), start + chunk)
    grad_ptr = _pointer(table_ptr + _GRAD * tensors + tensor, GRAD_DTYPE, ALIGNED)
    factor = _unscale(inv_scale_ptr, grad_scale_ptr, INV, SCALED)
    within = _within(BLOCKS)
    total = tl.zeros((BLOCKS, _BLOCK // _GROUP, _GROUP), tl.float32)
    full = start + (end - start) // WIDTH * WIDTH
    for at in range(start, full, WIDTH):
        g = _read(grad_ptr + at, within, WIDTH, False).to(tl.float32) * factor
        total = tl.fma(g, g, total)
    if full < end:
        g = _read(grad_ptr + full, within, (end - full).to(tl.int32), True).to(tl.float32) * factor
        total = tl.fma(g, g, total)
    tl.store(partials_ptr + row, tl.sum(tl.sum(tl.sum(total, 2), 1), 0))


@triton.jit(do_not_specialize=["count", "tensors"])
def finish(
    table_ptr,
    partials_ptr,
    rates_ptr,
    corrections_ptr,
    results_ptr,
    inv_scale_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    max_norm,
    count,
    tensors,
    NORM: tl.constexpr,
    INV: tl.constexpr,
    SCALED: tl.constexpr,
    FOUND: tl.constexpr,
    WIDE: tl.constexpr,
):
    """results = norm, factor of the gradients, 1 if nothing may change; unless that, steps + 1 and their corrections.

    rates: ln of the betas, fp64 [2, T]. corrections: 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t), fp32 [2, T].
    """
    lane = tl.arange(0, WIDE)
    factor = _unscale(inv_scale_ptr, grad_scale_ptr, INV, SCALED)
    skip = fp32(0.0)
    if FOUND:
        skip = tl.where(tl.load(found_inf_ptr).to(tl.float32) == 0.0, 0.0, 1.0)
    if NORM:
        total = tl.zeros((WIDE,), tl.float32)
        for start in range(0, count, WIDE):
            total += tl.load(partials_ptr + start + lane, mask=start + lane < count, other=0.0)
        norm = tl.sqrt(tl.sum(total, 0))
        tl.store(results_ptr, norm)
        skip = tl.where(norm < float("inf"), skip, 1.0)  # also where it is NaN
        factor = factor * tl.minimum(fp32(max_norm) / (norm + 1e-6), 1.0)
    tl.store(results_ptr + 1, factor)
    tl.store(results_ptr + 2, skip)
    if skip == 0.0:
        for start in range(0, tensors, WIDE):
            tensor = start + lane
            inside = tensor < tensors
            step_ptr = tl.load(table_ptr + _STEP * tensors + tensor, mask=inside, other=0).to(
                tl.pointer_type(tl.float32)
            )
            step = tl.load(step_ptr, mask=inside, other=0.0) + 1.0
            tl.store(step_ptr, step, mask=inside)
            first = 1.0 - tl.exp(step.to(tl.float64) * tl.load(rates_ptr + tensor, mask=inside, other=-1.0))
            second = 1.0 - tl.exp(step.to(tl.float64) * tl.load(rates_ptr + tensors + tensor, mask=inside, other=-1.0))
            tl.store(corrections_ptr + tensor, (1.0 / first).to(tl.float32), mask=inside)
            tl.store(corrections_ptr + tensors + tensor, (1.0 / tl.sqrt(second)).to(tl.float32), mask=inside)


# --- the step ---------------------------------------------------------------------------------------------------------


@triton.jit
def _step_block(
    at,
    left,
    pointers,
    numbers,
    key,
    group,
    KIND: tl.constexpr,
    EIGHT: tl.constexpr,
    ANCHORED: tl.constexpr,
    EWC: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The step of the BLOCKS * 256 elements from `at` on, of which `left` exist."""
    p_ptr, g_ptr, m_ptr, v_ptr, low_ptr, m_scale_ptr, v_scale_ptr, anchor_ptr, fisher_ptr, ewc_ptr = pointers
    factor, rate_1, beta_2, rate_2, eps, step_size, correction, keep, pull, ewc = numbers
    within = _within(BLOCKS)
    p = _read(p_ptr + at, within, left, MASKED)
    if KIND == "stochastic":
        p = _widen(p)
    if KIND == "split":
        p = _join(p, _read(low_ptr + at, within, left, MASKED))
    g = _read(g_ptr + at, within, left, MASKED).to(tl.float32) * factor
    if EWC:
        held = tl.where(ewc != 0.0, 1, 0)
        fisher = _read_if(held, fisher_ptr + at, within, left, MASKED)
        away = p - _read_if(held, ewc_ptr + at, within, left, MASKED)
        g = tl.where(held > 0, tl.fma(fisher * ewc, away, g), g)
    random = within
    if EIGHT or KIND == "stochastic":
        groups = tl.arange(0, BLOCKS)[:, None] * (_BLOCK // _GROUP) + tl.arange(0, _BLOCK // _GROUP)[None, :]
        random = _random(key, group + at // _GROUP + groups)
    m, v = _read(m_ptr + at, within, left, MASKED), _read(v_ptr + at, within, left, MASKED)
    if EIGHT:
        block, block_at = tl.arange(0, BLOCKS), at // _BLOCK
        inside = block * _BLOCK < left
        m_scale = tl.load(m_scale_ptr + block_at + block, mask=inside, other=0.0)
        v_scale = tl.load(v_scale_ptr + block_at + block, mask=inside, other=0.0)
        m, v = _decode_m(m, m_scale[:, None, None]), _decode_v(v, v_scale[:, None, None])
    m = tl.fma(g - m, rate_1, m)
    v = tl.fma(g * rate_2, g, v * beta_2)
    kept = p * keep
    if ANCHORED:
        held = tl.where(pull != 0.0, 1, 0)
        away = p - _read_if(held, anchor_ptr + at, within, left, MASKED)
        kept = tl.where(held > 0, tl.fma(away, -pull, kept), kept)
    if EIGHT:  # so few bytes to move that instructions count: an approximate root and reciprocal
        root = _root(v)
        inverse = tl.rsqrt(tl.fma(root, correction, eps))
        change = m * inverse * inverse
    else:
        change = m / tl.fma(tl.sqrt(v), correction, eps)
    p = tl.fma(change, -step_size, kept)
    if EIGHT:
        m, m_scale = _encode_m(m, random)
        v, v_scale = _encode_v(v, root, random)
        tl.store(m_scale_ptr + block_at + block, m_scale, mask=inside)
        tl.store(v_scale_ptr + block_at + block, v_scale, mask=inside)
    _write(m_ptr + at, within, left, m, MASKED)
    _write(v_ptr + at, within, left, v, MASKED)
    if KIND == "stochastic":
        p = _round_stochastic(p, random)
    if KIND == "split":
        p, low = _split(p)
        _write(low_ptr + at, within, left, low, MASKED)
    _write(p_ptr + at, within, left, p, MASKED)


@triton.jit
def _pointers(
    column,
    tensors,
    GRAD_DTYPE: tl.constexpr,
    ANCHOR_DTYPE: tl.constexpr,
    FISHER_DTYPE: tl.constexpr,
    EWC_DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    EIGHT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The tensors of one column of the table, in the order in which `_step_block` takes them."""
    return (
        _pointer(column + _PARAM * tensors, tl.float32 if KIND == "fp32" else tl.uint16, ALIGNED),
        _pointer(column + _GRAD * tensors, GRAD_DTYPE, ALIGNED),
        _pointer(column + _EXP_AVG * tensors, tl.int8 if EIGHT else tl.float32, ALIGNED),
        _pointer(column + _EXP_AVG_SQ * tensors, tl.uint8 if EIGHT else tl.float32, ALIGNED),
        _pointer(column + _REMAINDER * tensors, tl.int16, ALIGNED),
        _pointer(column + _M_ABSMAX * tensors, tl.float32, ALIGNED),
        _pointer(column + _V_ABSMAX * tensors, tl.float32, ALIGNED),
        _pointer(column + _ANCHOR * tensors, ANCHOR_DTYPE or tl.float32, ALIGNED),
        _pointer(column + _FISHER * tensors, FISHER_DTYPE or tl.float32, ALIGNED),
        _pointer(column + _EWC_ANCHOR * tensors, EWC_DTYPE or tl.float32, ALIGNED),
    )


@triton.jit(do_not_specialize=["first", "tensors"])
def update(
    table_ptr,
    chunks_ptr,
    strengths_ptr,
    corrections_ptr,
    results_ptr,
    lr_ptr,
    lr,
    rate_1,
    beta_2,
    rate_2,
    eps,
    weight_decay,
    first,
    tensors,
    chunk,
    KIND: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ANCHOR_DTYPE: tl.constexpr,
    FISHER_DTYPE: tl.constexpr,
    EWC_DTYPE: tl.constexpr,
    EIGHT: tl.constexpr,
    ALIGNED: tl.constexpr,
    LR_TENSOR: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The step of one chunk, unless `finish` says that nothing may change.

    strengths: of the anchor and of EWC, fp32 [2, T]; 0 where a tensor has none. ANCHOR_DTYPE, FISHER_DTYPE: None
    where no tensor has one. The chunks come from the last to the first: those of which `norm_partials` has just read
    the gradients are the likeliest to be cached.
    """
    if tl.load(results_ptr + 2) == 0.0:
        row = first + tl.num_programs(0) - 1 - tl.program_id(0)
        tensor = tl.load(chunks_ptr + 2 * row)
        start = tl.load(chunks_ptr + 2 * row + 1).to(tl.int64) * chunk
        end = tl.minimum(tl.load(table_ptr + _SIZE * tensors + tensor), start + chunk)
        column = table_ptr + tensor
        pointers = _pointers(column, tensors, GRAD_DTYPE, ANCHOR_DTYPE, FISHER_DTYPE, EWC_DTYPE, KIND, EIGHT, ALIGNED)
        rate = tl.load(lr_ptr).to(tl.float32) if LR_TENSOR else fp32(lr)
        numbers = (
            tl.load(results_ptr + 1),
            fp32(rate_1),
            fp32(beta_2),
            fp32(rate_2),
            fp32(eps),
            rate * tl.load(corrections_ptr + tensor),
            tl.load(corrections_ptr + tensors + tensor),
            1.0 - rate * fp32(weight_decay),
            tl.minimum(rate * tl.load(strengths_ptr + tensor), 1.0),
            tl.load(strengths_ptr + tensors + tensor),
        )
        step = tl.load(tl.load(column + _STEP * tensors).to(tl.pointer_type(tl.float32)))
        key = tl.load(column + _SEED * tensors) ^ (step.to(tl.int64) << 32)
        group = tl.load(column + _PLACE * tensors) << _PLACE_SHIFT
        full = start + (end - start) // (BLOCKS * _BLOCK) * (BLOCKS * _BLOCK)
        for tail in tl.static_range(2):  # whole blocks without masks, so that they are read 16 bytes at a time
            for at in range(full if tail else start, end if tail else full, BLOCKS * _BLOCK):
                left = (end - at).to(tl.int32)
                _step_block(
                    at,
                    left,
                    pointers,
                    numbers,
                    key,
                    group,
                    KIND,
                    EIGHT,
                    ANCHOR_DTYPE is not None,
                    FISHER_DTYPE is not None,
                    tail,
                    BLOCKS,
                )
