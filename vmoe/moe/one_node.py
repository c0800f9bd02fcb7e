"""Routing, assignment and balance losses as one node of autograd's graph, for eager training on a GPU.

Each operation on a tensor with a gradient costs the host time twice: for itself, and for its node in the backward pass.
With few tokens a layer waits for that. Compiled code has no such cost and takes the steps one by one.

T tokens of width D, in G groups of S tokens; E experts; K choices per token.
"""

from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from vmoe.moe.assignment import Capacity, assign
from vmoe.moe.attached import is_bare
from vmoe.moe.config import MoeConfig
from vmoe.moe.groups import Groups
from vmoe.moe.kernels import Kernels
from vmoe.moe.kernels.operators import is_traced
from vmoe.moe.kernels.sizes import MAX_SCORES
from vmoe.moe.losses import Accounts, Usage
from vmoe.moe.routers import TokenChoiceRouter, token_choice
from vmoe.moe.routing import Routing
from vmoe.moe.scores import Gate, with_noise


class OneNodeResult(NamedTuple):
    """What the node returns. Only the combine weights, the tokens and the loss have a gradient.

    Attributes:
        routing: The router's decision after `assign`.
        x_TD: The tokens for the experts, see `Routed`.
        accounts: The balance losses and the usage.
    """

    routing: Routing
    x_TD: Tensor
    accounts: Accounts


class _Inputs(NamedTuple):
    router: TokenChoiceRouter
    groups: Groups
    capacity: Capacity | None
    moe: MoeConfig
    kernels: Any  # the package `kernels.routing`


def is_taken(
    router: nn.Module, x_TD: Tensor, valid_GS: Tensor | None, moe: MoeConfig, kernels: Kernels
) -> TypeGuard[TokenChoiceRouter]:
    """Whether `decide` computes this pass: plain token choice in an eager training step, by Triton's kernels."""
    if kernels.routing is None or valid_GS is not None or not torch.is_grad_enabled() or is_traced():
        return False
    if not isinstance(router, TokenChoiceRouter) or not is_bare(router, TokenChoiceRouter):
        return False
    if not is_bare(router.gate, Gate):
        return False
    has_other_losses = moe.gshard_loss_weight > 0 or moe.z_loss_weight > 0
    if has_other_losses or moe.ensemble > 1 or moe.removed_experts or moe.num_experts > MAX_SCORES:
        return False
    return torch.float64 not in (x_TD.dtype, router.gate.weight.dtype)


def decide(
    router: TokenChoiceRouter, x_TD: Tensor, groups: Groups, capacity: Capacity | None, moe: MoeConfig, kernels: Kernels
) -> OneNodeResult:
    """The decision for the tokens, with the losses and statistics that `losses.accounts_of` computes."""
    without_gradient: list[Any] = []  # of results without gradient autograd needs to know nothing
    inputs = _Inputs(router, groups, capacity, moe, kernels.routing)
    x_TD, weights_GSK, loss = _OneNode.apply(x_TD, router.gate.weight, inputs, without_gradient)
    routing, balance = without_gradient
    usage = Usage(balance.statistics[:-2], balance.statistics[-2], balance.statistics[-1])
    accounts = Accounts(loss, balance.importance, balance.load, usage)
    return OneNodeResult(routing._replace(weights_GSK=weights_GSK), x_TD, accounts)


class _OneNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_ED: Tensor, inputs: _Inputs, results: list[Any]):
        router, groups, capacity, moe, kernels = inputs
        logits_TE = kernels.scores(x_TD, weight_ED)
        noisy_TE = logits_TE
        if router.training:
            noisy_TE = with_noise(logits_TE, router.noise_scale, router.draw_noise)
        logits_GSE, noisy_GSE = groups.split(logits_TE), groups.split(noisy_TE)
        choice = token_choice(
            logits_GSE, noisy_GSE, groups, router.top_k, router.renormalize, None, Kernels(kernels, None)
        )
        routing = assign(choice, capacity, moe.batch_priority, Kernels(kernels, None))
        noise_GSE = noisy_GSE if router.training and moe.draws_noise else None
        balance = kernels.weighted_balance(
            logits_GSE, noise_GSE, routing.chosen_GSK, routing.kept_GSK, moe.logit_noise, _loss_weights(moe, kernels)
        )
        results += routing, balance
        ctx.set_materialize_grads(False)
        ctx.inputs = inputs
        ctx.save_for_backward(
            x_TD, weight_ED, logits_GSE, noise_GSE, routing.gates_GSE, routing.chosen_GSK, routing.weights_GSK,
            balance.sums_G2E,
        )  # fmt: skip
        return x_TD.view_as(x_TD), routing.weights_GSK, balance.loss

    @staticmethod
    def backward(ctx, grad_TD: Tensor | None, grad_GSK: Tensor | None, grad_loss: Tensor | None):
        if grad_GSK is None and grad_loss is None:
            return grad_TD, None, None, None
        x_TD, weight_ED, logits_GSE, noisy_GSE, gates_GSE, chosen_GSK, weights_GSK, sums_G2E = ctx.saved_tensors
        router, groups, _, moe, kernels = ctx.inputs
        gates_TE, chosen_TK, weights_TK = (groups.merge(each) for each in (gates_GSE, chosen_GSK, weights_GSK))
        grad_TK = None if grad_GSK is None else groups.merge(grad_GSK)
        grad_TE = kernels.gates_backward(None, grad_TK, gates_TE, chosen_TK, weights_TK, router.renormalize)
        if grad_loss is not None:
            kernels.add_loss_gradient(
                grad_loss,
                logits_GSE,
                noisy_GSE,
                chosen_GSK,
                sums_G2E,
                moe.logit_noise,
                _loss_weights(moe, kernels),
                grad_TE,
            )
        return *kernels.scores_backward(grad_TE, x_TD, weight_ED, grad_TD), None, None


def _loss_weights(moe: MoeConfig, kernels: Any) -> Any:
    return kernels.Weights(moe.importance_loss_weight, moe.load_loss_weight)
