"""The experts' MLP, forward and backward, as one operator each.

T tokens of width D with K choices; E experts of hidden width H, before the activation F (2H with a gate); R rows of the
buffer that experts compute.
"""

import torch
from torch import Tensor

from vmoe.moe.kernels.fused import activations, products, rows
from vmoe.moe.kernels.fused.activations import Form
from vmoe.moe.kernels.fused.ranks import ALIGNMENT
from vmoe.moe.kernels.fused.segments import Segments
from vmoe.moe.kernels.fused.sizes import cdiv
from vmoe.moe.kernels.operators import operator

CHUNK_BYTES = 256 * 2**20  # where memory is to be saved, more of the hidden layer than this is computed in parts


def num_rows_of(num_choices: int, num_experts: int, share: int) -> int:
    """R: the experts' shares or, with share 0, room for every choice with each expert's rows aligned."""
    return num_experts * share if share else align(num_choices) + num_experts * ALIGNMENT


def align(num_rows: int) -> int:
    """The next multiple of ALIGNMENT."""
    return cdiv(num_rows, ALIGNMENT) * ALIGNMENT


def _forward(
    x_TD: Tensor, row_TK: Tensor, chosen_TK: Tensor, weights_TK: Tensor, starts_E: Tensor | None,
    counts_E: Tensor | None, weight1_EFD: Tensor, bias1_EF: Tensor | None, weight2_EOH: Tensor,
    bias2_EO: Tensor | None, cast1_EFD: Tensor, cast2_EOH: Tensor, share: int, function: str, gate: str,
    is_training: bool, recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Dispatch, both layers and combine.

    Args:
        x_TD: Tokens, of any floating type.
        row_TK: The row of each choice, -1 for none.
        chosen_TK: The expert of each choice.
        weights_TK: Its combine weight.
        starts_E: See `Segments`, like `counts_E` and `share`.
        counts_E: Number of each expert's rows.
        weight1_EFD: The parameter, for which only the gradient is computed; like `weight2_EOH`.
        bias1_EF: Bias or None.
        weight2_EOH: The parameter.
        bias2_EO: Bias or None.
        cast1_EFD: The weights in the type that is computed in, like `cast2_EOH`; no gradient flows to them.
        cast2_EOH: The second layer's.
        share: Rows an expert.
        function: See `Form`, like `gate`.
        gate: Which half of the first layer's results gates the other.
        is_training: Whether to keep what the backward pass needs.
        recompute: Whether the activations are not kept, but computed anew there.

    Returns:
        The result (T, O) and, for the backward pass, empty unless `is_training`: the choice in each row (R,), the
        tokens' rows (R, D), the first layer's results (R, F) without bias, the activations (R, H) unless `recompute`,
        the second layer's results (R, O) without bias.
    """
    num_experts, width_F, width_D = cast1_EFD.shape
    width_O, width_H = cast2_EOH.shape[1:]
    cast1_EFD, cast2_EOH = cast1_EFD.contiguous(), cast2_EOH.contiguous()
    segments = Segments(num_experts, share, starts_E, counts_E)
    num_rows = num_rows_of(row_TK.numel(), num_experts, share)
    with torch.cuda.device_of(x_TD):
        x_RD = cast1_EFD.new_empty(num_rows, width_D)
        choice_R = rows.scatter(x_TD, row_TK, x_RD)
        pre_RF = cast1_EFD.new_empty(num_rows, width_F)
        products.product(x_RD, cast1_EFD, segments, pre_RF, transposed=True)
        act_RH = cast1_EFD.new_empty(num_rows, width_H) if is_training or gate else pre_RF
        activations.activate(pre_RF, bias1_EF, segments, Form(function, gate), act_RH)
        y_RO = cast1_EFD.new_empty(num_rows, width_O)
        products.product(act_RH, cast2_EOH, segments, y_RO, transposed=True)
        y_TO = cast1_EFD.new_empty(x_TD.shape[0], width_O)
        rows.combine(y_RO, row_TK, chosen_TK, weights_TK, bias2_EO, y_TO)
    if is_training:
        return y_TO, choice_R, x_RD, pre_RF, act_RH.new_empty(0, width_H) if recompute else act_RH, y_RO
    return y_TO, choice_R.new_empty(0), *(y_TO.new_empty(0, width) for width in (width_D, width_F, width_H, width_O))


def _fake(x_TD, row_TK, chosen_TK, weights_TK, starts_E, counts_E, weight1, bias1, weight2, bias2, cast1, cast2,
          share, function, gate, is_training, recompute):  # fmt: skip
    num_experts, width_F, width_D = cast1.shape
    width_O, width_H = cast2.shape[1:]
    num_rows = num_rows_of(row_TK.numel(), num_experts, share) if is_training else 0
    y_TO = cast1.new_empty(x_TD.shape[0], width_O)
    choice_R = x_TD.new_empty(num_rows, dtype=torch.int32)
    x_RD, pre_RF, y_RO = (cast1.new_empty(num_rows, width) for width in (width_D, width_F, width_O))
    return y_TO, choice_R, x_RD, pre_RF, cast1.new_empty(0 if recompute else num_rows, width_H), y_RO


def _gradient(
    grad_TO: Tensor, x_TD: Tensor, row_TK: Tensor, weights_TK: Tensor, starts_E: Tensor | None,
    counts_E: Tensor | None, weight1_EFD: Tensor, bias1_EF: Tensor | None, weight2_EOH: Tensor,
    bias2_EO: Tensor | None, cast1_EFD: Tensor, cast2_EOH: Tensor, choice_R: Tensor, x_RD: Tensor, pre_RF: Tensor,
    act_RH: Tensor, y_RO: Tensor, share: int, function: str, gate: str,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, the combine weights, weight1, bias1, weight2 and bias2 (those of no bias are empty)."""
    num_experts = cast1_EFD.shape[0]
    num_rows, width_F = pre_RF.shape
    form, width_H = Form(function, gate), cast2_EOH.shape[2]
    cast1_EFD, cast2_EOH = cast1_EFD.contiguous(), cast2_EOH.contiguous()
    segments = Segments(num_experts, share, starts_E, counts_E)
    grad_weight1, grad_weight2 = torch.empty_like(weight1_EFD), torch.empty_like(weight2_EOH)
    grad_bias1, grad_bias2 = (
        x_TD.new_empty(0) if like is None else torch.empty_like(like) for like in (bias1_EF, bias2_EO)
    )
    with torch.cuda.device_of(x_TD):
        grad_RO = torch.empty_like(y_RO)
        grad_weights_TK = rows.combine_gradient(
            grad_TO.contiguous(), choice_R, weights_TK, y_RO, bias2_EO, segments, grad_RO, grad_bias2
        )
        # x's gradients may take the place of the rows' that have served
        grad_RD = grad_RO if x_RD.shape == y_RO.shape else torch.empty_like(x_RD)
        parts = grad_weights_TK.new_empty(num_rows // activations.TILE_ROWS, width_F)
        chunks = _chunks(segments, pre_RF, recompute)
        hidden_RH = pre_RF.new_empty(chunks[0][1].stop, width_H)  # the first is the largest
        grad_pre_RF = pre_RF.new_empty(chunks[0][1].stop, width_F) if gate else hidden_RH
        for experts, part, segment in chunks:
            hidden, grad_pre = (buffer[: part.stop - part.start] for buffer in (hidden_RH, grad_pre_RF))
            bias = None if bias1_EF is None else bias1_EF[experts]
            if recompute:
                activations.activate(pre_RF[part], bias, segment, form, hidden)
            act = hidden if recompute else act_RH
            products.weight_gradient(grad_RO[part], act, segment, grad_weight2[experts])
            products.product(grad_RO[part], cast2_EOH[experts], segment, hidden, transposed=False)
            tiles = slice(part.start // activations.TILE_ROWS, part.stop // activations.TILE_ROWS)
            activations.activation_gradient(hidden, bias, pre_RF[part], segment, form, parts[tiles], grad_pre)
            products.weight_gradient(grad_pre, x_RD[part], segment, grad_weight1[experts])
            products.product(grad_pre, cast1_EFD[experts], segment, grad_RD[part], transposed=False)
        if bias1_EF is not None:
            rows.tile_sums(parts, segments, activations.TILE_ROWS, grad_bias1)
        del hidden_RH, grad_pre_RF, hidden, grad_pre, act  # before x's gradient takes memory
        grad_x_TD = torch.empty_like(x_TD)
        rows.gather_sum(grad_RD, row_TK, grad_x_TD)
    return grad_x_TD, grad_weights_TK.to(weights_TK.dtype), grad_weight1, grad_bias1, grad_weight2, grad_bias2


def _fake_gradient(grad_TO, x_TD, row_TK, weights_TK, starts_E, counts_E, weight1, bias1, weight2, bias2, *_):
    each = (x_TD, weights_TK, weight1, bias1, weight2, bias2)
    return tuple(x_TD.new_empty(0) if like is None else torch.empty_like(like) for like in each)


def _chunks(segments: Segments, pre_RF: Tensor, recompute: bool) -> list[tuple[slice, slice, Segments]]:
    """(experts, their rows, their segments): all, or parts where memory is to be saved and experts have shares."""
    num_experts, share = segments.num_experts, segments.share
    if not (recompute and share):
        return [(slice(0, num_experts), slice(0, pre_RF.shape[0]), segments)]
    count = cdiv(pre_RF.numel() * pre_RF.element_size(), CHUNK_BYTES)
    step = cdiv(num_experts, count)
    bounds = [(first, min(first + step, num_experts)) for first in range(0, num_experts, step)]
    return [
        (slice(first, last), slice(first * share, last * share), segments._replace(num_experts=last - first))
        for first, last in bounds
    ]


def _save(ctx, inputs, output) -> None:
    x, row, _, *others, share, function, gate, _, recompute = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, row, *others, *output[1:])
    ctx.options = share, function, gate, recompute


def _backward(ctx, grad_TO: Tensor | None, *_):
    if grad_TO is None:
        return (None,) * 17
    saved = ctx.saved_tensors
    grads = fused_experts_backward(grad_TO, *saved, *ctx.options)
    grad_x, grad_weights, grad_weight1, grad_bias1, grad_weight2, grad_bias2 = grads
    bias1, bias2 = saved[6], saved[8]
    return (
        grad_x, None, None, grad_weights, None, None, grad_weight1, None if bias1 is None else grad_bias1,
        grad_weight2, None if bias2 is None else grad_bias2, *(None,) * 7,
    )  # fmt: skip


fused_experts_backward = operator("fused_experts_backward", _gradient, _fake_gradient)
fused_experts = operator("fused_experts", _forward, _fake, _save, _backward)
