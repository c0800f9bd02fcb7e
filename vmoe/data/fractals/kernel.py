"""The chaos game on a GPU: each program follows all chains of a picture, twice.

The first time it finds the range of the points, the second time it counts them. That costs less than storing them. The
results equal those of `pictures.count_points`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe.data.fractals.systems import FARTHEST, MATRIX_BITS


def count_points_on_gpu(varied, chances: Tensor, warm_up: int, size: int) -> Tensor:
    """See `pictures.count_points`."""
    pictures, maps, _ = varied.maps.shape
    steps, chains = chances.shape
    counts = torch.zeros(pictures, maps, size, size, dtype=torch.int32, device=chances.device)
    with torch.cuda.device_of(chances):
        _count_points_kernel[(pictures,)](
            *(part.contiguous() for part in (varied.maps, varied.thresholds, varied.turns, varied.shifts, chances)),
            counts, STEPS=steps, WARM_UP=warm_up, SIZE=size, CHAINS=chains, MAPS=maps, BITS=MATRIX_BITS,
            FARTHEST=FARTHEST, num_warps=min(8, max(4, chains // 128)),
        )  # fmt: skip
    return counts


@triton.jit
def _count_points_kernel(
    maps_ptr, thresholds_ptr, turns_ptr, shifts_ptr, chances_ptr, counts_ptr, STEPS: tl.constexpr,
    WARM_UP: tl.constexpr, SIZE: tl.constexpr, CHAINS: tl.constexpr, MAPS: tl.constexpr, BITS: tl.constexpr,
    FARTHEST: tl.constexpr,
):  # fmt: skip
    picture = tl.program_id(0).to(tl.int64)
    chains = tl.arange(0, CHAINS)
    maps_ptr += picture * MAPS * 6
    thresholds_ptr += picture * (MAPS - 1)
    shifts_ptr += picture * STEPS
    counts_ptr += picture * MAPS * SIZE * SIZE
    cos = tl.load(turns_ptr + picture * 2)
    sin = tl.load(turns_ptr + picture * 2 + 1)

    x = tl.zeros((CHAINS,), dtype=tl.int32)
    y = tl.zeros((CHAINS,), dtype=tl.int32)
    left = tl.full((CHAINS,), 2147483647, dtype=tl.int32)
    top = left
    right = -left
    bottom = -left
    for step in range(STEPS):
        x, y, chosen = _advanced(
            x, y, step, chains, maps_ptr, thresholds_ptr, shifts_ptr, chances_ptr, CHAINS, MAPS, BITS, FARTHEST
        )
        if step >= WARM_UP:
            across = _product_row(cos, -sin, x, y, BITS)
            down = _product_row(sin, cos, x, y, BITS)
            left = tl.minimum(left, across)
            right = tl.maximum(right, across)
            top = tl.minimum(top, down)
            bottom = tl.maximum(bottom, down)
    first_column = tl.min(left, axis=0)
    first_row = tl.min(top, axis=0)
    width = tl.max(right, axis=0) - first_column
    height = tl.max(bottom, axis=0) - first_row
    extent = tl.maximum(width, height)
    first_column -= (extent - width) // 2
    first_row -= (extent - height) // 2

    x = tl.zeros((CHAINS,), dtype=tl.int32)
    y = tl.zeros((CHAINS,), dtype=tl.int32)
    for step in range(STEPS):
        x, y, chosen = _advanced(
            x, y, step, chains, maps_ptr, thresholds_ptr, shifts_ptr, chances_ptr, CHAINS, MAPS, BITS, FARTHEST
        )
        if step >= WARM_UP:
            column = (_product_row(cos, -sin, x, y, BITS) - first_column) * SIZE // (extent + 1)
            row = (_product_row(sin, cos, x, y, BITS) - first_row) * SIZE // (extent + 1)
            tl.atomic_add(counts_ptr + (chosen * SIZE + row) * SIZE + column, 1, sem="relaxed")


@triton.jit
def _advanced(
    x, y, step, chains, maps_ptr, thresholds_ptr, shifts_ptr, chances_ptr, CHAINS: tl.constexpr, MAPS: tl.constexpr,
    BITS: tl.constexpr, FARTHEST: tl.constexpr,
):  # fmt: skip
    chance = (tl.load(chances_ptr + step * CHAINS + chains) + tl.load(shifts_ptr + step)) & 65535
    chosen = tl.zeros((CHAINS,), dtype=tl.int32)
    for which in tl.static_range(MAPS - 1):
        chosen += (chance >= tl.load(thresholds_ptr + which)).to(tl.int32)
    parameters = maps_ptr + chosen * 6
    next_x = _product_row(tl.load(parameters), tl.load(parameters + 1), x, y, BITS) + tl.load(parameters + 4)
    next_y = _product_row(tl.load(parameters + 2), tl.load(parameters + 3), x, y, BITS) + tl.load(parameters + 5)
    next_x = tl.minimum(tl.maximum(next_x, -FARTHEST), FARTHEST)
    next_y = tl.minimum(tl.maximum(next_y, -FARTHEST), FARTHEST)
    return next_x, next_y, chosen


@triton.jit
def _product_row(a, b, x, y, BITS: tl.constexpr):
    return (a * x + b * y + (1 << (BITS - 1))) >> BITS
