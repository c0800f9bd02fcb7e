"""Products of the experts' rows and weights, with the activation and its gradient in their epilogues.

R rows in tiles of one expert each; the rows of an expert start at a multiple of the tile's height. An expert has a
`share` of rows of its own or, with share 0, starts where `starts_E` says. Tiles without a row are not computed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vmoe.moe.kernels.fused.gelu import gelu_and_slope
from vmoe.moe.kernels.fused.segments import Segments, expert_of


class Tile(NamedTuple):
    """Shape of a program's tile of the result (rows x columns), its step in depth, its warps and pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most


# Two programs fit a multiprocessor, so that one's epilogue runs beside the other's product
TILES = {
    "first": {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
    "hidden": {2: Tile(128, 128, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
    "plain": {2: Tile(128, 256, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
    "weights": {2: Tile(128, 256, 64, 8, 3), 4: Tile(64, 64, 32, 4, 3)},
}


def tile_of(job: str, dtype: torch.dtype) -> Tile:
    """The tile for a job and the size of its operands' type."""
    return TILES[job][dtype.itemsize]


def first_layer(
    x_RD: Tensor, weight_EHD: Tensor, bias_EH: Tensor | None, segments: Segments, tanh: bool,
    pre_RH: Tensor | None, act_RH: Tensor,
) -> None:  # fmt: skip
    """Layer and activation: act = gelu(pre), pre = x @ weight.T + bias; `pre_RH` is None where it is not wanted."""
    tile = tile_of("first", x_RD.dtype)
    _rows_by_weights(x_RD, weight_EHD, bias_EH, segments, pre_RH, act_RH, True, True, tanh, tile)


def product(x_RD: Tensor, weight: Tensor, segments: Segments, out_RN: Tensor, transposed: bool) -> None:
    """Rows times weights: x @ weight.T with weight (E, N, D) if `transposed`, else x @ weight with weight (E, D, N)."""
    if segments.share:
        num_experts = weight.shape[0]
        x_ESD = x_RD.view(num_experts, segments.share, -1)
        factor = weight.transpose(1, 2) if transposed else weight
        torch.bmm(x_ESD, factor, out=out_RN.view(num_experts, segments.share, -1))
    else:
        _rows_by_weights(
            x_RD, weight, None, segments, None, out_RN, transposed, False, False, tile_of("plain", x_RD.dtype)
        )


def hidden_gradient(
    grad_RO: Tensor, weight_EOH: Tensor, bias_EH: Tensor | None, weight_R: Tensor, pre_RH: Tensor, segments: Segments,
    tanh: bool, act_RH: Tensor, grad_pre_RH: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Through the second layer and the activation, with the activation computed anew.

    Args:
        grad_RO: Gradients of the combined results, not weighted.
        weight_EOH: The second layer.
        bias_EH: What `pre_RH` lacks, or None.
        weight_R: The combine weight of each row.
        pre_RH: Before the activation.
        segments: Whose rows they are.
        tanh: Which GELU.
        act_RH: Takes weight * gelu(pre), zero in tiles without a row.
        grad_pre_RH: Takes the gradient of `pre_RH`, zero in rows without a choice.

    Returns:
        Parts of the gradients of the combine weights, (R, P), and of the first bias, (tiles of rows, H).
    """
    tile = tile_of("hidden", grad_RO.dtype)
    num_rows, width = pre_RH.shape
    depth = grad_RO.shape[1]
    num_tiles, num_columns = num_rows // tile.rows, triton.cdiv(width, tile.columns)
    weight_parts = torch.empty(num_rows, num_columns, dtype=torch.float32, device=grad_RO.device)
    bias_parts = torch.empty(num_tiles, width, dtype=torch.float32, device=grad_RO.device)
    num_experts = weight_EOH.shape[0]
    _hidden_gradient[(num_tiles * num_columns,)](
        _blocks(grad_RO, [tile.rows, tile.depth]), _blocks(weight_EOH.flatten(0, 1), [tile.depth, tile.columns]),
        bias_EH, weight_R, pre_RH, act_RH, grad_pre_RH, weight_parts, bias_parts, segments.starts_E, segments.counts_E,
        num_experts, segments.share, depth, width, num_tiles, num_columns, HAS_BIAS=bias_EH is not None, TANH=tanh,
        HAS_SHARE=segments.share > 0, **_meta(tile, grad_RO.dtype, num_experts),
    )  # fmt: skip
    return weight_parts, bias_parts


def weight_gradient(left_RM: Tensor, right_RN: Tensor, segments: Segments, out_EMN: Tensor) -> None:
    """left.T @ right over each expert's rows; rows without a choice must hold zeros in one and no NaN in the other."""
    num_experts, height, width = out_EMN.shape
    if segments.share:
        left_ESM = left_RM.view(num_experts, segments.share, height)
        right_ESN = right_RN.view(num_experts, segments.share, width)
        _bmm_into(out_EMN, left_ESM.transpose(1, 2), right_ESN)
        return
    tile = tile_of("weights", left_RM.dtype)
    num_columns = triton.cdiv(width, tile.columns)
    grid = (triton.cdiv(height, tile.rows) * num_columns, num_experts)
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


def _rows_by_weights(x_RD, weight, bias, segments, pre, out, transposed, gelu, tanh, tile) -> None:
    num_rows, depth = x_RD.shape
    num_experts, width = weight.shape[0], out.shape[1]
    num_tiles, num_columns = num_rows // tile.rows, triton.cdiv(width, tile.columns)
    weight_block = [tile.columns, tile.depth] if transposed else [tile.depth, tile.columns]
    block = [tile.rows, tile.columns]
    _rows_by_weights_kernel[(num_tiles * num_columns,)](
        _blocks(x_RD, [tile.rows, tile.depth]), _blocks(weight.flatten(0, 1), weight_block), bias,
        _blocks(out if pre is None else pre, block), _blocks(out, block), segments.starts_E, segments.counts_E,
        num_experts, segments.share, depth, width, num_tiles, num_columns, TRANSPOSED=transposed,
        HAS_BIAS=bias is not None, GELU=gelu, SAVE=pre is not None, TANH=tanh, HAS_SHARE=segments.share > 0,
        **_meta(tile, x_RD.dtype, num_experts),
    )  # fmt: skip


def _blocks(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, block)


def _meta(tile: Tile, dtype: torch.dtype, num_experts: int) -> dict[str, object]:
    return {
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "PRECISION": _precision(dtype),
        "EXPERTS": max(16, triton.next_power_of_2(num_experts)), "num_warps": tile.warps, "num_stages": tile.stages,
        "maxnreg": tile.registers,
    }  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    is_exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if is_exact else "tf32"


@triton.jit
def _tile_of_program(num_tiles, num_columns, GROUP: tl.constexpr):
    """(tile of rows, tile of columns): GROUP tiles of rows go through all columns together, so that L2 serves both."""
    program = tl.program_id(0)
    first = program // (GROUP * num_columns) * GROUP
    height = tl.minimum(num_tiles - first, GROUP)
    within = program % (GROUP * num_columns)
    return first + within % height, within // height


@triton.jit
def _rows_by_weights_kernel(
    x_blocks, weight_blocks, bias, pre_blocks, out_blocks, starts, counts, num_experts, share, depth, width, num_tiles,
    num_columns, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, GELU: tl.constexpr, SAVE: tl.constexpr,
    TANH: tl.constexpr, HAS_SHARE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _tile_of_program(num_tiles, num_columns, 8)
    row, column = row_tile * ROWS, column_tile * COLUMNS
    expert, end = expert_of(row, starts, counts, num_experts, share, HAS_SHARE, EXPERTS)
    if row < end:
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in tl.range(0, depth, DEPTH):
            x = x_blocks.load([row, k])
            # behind the depth x is filled with zeros, so what follows there in the weights does not matter
            if TRANSPOSED:
                weight = weight_blocks.load([expert * width + column, k]).T
            else:
                weight = weight_blocks.load([expert * depth + k, column])
            total = tl.dot(x, weight, total, input_precision=PRECISION)
        if HAS_BIAS:
            columns = column + tl.arange(0, COLUMNS)
            total += tl.load(bias + expert * width + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
        if SAVE:
            pre_blocks.store([row, column], total.to(pre_blocks.dtype))
        if GELU:
            total, _ = gelu_and_slope(total, TANH)
        out_blocks.store([row, column], total.to(out_blocks.dtype))


@triton.jit
def _halves(tile, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def _hidden_gradient(
    grad_blocks, weight_blocks, bias, weight_of_row, pre, act, grad_pre, weight_parts, bias_parts, starts, counts,
    num_experts, share, depth, width, num_tiles, num_columns, HAS_BIAS: tl.constexpr, TANH: tl.constexpr,
    HAS_SHARE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _tile_of_program(num_tiles, num_columns, 8)
    row, column = row_tile * ROWS, column_tile * COLUMNS
    expert, end = expert_of(row, starts, counts, num_experts, share, HAS_SHARE, EXPERTS)
    rows = row + tl.arange(0, ROWS)
    PART: tl.constexpr = COLUMNS // 4
    if row < end:
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for k in tl.range(0, depth, DEPTH):
            grad = grad_blocks.load([row, k])
            weight = weight_blocks.load([expert * depth + k, column])
            total = tl.dot(grad, weight, total, input_precision=PRECISION)
        weight_row = tl.load(weight_of_row + rows)
        weight_sum = tl.zeros((ROWS,), dtype=tl.float32)
        # a quarter of the columns at a time, so that the registers suffice
        left, right = _halves(total, ROWS, COLUMNS // 2)
        quarters = _halves(left, ROWS, PART) + _halves(right, ROWS, PART)
        for quarter in tl.static_range(4):
            grad_act = quarters[quarter]
            columns = column + quarter * PART + tl.arange(0, PART)
            is_column = columns < width
            at = rows[:, None].to(tl.int64) * width + columns[None, :]
            before = tl.load(pre + at, mask=is_column[None, :], other=0.0).to(tl.float32)
            if HAS_BIAS:
                added = tl.load(bias + expert * width + columns, mask=is_column, other=0.0)
                before += added.to(tl.float32)[None, :]
            value, slope = gelu_and_slope(before, TANH)
            weight_sum += tl.sum(grad_act * value, 1)
            grad = grad_act * slope * weight_row[:, None]
            tl.store(act + at, (value * weight_row[:, None]).to(act.dtype.element_ty), mask=is_column[None, :])
            tl.store(grad_pre + at, grad.to(grad_pre.dtype.element_ty), mask=is_column[None, :])
            tl.store(bias_parts + row_tile.to(tl.int64) * width + columns, tl.sum(grad, 0), mask=is_column)
        tl.store(weight_parts + rows.to(tl.int64) * num_columns + column_tile, weight_sum)
    elif HAS_SHARE:
        each = column + tl.arange(0, COLUMNS)
        free = rows[:, None].to(tl.int64) * width + each[None, :]
        nothing = tl.zeros((ROWS, COLUMNS), dtype=act.dtype.element_ty)
        tl.store(act + free, nothing, mask=(each < width)[None, :])
        tl.store(grad_pre + free, nothing, mask=(each < width)[None, :])


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
