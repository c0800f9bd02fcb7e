"""The whole layer as one node of autograd's graph, for eager code on a GPU: routing, experts, losses.

Each operation on a tensor with a gradient costs the host time twice: for itself, and for its node in the backward pass.
With few tokens a layer waits for that. Compiled code has no such cost and takes the steps one by one.

T tokens of width D, in G groups of S tokens; E experts; K choices per token; R rows of the buffer that experts compute.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vmoe.moe.assignment import Capacity, sorted_order
from vmoe.moe.attached import is_bare
from vmoe.moe.config import MoeConfig
from vmoe.moe.experts import Experts, compute_dtype
from vmoe.moe.groups import Groups
from vmoe.moe.kernels import Kernels
from vmoe.moe.kernels.experts import requirements
from vmoe.moe.kernels.interface import Mlp
from vmoe.moe.kernels.operators import first_derivative_only
from vmoe.moe.kernels.sizes import MAX_COMPARED, MAX_SCORES, rows_of_share
from vmoe.moe.routers import TokenChoiceRouter
from vmoe.moe.scores import Gate


class Pass(NamedTuple):
    """What the node computes with, besides tensors that have a gradient.

    Attributes:
        router: Plain token choice.
        mlp: The experts.
        form: The function between their layers.
        moe: The layer's configuration.
        groups: How the tokens are grouped.
        capacities: C, and the slots of an expert for the last group; None where nothing is dropped.
        kernels: Triton's.
    """

    router: TokenChoiceRouter
    mlp: Mlp
    form: requirements.Form
    moe: MoeConfig
    groups: Groups
    capacities: tuple[int, int] | None
    kernels: Any

    @classmethod
    def of(
        cls, router: nn.Module, experts: Experts, moe: MoeConfig, x: Tensor, groups: Groups, kernels: Kernels,
        is_training: bool,
    ) -> "Pass | None":  # fmt: skip
        """None where the steps must be taken one by one: for other routers and other experts."""
        if kernels.routing is None or kernels.experts is None or not x.numel():
            return None
        if not isinstance(router, TokenChoiceRouter) or not is_bare(router, TokenChoiceRouter):
            return None
        if not is_bare(router.gate, Gate) or not is_bare(experts, Experts):
            return None
        has_other_losses = moe.gshard_loss_weight > 0 or moe.z_loss_weight > 0
        if has_other_losses or moe.ensemble > 1 or moe.removed_experts or moe.num_experts > MAX_SCORES:
            return None
        if torch.float64 in (x.dtype, router.gate.weight.dtype):
            return None
        if router.noise_scale != moe.logit_noise:  # set by hand; the load loss keeps the configuration's
            return None
        if experts.backend != "fused" and not (experts.backend == "auto" and x.is_cuda):
            return None
        # before the weights: hooks and adapters may make them, which takes time
        form, has_dropout = requirements.Form.of(experts.act), experts.training and experts.drop1.p > 0
        if form is None or experts.norm is not None or has_dropout:
            return None
        mlp = experts._mlp(compute_dtype(x), x)
        if requirements.missing_feature(mlp) or requirements.unsupported_width(mlp):
            return None
        capacity = Capacity.of_pass(groups, None, moe, is_training)
        return cls(router, mlp, form, moe, groups, capacity and (capacity.most, capacity.last), kernels)

    def options(self) -> Any:
        """How tokens choose, for `kernels.routing.decide`."""
        router = self.router
        return self.kernels.routing.Options(
            router.top_k, router.renormalize, router.noise_scale, self.moe.batch_priority
        )

    def loss_weights(self) -> Any:
        """The weights of the balance losses."""
        return self.kernels.routing.Weights(self.moe.importance_loss_weight, self.moe.load_loss_weight)


def routed_experts(x: Tensor, of_pass: Pass) -> tuple[Tensor, Callable[[], tuple[Tensor, Tensor]]]:
    """Routes the tokens, runs their experts and combines the results.

    Args:
        x: (..., D).
        of_pass: What to compute with.

    Returns:
        The tokens after their experts (..., O). A function that returns the auxiliary loss () and the statistics in a
        row, see `kernels.routing.balance.Balance`: with gradient they are computed already, without it computes them.
    """
    mlp, gate_ED = of_pass.mlp, of_pass.router.gate.weight
    if torch.is_grad_enabled():
        learned = gate_ED, mlp.weight1, mlp.bias1, mlp.weight2, mlp.bias2
        statistics: list[Tensor] = []  # of a result without gradient autograd needs to know nothing
        y, loss = _OneNode.apply(x, *learned, of_pass, statistics)
        return y, lambda: (loss, *statistics)
    y, balance, *_ = _forward(x, gate_ED, of_pass, is_training=False)
    return y, lambda: balance()[:2]  # which may be kept for long, so it holds nothing large


class _Steps(NamedTuple):
    """What the forward pass leaves.

    Attributes:
        y: The result, (..., O).
        balance: Computes the losses and statistics.
        saved: Tensors for the backward pass; the balance's sums are not yet among them.
        share: See `RowOwners`.
    """

    y: Tensor
    balance: Callable[[], Any]
    saved: tuple[Tensor | None, ...]
    share: int


def _forward(x: Tensor, gate_ED: Tensor, of_pass: Pass, is_training: bool) -> _Steps:
    router, mlp, form, moe, groups, capacities, kernels = of_pass
    routing, experts = kernels
    # views are taken in here, where they are no nodes of the graph
    x_TD, gate_ED = x.contiguous().view(-1, x.shape[-1]), gate_ED.contiguous()
    noise_TE = None
    if router.training and moe.draws_noise:
        noise_TE = torch.empty(x_TD.shape[0], moe.num_experts, dtype=torch.float32, device=x_TD.device)
        # a copy of other noise, because the noisy logits take its place
        noise_TE = noise_TE.normal_() if router.draw_noise is None else noise_TE.copy_(router.draw_noise(noise_TE))
    decision = routing.decide(x_TD, gate_ED, noise_TE, groups, of_pass.options())
    row_TK, choice_R, starts_E, counts_E, share = _rows(decision, of_pass)
    of_experts = (
        decision.weights_TK, starts_E, counts_E, mlp.weight1, mlp.bias1, mlp.weight2, mlp.bias2, mlp.cast(mlp.weight1),
        mlp.cast(mlp.weight2),
    )  # fmt: skip
    inputs = experts.ExpertInputs(
        x_TD, row_TK, decision.chosen_TK, *of_experts, share, *form, is_training, mlp.recompute
    )
    y_TO, *kept = experts.forward_of_experts(inputs, choice_R)

    counts = routing.Counts(groups.size, groups.last, moe.num_experts, router.top_k, capacities, noise_TE is not None)
    balance = partial(routing.balance_of_blocks, decision.parts, counts, of_pass.loss_weights())
    saved = gate_ED, decision.logits_TE, decision.noisy_TE, decision.chosen_TK, x_TD, row_TK, *of_experts, *kept
    y = y_TO.resize_(*x.shape[:-1], y_TO.shape[-1])  # no view, since nobody might change that in place
    return _Steps(y, balance, saved, share)


class _OneNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate_ED: Tensor, *others: Any):
        *_, of_pass, results = others
        steps = _forward(x, gate_ED, of_pass, any(ctx.needs_input_grad))
        balance = steps.balance()
        results.append(balance.statistics)
        ctx.set_materialize_grads(False)
        # not the pass: a parametrization's weights would live as long as the node
        ctx.of_experts = steps.share, *of_pass.form, of_pass.mlp.recompute
        ctx.options, ctx.loss_weights = of_pass.options(), of_pass.loss_weights()
        ctx.kernels, ctx.groups, ctx.shape = of_pass.kernels, of_pass.groups, x.shape
        ctx.save_for_backward(balance.sums_G2E, *steps.saved)
        return steps.y, balance.loss

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_loss: Tensor | None):
        if grad is None and grad_loss is None:
            return (None,) * 8
        routing, experts = ctx.kernels
        sums_G2E, gate_ED, logits_TE, noisy_TE, chosen_TK, x_TD, row_TK, *of_experts = ctx.saved_tensors
        with torch.no_grad():
            of_result, of_parameters = None, (None,) * 4
            if grad is not None:
                grad_TO = grad.reshape(-1, grad.shape[-1])
                inputs = experts.ExpertGradientInputs(grad_TO, x_TD, row_TK, *of_experts, *ctx.of_experts)
                kept = inputs.to_be_freed(ctx)
                del inputs, of_experts
                grad_RD, dots_RP, grad1, grad_bias1, grad2, grad_bias2 = experts.gradient_of_rows(kept)
                of_result = routing.OfResult(grad_RD, dots_RP, row_TK)
                of_parameters = (
                    grad1, None if kept.bias1_EF is None else grad_bias1,
                    grad2, None if kept.bias2_EO is None else grad_bias2,
                )  # fmt: skip
            of_loss = None if grad_loss is None else routing.OfLoss(grad_loss, ctx.loss_weights, sums_G2E)
            decision = routing.TokenChoices(logits_TE, noisy_TE, None, chosen_TK, None, None)
            grad_TD, grad_gate_ED = routing.decide_backward(
                x_TD, gate_ED, decision, ctx.groups, ctx.options, of_result, of_loss
            )
        grads: tuple[Tensor | None, ...] = (grad_TD.view(ctx.shape), grad_gate_ED, *of_parameters)
        if torch.is_grad_enabled():
            grads = first_derivative_only("one_node", grads)
        return *grads, None, None


def _rows(decision: Any, of_pass: Pass) -> Any:
    """The `kernels.counting.Rows` of the choices."""
    groups, chosen_TK, num_experts = of_pass.groups, decision.chosen_TK, of_pass.moe.num_experts
    routing = of_pass.kernels.routing
    if of_pass.capacities is None:
        return routing.rows_as_needed(chosen_TK, None, num_experts)
    order_GS = None
    if decision.best_T is not None:
        order_GS = (
            routing.order_in_groups(decision.best_T, groups.count, groups.size, groups.last)
            if groups.size <= MAX_COMPARED
            else sorted_order(groups.split(decision.best_T))  # gates are above the zeros of an incomplete group
        )
    slots = groups.count * of_pass.capacities[0]
    share = rows_of_share(slots, chosen_TK.numel(), num_experts)
    rows = routing.place_in_shares(chosen_TK, order_GS, groups, num_experts, of_pass.capacities, share or slots)
    return rows if share else routing.rows_as_needed(chosen_TK, rows.row_TK >= 0, num_experts)
