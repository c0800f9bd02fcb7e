"""The sizes at which MoE layers are measured, and their given routing.

B images of N tokens, T = B*N tokens of width D; H hidden width of an expert; E experts; K choices per token.
"""

from dataclasses import dataclass

import torch

from vmoe.moe import MoeConfig, Routing
from vmoe.moe.assignment import Capacity, assign, expert_capacity
from vmoe.moe.groups import Groups

IMAGES_PER_GROUP = 8


@dataclass(frozen=True)
class LayerCase:
    """Sizes of a layer and its input."""

    width: int  # D
    hidden: int  # H of an expert
    num_experts: int  # E
    top_k: int  # K
    images: int  # B
    tokens: int  # N, tokens per image
    capacity_factor: float | None = 1.05  # capacity factor of the given routing and of the layer; None for no bound

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.images * self.tokens

    @property
    def forward_flops(self) -> int:
        """FLOPs of the active experts' forward pass: two products per choice; a multiply-add counts 2."""
        return 4 * self.num_tokens * self.top_k * self.width * self.hidden

    @property
    def flops(self) -> int:
        """FLOPs of both passes: the backward pass has two products for each one of the forward pass."""
        return 3 * self.forward_flops

    @property
    def product_shapes(self) -> list[tuple[int, int, int]]:
        """(rows, depth, columns) of the dense twin's products."""
        rows = self.num_tokens * self.top_k
        return [(rows, self.width, self.hidden), (rows, self.hidden, self.width)]

    def moe(self, **changes: object) -> MoeConfig:
        """The whole layer's options: groups of 8 images, batch priority, noise and balance losses, with `changes`.

        The capacity factor holds at evaluation too.
        """
        options = {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "capacity_factor": self.capacity_factor,
            "eval_capacity_factor": self.capacity_factor,
            "batch_priority": self.capacity_factor is not None,
            "group": IMAGES_PER_GROUP,
        }
        return MoeConfig(**(options | changes))


CASES = {
    "S16": LayerCase(384, 1536, 32, 2, 256, 197),
    "B16": LayerCase(768, 3072, 32, 2, 256, 197),
    "L16": LayerCase(1024, 4096, 32, 2, 128, 197),
    "Ti-k1": LayerCase(192, 768, 8, 1, 64, 65),
    "Ti-k2": LayerCase(192, 768, 8, 2, 64, 65),
    "S32": LayerCase(384, 1536, 32, 2, 32, 50),
    "S32-b128": LayerCase(384, 1536, 32, 2, 128, 50),
}


def given_routing(case: LayerCase, device: torch.device, dropless: bool = False) -> Routing:
    """Sends each token to K distinct experts at random, equally many to each expert, all within the capacity.

    With `dropless` there is no capacity, which changes no result.
    """
    order = torch.randperm(case.num_tokens)[:, None] * case.top_k + torch.arange(case.top_k)
    chosen_GSK = (order % case.num_experts)[None].to(device)
    groups = Groups.of(1, case.num_tokens, "batch")
    gates_GSE = torch.zeros(1, case.num_tokens, case.num_experts, device=device)
    weights_GSK = torch.rand(chosen_GSK.shape, device=device) * 0.5 + 0.25
    routing = Routing(groups, None, gates_GSE, gates_GSE, gates_GSE, chosen_GSK, weights_GSK)
    if dropless or case.capacity_factor is None:
        return routing
    choices = case.num_tokens * case.top_k
    return assign(routing, Capacity(expert_capacity(choices, case.num_experts, case.capacity_factor)))
