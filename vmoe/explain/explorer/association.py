"""Measures what an expert's patches have in common: tables of expert by feature, with intervals and null tables.

The patches of an image resemble one another, so images are the sampled units. Intervals come from reweighting whole
images (bootstrap). Nulls pair the routing of one image with the content of another. Both are computed while images
stream by: each replicate is a table, and no image is kept.

B images; N positions of a layer's grid; K choices per patch; E experts; F values of a feature; R replicates.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe.explain.explorer.features import COLOUR_NAMES, LEVELS, Levels, PatchFeatures, colour_bins
from vmoe.explain.explorer.measures import Z95, normalised_mutual_information

FINEST_POSITION = 16  # the most rows or columns of positions
_PACKED = {"colour": len(COLOUR_NAMES), "brightness": LEVELS, "edges": LEVELS}
_INDICES_AT_ONCE = 4_000_000


class Specialisation(NamedTuple):
    """The information of a patch's expert about one of the patch's features."""

    nmi: float  # normalised mutual information of expert and feature over all choices
    low: float  # lower end of its 95 % interval, from the standard deviation over bootstrap replicates
    high: float  # upper end
    null_mean: float  # the mean under the null
    null_high: float  # the 95 % quantile under the null
    p: float  # share of the permutations, this routing counted among them, with at least this information
    beats_null: bool  # whether the whole interval lies above `null_high`


class GridCodes:
    """The features of every position of one grid as small integers."""

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        self._brightness, self._edges = Levels(), Levels()

    def encode(self, features: PatchFeatures) -> Tensor:
        """Colour, brightness and edge strength of each position, packed into one number: (B, N) int32."""
        colour = colour_bins(features.colour)
        packed = (colour * LEVELS + self._brightness(features.brightness)) * LEVELS + self._edges(features.edges)
        return packed.int()

    def positions(self, device: torch.device) -> tuple[Tensor, int]:
        """The bin of each position (rows, columns) int32, and the number of bins. Fine grids share bins."""
        bins = [min(extent, FINEST_POSITION) for extent in self.grid]
        row, column = (
            torch.arange(extent, device=device) * count // extent for extent, count in zip(self.grid, bins, strict=True)
        )
        return (row[:, None] * bins[1] + column).int(), bins[0] * bins[1]


class Draws(NamedTuple):
    """The replicates' random numbers for B images."""

    # (R, B) weight of each image in a bootstrap replicate: Poisson(1), which needs no known number of images (Chamandy
    # et al. 2012, https://research.google/pubs/pub43157/)
    weights: Tensor
    partners: Tensor  # (R, B) permutations: for each image's routing the image with the content
    shifts: Tensor  # (R, B, 2) by how many rows and columns a map is moved round, in [0, 1) of the grid
    flips: Tensor  # (R, B) bool, whether it is mirrored too

    @classmethod
    def of(cls, replicates: int, images: int, generator: torch.Generator) -> "Draws":
        """Draws the numbers on the generator's device."""
        options = {"generator": generator, "device": generator.device}
        weights = torch.poisson(torch.ones(replicates, images, device=generator.device), generator=generator)
        partners = torch.rand(replicates, images, **options).argsort(1)
        shifts = torch.rand(replicates, images, 2, **options)
        return cls(weights, partners, shifts, torch.rand(replicates, images, **options) < 0.5)


class Tables:
    """Choices by feature and expert: as observed, in bootstrap replicates, and under the null.

    Attributes:
        value: (F, E) float64.
        bootstrap: (R, F, E) float32.
        null: (R, F, E) float32.
    """

    def __init__(self, values: int, experts: int, replicates: int, device: torch.device) -> None:
        self.value = torch.zeros(values, experts, dtype=torch.float64, device=device)
        self.bootstrap = torch.zeros(replicates, values, experts, device=device)
        self.null = torch.zeros_like(self.bootstrap)

    def specialisation(self) -> Specialisation:
        """The specialisation in the tables."""
        nmi = float(normalised_mutual_information(self.value))
        spread = float(normalised_mutual_information(self.bootstrap).std())
        null = normalised_mutual_information(self.null).cpu()
        low, high = max(0.0, nmi - Z95 * spread), min(1.0, nmi + Z95 * spread)
        null_high = float(null.quantile(0.95))
        p = (1 + int((null >= nmi - 1e-12).sum())) / (1 + len(null))
        return Specialisation(nmi, low, high, float(null.mean()), null_high, p, low > null_high)


class LayerAssociation:
    """The tables of one layer, block of images by block.

    Args:
        grid: The layer's grid.
        experts: E.
        classes: Number of classes; 0 without labels.
        patch_kinds: Number of known patch labels; 0 without them.
        replicates: R.
        device: The device of the tables.
    """

    def __init__(
        self, grid: GridCodes, experts: int, classes: int, patch_kinds: int, replicates: int, device: torch.device
    ) -> None:
        self.grid, self.experts = grid, experts
        self.position, positions = grid.positions(device)
        sizes = {"class": classes, "position": positions, **_PACKED, "patch label": patch_kinds}
        self.tables = {name: Tables(size, experts, replicates, device) for name, size in sizes.items() if size}

    def update(self, choices: Tensor, labels: Tensor | None, codes: Tensor, known: Tensor | None, draws: Draws) -> None:
        """Counts a block of images.

        Args:
            choices: (B, N, K) experts, -1 for none.
            labels: (B,) classes, or (B, C) of 0 and 1 for several; None without labels.
            codes: (B, N) from `GridCodes.encode`.
            known: (B, N) labels of the patches; None without patch labels.
            draws: The draws for B images.
        """
        # one column more than experts, for choices that do not count
        choices = torch.where(choices < 0, self.experts, choices).int()
        if labels is not None:
            self._count_classes(choices, labels, draws)
        shape = tuple(_PACKED.values())
        for axis, (name, feature) in enumerate(zip(_PACKED, _unpacked_codes(codes, shape), strict=True)):
            self._count_bootstrap(name, feature, choices, draws)
            others = [1 + other for other in range(len(shape)) if other != axis]
            if axis == 0:
                packed = self._null_counts(codes, math.prod(shape), choices, draws).unflatten(1, shape)
            self.tables[name].null += packed.sum(others)
        self._count_bootstrap("position", self.position.flatten().expand(len(choices), -1), choices, draws)
        self.tables["position"].null += self._shifted_counts(choices, draws)
        if known is not None:
            self._count_bootstrap("patch label", known, choices, draws)
            self.tables["patch label"].null += self._null_counts(
                known, len(self.tables["patch label"].value), choices, draws
            )

    def _count_classes(self, choices: Tensor, labels: Tensor, draws: Draws) -> None:
        """Counts classes. A class belongs to a whole image, so each replicate sums whole images' loads.

        An image with several classes counts for each of them.
        """
        tables = self.tables["class"]
        replicates, classes, _ = tables.null.shape
        nothing = torch.zeros_like(choices[..., 0])
        loads_BE = self._by_image(nothing, 1, choices)[:, 0]
        if labels.dim() == 2:
            has_class_BC = labels.to(loads_BE.dtype)
            tables.value += (has_class_BC.T @ loads_BE).double()
            for replicate, (weights, partners) in enumerate(zip(draws.weights, draws.partners, strict=True)):
                tables.bootstrap[replicate] += has_class_BC.T @ (weights[:, None] * loads_BE)
                tables.null[replicate] += has_class_BC[partners].T @ loads_BE
            return
        tables.value.index_add_(0, labels, loads_BE.double())
        weighted = draws.weights.t()[..., None] * loads_BE[:, None]  # (B, R, E)
        tables.bootstrap += (
            torch.zeros(classes, replicates, self.experts, device=labels.device)
            .index_add_(0, labels, weighted)
            .transpose(0, 1)
        )
        first = torch.arange(replicates, device=labels.device)[:, None] * classes
        rows = loads_BE.expand(replicates, -1, -1).flatten(0, 1)
        tables.null.view(-1, self.experts).index_add_(0, (first + labels[draws.partners]).flatten(), rows)

    def _count_bootstrap(self, name: str, feature: Tensor, choices: Tensor, draws: Draws) -> None:
        tables = self.tables[name]
        by_image = self._by_image(feature, len(tables.value), choices)
        tables.value += by_image.sum(0, dtype=torch.float64)
        tables.bootstrap += (draws.weights @ by_image.flatten(1)).view_as(tables.bootstrap)

    def _by_image(self, feature: Tensor, values: int, choices: Tensor) -> Tensor:
        """Each image's own table, (B, F, E)."""
        return self._histogram(feature[None].transpose(0, 1), values, choices[:, None])

    def _null_counts(self, feature: Tensor, values: int, choices: Tensor, draws: Draws) -> Tensor:
        """Tables (R, F, E) of the routing of each image with the feature's map of its partner.

        Positions stay paired, so the null includes the information of a router that only knows positions.
        """
        parts = [
            self._histogram(feature[partners], values, choices[None])
            for partners in draws.partners.split(self._at_once(choices))
        ]
        return torch.cat(parts)

    def _shifted_counts(self, choices: Tensor, draws: Draws) -> Tensor:
        """Tables (R, F, E) of the routing with positions shifted around the grid, differently for each image.

        A torus shift keeps neighbours together (Lotwick & Silverman 1982), so shifted maps stay smooth.
        """
        rows, columns = self.grid.grid
        extent = torch.tensor([rows, columns], device=choices.device)
        row, column = torch.arange(rows, device=choices.device), torch.arange(columns, device=choices.device)
        parts = []
        step = self._at_once(choices)
        for shifts, flips in zip(draws.shifts.split(step), draws.flips.split(step), strict=True):
            moved = (shifts * extent).long()
            ys = (row + moved[..., :1]) % rows
            xs = (torch.where(flips[..., None], columns - 1 - column, column) + moved[..., 1:]) % columns
            position = self.position[ys[..., :, None], xs[..., None, :]].flatten(2)
            parts.append(self._histogram(position, len(self.tables["position"].value), choices[None]))
        return torch.cat(parts)

    def _histogram(self, feature: Tensor, values: int, choices: Tensor) -> Tensor:
        """Counts per first index: feature (R, B, N) and choices (1 or R, B, N, K) -> (R, F, E) float."""
        slots = values * (self.experts + 1)
        first = torch.arange(len(feature), device=feature.device, dtype=torch.int32)[:, None, None] * slots
        index = (first + feature * (self.experts + 1))[..., None] + choices
        counts = torch.bincount(index.flatten(), minlength=len(feature) * slots)
        return counts.view(len(feature), values, self.experts + 1)[..., : self.experts].float()

    def _at_once(self, choices: Tensor) -> int:
        """The number of replicates to count at once."""
        return max(1, _INDICES_AT_ONCE // max(1, choices.numel()))


def _unpacked_codes(codes: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Unpacks the numbers from one code, in order."""
    parts = []
    for size in reversed(shape):
        parts.append(codes % size)
        codes = codes // size
    return parts[::-1]
