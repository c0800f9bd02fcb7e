"""The experts' MLP, forward and backward, as one operator each.

T tokens of width D with K choices; E experts of hidden width H; F the width before the activation (2H with a gate, else
H); R rows of the buffer that experts compute.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmoe.moe.kernels.experts.fused import activations, products, row_kernels
from vmoe.moe.kernels.experts.fused.owners import RowOwners
from vmoe.moe.kernels.experts.requirements import Form
from vmoe.moe.kernels.operators import is_traced, operator
from vmoe.moe.kernels.sizes import CHUNK_BYTES, TILE_ROWS, cdiv, rows_of_buffer


class ExpertInputs(NamedTuple):
    """What the forward pass takes.

    Attributes:
        x_TD: Tokens, of any floating type.
        row_TK: The row of each choice, -1 for none.
        chosen_TK: The expert of each choice.
        weights_TK: Its combine weight.
        starts_E: See `RowOwners`.
        counts_E: See `RowOwners`.
        weight1_EFD: The first layer's parameter. It only receives the gradient; the products use `cast1_EFD`.
        bias1_EF: Bias or None.
        weight2_EOH: The second layer's parameter, for the gradient as well.
        bias2_EO: Bias or None.
        cast1_EFD: The first layer's weights in the compute type, without gradient.
        cast2_EOH: The second layer's weights in the compute type, without gradient.
        share: See `RowOwners`.
        function: See `Form`.
        gate: See `Form`.
        is_training: Whether to keep tensors for the backward pass.
        recompute: Whether the backward pass computes the activations again instead of keeping them.
    """

    x_TD: Tensor
    row_TK: Tensor
    chosen_TK: Tensor
    weights_TK: Tensor
    starts_E: Tensor | None
    counts_E: Tensor | None
    weight1_EFD: Tensor
    bias1_EF: Tensor | None
    weight2_EOH: Tensor
    bias2_EO: Tensor | None
    cast1_EFD: Tensor
    cast2_EOH: Tensor
    share: int
    function: str
    gate: str
    is_training: bool
    recompute: bool


class ExpertGradientInputs(NamedTuple):
    """What the backward pass takes: the result's gradient, and the saved inputs and results of the forward pass."""

    grad_TO: Tensor
    x_TD: Tensor
    row_TK: Tensor
    weights_TK: Tensor
    starts_E: Tensor | None
    counts_E: Tensor | None
    weight1_EFD: Tensor
    bias1_EF: Tensor | None
    weight2_EOH: Tensor
    bias2_EO: Tensor | None
    cast1_EFD: Tensor
    cast2_EOH: Tensor
    choice_R: Tensor
    x_RD: Tensor
    pre_RF: Tensor
    act_RH: Tensor
    y_RO: Tensor
    share: int
    function: str
    gate: str
    recompute: bool

    def to_be_freed(self, ctx: Any = None) -> SimpleNamespace:
        """The same fields, which `gradient_of_rows` removes. They free memory if nothing else holds their tensors.

        Args:
            ctx: Autograd's node that saved them. If its graph is not retained it gives them up, so they may be
                overwritten.
        """
        may_overwrite = ctx is not None and not torch._C._autograd._get_current_graph_task_keep_graph()
        if may_overwrite:
            ctx.maybe_clear_saved_tensors()
        return SimpleNamespace(**self._asdict(), may_overwrite=may_overwrite)


def _forward_of_experts(inputs: ExpertInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return forward_of_experts(inputs)


def forward_of_experts(
    inputs: ExpertInputs, choice_R: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Dispatch, both layers and combine.

    Args:
        inputs: What they take.
        choice_R: The choice in each row, where it is known already.

    Returns:
        The result (T, O). For the backward pass (else empty): the choice in each row (R,), the tokens' rows (R, D), the
        first layer's results (R, F) without bias, the activations (R, H) unless `recompute`, the second layer's results
        (R, O) without bias.
    """
    x_TD, row_TK = inputs.x_TD, inputs.row_TK
    cast1_EFD, cast2_EOH = inputs.cast1_EFD.contiguous(), inputs.cast2_EOH.contiguous()
    num_experts, width_F, width_D = cast1_EFD.shape
    width_O, width_H = cast2_EOH.shape[1:]
    owners = RowOwners(num_experts, inputs.share, inputs.starts_E, inputs.counts_E)
    num_rows = rows_of_buffer(row_TK.numel(), num_experts, inputs.share)
    x_RD = cast1_EFD.new_empty(num_rows, width_D)
    choice_R = row_kernels.write_rows(x_TD, row_TK, x_RD, choice_R)
    pre_RF = cast1_EFD.new_empty(num_rows, width_F)
    products.product(x_RD, cast1_EFD, owners, pre_RF, transposed=True)
    # where nothing needs the input later, the activation overwrites it
    act_RH = cast1_EFD.new_empty(num_rows, width_H) if inputs.is_training or inputs.gate else pre_RF
    activations.activate(pre_RF, inputs.bias1_EF, owners, Form(inputs.function, inputs.gate), act_RH)
    y_RO = cast1_EFD.new_empty(num_rows, width_O)
    products.product(act_RH, cast2_EOH, owners, y_RO, transposed=True)
    kept_act_RH = act_RH.new_empty(0, width_H) if inputs.recompute or not inputs.is_training else act_RH
    del act_RH  # frees it, if it is not kept, before the result takes memory
    y_TO = cast1_EFD.new_empty(x_TD.shape[0], width_O)
    row_kernels.write_combined(y_RO, row_TK, inputs.chosen_TK, inputs.weights_TK, inputs.bias2_EO, y_TO)
    if inputs.is_training:
        return y_TO, choice_R, x_RD, pre_RF, kept_act_RH, y_RO
    return y_TO, choice_R.new_empty(0), *(y_TO.new_empty(0, width) for width in (width_D, width_F, width_H, width_O))


def _fake_experts(inputs: ExpertInputs) -> tuple[Tensor, ...]:
    num_experts, width_F, width_D = inputs.cast1_EFD.shape
    width_O, width_H = inputs.cast2_EOH.shape[1:]
    num_rows = 0
    if inputs.is_training:
        num_rows = rows_of_buffer(inputs.row_TK.numel(), num_experts, inputs.share)
    new = inputs.cast1_EFD.new_empty
    y_TO = new(inputs.x_TD.shape[0], width_O)
    choice_R = inputs.x_TD.new_empty(num_rows, dtype=torch.int32)
    x_RD, pre_RF, y_RO = (new(num_rows, width) for width in (width_D, width_F, width_O))
    return y_TO, choice_R, x_RD, pre_RF, new(0 if inputs.recompute else num_rows, width_H), y_RO


def _gradient_of_experts(
    inputs: ExpertGradientInputs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the combine weights, weight1, bias1, weight2 and bias2. Without a bias its gradient is empty."""
    return _gradient_that_frees(inputs.to_be_freed())


def _gradient_that_frees(kept: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_RD, dots_RP, *of_parameters = gradient_of_rows(kept)
    grad_weights_TK = row_kernels.sum_dots(dots_RP, kept.choice_R, kept.weights_TK)
    grad_x_TD = torch.empty_like(kept.x_TD)
    row_kernels.write_token_sums(grad_RD, kept.row_TK, grad_x_TD)
    return grad_x_TD, grad_weights_TK, *of_parameters


def gradient_of_rows(kept: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Drops each large tensor after its last use, before it takes memory for the next one.

    Args:
        kept: `ExpertGradientInputs.to_be_freed()`. The large tensors are removed from it, and `pre_RF` may be
            overwritten by its gradient.

    Returns:
        Gradients of the tokens' rows (R, D), parts of those of their combine weights, and the parameters' as above.
    """
    cast1_EFD, cast2_EOH = kept.cast1_EFD.contiguous(), kept.cast2_EOH.contiguous()
    del kept.cast1_EFD, kept.cast2_EOH
    form, owners = Form(kept.function, kept.gate), RowOwners(len(cast1_EFD), kept.share, kept.starts_E, kept.counts_E)
    grad_bias1, grad_bias2 = (
        kept.x_TD.new_empty(0) if like is None else torch.empty_like(like) for like in (kept.bias1_EF, kept.bias2_EO)
    )
    grad_RO = torch.empty_like(kept.y_RO)
    dots_RP = row_kernels.write_combine_gradient(
        kept.grad_TO.contiguous(), kept.choice_R, kept.weights_TK, kept.y_RO, kept.bias2_EO, owners, grad_RO, grad_bias2
    )
    del kept.y_RO
    grad_weight2 = torch.empty_like(kept.weight2_EOH)
    if not kept.recompute:
        products.weight_gradient(grad_RO, kept.act_RH, owners, grad_weight2)
    del kept.act_RH
    # x's gradients may overwrite the rows' gradients, which are no longer needed
    grad_RD = grad_RO if kept.x_RD.shape == grad_RO.shape else torch.empty_like(kept.x_RD)
    parts = dots_RP.new_empty(kept.pre_RF.shape[0] // TILE_ROWS, kept.pre_RF.shape[1])
    chunks = _chunks(owners, kept.pre_RF, kept.recompute)
    most = chunks[0][1].stop  # rows of the first part, which is the largest
    hidden_RH = grad_RO.new_empty(most, cast2_EOH.shape[2])
    overwrites = kept.may_overwrite and (kept.recompute or kept.gate)  # else the hidden buffer serves as well
    grad_pre_RF = kept.pre_RF if overwrites else hidden_RH
    if kept.gate and not overwrites:
        grad_pre_RF = grad_RO.new_empty(most, kept.pre_RF.shape[1])
    # with the gradient of all rows the first layer waits until more memory is free
    grad_weight1 = None if overwrites or len(chunks) == 1 else torch.empty_like(kept.weight1_EFD)

    def cut(tensor: Tensor, part: slice) -> Tensor:  # a slice of everything would cost the host time for nothing
        return tensor if len(chunks) == 1 else tensor[part]

    for experts, part, part_owners in chunks:
        rows = slice(0, part.stop - part.start)
        hidden, pre, grad = cut(hidden_RH, rows), cut(kept.pre_RF, part), cut(grad_RO, part)
        grad_pre = pre if overwrites else cut(grad_pre_RF, rows)
        bias = None if kept.bias1_EF is None else cut(kept.bias1_EF, experts)
        if kept.recompute:
            activations.activate(pre, bias, part_owners, form, hidden)
            products.weight_gradient(grad, hidden, part_owners, cut(grad_weight2, experts))
        products.product(grad, cut(cast2_EOH, experts), part_owners, hidden, transposed=False)
        tiles = slice(part.start // TILE_ROWS, part.stop // TILE_ROWS)
        activations.activation_gradient(hidden, bias, pre, part_owners, form, cut(parts, tiles), grad_pre)
        if grad_weight1 is not None:
            products.weight_gradient(grad_pre, kept.x_RD[part], part_owners, grad_weight1[experts])
            products.product(grad_pre, cast1_EFD[experts], part_owners, grad_RD[part], transposed=False)
    del kept.pre_RF, cast2_EOH, grad_RO, hidden_RH, hidden, grad_pre, pre, grad
    if kept.bias1_EF is not None:
        row_kernels.write_expert_sums(parts, owners, TILE_ROWS, grad_bias1)
    if grad_weight1 is None:
        products.product(grad_pre_RF, cast1_EFD, owners, grad_RD, transposed=False)
        del cast1_EFD
        grad_weight1 = torch.empty_like(kept.weight1_EFD)
        products.weight_gradient(grad_pre_RF, kept.x_RD, owners, grad_weight1)
    del kept.x_RD
    return grad_RD, dots_RP, grad_weight1, grad_bias1, grad_weight2, grad_bias2


def _fake_gradient_of_experts(inputs: ExpertGradientInputs) -> tuple[Tensor, ...]:
    x_TD = inputs.x_TD
    each = (
        x_TD, inputs.weights_TK, inputs.weight1_EFD, inputs.bias1_EF, inputs.weight2_EOH, inputs.bias2_EO
    )  # fmt: skip
    return tuple(x_TD.new_empty(0) if like is None else torch.empty_like(like) for like in each)


def _chunks(owners: RowOwners, pre_RF: Tensor, recompute: bool) -> list[tuple[slice, slice, RowOwners]]:
    """(experts, their rows, the rows' owners) of each part; more than one part only with `recompute` and shares."""
    num_experts, share = owners.num_experts, owners.share
    if not (recompute and share):
        return [(slice(0, num_experts), slice(0, pre_RF.shape[0]), owners)]
    count = cdiv(pre_RF.numel() * pre_RF.element_size(), CHUNK_BYTES)
    step = cdiv(num_experts, count)
    bounds = [(first, min(first + step, num_experts)) for first in range(0, num_experts, step)]
    return [
        (slice(first, last), slice(first * share, last * share), owners._replace(num_experts=last - first))
        for first, last in bounds
    ]


def _save_experts(ctx, inputs: ExpertInputs, output: tuple[Tensor, ...]) -> None:
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        inputs.x_TD, inputs.row_TK, inputs.weights_TK, inputs.starts_E, inputs.counts_E, inputs.weight1_EFD,
        inputs.bias1_EF, inputs.weight2_EOH, inputs.bias2_EO, inputs.cast1_EFD, inputs.cast2_EOH, *kept,
    )  # fmt: skip
    ctx.options = inputs.share, inputs.function, inputs.gate, inputs.recompute


def _backward_of_experts(ctx, grad_TO: Tensor | None, *_) -> dict[str, Tensor | None]:
    if grad_TO is None:
        return {}
    inputs = ExpertGradientInputs(grad_TO, *ctx.saved_tensors, *ctx.options)
    has_bias1, has_bias2 = inputs.bias1_EF is not None, inputs.bias2_EO is not None
    if is_traced() or torch.is_grad_enabled():  # the operator refuses second derivatives
        gradients = fused_experts_backward(*inputs)
    else:
        kept = inputs.to_be_freed(ctx)
        del inputs
        gradients = _gradient_that_frees(kept)
    grad_x, grad_weights, grad_weight1, grad_bias1, grad_weight2, grad_bias2 = gradients
    return {
        "x_TD": grad_x,
        "weights_TK": grad_weights,
        "weight1_EFD": grad_weight1,
        "bias1_EF": grad_bias1 if has_bias1 else None,
        "weight2_EOH": grad_weight2,
        "bias2_EO": grad_bias2 if has_bias2 else None,
    }


fused_experts_backward = operator("fused_experts_backward", _gradient_of_experts, _fake_gradient_of_experts)
fused_experts = operator("fused_experts", _forward_of_experts, _fake_experts, _save_experts, _backward_of_experts)
