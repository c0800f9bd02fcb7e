"""Balance losses and statistics of a routing decision in three small kernels.

G groups of S tokens; E experts; K choices per token. Each block of a group's tokens writes its sums. A second kernel
adds them group by group, without atomic addition.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.kernels.launches import launch
from vmoe.moe.kernels.operators import operator
from vmoe.moe.kernels.routing.gates import softmax
from vmoe.moe.kernels.sizes import cdiv, columns_of, tokens_of_block

# sums per expert: gates, probabilities of being chosen, number of choices
_SUMS = 3


class Weights(NamedTuple):
    """The weights of the losses in their sum.

    Attributes:
        importance: Of the importance loss.
        load: Of the load loss.
    """

    importance: float
    load: float


class Balance(NamedTuple):
    """Balance losses and statistics of a decision.

    Attributes:
        loss: The weighted sum of both losses, ().
        importance: The importance loss of `vmoe.moe.losses`, averaged over the groups, ().
        load: The load loss, averaged over the groups, (); zero without noise.
        statistics: (E + 2,): each expert's share of the choices, the share of choices that were dropped, the mean
            entropy of the gates.
        sums_G2E: Sums for the backward pass, (G, 2, E).
    """

    loss: Tensor
    importance: Tensor
    load: Tensor
    statistics: Tensor
    sums_G2E: Tensor


def weighted_balance(
    logits_GSE: Tensor, noisy_logits_GSE: Tensor | None, chosen_GSK: Tensor, kept_GSK: Tensor | None,
    noise_scale: float, weights: Weights,
) -> Balance:  # fmt: skip
    """The balance losses, their weighted sum and statistics, without gradient.

    Args:
        logits_GSE: The logits without noise, float32.
        noisy_logits_GSE: The logits that routing used; None without noise. Then there is no load loss.
        chosen_GSK: The experts, best first.
        kept_GSK: Which choices were kept; None for all.
        noise_scale: Standard deviation of the noise.
        weights: The weights of the losses.
    """
    num_groups, size, num_experts = logits_GSE.shape
    logits_GSE = logits_GSE.contiguous()
    routed_by_GSE = logits_GSE if noisy_logits_GSE is None else noisy_logits_GSE.contiguous()
    columns, block = columns_of(num_experts), tokens_of_block(num_experts)
    num_blocks = cdiv(size, block)
    new = logits_GSE.new_empty
    parts, counts = new(num_groups, num_blocks, _SUMS, columns), new(num_groups, num_blocks, 2)
    sums_G2E, of_groups_GX = new(num_groups, 2, num_experts), new(num_groups, num_experts + 4)
    loss, importance, load, statistics = new(()), new(()), new(()), new(num_experts + 2)
    is_noisy, has_kept, top_k = noisy_logits_GSE is not None, kept_GSK is not None, chosen_GSK.shape[2]
    launch(
        _block_sums, (num_blocks, num_groups),
        (
            logits_GSE, routed_by_GSE, chosen_GSK.contiguous(), None if kept_GSK is None else kept_GSK.contiguous(),
            parts, counts,
        ),
        (size, num_experts, noise_scale, top_k, is_noisy, has_kept, block, columns),
    )  # fmt: skip
    launch(
        _group_sums, (num_groups,), (parts, counts, sums_G2E, of_groups_GX),
        (num_blocks, size, num_experts, top_k, is_noisy, has_kept, columns),
    )  # fmt: skip
    launch(
        _means, (1,), (of_groups_GX, loss, importance, load, statistics),
        (num_groups, num_experts, float(weights.importance), float(weights.load), 16, 2 * columns),
    )  # fmt: skip
    return Balance(loss, importance, load, statistics, sums_G2E)


def _balance(
    logits_GSE: Tensor, noisy_logits_GSE: Tensor | None, chosen_GSK: Tensor, kept_GSK: Tensor | None, noise_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Importance, load, statistics and sums; see `Balance`."""
    _, *each = weighted_balance(logits_GSE, noisy_logits_GSE, chosen_GSK, kept_GSK, noise_scale, Weights(1, 1))
    importance, load, statistics, sums_G2E = each
    return importance, load, statistics, sums_G2E


def _fake_balance(logits_GSE, noisy_logits_GSE, chosen_GSK, kept_GSK, noise_scale):
    num_groups, _, num_experts = logits_GSE.shape
    sums_G2E = logits_GSE.new_empty(num_groups, 2, num_experts)
    importance, load = logits_GSE.new_empty(()), logits_GSE.new_empty(())
    return importance, load, logits_GSE.new_empty(num_experts + 2), sums_G2E


def _balance_gradient(
    grad_importance: Tensor, grad_load: Tensor, logits_GSE: Tensor, noisy_logits_GSE: Tensor | None, chosen_GSK: Tensor,
    sums_G2E: Tensor, noise_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the clean and of the noisy logits. Without noise the latter is empty."""
    grad_GSE = torch.empty_like(logits_GSE, memory_format=torch.contiguous_format)
    grad_noisy_GSE = logits_GSE.new_empty(0) if noisy_logits_GSE is None else torch.empty_like(grad_GSE)
    _write_gradient(
        (grad_importance, grad_load), (logits_GSE, noisy_logits_GSE, chosen_GSK, sums_G2E), noise_scale, Weights(1, 1),
        (grad_GSE, grad_noisy_GSE), is_joint=False,
    )  # fmt: skip
    return grad_GSE, grad_noisy_GSE


def add_loss_gradient(
    grad_loss: Tensor, logits_GSE: Tensor, noisy_logits_GSE: Tensor | None, chosen_GSK: Tensor, sums_G2E: Tensor,
    noise_scale: float, weights: Weights, grad_GSE: Tensor,
) -> None:  # fmt: skip
    """Adds the gradient of `Balance.loss` to `grad_GSE`, where the noisy logits are the logits plus constant noise."""
    _write_gradient(
        (grad_loss, grad_loss), (logits_GSE, noisy_logits_GSE, chosen_GSK, sums_G2E), noise_scale, weights,
        (grad_GSE, grad_GSE), is_joint=True,
    )  # fmt: skip


def _write_gradient(
    grads: tuple[Tensor, Tensor], saved: tuple[Tensor, Tensor | None, Tensor, Tensor], noise_scale: float,
    weights: Weights, outs: tuple[Tensor, Tensor], is_joint: bool,
) -> None:  # fmt: skip
    logits_GSE, noisy_logits_GSE, chosen_GSK, sums_G2E = saved
    _, size, num_experts = logits_GSE.shape
    logits_GSE = logits_GSE.contiguous()
    is_noisy = noisy_logits_GSE is not None
    columns, block = columns_of(num_experts), tokens_of_block(num_experts)
    launch(
        _balance_backward, (cdiv(size, block), logits_GSE.shape[0]),
        (
            *grads, logits_GSE, noisy_logits_GSE.contiguous() if is_noisy else logits_GSE, chosen_GSK.contiguous(),
            sums_G2E, *outs,
        ),
        (
            size, num_experts, noise_scale, float(weights.importance), float(weights.load), chosen_GSK.shape[2],
            is_noisy, is_joint, block, columns,
        ),
    )  # fmt: skip


def _fake_balance_gradient(grad_importance, grad_load, logits_GSE, noisy_logits_GSE, chosen_GSK, sums_G2E, noise_scale):
    no_noise = noisy_logits_GSE is None
    return torch.empty_like(logits_GSE), logits_GSE.new_empty(0) if no_noise else torch.empty_like(logits_GSE)


balance_backward = operator("balance_backward", _balance_gradient, _fake_balance_gradient)


def _save_balance(ctx, inputs, output) -> None:
    _, _, statistics, sums_G2E = output
    ctx.mark_non_differentiable(statistics, sums_G2E)
    ctx.save_for_backward(inputs.logits_GSE, inputs.noisy_logits_GSE, inputs.chosen_GSK, sums_G2E)
    ctx.noise_scale = inputs.noise_scale


def _backward_of_balance(ctx, grad_importance: Tensor, grad_load: Tensor, *_) -> dict[str, Tensor | None]:
    logits_GSE, noisy_logits_GSE, chosen_GSK, sums_G2E = ctx.saved_tensors
    grad_GSE, grad_noisy_GSE = balance_backward(
        grad_importance, grad_load, logits_GSE, noisy_logits_GSE, chosen_GSK, sums_G2E, ctx.noise_scale
    )
    is_noisy = noisy_logits_GSE is not None
    return {"logits_GSE": grad_GSE, "noisy_logits_GSE": grad_noisy_GSE if is_noisy else None}


balance = operator("balance", _balance, _fake_balance, _save_balance, _backward_of_balance)


@triton.jit
def _block(logits, size, num_experts, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """(offsets in (G*S,), offsets in (G, S, E), is a token, is a token's expert, experts) of this program's tokens."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < size
    expert = tl.arange(0, COLUMNS)
    at_token = tl.program_id(1).to(tl.int64) * size + token
    at = at_token[:, None] * num_experts + expert[None, :]
    return at_token, at, is_token, is_token[:, None] & (expert < num_experts)[None, :], expert


@triton.jit
def _chance(logits, routed_by, last, expert, noise_scale):
    """(logits - threshold) / noise_scale. The threshold is the noisy logit of the last choice."""
    threshold = tl.sum(tl.where(expert[None, :] == last[:, None], routed_by, 0.0), 1)
    return (logits - threshold[:, None]) / noise_scale


@triton.jit(do_not_specialize=["size"])
def _block_sums(
    logits, noisy_logits, chosen, kept, parts, counts, size, num_experts, noise_scale, K: tl.constexpr,
    IS_NOISY: tl.constexpr, HAS_KEPT: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at_token, at, is_token, inside, expert = _block(logits, size, num_experts, TOKENS, COLUMNS)
    logit = tl.load(logits + at, mask=inside, other=-float("inf"))
    noisy = tl.load(noisy_logits + at, mask=inside, other=-float("inf"))
    gate = tl.where(inside, softmax(noisy, is_token), 0.0)
    entropy = tl.sum(tl.sum(tl.where(gate > 0, -gate * tl.log(tl.where(gate > 0, gate, 1.0)), 0.0), 1), 0)
    importance = tl.sum(tl.where(inside, softmax(logit, is_token), 0.0), 0)
    choices = tl.zeros((COLUMNS,), dtype=tl.float32)
    num_kept = 0.0
    for k in tl.static_range(K):
        choice = tl.load(chosen + at_token * K + k, mask=is_token, other=-1).to(tl.int32)
        choices += tl.sum((expert[None, :] == choice[:, None]).to(tl.float32), 0)
        if HAS_KEPT:
            num_kept += tl.sum(tl.load(kept + at_token * K + k, mask=is_token, other=0).to(tl.float32), 0)
    load = tl.zeros((COLUMNS,), dtype=tl.float32)
    if IS_NOISY:
        last = tl.load(chosen + at_token * K + (K - 1), mask=is_token, other=0).to(tl.int32)
        chance = _chance(logit, tl.where(inside, noisy, 0.0), last, expert, noise_scale)
        # the normal distribution function; 0.7071 is sqrt(1/2)
        chance = tl.where(inside, 0.5 + 0.5 * tl.erf(0.7071067811865476 * chance), 0.0)
        load = tl.sum(chance, 0)
    block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(parts + block * 3 * COLUMNS + expert, importance)
    tl.store(parts + (block * 3 + 1) * COLUMNS + expert, load)
    tl.store(parts + (block * 3 + 2) * COLUMNS + expert, choices)
    tl.store(counts + block * 2, num_kept)
    tl.store(counts + block * 2 + 1, entropy)


@triton.jit(do_not_specialize=["num_blocks", "size"])
def _group_sums(
    parts, counts, sums, of_groups, num_blocks, size, num_experts, K: tl.constexpr, IS_NOISY: tl.constexpr,
    HAS_KEPT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, COLUMNS)
    is_expert = expert < num_experts
    importance = tl.zeros((COLUMNS,), dtype=tl.float32)
    load, choices = tl.zeros((COLUMNS,), dtype=tl.float32), tl.zeros((COLUMNS,), dtype=tl.float32)
    num_kept, entropy = 0.0, 0.0
    for index in range(num_blocks):
        block = group * num_blocks + index
        importance += tl.load(parts + block * 3 * COLUMNS + expert)
        load += tl.load(parts + (block * 3 + 1) * COLUMNS + expert)
        choices += tl.load(parts + (block * 3 + 2) * COLUMNS + expert)
        num_kept += tl.load(counts + block * 2)
        entropy += tl.load(counts + block * 2 + 1)
    tl.store(sums + group * 2 * num_experts + expert, importance, mask=is_expert)
    tl.store(sums + (group * 2 + 1) * num_experts + expert, load, mask=is_expert)
    out = of_groups + group * (num_experts + 4)
    variation, _ = _squared_variation(importance, is_expert, num_experts)
    tl.store(out + num_experts + 2, variation)
    variation, _ = _squared_variation(load, is_expert, num_experts)
    tl.store(out + num_experts + 3, variation if IS_NOISY else 0.0)
    tl.store(out + expert, choices / (size * K), mask=is_expert)
    tl.store(out + num_experts, 1 - num_kept / (size * K) if HAS_KEPT else 0.0)
    tl.store(out + num_experts + 1, entropy / size)


@triton.jit(do_not_specialize=["num_groups"])
def _means(
    of_groups, loss, importance, load, statistics, num_groups, num_experts, importance_weight, load_weight,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, num_groups, ROWS):
        group = first + tl.arange(0, ROWS)
        at = of_groups + group[:, None].to(tl.int64) * (num_experts + 4) + column[None, :]
        total += tl.load(at, mask=(group < num_groups)[:, None] & (column < num_experts + 4)[None, :], other=0.0)
    mean = tl.sum(total, 0) / num_groups
    tl.store(statistics + column, mean, mask=column < num_experts + 2)
    mean_importance = tl.sum(tl.where(column == num_experts + 2, mean, 0.0), 0)
    mean_load = tl.sum(tl.where(column == num_experts + 3, mean, 0.0), 0)
    tl.store(importance, mean_importance)
    tl.store(load, mean_load)
    tl.store(loss, importance_weight * mean_importance + load_weight * mean_load)


@triton.jit
def _squared_variation(value, is_expert, num_experts):
    """(variance / mean^2, its gradient) over the experts."""
    value = tl.where(is_expert, value, 0.0)
    mean = tl.sum(value, 0) / num_experts
    away = tl.where(is_expert, value - mean, 0.0)
    variance = tl.sum(away * away, 0) / num_experts
    square = tl.maximum(mean * mean, 1.0842021724855044e-19)  # the root of float32's tiny, as in `losses`
    slope = 2.0 / num_experts * (away / square - variance * mean / (square * square))
    return variance / square, tl.where(is_expert, slope, 0.0)


@triton.jit(do_not_specialize=["size"])
def _balance_backward(
    grad_importance, grad_load, logits, noisy_logits, chosen, sums, grad_logits, grad_noisy_logits, size, num_experts,
    noise_scale, importance_weight, load_weight, K: tl.constexpr, IS_NOISY: tl.constexpr, IS_JOINT: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at_token, at, is_token, inside, expert = _block(logits, size, num_experts, TOKENS, COLUMNS)
    is_expert = expert < num_experts
    num_groups = tl.num_programs(1)
    sums += tl.program_id(1).to(tl.int64) * 2 * num_experts
    logit = tl.load(logits + at, mask=inside, other=-float("inf"))
    _, slope = _squared_variation(tl.load(sums + expert, mask=is_expert, other=0.0), is_expert, num_experts)
    slope *= tl.load(grad_importance) * importance_weight / num_groups
    gate = tl.where(inside, softmax(logit, is_token), 0.0)
    grad = gate * (slope[None, :] - tl.sum(gate * slope[None, :], 1)[:, None])
    if IS_NOISY:
        noisy = tl.load(noisy_logits + at, mask=inside, other=0.0)
        load = tl.load(sums + num_experts + expert, mask=is_expert, other=0.0)
        _, slope_of_load = _squared_variation(load, is_expert, num_experts)
        slope_of_load *= tl.load(grad_load) * load_weight / num_groups
        last = tl.load(chosen + at_token * K + (K - 1), mask=is_token, other=0).to(tl.int32)
        chance = _chance(tl.where(inside, logit, 0.0), noisy, last, expert, noise_scale)
        # the normal density; 0.3989 is 1 / sqrt(2 pi)
        density = tl.where(inside, 0.3989422804014327 * tl.exp(-0.5 * chance * chance) / noise_scale, 0.0)
        pull = density * slope_of_load[None, :]
        grad += pull
        # the threshold is the last choice's noisy logit, so it gets the opposite gradient
        grad_last = tl.where(expert[None, :] == last[:, None], -tl.sum(pull, 1)[:, None], 0.0)
        if IS_JOINT:
            grad += grad_last
        else:
            tl.store(grad_noisy_logits + at, grad_last, mask=inside)
    if IS_JOINT:
        grad += tl.load(grad_logits + at, mask=inside, other=0.0)
    tl.store(grad_logits + at, grad, mask=inside)
