"""Other implementations of the experts with a given routing: common ones in plain PyTorch, and transformers'.

T tokens of width D; H hidden width; E experts; K choices per token; R = T*K rows; C slots of an expert; G groups of S
tokens. None drops a choice: the given routing stays within the capacity. Each computes, for parameters weight1
(E, H, D), bias1 (E, H), weight2 (E, D, H) and bias2 (E, D), the sum over a token's choices of
weight * (gelu(x @ weight1[e].T + bias1[e]) @ weight2[e].T + bias2[e]).
"""

import dataclasses
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.bench.cases import IMAGES_PER_GROUP, LayerCase, given_routing
from vmoe.moe import Routing

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
_PARAMETERS = ("weight1", "bias1", "weight2", "bias2")


class _Stacked(nn.Module):
    """Experts with stacked float32 parameters, computed in autocast's type."""

    def __init__(self, case: LayerCase, device: torch.device) -> None:
        super().__init__()
        self.case = case
        for name, value in _initial_parameters(case, device).items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D) -> (T, D)."""
        dtype = torch.get_autocast_dtype(x_TD.device.type) if _is_autocast(x_TD) else x_TD.dtype
        chosen_TK, weights_TK = routing.chosen_GSK[0], routing.weights_GSK[0]
        return self.compute(
            x_TD.to(dtype), chosen_TK, weights_TK.to(dtype), [getattr(self, n).to(dtype) for n in _PARAMETERS]
        )

    def compute(self, x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor, parameters: list[Tensor]) -> Tensor:
        raise NotImplementedError


class Loop(nn.Module):
    """Each expert has two linear layers. `where` finds its tokens, and `index_add_` adds its results."""

    def __init__(self, case: LayerCase, device: torch.device) -> None:
        super().__init__()
        for name, value in _initial_parameters(case, device).items():
            setattr(self, name, nn.ParameterList(value.clone() for value in value.unbind()))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """(T, D) -> (T, D)."""
        chosen_TK, weights_TK = routing.chosen_GSK[0], routing.weights_GSK[0]
        y_TD = None
        for expert, (weight1, bias1, weight2, bias2) in enumerate(
            zip(self.weight1, self.bias1, self.weight2, self.bias2, strict=True)
        ):
            token, choice = torch.where(chosen_TK == expert)
            hidden = F.gelu(F.linear(x_TD[token], weight1, bias1))
            part = F.linear(hidden, weight2, bias2) * weights_TK[token, choice, None]
            y_TD = x_TD.new_zeros(x_TD.shape, dtype=part.dtype) if y_TD is None else y_TD
            y_TD.index_add_(0, token, part)
        return y_TD


class PaddedBmm(_Stacked):
    """Gathers tokens into C slots per expert, multiplies them in batched products, and gathers the results."""

    def compute(self, x_TD, chosen_TK, weights_TK, parameters):
        (num_tokens, top_k), num_experts = chosen_TK.shape, self.case.num_experts
        capacity = math.ceil((self.case.capacity_factor or 1.0) * num_tokens * top_k / num_experts)
        with torch.no_grad():
            place_TK = chosen_TK * capacity + _slot_of_choice(chosen_TK, num_experts)
            token_R = torch.arange(num_tokens, device=x_TD.device)[:, None].expand(-1, top_k).reshape(-1)
            source = torch.full((num_experts * capacity,), num_tokens, device=x_TD.device)
            source.scatter_(0, place_TK.reshape(-1), token_R)
        padded = torch.cat([x_TD, x_TD.new_zeros(1, x_TD.shape[1])])
        y_ECD = _bmm_mlp(padded[source].view(num_experts, capacity, -1), parameters)
        return (y_ECD.flatten(0, 1)[place_TK] * weights_TK[..., None]).sum(1)


class GroupedMm(_Stacked):
    """Sorts choices by expert and uses torch's grouped product, as torchtitan does."""

    def compute(self, x_TD, chosen_TK, weights_TK, parameters):
        weight1, bias1, weight2, bias2 = parameters
        with torch.no_grad():
            expert_R, order_R = chosen_TK.reshape(-1).sort(stable=True)
            experts = torch.arange(self.case.num_experts, device=x_TD.device)
            ends_E = torch.searchsorted(expert_R, experts, right=True, out_int32=True)
            row_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=x_TD.device))
        x_RD = x_TD[order_R // chosen_TK.shape[1]]
        hidden = F.gelu(F.grouped_mm(x_RD, weight1.transpose(1, 2), offs=ends_E) + bias1[expert_R])
        y_RD = F.grouped_mm(hidden, weight2.transpose(1, 2), offs=ends_E) + bias2[expert_R]
        return (y_RD[row_R].view(*chosen_TK.shape, -1) * weights_TK[..., None]).sum(1)


class OneHotEinsum(_Stacked):
    """Dispatches and combines as GShard does: by products with one-hot tensors, in groups of 8 images."""

    def compute(self, x_TD, chosen_TK, weights_TK, parameters):
        num_experts, (num_tokens, width) = self.case.num_experts, x_TD.shape
        size = self.case.tokens * math.gcd(IMAGES_PER_GROUP, num_tokens // self.case.tokens)
        mean = size * chosen_TK.shape[1] / num_experts
        capacity = min(size, math.ceil(mean + 6 * math.sqrt(mean)))  # six standard deviations: nothing is dropped
        with torch.no_grad():
            rank_TK = torch.cat([_slot_of_choice(group, num_experts) for group in chosen_TK.split(size)])
            place_TK = chosen_TK * capacity + rank_TK
            dispatch = x_TD.new_zeros(num_tokens, num_experts * capacity).scatter_(1, place_TK, 1.0)
        dispatch = dispatch.view(-1, size, num_experts, capacity)
        gates_TE = x_TD.new_zeros(num_tokens, num_experts).scatter(1, chosen_TK, weights_TK)
        combine = dispatch * gates_TE.view(-1, size, num_experts, 1)
        x_EGCD = torch.einsum("gsd,gsec->egcd", x_TD.view(-1, size, width), dispatch)
        y_EGCD = _bmm_mlp(x_EGCD.flatten(1, 2), parameters).view_as(x_EGCD)
        return torch.einsum("egcd,gsec->gsd", y_EGCD, combine).reshape(num_tokens, width)


class Transformers(_Stacked):
    """The grouped experts of transformers, on weights cast to autocast's type."""

    def compute(self, x_TD, chosen_TK, weights_TK, parameters):
        from transformers.integrations.moe import grouped_mm_experts_forward

        weight1, bias1, weight2, bias2 = parameters
        experts = SimpleNamespace(
            num_experts=self.case.num_experts, has_gate=False, has_bias=True, is_transposed=False,
            has_post_expert_norm=False, _is_expert_parallel=False, act_fn=F.gelu,
            up_proj=weight1, up_proj_bias=bias1, down_proj=weight2, down_proj_bias=bias2,
        )  # fmt: skip
        return grouped_mm_experts_forward(experts, x_TD, chosen_TK, weights_TK)


PEERS = {
    "loop over experts": Loop,
    "padded bmm": PaddedBmm,
    "sort + grouped_mm": GroupedMm,
    "one-hot einsum": OneHotEinsum,
    "transformers grouped_mm": Transformers,
}


def check(peer: type[nn.Module], case: LayerCase, device: torch.device, dtype: torch.dtype) -> float:
    """The largest error of a peer's result and gradients on at most 8 images, relative to float64.

    Raises:
        ArithmeticError: The error is larger than rounding explains.
    """
    case = dataclasses.replace(case, images=min(case.images, IMAGES_PER_GROUP))
    module = peer(case, device)
    routing = given_routing(case, device)
    x_TD = torch.randn(case.num_tokens, case.width, device=device)
    cotangent = torch.randn_like(x_TD)
    exact = [_stacked(getattr(module, name)).detach().double().requires_grad_() for name in _PARAMETERS]
    leaves = [x_TD.double().requires_grad_(), routing.weights_GSK.double().requires_grad_()]
    y_TD = _in_float64(leaves[0], routing.chosen_GSK[0], leaves[1][0], exact)
    expected = [y_TD, *torch.autograd.grad(y_TD, [*leaves, *exact], cotangent.double())]

    x_TD.requires_grad_()
    routing.weights_GSK.requires_grad_()
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        y_TD = module(x_TD, routing)
    y_TD.backward(cotangent.to(y_TD.dtype))
    grads = [_stacked(getattr(module, name), of_gradient=True) for name in _PARAMETERS]
    found = [y_TD, x_TD.grad, routing.weights_GSK.grad, *grads]
    error = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))
    if not error <= TOLERANCES[dtype]:
        raise ArithmeticError(f"wrong by {error:.1e} against float64")
    return error


def _in_float64(x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor, parameters: list[Tensor]) -> Tensor:
    y_TD = torch.zeros_like(x_TD)
    for expert, (weight1, bias1, weight2, bias2) in enumerate(zip(*parameters, strict=True)):
        token, choice = torch.where(chosen_TK == expert)
        part = F.linear(F.gelu(F.linear(x_TD[token], weight1, bias1)), weight2, bias2)
        y_TD = y_TD.index_add(0, token, part * weights_TK[token, choice, None])
    return y_TD


def _initial_parameters(case: LayerCase, device: torch.device) -> dict[str, Tensor]:
    shape = case.num_experts, case.hidden, case.width
    weights = torch.randn(2, *shape, device=device) * 0.02
    biases = (torch.randn(case.num_experts, width, device=device) * 0.1 for width in (case.hidden, case.width))
    return dict(
        zip(_PARAMETERS, (weights[0], next(biases), weights[1].transpose(1, 2).contiguous(), next(biases)), strict=True)
    )


def _stacked(parameter: nn.Parameter | nn.ParameterList, of_gradient: bool = False) -> Tensor:
    if isinstance(parameter, nn.ParameterList):
        return torch.stack([one.grad if of_gradient else one for one in parameter])
    return parameter.grad if of_gradient else parameter


def _is_autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def _slot_of_choice(chosen_TK: Tensor, num_experts: int) -> Tensor:
    """The number of earlier choices of the same expert, (T, K). All first choices come before all second ones."""
    flow = chosen_TK.t().reshape(-1)
    is_expert = flow[None] == torch.arange(num_experts, device=flow.device)[:, None]
    count = is_expert.to(torch.int32).cumsum(1).gather(0, flow[None])[0] - 1
    return count.view(chosen_TK.shape[1], -1).t().long()


def _bmm_mlp(x_ECD: Tensor, parameters: list[Tensor]) -> Tensor:
    weight1, bias1, weight2, bias2 = parameters
    hidden = F.gelu(torch.baddbmm(bias1[:, None], x_ECD, weight1.transpose(1, 2)))
    return torch.baddbmm(bias2[:, None], hidden, weight2.transpose(1, 2))
