"""Per-image routing: one decision per image, which all its tokens follow (Mobile V-MoE, Daxberger et al. 2023,
https://arxiv.org/abs/2309.04354).

B images of N tokens of width D; G groups of S images; E experts; K choices per image. In a `Routing` of images, images
take the position of tokens.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.attached import is_bare
from vmoe.moe.groups import Groups
from vmoe.moe.kernels import PLAIN, Kernels
from vmoe.moe.passes import is_backward
from vmoe.moe.routers import TokenChoiceRouter
from vmoe.moe.routing import Routed, Routing
from vmoe.moe.scores import Gate

ONE_IMAGE = Groups(1, 1, 1, 1)


class Decision:
    """The decision of a model's first MoE layer in the last forward pass, for the layers after it.

    Each thread has its own, so that several may run a model at once, such as a server's.

    Attributes:
        router: The first layer's router.
    """

    def __init__(self, router: nn.Module) -> None:
        self.router = router
        self._of_thread = threading.local()

    def keep(self, routing: Routing) -> None:
        """Keeps the routing of the images, for the later layers."""
        self._of_thread.routing = routing

    def recall(self) -> Routing:
        """The decision, for a later layer.

        Raises:
            RuntimeError: There is none, or activation checkpointing computes the later layer again, when another
                forward pass may have replaced the decision.
        """
        if not torch.compiler.is_compiling() and is_backward():
            raise RuntimeError(
                "shared_router: activation checkpointing cannot compute a layer again that follows another layer's "
                "router; turn checkpointing off, or set shared_router to false"
            )
        routing: Routing | None = getattr(self._of_thread, "routing", None)
        if routing is None:
            raise RuntimeError("shared_router: the first MoE layer decides for all, and has not run yet")
        return routing

    def __reduce__(self) -> tuple:
        return Decision, (self.router,)  # a routing belongs to a graph, which cannot be copied or saved


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

    Args:
        is_shared: Whether one router is to decide for all layers; `share_router` must then link them.
    """

    def __init__(self, is_shared: bool = False) -> None:
        self.class_token, self.is_shared = False, is_shared
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
        return self._kept(router, router(self.pooled(x_BND, real_BN), groups, valid_GS, PLAIN).routing)

    def route_one(self, router: nn.Module, x_1ND: Tensor) -> Routing:
        """The same for one image at evaluation on a CPU, in as few operators as possible."""
        pooled_1D = self.pooled(x_1ND, None)
        weight_ED = _weight_of_plain_gate(router, pooled_1D)
        if weight_ED is None:
            return self._kept(router, router(pooled_1D, ONE_IMAGE, None, PLAIN).routing)
        logits_11E = F.linear(pooled_1D, weight_ED)[None]
        gates_11E = logits_11E.softmax(-1)
        weights_111, chosen_111 = gates_11E.max(-1, keepdim=True)
        return self._kept(router, Routing(ONE_IMAGE, None, logits_11E, logits_11E, gates_11E, chosen_111, weights_111))

    def _kept(self, router: nn.Module, routing: Routing) -> Routing:
        if self.decision is not None and not isinstance(router, FollowingRouter):
            self.decision.keep(routing)
        elif self.decision is None and self.is_shared:
            raise RuntimeError(
                "shared_router: this layer knows no other that it shares a router with; vmoe.sparsify and "
                "vmoe.create_model link the layers of a model; for a layer by itself set shared_router to false"
            )
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


def _weight_of_plain_gate(router: Any, pooled_1D: Tensor) -> Tensor | None:
    """(E, D) if the router takes the largest softmax of a product with it, in the type of the input; else None."""
    if not is_bare(router, TokenChoiceRouter) or router.top_k > 1 or router.renormalize or router.removed:
        return None
    gate, dtype = router.gate, pooled_1D.dtype
    if not is_bare(gate, Gate) or torch.is_autocast_enabled("cpu"):
        return None
    weight_ED = gate.weight
    return weight_ED if weight_ED.dtype == dtype and dtype in (torch.float32, torch.float64) else None


def choices_of_tokens(routing: Routing, tokens: int, real_BN: Tensor | None) -> Routing:
    """The routing of tokens, in which each real token follows its image.

    Args:
        routing: The routing of the images.
        tokens: N.
        real_BN: Which tokens are real, bool; None when all are.
    """

    def of_tokens(values_GSX: Tensor) -> Tensor:  # (G, S, X) -> (B, N, X), without a copy
        return routing.groups.merge(values_GSX)[:, None].expand(-1, tokens, -1)

    chosen_BNK, logits_BNE = of_tokens(routing.chosen_GSK), of_tokens(routing.logits_GSE)
    is_noisy = routing.noisy_logits_GSE is not routing.logits_GSE
    return Routing(
        Groups(chosen_BNK.shape[0], tokens, tokens, tokens),
        real_BN,
        logits_BNE,
        of_tokens(routing.noisy_logits_GSE) if is_noisy else logits_BNE,
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
