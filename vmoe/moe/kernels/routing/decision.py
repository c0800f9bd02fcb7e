"""All of routing in one kernel each way, for eager code: each launch costs the host time.

The forward kernel computes scores, noise, gates, choices and the sums for the balance losses. The backward kernel gives
the tokens' gradient by those of the choices' weights, of the losses and of the experts' rows.

T tokens of width D, in G groups of S tokens; E experts; K choices per token; R rows of the buffer that experts compute.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.groups import Groups
from vmoe.moe.kernels.launches import launch
from vmoe.moe.kernels.routing.balance import SUMS, Weights, gradient_of_losses, store_sums, tokens_of_program
from vmoe.moe.kernels.routing.gates import gradient_of_softmax, gradient_of_weights, softmax, store_choices
from vmoe.moe.kernels.routing.scores import gradient_of_gate, scores_of_tokens
from vmoe.moe.kernels.sizes import cdiv, columns_of, next_power_of_2


class TokenChoices(NamedTuple):
    """What the tokens choose.

    Attributes:
        logits_TE: The scores, float32.
        noisy_TE: With noise; None where there is none.
        best_T: Each token's largest gate; None where nobody needs it.
        chosen_TK: The experts, best first, int64.
        weights_TK: Their combine weights, before drops.
        parts: The sums over blocks of tokens, for `balance_of_blocks`.
    """

    logits_TE: Tensor
    noisy_TE: Tensor | None
    best_T: Tensor | None
    chosen_TK: Tensor
    weights_TK: Tensor
    parts: Tensor


class Options(NamedTuple):
    """How tokens choose.

    Attributes:
        top_k: K.
        renormalize: Whether the combine weights of a token sum to 1.
        noise_scale: Standard deviation of the noise.
        has_priority: Whether tokens get slots by their largest gate.
    """

    top_k: int
    renormalize: bool
    noise_scale: float
    has_priority: bool


def decide(x_TD: Tensor, weight_ED: Tensor, noise_TE: Tensor | None, groups: Groups, options: Options) -> TokenChoices:
    """The decision for the tokens. `noise_TE` has standard normal numbers, and becomes the noisy logits."""
    (num_tokens, width), num_experts, top_k = x_TD.shape, weight_ED.shape[0], options.top_k
    columns, block = columns_of(num_experts), 64
    num_blocks = cdiv(groups.size, block)
    logits_TE = x_TD.new_empty(num_tokens, num_experts, dtype=torch.float32)
    chosen_TK = x_TD.new_empty(num_tokens, top_k, dtype=torch.int64)
    weights_TK = logits_TE.new_empty(num_tokens, top_k)
    best_T = logits_TE.new_empty(num_tokens) if options.has_priority else None
    parts = logits_TE.new_empty(groups.count, num_blocks, SUMS, columns)
    launch(
        _decide, (num_blocks, groups.count),
        (x_TD, weight_ED, logits_TE, noise_TE, best_T, chosen_TK, weights_TK, parts),
        (
            groups.size, groups.last, width, num_experts, options.noise_scale, top_k, options.renormalize,
            noise_TE is not None, options.has_priority, block, 64, columns,
        ),
    )  # fmt: skip
    return TokenChoices(logits_TE, noise_TE, best_T, chosen_TK, weights_TK, parts)


class OfResult(NamedTuple):
    """What the experts' backward pass leaves for the tokens.

    Attributes:
        grad_RD: The gradients of the tokens' rows.
        dots_RP: Parts of the gradient of each row's combine weight.
        row_TK: The row of each choice, -1 for none.
    """

    grad_RD: Tensor
    dots_RP: Tensor
    row_TK: Tensor


class OfLoss(NamedTuple):
    """What the balance losses leave for the tokens.

    Attributes:
        grad: The gradient of their weighted sum, ().
        weights: Their weights.
        sums_G2E: See `Balance`.
    """

    grad: Tensor
    weights: Weights
    sums_G2E: Tensor


def decide_backward(
    x_TD: Tensor, weight_ED: Tensor, decision: TokenChoices, groups: Groups, options: Options, result: OfResult | None,
    loss: OfLoss | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of the tokens, their experts' included, and of the router's weights, in their types."""
    logits_TE, noisy_TE, chosen_TK = decision.logits_TE, decision.noisy_TE, decision.chosen_TK
    width, num_experts, columns, block = x_TD.shape[1], weight_ED.shape[0], columns_of(weight_ED.shape[0]), 32
    grad_TE, grad_TD = torch.empty_like(logits_TE), torch.empty_like(x_TD)
    num_parts = 1 if result is None else result.dots_RP.shape[1]
    weights = Weights(0, 0) if loss is None else loss.weights
    launch(
        _decide_backward, (cdiv(groups.size, block), groups.count),
        (
            grad_TE, grad_TD, weight_ED, logits_TE, noisy_TE, chosen_TK, *(result or (None, None, None)),
            *((None, None) if loss is None else (loss.grad, loss.sums_G2E)),
        ),
        (
            groups.size, groups.last, width, num_experts, num_parts, float(weights.importance), float(weights.load),
            options.noise_scale, options.top_k, options.renormalize, noisy_TE is not None, result is not None,
            loss is not None, block, 64, columns, next_power_of_2(num_parts),
        ),
    )  # fmt: skip
    return grad_TD, gradient_of_gate(grad_TE, x_TD, weight_ED.dtype)


@triton.jit(do_not_specialize=["size", "last"])
def _decide(
    x, weight, logits, noise, best, chosen, weights, parts, size, last, width, num_experts, noise_scale,
    K: tl.constexpr, RENORMALIZE: tl.constexpr, IS_NOISY: tl.constexpr, HAS_PRIORITY: tl.constexpr,
    TOKENS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token, at, is_token, inside, expert = tokens_of_program(size, last, num_experts, TOKENS, COLUMNS)
    logit = scores_of_tokens(x, weight, token, is_token, width, num_experts, TOKENS, DEPTH, COLUMNS)
    tl.store(logits + at, logit, mask=inside)
    noisy = logit
    if IS_NOISY:
        noisy += noise_scale * tl.load(noise + at, mask=inside, other=0.0)
        tl.store(noise + at, noisy, mask=inside)
    logit = tl.where(inside, logit, -float("inf"))
    noisy = tl.where(inside, noisy, -float("inf"))
    gate = tl.where(inside, softmax(noisy, is_token), 0.0)
    is_chosen, is_first, is_last = store_choices(
        chosen, weights, gate, inside, token, is_token, expert, num_experts, K, RENORMALIZE, TOKENS
    )
    if HAS_PRIORITY:
        tl.store(best + token, tl.sum(tl.where(is_first, gate, 0.0), 1), mask=is_token)
    store_sums(parts, logit, noisy, is_chosen, is_last, inside, is_token, expert, noise_scale, IS_NOISY, COLUMNS)


@triton.jit(do_not_specialize=["size", "last"])
def _decide_backward(
    grad_logits, grad_x, weight, logits, noisy_logits, chosen, grad_rows, dots, row, grad_loss, sums,
    size, last, width, num_experts, num_parts, importance_weight, load_weight, noise_scale, K: tl.constexpr,
    RENORMALIZE: tl.constexpr, IS_NOISY: tl.constexpr, HAS_RESULT: tl.constexpr, HAS_LOSS: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    token, at, is_token, inside, expert = tokens_of_program(size, last, num_experts, TOKENS, COLUMNS)
    logit = tl.load(logits + at, mask=inside, other=-float("inf"))
    noisy = logit
    if IS_NOISY:
        noisy = tl.load(noisy_logits + at, mask=inside, other=-float("inf"))
    grad = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    if HAS_RESULT:
        part = tl.arange(0, PARTS)
        gate = tl.where(inside, softmax(noisy, is_token), 0.0)
        is_chosen = noisy != noisy
        for k in tl.static_range(K):
            source = tl.load(row + token * K + k, mask=is_token, other=-1)
            is_part = (source >= 0)[:, None] & (part < num_parts)[None, :]
            slope = tl.load(dots + source[:, None].to(tl.int64) * num_parts + part[None, :], mask=is_part, other=0.0)
            choice = tl.load(chosen + token * K + k, mask=is_token, other=-1).to(tl.int32)
            is_choice = expert[None, :] == choice[:, None]
            is_chosen = is_chosen | is_choice
            grad += tl.where(is_choice, tl.sum(slope, 1)[:, None], 0.0)
        grad = gradient_of_softmax(gradient_of_weights(grad, gate, is_chosen, is_token, RENORMALIZE), gate)
    if HAS_LOSS:
        last_choice = tl.load(chosen + token * K + (K - 1), mask=is_token, other=-1).to(tl.int32)
        slope = tl.load(grad_loss)
        of_loss, of_threshold = gradient_of_losses(
            slope * importance_weight, slope * load_weight, logit, noisy, expert[None, :] == last_choice[:, None], sums,
            inside, is_token, expert, num_experts, noise_scale, IS_NOISY,
        )  # fmt: skip
        grad += of_loss + of_threshold
    tl.store(grad_logits + at, grad, mask=inside)
    grad = tl.where(inside, grad, 0.0)
    for first in range(0, width, WIDTH):
        column = first + tl.arange(0, WIDTH)
        is_column = (column < width)[None, :]
        weight_at = weight + expert[:, None] * width + column[None, :]
        weights = tl.load(weight_at, mask=(expert < num_experts)[:, None] & is_column, other=0.0).to(tl.float32)
        total = tl.dot(grad, weights, input_precision="tf32x3")
        if HAS_RESULT:
            for k in tl.static_range(K):
                source = tl.load(row + token * K + k, mask=is_token, other=-1)
                at_row = grad_rows + source[:, None].to(tl.int64) * width + column[None, :]
                total += tl.load(at_row, mask=(source >= 0)[:, None] & is_column, other=0.0).to(tl.float32)
        out = grad_x + token[:, None] * width + column[None, :]
        tl.store(out, total.to(grad_x.dtype.element_ty), mask=is_token[:, None] & is_column)
