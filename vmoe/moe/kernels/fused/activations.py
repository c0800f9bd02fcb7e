"""Bias and activation, and their gradient, beside the products of the library.

The activation is computed anew in the backward pass. R rows of width H in tiles of one expert each.
"""

import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.kernels.fused.gelu import gelu_and_slope
from vmoe.moe.kernels.fused.segments import Segments, expert_of
from vmoe.moe.kernels.fused.sizes import cdiv, columns_of

TILE_ROWS = 128  # of a program
_FORWARD = {"ROWS": 16, "COLUMNS": 128, "num_warps": 8}
_BACKWARD = {"ROWS": 2, "COLUMNS": 512, "num_warps": 4}


def activate(pre_RH: Tensor, bias_EH: Tensor | None, segments: Segments, tanh: bool, act_RH: Tensor) -> None:
    """Writes gelu(pre + bias) into `act_RH`, which may be `pre_RH`."""
    _activate[_grid(pre_RH, _FORWARD)](
        pre_RH, bias_EH, act_RH, segments.starts_E, segments.num_experts, segments.share, pre_RH.shape[1],
        **_meta(bias_EH, segments, tanh), **_FORWARD,
    )  # fmt: skip


def activation_gradient(
    grad_act_RH: Tensor, bias_EH: Tensor | None, pre_RH: Tensor, segments: Segments, tanh: bool, bias_parts_MH: Tensor
) -> None:
    """Turns the gradient of gelu(pre + bias) into that of pre, in place.

    `bias_parts_MH` takes parts of the bias's gradient, one every TILE_ROWS rows.
    """
    _activation_gradient[_grid(pre_RH, _BACKWARD)](
        grad_act_RH, bias_EH, pre_RH, bias_parts_MH, segments.starts_E, segments.num_experts, segments.share,
        pre_RH.shape[1], **_meta(bias_EH, segments, tanh), **_BACKWARD,
    )  # fmt: skip


def _grid(pre_RH: Tensor, tile: dict[str, int]) -> tuple[int, int]:
    return pre_RH.shape[0] // TILE_ROWS, cdiv(pre_RH.shape[1], tile["COLUMNS"])


def _meta(bias_EH: Tensor | None, segments: Segments, tanh: bool) -> dict[str, object]:
    return {
        "HAS_BIAS": bias_EH is not None, "TANH": tanh, "HAS_SHARE": segments.share > 0, "TILE": TILE_ROWS,
        "EXPERTS": columns_of(segments.num_experts),
    }  # fmt: skip


@triton.jit
def _bias(bias, starts, num_experts, share, width, column, HAS_SHARE: tl.constexpr, TILE: tl.constexpr,
          EXPERTS: tl.constexpr):  # fmt: skip
    """The bias of this program's expert in its columns, (1, columns)."""
    expert = expert_of(tl.program_id(0) * TILE, starts, num_experts, share, HAS_SHARE, EXPERTS)
    return tl.load(bias + expert * width + column, mask=column < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _activate(
    pre, bias, act, starts, num_experts, share, width, HAS_BIAS: tl.constexpr, TANH: tl.constexpr,
    HAS_SHARE: tl.constexpr, TILE: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = (column < width)[None, :]
    added = tl.zeros((1, COLUMNS), dtype=tl.float32)
    if HAS_BIAS:
        added = _bias(bias, starts, num_experts, share, width, column, HAS_SHARE, TILE, EXPERTS)
    for step in range(0, TILE, ROWS):
        row = tl.program_id(0) * TILE + step + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        value, _ = gelu_and_slope(tl.load(pre + at, mask=is_column, other=0.0).to(tl.float32) + added, TANH)
        tl.store(act + at, value.to(act.dtype.element_ty), mask=is_column)


@triton.jit
def _activation_gradient(
    grad, bias, pre, bias_parts, starts, num_experts, share, width, HAS_BIAS: tl.constexpr, TANH: tl.constexpr,
    HAS_SHARE: tl.constexpr, TILE: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = (column < width)[None, :]
    added = tl.zeros((1, COLUMNS), dtype=tl.float32)
    if HAS_BIAS:
        added = _bias(bias, starts, num_experts, share, width, column, HAS_SHARE, TILE, EXPERTS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(0, TILE, ROWS):
        row = tl.program_id(0) * TILE + step + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        _, slope = gelu_and_slope(tl.load(pre + at, mask=is_column, other=0.0).to(tl.float32) + added, TANH)
        grad_pre = tl.load(grad + at, mask=is_column, other=0.0).to(tl.float32) * slope
        tl.store(grad + at, grad_pre.to(grad.dtype.element_ty), mask=is_column)
        total += grad_pre
    if HAS_BIAS:
        at = bias_parts + tl.program_id(0).to(tl.int64) * width + column
        tl.store(at, tl.sum(total, 0), mask=column < width)
