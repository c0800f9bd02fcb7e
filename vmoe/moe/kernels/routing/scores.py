"""A router's scores of tokens (its logits), and their gradients, in float32.

T tokens of width D; E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vmoe.moe.kernels.launches import launch
from vmoe.moe.kernels.operators import is_traced, operator
from vmoe.moe.kernels.sizes import SCORE_SPLITS, cdiv, columns_of


def _scores_of(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """The scores x @ weight.T, (T, E), in float32 accuracy by three tf32 products."""
    x_TD, weight_ED = x_TD.contiguous(), weight_ED.contiguous()
    (num_tokens, width), num_experts = x_TD.shape, weight_ED.shape[0]
    out_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x_TD.device)
    if out_TE.numel():
        launch(
            _scores, (cdiv(num_tokens, 64),), (x_TD, weight_ED, out_TE),
            (num_tokens, width, num_experts, 64, 64, columns_of(num_experts)),
        )  # fmt: skip
    return out_TE


def _fake_scores(x_TD, weight_ED):
    return torch.empty(x_TD.shape[0], weight_ED.shape[0], dtype=torch.float32, device=x_TD.device)


def _scores_gradient(
    grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, other_grad_TD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weights, in their types. `other_grad_TD` is added to that of x."""
    grad_TE, x_TD, weight_ED = grad_TE.contiguous(), x_TD.contiguous(), weight_ED.contiguous()
    other_grad_TD = None if other_grad_TD is None else other_grad_TD.contiguous()
    (num_tokens, width), num_experts = x_TD.shape, weight_ED.shape[0]
    grad_TD = torch.empty_like(x_TD)
    if grad_TD.numel():
        launch(
            _scores_grad_x, (cdiv(num_tokens, 32), cdiv(width, 64)), (grad_TE, weight_ED, other_grad_TD, grad_TD),
            (num_tokens, width, num_experts, other_grad_TD is not None, 32, 64, columns_of(num_experts)),
        )  # fmt: skip
    return grad_TD, gradient_of_gate(grad_TE, x_TD, weight_ED.dtype)


def gradient_of_gate(grad_TE: Tensor, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient (E, D) of the scores' weights, in type `dtype`."""
    (num_tokens, width), num_experts = x_TD.shape, grad_TE.shape[1]
    parts = grad_TE.new_empty(SCORE_SPLITS, num_experts, width)
    launch(
        _scores_grad_weight, (SCORE_SPLITS, cdiv(width, 128)), (grad_TE, x_TD, parts),
        (num_tokens, width, num_experts, cdiv(num_tokens, SCORE_SPLITS), 32, 128, columns_of(num_experts)),
    )  # fmt: skip
    return parts.sum(0).to(dtype)


scores_backward = operator(
    "scores_backward",
    _scores_gradient,
    lambda _, x_TD, weight_ED, __: (torch.empty_like(x_TD), torch.empty_like(weight_ED)),
)


def _backward_of_scores(ctx, grad_TE: Tensor) -> dict[str, Tensor]:
    x_TD, weight_ED = ctx.saved_tensors
    grad_TD, grad_ED = scores_backward(grad_TE, x_TD, weight_ED, None)
    return {"x_TD": grad_TD, "weight_ED": grad_ED}


scores = operator(
    "scores",
    _scores_of,
    _fake_scores,
    lambda ctx, inputs, output: ctx.save_for_backward(inputs.x_TD, inputs.weight_ED),
    _backward_of_scores,
)


def scores_and_tokens(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """`scores`, and x for its other uses. One kernel then adds both gradients of x.

    Traced code gets x itself, because an operator cannot return its input.
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


@triton.jit(do_not_specialize=["num_tokens"])
def _scores(
    x, weight, out, num_tokens, width, num_experts, TOKENS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, COLUMNS)
    total = scores_of_tokens(x, weight, token, token < num_tokens, width, num_experts, TOKENS, DEPTH, COLUMNS)
    at = out + token[:, None].to(tl.int64) * num_experts + expert[None, :]
    tl.store(at, total, mask=(token < num_tokens)[:, None] & (expert < num_experts)[None, :])


@triton.jit
def scores_of_tokens(
    x, weight, token, is_token, width, num_experts, TOKENS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr
):
    """The scores of some tokens, (TOKENS, COLUMNS)."""
    expert = tl.arange(0, COLUMNS)
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for first in range(0, width, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        is_depth = (depth < width)[None, :]
        at = x + token[:, None].to(tl.int64) * width + depth[None, :]
        x_part = tl.load(at, mask=is_token[:, None] & is_depth, other=0.0).to(tl.float32)
        at = weight + expert[:, None] * width + depth[None, :]
        weight_part = tl.load(at, mask=(expert < num_experts)[:, None] & is_depth, other=0.0).to(tl.float32)
        total = tl.dot(x_part, weight_part.T, total, input_precision="tf32x3")
    return total


@triton.jit(do_not_specialize=["num_tokens"])
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


@triton.jit(do_not_specialize=["num_tokens", "share"])
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
