"""Measures how stable routing is: for mirrored or moved images, in another run, and earlier in training.

All probes compare the first choices of the same patches. B images; N positions of a layer's grid; E experts; R
replicates.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vmoe.explain.explorer.collection import on_device, routed
from vmoe.explain.explorer.maps import LayerMaps
from vmoe.explain.explorer.measures import matched_agreement, mean_interval
from vmoe.explain.explorer.subject import Subject

SHIFT_SHARE = 64  # an image is moved by its side over this number, at least by a pixel
NULL_PERMUTATIONS = 20  # per batch of images


def flipped(images: Tensor) -> Tensor:
    """Mirrors images left to right."""
    return images.flip(-1)


def moved(images: Tensor) -> Tensor:
    """Moves images right by 1/64 of their width, at least one pixel, and repeats the left edge."""
    step = max(1, round(images.shape[-1] / SHIFT_SHARE))
    return F.pad(images, (step, 0, 0, 0), mode="replicate")[..., : images.shape[-1]]


@dataclass
class Consistency:
    """The share of an image's patches that keep their first choice when the image is changed, and that by chance.

    Patches with the same content are compared: a mirrored image's map is mirrored back, a moved image's stays as it is.
    Chance is the agreement of two independent draws from the experts' shares, the sum of p_e^2.
    """

    shares: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"flip": [], "shift": []})
    first: Tensor | None = None  # (E,) first choices

    def update(self, plain: LayerMaps, mirrored: LayerMaps, shifted: LayerMaps) -> None:
        """Adds a batch."""
        here, there = _first_choices(plain), _first_choices(mirrored).unflatten(1, plain.grid).flip(-1).flatten(1)
        for name, other in (("flip", there), ("shift", _first_choices(shifted))):
            seen = (here >= 0) & (other >= 0)
            same = ((here == other) & seen).sum(1) / seen.sum(1).clamp_min(1)
            self.shares[name].append(same.cpu().numpy())
        counts = torch.bincount(here[here >= 0], minlength=plain.gates.shape[-1])
        self.first = counts if self.first is None else self.first + counts

    def result(self) -> dict[str, dict[str, float]]:
        """Value, low, high and chance for "flip" and "shift"."""
        share = (self.first / self.first.sum().clamp_min(1)).double()
        chance = float(share.square().sum())
        return {
            name: {**mean_interval(np.concatenate(parts)).as_dict(), "chance": chance}
            for name, parts in self.shares.items()
        }


@dataclass
class Agreement:
    """The agreement of two routers on patches, independent of their experts' numbering.

    It is the share of equal first choices with the best one-to-one pairing of experts. The null compares the first
    router on one image with the second router on another image, position by position.
    """

    table: np.ndarray | None = None  # (E, E')
    null: np.ndarray | None = None  # (R, E, E')

    def update(self, one: LayerMaps, other: LayerMaps, generator: torch.Generator) -> None:
        """Adds a batch."""
        first, second = _first_choices(one), _first_choices(other)
        orders = [torch.randperm(len(first), generator=generator).to(first.device) for _ in range(NULL_PERMUTATIONS)]
        table = _joint(one, first, other, second)
        null = np.stack([_joint(one, first, other, second[order]) for order in orders])
        self.table = table if self.table is None else self.table + table
        self.null = null if self.null is None else self.null + null

    def result(self) -> dict[str, float]:
        """Value, null_mean and null_high (95 %)."""
        null = np.array([matched_agreement(table) for table in self.null])
        return {
            "value": matched_agreement(self.table),
            "null_mean": float(null.mean()),
            "null_high": float(np.quantile(null, 0.95)),
        }


@dataclass
class Saturation:
    """Router saturation: the share of a token's choices that the last checkpoint makes too.

    See Muennighoff et al. 2024, https://arxiv.org/abs/2409.02060, section 4.1.1.
    """

    same: int = 0
    choices: int = 0

    def update(self, early: LayerMaps, last: LayerMaps) -> None:
        """Adds a batch."""
        here, there = early.patch_choices, last.patch_choices
        seen = there >= 0
        self.same += int(((there[..., None] == here[..., None, :]).any(-1) & seen).sum())
        self.choices += int(seen.sum())

    def result(self) -> float:
        return self.same / max(self.choices, 1)


def _first_choices(maps: LayerMaps) -> Tensor:
    return maps.patch_choices[..., 0]


def _joint(one: LayerMaps, first: Tensor, other: LayerMaps, second: Tensor) -> np.ndarray:
    """A table of patches by first choice of one and of the other router."""
    experts = one.gates.shape[-1], other.gates.shape[-1]
    index = (first * experts[1] + second)[(first >= 0) & (second >= 0)]
    return torch.bincount(index, minlength=math.prod(experts)).view(experts).cpu().numpy()


@dataclass(frozen=True)
class Probes:
    """The results of `probe`, in the report's form."""

    consistency: dict[str, dict[str, dict[str, float]]]  # by layer
    agreement: list[dict[str, dict[str, float]]]  # for each other run, by layer that both have with the same grid
    saturation: list[dict[str, float]]  # for each earlier checkpoint, by layer


@torch.inference_mode()
def probe(
    subject: Subject,
    batches: Iterable,
    others: Sequence[Subject] = (),
    snapshots: Sequence[Subject] = (),
    seed: int = 0,
) -> Probes:
    """Routes the same images by the model, by `others` and by earlier `snapshots`, and compares them.

    Batches are (images, labels, ...), normalised for the model. The null's permutations follow from `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    consistency: dict[str, Consistency] = {}
    agreement: list[dict[str, Agreement]] = [{} for _ in others]
    saturation: list[dict[str, Saturation]] = [{} for _ in snapshots]
    for batch in batches:
        x = on_device(batch, subject.device)
        plain = _routed_maps(subject, x)
        mirrored, shifted = _routed_maps(subject, x, flipped), _routed_maps(subject, x, moved)
        for name, maps in plain.items():
            consistency.setdefault(name, Consistency()).update(maps, mirrored[name], shifted[name])
        for found, other in zip(agreement, others, strict=True):
            for name, maps in _routed_maps(other, subject.as_seen_by(other, x)).items():
                if name in plain and maps.grid == plain[name].grid:
                    found.setdefault(name, Agreement()).update(plain[name], maps, generator)
        for found, early in zip(saturation, snapshots, strict=True):
            for name, maps in _routed_maps(early, x).items():
                found.setdefault(name, Saturation()).update(maps, plain[name])
    return Probes(
        _layer_results(consistency), list(map(_layer_results, agreement)), list(map(_layer_results, saturation))
    )


def _routed_maps(subject: Subject, x: Tensor, change: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, LayerMaps]:
    return routed(subject.model, change(x))[1]


def _layer_results(parts: dict[str, Any]) -> dict[str, Any]:
    return {name: part.result() for name, part in parts.items()}
