"""Bias and activation, and their gradient, between the matrix products.

The backward pass computes the activation again. R rows in tiles of one expert each; H the width after the activation,
F the width before it: H, or 2H with a gate.
"""

import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.kernels.experts.fused.functions import value_and_slope
from vmoe.moe.kernels.experts.fused.owners import RowOwners, expert_of
from vmoe.moe.kernels.experts.requirements import Form
from vmoe.moe.kernels.launches import launch
from vmoe.moe.kernels.sizes import TILE_ROWS, cdiv, columns_of, next_power_of_2

_FORWARD_TILE = {"elements": 2048, "columns": 128}  # of a step; columns at most
_BACKWARD_TILE = {"elements": 1024, "columns": 512}


def activate(pre_RF: Tensor, bias_EF: Tensor | None, owners: RowOwners, form: Form, act_RH: Tensor) -> None:
    """Writes the activation of pre + bias into `act_RH`. Without a gate that may be `pre_RF` itself."""
    rows, columns = _tile(act_RH.shape[1], **_FORWARD_TILE)
    launch(
        _activate, _grid(act_RH, columns), (pre_RF, bias_EF, act_RH, owners.starts_E),
        (*_numbers_of_kernel(act_RH, bias_EF, owners, form), rows, columns), num_warps=8,
    )  # fmt: skip


def activation_gradient(
    grad_act_RH: Tensor, bias_EF: Tensor | None, pre_RF: Tensor, owners: RowOwners, form: Form,
    bias_parts_MF: Tensor, grad_pre_RF: Tensor,
) -> None:  # fmt: skip
    """Writes the gradient of pre into `grad_pre_RF`. That may be `pre_RF` itself, or without a gate `grad_act_RH`.

    `bias_parts_MF` takes parts of the bias's gradient, one per TILE_ROWS rows.
    """
    rows, columns = _tile(grad_act_RH.shape[1], **_BACKWARD_TILE)
    launch(
        _activation_gradient, _grid(grad_act_RH, columns),
        (grad_act_RH, bias_EF, pre_RF, bias_parts_MF, grad_pre_RF, owners.starts_E),
        (*_numbers_of_kernel(grad_act_RH, bias_EF, owners, form), rows, columns), num_warps=4,
    )  # fmt: skip


def _tile(width: int, elements: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a step of `elements` values. A layer with fewer columns gets more rows."""
    columns = min(columns, max(16, next_power_of_2(width)))  # at least 16: no step has more rows than a tile
    return elements // columns, columns


def _grid(act_RH: Tensor, columns: int) -> tuple[int, int]:
    return act_RH.shape[0] // TILE_ROWS, cdiv(act_RH.shape[1], columns)


def _numbers_of_kernel(act_RH: Tensor, bias_EF: Tensor | None, owners: RowOwners, form: Form) -> tuple[int | str, ...]:
    """The arguments of both kernels from `num_experts` to EXPERTS."""
    return (
        owners.num_experts, owners.share, act_RH.shape[1], bias_EF is not None, form.function, form.gate,
        owners.share > 0, TILE_ROWS, columns_of(owners.num_experts),
    )  # fmt: skip


@triton.jit
def _load_float(at, inside):
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["share"])
def _activate(
    pre, bias, act, starts, num_experts, share, width, HAS_BIAS: tl.constexpr, FUNCTION: tl.constexpr,
    GATE: tl.constexpr, HAS_SHARE: tl.constexpr, TILE: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    is_column = column < width
    gate_at = width if GATE == "last" else 0  # where the half that goes through the function begins
    wide = width if GATE == "" else 2 * width
    added = tl.zeros((1, COLUMNS), dtype=tl.float32)
    added_other = added
    if HAS_BIAS:
        expert = expert_of(tl.program_id(0) * TILE, starts, num_experts, share, HAS_SHARE, EXPERTS)
        added = _load_float(bias + expert * wide + gate_at + column, is_column)
        if GATE != "":
            added_other = _load_float(bias + expert * wide + (width - gate_at) + column, is_column)
    for step in range(0, TILE, ROWS):
        row = (tl.program_id(0) * TILE + step + tl.arange(0, ROWS))[:, None].to(tl.int64)
        at = pre + row * wide + column
        value, _ = value_and_slope(_load_float(at + gate_at, is_column) + added, FUNCTION)
        if GATE != "":
            value *= _load_float(at + (width - gate_at), is_column) + added_other
        tl.store(act + row * width + column, value.to(act.dtype.element_ty), mask=is_column)


@triton.jit(do_not_specialize=["share"])
def _activation_gradient(
    grad, bias, pre, bias_parts, grad_pre, starts, num_experts, share, width, HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr, GATE: tl.constexpr, HAS_SHARE: tl.constexpr, TILE: tl.constexpr, EXPERTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    is_column = column < width
    gate_at = width if GATE == "last" else 0
    wide = width if GATE == "" else 2 * width
    added = tl.zeros((1, COLUMNS), dtype=tl.float32)
    added_other = added
    if HAS_BIAS:
        expert = expert_of(tl.program_id(0) * TILE, starts, num_experts, share, HAS_SHARE, EXPERTS)
        added = _load_float(bias + expert * wide + gate_at + column, is_column)
        if GATE != "":
            added_other = _load_float(bias + expert * wide + (width - gate_at) + column, is_column)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    total_other = total
    for step in range(0, TILE, ROWS):
        row = (tl.program_id(0) * TILE + step + tl.arange(0, ROWS))[:, None].to(tl.int64)
        at = row * wide + column
        value, slope = value_and_slope(_load_float(pre + at + gate_at, is_column) + added, FUNCTION)
        grad_value = _load_float(grad + row * width + column, is_column)
        if GATE != "":
            other_at = at + (width - gate_at)
            grad_other = grad_value * value
            grad_value *= _load_float(pre + other_at, is_column) + added_other
            tl.store(grad_pre + other_at, grad_other.to(grad_pre.dtype.element_ty), mask=is_column)
            total_other += grad_other
        grad_value *= slope
        tl.store(grad_pre + at + gate_at, grad_value.to(grad_pre.dtype.element_ty), mask=is_column)
        total += grad_value
    if HAS_BIAS:
        at = bias_parts + tl.program_id(0).to(tl.int64) * wide + column
        tl.store(at + gate_at, tl.sum(total, 0)[None, :], mask=is_column)
        if GATE != "":
            tl.store(at + (width - gate_at), tl.sum(total_other, 0)[None, :], mask=is_column)
