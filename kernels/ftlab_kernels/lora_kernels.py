"""The Triton kernels of `ftlab_kernels.lora`; `lora_launch` starts them.

Letters: M rows, K columns of x, N columns of y, R rank (of all adapters or of one), L columns of what is read.

    project            out [M, R] = factor * (keep * v) A^T          v [M, L], A [R, L]; draws or reads the mask
    outer              part of t^T (keep * v)  [R, L]                t [M, R]
    project_and_outer  parts of v B [M, R] and of v^T s [L, R] from one reading of v
    add_parts          the sum of parts in a fixed order
    masked_product     out [M, K] = keep * (t A)
    forward            y [M, N] = out_scale * (x W^T + scale * s B^T) + bias
    input_gradient     dx [M, K] = dy W + keep * (t A)
    scale_gradient     dy * out_scale, and parts of the gradient of out_scale

Every product is accumulated in fp32; operands of one product are of one dtype. Nothing is added atomically.
"""

from __future__ import annotations

from ftlab_kernels.common import cast, dot, fp32, tl, triton
from ftlab_kernels.random import expand_mask, keep_byte

__all__ = [
    "add_parts",
    "forward",
    "input_gradient",
    "masked_product",
    "outer",
    "project",
    "project_and_outer",
    "scale_gradient",
]


@triton.jit
def project(
    v_ptr,
    a_ptr,
    mask_ptr,
    seed_ptr,
    out_ptr,
    drop_below,
    factor,
    rows,
    columns,
    groups,
    rank,
    v_row,
    a_rank,
    a_column,
    out_row,
    DRAW: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
):
    """A block of BM rows of out = factor * (mask * v) A^T, over all columns. DRAW: make the mask and store it."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.arange(0, BR)
    lane = tl.arange(0, BL)
    inside_m = (m < rows)[:, None]
    acc = tl.zeros((BM, BR), dtype=tl.float32)
    if DRAW:
        seed = tl.load(seed_ptr)
    for start in range(0, columns, BL):
        c = start + lane
        inside_a = (r < rank)[None, :] if EVEN else (r < rank)[None, :] & (c < columns)[:, None]
        a = tl.load(a_ptr + r[None, :] * a_rank + c[:, None] * a_column, mask=inside_a, other=0.0)
        inside_v = inside_m if EVEN else inside_m & (c < columns)[None, :]
        v = tl.load(v_ptr + m[:, None] * v_row + c[None, :], mask=inside_v, other=0.0)
        if MASKED:
            g = start // 8 + tl.arange(0, BL // 8)
            inside_g = inside_m if EVEN else inside_m & (g < groups)[None, :]
            at_g = m[:, None] * groups + g[None, :]
            if DRAW:
                byte = keep_byte(seed, at_g, drop_below)
                if not EVEN:
                    left = columns - g * 8
                    byte = byte & ((1 << tl.maximum(tl.minimum(left, 8), 0)) - 1)[None, :]
                # Stored a byte at a time: for wider stores the compiler would draw the mask twice, in two layouts.
                tl.store(mask_ptr + tl.max_contiguous(at_g, (1, 1)), byte.to(tl.uint8), mask=inside_g)
            else:
                byte = tl.load(mask_ptr + at_g, mask=inside_g, other=0).to(tl.int32)
            v = tl.where(expand_mask(byte, BM, BL), v, 0.0)
        acc = dot(v, a, acc)
    out = cast(acc * fp32(factor), out_ptr.dtype.element_ty)
    tl.store(out_ptr + m[:, None] * out_row + r[None, :], out, mask=inside_m & (r < rank)[None, :])


@triton.jit
def outer(
    v_ptr,
    t_ptr,
    mask_ptr,
    part_ptr,
    rows,
    columns,
    groups,
    rank,
    v_row,
    t_row,
    part_rank,
    part_column,
    part_rows,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
):
    """One part of t^T (mask * v): BL columns, over the part_rows rows of part program_id(1)."""
    c = tl.program_id(0) * BL + tl.arange(0, BL)
    r = tl.arange(0, BR)
    part = tl.program_id(1)
    first = part * part_rows
    inside_c = (c < columns)[None, :]
    acc = tl.zeros((BR, BL), dtype=tl.float32)
    for start in range(first, tl.minimum(first + part_rows, rows), BM):
        m = tl.arange(0, BM).to(tl.int64) + start
        inside_m = (m < rows)[:, None]
        v = tl.load(v_ptr + m[:, None] * v_row + c[None, :], mask=inside_m if EVEN else inside_m & inside_c, other=0.0)
        t = tl.load(t_ptr + m[:, None] * t_row + r[None, :], mask=inside_m & (r < rank)[None, :], other=0.0)
        if MASKED:
            g = tl.program_id(0) * (BL // 8) + tl.arange(0, BL // 8)
            inside_g = inside_m if EVEN else inside_m & (g < groups)[None, :]
            byte = tl.load(mask_ptr + m[:, None] * groups + g[None, :], mask=inside_g, other=0)
            v = tl.where(expand_mask(byte, BM, BL), v, 0.0)
        acc = dot(tl.trans(t), v, acc)
    at = part.to(tl.int64) * rank * columns + r[:, None] * part_rank + c[None, :] * part_column
    tl.store(part_ptr + at, acc, mask=(r < rank)[:, None] & inside_c)


@triton.jit
def project_and_outer(
    v_ptr,
    b_ptr,
    s_ptr,
    t_part_ptr,
    b_part_ptr,
    rows,
    columns,
    rank,
    v_row,
    s_row,
    part_rows,
    UNIT: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BL: tl.constexpr,
    BR: tl.constexpr,
):
    """From one reading of BL columns and part_rows rows of v: their part of v B [M, R] and of v^T s [L, R].

    rank and s_row are given in multiples of UNIT: so the compiler knows that rows of 8 ranks, too, are 16 bytes.
    """
    rank, s_row = rank * UNIT, s_row * UNIT
    c = tl.program_id(0) * BL + tl.arange(0, BL)
    r = tl.arange(0, BR)
    part = tl.program_id(1)
    first = part * part_rows
    inside_c = c < columns
    inside_r = (r < rank)[None, :]
    b = tl.load(b_ptr + c[:, None] * rank + r[None, :], mask=inside_c[:, None] & inside_r, other=0.0)
    acc = tl.zeros((BL, BR), dtype=tl.float32)
    for start in range(first, tl.minimum(first + part_rows, rows), BM):
        m = tl.arange(0, BM).to(tl.int64) + start
        inside_m = (m < rows)[:, None]
        inside_v = inside_m if EVEN else inside_m & inside_c[None, :]
        v = tl.load(v_ptr + m[:, None] * v_row + c[None, :], mask=inside_v, other=0.0)
        s = tl.load(s_ptr + m[:, None] * s_row + r[None, :], mask=inside_m & inside_r, other=0.0)
        t = dot(v, b, tl.zeros((BM, BR), dtype=tl.float32))
        at = (tl.program_id(0).to(tl.int64) * rows + m)[:, None] * rank + r[None, :]
        tl.store(t_part_ptr + at, t, mask=inside_m & inside_r)
        acc = dot(tl.trans(v), s, acc)
    at = (part.to(tl.int64) * columns + c)[:, None] * rank + r[None, :]
    tl.store(b_part_ptr + at, acc, mask=inside_c[:, None] & inside_r)


@triton.jit
def add_parts(part_ptr, out_ptr, factor, parts, size, width, out_row, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """out[i / width, i % width] = factor * the sum over parts, always in the same order, of part[:, i]."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    acc = tl.zeros((SIZE,), dtype=tl.float32)
    for start in range(0, parts, PARTS):
        p = start + tl.arange(0, PARTS).to(tl.int64)
        inside = (p < parts)[:, None] & (i < size)[None, :]
        acc += tl.sum(tl.load(part_ptr + p[:, None] * size + i[None, :], mask=inside, other=0.0), axis=0)
    at = i // width * out_row + i % width
    tl.store(out_ptr + at, cast(acc * fp32(factor), out_ptr.dtype.element_ty), mask=i < size)


@triton.jit
def _adapter_term(t_ptr, a_ptr, m, k, rows, columns, rank, t_row, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr):
    """A block of t A in fp32: t [M, R] with rows t_row apart, A [R, K] contiguous. m: int64 rows, k: columns."""
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in tl.range(0, rank, BR, num_stages=1):
        r = start + tl.arange(0, BR)
        inside_t, inside_a = (m < rows)[:, None] & (r < rank)[None, :], (r < rank)[:, None] & (k < columns)[None, :]
        t = tl.load(t_ptr + m[:, None] * t_row + r[None, :], mask=inside_t, other=0.0)
        a = tl.load(a_ptr + r[:, None] * columns + k[None, :], mask=inside_a, other=0.0)
        acc = dot(t, a, acc)
    return acc


@triton.jit
def _tile(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """This program's tile, in an order that walks GROUP_M rows of tiles together, so that they share columns in L2."""
    pid = tl.program_id(0)
    in_group = GROUP_M * tiles_n
    first = pid // in_group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % in_group % height, pid % in_group // height


@triton.jit
def masked_product(
    t_ptr,
    a_ptr,
    mask_ptr,
    out_ptr,
    rows,
    columns,
    groups,
    rank,
    t_row,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """A block of keep * (t A): contiguous [M, K]."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = _adapter_term(t_ptr, a_ptr, m, k, rows, columns, rank, t_row, BM, BN, BR)
    out = cast(_kept(acc, mask_ptr, m, tl.program_id(1), rows, groups, BM, BN), out_ptr.dtype.element_ty)
    inside = (m < rows)[:, None] & (k < columns)[None, :]
    tl.store(out_ptr + m[:, None] * columns + k[None, :], out, mask=inside)


@triton.jit
def _kept(x, mask_ptr, m, block, rows, groups, BM: tl.constexpr, BN: tl.constexpr):
    """x where the mask's bits of rows m and of the BN columns of `block` are set, else 0."""
    g = block * (BN // 8) + tl.arange(0, BN // 8)
    inside = (m < rows)[:, None] & (g < groups)[None, :]
    byte = tl.load(mask_ptr + m[:, None] * groups + g[None, :], mask=inside, other=0)
    return tl.where(expand_mask(byte, BM, BN), x, 0.0)


@triton.jit
def forward(
    x_ptr,
    w_ptr,
    s_ptr,
    b_ptr,
    bias_ptr,
    out_scale_ptr,
    y_ptr,
    z_ptr,
    scale,
    rows,
    columns,
    features,
    rank,
    x_row,
    w_row,
    s_row,
    HAS_BIAS: tl.constexpr,
    HAS_OUT_SCALE: tl.constexpr,
    KEEP_Z: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile of y [M, N] = out_scale * z + bias, z = x W^T + scale * s B^T."""
    tile_m, tile_n = _tile(tl.cdiv(rows, BM), tl.cdiv(features, BN), GROUP_M)
    m = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    n = tile_n.to(tl.int64) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in tl.range(0, rank, BR, num_stages=1):
        r = start + tl.arange(0, BR)
        inside_r = (r < rank)[None, :]
        s = tl.load(s_ptr + m[:, None] * s_row + r[None, :], mask=(m < rows)[:, None] & inside_r, other=0.0)
        b = tl.load(b_ptr + n[:, None] * rank + r[None, :], mask=(n < features)[:, None] & inside_r, other=0.0)
        acc = dot(s, tl.trans(b), acc)
    acc *= fp32(scale)
    k = tl.arange(0, BK)
    x_at = x_ptr + tl.minimum(m, rows - 1)[:, None] * x_row + k[None, :]  # rows beyond the last are not stored
    w_at = w_ptr + tl.minimum(n, features - 1)[:, None] * w_row + k[None, :]
    for start in range(0, columns, BK):
        if EVEN:
            x, w = tl.load(x_at), tl.load(w_at)
        else:
            inside_k = (k < columns - start)[None, :]
            x, w = tl.load(x_at, mask=inside_k, other=0.0), tl.load(w_at, mask=inside_k, other=0.0)
        acc = dot(x, tl.trans(w), acc)
        x_at += BK
        w_at += BK
    inside = (m < rows)[:, None] & (n < features)[None, :]
    at = m[:, None] * features + n[None, :]
    if KEEP_Z:
        tl.store(z_ptr + at, cast(acc, z_ptr.dtype.element_ty), mask=inside)
    if HAS_OUT_SCALE:
        acc *= tl.load(out_scale_ptr + n, mask=n < features, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < features, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, cast(acc, y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def input_gradient(
    dy_ptr,
    w_ptr,
    t_ptr,
    a_ptr,
    mask_ptr,
    dx_ptr,
    rows,
    columns,
    groups,
    features,
    rank,
    dy_row,
    w_row,
    t_row,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """A tile of dx [M, K] = keep * (t A) + dy W; the sum over N runs in steps of BK."""
    tile_m, tile_k = _tile(tl.cdiv(rows, BM), tl.cdiv(columns, BN), GROUP_M)
    m = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    k = tile_k * BN + tl.arange(0, BN)
    acc = _adapter_term(t_ptr, a_ptr, m, k, rows, columns, rank, t_row, BM, BN, BR)
    if MASKED:
        acc = _kept(acc, mask_ptr, m, tile_k, rows, groups, BM, BN)
    n = tl.arange(0, BK)
    dy_at = dy_ptr + tl.minimum(m, rows - 1)[:, None] * dy_row + n[None, :]
    w_at = w_ptr + n.to(tl.int64)[:, None] * w_row + k[None, :]
    w_step = BK * tl.full((), w_row, tl.int64)
    for start in range(0, features, BK):
        if EVEN:
            dy, w = tl.load(dy_at), tl.load(w_at)
        else:
            left = features - start
            dy = tl.load(dy_at, mask=(n < left)[None, :], other=0.0)
            w = tl.load(w_at, mask=(n < left)[:, None] & (k < columns)[None, :], other=0.0)
        acc = dot(dy, w, acc)
        dy_at += BK
        w_at += w_step
    inside = (m < rows)[:, None] & (k < columns)[None, :]
    tl.store(dx_ptr + m[:, None] * columns + k[None, :], cast(acc, dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_gradient(
    dy_ptr,
    z_ptr,
    out_scale_ptr,
    scaled_ptr,
    part_ptr,
    rows,
    features,
    dy_row,
    part_rows,
    WANTED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dy * out_scale for BN columns and part_rows rows; WANTED: their part of the sum of dy * z over the rows."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    first = part * part_rows
    out_scale = tl.load(out_scale_ptr + n, mask=n < features, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(first, tl.minimum(first + part_rows, rows), BM):
        m = tl.arange(0, BM).to(tl.int64) + start
        inside = (m < rows)[:, None] & (n < features)[None, :]
        at = m[:, None] * features + n[None, :]
        dy = tl.load(dy_ptr + m[:, None] * dy_row + n[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + at, cast(dy * out_scale, scaled_ptr.dtype.element_ty), mask=inside)
        if WANTED:
            acc += dy * tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if WANTED:
        tl.store(part_ptr + part.to(tl.int64) * features + n, tl.sum(acc, axis=0), mask=n < features)
