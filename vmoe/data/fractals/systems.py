"""The classes: iterated function systems (IFS) of four affine maps, each map with a probability and a colour.

Parameters are drawn as in Anderson and Farrell, "Improving fractal pre-training" (2022, arXiv 2110.03091): the sum of
s1 + 2 s2 over the maps' singular values s1 >= s2 lies in a narrow range. It measures how much of the plane the
attractor fills. A class is a function of its number alone, so it is the same in every run.

Shapes: C classes, M maps of a system.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe.data.draws import draw_numbers, uniforms

MAPS = 4  # M
MATRIX_BITS = 14
MATRIX_ONE = 1 << MATRIX_BITS  # the number 1 in a matrix of integers
PLACE_ONE = 1 << 12  # the number 1 in a position: half the side of the square around the attractor
FARTHEST = 4 * PLACE_ONE - 1  # the bound of positions, so that no product exceeds 31 bits
CHOICE_ONE = 1 << 16  # the number 1 in a probability
CLASS_STREAM = 2**43  # takes the epoch's position in the keys of draws, far above any epoch
_FILLING = ((5 + MAPS) / 2, (6 + MAPS) / 2)  # the range of the sum of s1 + 2 s2
_CANDIDATES = 32  # candidates of singular values; the first in the range is taken
_LEAST_SHARE = 0.05  # the smallest area share that counts for a map's probability
_DARKEST = 48  # the smallest value of a colour's channel
_CHAINS, _STEPS, _WARM_UP = 32, 48, 12  # for the points that find an attractor's extent
_SHAPE_DRAWS = 6  # draws per map after the singular values: two angles, two signs, a translation


class Systems(NamedTuple):
    """The classes as integers, so that every device computes the same pictures from them.

    Attributes:
        maps: (C, M, 6) int32: a, b, c, d in `MATRIX_ONE` and e, f in `PLACE_ONE`, for x' = a x + b y + e, y' = c x +
            d y + f. The attractor lies in the square from -1 to 1.
        thresholds: (C, M - 1) int32 in `CHOICE_ONE`: the cumulative probabilities of the maps.
        colours: (C, M, 3) int32, 0 to 255.
    """

    maps: Tensor
    thresholds: Tensor
    colours: Tensor


@lru_cache(maxsize=4)
def draw_systems(classes: int) -> Systems:
    """The first `classes` classes, on the CPU."""
    keys = torch.stack([torch.full((classes,), CLASS_STREAM), torch.arange(classes)], dim=1)
    values = 2 * MAPS * _CANDIDATES
    draws = uniforms(0, keys, draw_numbers(values + MAPS * (_SHAPE_DRAWS + 3))).T.double()
    of_values, of_shapes, of_colours = draws.split([values, MAPS * _SHAPE_DRAWS, MAPS * 3], dim=1)
    singular = _singular_values(of_values.reshape(classes, _CANDIDATES, MAPS, 2))
    matrices, translations = _affine_maps(singular, of_shapes.reshape(classes, MAPS, _SHAPE_DRAWS))
    translations = _into_square(matrices, translations)
    areas = singular.prod(dim=2).clamp(min=_LEAST_SHARE)
    thresholds = (areas / areas.sum(dim=1, keepdim=True)).cumsum(dim=1)[:, :-1]
    colours = _DARKEST + of_colours.reshape(classes, MAPS, 3) * (256 - _DARKEST)
    return Systems(
        torch.cat([in_units(matrices.flatten(2), MATRIX_ONE), in_units(translations, PLACE_ONE)], dim=2),
        in_units(thresholds, CHOICE_ONE),
        colours.int(),
    )


def _singular_values(draws: Tensor) -> Tensor:
    """(C, M, 2), the larger first: the first of (C, n, M, 2) candidates in the range, or else the nearest to it."""
    candidates = draws.sort(dim=3, descending=True).values
    filling = (candidates[..., 0] + 2 * candidates[..., 1]).sum(dim=2)
    low, high = _FILLING
    turns = torch.arange(filling.shape[1], dtype=filling.dtype)
    is_in_range = (low <= filling) & (filling <= high)
    order = torch.where(is_in_range, turns, filling.shape[1] + (filling - (low + high) / 2).abs())
    return candidates[torch.arange(len(candidates)), order.argmin(dim=1)]


def _affine_maps(singular: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices (C, M, 2, 2): a rotation, the singular values, another rotation, signs; and translations (C, M, 2)."""
    first, second = (_rotation(2 * math.pi * draws[..., which]) for which in (0, 1))
    signs = torch.where(draws[..., 2:4] < 0.5, -1.0, 1.0).double()
    return first @ torch.diag_embed(singular) @ second @ torch.diag_embed(signs), 2 * draws[..., 4:6] - 1


def _rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=-2)


def _into_square(matrices: Tensor, translations: Tensor) -> Tensor:
    """The translations (C, M, 2) that make attractors fill the square from -1 to 1, found by random points on them."""
    choices = uniforms(1, torch.tensor([[CLASS_STREAM, 0]]), draw_numbers(_STEPS * _CHAINS)).view(_STEPS, _CHAINS)
    points = torch.zeros(len(matrices), _CHAINS, 2, dtype=matrices.dtype)
    low, high = torch.full_like(points[:, :1], math.inf), torch.full_like(points[:, :1], -math.inf)
    for step, chosen in enumerate((choices * MAPS).long()):
        points = _transformed(matrices[:, chosen], points) + translations[:, chosen]
        if step >= _WARM_UP:
            low = torch.minimum(low, points.amin(dim=1, keepdim=True))
            high = torch.maximum(high, points.amax(dim=1, keepdim=True))
    middle, half = (low + high) / 2, (high - low).amax(dim=2, keepdim=True) / 2
    return (_transformed(matrices, middle) + translations - middle) / half


def _transformed(matrices: Tensor, points: Tensor) -> Tensor:
    return (matrices * points[..., None, :]).sum(dim=-1)


def in_units(values: Tensor, one: int) -> Tensor:
    """Numbers times `one`, rounded to int32."""
    return (values * one).round().int()
