"""Backend `cpu`: the whole expert MLP on the CPU, one expert after the other on its stretch of sorted rows.

What an expert's products, activation and their gradients pass on stays in cache; gradients of weights are computed
where they end up; what lasts longer lies in memory that is taken again in the next step (`memory`). Nothing is added
in an order that changes, so results are repeatable bit for bit.

T tokens of width D with K choices; E experts of hidden width H; O width of the results; R = T*K rows, sorted by expert,
those without an expert behind.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.kernels import segments
from vmoe.moe.kernels.interface import Choices, Mlp
from vmoe.moe.kernels.memory import shared_memory
from vmoe.moe.kernels.operators import operator

aten = torch.ops.aten


def takes(mlp: Mlp) -> bool:
    """Whether the experts have nothing but two layers and GELU."""
    return isinstance(mlp.activation, nn.GELU) and mlp.norm is None and mlp.dropout == 0


def expert_mlp(x_TD: Tensor, choices: Choices, mlp: Mlp) -> Tensor:
    """(T, D) -> (T, O), see `kernels`."""
    layout = segments.layout(choices, mlp.weight1.shape[0])
    learned = (x_TD, choices.weights_TK, mlp.weight1, mlp.bias1, mlp.weight2, mlp.bias2)
    is_training = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in learned)
    casts = (mlp.cast(weight) if mlp.keeps_casts else None for weight in (mlp.weight1, mlp.weight2))
    is_tanh = mlp.activation.approximate == "tanh"
    return cpu_experts(*learned, *casts, *layout, mlp.dtype, is_tanh, is_training)[0]


def _forward(
    x_TD: Tensor, weights_TK: Tensor, weight1_EHD: Tensor, bias1_EH: Tensor | None, weight2_EOH: Tensor,
    bias2_EO: Tensor | None, cast1_EHD: Tensor | None, cast2_EOH: Tensor | None, row_TK: Tensor, choice_R: Tensor,
    ends_E: Tensor, dtype: torch.dtype, tanh: bool, is_training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Dispatch, both layers and combine.

    Args:
        x_TD: Tokens.
        weights_TK: Combine weights; those of dropped choices do not count.
        weight1_EHD: First layer, like `weight2_EOH` of any type.
        bias1_EH: Bias or None.
        weight2_EOH: Second layer.
        bias2_EO: Bias or None.
        cast1_EHD: The weights in the type that is computed in, like `cast2_EOH`, if there is a copy; else None.
        cast2_EOH: The second layer's.
        row_TK: See `rows.Layout`, like `choice_R` and `ends_E`.
        choice_R: Sorted by expert.
        ends_E: Where each expert's rows end.
        dtype: The type that is computed in.
        tanh: Which GELU.
        is_training: Whether to keep what the backward pass needs.

    Returns:
        The result (T, O) and, for the backward pass, empty unless `is_training`: the tokens' rows (R, D), the first
        layer's results (R, H) and the second's (R, O).
    """
    new = shared_memory().take
    _, width_H, width_D = weight1_EHD.shape
    num_rows, width_O = choice_R.shape[0], weight2_EOH.shape[1]
    stretches, most = _stretches(ends_E)
    token_R = choice_R // row_TK.shape[1]
    kept_rows = num_rows if is_training else most
    x_TD = x_TD.to(dtype)
    x_RD, pre_RH = new(kept_rows, width_D, dtype=dtype), new(kept_rows, width_H, dtype=dtype)
    act_RH, y_RO = new(most, width_H, dtype=dtype), new(num_rows, width_O, dtype=dtype)
    weight1, weight2 = _Weights(weight1_EHD, cast1_EHD, dtype), _Weights(weight2_EOH, cast2_EOH, dtype)
    bias1_EH, bias2_EO = (None if bias is None else bias.to(dtype) for bias in (bias1_EH, bias2_EO))
    for expert, start, end in stretches:
        at = slice(start, end) if is_training else slice(0, end - start)
        act = act_RH[: end - start]
        torch.index_select(x_TD, 0, token_R[start:end], out=x_RD[at])
        _linear(x_RD[at], weight1[expert], bias1_EH, expert, pre_RH[at])
        aten.gelu.out(pre_RH[at], approximate=_approximation(tanh), out=act)
        _linear(act, weight2[expert], bias2_EO, expert, y_RO[start:end])
    y_TO = _sum_of_rows(y_RO, row_TK, stretches, weights_TK.to(dtype))
    if is_training:
        return y_TO, x_RD, pre_RH, y_RO
    return y_TO, *(y_TO.new_empty(0, width) for width in (width_D, width_H, width_O))


def _fake(x_TD, weights_TK, weight1, bias1, weight2, bias2, cast1, cast2, row_TK, choice_R, ends_E, dtype, tanh,
          is_training):  # fmt: skip
    _, width_H, width_D = weight1.shape
    width_O = weight2.shape[1]
    num_rows = choice_R.shape[0] if is_training else 0
    y_TO = x_TD.new_empty(x_TD.shape[0], width_O, dtype=dtype)
    return y_TO, *(y_TO.new_empty(num_rows, width) for width in (width_D, width_H, width_O))


def _gradient(
    grad_TO: Tensor, weights_TK: Tensor, weight1_EHD: Tensor, bias1_EH: Tensor | None, weight2_EOH: Tensor,
    bias2_EO: Tensor | None, cast1_EHD: Tensor | None, cast2_EOH: Tensor | None, row_TK: Tensor, choice_R: Tensor,
    ends_E: Tensor, x_RD: Tensor, pre_RH: Tensor, y_RO: Tensor, x_dtype: torch.dtype, tanh: bool, needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, the combine weights, weight1, bias1, weight2 and bias2; empty where not `needed`."""
    new, dtype = shared_memory().take, x_RD.dtype
    needs_x, needs_weights, *needs_parameters = needed
    stretches, most = _stretches(ends_E)
    token_R = choice_R // row_TK.shape[1]
    grad_TO = grad_TO.to(dtype)
    weight_R = weights_TK.reshape(-1).index_select(0, choice_R).to(dtype)
    weight1, weight2 = _Weights(weight1_EHD, cast1_EHD, dtype), _Weights(weight2_EOH, cast2_EOH, dtype)
    grads = [
        _Gradient(parameter, dtype, is_needed, stretches)
        for parameter, is_needed in zip((weight1_EHD, bias1_EH, weight2_EOH, bias2_EO), needs_parameters, strict=True)
    ]
    grad_weight1, grad_bias1, grad_weight2, grad_bias2 = grads
    needs_hidden = needs_x or grad_weight1.is_needed or grad_bias1.is_needed
    grad_weight_R = weight_R.new_zeros(weight_R.shape)
    grad_RD = new(*(x_RD.shape if needs_x else (0, 0)), dtype=dtype)
    some_RO, some_RH, more_RH = (new(most, like.shape[1], dtype=dtype) for like in (y_RO, pre_RH, pre_RH))
    for expert, start, end in stretches:
        pre = pre_RH[start:end]
        grad_y, grad_pre, act = (some[: end - start] for some in (some_RO, some_RH, more_RH))
        torch.index_select(grad_TO, 0, token_R[start:end], out=grad_y)
        if needs_weights:
            torch.sum(grad_y * y_RO[start:end], 1, out=grad_weight_R[start:end])
        grad_y.mul_(weight_R[start:end, None])
        if grad_weight2.is_needed:
            aten.gelu.out(pre, approximate=_approximation(tanh), out=act)
        grad_weight2.write_product(expert, grad_y, act)
        grad_bias2.write_sum(expert, grad_y)
        if needs_hidden:
            torch.mm(grad_y, weight2[expert], out=grad_pre)
            aten.gelu_backward.grad_input(grad_pre, pre, approximate=_approximation(tanh), grad_input=grad_pre)
        grad_weight1.write_product(expert, grad_pre, x_RD[start:end])
        grad_bias1.write_sum(expert, grad_pre)
        if needs_x:
            torch.mm(grad_pre, weight1[expert], out=grad_RD[start:end])
    grad_x = _sum_of_rows(grad_RD, row_TK, stretches) if needs_x else grad_RD
    grad_weights_TK = grad_weight_R.index_select(0, row_TK.reshape(-1)).view_as(row_TK)
    return grad_x.to(x_dtype), grad_weights_TK.to(weights_TK.dtype), *(grad.value for grad in grads)


def _fake_gradient(grad_TO, weights_TK, weight1, bias1, weight2, bias2, cast1, cast2, row_TK, choice_R, ends_E, x_RD,
                   pre_RH, y_RO, x_dtype, tanh, needed):  # fmt: skip
    return (
        x_RD.new_empty((row_TK.shape[0], x_RD.shape[1]) if needed[0] else (0, 0), dtype=x_dtype),
        torch.empty_like(weights_TK),
        *(
            weight1.new_empty(0) if like is None or not is_needed else torch.empty_like(like)
            for like, is_needed in zip((weight1, bias1, weight2, bias2), needed[2:], strict=True)
        ),
    )


def _save(ctx, inputs, output) -> None:
    x_TD, *tensors, _, tanh, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.x_dtype, ctx.tanh = x_TD.dtype, tanh


def _backward(ctx, grad_TO: Tensor | None, *_):
    if grad_TO is None:
        return (None,) * 14
    needed = list(ctx.needs_input_grad[:6])
    grads = cpu_experts_backward(grad_TO, *ctx.saved_tensors, ctx.x_dtype, ctx.tanh, needed)
    return *(grad if is_needed else None for grad, is_needed in zip(grads, needed, strict=True)), *(None,) * 8


cpu_experts_backward = operator("cpu_experts_backward", _gradient, _fake_gradient)
cpu_experts = operator("cpu_experts", _forward, _fake, _save, _backward)


class _Weights:
    """The weights of one expert after the other in the type that is computed in."""

    def __init__(self, weight_EOD: Tensor, cast_EOD: Tensor | None, dtype: torch.dtype) -> None:
        self._weight_EOD = weight_EOD if cast_EOD is None else cast_EOD
        self._cast = None
        if self._weight_EOD.dtype != dtype:
            self._cast = torch.empty(weight_EOD.shape[1:], dtype=dtype)

    def __getitem__(self, expert: int) -> Tensor:
        weight = self._weight_EOD[expert]
        return weight if self._cast is None else self._cast.copy_(weight)


class _Gradient:
    """The gradient of a parameter, written for one expert after the other; empty where it is not needed."""

    def __init__(
        self, parameter: Tensor | None, dtype: torch.dtype, is_needed: bool, stretches: list[tuple[int, int, int]]
    ) -> None:
        self.is_needed = is_needed and parameter is not None
        if not self.is_needed:
            self.value = torch.empty(0)
            return
        self.value = shared_memory().take(*parameter.shape, dtype=parameter.dtype)
        self._rounded = None if parameter.dtype == dtype else torch.empty(parameter.shape[1:], dtype=dtype)
        for expert in set(range(parameter.shape[0])).difference(expert for expert, *_ in stretches):
            self.value[expert] = 0

    def write_product(self, expert: int, grad_RO: Tensor, x_RD: Tensor) -> None:
        """The gradient of weights that turned x into something of this gradient."""
        if not self.is_needed:
            return
        if self._rounded is None:
            torch.mm(grad_RO.t(), x_RD, out=self.value[expert])
        else:
            self.value[expert] = torch.mm(grad_RO.t(), x_RD, out=self._rounded)

    def write_sum(self, expert: int, grad_RO: Tensor) -> None:
        """The gradient of a bias."""
        if self.is_needed:
            self.value[expert] = grad_RO.sum(0, dtype=self.value.dtype)


def _stretches(ends_E: Tensor) -> tuple[list[tuple[int, int, int]], int]:
    """(expert, first row, row behind its last) of each expert that has rows; the longest's number of rows."""
    ends = ends_E.tolist()
    stretches = [(expert, start, end) for expert, (start, end) in enumerate(pairwise([0, *ends])) if end > start]
    return stretches, max((end - start for _, start, end in stretches), default=0)


def _linear(x_RD: Tensor, weight_OD: Tensor, bias_EO: Tensor | None, expert: int, y_RO: Tensor) -> None:
    if bias_EO is None:
        torch.mm(x_RD, weight_OD.t(), out=y_RO)
    else:
        torch.addmm(bias_EO[expert], x_RD, weight_OD.t(), out=y_RO)


def _sum_of_rows(
    y_RO: Tensor, row_TK: Tensor, stretches: list[tuple[int, int, int]], weights_TK: Tensor | None = None
) -> Tensor:
    """(T, O): the sum of each token's rows, times their weights; rows behind the last expert's count nothing."""
    used = stretches[-1][2] if stretches else 0
    if used < y_RO.shape[0]:
        y_RO[used] = 0
        row_TK = row_TK.clamp(max=used)
    if row_TK.numel() == 0:
        return y_RO.new_zeros(row_TK.shape[0], y_RO.shape[1])
    return F.embedding_bag(row_TK, y_RO, mode="sum", per_sample_weights=weights_TK)


def _approximation(tanh: bool) -> str:
    return "tanh" if tanh else "none"
