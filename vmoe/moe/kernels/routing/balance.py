"""Balance losses and statistics of a routing decision in small kernels.

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
from vmoe.moe.kernels.routing.gates import gradient_of_softmax, softmax
from vmoe.moe.kernels.sizes import cdiv, columns_of, tokens_of_block

# sums per expert: gates, probabilities of being chosen, number of choices, terms of the entropy
SUMS = 4


class Weights(NamedTuple):
    """The weights of the losses in their sum.

    Attributes:
        importance: Of the importance loss.
        load: Of the load loss.
    """

    importance: float
    load: float


class Counts(NamedTuple):
    """What the sums over blocks of tokens need to become losses and statistics.

    Attributes:
        size: S.
        last: Tokens of the last group.
        num_experts: E.
        top_k: K.
        capacities: C, and that of the last group; None where nothing was dropped.
        is_noisy: Whether there is a load loss.
    """

    size: int
    last: int
    num_experts: int
    top_k: int
    capacities: tuple[int, int] | None
    is_noisy: bool


class Balance(NamedTuple):
    """Balance losses and statistics of a decision.

    Attributes:
        loss: The weighted sum of both losses, ().
        statistics: (E + 4,): each expert's share of the choices, the share of choices that were dropped, the mean
            entropy of the gates, the importance loss of `vmoe.moe.losses`, averaged over the groups, and the load loss,
            zero without noise.
        sums_G2E: Sums for the backward pass, (G, 2, E).
    """

    loss: Tensor
    statistics: Tensor
    sums_G2E: Tensor


def balance_of_blocks(
    parts: Tensor, counts: Counts, weights: Weights, each: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Balance:
    """The balance losses and statistics by the sums over blocks of tokens (G, blocks, SUMS, columns).

    `each` may have tensors () that take the importance and the load loss too.
    """
    num_groups, num_blocks, _, columns = parts.shape
    num_experts, top_k = counts.num_experts, counts.top_k
    sums_G2E, of_groups_GX = parts.new_empty(num_groups, 2, num_experts), parts.new_empty(num_groups, num_experts + 4)
    loss, statistics = parts.new_empty(()), parts.new_empty(num_experts + 4)
    launch(
        _group_sums, (num_groups,), (parts, sums_G2E, of_groups_GX),
        (
            num_blocks, counts.size, counts.last, num_experts, *(counts.capacities or (0, 0)), top_k, counts.is_noisy,
            counts.capacities is not None, columns,
        ),
    )  # fmt: skip
    launch(
        _add_groups, (1,), (of_groups_GX, loss, statistics, *each),
        (
            num_groups, num_experts, float(weights.importance), float(weights.load), each[0] is not None, 16,
            2 * columns,
        ),
    )  # fmt: skip
    return Balance(loss, statistics, sums_G2E)


def _balance(
    logits_GSE: Tensor, noisy_logits_GSE: Tensor | None, chosen_GSK: Tensor, capacity: int | None, noise_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The importance and the load loss, statistics and sums; see `Balance`.

    Args:
        logits_GSE: The logits without noise, float32.
        noisy_logits_GSE: The logits that routing used; None without noise. Then there is no load loss.
        chosen_GSK: The experts, best first.
        capacity: C; None where nothing was dropped.
        noise_scale: Standard deviation of the noise.
    """
    num_groups, size, num_experts = logits_GSE.shape
    logits_GSE = logits_GSE.contiguous()
    routed_by_GSE = logits_GSE if noisy_logits_GSE is None else noisy_logits_GSE.contiguous()
    columns, block = columns_of(num_experts), tokens_of_block(num_experts)
    num_blocks = cdiv(size, block)
    parts = logits_GSE.new_empty(num_groups, num_blocks, SUMS, columns)
    is_noisy, top_k = noisy_logits_GSE is not None, chosen_GSK.shape[2]
    launch(
        _block_sums, (num_blocks, num_groups), (logits_GSE, routed_by_GSE, chosen_GSK.contiguous(), parts),
        (size, num_experts, noise_scale, top_k, is_noisy, block, columns),
    )  # fmt: skip
    capacities = None if capacity is None else (capacity, capacity)
    counts = Counts(size, size, num_experts, top_k, capacities, is_noisy)
    importance, load = logits_GSE.new_empty(()), logits_GSE.new_empty(())
    _, statistics, sums_G2E = balance_of_blocks(parts, counts, Weights(1, 1), (importance, load))
    return importance, load, statistics, sums_G2E


def _fake_balance(logits_GSE, noisy_logits_GSE, chosen_GSK, capacity, noise_scale):
    num_groups, _, num_experts = logits_GSE.shape
    sums_G2E = logits_GSE.new_empty(num_groups, 2, num_experts)
    importance, load = logits_GSE.new_empty(()), logits_GSE.new_empty(())
    return importance, load, logits_GSE.new_empty(num_experts + 4), sums_G2E


def _balance_gradient(
    grad_importance: Tensor, grad_load: Tensor, logits_GSE: Tensor, noisy_logits_GSE: Tensor | None, chosen_GSK: Tensor,
    sums_G2E: Tensor, noise_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of the clean and of the noisy logits. Without noise the latter is empty."""
    grad_GSE = torch.empty_like(logits_GSE, memory_format=torch.contiguous_format)
    is_noisy = noisy_logits_GSE is not None
    grad_noisy_GSE = torch.empty_like(grad_GSE) if is_noisy else logits_GSE.new_empty(0)
    num_groups, size, num_experts = logits_GSE.shape
    logits_GSE = logits_GSE.contiguous()
    columns, block = columns_of(num_experts), tokens_of_block(num_experts)
    launch(
        _balance_backward, (cdiv(size, block), num_groups),
        (
            grad_importance, grad_load, logits_GSE, noisy_logits_GSE.contiguous() if is_noisy else logits_GSE,
            chosen_GSK.contiguous(), sums_G2E, grad_GSE, grad_noisy_GSE,
        ),
        (size, num_experts, noise_scale, chosen_GSK.shape[2], is_noisy, block, columns),
    )  # fmt: skip
    return grad_GSE, grad_noisy_GSE


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
def tokens_of_program(size, last, num_experts, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """(tokens, offsets in (T, E), is a token, is a token's expert, experts) of this program's tokens of its group."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < tl.where(tl.program_id(1) == tl.num_programs(1) - 1, last, size)
    expert = tl.arange(0, COLUMNS)
    at_token = tl.program_id(1).to(tl.int64) * size + token
    at = at_token[:, None] * num_experts + expert[None, :]
    return at_token, at, is_token, is_token[:, None] & (expert < num_experts)[None, :], expert


@triton.jit(do_not_specialize=["size"])
def _block_sums(
    logits, noisy_logits, chosen, parts, size, num_experts, noise_scale, K: tl.constexpr, IS_NOISY: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at_token, at, is_token, inside, expert = tokens_of_program(size, size, num_experts, TOKENS, COLUMNS)
    logit = tl.load(logits + at, mask=inside, other=-float("inf"))
    noisy = tl.load(noisy_logits + at, mask=inside, other=-float("inf"))
    is_chosen = noisy != noisy
    is_last = is_chosen
    for k in tl.static_range(K):
        choice = tl.load(chosen + at_token * K + k, mask=is_token, other=-1).to(tl.int32)
        is_last = expert[None, :] == choice[:, None]
        is_chosen = is_chosen | is_last
    store_sums(parts, logit, noisy, is_chosen, is_last, inside, is_token, expert, noise_scale, IS_NOISY, COLUMNS)


@triton.jit
def store_sums(
    parts, logit, noisy, is_chosen, is_last, inside, is_token, expert, noise_scale, IS_NOISY: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes the sums over a program's tokens. Logits without an expert must be -inf."""
    gate = tl.where(inside, softmax(noisy, is_token), 0.0)
    entropy = tl.sum(tl.where(gate > 0, -gate * tl.log(tl.where(gate > 0, gate, 1.0)), 0.0), 0)
    importance = tl.sum(tl.where(inside, softmax(logit, is_token), 0.0), 0)
    choices = tl.sum((is_chosen & inside).to(tl.float32), 0)
    load = tl.zeros((COLUMNS,), dtype=tl.float32)
    if IS_NOISY:
        chance = _chance(logit, tl.where(inside, noisy, 0.0), is_last, noise_scale)
        # the normal distribution function; 0.7071 is sqrt(1/2)
        chance = tl.where(inside, 0.5 + 0.5 * tl.erf(0.7071067811865476 * chance), 0.0)
        load = tl.sum(chance, 0)
    block = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    parts += block * 4 * COLUMNS + expert
    tl.store(parts, importance)
    tl.store(parts + COLUMNS, load)
    tl.store(parts + 2 * COLUMNS, choices)
    tl.store(parts + 3 * COLUMNS, entropy)


@triton.jit
def _chance(logits, routed_by, is_last, noise_scale):
    """(logits - threshold) / noise_scale. The threshold is the noisy logit of the last choice."""
    threshold = tl.sum(tl.where(is_last, routed_by, 0.0), 1)
    return (logits - threshold[:, None]) / noise_scale


@triton.jit(do_not_specialize=["num_blocks", "size", "last", "capacity", "last_capacity"])
def _group_sums(
    parts, sums, of_groups, num_blocks, size, last, num_experts, capacity, last_capacity, K: tl.constexpr,
    IS_NOISY: tl.constexpr, HAS_CAPACITY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    num_groups = tl.num_programs(0)
    expert = tl.arange(0, COLUMNS)
    is_expert = expert < num_experts
    importance = tl.zeros((COLUMNS,), dtype=tl.float32)
    load, choices, entropy = importance, importance, importance
    for index in range(num_blocks):
        block = parts + (group * num_blocks + index) * 4 * COLUMNS + expert
        importance += tl.load(block)
        load += tl.load(block + COLUMNS)
        choices += tl.load(block + 2 * COLUMNS)
        entropy += tl.load(block + 3 * COLUMNS)
    tl.store(sums + group * 2 * num_experts + expert, importance, mask=is_expert)
    tl.store(sums + (group * 2 + 1) * num_experts + expert, load, mask=is_expert)
    # these add up to the statistics
    out = of_groups + group * (num_experts + 4)
    num_tokens = ((num_groups - 1).to(tl.int64) * size + last).to(tl.float32)
    tl.store(out + expert, choices / (num_tokens * K), mask=is_expert)
    dropped = tl.zeros((COLUMNS,), dtype=tl.float32)
    if HAS_CAPACITY:
        slots = tl.where(group == num_groups - 1, last_capacity, capacity)
        dropped = tl.maximum(choices - slots, 0.0)
    tl.store(out + num_experts, tl.sum(dropped, 0) / (num_tokens * K))
    tl.store(out + num_experts + 1, tl.sum(entropy, 0) / num_tokens)
    variation, _ = _squared_variation(importance, is_expert, num_experts)
    tl.store(out + num_experts + 2, variation / num_groups)
    variation, _ = _squared_variation(load, is_expert, num_experts)
    tl.store(out + num_experts + 3, variation / num_groups if IS_NOISY else 0.0)


@triton.jit(do_not_specialize=["num_groups"])
def _add_groups(
    of_groups, loss, statistics, importance, load, num_groups, num_experts, importance_weight, load_weight,
    HAS_EACH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, num_groups, ROWS):
        group = first + tl.arange(0, ROWS)
        at = of_groups + group[:, None].to(tl.int64) * (num_experts + 4) + column[None, :]
        total += tl.load(at, mask=(group < num_groups)[:, None] & (column < num_experts + 4)[None, :], other=0.0)
    each = tl.sum(total, 0)
    tl.store(statistics + column, each, mask=column < num_experts + 4)
    importance_loss = tl.sum(tl.where(column == num_experts + 2, each, 0.0), 0)
    load_loss = tl.sum(tl.where(column == num_experts + 3, each, 0.0), 0)
    tl.store(loss, importance_weight * importance_loss + load_weight * load_loss)
    if HAS_EACH:
        tl.store(importance, importance_loss)
        tl.store(load, load_loss)


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
    noise_scale, K: tl.constexpr, IS_NOISY: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    at_token, at, is_token, inside, expert = tokens_of_program(size, size, num_experts, TOKENS, COLUMNS)
    logit = tl.load(logits + at, mask=inside, other=-float("inf"))
    noisy = tl.load(noisy_logits + at, mask=inside, other=0.0)
    last = tl.load(chosen + at_token * K + (K - 1), mask=is_token, other=0).to(tl.int32)
    grad, grad_last = gradient_of_losses(
        tl.load(grad_importance), tl.load(grad_load), logit, noisy, expert[None, :] == last[:, None], sums, inside,
        is_token, expert, num_experts, noise_scale, IS_NOISY,
    )  # fmt: skip
    tl.store(grad_logits + at, grad, mask=inside)
    if IS_NOISY:
        tl.store(grad_noisy_logits + at, grad_last, mask=inside)


@triton.jit
def gradient_of_losses(
    grad_importance, grad_load, logit, noisy, is_last, sums, inside, is_token, expert, num_experts, noise_scale,
    IS_NOISY: tl.constexpr,
):  # fmt: skip
    """The gradients of the logits and, by the threshold, of the noisy logits, for a program's tokens."""
    is_expert = expert < num_experts
    num_groups = tl.num_programs(1)
    sums += tl.program_id(1).to(tl.int64) * 2 * num_experts
    _, slope = _squared_variation(tl.load(sums + expert, mask=is_expert, other=0.0), is_expert, num_experts)
    slope *= grad_importance / num_groups
    gate = tl.where(inside, softmax(logit, is_token), 0.0)
    grad = gradient_of_softmax(slope[None, :] + tl.zeros_like(gate), gate)
    grad_last = tl.zeros_like(grad)
    if IS_NOISY:
        load = tl.load(sums + num_experts + expert, mask=is_expert, other=0.0)
        _, slope_of_load = _squared_variation(load, is_expert, num_experts)
        slope_of_load *= grad_load / num_groups
        chance = _chance(tl.where(inside, logit, 0.0), tl.where(inside, noisy, 0.0), is_last, noise_scale)
        # the normal density; 0.3989 is 1 / sqrt(2 pi)
        density = tl.where(inside, 0.3989422804014327 * tl.exp(-0.5 * chance * chance) / noise_scale, 0.0)
        pull = density * slope_of_load[None, :]
        grad += pull
        # the threshold is the last choice's noisy logit, so it gets the opposite gradient
        grad_last = tl.where(is_last, -tl.sum(pull, 1)[:, None], 0.0)
    return grad, grad_last
