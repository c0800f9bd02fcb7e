"""The GPU's kernels on fake tensors: same memory and work as on a GPU. (A CPU would use other operators.)

B images of N tokens, T = B*N tokens of width D; E experts of hidden width H (F before a gate), K choices; R rows of the
buffer that experts compute; P processes over which experts are sharded.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vmoe.moe import moe_layers
from vmoe.moe.experts import Experts, compute_dtype
from vmoe.moe.kernels import Kernels
from vmoe.moe.kernels.experts import composed, padded, requirements, rows, segments
from vmoe.moe.kernels.interface import Choices, Mlp
from vmoe.moe.kernels.sizes import rows_of_buffer, rows_of_share
from vmoe.moe.mlps import Glu
from vmoe.moe.parallel import DistributedExperts
from vmoe.moe.routing import Routing, SlotRouting

Charge = Callable[..., None]  # (kind, dtype, flops, bytes, calls)


class FakeKernels(TorchFunctionMode):
    """A mode with flash attention, dropout in one kernel, and experts sharded over `expert_size` processes.

    Args:
        model: Its experts are replaced, permanently.
        charge: Called with the work of each fake kernel.
        send: Called with the bytes of each exchange between processes.
        expert_size: Number of processes over which experts are sharded; None without expert parallelism.
        like_gpu: Whether to use the fused kernels' experts; else those of the CPU stay.
    """

    def __init__(
        self, model: nn.Module, charge: Charge, send: Callable[[int], None], expert_size: int | None, like_gpu: bool
    ) -> None:
        super().__init__()
        self.charge, self.like_gpu = charge, like_gpu
        for _, layer in moe_layers(model):
            experts = layer.experts
            if expert_size is not None:
                experts.__class__ = _FakeExchangedExperts
                experts.mesh = SimpleNamespace(size=lambda: expert_size)
                experts.send, experts.like_gpu = send, like_gpu
            elif like_gpu:
                experts.__class__ = _FakeFusedExperts
            experts.charge = charge

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if mask is None:  # with a mask torch uses another kernel
                query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
                return _flash_attention(query, key, value, self.charge)
        if func is F.dropout and self.like_gpu:
            return _dropout(*args, **kwargs)
        return func(*args, **kwargs)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p > 0 else x


class _Fake(torch.autograd.Function):
    """A kernel described by the tensors that it makes.

    `forward(*tensors)` returns the result and the tensors to keep; `backward(grad, kept)` returns the gradients, and
    frees what it removes from the list `kept`. Neither may hold other tensors.
    """

    @staticmethod
    def forward(ctx, forward: Callable, backward: Callable, *tensors: Tensor | None) -> Tensor:
        result, kept = forward(*tensors)
        ctx.save_for_backward(*kept)
        ctx.gradients = backward
        return result

    @staticmethod
    def backward(ctx, grad: Tensor):
        kept = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()
        return None, None, *ctx.gradients(grad, kept)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, charge: Charge) -> Tensor:
    """Flash attention on (B, heads, N, head width). It keeps query, key, value, result and a number per row."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (part.to(torch.get_autocast_dtype("cpu")) for part in (query, key, value))

    def forward(query: Tensor, key: Tensor, value: Tensor):
        images, heads, tokens, width = query.shape
        result = query.new_empty(images, tokens, heads, width).transpose(1, 2)
        sums = query.new_empty(images, heads, tokens, dtype=torch.float32)
        charge("attention", query.dtype, 4 * key.shape[2] * query.numel(), 4 * _bytes(query))
        return result, (query, key, value, result, sums)

    def backward(grad: Tensor, kept: list[Tensor]):
        query, key, value, *_ = kept
        accumulated = query.new_empty(query.shape, dtype=torch.float32)
        grads = tuple(part.new_empty(part.shape) for part in (query, key, value))
        moved = 8 * _bytes(query) + 2 * _bytes(accumulated)
        charge("attention", query.dtype, 10 * key.shape[2] * query.numel(), moved, 3)
        return grads

    return _Fake.apply(forward, backward, query, key, value)


class _FakeFusedExperts(Experts):
    """Experts with memory and work as in `vmoe.moe.kernels.experts.fused`."""

    def forward(self, x_TD: Tensor, routing: Routing | SlotRouting, kernels: Kernels | None = None) -> Tensor:
        if not isinstance(routing, Routing):
            return super().forward(x_TD, routing, kernels)
        dtype = compute_dtype(x_TD)
        mlp, choices = self._mlp(dtype), Choices.of(routing)
        if not _is_fused(mlp):
            backend = segments if choices.capacity is None else padded
            return backend.expert_mlp(x_TD, choices, mlp)
        return _fused(x_TD, choices, mlp, self.charge)


def _fused(x_TD: Tensor, choices: Choices, mlp: Mlp, charge: Charge) -> Tensor:
    """Dispatch, both layers and combine, with memory as in `vmoe.moe.kernels.experts.fused.mlp`."""
    biases, recompute, is_gated = (mlp.bias1, mlp.bias2), mlp.recompute, isinstance(mlp.activation, Glu)
    num_experts, num_choices = mlp.weight1.shape[0], choices.chosen_TK.numel()
    share = rows_of_share(choices.slots_of_expert, num_choices, num_experts)
    num_rows = rows_of_buffer(num_choices, num_experts, share)

    def forward(x_TD, weights_TK, weight1, _, weight2, __, cast1, cast2):
        (_, width_F, width_D), (_, width_O, width_H) = weight1.shape, weight2.shape
        x_RD, pre_RF = cast1.new_empty(num_rows, width_D), cast1.new_empty(num_rows, width_F)
        act_RH, y_RO = cast1.new_empty(num_rows, width_H), cast1.new_empty(num_rows, width_O)
        y_TO = cast1.new_empty(x_TD.shape[0], width_O)
        choice_R = x_TD.new_empty(num_rows, dtype=torch.int32)
        products = 2 * num_rows * (width_D * width_F + width_H * width_O)
        # Products hide their memory traffic, as measured. Calls of these kernels are not counted: the trace counts the
        # router's operators, which exceed its kernels by about as many.
        charge("products", cast1.dtype, products, 0, 0)
        elementwise = _bytes(x_TD) + sum(map(_bytes, (x_RD, pre_RF, act_RH, y_RO, y_TO)))
        charge("other", cast1.dtype, 0, elementwise, 0)
        kept = [] if recompute else [act_RH]
        return y_TO, (x_TD, weights_TK, weight1, weight2, cast1, cast2, x_RD, pre_RF, y_RO, choice_R, *kept)

    def backward(grad_TO, kept):
        x_TD, weights_TK, weight1, weight2, cast1, cast2, x_RD, pre_RF, y_RO, _, *act_RH = kept
        kept.clear()
        charge("products", cast1.dtype, 4 * (x_RD.shape[0] * (cast1[0].numel() + cast2[0].numel())), 0, 0)
        again = _bytes(pre_RF) + x_RD.shape[0] * weight2.shape[2] * pre_RF.element_size() if recompute else 0
        elementwise = (
            _bytes(grad_TO) + 4 * _bytes(y_RO) + 3 * _bytes(pre_RF) + again + _bytes(weight1) + _bytes(weight2)
        )
        charge("other", cast1.dtype, 0, elementwise + _bytes(x_TD), 0)
        grads_of_biases = [None if bias is None else torch.empty_like(bias) for bias in biases]
        grad_RO, grad_weights = torch.empty_like(y_RO), torch.empty_like(weights_TK)
        del y_RO
        grad2 = torch.empty_like(weight2)
        act_RH.clear()
        hidden_RH = pre_RF.new_empty(pre_RF.shape[0], weight2.shape[2])
        grad_pre_RF = torch.empty_like(pre_RF) if is_gated else hidden_RH
        del pre_RF, cast1, cast2, hidden_RH
        grad1 = torch.empty_like(weight1)
        del grad_pre_RF, x_RD
        grad_bias1, grad_bias2 = grads_of_biases
        grad_x = torch.empty_like(x_TD)
        del grad_RO
        return grad_x, grad_weights, grad1, grad_bias1, grad2, grad_bias2, None, None

    casts = [weight.detach().to(mlp.dtype) for weight in (mlp.weight1, mlp.weight2)]
    learned = (mlp.weight1, mlp.bias1, mlp.weight2, mlp.bias2)
    return _Fake.apply(forward, backward, x_TD, choices.weights_TK, *learned, *casts)


def _is_fused(mlp: Mlp) -> bool:
    return requirements.missing_feature(mlp) is None and requirements.unsupported_width(mlp) is None


class _FakeExchangedExperts(DistributedExperts):
    """Experts sharded over processes, without the network."""

    send: Callable[[int], None]
    like_gpu: bool

    def _by_capacity(self, x_TD: Tensor, choices: Choices, num_experts: int, mlp: Mlp, kernels: Kernels) -> Tensor:
        if not (self.like_gpu and _is_fused(mlp)):
            return super()._by_capacity(x_TD, choices, num_experts, mlp, kernels)
        num_rows = num_experts * choices.groups.count * choices.capacity
        x_RD = _fake_scatter(x_TD, num_rows, mlp.dtype, self.charge)
        return _fake_combine(self._even(x_RD, mlp, kernels), choices.weights_TK, self.charge)

    def _own_experts(self, x_RD: Tensor, choices: Choices, mlp: Mlp, kernels: Kernels) -> Tensor:
        if not (self.like_gpu and _is_fused(mlp)):
            return super()._own_experts(x_RD, choices, mlp, kernels)
        return _fused(x_RD, choices, mlp, self.charge)

    def _uneven(self, x_RD: Tensor, counts_E: Tensor, mlp: Mlp, kernels: Kernels) -> Tensor:
        # the load is assumed fair, so as many rows arrive as leave
        x_RD = self._exchange(x_RD, [], [])
        own = mlp.weight1.shape[0]
        order_R = torch.arange(x_RD.shape[0])
        layout = rows.RowLayout(order_R, order_R, torch.arange(1, own + 1, dtype=torch.int32) * (x_RD.shape[0] // own))
        y_RD = composed.two_layers(x_RD[order_R], mlp, layout, segments.linear_of_layout)
        return self._exchange(y_RD[order_R], [], [])

    def _exchange(self, x_RD: Tensor, arriving: list[int], sent: list[int]) -> Tensor:
        def sent_as_much(x_RD: Tensor) -> Tensor:
            self.send(_bytes(x_RD))
            return torch.empty_like(x_RD)

        return _Fake.apply(lambda x: (sent_as_much(x), ()), lambda grad, _: (sent_as_much(grad),), x_RD.contiguous())

    def _local(self, parameter: Tensor | None) -> Tensor | None:
        return parameter


def _fake_scatter(x_TD: Tensor, num_rows: int, dtype: torch.dtype, charge: Charge) -> Tensor:
    """The fake of `vmoe.moe.kernels.experts.fused.shares.scatter_shares`."""
    shape, own = x_TD.shape, x_TD.dtype

    def forward(x_TD: Tensor):
        x_RD = x_TD.new_empty(num_rows, shape[1], dtype=dtype)
        charge("other", dtype, 0, _bytes(x_TD) + _bytes(x_RD), 3)
        return x_RD, ()

    def backward(grad_RD: Tensor, _: list[Tensor]):
        grad_TD = grad_RD.new_empty(shape, dtype=own)
        charge("other", dtype, 0, _bytes(grad_RD) + _bytes(grad_TD), 1)
        return (grad_TD,)

    return _Fake.apply(forward, backward, x_TD)


def _fake_combine(y_RD: Tensor, weights_TK: Tensor, charge: Charge) -> Tensor:
    """The fake of `vmoe.moe.kernels.experts.fused.shares.combine_shares`."""

    def forward(y_RD: Tensor, weights_TK: Tensor):
        y_TD = y_RD.new_empty(len(weights_TK), y_RD.shape[1])
        charge("other", y_RD.dtype, 0, _bytes(y_RD) + _bytes(y_TD), 1)
        return y_TD, (y_RD, weights_TK, y_RD.new_empty(len(y_RD), dtype=torch.int32))

    def backward(grad_TD: Tensor, kept: list[Tensor]):
        y_RD, weights_TK, _ = kept
        charge("other", y_RD.dtype, 0, _bytes(grad_TD) + 2 * _bytes(y_RD), 2)
        return torch.empty_like(y_RD), torch.empty_like(weights_TK)

    return _Fake.apply(forward, backward, y_RD, weights_TK)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
