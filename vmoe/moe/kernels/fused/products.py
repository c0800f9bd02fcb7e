"""Products of the experts' rows and weights, by the library or with the activation and its gradient in their epilogues.

R rows in tiles of one expert each; the rows of an expert start at a multiple of the tile's height. An expert has a
`share` of rows of its own or, with share 0, starts where `starts_E` says. Tiles without a row are not computed.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vmoe.moe.kernels.fused.gelu import gelu_and_slope
from vmoe.moe.kernels.fused.segments import Segments
from vmoe.moe.kernels.fused.sizes import cdiv, next_power_of_2


class Tile(NamedTuple):
    """How a product of ours is cut up.

    Attributes:
        rows: Height of a tile of the result; 128 or 64, so that a tile holds no two experts (see `ranks.ALIGNMENT`).
        columns: Its width.
        depth: The step along the sum.
        warps: Of a program.
        stages: Steps that are loaded ahead.
        programs: Running on a multiprocessor, each taking tile after tile; 0 for one program a tile.
        parts: Of the columns in the epilogue, one after another so that the registers suffice.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 0
    parts: int = 1


# By the job and the size of the type; None: the library's product with the activation as its own kernel
TILES = {
    "first": {2: None, 4: None},
    "hidden": {2: None, 4: None},
    "plain": {2: Tile(128, 256, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
    "weights": {2: Tile(128, 256, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
}


def tile_of(job: str, dtype: torch.dtype) -> Tile | None:
    """The tile for a job and a type of operands."""
    return TILES[job][dtype.itemsize]


def first_layer(
    x_RD: Tensor, weight_EHD: Tensor, bias_EH: Tensor | None, weight_R: Tensor, segments: Segments, tanh: bool,
    tile: Tile, pre_RH: Tensor | None, act_RH: Tensor,
) -> None:  # fmt: skip
    """Layer and activation: act = weight * gelu(pre), pre = x @ weight.T + bias; `pre_RH` is None if not wanted.

    Writes all rows of tiles that have one.
    """
    _rows_by_weights(x_RD, weight_EHD, bias_EH, weight_R, segments, pre_RH, act_RH, True, True, tanh, tile)


def product(x_RD: Tensor, weight: Tensor, segments: Segments, out_RN: Tensor, transposed: bool) -> None:
    """Rows times weights: x @ weight.T with weight (E, N, D) if `transposed`, else x @ weight with weight (E, D, N)."""
    if segments.share:
        num_experts = weight.shape[0]
        x_ESD = x_RD.view(num_experts, segments.share, -1)
        factor = weight.transpose(1, 2) if transposed else weight
        torch.bmm(x_ESD, factor, out=out_RN.view(num_experts, segments.share, -1))
    else:
        _rows_by_weights(
            x_RD, weight, None, None, segments, None, out_RN, transposed, False, False, tile_of("plain", x_RD.dtype)
        )


def hidden_gradient(
    grad_RO: Tensor, weight_EOH: Tensor, bias_EH: Tensor | None, weight_R: Tensor, pre_RH: Tensor, segments: Segments,
    tanh: bool, tile: Tile, grad_pre_RH: Tensor, weight_parts_RP: Tensor, bias_parts_MH: Tensor,
) -> None:  # fmt: skip
    """Through the second layer and the activation.

    Args:
        grad_RO: Gradients of the combined results, not weighted.
        weight_EOH: The second layer.
        bias_EH: What `pre_RH` lacks, or None.
        weight_R: The combine weight of each row.
        pre_RH: Before the activation.
        segments: Whose rows they are.
        tanh: Which GELU.
        tile: How to cut it up.
        grad_pre_RH: Takes the gradient of `pre_RH` in tiles that have a row, zero where there is no choice.
        weight_parts_RP: Takes parts of the combine weights' gradients, one a tile of columns.
        bias_parts_MH: Takes parts of the bias's gradient, one a tile of rows.
    """
    num_rows, width = pre_RH.shape
    num_experts, depth, _ = weight_EOH.shape
    num_columns = cdiv(width, tile.columns)
    _hidden_gradient[_grid(tile, num_rows, num_columns, grad_RO.device)](
        _blocks(grad_RO, [tile.rows, tile.depth]), _blocks(weight_EOH.flatten(0, 1), [tile.depth, tile.columns]),
        bias_EH, weight_R, pre_RH, _blocks(grad_pre_RH, [tile.rows, tile.columns // tile.parts]), weight_parts_RP,
        bias_parts_MH, segments.starts_E, segments.counts_E, num_experts, segments.share, depth, width, num_columns,
        HAS_BIAS=bias_EH is not None, TANH=tanh, HAS_SHARE=segments.share > 0,
        **_meta(tile, grad_RO.dtype, num_experts),
    )  # fmt: skip


def parts_of(tile: Tile, width: int) -> tuple[int, int]:
    """(rows a part of the bias's gradient, parts of a combine weight's gradient) of `hidden_gradient`."""
    return tile.rows, cdiv(width, tile.columns)


def weight_gradient(left_RM: Tensor, right_RN: Tensor, segments: Segments, out_EMN: Tensor) -> None:
    """left.T @ right over each expert's rows; rows without a choice must hold zeros in one and no NaN in the other."""
    num_experts, height, width = out_EMN.shape
    if segments.share:
        left_ESM = left_RM.view(num_experts, segments.share, height)
        right_ESN = right_RN.view(num_experts, segments.share, width)
        _bmm_into(out_EMN, left_ESM.transpose(1, 2), right_ESN)
        return
    tile = tile_of("weights", left_RM.dtype)
    num_columns = cdiv(width, tile.columns)
    grid = (cdiv(height, tile.rows) * num_columns, num_experts)
    _weight_gradient[grid](
        _blocks(left_RM, [tile.depth, tile.rows]), _blocks(right_RN, [tile.depth, tile.columns]), out_EMN,
        segments.starts_E, segments.counts_E, height, width, num_columns, ROWS=tile.rows, COLUMNS=tile.columns,
        DEPTH=tile.depth, PRECISION=_precision(left_RM.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _bmm_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    if out.dtype == left.dtype:
        torch.bmm(left, right, out=out)
    elif left.is_cuda:  # accumulated in float32 anyway, so the wider result costs no cast
        torch.ops.aten.bmm.dtype_out(left, right, out.dtype, out=out)
    else:
        out.copy_(torch.bmm(left, right))


def _rows_by_weights(x_RD, weight, bias, weight_R, segments, pre, out, transposed, gelu, tanh, tile) -> None:
    num_rows, depth = x_RD.shape
    num_experts, width = weight.shape[0], out.shape[1]
    num_columns = cdiv(width, tile.columns)
    weight_block = [tile.columns, tile.depth] if transposed else [tile.depth, tile.columns]
    block = [tile.rows, tile.columns // tile.parts]
    _rows_by_weights_kernel[_grid(tile, num_rows, num_columns, x_RD.device)](
        _blocks(x_RD, [tile.rows, tile.depth]), _blocks(weight.flatten(0, 1), weight_block), bias, weight_R,
        None if pre is None else _blocks(pre, block), _blocks(out, block), segments.starts_E, segments.counts_E,
        num_experts, segments.share, depth, width, num_columns, TRANSPOSED=transposed,
        HAS_BIAS=bias is not None, GELU=gelu, SAVE=pre is not None, TANH=tanh, HAS_SHARE=segments.share > 0,
        **_meta(tile, x_RD.dtype, num_experts),
    )  # fmt: skip


def _grid(tile: Tile, num_rows: int, num_columns: int, device: torch.device) -> tuple[int]:
    num_tiles = num_rows // tile.rows * num_columns
    return (min(num_tiles, tile.programs * _multiprocessors(device)) if tile.programs else num_tiles,)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _blocks(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, block)


def _meta(tile: Tile, dtype: torch.dtype, num_experts: int) -> dict[str, object]:
    return {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "PARTS": tile.parts,
        "PRECISION": _precision(dtype), "EXPERTS": max(16, next_power_of_2(num_experts)),
        "FLATTEN": tile.programs > 0, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    is_exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if is_exact else "tf32"


@triton.jit
def _tiles_of_experts(starts, counts, num_experts, share, HAS_SHARE: tl.constexpr, ROWS: tl.constexpr,
                      EXPERTS: tl.constexpr):  # fmt: skip
    """Of each expert: its number, first row, number of tiles with a row, and that of all experts up to it."""
    each = tl.arange(0, EXPERTS)
    tiles = (tl.load(counts + each, mask=each < num_experts, other=0) + ROWS - 1) // ROWS
    start = each * share if HAS_SHARE else tl.load(starts + each, mask=each < num_experts, other=0)
    return each, start, tiles, tl.cumsum(tiles, 0)


@triton.jit
def _place(index, each, start_of, tiles_of, end_of, num_tiles, num_columns, ROWS: tl.constexpr, GROUP: tl.constexpr):
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
def _rows_by_weights_kernel(
    x_blocks, weight_blocks, bias, weight_of_row, pre_blocks, out_blocks, starts, counts, num_experts, share, depth,
    width, num_columns, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, SAVE: tl.constexpr,
    TANH: tl.constexpr, HAS_SHARE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr, EXPERTS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    PART: tl.constexpr = COLUMNS // PARTS
    each, start_of, tiles_of, end_of = _tiles_of_experts(starts, counts, num_experts, share, HAS_SHARE, ROWS, EXPERTS)
    num_tiles = tl.sum(tiles_of)
    for index in tl.range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0), flatten=FLATTEN):
        expert, row, column_tile = _place(index, each, start_of, tiles_of, end_of, num_tiles, num_columns, ROWS, 8)
        column = column_tile * COLUMNS
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in tl.range(0, depth, DEPTH):
            x = x_blocks.load([row, k])
            # behind the depth x is filled with zeros, so what follows there in the weights does not matter
            if TRANSPOSED:
                weight = weight_blocks.load([expert * width + column, k]).T
            else:
                weight = weight_blocks.load([expert * depth + k, column])
            total = tl.dot(x, weight, total, input_precision=PRECISION)
        parts = _cut(total, ROWS, COLUMNS, PARTS)
        for part in tl.static_range(PARTS):
            value = parts[part]
            at = column + part * PART
            if HAS_BIAS:
                columns = at + tl.arange(0, PART)
                added = tl.load(bias + expert * width + columns, mask=columns < width, other=0.0)
                value += added.to(tl.float32)[None, :]
            if SAVE:
                pre_blocks.store([row, at], value.to(pre_blocks.dtype))
            if GELU:
                value, _ = gelu_and_slope(value, TANH)
                value *= tl.load(weight_of_row + row + tl.arange(0, ROWS))[:, None]
            out_blocks.store([row, at], value.to(out_blocks.dtype))


@triton.jit
def _hidden_gradient(
    grad_blocks, weight_blocks, bias, weight_of_row, pre, grad_pre_blocks, weight_parts, bias_parts, starts, counts,
    num_experts, share, depth, width, num_columns, HAS_BIAS: tl.constexpr, TANH: tl.constexpr, HAS_SHARE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    PART: tl.constexpr = COLUMNS // PARTS
    each, start_of, tiles_of, end_of = _tiles_of_experts(starts, counts, num_experts, share, HAS_SHARE, ROWS, EXPERTS)
    num_tiles = tl.sum(tiles_of)
    for index in tl.range(tl.program_id(0), num_tiles * num_columns, tl.num_programs(0), flatten=FLATTEN):
        expert, row, column_tile = _place(index, each, start_of, tiles_of, end_of, num_tiles, num_columns, ROWS, 8)
        column = column_tile * COLUMNS
        rows = row + tl.arange(0, ROWS)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in tl.range(0, depth, DEPTH):
            grad = grad_blocks.load([row, k])
            weight = weight_blocks.load([expert * depth + k, column])
            total = tl.dot(grad, weight, total, input_precision=PRECISION)
        weight_row = tl.load(weight_of_row + rows)
        weight_sum = tl.zeros((ROWS,), dtype=tl.float32)
        parts = _cut(total, ROWS, COLUMNS, PARTS)
        for part in tl.static_range(PARTS):
            grad_act = parts[part]
            columns = column + part * PART + tl.arange(0, PART)
            is_column = columns < width
            at = rows[:, None].to(tl.int64) * width + columns[None, :]
            before = tl.load(pre + at, mask=is_column[None, :], other=0.0).to(tl.float32)
            if HAS_BIAS:
                added = tl.load(bias + expert * width + columns, mask=is_column, other=0.0)
                before += added.to(tl.float32)[None, :]
            value, slope = gelu_and_slope(before, TANH)
            weight_sum += tl.sum(grad_act * value, 1)
            grad = grad_act * slope * weight_row[:, None]
            grad_pre_blocks.store([row, column + part * PART], grad.to(grad_pre_blocks.dtype))
            tl.store(bias_parts + (row // ROWS).to(tl.int64) * width + columns, tl.sum(grad, 0), mask=is_column)
        tl.store(weight_parts + rows.to(tl.int64) * num_columns + column_tile, weight_sum)


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
