"""Per-image routing: one decision per image, which all its tokens follow (Mobile V-MoE, Daxberger et al. 2023,
https://arxiv.org/abs/2309.04354).

B images of N tokens of width D; G groups of S images; E experts; K choices per image. In a `Routing` of images, images
take the position of tokens.
"""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vmoe.moe.groups import Groups
from vmoe.moe.kernels import PLAIN, Kernels
from vmoe.moe.passes import is_backward
from vmoe.moe.routing import Routed, Routing


class _Pass:
    """A forward pass. The graph of its results keeps it alive."""

    was_computed_again = False


class Decision:
    """The decision of a model's first MoE layer in the last forward pass, for the layers after it.

    Activation checkpointing computes later layers again in the backward pass, where only the last forward pass's
    decision is left. So it is refused if another pass still waits for its backward pass.

    Attributes:
        router: The first layer's router.
        routing: The routing of the images; None before the first pass.
    """

    def __init__(self, router: nn.Module) -> None:
        self.router = router
        self.routing: Routing | None = None
        self._last = _Pass()
        self._passes: list[weakref.ref[_Pass]] = []

    def keep(self, routing: Routing) -> None:
        """Keeps the decision of the first layer."""
        self.routing = routing
        if not torch.compiler.is_compiling() and not is_backward():
            self._last = _Pass()
            self._passes = [each for each in self._passes if each() is not None] + [weakref.ref(self._last)]

    def recall(self) -> Routing:
        """The decision, for a later layer.

        Raises:
            RuntimeError: There is none, or it is not the one that activation checkpointing needs.
        """
        if self.routing is None:
            raise RuntimeError("shared_router: the first MoE layer decides for all, and has not run yet")
        if not torch.compiler.is_compiling() and is_backward():
            self._check_backward(self.routing)
            self._last.was_computed_again = True
        return self.routing

    def tie_to(self, y_TO: Tensor) -> None:
        """Keeps the current pass in the list of those that wait, as long as the graph of a layer's result lives."""
        if not torch.compiler.is_compiling() and not is_backward() and y_TO.grad_fn is not None:
            y_TO.grad_fn.metadata[id(self)] = self._last

    def _check_backward(self, routing: Routing) -> None:
        if self._another_waits():
            gc.collect()  # a compiler may have left a graph in a cycle of references
        if self._another_waits():
            raise RuntimeError(
                "shared_router: with activation checkpointing, each forward pass needs its backward pass before the "
                "next forward pass; give all images in one batch, call backward() after each pass, or turn "
                "checkpointing off"
            )
        learns = any(parameter.requires_grad for parameter in self.router.parameters())
        if learns and not routing.weights_GSK.requires_grad:
            raise RuntimeError(
                "shared_router: reentrant activation checkpointing loses gradients of the router; use "
                "use_reentrant=False"
            )

    def _another_waits(self) -> bool:
        passes = [each() for each in self._passes]
        return any(each is not None and each is not self._last and not each.was_computed_again for each in passes)

    def __getstate__(self) -> dict:
        # without the passes: their graphs can be neither copied nor saved
        return {**self.__dict__, "routing": None, "_last": _Pass(), "_passes": []}


class FollowingRouter(nn.Module):
    """Repeats the decision of the first MoE layer, if one router serves all layers. It has no parameters."""

    def __init__(self, decision: Decision, top_k: int) -> None:
        super().__init__()
        self.decision, self.top_k = decision, top_k

    def forward(self, x_BD: Tensor, groups: Groups, valid_GS: Tensor | None = None, kernels: Kernels = PLAIN) -> Routed:
        return Routed(self.decision.recall(), x_BD)


class ImageRouting:
    """The routing of a layer with `MoeConfig.route="image"`.

    Attributes:
        class_token: Whether the first token of an image is a class token, which is then the router's input. Otherwise
            the input is the mean of the image's real tokens, registers included.
        decision: Keeps the decision for other layers; None if each layer decides for itself.
    """

    def __init__(self, class_token: bool = False) -> None:
        self.class_token = class_token
        self.decision: Decision | None = None

    def route(self, router: nn.Module, x_BND: Tensor, real_BN: Tensor | None, groups: Groups) -> Routing:
        """The decision for each image. An image of only padding does not count.

        Args:
            router: Any token-choice router.
            x_BND: Tokens.
            real_BN: Which of them are real, bool; None when all are.
            groups: The groups of images.
        """
        valid_GS = groups.valid(None if real_BN is None else real_BN.any(1), x_BND.device)
        # a row per image: too few rows for the kernels, which expect one per token
        routing = router(self.pooled(x_BND, real_BN), groups, valid_GS, PLAIN).routing
        if self.decision is not None and not isinstance(router, FollowingRouter):
            self.decision.keep(routing)
        return routing

    def pooled(self, x_BND: Tensor, real_BN: Tensor | None) -> Tensor:
        """The router's input for each image, (B, D), with means in float32 or wider."""
        if self.class_token:
            return x_BND[:, 0]
        dtype = torch.promote_types(x_BND.dtype, torch.float32)
        if real_BN is None:
            return x_BND.mean(1, dtype=dtype)
        total_BD = x_BND.masked_fill(~real_BN[..., None], 0).sum(1, dtype=dtype)
        return total_BD / real_BN.sum(1, keepdim=True).clamp_min(1)


def choices_of_tokens(routing: Routing, tokens: int, real_BN: Tensor | None) -> Routing:
    """The routing of tokens, in which each real token follows its image.

    Args:
        routing: The routing of the images.
        tokens: N.
        real_BN: Which tokens are real, bool; None when all are.
    """

    def of_tokens(values_GSX: Tensor) -> Tensor:  # (G, S, X) -> (B, N, X), without a copy
        return routing.groups.merge(values_GSX)[:, None].expand(-1, tokens, -1)

    chosen_BNK = of_tokens(routing.chosen_GSK)
    return Routing(
        Groups(chosen_BNK.shape[0], tokens, tokens, tokens),
        real_BN,
        of_tokens(routing.logits_GSE),
        of_tokens(routing.noisy_logits_GSE),
        of_tokens(routing.gates_GSE),
        chosen_BNK,
        of_tokens(routing.weights_GSK),
        kept_GSK=None if real_BN is None else real_BN[..., None].expand_as(chosen_BNK),
    )


def share_router(layers: Sequence[Any]) -> None:
    """Makes all `MoeMlp`s of a model follow the first one. `layers` is in forward order and not empty."""
    decision = Decision(layers[0].router)
    for index, layer in enumerate(layers):
        layer.images.decision = decision
        if index > 0:
            layer.router = FollowingRouter(decision, layer.config.top_k)
