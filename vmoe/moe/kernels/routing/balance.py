"""Balance losses and statistics of a routing decision in three small kernels.

G groups of S tokens; E experts; K choices per token. Each block of a group's tokens writes its sums. A second kernel
adds them group by group, without atomic addition.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.kernels.operators import operator
from vmoe.moe.kernels.routing.gates import softmax
from vmoe.moe.kernels.sizes import cdiv, columns_of, tokens_of_block

# sums per expert: gates, probabilities of being chosen, number of choices
_SUMS = 3


def _balance(
    logits_GSE: Tensor, noisy_logits_GSE: Tensor | None, chosen_GSK: Tensor, kept_GSK: Tensor | None, noise_scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The importance and the load loss of `vmoe.moe.losses`, averaged over the groups, and statistics.

    Args:
        logits_GSE: The logits without noise, float32.
        noisy_logits_GSE: The logits that routing used; None without noise. Then there is no load loss.
        chosen_GSK: The experts, best first.
        kept_GSK: Which choices were kept; None for all.
        noise_scale: Standard deviation of the noise.

    Returns:
        The importance and the load loss, (). Statistics (E + 2,): each expert's share of the choices, the share of
        choices that were dropped, the mean entropy of the gates. Sums (G, 2, E) for the backward pass.
    """
    num_groups, size, num_experts = logits_GSE.shape
    logits_GSE = logits_GSE.contiguous()
    routed_by_GSE = logits_GSE if noisy_logits_GSE is None else noisy_logits_GSE.contiguous()
    columns, block = columns_of(num_experts), tokens_of_block(num_experts)
    num_blocks = cdiv(size, block)
    floats = {"dtype": torch.float32, "device": logits_GSE.device}
    parts = torch.empty(num_groups, num_blocks, _SUMS, columns, **floats)
    counts = torch.empty(num_groups, num_blocks, 2, **floats)
    sums_G2E = torch.empty(num_groups, 2, num_experts, **floats)
    losses_2G = torch.empty(2, num_groups, **floats)
    statistics_GX = torch.empty(num_groups, num_experts + 2, **floats)
    with torch.cuda.device_of(logits_GSE):
        _block_sums[(num_blocks, num_groups)](
            logits_GSE, routed_by_GSE, chosen_GSK.contiguous(), None if kept_GSK is None else kept_GSK.contiguous(),
            parts, counts, size, num_experts, noise_scale, chosen_GSK.shape[2], noisy_logits_GSE is not None,
            kept_GSK is not None, block, columns,
        )  # fmt: skip
        _group_sums[(num_groups,)](
            parts, counts, sums_G2E, losses_2G, statistics_GX, num_blocks, size, num_experts, chosen_GSK.shape[2],
            noisy_logits_GSE is not None, kept_GSK is not None, columns,
        )  # fmt: skip
    return losses_2G[0].mean(), losses_2G[1].mean(), statistics_GX.mean(0), sums_G2E


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
    num_groups, size, num_experts = logits_GSE.shape
    logits_GSE = logits_GSE.contiguous()
    is_noisy = noisy_logits_GSE is not None
    routed_by_GSE = noisy_logits_GSE.contiguous() if is_noisy else logits_GSE
    grad_GSE = torch.empty_like(logits_GSE)
    grad_noisy_GSE = torch.empty_like(logits_GSE) if is_noisy else logits_GSE.new_empty(0)
    columns, block = columns_of(num_experts), tokens_of_block(num_experts)
    with torch.cuda.device_of(logits_GSE):
        _balance_backward[(cdiv(size, block), num_groups)](
            grad_importance, grad_load, logits_GSE, routed_by_GSE, chosen_GSK.contiguous(), sums_G2E, grad_GSE,
            grad_noisy_GSE, size, num_experts, noise_scale, chosen_GSK.shape[2], is_noisy, block, columns,
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
    parts, counts, sums, losses, statistics, num_blocks, size, num_experts, K: tl.constexpr, IS_NOISY: tl.constexpr,
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
    variation, _ = _squared_variation(importance, is_expert, num_experts)
    tl.store(losses + group, variation)
    variation, _ = _squared_variation(load, is_expert, num_experts)
    tl.store(losses + tl.num_programs(0) + group, variation if IS_NOISY else 0.0)
    out = statistics + group * (num_experts + 2)
    tl.store(out + expert, choices / (size * K), mask=is_expert)
    tl.store(out + num_experts, 1 - num_kept / (size * K) if HAS_KEPT else 0.0)
    tl.store(out + num_experts + 1, entropy / size)


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
    at_token, at, is_token, inside, expert = _block(logits, size, num_experts, TOKENS, COLUMNS)
    is_expert = expert < num_experts
    num_groups = tl.num_programs(1)
    sums += tl.program_id(1).to(tl.int64) * 2 * num_experts
    logit = tl.load(logits + at, mask=inside, other=-float("inf"))
    _, slope = _squared_variation(tl.load(sums + expert, mask=is_expert, other=0.0), is_expert, num_experts)
    slope *= tl.load(grad_importance) / num_groups
    gate = tl.where(inside, softmax(logit, is_token), 0.0)
    grad = gate * (slope[None, :] - tl.sum(gate * slope[None, :], 1)[:, None])
    if IS_NOISY:
        noisy = tl.load(noisy_logits + at, mask=inside, other=0.0)
        load = tl.load(sums + num_experts + expert, mask=is_expert, other=0.0)
        _, slope_of_load = _squared_variation(load, is_expert, num_experts)
        slope_of_load *= tl.load(grad_load) / num_groups
        last = tl.load(chosen + at_token * K + (K - 1), mask=is_token, other=0).to(tl.int32)
        chance = _chance(tl.where(inside, logit, 0.0), noisy, last, expert, noise_scale)
        # the normal density; 0.3989 is 1 / sqrt(2 pi)
        density = tl.where(inside, 0.3989422804014327 * tl.exp(-0.5 * chance * chance) / noise_scale, 0.0)
        pull = density * slope_of_load[None, :]
        grad += pull
        # the threshold is the last choice's noisy logit, so it gets the opposite gradient
        grad_last = tl.where(expert[None, :] == last[:, None], -tl.sum(pull, 1)[:, None], 0.0)
        tl.store(grad_noisy_logits + at, grad_last, mask=inside)
    tl.store(grad_logits + at, grad, mask=inside)
