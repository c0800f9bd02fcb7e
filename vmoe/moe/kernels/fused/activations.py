"""The activation and its gradient as kernels of their own, beside products of a library.

The same results as `products.first_layer` and `products.hidden_gradient`, for types whose products are not ours.
"""

import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.kernels.fused.gelu import gelu_and_slope
from vmoe.moe.kernels.fused.segments import Segments, expert_of
from vmoe.moe.kernels.fused.sizes import cdiv, next_power_of_2

TILE_ROWS, ROWS, COLUMNS = 128, 8, 256


def activate(
    pre_RH: Tensor, bias_EH: Tensor | None, weight_R: Tensor, segments: Segments, tanh: bool, act_RH: Tensor
) -> None:
    """Weighted activations of the experts' rows: act = weight * gelu(pre + bias)."""
    num_rows, width = pre_RH.shape
    num_experts = segments.counts_E.shape[0]
    _activate[(num_rows // TILE_ROWS, cdiv(width, COLUMNS))](
        pre_RH, bias_EH, weight_R, act_RH, segments.starts_E, segments.counts_E, num_experts, segments.share, width,
        **_meta(bias_EH, segments, tanh, num_experts),
    )  # fmt: skip


def activation_gradient(
    grad_act_RH: Tensor, bias_EH: Tensor | None, weight_R: Tensor, pre_RH: Tensor, segments: Segments, tanh: bool,
    weight_parts_RP: Tensor, bias_parts_MH: Tensor,
) -> None:  # fmt: skip
    """Turns the gradient of gelu(pre + bias), before weights, into that of pre, in place.

    Args:
        grad_act_RH: The gradient.
        bias_EH: The bias or None.
        weight_R: The combine weight of each row.
        pre_RH: The first layer's results.
        segments: Whose rows they are.
        tanh: Which GELU.
        weight_parts_RP: Takes parts of the combine weights' gradients, as many a row as `parts_of` says.
        bias_parts_MH: Takes parts of the bias's gradient, one a TILE_ROWS rows.
    """
    num_rows, width = pre_RH.shape
    num_experts = segments.counts_E.shape[0]
    _activation_gradient[(num_rows // TILE_ROWS, cdiv(width, COLUMNS))](
        grad_act_RH, bias_EH, weight_R, pre_RH, weight_parts_RP, bias_parts_MH,
        segments.starts_E, segments.counts_E, num_experts, segments.share, width,
        **_meta(bias_EH, segments, tanh, num_experts),
    )  # fmt: skip


def parts_of(width: int) -> tuple[int, int]:
    """(rows a part of the bias's gradient, parts of a combine weight's gradient) of `activation_gradient`."""
    return TILE_ROWS, cdiv(width, COLUMNS)


def _meta(bias_EH: Tensor | None, segments: Segments, tanh: bool, num_experts: int) -> dict[str, object]:
    return {
        "HAS_BIAS": bias_EH is not None, "TANH": tanh, "HAS_SHARE": segments.share > 0, "TILE": TILE_ROWS, "ROWS": ROWS,
        "COLUMNS": COLUMNS, "EXPERTS": max(16, next_power_of_2(num_experts)), "num_warps": 8,
    }  # fmt: skip


@triton.jit
def _activate(
    pre, bias, weight_of_row, act, starts, counts, num_experts, share, width, HAS_BIAS: tl.constexpr,
    TANH: tl.constexpr, HAS_SHARE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * TILE
    expert, end = expert_of(first, starts, counts, num_experts, share, HAS_SHARE, EXPERTS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = (column < width)[None, :]
    added = tl.zeros((1, COLUMNS), dtype=tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + expert * width + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    # free rows of a share get zeros, because later sums run over them
    stop = TILE
    if not HAS_SHARE:
        stop = tl.where(first < end, TILE, 0)
    for step in range(0, stop, ROWS):
        row = first + step + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        inside = (row < end)[:, None] & is_column
        value, _ = gelu_and_slope(tl.load(pre + at, mask=inside, other=0.0).to(tl.float32) + added, TANH)
        weight = tl.load(weight_of_row + row, mask=row < end, other=0.0)[:, None]
        tl.store(act + at, (value * weight).to(act.dtype.element_ty), mask=is_column)


@triton.jit
def _activation_gradient(
    grad, bias, weight_of_row, pre, weight_parts, bias_parts, starts, counts, num_experts, share, width,
    HAS_BIAS: tl.constexpr, TANH: tl.constexpr, HAS_SHARE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * TILE
    expert, end = expert_of(first, starts, counts, num_experts, share, HAS_SHARE, EXPERTS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = (column < width)[None, :]
    added = tl.zeros((1, COLUMNS), dtype=tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + expert * width + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(0, TILE, ROWS):
        row = first + step + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * width + column[None, :]
        inside = (row < end)[:, None] & is_column
        value, slope = gelu_and_slope(tl.load(pre + at, mask=inside, other=0.0).to(tl.float32) + added, TANH)
        grad_act = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_of_row + row, mask=row < end, other=0.0)[:, None]
        tl.store(weight_parts + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1), tl.sum(grad_act * value, 1))
        grad_pre = grad_act * slope * weight
        tl.store(grad + at, grad_pre.to(grad.dtype.element_ty), mask=is_column)
        total += grad_pre
    tile = tl.program_id(0).to(tl.int64)
    tl.store(bias_parts + tile * width + column, tl.sum(total, 0), mask=column < width)
