"""Backend `segments`: choices are sorted by expert, and each expert multiplies its segment of rows.

It computes exactly the routed work, with or without drops. The segments' lengths depend on the data, but the shape of
the result does not. So the product is a custom operator, and torch.compile sees no graph break. On the CPU it is a loop
over experts. On CUDA it is a grouped matrix product where the type allows it; else the loop, which reads the lengths
(one synchronisation).
"""

import torch
from torch import Tensor, library

from vmoe.moe.kernels.experts import composed
from vmoe.moe.kernels.experts.rows import RowLayout
from vmoe.moe.kernels.interface import Choices, Mlp
from vmoe.moe.kernels.operators import is_transformed


def expert_mlp(x_TD: Tensor, choices: Choices, mlp: Mlp) -> Tensor:
    """(T, D) -> (T, O), see `kernels`."""
    num_experts = mlp.weight1.shape[0]
    layout = segment_layout(choices, num_experts)
    if choices.capacity is not None:  # dropped choices lie at the end and need no rows
        most = num_experts * choices.groups.count * choices.capacity
        layout = layout._replace(choice_R=layout.choice_R[:most])
    return composed.dispatch_compute_combine(x_TD, choices, mlp, layout, linear_of_layout)


def segment_layout(choices: Choices, num_experts: int) -> RowLayout:
    """Rows sorted by expert, each expert's in the order of the tokens, with dropped choices at the end."""
    chosen_TK, kept_TK = choices.chosen_TK, choices.kept_TK
    expert_TK = chosen_TK if kept_TK is None else torch.where(kept_TK, chosen_TK, num_experts)
    ordered_R, choice_R = expert_TK.reshape(-1).sort(stable=True)
    experts_E = torch.arange(num_experts, device=chosen_TK.device)
    ends_E = torch.searchsorted(ordered_R, experts_E, right=True, out_int32=True)
    rows_R = torch.arange(choice_R.shape[0], device=chosen_TK.device)
    row_TK = torch.empty_like(choice_R).scatter(0, choice_R, rows_R).view_as(chosen_TK)
    return RowLayout(row_TK, choice_R, ends_E)


def linear_of_layout(x_RD: Tensor, weight_EOD: Tensor, bias_EO: Tensor | None, layout: RowLayout) -> Tensor:
    """Each expert's rows times its weights, with zeros after the last expert's rows."""
    product = _SegmentLinear.apply if is_transformed() else segment_linear
    return product(x_RD, weight_EOD, bias_EO, layout.ends_E)


@library.custom_op("vmoe::segment_linear", mutates_args=())
def segment_linear(x_RD: Tensor, weight_EOD: Tensor, bias_EO: Tensor | None, ends_E: Tensor) -> Tensor:
    """y[r] = weight[e] @ x[r] + bias[e] for the rows r of expert e; zeros for rows without an expert.

    Args:
        x_RD: Rows sorted by expert, (R, D).
        weight_EOD: (E, O, D).
        bias_EO: (E, O) or None.
        ends_E: Where each expert's rows end, (E,) int32, in ascending order.

    Returns:
        (R, O).
    """
    if _has_grouped_product(x_RD, weight_EOD):
        y_RO = torch.nn.functional.grouped_mm(x_RD, weight_EOD.transpose(1, 2), offs=ends_E)
        if bias_EO is not None:
            y_RO += bias_EO[_expert_of_row(ends_E, x_RD.shape[0])]
        return y_RO.masked_fill_(_no_expert_R1(ends_E, x_RD.shape[0]), 0)
    y_RO = x_RD.new_empty(x_RD.shape[0], weight_EOD.shape[1])
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            weight_DO = weight_EOD[expert].t()
            if bias_EO is None:
                torch.mm(x_RD[start:end], weight_DO, out=y_RO[start:end])
            else:
                torch.addmm(bias_EO[expert], x_RD[start:end], weight_DO, out=y_RO[start:end])
        start = end
    y_RO[start:] = 0
    return y_RO


@segment_linear.register_fake
def _fake_segment_linear(x_RD, weight_EOD, bias_EO, ends_E):
    return x_RD.new_empty(x_RD.shape[0], weight_EOD.shape[1])


@library.custom_op("vmoe::segment_linear_backward", mutates_args=())
def segment_linear_backward(
    grad_RO: Tensor, x_RD: Tensor, weight_EOD: Tensor, ends_E: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias. An idle expert's are zeros. Without a bias its gradient is empty."""
    num_experts, out_width, _ = weight_EOD.shape
    grad_bias_EO = grad_RO.new_zeros((num_experts, out_width) if has_bias else (0,))
    if _has_grouped_product(x_RD, weight_EOD):
        none_R1 = _no_expert_R1(ends_E, x_RD.shape[0])
        grad_RO = grad_RO.contiguous()
        grad_RD = torch.nn.functional.grouped_mm(grad_RO, weight_EOD, offs=ends_E).masked_fill_(none_R1, 0)
        grad_weight_EOD = torch.nn.functional.grouped_mm(grad_RO.t(), x_RD, offs=ends_E)
        if has_bias:
            rows_ER = _expert_of_row(ends_E, x_RD.shape[0]) == torch.arange(num_experts, device=x_RD.device)[:, None]
            grad_bias_EO = (rows_ER & ~none_R1.t()).to(grad_RO.dtype) @ grad_RO
        return grad_RD, grad_weight_EOD, grad_bias_EO
    grad_RD, grad_weight_EOD = torch.empty_like(x_RD), torch.zeros_like(weight_EOD)
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            grad = grad_RO[start:end]
            torch.mm(grad, weight_EOD[expert], out=grad_RD[start:end])
            torch.mm(grad.t(), x_RD[start:end], out=grad_weight_EOD[expert])
            if has_bias:
                torch.sum(grad, 0, out=grad_bias_EO[expert])
        start = end
    grad_RD[start:] = 0
    return grad_RD, grad_weight_EOD, grad_bias_EO


@segment_linear_backward.register_fake
def _fake_segment_linear_backward(grad_RO, x_RD, weight_EOD, ends_E, has_bias):
    grad_bias_EO = grad_RO.new_empty(weight_EOD.shape[:2] if has_bias else (0,))
    return torch.empty_like(x_RD), torch.empty_like(weight_EOD), grad_bias_EO


def _save_product(ctx, inputs, output) -> None:
    x_RD, weight_EOD, bias_EO, ends_E = inputs
    ctx.save_for_backward(x_RD, weight_EOD, ends_E)
    ctx.has_bias = bias_EO is not None


def _backward_of_product(ctx, grad_RO: Tensor):
    x_RD, weight_EOD, ends_E = ctx.saved_tensors
    gradient = _SegmentGradient.apply if is_transformed() else segment_linear_backward
    grad_RD, grad_weight_EOD, grad_bias_EO = gradient(grad_RO, x_RD, weight_EOD, ends_E, ctx.has_bias)
    return grad_RD, grad_weight_EOD, grad_bias_EO if ctx.has_bias else None, None


def _save_gradient(ctx, inputs, output) -> None:
    *tensors, ctx.has_bias = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_gradient(ctx, to_x_RD: Tensor, to_weight_EOD: Tensor, to_bias_EO: Tensor):
    """Differentiates the gradients, which are products too, by the same two operators; so any order is possible."""
    grad_RO, x_RD, weight_EOD, ends_E = ctx.saved_tensors
    transformed = is_transformed()
    product = _SegmentLinear.apply if transformed else segment_linear
    gradient = _SegmentGradient.apply if transformed else segment_linear_backward
    by_weight_RO = product(to_x_RD, weight_EOD, to_bias_EO if ctx.has_bias else None, ends_E)
    second_RD = product(grad_RO, to_weight_EOD.transpose(1, 2), None, ends_E)
    _, second_EOD, _ = gradient(grad_RO, to_x_RD, weight_EOD, ends_E, False)
    return by_weight_RO + product(x_RD, to_weight_EOD, None, ends_E), second_RD, second_EOD, None, None


segment_linear.register_autograd(_backward_of_product, setup_context=_save_product)
segment_linear_backward.register_autograd(_backward_of_gradient, setup_context=_save_gradient)


class _SegmentLinear(torch.autograd.Function):
    """`segment_linear` for torch.func, which cannot differentiate a custom operator."""

    setup_context = staticmethod(_save_product)
    backward = staticmethod(_backward_of_product)

    @staticmethod
    def forward(*arguments) -> Tensor:
        return segment_linear(*arguments)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        results = [_SegmentLinear.apply(*each) for each in _samples_of_vmap(info, in_dims, arguments)]
        return torch.stack(results), 0


class _SegmentGradient(torch.autograd.Function):
    """`segment_linear_backward` for torch.func."""

    setup_context = staticmethod(_save_gradient)
    backward = staticmethod(_backward_of_gradient)

    @staticmethod
    def forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
        return segment_linear_backward(*arguments)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        results = [_SegmentGradient.apply(*each) for each in _samples_of_vmap(info, in_dims, arguments)]
        return tuple(map(torch.stack, zip(*results, strict=True))), (0, 0, 0)


def _samples_of_vmap(info, in_dims: tuple, arguments: tuple) -> list[list]:
    """The arguments of each sample of vmap's batch."""
    pairs = list(zip(arguments, in_dims, strict=True))
    return [
        [each if dim is None else each.select(dim, sample) for each, dim in pairs] for sample in range(info.batch_size)
    ]


def _has_grouped_product(x_RD: Tensor, weight_EOD: Tensor) -> bool:
    """Whether torch's grouped product supports these: bfloat16 on CUDA, with rows of a multiple of 16 bytes."""
    aligned = all(width % 8 == 0 for width in weight_EOD.shape[1:])
    return x_RD.is_cuda and x_RD.dtype == torch.bfloat16 and aligned and x_RD.shape[0] > 0


def _expert_of_row(ends_E: Tensor, num_rows: int) -> Tensor:
    rows_R = torch.arange(num_rows, device=ends_E.device, dtype=torch.int32)
    return torch.searchsorted(ends_E, rows_R, right=True).clamp(max=ends_E.shape[0] - 1)


def _no_expert_R1(ends_E: Tensor, num_rows: int) -> Tensor:
    return (torch.arange(num_rows, device=ends_E.device, dtype=torch.int32) >= ends_E[-1])[:, None]
