"""Auxiliary losses that keep all experts in use (Riquelme et al. 2021, appendix A.2, and others).

G groups of S tokens; E experts; K choices per token. Every loss is computed per group and returned as (G,). With
`valid_GS` only real tokens count.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe.moe.config import MoeConfig
from vmoe.moe.kernels import PLAIN, Kernels
from vmoe.moe.routing import Routing, SlotRouting


class Usage(NamedTuple):
    """Statistics of a routing decision, without gradient; see `vmoe.moe.layer.Statistics`.

    Attributes:
        load: (E,).
        dropped: ().
        entropy: ().
    """

    load: Tensor
    dropped: Tensor
    entropy: Tensor


class Accounts(NamedTuple):
    """The auxiliary loss of a decision, and what it is made of.

    Attributes:
        loss: The weighted sum of the losses, (), with gradient.
        importance: The importance loss, unweighted and without gradient, (); zero where there is none.
        load: The load loss, as above.
        usage: Statistics.
    """

    loss: Tensor
    importance: Tensor
    load: Tensor
    usage: Usage


def accounts_of(
    routing: Routing | SlotRouting, moe: MoeConfig, is_noisy: bool, kernels: Kernels = PLAIN, is_counted: bool = True
) -> Accounts:
    """The accounts of a decision. Without `is_counted` the losses are zero: those of another layer hold them."""
    each, usage = losses_and_usage(routing, moe, is_noisy, kernels)
    zero = routing.gates_GSE.new_zeros(())
    if not is_counted:
        each = {}
    loss = weighted_sum(each, moe) if each else zero
    return Accounts(loss, each.get("importance", zero).detach(), each.get("load", zero).detach(), usage)


def losses_and_usage(
    routing: Routing | SlotRouting, moe: MoeConfig, is_noisy: bool, kernels: Kernels = PLAIN
) -> tuple[dict[str, Tensor], Usage]:
    """The auxiliary losses (see `auxiliary_losses`) and the usage."""
    if kernels.routing is not None and isinstance(routing, Routing) and _fits_kernels(kernels.routing, routing, moe):
        return _by_kernels(kernels.routing, routing, moe, is_noisy)
    with torch.no_grad():
        usage = Usage(routing.load_E(), routing.dropped(), routing.entropy())
    return auxiliary_losses(routing, moe, is_noisy), usage


def auxiliary_losses(routing: Routing | SlotRouting, moe: MoeConfig, is_noisy: bool) -> dict[str, Tensor]:
    """The losses of a routing decision, unweighted and averaged over the groups, by their name in `MoeConfig`.

    Args:
        routing: The decision. Routers that fill slots balance the load by construction and have no losses.
        moe: The layer's configuration.
        is_noisy: Whether the router drew noise. Without noise there is no load loss.
    """
    if not isinstance(routing, Routing):
        return {}
    losses = {"importance": importance_loss(routing.logits_GSE, routing.valid_GS)}
    if is_noisy:
        noisy_GSE = routing.noisy_logits_GSE
        losses["load"] = load_loss(
            routing.logits_GSE, noisy_GSE, moe.top_k, moe.logit_noise, routing.valid_GS, moe.ensemble
        )
    return {**_averaged(losses), **_other_losses(routing, moe)}


def _other_losses(routing: Routing, moe: MoeConfig) -> dict[str, Tensor]:
    losses = {}
    if moe.gshard_loss_weight > 0:
        # sigmoid gates do not sum to 1, and the loss would fall if all of them fell; so normalised gates are used, as
        # in DeepSeek-V3, equation 18
        gates_GSE = routing.logits_GSE.softmax(-1) if moe.router == "sigmoid" else routing.gates_GSE
        losses["gshard"] = gshard_loss(gates_GSE, routing.valid_GS)
    if moe.z_loss_weight > 0:
        losses["z"] = z_loss(routing.logits_GSE, routing.valid_GS)
    return _averaged(losses)


def _averaged(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss_G.sum() / max(loss_G.shape[0], 1) for name, loss_G in losses.items()}


def _fits_kernels(routing_kernels: ModuleType, routing: Routing, moe: MoeConfig) -> bool:
    # the gates of "hash" and "random" are no softmax of logits; the kernel supports neither padding nor ensembles
    is_softmax = moe.router not in ("hash", "random") and routing.valid_GS is None
    return is_softmax and moe.ensemble == 1 and routing_kernels.takes_logits(routing.logits_GSE)


def _by_kernels(
    routing_kernels: ModuleType, routing: Routing, moe: MoeConfig, is_noisy: bool
) -> tuple[dict[str, Tensor], Usage]:
    importance, load, statistics, _ = routing_kernels.balance(
        routing.logits_GSE,
        routing.noisy_logits_GSE if is_noisy else None,
        routing.chosen_GSK,
        routing.capacity,
        moe.logit_noise,
    )
    losses = {"importance": importance, **({"load": load} if is_noisy else {})}
    return {**losses, **_other_losses(routing, moe)}, Usage(statistics[:-4], statistics[-4], statistics[-3])


def weighted_sum(losses: dict[str, Tensor], moe: MoeConfig) -> Tensor:
    """The layer's auxiliary loss, a scalar. Without losses it is a zero on the CPU."""
    terms = [getattr(moe, f"{name}_loss_weight") * loss for name, loss in losses.items()]
    return sum(terms[1:], terms[0]) if terms else torch.zeros(())


def importance_loss(logits_GSE: Tensor, valid_GS: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' summed gates, from clean logits (equation 7)."""
    return squared_variation(_masked(logits_GSE.softmax(-1), valid_GS).sum(1))


def load_loss(
    logits_GSE: Tensor,
    noisy_logits_GSE: Tensor,
    top_k: int,
    noise_scale: float,
    valid_GS: Tensor | None = None,
    ensemble: int = 1,
) -> Tensor:
    """Squared coefficient of variation of the experts' expected load (equations 8 to 10).

    The load of an expert is the sum over tokens of the probability that it is among the top K when only its own noise
    is drawn again. `noise_scale` is the noise's standard deviation. In an ensemble the result is the mean of the
    members' losses. (The other losses need no such mean: all members have the same weight in them.)
    """
    threshold_GS1 = noisy_logits_GSE.topk(top_k, dim=-1).values[..., -1:]
    chosen_probability_GSE = torch.special.ndtr((logits_GSE - threshold_GS1) / noise_scale)
    load_GE = _masked(chosen_probability_GSE, valid_GS).sum(1)
    if ensemble == 1:
        return squared_variation(load_GE)
    return squared_variation(load_GE.unflatten(-1, (ensemble, -1))).mean(-1)


def gshard_loss(gates_GSE: Tensor, valid_GS: Tensor | None = None) -> Tensor:
    """E times the sum over experts of (mean gate x share of first choices) (GShard, algorithm 1).

    A token's gates sum to 1.
    """
    num_experts = gates_GSE.shape[-1]
    first_GSE = torch.nn.functional.one_hot(gates_GSE.argmax(-1), num_experts).to(gates_GSE.dtype)
    mean_gate_GE = _masked_mean(gates_GSE, valid_GS)
    first_share_GE = _masked_mean(first_GSE, valid_GS)
    return num_experts * (mean_gate_GE * first_share_GE).sum(-1)


def z_loss(logits_GSE: Tensor, valid_GS: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the logits, which keeps them small (ST-MoE, equation 5)."""
    return _masked_mean(logits_GSE.logsumexp(-1, keepdim=True).square(), valid_GS).squeeze(-1)


def squared_variation(values_GE: Tensor) -> Tensor:
    """(std / mean)^2 over experts, (G,). The variance has a finite gradient where all are equal; std has not."""
    mean_G = values_GE.mean(-1)
    smallest = torch.finfo(values_GE.dtype).tiny ** 0.5  # the mean of a group of only padding is 0
    return values_GE.var(-1, correction=0) / mean_G.square().clamp_min(smallest)


def _masked(values_GSX: Tensor, valid_GS: Tensor | None) -> Tensor:
    return values_GSX if valid_GS is None else values_GSX * valid_GS[..., None]


def _masked_mean(values_GSX: Tensor, valid_GS: Tensor | None) -> Tensor:
    if valid_GS is None:
        return values_GSX.sum(1) / max(values_GSX.shape[1], 1)
    return _masked(values_GSX, valid_GS).sum(1) / valid_GS.sum(1, keepdim=True).clamp_min(1)


def inject_gradient(y: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """Returns `y`. In the backward pass `loss` gets the gradient `scale`, as if the task's loss included scale * loss.

    `y` has any shape; `loss` and `scale` are scalars.
    """
    return _InjectGradient.apply(y, loss, scale)


class _InjectGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, loss, scale = inputs
        ctx.save_for_backward(scale)
        ctx.loss_dtype = loss.dtype

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        (scale,) = ctx.saved_tensors
        return grad_y, scale.to(ctx.loss_dtype), None
