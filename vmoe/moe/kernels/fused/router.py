"""The router's own work in a few kernels: scores, gates and choices, balance losses and statistics.

T tokens of width D, in G groups of S tokens; E experts; K choices a token. All in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.kernels.fused.sizes import cdiv, next_power_of_2
from vmoe.moe.kernels.operators import is_traced, operator

MAX_EXPERTS = 256
MAX_SCORES = 64  # of a token; a library product is good at more
_SPLITS = 64  # of the tokens, whose parts of the weights' gradient are then summed


def takes_logits(logits: Tensor) -> bool:
    """Whether these kernels take logits of (..., E)."""
    return logits.dtype == torch.float32 and logits.shape[-1] <= MAX_EXPERTS


def _scores_of(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """X @ weight.T in float32 by three tf32 products, (T, E)."""
    x_TD, weight_ED = x_TD.contiguous(), weight_ED.contiguous()
    (num_tokens, width), num_experts = x_TD.shape, weight_ED.shape[0]
    out_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x_TD.device)
    if out_TE.numel():
        with torch.cuda.device_of(x_TD):
            _scores[(cdiv(num_tokens, 64),)](
                x_TD, weight_ED, out_TE, num_tokens, width, num_experts, 64, 64, _columns(num_experts)
            )
    return out_TE


def _fake_scores(x_TD, weight_ED):
    return torch.empty(x_TD.shape[0], weight_ED.shape[0], dtype=torch.float32, device=x_TD.device)


def _scores_gradient(
    grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, other_grad_TD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x, to which another of its gradients is added, and of the weights, in their types."""
    grad_TE, x_TD, weight_ED = grad_TE.contiguous(), x_TD.contiguous(), weight_ED.contiguous()
    other_grad_TD = None if other_grad_TD is None else other_grad_TD.contiguous()
    (num_tokens, width), num_experts = x_TD.shape, weight_ED.shape[0]
    grad_TD = torch.empty_like(x_TD)
    parts = torch.empty(_SPLITS, num_experts, width, dtype=torch.float32, device=x_TD.device)
    columns = _columns(num_experts)
    with torch.cuda.device_of(x_TD):
        if grad_TD.numel():
            _scores_grad_x[(cdiv(num_tokens, 32), cdiv(width, 64))](
                grad_TE, weight_ED, other_grad_TD, grad_TD, num_tokens, width, num_experts, other_grad_TD is not None,
                32, 64, columns,
            )  # fmt: skip
        _scores_grad_weight[(_SPLITS, cdiv(width, 128))](
            grad_TE, x_TD, parts, num_tokens, width, num_experts, cdiv(num_tokens, _SPLITS), 32, 128, columns
        )
    return grad_TD, parts.sum(0).to(weight_ED.dtype)


scores_backward = operator(
    "scores_backward",
    _scores_gradient,
    lambda _, x_TD, weight_ED, __: (torch.empty_like(x_TD), torch.empty_like(weight_ED)),
)
scores = operator(
    "scores",
    _scores_of,
    _fake_scores,
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lambda ctx, grad_TE: scores_backward(grad_TE, *ctx.saved_tensors, None),
)


def scores_and_tokens(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """`scores`, and x for its other uses: the gradient of these is added in the kernel that computes the scores' own.

    Traced code gets x itself: an operator cannot return what it was given.
    """
    if is_traced() or not torch.is_grad_enabled():
        return scores(x_TD, weight_ED), x_TD
    return _ScoresAndTokens.apply(x_TD, weight_ED)


class _ScoresAndTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_ED: Tensor):
        ctx.save_for_backward(x_TD, weight_ED)
        ctx.set_materialize_grads(False)
        return _scores_of(x_TD, weight_ED), x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx, grad_TE: Tensor | None, grad_TD: Tensor | None):
        if grad_TE is None:
            return grad_TD, None
        return scores_backward(grad_TE, *ctx.saved_tensors, grad_TD)


def _gates_of(logits_TE: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax gates (T, E), the experts of the K largest (T, K) int64, best first, and their weights (T, K).

    Of equal gates the lower expert is chosen first. With `renormalize` a token's weights sum to 1.
    """
    logits_TE = logits_TE.contiguous()
    num_tokens, num_experts = logits_TE.shape
    gates_TE = torch.empty_like(logits_TE)
    chosen_TK = torch.empty(num_tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = logits_TE.new_empty(num_tokens, top_k)
    if gates_TE.numel():
        columns, block = _columns(num_experts), _tokens_of_block(num_experts)
        with torch.cuda.device_of(logits_TE):
            _gates[(cdiv(num_tokens, block),)](
                logits_TE, gates_TE, chosen_TK, weights_TK, num_tokens, num_experts, top_k, renormalize, block, columns
            )
    return gates_TE, chosen_TK, weights_TK


def _fake_gates(logits_TE, top_k, renormalize):
    weights_TK = logits_TE.new_empty(logits_TE.shape[0], top_k)
    return torch.empty_like(logits_TE), torch.empty_like(weights_TK, dtype=torch.int64), weights_TK


def _gates_gradient(
    grad_gates_TE: Tensor | None, grad_weights_TK: Tensor | None, gates_TE: Tensor, chosen_TK: Tensor,
    weights_TK: Tensor, renormalize: bool,
) -> Tensor:  # fmt: skip
    """The logits' gradient."""
    grad_TE = torch.empty_like(gates_TE)
    num_tokens, num_experts = gates_TE.shape
    if grad_TE.numel():
        grad_gates_TE, grad_weights_TK = (
            None if grad is None else grad.contiguous() for grad in (grad_gates_TE, grad_weights_TK)
        )
        columns, block = _columns(num_experts), _tokens_of_block(num_experts)
        with torch.cuda.device_of(gates_TE):
            _gates_backward[(cdiv(num_tokens, block),)](
                grad_gates_TE, grad_weights_TK, gates_TE, chosen_TK, weights_TK, grad_TE, num_tokens, num_experts,
                chosen_TK.shape[1], renormalize, grad_gates_TE is not None, grad_weights_TK is not None, block, columns,
            )  # fmt: skip
    return grad_TE


gates_backward = operator("gates_backward", _gates_gradient, lambda _, __, gates_TE, *___: torch.empty_like(gates_TE))


def _save_gates(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)
    ctx.renormalize = inputs[2]


def _backward_of_gates(ctx, grad_gates_TE, _, grad_weights_TK):
    if grad_gates_TE is None and grad_weights_TK is None:
        return None, None, None
    arguments = (grad_gates_TE, grad_weights_TK, *ctx.saved_tensors, ctx.renormalize)
    return gates_backward(*arguments), None, None


gates = operator("gates", _gates_of, _fake_gates, _save_gates, _backward_of_gates)


def _columns(num_experts: int) -> int:
    return max(16, next_power_of_2(num_experts))


def _tokens_of_block(num_experts: int) -> int:
    return max(8, 2048 // _columns(num_experts))


@triton.jit
def _scores(
    x, weight, out, num_tokens, width, num_experts, TOKENS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, COLUMNS)
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for first in range(0, width, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        is_depth = (depth < width)[None, :]
        at = x + token[:, None].to(tl.int64) * width + depth[None, :]
        x_part = tl.load(at, mask=(token < num_tokens)[:, None] & is_depth, other=0.0).to(tl.float32)
        at = weight + expert[:, None] * width + depth[None, :]
        weight_part = tl.load(at, mask=(expert < num_experts)[:, None] & is_depth, other=0.0).to(tl.float32)
        total = tl.dot(x_part, weight_part.T, total, input_precision="tf32x3")
    at = out + token[:, None].to(tl.int64) * num_experts + expert[None, :]
    tl.store(at, total, mask=(token < num_tokens)[:, None] & (expert < num_experts)[None, :])


@triton.jit
def _scores_grad_x(
    grad, weight, other, out, num_tokens, width, num_experts, HAS_OTHER: tl.constexpr, TOKENS: tl.constexpr,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    expert = tl.arange(0, COLUMNS)
    is_token, is_expert, is_column = token < num_tokens, expert < num_experts, column < width
    at = grad + token[:, None].to(tl.int64) * num_experts + expert[None, :]
    grads = tl.load(at, mask=is_token[:, None] & is_expert[None, :], other=0.0)
    at = weight + expert[:, None] * width + column[None, :]
    weights = tl.load(at, mask=is_expert[:, None] & is_column[None, :], other=0.0).to(tl.float32)
    result = tl.dot(grads, weights, input_precision="tf32x3")
    at = token[:, None].to(tl.int64) * width + column[None, :]
    if HAS_OTHER:
        inside = is_token[:, None] & is_column[None, :]
        result += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=is_token[:, None] & is_column[None, :])


@triton.jit
def _scores_grad_weight(
    grad, x, parts, num_tokens, width, num_experts, share,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * share
    end = tl.minimum(start + share, num_tokens)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    expert = tl.arange(0, COLUMNS)
    is_expert, is_column = expert < num_experts, column < width
    total = tl.zeros((COLUMNS, WIDTH), dtype=tl.float32)
    for first in range(start, end, TOKENS):
        token = first + tl.arange(0, TOKENS)
        is_token = (token < end)[:, None]
        at = grad + token[:, None].to(tl.int64) * num_experts + expert[None, :]
        grads = tl.load(at, mask=is_token & is_expert[None, :], other=0.0)
        at = x + token[:, None].to(tl.int64) * width + column[None, :]
        values = tl.load(at, mask=is_token & is_column[None, :], other=0.0).to(tl.float32)
        total = tl.dot(grads.T, values, total, input_precision="tf32x3")
    at = parts + (tl.program_id(0) * num_experts + expert)[:, None].to(tl.int64) * width + column[None, :]
    tl.store(at, total, mask=is_expert[:, None] & is_column[None, :])


@triton.jit
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
    total = tl.full((TOKENS,), 1.0, dtype=tl.float32)
    if RENORMALIZE:
        total = tl.zeros((TOKENS,), dtype=tl.float32)
        remaining = tl.where(inside, gate, -1.0)
        for _ in tl.static_range(K):
            best, is_best = _largest(remaining, expert, num_experts)
            total += tl.sum(tl.where(is_best, gate, 0.0), 1)
            remaining = tl.where(is_best, -2.0, remaining)
    remaining = tl.where(inside, gate, -1.0)
    for k in tl.static_range(K):
        best, is_best = _largest(remaining, expert, num_experts)
        remaining = tl.where(is_best, -2.0, remaining)
        tl.store(chosen + token * K + k, best.to(tl.int64), mask=is_token)
        tl.store(weights + token * K + k, tl.sum(tl.where(is_best, gate, 0.0), 1) / total, mask=is_token)


@triton.jit
def _largest(values, expert, num_experts):
    """Each token's expert of the largest value, the lowest of equals, and where that is."""
    # a NaN is larger than nothing: the bound keeps the index an expert's
    best = tl.minimum(tl.argmax(values, 1, tie_break_left=True), num_experts - 1)
    return best, expert[None, :] == best[:, None]


@triton.jit
def _gates_backward(
    grad_gates, grad_weights, gates, chosen, weights, out, num_tokens, num_experts, K: tl.constexpr,
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
        total, mean = tl.full((TOKENS,), 1.0, dtype=tl.float32), tl.zeros((TOKENS,), dtype=tl.float32)
        if RENORMALIZE:
            total = tl.zeros((TOKENS,), dtype=tl.float32)
            for k in tl.static_range(K):
                choice = tl.load(chosen + token * K + k, mask=is_token, other=0).to(tl.int32)
                weight = tl.load(weights + token * K + k, mask=is_token, other=0.0)
                mean += tl.load(grad_weights + token * K + k, mask=is_token, other=0.0) * weight
                total += tl.sum(tl.where(expert[None, :] == choice[:, None], gate, 0.0), 1)
            total = tl.where(is_token, total, 1.0)
        for k in tl.static_range(K):
            choice = tl.load(chosen + token * K + k, mask=is_token, other=0).to(tl.int32)
            grad_weight = (tl.load(grad_weights + token * K + k, mask=is_token, other=0.0) - mean) / total
            grad += tl.where(expert[None, :] == choice[:, None], grad_weight[:, None], 0.0)
    grad = gate * (grad - tl.sum(gate * grad, 1)[:, None])
    tl.store(out + at, grad, mask=inside)


@triton.jit
def softmax(logits, is_token):
    """Over the columns; -inf where there is no expert."""
    largest = tl.where(is_token, tl.max(logits, 1), 0.0)
    raised = tl.exp(logits - largest[:, None])
    return raised / tl.where(is_token, tl.sum(raised, 1), 1.0)[:, None]
