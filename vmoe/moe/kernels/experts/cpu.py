"""Backend `cpu`: the whole expert MLP on the CPU, one expert after the other on its segment of sorted rows.

Running an expert's products and activation together keeps their intermediate results in cache. Gradients of weights
are written in place. Larger buffers are reused in the next step (`memory`). The order of every sum is fixed, so results
are repeatable bit for bit.

T tokens of width D with K choices; E experts of hidden width H; O width of the results; R = T*K rows, sorted by expert,
with rows of no expert at the end.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.attached import is_bare
from vmoe.moe.kernels.experts import composed, rows, segments
from vmoe.moe.kernels.interface import Choices, Mlp
from vmoe.moe.kernels.memory import shared_memory
from vmoe.moe.kernels.operators import operator

aten = torch.ops.aten


def takes(mlp: Mlp) -> bool:
    """Whether the experts are two layers with GELU, without a norm and without dropout."""
    return is_bare(mlp.activation, nn.GELU) and mlp.norm is None and mlp.dropout == 0


def expert_mlp(x_TD: Tensor, choices: Choices, mlp: Mlp) -> Tensor:
    """(T, D) -> (T, O), see `kernels.experts`."""
    layout = segments.segment_layout(choices, mlp.weight1.shape[0])
    inputs = CpuInputs(
        x_TD=x_TD,
        weights_TK=choices.weights_TK,
        weight1_EHD=mlp.weight1,
        bias1_EH=mlp.bias1,
        weight2_EOH=mlp.weight2,
        bias2_EO=mlp.bias2,
        cast1_EHD=mlp.cast(mlp.weight1) if mlp.keeps_casts else None,
        cast2_EOH=mlp.cast(mlp.weight2) if mlp.keeps_casts else None,
        row_TK=layout.row_TK,
        choice_R=layout.choice_R,
        ends_E=layout.ends_E,
        dtype=mlp.dtype,
        tanh=mlp.activation.approximate == "tanh",
        is_training=torch.is_grad_enabled() and mlp.is_learned(x_TD, choices.weights_TK),
    )
    y_TO, *_ = cpu_experts(*inputs)
    return y_TO


class CpuInputs(NamedTuple):
    """What the forward pass takes.

    Attributes:
        x_TD: Tokens.
        weights_TK: Combine weights; those of dropped choices do not count.
        weight1_EHD: Weights of the first layer, of any type.
        bias1_EH: Its bias or None.
        weight2_EOH: Weights of the second layer, of any type.
        bias2_EO: Its bias or None.
        cast1_EHD: A copy of `weight1_EHD` in `dtype`, or None.
        cast2_EOH: A copy of `weight2_EOH` in `dtype`, or None.
        row_TK: See `rows.RowLayout`.
        choice_R: See `rows.RowLayout`; sorted by expert.
        ends_E: See `rows.RowLayout`.
        dtype: The compute type.
        tanh: Whether GELU is the tanh approximation.
        is_training: Whether to keep tensors for the backward pass.
    """

    x_TD: Tensor
    weights_TK: Tensor
    weight1_EHD: Tensor
    bias1_EH: Tensor | None
    weight2_EOH: Tensor
    bias2_EO: Tensor | None
    cast1_EHD: Tensor | None
    cast2_EOH: Tensor | None
    row_TK: Tensor
    choice_R: Tensor
    ends_E: Tensor
    dtype: torch.dtype
    tanh: bool
    is_training: bool


class CpuGradientInputs(NamedTuple):
    """What the backward pass takes: the result's gradient, and the saved inputs and results of the forward pass.

    `x_dtype` is the tokens' type. `needed` lists which of the first six fields of `CpuInputs` need a gradient.
    """

    grad_TO: Tensor
    weights_TK: Tensor
    weight1_EHD: Tensor
    bias1_EH: Tensor | None
    weight2_EOH: Tensor
    bias2_EO: Tensor | None
    cast1_EHD: Tensor | None
    cast2_EOH: Tensor | None
    row_TK: Tensor
    choice_R: Tensor
    ends_E: Tensor
    x_RD: Tensor
    pre_RH: Tensor
    y_RO: Tensor
    x_dtype: torch.dtype
    tanh: bool
    needed: list[bool]


def _forward_on_cpu(inputs: CpuInputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dispatch, both layers and combine.

    Returns:
        The result (T, O). For the backward pass (else empty): the tokens' rows (R, D), the first layer's results (R, H)
        and the second's (R, O).
    """
    new, dtype = shared_memory().take, inputs.dtype
    width_H, width_D = inputs.weight1_EHD.shape[1:]
    num_rows, width_O = inputs.choice_R.shape[0], inputs.weight2_EOH.shape[1]
    counts, most = _rows_of_experts(inputs.ends_E)
    kept_rows = num_rows if inputs.is_training else most
    x_TD = inputs.x_TD.to(dtype)
    x_RD, pre_RH = new(kept_rows, width_D, dtype=dtype), new(kept_rows, width_H, dtype=dtype)
    act_RH, y_RO = new(most, width_H, dtype=dtype), new(num_rows, width_O, dtype=dtype)
    weight1, weight2 = (
        _WeightsOfExpert(inputs.weight1_EHD, inputs.cast1_EHD, dtype),
        _WeightsOfExpert(inputs.weight2_EOH, inputs.cast2_EOH, dtype),
    )
    top_k = inputs.row_TK.shape[1]
    token_R = inputs.choice_R if top_k == 1 else inputs.choice_R.div(top_k, rounding_mode="floor")
    for expert, own in _used_experts(counts):
        count = own.stop - own.start
        # without a backward pass all experts reuse the same rows
        kept = own if inputs.is_training else slice(count)
        x, pre, act = x_RD[kept], pre_RH[kept], act_RH[:count]
        torch.index_select(x_TD, 0, token_R[own], out=x)
        _write_linear(x, weight1.of(expert), _bias_of(inputs.bias1_EH, expert, dtype), pre)
        aten.gelu.out(pre, approximate=_approximation(inputs.tanh), out=act)
        _write_linear(act, weight2.of(expert), _bias_of(inputs.bias2_EO, expert, dtype), y_RO[own])
    y_TO = _sum_of_rows(y_RO, inputs.row_TK, sum(counts), inputs.weights_TK.to(dtype))
    if inputs.is_training:
        return y_TO, x_RD, pre_RH, y_RO
    return y_TO, *(y_TO.new_empty(0, width) for width in (width_D, width_H, width_O))


def _fake_on_cpu(inputs: CpuInputs) -> tuple[Tensor, ...]:
    _, width_H, width_D = inputs.weight1_EHD.shape
    width_O = inputs.weight2_EOH.shape[1]
    num_rows = inputs.choice_R.shape[0] if inputs.is_training else 0
    y_TO = inputs.x_TD.new_empty(inputs.x_TD.shape[0], width_O, dtype=inputs.dtype)
    return y_TO, *(y_TO.new_empty(num_rows, width) for width in (width_D, width_H, width_O))


def _gradient_on_cpu(inputs: CpuGradientInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the combine weights, weight1, bias1, weight2 and bias2; empty where not `needed`."""
    new, dtype = shared_memory().take, inputs.x_RD.dtype
    needs_x, needs_weights, *needs_parameters = inputs.needed
    counts, most = _rows_of_experts(inputs.ends_E)
    grad_TO = inputs.grad_TO.to(dtype)
    weight_R1 = inputs.weights_TK.reshape(-1).index_select(0, inputs.choice_R).to(dtype)[:, None]
    weight1, weight2 = (
        _WeightsOfExpert(inputs.weight1_EHD, inputs.cast1_EHD, dtype),
        _WeightsOfExpert(inputs.weight2_EOH, inputs.cast2_EOH, dtype),
    )
    parameters = zip(
        (inputs.weight1_EHD, inputs.bias1_EH, inputs.weight2_EOH, inputs.bias2_EO), needs_parameters, strict=True
    )
    grads = [_GradientByExpert(parameter, is_needed, dtype, counts) for parameter, is_needed in parameters]
    grad_weight1, grad_bias1, grad_weight2, grad_bias2 = grads
    needs_hidden = needs_x or grad_weight1.is_needed or grad_bias1.is_needed
    grad_weight_R = weight_R1.new_zeros(inputs.choice_R.shape)
    grad_RD = new(*inputs.x_RD.shape, dtype=dtype)
    some_RO, some_RH, more_RH = (
        new(most, like.shape[1], dtype=dtype) for like in (inputs.y_RO, inputs.pre_RH, inputs.pre_RH)
    )
    token_R = inputs.choice_R.div(inputs.row_TK.shape[1], rounding_mode="floor")
    in_rows = (token_R, weight_R1, grad_weight_R, inputs.x_RD, inputs.pre_RH, inputs.y_RO, grad_RD)
    each = zip(counts, *(_split_by_expert(rows, counts) for rows in in_rows), strict=True)
    for expert, (count, token, weight, grad_weight, x, pre, y, grad_x) in enumerate(each):
        if not count:
            continue
        grad_y, grad_pre, act = (some[:count] for some in (some_RO, some_RH, more_RH))
        torch.index_select(grad_TO, 0, token, out=grad_y)
        if needs_weights:
            torch.sum(grad_y * y, 1, out=grad_weight)
        grad_y.mul_(weight)
        if grad_weight2.is_needed:
            aten.gelu.out(pre, approximate=_approximation(inputs.tanh), out=act)
            grad_weight2.write_product(expert, grad_y, act)
        grad_bias2.write_sum(expert, grad_y)
        if needs_hidden:
            torch.mm(grad_y, weight2.of(expert), out=grad_pre)
            aten.gelu_backward.grad_input(grad_pre, pre, approximate=_approximation(inputs.tanh), grad_input=grad_pre)
            grad_weight1.write_product(expert, grad_pre, x)
            grad_bias1.write_sum(expert, grad_pre)
        if needs_x:
            torch.mm(grad_pre, weight1.of(expert), out=grad_x)
    grad_x_TD = _sum_of_rows(grad_RD, inputs.row_TK, sum(counts)) if needs_x else inputs.x_RD.new_empty(0)
    grad_weights_TK = grad_weight_R.index_select(0, inputs.row_TK.reshape(-1)).view_as(inputs.row_TK)
    return grad_x_TD.to(inputs.x_dtype), grad_weights_TK.to(inputs.weights_TK.dtype), *(grad.value for grad in grads)


def _fake_gradient_on_cpu(inputs: CpuGradientInputs) -> tuple[Tensor, ...]:
    new, width_D = inputs.x_RD.new_empty, inputs.x_RD.shape[1]
    needs_x, _, *needs_parameters = inputs.needed
    parameters = (inputs.weight1_EHD, inputs.bias1_EH, inputs.weight2_EOH, inputs.bias2_EO)
    return (
        new((inputs.row_TK.shape[0], width_D) if needs_x else (0,), dtype=inputs.x_dtype),
        torch.empty_like(inputs.weights_TK),
        *(
            new(0) if like is None or not is_needed else torch.empty_like(like)
            for like, is_needed in zip(parameters, needs_parameters, strict=True)
        ),
    )


def _save_on_cpu(ctx, inputs: CpuInputs, output: tuple[Tensor, ...]) -> None:
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        inputs.x_TD, inputs.weights_TK, inputs.weight1_EHD, inputs.bias1_EH, inputs.weight2_EOH, inputs.bias2_EO,
        inputs.cast1_EHD, inputs.cast2_EOH, inputs.row_TK, inputs.choice_R, inputs.ends_E, *kept,
    )  # fmt: skip
    ctx.tanh = inputs.tanh


def _backward_on_cpu(ctx, grad_TO: Tensor | None, *_) -> dict[str, Tensor]:
    if grad_TO is None:
        return {}
    learned = ("x_TD", "weights_TK", "weight1_EHD", "bias1_EH", "weight2_EOH", "bias2_EO")  # the first of `CpuInputs`
    needed = list(ctx.needs_input_grad[: len(learned)])
    x_TD, *saved = ctx.saved_tensors
    inputs = CpuGradientInputs(grad_TO, *saved, x_TD.dtype, ctx.tanh, needed)
    is_differentiable = torch.is_grad_enabled()
    grads = _differentiable_gradient(x_TD, inputs) if is_differentiable else cpu_experts_backward(*inputs)
    return {name: grad for name, grad, is_needed in zip(learned, grads, needed, strict=True) if is_needed}


def _differentiable_gradient(x_TD: Tensor, inputs: CpuGradientInputs) -> list[Tensor | None]:
    """The result of `cpu_experts_backward` with a graph (create_graph=True), computed by the backend `segments`."""
    learned = [
        x_TD, inputs.weights_TK, inputs.weight1_EHD, inputs.bias1_EH, inputs.weight2_EOH, inputs.bias2_EO
    ]  # fmt: skip
    # aliases cut the graph: the combine weights may depend on the tokens, and that path has a gradient of its own
    learned = [each if each is None else each.view_as(each) for each in learned]
    x_TD, weights_TK, *parameters = learned
    layout, dtype = rows.RowLayout(inputs.row_TK, inputs.choice_R, inputs.ends_E), inputs.x_RD.dtype
    activation = nn.GELU(_approximation(inputs.tanh))
    mlp = Mlp(*parameters, activation, None, 0.0, dtype, lambda weight: weight.detach().to(dtype))
    hidden_RO = composed.two_layers(rows.dispatch(x_TD.to(dtype), layout), mlp, layout, segments.linear_of_layout)
    y_TO = rows.combine(hidden_RO, weights_TK, layout)
    chosen = [each for each, is_needed in zip(learned, inputs.needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(y_TO, chosen, inputs.grad_TO, create_graph=True))
    return [next(found) if is_needed else None for is_needed in inputs.needed]


cpu_experts_backward = operator("cpu_experts_backward", _gradient_on_cpu, _fake_gradient_on_cpu)
cpu_experts = operator("cpu_experts", _forward_on_cpu, _fake_on_cpu, _save_on_cpu, _backward_on_cpu)


class _WeightsOfExpert:
    """The weights of one expert at a time, in the compute type."""

    def __init__(self, weight_EOD: Tensor, cast_EOD: Tensor | None, dtype: torch.dtype) -> None:
        weight_EOD = weight_EOD if cast_EOD is None else cast_EOD
        self._weight_EOD = weight_EOD
        self._cast = None if weight_EOD.dtype == dtype else torch.empty(weight_EOD.shape[1:], dtype=dtype)

    def of(self, expert: int) -> Tensor:
        """(O, D). The next call may overwrite them."""
        weight = self._weight_EOD[expert]
        return weight if self._cast is None else self._cast.copy_(weight)


class _GradientByExpert:
    """The gradient of a parameter, written for one expert at a time; empty where it is not needed."""

    def __init__(self, parameter: Tensor | None, is_needed: bool, dtype: torch.dtype, counts: list[int]) -> None:
        self.is_needed = is_needed and parameter is not None
        if not self.is_needed:
            self.value = torch.empty(0, dtype=dtype)
            return
        self.value = shared_memory().take(*parameter.shape, dtype=parameter.dtype)
        self._each = self.value.unbind(0)
        self._rounded = None if parameter.dtype == dtype else torch.empty(parameter.shape[1:], dtype=dtype)
        # no product writes an idle expert's gradient
        for expert, count in enumerate(counts):
            if not count:
                self._each[expert].zero_()

    def write_product(self, expert: int, grad_RO: Tensor, x_RD: Tensor) -> None:
        """Writes the gradient (O, D) of the weights, from the results' gradient and the rows they multiplied."""
        if not self.is_needed:
            return
        if self._rounded is None:
            torch.mm(grad_RO.t(), x_RD, out=self._each[expert])
        else:
            self._each[expert].copy_(torch.mm(grad_RO.t(), x_RD, out=self._rounded))

    def write_sum(self, expert: int, grad_RO: Tensor) -> None:
        """Writes the gradient (O,) of the bias."""
        if self.is_needed:
            torch.sum(grad_RO, 0, dtype=self.value.dtype, out=self._each[expert])


def _rows_of_experts(ends_E: Tensor) -> tuple[list[int], int]:
    """The number of rows of each expert, and the largest of these numbers."""
    counts = [end - start for start, end in pairwise([0, *ends_E.tolist()])]
    return counts, max(counts)


def _split_by_expert(rows_R: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """Each expert's rows, without the rows after the last expert's."""
    return rows_R[: sum(counts)].split(counts)


def _used_experts(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, with its rows."""
    end = 0
    for expert, count in enumerate(counts):
        end += count
        if count:
            yield expert, slice(end - count, end)


def _bias_of(bias_EO: Tensor | None, expert: int, dtype: torch.dtype) -> Tensor | None:
    return None if bias_EO is None else bias_EO[expert].to(dtype)


def _write_linear(x_RD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, y_RO: Tensor) -> None:
    if bias_O is None:
        torch.mm(x_RD, weight_OD.t(), out=y_RO)
    else:
        torch.addmm(bias_O, x_RD, weight_OD.t(), out=y_RO)


def _sum_of_rows(y_RO: Tensor, row_TK: Tensor, num_used: int, weights_TK: Tensor | None = None) -> Tensor:
    """(T, O): the sum of each token's rows times their weights. Rows from `num_used` on do not count."""
    if num_used < y_RO.shape[0]:  # dropped choices add this row of zeros
        y_RO[num_used] = 0
        row_TK = row_TK.clamp(max=num_used)
    if row_TK.numel() == 0:
        return y_RO.new_zeros(row_TK.shape[0], y_RO.shape[1])
    return F.embedding_bag(row_TK, y_RO, mode="sum", per_sample_weights=weights_TK)


def _approximation(tanh: bool) -> str:
    return "tanh" if tanh else "none"
