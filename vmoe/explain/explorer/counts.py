"""Simple counts while images stream by: loads, drops, co-activation, maps, colours, flows.

B images; P prefix tokens and N positions of a layer's grid; E experts; K choices per token.
"""

import torch
from torch import Tensor

from vmoe.explain.explorer.maps import LayerMaps


class LayerCounts:
    """Sums over all images of one layer, on its device.

    Attributes:
        load: (E,) each expert's load over all tokens, prefix tokens included.
        together: (E, E) sum over tokens of the joint load of two experts; the diagonal holds each expert's load.
        position: (N, E) each expert's load at each position.
        colour: (E, 3) sum of the mean colours of each expert's patches.
        images_by_experts: (E + 1,) images by the number of experts that their patches choose.
        tokens: Number of tokens without padding.
        choices: Number of their choices.
        dropped: Number of dropped choices.
        entropy: Sum over tokens, nats.
    """

    def __init__(self, maps: LayerMaps) -> None:
        device, experts = maps.gates.device, maps.gates.shape[-1]
        places = maps.grid[0] * maps.grid[1]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.load, self.together = zeros(experts), zeros(experts, experts)
        self.position, self.colour = zeros(places, experts), zeros(experts, 3)
        self.images_by_experts = zeros(experts + 1)
        self.tokens, self.choices, self.dropped, self.entropy = zeros(), zeros(), zeros(), zeros()

    def update(self, maps: LayerMaps, colour: Tensor) -> None:
        """Adds a batch. `colour` (B, N, 3) is the mean colour at each position, in [0, 1]."""
        experts = maps.gates.shape[-1]
        taken_TE = maps.taken.flatten(0, 1)
        self.load += taken_TE.sum(0, dtype=torch.float64)
        self.together += taken_TE.t() @ taken_TE
        patches = maps.taken[:, maps.prefix :]
        self.position += patches.sum(0, dtype=torch.float64)
        self.colour += patches.flatten(0, 1).t() @ colour.flatten(0, 1)

        used = torch.zeros(len(patches), experts + 1, device=patches.device)
        choices = maps.patch_choices.flatten(1)
        used.scatter_(1, torch.where(choices < 0, experts, choices), 1.0)
        self.images_by_experts += torch.bincount(used[:, :experts].sum(1).long(), minlength=experts + 1)

        self.tokens += maps.valid.sum()
        self.entropy += (maps.entropy * maps.valid).sum(dtype=torch.float64)
        if maps.dropped is not None:
            self.choices += maps.valid.sum() * maps.dropped.shape[-1]
            self.dropped += maps.dropped.sum()


class Flow:
    """The distribution of an expert's patches over the experts of the next MoE layer, by first choices.

    Attributes:
        counts: (E, E') patches, on the finer of the two grids.
    """

    def __init__(self, before: LayerMaps, after: LayerMaps) -> None:
        self._sizes = before.gates.shape[-1] + 1, after.gates.shape[-1] + 1
        self._all = torch.zeros(self._sizes, dtype=torch.float64, device=before.gates.device)

    @property
    def counts(self) -> Tensor:
        return self._all[:-1, :-1]

    def update(self, before: LayerMaps, after: LayerMaps) -> None:
        """Adds a batch."""
        grid = max(before.grid, after.grid)
        first, second = (
            resized(torch.where(maps.patch_choices < 0, size - 1, maps.patch_choices)[..., 0], maps.grid, grid)
            for maps, size in zip((before, after), self._sizes, strict=True)
        )
        index = first * self._sizes[1] + second.to(first.device)
        self._all += torch.bincount(index.flatten(), minlength=self._all.numel()).view(self._sizes)


def resized(values: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A map (B, N) on another grid: (B, N'). Each position takes the value of the nearest one."""
    if old == new:
        return values
    row, column = (
        ((torch.arange(wanted, device=values.device) + 0.5) * had / wanted).long()
        for had, wanted in zip(old, new, strict=True)
    )
    return values.unflatten(1, old)[:, row][:, :, column].flatten(1)
