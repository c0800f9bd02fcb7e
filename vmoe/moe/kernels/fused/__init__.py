"""Backend `fused`: the whole expert MLP in Triton kernels and library products, for CUDA.

Forward: scatter the tokens into the experts' rows, first layer with bias and GELU in its epilogue, second layer,
combine. Backward: the gradient through the second layer with GELU's in its epilogue, where the activation is computed
anew instead of being kept; the combine weights' gradient comes out of the same epilogue. No host synchronisation, no
atomic addition, static shapes: repeatable bit for bit and capturable in a CUDA graph.

The rows of an expert are a share of its own where a capacity bounds them well (products by the library), else as many
as it needs (products by Triton). Everything that imports Triton is in this package.
"""

import torch
from torch import Tensor, nn

from vmoe.moe.kernels.fused import activations, products, rows
from vmoe.moe.kernels.fused.balance import balance
from vmoe.moe.kernels.fused.ranks import ALIGNMENT, expert_rows, falling_order, ranks
from vmoe.moe.kernels.fused.router import MAX_EXPERTS, MAX_SCORES, gates, scores, takes_logits
from vmoe.moe.kernels.fused.segments import Segments
from vmoe.moe.kernels.interface import Choices, Mlp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SHARES = 1.15  # shares may set aside so many times the rows that are chosen
CHUNK_BYTES = 256 * 2**20  # hidden activations of more bytes than this are computed in parts, to need less memory
MAX_CHUNKS = 3
MAX_COMPARED = 4096  # values that `falling_order` orders faster than a sort


def what_it_lacks(mlp: Mlp) -> str | None:
    """Which feature of the experts these kernels do not have; None when they have all."""
    if not isinstance(mlp.activation, nn.GELU):
        return f"activation {type(mlp.activation).__name__}"
    if mlp.norm is not None:
        return "a norm"
    if mlp.dropout > 0:
        return "dropout"
    return None if mlp.dtype in DTYPES else f"type {mlp.dtype}"


def what_does_not_fit(mlp: Mlp) -> str | None:
    """Which shape these kernels cannot take; None when they can."""
    width_H, width_D = mlp.weight1.shape[1:]
    multiple = 16 // mlp.dtype.itemsize
    for name, width in (("in_features", width_D), ("hidden_features", width_H), ("out_features", mlp.weight2.shape[1])):
        if width % multiple:
            return f"{name}={width} is no multiple of {multiple}"
    return None


def expert_mlp(x_TD: Tensor, choices: Choices, mlp: Mlp) -> Tensor:
    """(T, D) -> (T, O), see `kernels.interface`."""
    num_experts = mlp.weight1.shape[0]
    share = _share(choices, num_experts)
    row_TK, starts_E, counts_E = expert_rows(choices.chosen_TK, choices.kept_TK, num_experts, share)
    is_training = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad
        for tensor in (x_TD, choices.weights_TK, mlp.weight1, mlp.bias1, mlp.weight2, mlp.bias2)
    )
    return fused_experts(
        x_TD.contiguous(), row_TK, choices.chosen_TK.contiguous(), choices.weights_TK.contiguous(), starts_E, counts_E,
        mlp.weight1, mlp.bias1, mlp.weight2, mlp.bias2, mlp.cast(mlp.weight1), mlp.cast(mlp.weight2),
        share, mlp.activation.approximate == "tanh", is_training,
    )[0]  # fmt: skip


def _share(choices: Choices, num_experts: int) -> int:
    """Rows set aside for each expert, or 0 where that would be wasteful."""
    if choices.capacity is None:
        return 0
    share = _align(choices.groups.count * choices.capacity)
    is_tight = num_experts * share <= MAX_SHARES * choices.chosen_TK.numel() + num_experts * ALIGNMENT
    return share if is_tight else 0


def _num_rows(num_choices: int, num_experts: int, share: int) -> int:
    return num_experts * share if share else _align(num_choices + num_experts * (ALIGNMENT - 1) - ALIGNMENT + 1)


def _align(rows: int) -> int:
    return -(-rows // ALIGNMENT) * ALIGNMENT


@torch.library.custom_op("vmoe::fused_experts", mutates_args=())
def fused_experts(
    x_TD: Tensor, row_TK: Tensor, chosen_TK: Tensor, weights_TK: Tensor, starts_E: Tensor, counts_E: Tensor,
    weight1_EHD: Tensor, bias1_EH: Tensor | None, weight2_EOH: Tensor, bias2_EO: Tensor | None,
    cast1_EHD: Tensor, cast2_EOH: Tensor, share: int, tanh: bool, is_training: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
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
        The result (T, O) and, for the backward pass, the tokens' rows (R, D) and the hidden layer's inputs (R, H); both
        empty unless `is_training`.
    """
    num_experts, width_H, width_D = cast1_EHD.shape
    width_O = cast2_EOH.shape[1]
    cast1_EHD, cast2_EOH = cast1_EHD.contiguous(), cast2_EOH.contiguous()
    segments = Segments(starts_E, counts_E, share)
    num_rows = _num_rows(row_TK.numel(), num_experts, share)
    is_ours = _has_own_products(cast1_EHD.dtype)
    with torch.cuda.device_of(x_TD):
        x_RD, y_RO, y_TO = (
            cast1_EHD.new_empty(count, width)
            for count, width in ((num_rows, width_D), (num_rows, width_O), (x_TD.shape[0], width_O))
        )
        pre_RH = cast1_EHD.new_empty(num_rows if is_training else 0, width_H)
        rows.scatter(x_TD, row_TK, x_RD)
        rows.zero_free_rows(x_RD, starts_E, counts_E, share)
        for experts, part, segment in _chunks(segments, num_rows, pre_RH, num_experts):
            act = cast1_EHD.new_empty(part.stop - part.start, width_H)
            if is_ours:
                pre, bias1 = pre_RH[part] if is_training else None, _at(bias1_EH, experts)
                products.first_layer(x_RD[part], cast1_EHD[experts], bias1, segment, tanh, pre, act)
            else:
                pre = pre_RH[part] if is_training else act
                products.product(x_RD[part], cast1_EHD[experts], segment, pre, transposed=True)
                activations.activate(pre, _at(bias1_EH, experts), segment, tanh, act)
            products.product(act, cast2_EOH[experts], segment, y_RO[part], transposed=True)
        rows.combine(y_RO, row_TK, chosen_TK, weights_TK, bias2_EO, y_TO)
    return y_TO, x_RD if is_training else x_RD.new_empty(0, width_D), pre_RH


@fused_experts.register_fake
def _(x_TD, row_TK, chosen_TK, weights_TK, starts_E, counts_E, weight1, bias1, weight2, bias2, cast1, cast2,
      share, tanh, is_training):  # fmt: skip
    num_experts, width_H, width_D = cast1.shape
    num_rows = _num_rows(row_TK.numel(), num_experts, share) if is_training else 0
    y_TO = cast1.new_empty(x_TD.shape[0], cast2.shape[1])
    return y_TO, cast1.new_empty(num_rows, width_D), cast1.new_empty(num_rows, width_H)


@torch.library.custom_op("vmoe::fused_experts_backward", mutates_args=())
def fused_experts_backward(
    grad_TO: Tensor, x_TD: Tensor, row_TK: Tensor, chosen_TK: Tensor, weights_TK: Tensor, starts_E: Tensor,
    counts_E: Tensor, weight1_EHD: Tensor, bias1_EH: Tensor | None, weight2_EOH: Tensor, bias2_EO: Tensor | None,
    cast1_EHD: Tensor, cast2_EOH: Tensor, x_RD: Tensor, pre_RH: Tensor, share: int, tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, the combine weights, weight1, bias1, weight2 and bias2 (those of no bias are empty)."""
    num_experts, width_O, width_D = cast1_EHD.shape[0], cast2_EOH.shape[1], cast1_EHD.shape[2]
    cast1_EHD, cast2_EOH = cast1_EHD.contiguous(), cast2_EOH.contiguous()
    segments = Segments(starts_E, counts_E, share)
    num_rows = pre_RH.shape[0]
    grad_weight1, grad_weight2, grad_x_TD = (torch.empty_like(like) for like in (weight1_EHD, weight2_EOH, x_TD))
    grad_bias1, grad_bias2 = (like if like is None else torch.empty_like(like) for like in (bias1_EH, bias2_EO))
    with torch.cuda.device_of(x_TD):
        grad_RO = cast1_EHD.new_empty(num_rows, width_O)
        grad_RD = grad_RO if width_O == width_D else cast1_EHD.new_empty(num_rows, width_D)
        weight_R, grad_weights_TK = rows.scatter_gradient(
            grad_TO.contiguous(), row_TK, chosen_TK, weights_TK, bias2_EO, grad_RO
        )
        rows.zero_free_rows(grad_RO, starts_E, counts_E, share)
        if grad_bias2 is not None:
            grad_bias2.copy_(rows.weighted_row_sums(grad_RO, weight_R, starts_E, counts_E))
        parts_of_weights = []
        for experts, part, segment in _chunks(segments, num_rows, pre_RH, num_experts):
            act, grad_pre, weight_part, bias_part = _through_hidden(
                grad_RO[part], cast2_EOH[experts], _at(bias1_EH, experts), weight_R[part], pre_RH[part], segment, tanh
            )
            parts_of_weights.append((part.start, weight_part))
            if grad_bias1 is not None:
                tile_rows = pre_RH[part].shape[0] // bias_part.shape[0]
                grad_bias1[experts].copy_(rows.tile_sums(bias_part, segment, tile_rows))
            products.weight_gradient(grad_RO[part], act, segment, grad_weight2[experts])
            products.weight_gradient(grad_pre, x_RD[part], segment, grad_weight1[experts])
            # grad_RO has served: its rows may take x's gradient
            products.product(grad_pre, cast1_EHD[experts], segment, grad_RD[part], transposed=False)
            del act, grad_pre
        rows.gather_sum(grad_RD, row_TK, grad_x_TD)
        for first, weight_part in parts_of_weights:
            rows.add_parts(weight_part, row_TK, first, grad_weights_TK)
    empty = grad_TO.new_empty(0)
    return (
        grad_x_TD, grad_weights_TK.to(weights_TK.dtype), grad_weight1, empty if grad_bias1 is None else grad_bias1,
        grad_weight2, empty.clone() if grad_bias2 is None else grad_bias2,
    )  # fmt: skip


@fused_experts_backward.register_fake
def _(grad_TO, x_TD, row_TK, chosen_TK, weights_TK, starts_E, counts_E, weight1, bias1, weight2, bias2, cast1, cast2,
      x_RD, pre_RH, share, tanh):  # fmt: skip
    each = (x_TD, weights_TK, weight1, bias1, weight2, bias2)
    return tuple(grad_TO.new_empty(0) if like is None else torch.empty_like(like) for like in each)


def _through_hidden(
    grad_RO: Tensor, weight2: Tensor, bias1: Tensor | None, weight_R: Tensor, pre_RH: Tensor, segments: Segments,
    tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Weighted activations, the gradient of `pre_RH`, and parts of the combine weights' and first biases' gradients."""
    act_RH, grad_pre_RH = torch.empty_like(pre_RH), torch.empty_like(pre_RH)
    if _has_own_products(pre_RH.dtype):  # there pre holds the bias
        parts = products.hidden_gradient(grad_RO, weight2, None, weight_R, pre_RH, segments, tanh, act_RH, grad_pre_RH)
    else:
        products.product(grad_RO, weight2, segments, grad_pre_RH, transposed=False)
        parts = activations.activation_gradient(grad_pre_RH, bias1, weight_R, pre_RH, segments, tanh, act_RH)
    return act_RH, grad_pre_RH, *parts


def _has_own_products(dtype: torch.dtype) -> bool:
    """Whether the activation runs in the epilogue of a product of ours."""
    return dtype != torch.float32


def _chunks(segments: Segments, num_rows: int, pre_RH: Tensor, num_experts: int):
    """(experts, their rows, their segments), in as many parts as the size of the hidden layer calls for."""
    size = num_rows * pre_RH.shape[1] * pre_RH.element_size()
    count = min(MAX_CHUNKS, -(-size // CHUNK_BYTES), num_experts) if segments.share else 1
    step = -(-num_experts // count)
    for first in range(0, num_experts, step):
        last = min(first + step, num_experts)
        if segments.share:
            yield slice(first, last), slice(first * segments.share, last * segments.share), segments.chunk(first, last)
        else:
            yield slice(None), slice(0, num_rows), segments


def _at(bias: Tensor | None, experts: slice) -> Tensor | None:
    return None if bias is None else bias[experts]


def _save_for_backward(ctx, inputs, output) -> None:
    *tensors, share, tanh, _ = inputs
    _, x_RD, pre_RH = output
    ctx.mark_non_differentiable(x_RD, pre_RH)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, x_RD, pre_RH)
    ctx.share, ctx.tanh = share, tanh


def _backward(ctx, grad_TO: Tensor | None, *_):
    if grad_TO is None:
        return (None,) * 15
    saved = ctx.saved_tensors
    grads = torch.ops.vmoe.fused_experts_backward(grad_TO, *saved, ctx.share, ctx.tanh)
    grad_x, grad_weights, grad_weight1, grad_bias1, grad_weight2, grad_bias2 = grads
    bias1, bias2 = saved[7], saved[9]
    return (
        grad_x, None, None, grad_weights, None, None, grad_weight1, None if bias1 is None else grad_bias1,
        grad_weight2, None if bias2 is None else grad_bias2, None, None, None, None, None,
    )  # fmt: skip


fused_experts.register_autograd(_backward, setup_context=_save_for_backward)

__all__ = [
    "MAX_COMPARED", "MAX_EXPERTS", "MAX_SCORES", "balance", "expert_mlp", "falling_order", "fused_experts", "gates",
    "ranks", "scores", "takes_logits", "what_does_not_fit", "what_it_lacks",
]  # fmt: skip
