"""Starts the kernels of `lora_kernels`: block sizes, how sums over M are cut, and what is compiled ahead of time.

Letters: M rows, K columns of x, N columns of y, R rank (of all adapters or of one), L columns of what is read.

Limits, for M = 8192, K = N = 4096, R = 16 in bf16 on an H100 (3.0 TB/s): a pass over x or dy moves 67 MB, 22 us, and
computes 1 to 2 GFLOP, so memory bounds it; `forward` and `input_gradient` are 275 GFLOP and bound by the tensor cores.

A sum over M is cut into parts, whose number depends on the shape alone; each part is written in fp32 and `add_parts`
adds them in order. With P programs `project_and_outer` so writes about 8 R sqrt(P M N) bytes and reads them again:
12 MB each way at the shape above, most of it in L2. That grows with R while dy does not: above PAIRED_RANK it is
cheaper to read dy twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ftlab_kernels import lora_kernels as kernels
from ftlab_kernels.aot import Shipped
from ftlab_kernels.common import ceil_div, next_power_of_2
from ftlab_kernels.random import GROUP, threshold

__all__ = [
    "forward",
    "input_gradient",
    "masked_product",
    "outer",
    "project",
    "project_and_outer",
    "scale_gradient",
    "shipped",
]

PROGRAMS = 264  # two for each multiprocessor of an H100; a constant, so that sums are the same on every GPU
PAIRED_RANK = 32
FEW_ROWS = 2048


# --- block sizes ------------------------------------------------------------------------------------------------------
# Nothing spills on sm_80 and sm_90 where rows begin at multiples of 16 elements; odd sizes spill and are slow.


def _ranks(rank: int, most: int = 256) -> int:
    """The block of ranks: what a tensor core takes at least, and what fits at most."""
    return min(max(next_power_of_2(rank), 16), most)


def _rank_limit(wide: bool) -> int:
    """Ranks of one launch; more are done in several, each of which reads everything again. wide: fp32."""
    return 64 if wide else 256


def _project_options(rows: int, rank: int, wide: bool) -> dict[str, int]:
    """Few rows a program, for several programs on a multiprocessor; more where A, read by each, is larger."""
    ranks = _ranks(rank)
    if wide:
        return {"BM": 16, "BL": 32, "BR": ranks, "num_warps": 4, "num_stages": 2}
    few = rows < FEW_ROWS
    block = 16 if few else 32 if ranks <= 32 else 64
    warps = 8 if ranks >= (256 if few else 64) else 4
    return {"BM": block, "BL": 128 if ranks <= 64 else 64, "BR": ranks, "num_warps": warps, "num_stages": 3}


def _outer_options(rank: int, wide: bool) -> dict[str, int]:
    ranks = _ranks(rank)
    if wide:
        return {"BM": 16, "BL": 32, "BR": ranks, "num_warps": 4, "num_stages": 2}
    return {"BM": 64, "BL": 128 if ranks <= 128 else 64, "BR": ranks, "num_warps": 8, "num_stages": 3}


def _paired_options(rank: int, wide: bool) -> dict[str, int]:
    """Wide blocks, because a part of t is written for each; few rows, so that four programs share a multiprocessor."""
    if wide:
        return {"BM": 16, "BL": 64, "BR": _ranks(rank), "num_warps": 4, "num_stages": 2}
    return {"BM": 32, "BL": 256, "BR": _ranks(rank), "num_warps": 4, "num_stages": 3}


def _masked_product_options(rank: int, wide: bool) -> dict[str, int]:
    return {"BM": 64, "BN": 64 if wide else 128, "BR": _ranks(rank, 64), "num_warps": 8 if wide else 4}


def _gemm_options(rank: int, wide: bool, hopper: bool, two_outputs: bool = False) -> dict[str, int]:
    """128 x 256 x 64 where wgmma and 227 KiB of shared memory carry it; 128 x 128 x 64 takes 96 KiB, as sm_86 has.

    two_outputs: z and y of `forward`, whose addresses would make the larger tile spill.
    """
    common = {"BR": _ranks(rank, 16 if wide else 64), "GROUP_M": 8, "num_warps": 8}
    if wide:
        return {"BM": 64, "BN": 64, "BK": 32, **common, "num_stages": 2}
    if hopper and not two_outputs:
        return {"BM": 128, "BN": 256, "BK": 64, **common, "num_stages": 4}
    return {"BM": 128, "BN": 128, "BK": 64, **common, "num_stages": 3 if two_outputs else 4}


def _hopper(device: torch.device) -> bool:
    """Whether blocks may have 227 KiB of shared memory (sm_90, sm_100); consumer GPUs have 99."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _wide(x: Tensor) -> bool:
    return x.element_size() > 2


def _parts(rows: int, blocks: int, block_rows: int) -> tuple[int, int]:
    """Into how many parts to cut the rows so that there are about PROGRAMS programs, and the rows of a part."""
    parts = max(1, min(PROGRAMS // blocks, ceil_div(rows, block_rows)))
    part_rows = ceil_div(ceil_div(rows, parts), block_rows) * block_rows
    return ceil_div(rows, part_rows), part_rows


def _unit(*sizes: int) -> int:
    """8 if it divides all sizes, else 1."""
    return 8 if all(size % 8 == 0 for size in sizes) else 1


# --- passes -----------------------------------------------------------------------------------------------------------


def project(
    v: Tensor,
    a: Tensor,
    out: Tensor,
    *,
    factor: float,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> None:
    """out = factor * (keep * v) a^T: v [M, L], a [R, L], out [M, R]; rows of v and out may be apart.

    mask: uint8 [M, ceil(L / 8)]; with a seed it is drawn for p and written, else it is read.
    """
    rows, columns = v.shape
    groups = ceil_div(columns, GROUP)
    limit = _rank_limit(_wide(v))
    spare = v if mask is None else mask
    for first in range(0, a.shape[0], limit):
        part, target = a[first : first + limit], out[:, first : first + limit]
        rank = part.shape[0]
        options = _project_options(rows, rank, _wide(v))
        kernels.project[(ceil_div(rows, options["BM"]),)](
            v, part, spare, spare if seed is None else seed, target, threshold(p), factor, rows, columns, groups, rank,
            v.stride(0), part.stride(0), part.stride(1), target.stride(0),
            DRAW=seed is not None, MASKED=mask is not None, EVEN=columns % options["BL"] == 0, **options,
        )  # fmt: skip
        seed = None  # what is drawn once is read


def outer(v: Tensor, t: Tensor, mask: Tensor | None, *, factor: float = 1.0, transposed: bool = False) -> Tensor:
    """factor * t^T (keep * v) in fp32: v [M, L], t [M, R] -> [R, L], or [L, R] if transposed."""
    rows, columns = v.shape
    found = []
    for piece in t.split(_rank_limit(_wide(v)), 1):
        rank = piece.shape[1]
        options = _outer_options(rank, _wide(v))
        blocks = ceil_div(columns, options["BL"])
        parts, part_rows = _parts(rows, blocks, options["BM"])
        shape, strides = ((columns, rank), (1, rank)) if transposed else ((rank, columns), (columns, 1))
        part = torch.empty(parts, *shape, dtype=torch.float32, device=v.device)
        kernels.outer[(blocks, parts)](
            v, piece, v if mask is None else mask, part, rows, columns, ceil_div(columns, GROUP), rank,
            v.stride(0), piece.stride(0), *strides, part_rows,
            MASKED=mask is not None, EVEN=columns % options["BL"] == 0, **options,
        )  # fmt: skip
        found.append(_add_parts(part, torch.empty(shape, dtype=torch.float32, device=v.device), factor))
    return found[0] if len(found) == 1 else torch.cat(found, 1 if transposed else 0)


def project_and_outer(v: Tensor, b: Tensor, s: Tensor, t: Tensor, factors: tuple[float, float]) -> Tensor:
    """t = factor * v b and, in fp32, other factor * v^T s from one reading of v.

    v: [M, L]. b: [L, R] contiguous. s, t: [M, R], whose rows may be apart.
    """
    rows, columns = v.shape
    rank = b.shape[1]
    options = _paired_options(rank, _wide(v))
    blocks = ceil_div(columns, options["BL"])
    parts, part_rows = _parts(rows, blocks, options["BM"])
    t_part = torch.empty(blocks, rows, rank, dtype=torch.float32, device=v.device)
    b_part = torch.empty(parts, columns, rank, dtype=torch.float32, device=v.device)
    unit = _unit(rank, s.stride(0))
    kernels.project_and_outer[(blocks, parts)](
        v, b, s, t_part, b_part, rows, columns, rank // unit, v.stride(0), s.stride(0) // unit, part_rows,
        UNIT=unit, EVEN=columns % options["BL"] == 0, **options,
    )  # fmt: skip
    _add_parts(t_part, t, factors[0])
    return _add_parts(b_part, torch.empty(columns, rank, dtype=torch.float32, device=v.device), factors[1])


def _add_parts(part: Tensor, out: Tensor, factor: float) -> Tensor:
    """out = factor * part.sum(0), part fp32 [P, ...] contiguous; rows of out may be apart."""
    width = out.shape[-1]
    size = part[0].numel()
    options = _ADD_OPTIONS
    grid = (ceil_div(size, options["SIZE"]),)
    kernels.add_parts[grid](part, out, factor, part.shape[0], size, width, out.stride(0), **options)
    return out


_ADD_OPTIONS = {"PARTS": 16, "SIZE": 256, "num_warps": 4}


def scale_gradient(dy: Tensor, out_scale: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """dy * out_scale [M, N] in dy's dtype and, with z, the sum over rows of dy * z: fp32 [N]."""
    rows, features = dy.shape
    options = _SCALE_OPTIONS
    blocks = ceil_div(features, options["BN"])
    parts, part_rows = _parts(rows, blocks, options["BM"])
    scaled = torch.empty(rows, features, dtype=dy.dtype, device=dy.device)
    part = torch.empty(parts, features, dtype=torch.float32, device=dy.device)
    kernels.scale_gradient[(blocks, parts)](
        dy, dy if z is None else z, out_scale, scaled, part, rows, features, dy.stride(0), part_rows,
        WANTED=z is not None, **options,
    )  # fmt: skip
    if z is None:
        return scaled, None
    return scaled, _add_parts(part, torch.empty(features, dtype=torch.float32, device=dy.device), 1.0)


_SCALE_OPTIONS = {"BM": 16, "BN": 256, "num_warps": 4}


# --- products ---------------------------------------------------------------------------------------------------------


def masked_product(t: Tensor, a: Tensor, mask: Tensor) -> Tensor:
    """keep * (t a) in t's dtype: t [M, R], a [R, K] contiguous -> [M, K]."""
    rows, rank = t.shape
    columns = a.shape[1]
    options = _masked_product_options(rank, _wide(t))
    out = torch.empty(rows, columns, dtype=t.dtype, device=t.device)
    grid = (ceil_div(rows, options["BM"]), ceil_div(columns, options["BN"]))
    kernels.masked_product[grid](t, a, mask, out, rows, columns, mask.shape[1], rank, t.stride(0), **options)
    return out


def forward(
    x: Tensor,
    weight: Tensor,
    s: Tensor,
    b: Tensor,
    scale: float,
    bias: Tensor | None,
    out_scale: Tensor | None,
    keep_z: bool,
) -> tuple[Tensor, Tensor | None]:
    """y = out_scale * z + bias and, if it is to be kept, z = x weight^T + scale * s b^T; b [N, R] contiguous."""
    (rows, columns), (features, rank) = x.shape, b.shape
    options = _gemm_options(rank, _wide(x), _hopper(x.device), keep_z)
    y = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    z = torch.empty_like(y) if keep_z else None
    grid = (ceil_div(rows, options["BM"]) * ceil_div(features, options["BN"]),)
    kernels.forward[grid](
        x, weight, s, b, x if bias is None else bias, x if out_scale is None else out_scale, y, y if z is None else z,
        scale, rows, columns, features, rank, x.stride(0), weight.stride(0), s.stride(0),
        HAS_BIAS=bias is not None, HAS_OUT_SCALE=out_scale is not None, KEEP_Z=keep_z,
        EVEN=columns % options["BK"] == 0, **options,
    )  # fmt: skip
    return y, z


def input_gradient(dy: Tensor, weight: Tensor, t: Tensor, a: Tensor, mask: Tensor | None) -> Tensor:
    """dy weight + keep * (t a): dy [M, N], weight [N, K], t [M, R], a [R, K] contiguous -> [M, K] in dy's dtype."""
    (rows, features), (rank, columns) = dy.shape, a.shape
    options = _gemm_options(rank, _wide(dy), _hopper(dy.device))
    dx = torch.empty(rows, columns, dtype=dy.dtype, device=dy.device)
    grid = (ceil_div(rows, options["BM"]) * ceil_div(columns, options["BN"]),)
    kernels.input_gradient[grid](
        dy, weight, t, a, dy if mask is None else mask, dx, rows, columns, ceil_div(columns, GROUP), features, rank,
        dy.stride(0), weight.stride(0), t.stride(0),
        MASKED=mask is not None, EVEN=_even(features, columns, options), **options,
    )  # fmt: skip
    return dx


def _even(features: int, columns: int, options: dict[str, int]) -> bool:
    return features % options["BK"] == 0 and columns % options["BN"] == 0


# --- ahead of time ----------------------------------------------------------------------------------------------------

_COPIES = {80: [("HMMA",), ("LDGSTS",)], 90: [("HGMMA", "HMMA"), ("LDGSTS",)]}  # wgmma takes 64 rows at least
_GEMM = {80: [("HMMA",), ("LDGSTS",)], 90: [("HGMMA",), ("LDGSTS",)]}
_PRODUCT = {80: [("HMMA",)], 90: [("HGMMA",)]}
# On sm_80 the compiler keeps no copies of a block in flight that two products read in two layouts; four programs share
# a multiprocessor there.
_PAIRED = {80: [("HMMA",)], 90: [("HGMMA",), ("LDGSTS",)]}
_WORDS = {"h": "*bf16", "f": "*fp32", "b": "*u8", "l": "*i64", "s": "fp32", "j": "i32", "i": "i32"}
_MANY = 8192


def _entry(
    name: str, kernel: Any, types: str, constants: Mapping[str, Any], options: Mapping[str, int], **named: Any
) -> Shipped:
    """types: `_WORDS` of the arguments that are no constants, in order; i is a multiple of 16, j need not be."""
    arguments = [argument for argument in kernel.arg_names if argument not in constants and argument not in options]
    pairs = list(zip(arguments, types, strict=True))
    return Shipped(
        name=f"lora {name}",
        kernel=kernel,
        types={argument: _WORDS[word] for argument, word in pairs},
        constants=constants,
        options=options,
        divisible=tuple(argument for argument, word in pairs if word == "i"),
        **named,
    )


def _shipped_passes() -> list[Shipped]:
    """Passes over x for all layers that share it: R = 16 for one, 32 for gate and up, 48 for q, k and v."""
    project_, outer_ = {"EVEN": True, "a_column": 1}, {"EVEN": True, "part_column": 1}
    draw, plain = {"DRAW": True, "MASKED": True, **project_}, {"DRAW": False, "MASKED": False, **project_}
    x_types, t_types = "hhblhjsiiiiiii", "hhbfiiiiiiii"
    rows, few, blocks = _project_options(_MANY, 16, False), _project_options(1, 16, False), _outer_options(16, False)
    found = [
        _entry("x pass R=16 few rows", kernels.project, x_types, draw, few, expects=_COPIES),
        _entry("x pass R=16 p=0", kernels.project, x_types, plain, rows, expects=_COPIES),
        _entry("dA R=16 p=0", kernels.outer, t_types, {"MASKED": False, **outer_}, blocks, expects=_COPIES),
    ]
    for rank in (16, 32, 48):
        rows, blocks = _project_options(_MANY, rank, False), _outer_options(rank, False)
        tile = _masked_product_options(rank, False)
        found += [
            _entry(f"x pass R={rank}", kernels.project, x_types, draw, rows, expects=_COPIES),
            _entry(f"dA R={rank}", kernels.outer, t_types, {"MASKED": True, **outer_}, blocks, expects=_COPIES),
            _entry(f"keep * (t A) R={rank}", kernels.masked_product, "hhbhiiiii", {}, tile, expects=_PRODUCT),
        ]
    return found


def _shipped_gradients() -> list[Shipped]:
    """Passes over dy: one up to PAIRED_RANK, two above it."""
    pair, transposed = {"UNIT": 8, "EVEN": True}, {"EVEN": True, "MASKED": False}
    kernel, eight = kernels.project_and_outer, {"rank": 1, "s_row": 1, **pair}  # rank and s_row in units of 8
    found = [_entry("t and dB r=8", kernel, "hhhffiiii", eight, _paired_options(8, False), expects=_PAIRED)]
    for r in (16, 32):
        options = _paired_options(r, False)
        found.append(_entry(f"t and dB r={r}", kernel, "hhhffiijiji", pair, options, expects=_PAIRED))
    for r in (64, 256):
        rows, blocks = _project_options(_MANY, r, False), _outer_options(r, False)
        constants = {"DRAW": False, "a_rank": 1, **transposed}
        found.append(_entry(f"t r={r}", kernels.project, "hhblhjsiiiiiii", constants, rows, expects=_COPIES))
        constants = {"part_rank": 1, **transposed}
        found.append(_entry(f"dB r={r}", kernels.outer, "hhbf" + 8 * "i", constants, blocks, expects=_COPIES))
    return [
        *found,
        _entry("sum of parts, fp32", kernels.add_parts, "ffsjiii", {}, _ADD_OPTIONS),
        _entry("sum of parts, bf16", kernels.add_parts, "fhsjiii", {}, _ADD_OPTIONS),
        _entry("dy * out_scale", kernels.scale_gradient, "hhfhfiiii", {"WANTED": True}, _SCALE_OPTIONS),
    ]


def _shipped_products() -> list[Shipped]:
    """Tiles of sm_90 and of all others. One binary serves all K and N that are multiples of the blocks."""
    found = []
    for arch, hopper in ((80, False), (90, True)):
        named = {"architectures": (arch,), "expects": _GEMM}
        for rank in (16, 64):
            options = _gemm_options(rank, False, hopper)
            doubled = _gemm_options(rank, False, hopper, two_outputs=True)
            plain = {"HAS_BIAS": False, "HAS_OUT_SCALE": False, "KEEP_Z": False, "EVEN": True}
            dora = {"HAS_BIAS": True, "HAS_OUT_SCALE": True, "KEEP_Z": True, "EVEN": True}
            types = "hhhhhfhhs" + 7 * "i"
            found += [
                _entry(f"y r={rank}", kernels.forward, types, plain, options, **named),
                _entry(f"y r={rank} bias", kernels.forward, types, {**plain, "HAS_BIAS": True}, options, **named),
                _entry(f"y and z r={rank} bias, out_scale", kernels.forward, types, dora, doubled, **named),
            ]
            for masked in (True, False):
                name, constants = f"dx R={rank}{'' if masked else ' p=0'}", {"MASKED": masked, "EVEN": True}
                found.append(_entry(name, kernels.input_gradient, "hhhhbh" + 8 * "i", constants, options, **named))
    return found


def shipped() -> list[Shipped]:
    """What is compiled ahead of time: bf16, the layers of a model of 8 billion parameters (K, N of 4096 and 14336)."""
    return _shipped_passes() + _shipped_gradients() + _shipped_products()
