"""Gates and choices where tokens choose experts.

T tokens; E experts; K choices per token. All in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.kernels.launches import launch
from vmoe.moe.kernels.operators import operator
from vmoe.moe.kernels.sizes import MAX_EXPERTS, cdiv, columns_of, tokens_of_block


def takes_logits(logits: Tensor) -> bool:
    """Whether the kernels of gates and balance take logits of (..., E)."""
    return logits.dtype == torch.float32 and logits.shape[-1] <= MAX_EXPERTS


def _gates_of(logits_TE: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax gates (T, E), the experts of the K largest (T, K) int64, best first, and their weights (T, K).

    Among equal gates the lower expert index comes first. With `renormalize` a token's weights sum to 1.
    """
    logits_TE = logits_TE.contiguous()
    num_tokens, num_experts = logits_TE.shape
    gates_TE = torch.empty_like(logits_TE)
    chosen_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = logits_TE.new_empty(num_tokens, top_k)
    if gates_TE.numel():
        columns, block = columns_of(num_experts), tokens_of_block(num_experts)
        launch(
            _gates, (cdiv(num_tokens, block),), (logits_TE, gates_TE, chosen_TK, weights_TK),
            (num_tokens, num_experts, top_k, renormalize, block, columns),
        )  # fmt: skip
    return gates_TE, chosen_TK, weights_TK


def _fake_gates(logits_TE, top_k, renormalize):
    weights_TK = logits_TE.new_empty(logits_TE.shape[0], top_k)
    return torch.empty_like(logits_TE), torch.empty_like(weights_TK, dtype=torch.int64), weights_TK


def _gates_gradient(
    grad_gates_TE: Tensor | None, grad_weights_TK: Tensor | None, gates_TE: Tensor, chosen_TK: Tensor, renormalize: bool
) -> Tensor:
    """The logits' gradient."""
    grad_TE = torch.empty_like(gates_TE)
    num_tokens, num_experts = gates_TE.shape
    if grad_TE.numel():
        grad_gates_TE, grad_weights_TK = (
            None if grad is None else grad.contiguous() for grad in (grad_gates_TE, grad_weights_TK)
        )
        columns, block = columns_of(num_experts), tokens_of_block(num_experts)
        launch(
            _gates_backward, (cdiv(num_tokens, block),),
            (grad_TE, grad_gates_TE, grad_weights_TK, gates_TE, chosen_TK),
            (
                num_tokens, num_experts, chosen_TK.shape[1], renormalize, grad_gates_TE is not None,
                grad_weights_TK is not None, block, columns,
            ),
        )  # fmt: skip
    return grad_TE


gates_backward = operator("gates_backward", _gates_gradient, lambda _, __, gates_TE, *___: torch.empty_like(gates_TE))


def _save_gates(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[:2])
    ctx.renormalize = inputs.renormalize


def _backward_of_gates(ctx, grad_gates_TE, _, grad_weights_TK):
    if grad_gates_TE is None and grad_weights_TK is None:
        return {}
    return {"logits_TE": gates_backward(grad_gates_TE, grad_weights_TK, *ctx.saved_tensors, ctx.renormalize)}


gates = operator("gates", _gates_of, _fake_gates, _save_gates, _backward_of_gates)


@triton.jit(do_not_specialize=["num_tokens"])
def _gates(
    logits, gates, chosen, weights, num_tokens, num_experts, K: tl.constexpr, RENORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, COLUMNS)
    is_token = token < num_tokens
    inside = is_token[:, None] & (expert < num_experts)[None, :]
    at = token[:, None].to(tl.int64) * num_experts + expert[None, :]
    gate = softmax(tl.load(logits + at, mask=inside, other=-float("inf")), is_token)
    tl.store(gates + at, gate, mask=inside)
    store_choices(chosen, weights, gate, inside, token, is_token, expert, num_experts, K, RENORMALIZE, TOKENS)


@triton.jit
def store_choices(
    chosen, weights, gate, inside, token, is_token, expert, num_experts, K: tl.constexpr, RENORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Writes the K best experts of each token and their weights.

    Returns one-hot masks: of all choices, of the first and of the last one.
    """
    total = tl.full((TOKENS,), 1.0, dtype=tl.float32)
    if RENORMALIZE:  # the K best are found twice: each weight needs their sum
        total = tl.zeros((TOKENS,), dtype=tl.float32)
        remaining = tl.where(inside, gate, -1.0)
        for _ in tl.static_range(K):
            best, is_best = _largest_column(remaining, expert, num_experts)
            total += tl.sum(tl.where(is_best, gate, 0.0), 1)
            remaining = tl.where(is_best, -2.0, remaining)
    remaining = tl.where(inside, gate, -1.0)
    best, is_best = _largest_column(remaining, expert, num_experts)
    is_first, is_chosen = is_best, is_best
    for k in tl.static_range(K):
        if k > 0:
            best, is_best = _largest_column(remaining, expert, num_experts)
            is_chosen = is_chosen | is_best
        remaining = tl.where(is_best, -2.0, remaining)
        tl.store(chosen + token * K + k, best.to(tl.int64), mask=is_token)
        tl.store(weights + token * K + k, tl.sum(tl.where(is_best, gate, 0.0), 1) / total, mask=is_token)
    return is_chosen, is_first, is_best


@triton.jit
def _largest_column(values, expert, num_experts):
    """Each token's expert with the largest value (the lowest index among equals), and a one-hot mask of it."""
    # with NaN argmax may return any column: the bound keeps it a valid expert
    best = tl.minimum(tl.argmax(values, 1, tie_break_left=True), num_experts - 1)
    return best, expert[None, :] == best[:, None]


@triton.jit(do_not_specialize=["num_tokens"])
def _gates_backward(
    out, grad_gates, grad_weights, gates, chosen, num_tokens, num_experts, K: tl.constexpr,
    RENORMALIZE: tl.constexpr, HAS_GATES: tl.constexpr, HAS_WEIGHTS: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, COLUMNS)
    is_token = token < num_tokens
    inside = is_token[:, None] & (expert < num_experts)[None, :]
    at = token[:, None].to(tl.int64) * num_experts + expert[None, :]
    gate = tl.load(gates + at, mask=inside, other=0.0)
    grad = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    if HAS_GATES:
        grad += tl.load(grad_gates + at, mask=inside, other=0.0)
    if HAS_WEIGHTS:
        grad_weight = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
        is_chosen = grad_weight > 0
        for k in tl.static_range(K):
            choice = tl.load(chosen + token * K + k, mask=is_token, other=-1).to(tl.int32)
            is_choice = expert[None, :] == choice[:, None]
            is_chosen = is_chosen | is_choice
            slope = tl.load(grad_weights + token * K + k, mask=is_token, other=0.0)
            grad_weight += tl.where(is_choice, slope[:, None], 0.0)
        grad += gradient_of_weights(grad_weight, gate, is_chosen, is_token, RENORMALIZE)
    tl.store(out + at, gradient_of_softmax(grad, gate), mask=inside)


@triton.jit
def gradient_of_weights(grad_weight, gate, is_chosen, is_token, RENORMALIZE: tl.constexpr):
    """The gates' gradient by that of the weights, which stands in the column of the chosen expert."""
    if RENORMALIZE:  # the gradient of weight = gate / total needs the mean of the gradients by weight
        total = tl.where(is_token, tl.sum(tl.where(is_chosen, gate, 0.0), 1), 1.0)
        mean = tl.sum(grad_weight * gate, 1) / total
        grad_weight = tl.where(is_chosen, (grad_weight - mean[:, None]) / total[:, None], 0.0)
    return grad_weight


@triton.jit
def gradient_of_softmax(grad, gate):
    """The logits' gradient by that of the gates."""
    return gate * (grad - tl.sum(gate * grad, 1)[:, None])


@triton.jit
def softmax(logits, is_token):
    """Softmax over the columns. Columns without an expert must be -inf."""
    largest = tl.where(is_token, tl.max(logits, 1), 0.0)
    raised = tl.exp(logits - largest[:, None])
    return raised / tl.where(is_token, tl.sum(raised, 1), 1.0)[:, None]
