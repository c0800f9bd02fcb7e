"""Makes pictures of fractals in batches: the chaos game with many chains of points at once, in integers.

A picture varies its class: every map's matrix, translation and colour, and the rotation of the whole picture. Chains of
points follow randomly chosen maps. After some steps their points are counted by pixel and by map. A pixel's colour is
the mean of its points' maps. Its brightness is the logarithm of their number, relative to the fullest pixel.

Integers give the same bytes on every device and in any batch. In every step the chains are divided over the maps
exactly by the maps' probabilities: the chains' chances are spread evenly, always in the same way, and shifted by a draw
per picture (a Cranley-Patterson rotation).

Shapes: B pictures, S pixels per side, M maps of a system, P chains, T steps.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe.data.config import FractalConfig
from vmoe.data.draws import draw_numbers, uniforms
from vmoe.data.fractals.systems import (
    CHOICE_ONE,
    CLASS_STREAM,
    FARTHEST,
    MAPS,
    MATRIX_BITS,
    MATRIX_ONE,
    PLACE_ONE,
    draw_systems,
    in_units,
)
from vmoe.data.fusing import Fused

try:
    from vmoe.data.fractals import kernel
except ModuleNotFoundError as error:
    if error.name.split(".")[0] != "triton":
        raise
    kernel = None

UNCOUNTED_STEPS = 12  # first steps, from the middle of the picture to the attractor, which are not counted
_POINTS = 4  # counted points per pixel on average
_TURNS = 4096  # angles of a full turn
_LOG_ONE = 1 << 12
_VARIED = 9 * MAPS + 1  # draws per picture before the steps' shifts: matrices, translations, colours, the rotation


class Varied(NamedTuple):
    """The varied systems of B pictures, int32 as in `Systems`."""

    maps: Tensor  # (B, M, 6)
    thresholds: Tensor  # (B, M - 1)
    colours: Tensor  # (B, M, 3)
    turns: Tensor  # (B, 2): cosine and sine, in MATRIX_ONE
    shifts: Tensor  # (B, T): of the chances in each step, in CHOICE_ONE


class PictureMaker:
    """Makes pictures from their classes and numbers, as a function of (seed, stream, class, number) alone.

    The host never synchronises with the device. On a GPU a kernel follows the chains.

    Args:
        config: The classes and the strength of variations.
        size: S.
        seed: The seed, not negative.
        stream: A number per split, so that splits have different pictures.
        device: The device.
        fused: Whether to compile the rest on a GPU, for many batches of one size.
    """

    def __init__(
        self, config: FractalConfig, size: int, seed: int, stream: int, device: torch.device, fused: bool = False
    ) -> None:
        self.config, self.size, self.seed, self.stream = config, size, seed, stream
        self._systems = [part.to(device) for part in draw_systems(config.classes)]
        self._chances = spread_chances(size).to(device)
        self._numbers = draw_numbers(_VARIED + len(self._chances), device=device)
        turns = [2 * math.pi * turn / _TURNS for turn in range(_TURNS)]
        self._directions = _whole_numbers([[math.cos(turn), math.sin(turn)] for turn in turns], MATRIX_ONE).to(device)
        points = self._chances.shape[1] * (len(self._chances) - UNCOUNTED_STEPS)
        self._logarithms = _whole_numbers([math.log2(1 + count) for count in range(points + 1)], _LOG_ONE).to(device)
        self._vary, self._paint = (
            (Fused(self._varied), Fused(self._painted)) if fused else (self._varied, self._painted)
        )

    def __call__(self, labels: Tensor, numbers: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) uint8.

        Args:
            labels: (B,) int64, their classes.
            numbers: (B,) int64, not negative. Each number gives a different picture of a class.
        """
        varied = Varied(*self._vary(labels, numbers))
        return self._paint(self.counts(varied), varied.colours)

    def counts(self, varied: Varied) -> Tensor:
        """The number of points per pixel and map, (B, M, S, S) int32."""
        if varied.maps.is_cuda and kernel is not None:
            return kernel.count_points_on_gpu(varied, self._chances, UNCOUNTED_STEPS, self.size)
        return count_points(varied, self._chances, UNCOUNTED_STEPS, self.size)

    def _varied(self, labels: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        maps, thresholds, colours = (part[labels] for part in self._systems)
        keys = torch.stack([torch.full_like(numbers, self.stream), numbers], dim=1)
        draws = uniforms(self.seed, keys, self._numbers).T
        of_matrices, of_places, of_colours, of_turn, of_shifts = draws.split(
            [4 * MAPS, 2 * MAPS, 3 * MAPS, 1, draws.shape[1] - _VARIED], dim=1
        )
        matrices, places = maps.split([4, 2], dim=2)
        factors = MATRIX_ONE + _around(of_matrices, self.config.shape * MATRIX_ONE)
        matrices = matrices * factors.view(matrices.shape) >> MATRIX_BITS
        places = places + _around(of_places, self.config.shift * PLACE_ONE).view(places.shape)
        colours = colours + _around(of_colours, self.config.colour * 255).view(colours.shape)
        turn = _around(of_turn[:, 0], self.config.rotation / 360 * _TURNS) & (_TURNS - 1)
        shifts = (of_shifts * CHOICE_ONE).int()
        return torch.cat([matrices, places], dim=2), thresholds, colours.clamp(0, 255), self._directions[turn], shifts

    def _painted(self, counts: Tensor, colours: Tensor) -> Tensor:
        points = counts.sum(dim=1, dtype=torch.int32)
        fullest = points.amax(dim=(1, 2), keepdim=True)
        brightness = self._logarithms[points] * 255 // self._logarithms[fullest]
        sums = (counts[:, :, None] * colours[..., None, None]).sum(dim=1, dtype=torch.int32)
        means = sums // points.clamp(min=1)[:, None]
        return (means * brightness[:, None] // 255).to(torch.uint8)


def count_points(varied: Varied, chances: Tensor, warm_up: int, size: int) -> Tensor:
    """The number of points per pixel and map. Tests compare the kernel with it.

    Args:
        varied: The pictures' systems.
        chances: (T, P) int32 in `CHOICE_ONE`.
        warm_up: The number of first steps, which are not counted.
        size: S.

    Returns:
        (B, M, S, S) int32. The points fill the picture from edge to edge along one axis, and are centred along the
        other.
    """
    pictures, chains = len(varied.maps), chances.shape[1]
    shifted = chances[:, None] + varied.shifts.T[:, :, None] & CHOICE_ONE - 1
    maps = torch.zeros_like(shifted)  # the chosen map, (T, B, P)
    for threshold in varied.thresholds.T:
        maps += shifted >= threshold[:, None]
    of_maps = varied.maps.permute(2, 0, 1).contiguous()  # (6, B, M)
    place = torch.zeros(2, pictures, chains, dtype=torch.int32, device=of_maps.device)  # x and y
    counted = torch.empty(len(chances) - warm_up, *place.shape, dtype=torch.int32, device=of_maps.device)
    for step, which in enumerate(maps):
        parameters = of_maps.gather(2, which.long().expand(6, pictures, chains))  # faster than indexing
        place = _rounded_row(parameters[:4:2], parameters[1:4:2], *place) + parameters[4:]
        place = place.clamp(-FARTHEST, FARTHEST)
        if step >= warm_up:
            counted[step - warm_up] = place
    cos, sin = varied.turns.T[:, :, None]
    x, y = counted.unbind(dim=1)  # (T counted, B, P) each
    columns, rows = _pixels(_rounded_row(cos, -sin, x, y), _rounded_row(sin, cos, x, y), size)
    pixels = (maps[warm_up:] * size + rows) * size + columns
    pixels = pixels.transpose(0, 1).reshape(pictures, -1)
    counts = torch.zeros(pictures, MAPS * size * size, dtype=torch.int32, device=of_maps.device)
    counts.scatter_add_(1, pixels.long(), torch.ones_like(pixels))  # integer sums do not depend on the order
    return counts.view(pictures, MAPS, size, size)


def _rounded_row(a: Tensor, b: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The rounded product of one row of a matrix and a point."""
    return a * x + b * y + MATRIX_ONE // 2 >> MATRIX_BITS


def _pixels(across: Tensor, down: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The columns and rows of the pixels that contain points (T, B, P)."""
    ends = [(part.amin(dim=(0, 2)), part.amax(dim=(0, 2))) for part in (across, down)]
    extent = torch.maximum(*(high - low for low, high in ends))
    starts = (low - (extent - (high - low)) // 2 for low, high in ends)
    columns, rows = (
        (part - start[:, None]) * size // (extent[:, None] + 1)
        for part, start in zip((across, down), starts, strict=True)
    )
    return columns, rows


def spread_chances(size: int) -> Tensor:
    """The chances of P chains in T steps, (T, P) int32 in `CHOICE_ONE`, for pictures of `size` pixels per side.

    In each step every chain has its own one of P equal parts of the range, in random order.
    """
    chains = 1 << max(6, (8 * size - 1).bit_length())
    steps = UNCOUNTED_STEPS + max(1, -(-_POINTS * size * size // chains))
    keys = torch.stack([torch.full((steps,), CLASS_STREAM), torch.arange(steps)], dim=1)
    parts, inside = uniforms(1, keys, draw_numbers(2 * chains)).T.split(chains, dim=1)
    width = CHOICE_ONE // chains
    return (parts.argsort(dim=1, stable=True) * width + (inside * width).long()).int().contiguous()


def _around(draws: Tensor, most: float) -> Tensor:
    """Uniform integers from -most to most, from draws in [0, 1)."""
    most = round(most)
    return (draws * (2 * most + 1)).int() - most


def _whole_numbers(values: list, one: int) -> Tensor:
    return in_units(torch.tensor(values, dtype=torch.float64), one)
