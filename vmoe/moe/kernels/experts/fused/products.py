"""Products of the experts' rows and weights. The library computes equal shares of rows, Triton all else.

R rows in tiles of one expert each. Without shares an expert's rows start at a multiple of the tile's height, and tiles
without a row are not computed.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vmoe.moe.kernels.experts.fused.owners import RowOwners
from vmoe.moe.kernels.launches import launch
from vmoe.moe.kernels.sizes import ALIGNMENT, cdiv, columns_of


class Tile(NamedTuple):
    """The tile sizes of one of Triton's products.

    Attributes:
        rows: Height of a tile of the result.
        columns: Its width.
        depth: The step along the sum.
        warps: Warps per program.
        stages: Steps that are loaded ahead.
        programs: Programs per multiprocessor, each of which takes tile after tile; 0 for one program per tile.
        parts: In how many parts of the columns a result is stored. More parts need fewer registers.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 0
    parts: int = 1


# By the size of the type: the fastest of a dozen on an H200 over S/16, B/16 and L/16. Tiles of rows are ALIGNMENT high,
# so no tile holds two experts; the free rows up to the next expert are computed too.
ROW_TILES = {2: Tile(ALIGNMENT, 128, 64, 4, 3, 2, 4), 4: Tile(ALIGNMENT, 64, 32, 4, 3)}
WEIGHT_TILES = {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)}


def product(x_RD: Tensor, weight: Tensor, owners: RowOwners, out_RN: Tensor, transposed: bool) -> None:
    """Rows times weights: x @ weight.T with weight (E, N, D) if `transposed`, else x @ weight with weight (E, D, N)."""
    if owners.share:
        # equal shares are one batched product of the library
        x_ESD = x_RD.view(owners.num_experts, owners.share, -1)
        factor = weight.transpose(1, 2) if transposed else weight
        torch.bmm(x_ESD, factor, out=out_RN.view(owners.num_experts, owners.share, -1))
        return
    tile = ROW_TILES[x_RD.dtype.itemsize]
    num_rows, depth = x_RD.shape
    width = out_RN.shape[1]
    num_columns = cdiv(width, tile.columns)
    weight_block = [tile.columns, tile.depth] if transposed else [tile.depth, tile.columns]
    launch(
        _rows_by_weights, _product_grid(tile, num_rows, num_columns, x_RD.device),
        (
            _blocks(x_RD, [tile.rows, tile.depth]), _blocks(weight.flatten(0, 1), weight_block),
            _blocks(out_RN, [tile.rows, tile.columns // tile.parts]), owners.starts_E, owners.counts_E,
        ),
        (
            owners.num_experts, depth, width, num_columns, transposed, tile.rows, tile.columns, tile.depth, tile.parts,
            _precision(x_RD.dtype), columns_of(owners.num_experts), tile.programs > 0,
        ),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def weight_gradient(left_RM: Tensor, right_RN: Tensor, owners: RowOwners, out_EMN: Tensor) -> None:
    """left.T @ right over each expert's rows. Free rows must be zeros in one of them and finite in the other."""
    num_experts, height, width = out_EMN.shape
    if owners.share:
        left_EMS = left_RM.view(num_experts, owners.share, height).transpose(1, 2)
        _bmm_into(out_EMN, left_EMS, right_RN.view(num_experts, owners.share, width))
        return
    tile = WEIGHT_TILES[left_RM.dtype.itemsize]
    num_columns = cdiv(width, tile.columns)
    grid = (cdiv(height, tile.rows) * num_columns, num_experts)
    launch(
        _weight_gradient, grid,
        (
            _blocks(left_RM, [tile.depth, tile.rows]), _blocks(right_RN, [tile.depth, tile.columns]), out_EMN,
            owners.starts_E, owners.counts_E,
        ),
        (height, width, num_columns, tile.rows, tile.columns, tile.depth, _precision(left_RM.dtype)),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _bmm_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.bmm(left, right, out=out)
    elif left.is_cuda:  # accumulated in float32 anyway, so the wider result costs no cast
        torch.bmm(left, right, out_dtype=out.dtype, out=out)
    else:
        out.copy_(torch.bmm(left, right))


def _product_grid(tile: Tile, num_rows: int, num_columns: int, device: torch.device) -> tuple[int]:
    num_tiles = num_rows // tile.rows * num_columns
    return (min(num_tiles, tile.programs * _multiprocessors(device)) if tile.programs else num_tiles,)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _blocks(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, block)


def _precision(dtype: torch.dtype) -> str:
    """Triton's name for how float32 is multiplied.

    Three tf32 products are more accurate than the products in float32, and faster: the forward pass's took 65 times as
    long on an H200, the gradients' 1.5 times.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@triton.jit
def _tiles_of_experts(starts, counts, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """For each expert: its number, its first row, its number of tiles with a row, and the running sum of these."""
    each = tl.arange(0, EXPERTS)
    tiles = (tl.load(counts + each, mask=each < num_experts, other=0) + ROWS - 1) // ROWS
    start = tl.load(starts + each, mask=each < num_experts, other=0)
    return each, start, tiles, tl.cumsum(tiles, 0)


@triton.jit
def _tile_at(index, each, start_of, tiles_of, end_of, num_tiles, num_columns, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """(expert, first row, tile of columns) of a tile: GROUP tiles of rows go through all columns together, for L2."""
    first = index // (GROUP * num_columns) * GROUP
    height = tl.minimum(num_tiles - first, GROUP)
    within = index % (GROUP * num_columns)
    tile = first + within % height
    expert = tl.sum((end_of <= tile).to(tl.int32))
    row_of = start_of + (tile - end_of + tiles_of) * ROWS
    return expert, tl.sum(tl.where(each == expert, row_of, 0)), within // height


@triton.jit
def _halves(tile, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def _cut(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """The columns in 1, 2 or 4 parts."""
    parts = (tile,) if PARTS == 1 else _halves(tile, ROWS, COLUMNS // 2)
    if PARTS == 4:
        parts = _halves(parts[0], ROWS, COLUMNS // 4) + _halves(parts[1], ROWS, COLUMNS // 4)
    return parts


@triton.jit
def _rows_by_weights(
    x_blocks, weight_blocks, out_blocks, starts, counts, num_experts, depth, width, num_columns,
    TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr,
    PRECISION: tl.constexpr, EXPERTS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    each, start_of, tiles_of, end_of = _tiles_of_experts(starts, counts, num_experts, ROWS, EXPERTS)
    num_tiles = tl.sum(tiles_of)
    # the grid allows for all rows; only the device knows the number of tiles in use
    for index in tl.range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0), flatten=FLATTEN):
        expert, row, column_tile = _tile_at(index, each, start_of, tiles_of, end_of, num_tiles, num_columns, ROWS, 8)
        column = column_tile * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in tl.range(0, depth, DEPTH):
            x = x_blocks.load([row, k])
            # past the depth x is zero, so the weights that are read there do not matter
            if TRANSPOSED:
                weight = weight_blocks.load([expert * width + column, k]).T
            else:
                weight = weight_blocks.load([expert * depth + k, column])
            total = tl.dot(x, weight, total, input_precision=PRECISION)
        parts = _cut(total, ROWS, COLUMNS, PARTS)
        for part in tl.static_range(PARTS):
            out_blocks.store([row, column + part * (COLUMNS // PARTS)], parts[part].to(out_blocks.dtype))


@triton.jit
def _weight_gradient(
    left_blocks, right_blocks, out, starts, counts, height, width, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    row, column = tl.program_id(0) // num_columns * ROWS, tl.program_id(0) % num_columns * COLUMNS
    start = tl.load(starts + expert)
    end = start + tl.load(counts + expert)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for k in tl.range(start, end, DEPTH):
        total = tl.dot(left_blocks.load([k, row]).T, right_blocks.load([k, column]), total, input_precision=PRECISION)
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    at = out + expert.to(tl.int64) * height * width + rows[:, None].to(tl.int64) * width + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(rows < height)[:, None] & (columns < width)[None, :])
