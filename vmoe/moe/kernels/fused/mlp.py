"""The experts' MLP, forward and backward, as one operator each.

T tokens of width D with K choices; E experts of hidden width H; R rows of the buffer that experts compute. A row's
activation is stored times its combine weight: the second layer's results need only be summed, its weights' gradient
needs no weighting, and the combine weights' gradient is a sum that the activation's gradient leaves on its way.
"""

import torch
from torch import Tensor

from vmoe.moe.kernels.fused import activations, products, rows
from vmoe.moe.kernels.fused.operators import operator
from vmoe.moe.kernels.fused.ranks import ALIGNMENT
from vmoe.moe.kernels.fused.segments import Segments

CHUNK_BYTES = 256 * 2**20  # gradients of hidden layers of more bytes than this are computed in parts, for memory
MAX_CHUNKS = 2


def num_rows_of(num_choices: int, num_experts: int, share: int) -> int:
    """R: the experts' shares or, with share 0, room for every choice with each expert's rows aligned."""
    return num_experts * share if share else align(num_choices + num_experts * (ALIGNMENT - 1) - ALIGNMENT + 1)


def align(num_rows: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-num_rows // ALIGNMENT) * ALIGNMENT


def _forward(
    x_TD: Tensor, row_TK: Tensor, chosen_TK: Tensor, weights_TK: Tensor, starts_E: Tensor, counts_E: Tensor,
    weight1_EHD: Tensor, bias1_EH: Tensor | None, weight2_EOH: Tensor, bias2_EO: Tensor | None,
    cast1_EHD: Tensor, cast2_EOH: Tensor, share: int, tanh: bool, is_training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Dispatch, both layers and combine.

    Args:
        x_TD: Tokens, of any floating type.
        row_TK: See `expert_rows`, like `starts_E`, `counts_E` and `share`.
        chosen_TK: The expert of each choice.
        weights_TK: Its combine weight.
        starts_E: First row of each expert.
        counts_E: Number of its rows.
        weight1_EHD: The parameter, for which only the gradient is computed; like `weight2_EOH`.
        bias1_EH: Bias or None.
        weight2_EOH: The parameter.
        bias2_EO: Bias or None.
        cast1_EHD: The weights in the type that is computed in, like `cast2_EOH`; no gradient flows to them.
        cast2_EOH: The second layer's.
        share: Rows an expert.
        tanh: Which GELU.
        is_training: Whether to keep what the backward pass needs.

    Returns:
        The result (T, O) and, for the backward pass, empty unless `is_training`: the combine weight of each row (R,),
        the tokens' rows (R, D), the first layer's results (R, H) and the weighted activations (R, H).
    """
    num_experts, width_H, width_D = cast1_EHD.shape
    width_O = cast2_EOH.shape[1]
    cast1_EHD, cast2_EOH = cast1_EHD.contiguous(), cast2_EOH.contiguous()
    segments = Segments(starts_E, counts_E, share)
    num_rows = num_rows_of(row_TK.numel(), num_experts, share)
    with torch.cuda.device_of(x_TD):
        weight_R = x_TD.new_empty(num_rows, dtype=torch.float32)
        x_RD = cast1_EHD.new_empty(num_rows, width_D)
        act_RH = cast1_EHD.new_empty(num_rows, width_H)
        y_TO = cast1_EHD.new_empty(x_TD.shape[0], width_O)
        rows.scatter(x_TD, row_TK, weights_TK, x_RD, weight_R)
        rows.zero_free_rows(x_RD, segments, weight_R)
        tile = products.tile_of("first", cast1_EHD.dtype)
        if tile is not None:
            pre_RH = torch.empty_like(act_RH) if is_training else act_RH.new_empty(0, width_H)
            products.first_layer(
                x_RD, cast1_EHD, bias1_EH, weight_R, segments, tanh, tile, pre_RH if is_training else None, act_RH
            )
            if is_training and share:
                rows.zero_free_rows(act_RH, segments, alignment=tile.rows)
        else:
            pre_RH = torch.empty_like(act_RH) if is_training else act_RH
            products.product(x_RD, cast1_EHD, segments, pre_RH, transposed=True)
            activations.activate(pre_RH, bias1_EH, weight_R, segments, tanh, act_RH)
        y_RO = cast1_EHD.new_empty(num_rows, width_O)
        products.product(act_RH, cast2_EOH, segments, y_RO, transposed=True)
        rows.combine(y_RO, row_TK, chosen_TK, weights_TK, bias2_EO, y_TO)
    if is_training:
        return y_TO, weight_R, x_RD, pre_RH, act_RH
    return y_TO, weight_R.new_empty(0), *(act_RH.new_empty(0, width) for width in (width_D, width_H, width_H))


def _fake(x_TD, row_TK, chosen_TK, weights_TK, starts_E, counts_E, weight1, bias1, weight2, bias2, cast1, cast2,
          share, tanh, is_training):  # fmt: skip
    num_experts, width_H, width_D = cast1.shape
    num_rows = num_rows_of(row_TK.numel(), num_experts, share) if is_training else 0
    y_TO = cast1.new_empty(x_TD.shape[0], cast2.shape[1])
    weight_R = x_TD.new_empty(num_rows, dtype=torch.float32)
    return y_TO, weight_R, *(cast1.new_empty(num_rows, width) for width in (width_D, width_H, width_H))


def _gradient(
    grad_TO: Tensor, x_TD: Tensor, row_TK: Tensor, chosen_TK: Tensor, weights_TK: Tensor, starts_E: Tensor,
    counts_E: Tensor, weight1_EHD: Tensor, bias1_EH: Tensor | None, weight2_EOH: Tensor, bias2_EO: Tensor | None,
    cast1_EHD: Tensor, cast2_EOH: Tensor, weight_R: Tensor, x_RD: Tensor, pre_RH: Tensor, act_RH: Tensor, share: int,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, the combine weights, weight1, bias1, weight2 and bias2 (those of no bias are empty)."""
    num_experts, width_H, width_D = cast1_EHD.shape
    width_O = cast2_EOH.shape[1]
    cast1_EHD, cast2_EOH = cast1_EHD.contiguous(), cast2_EOH.contiguous()
    segments = Segments(starts_E, counts_E, share)
    num_rows = pre_RH.shape[0]
    grad_weight1, grad_weight2, grad_x_TD = (torch.empty_like(like) for like in (weight1_EHD, weight2_EOH, x_TD))
    grad_bias1, grad_bias2 = (
        x_TD.new_empty(0) if like is None else torch.empty_like(like) for like in (bias1_EH, bias2_EO)
    )
    tile = products.tile_of("hidden", cast2_EOH.dtype)
    with torch.cuda.device_of(x_TD):
        grad_RO = cast1_EHD.new_empty(num_rows, width_O)
        grad_RD = grad_RO if width_O == width_D else cast1_EHD.new_empty(num_rows, width_D)
        grad_weights_TK = rows.scatter_gradient(grad_TO.contiguous(), row_TK, chosen_TK, bias2_EO, grad_RO)
        rows.zero_free_rows(grad_RO, segments)
        if bias2_EO is not None:
            rows.weighted_row_sums(grad_RO, weight_R, segments, grad_bias2)
        tile_rows, num_parts = activations.parts_of(width_H) if tile is None else products.parts_of(tile, width_H)
        weight_parts = weight_R.new_empty(num_rows, num_parts)
        bias_parts = weight_R.new_empty(num_rows // tile_rows, width_H)
        # where the first layer ran in a kernel of ours, the bias is in its results
        missing_bias = bias1_EH if products.tile_of("first", cast1_EHD.dtype) is None else None
        for experts, part, segment in _chunks(segments, num_rows, pre_RH, num_experts):
            grad_pre = torch.empty_like(pre_RH[part])
            through = (
                None if missing_bias is None else missing_bias[experts],
                weight_R[part],
                pre_RH[part],
                segment,
                tanh,
            )
            sums = weight_parts[part], bias_parts[part.start // tile_rows : part.stop // tile_rows]
            if tile is None:
                products.product(grad_RO[part], cast2_EOH[experts], segment, grad_pre, transposed=False)
                activations.activation_gradient(grad_pre, *through, *sums)
            else:
                products.hidden_gradient(grad_RO[part], cast2_EOH[experts], *through, tile, grad_pre, *sums)
                if share:
                    rows.zero_free_rows(grad_pre, segment, alignment=tile.rows)
            products.weight_gradient(grad_RO[part], act_RH[part], segment, grad_weight2[experts])
            products.weight_gradient(grad_pre, x_RD[part], segment, grad_weight1[experts])
            # grad_RO has served: its rows may take x's gradient
            products.product(grad_pre, cast1_EHD[experts], segment, grad_RD[part], transposed=False)
        rows.gather_sum(grad_RD, row_TK, grad_x_TD)
        rows.add_parts(weight_parts, row_TK, grad_weights_TK)
        if bias1_EH is not None:
            rows.tile_sums(bias_parts, segments, tile_rows, grad_bias1)
    return grad_x_TD, grad_weights_TK.to(weights_TK.dtype), grad_weight1, grad_bias1, grad_weight2, grad_bias2


def _fake_gradient(grad_TO, x_TD, row_TK, chosen_TK, weights_TK, starts_E, counts_E, weight1, bias1, weight2, bias2,
                   *_):  # fmt: skip
    each = (x_TD, weights_TK, weight1, bias1, weight2, bias2)
    return tuple(x_TD.new_empty(0) if like is None else torch.empty_like(like) for like in each)


def _chunks(segments: Segments, num_rows: int, pre_RH: Tensor, num_experts: int):
    """(experts, their rows, their segments), in as many parts as the size of the hidden layer calls for."""
    size = num_rows * pre_RH.shape[1] * pre_RH.element_size()
    count = min(MAX_CHUNKS, -(-size // CHUNK_BYTES), num_experts) if segments.share else 1
    if count <= 1:
        yield slice(None), slice(0, num_rows), segments
        return
    step = -(-num_experts // count)
    for first in range(0, num_experts, step):
        last = min(first + step, num_experts)
        yield slice(first, last), slice(first * segments.share, last * segments.share), segments.chunk(first, last)


def _save(ctx, inputs, output) -> None:
    *tensors, share, tanh, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.share, ctx.tanh = share, tanh


def _backward(ctx, grad_TO: Tensor | None, *_):
    if grad_TO is None:
        return (None,) * 15
    saved = ctx.saved_tensors
    grads = fused_experts_backward(grad_TO, *saved, ctx.share, ctx.tanh)
    grad_x, grad_weights, grad_weight1, grad_bias1, grad_weight2, grad_bias2 = grads
    bias1, bias2 = saved[7], saved[9]
    return (
        grad_x, None, None, grad_weights, None, None, grad_weight1, None if bias1 is None else grad_bias1,
        grad_weight2, None if bias2 is None else grad_bias2, None, None, None, None, None,
    )  # fmt: skip


fused_experts_backward = operator("fused_experts_backward", _gradient, _fake_gradient)
fused_experts = operator("fused_experts", _forward, _fake, _save, _backward)
