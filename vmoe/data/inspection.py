"""Inspects a set's pictures: sizes, colours, damaged files, and near-duplicates between splits."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vmoe.data.channels import ChannelSums, displayed
from vmoe.data.datamodule import ImageDataModule
from vmoe.data.images import eval_crop
from vmoe.data.imageset import ImageSet
from vmoe.errors import UserError
from vmoe.progress import Progress, shown

_THUMB = 16  # pixels per side
_ALIKE = 0.99  # correlation from which two thumbnails count as one picture
_PLAIN = 8.0  # levels: thumbnails with a smaller standard deviation are not compared
_THUMBS_AT_ONCE = 4096  # thumbnails
_NAMED = 5  # the most names in a line
_TITLES_OF_SPLITS = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class NearDuplicate:
    """A picture of validation or test that looks like one of training: their paths and their correlation."""

    split: str
    place: str
    of_training: str
    correlation: float
    pictures: tuple[np.ndarray, np.ndarray] = field(repr=False)  # prepared for the model, (height, width, 3) uint8


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection. Shares and colours are over the inspected pictures."""

    looked_at: dict[str, int]  # number of inspected pictures, by split
    images: dict[str, int]
    sizes: dict[str, list[list[int]]]  # smallest, median and largest [height, width], by split; each side for itself
    mean: list[float]  # of the channels of training pictures, prepared as in evaluation, in [0, 1]
    std: list[float]
    damaged: dict[str, list[str]]  # by split a line for each
    near_duplicates: list[NearDuplicate]

    def as_dict(self) -> dict[str, Any]:
        """The same in plain types, without the pictures."""
        pairs = [
            {"split": each.split, "image": each.place, "training_image": each.of_training}
            | {"correlation": round(each.correlation, 4)}
            for each in self.near_duplicates
        ]
        return {
            **{name: getattr(self, name) for name in ("images", "looked_at", "sizes", "mean", "std", "damaged")},
            "near_duplicates": pairs,
        }

    def rows(self, most: int) -> list[tuple[str, list[np.ndarray]]]:
        """The rows of a sheet: a name per split and at most `most` pictures, each beside its similar training image."""
        rows = []
        for split in dict.fromkeys(each.split for each in self.near_duplicates):
            pictures = [picture for each in self.near_duplicates if each.split == split for picture in each.pictures]
            rows.append((f"{_TITLES_OF_SPLITS[split]} | training", pictures[: most // 2 * 2 or 2]))
        return rows

    def lines(self) -> list[str]:
        """The result as lines of text."""
        lines = []
        for split, (smallest, median, largest) in self.sizes.items():
            same = smallest == largest
            between = "all" if same else f"{_height_by_width(smallest)} to {_height_by_width(largest)}, median"
            lines.append(f"sizes in {_TITLES_OF_SPLITS[split]}: {between} {_height_by_width(median)} (height x width)")
        if self.mean:  # in quotes, since shells take brackets for patterns
            mean, std = (f"'[{','.join(map(_written, values))}]'" for values in (self.mean, self.std))
            lines.append(f"colours of training images: --data.mean {mean} --data.std {std} would normalise them")
        for split, found in self.damaged.items():
            if found:
                more = f"; and {len(found) - _NAMED} others" if len(found) > _NAMED else ""
                count = f"{len(found)} of {self.looked_at[split]} {_TITLES_OF_SPLITS[split]} images"
                lines.append(f"warning: {count} cannot be read: {'; '.join(found[:_NAMED])}{more}")
        for split in dict.fromkeys(each.split for each in self.near_duplicates):
            found = [each for each in self.near_duplicates if each.split == split]
            pairs = "; ".join(f"{each.place} is like {each.of_training}" for each in found[:_NAMED])
            more = f"; and {len(found) - _NAMED} others" if len(found) > _NAMED else ""
            count = f"{len(found)} of {self.looked_at[split]} {_TITLES_OF_SPLITS[split]} images"
            lines.append(f"warning: {count} are nearly training images, so results are too good: {pairs}{more}")
        if not self.near_duplicates and len(self.looked_at) > 1:
            lines.append("no image of validation or test is nearly one of training")
        if partly := [split for split, count in self.looked_at.items() if count < self.images[split]]:
            parts = ", ".join(
                f"{self.looked_at[split]} of {self.images[split]} {_TITLES_OF_SPLITS[split]}" for split in partly
            )
            lines.append(f"this is of {parts} images, a random choice")
        return lines


@dataclass
class _Split:
    """The data gathered from one split."""

    images: ImageSet
    places: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    thumbs: list[np.ndarray] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    sums: ChannelSums = field(default_factory=ChannelSums)


def inspect_images(data: ImageDataModule, most: int = 5000, threads: int = 4, progress: Progress = True) -> Inspection:
    """Inspects the pictures of a set, at most `most` of each split.

    Near-duplicates are pictures of validation or test with a thumbnail of 16 x 16 pixels that has a correlation of 0.99
    or more with that of a training picture: the same picture in another size, format or compression. Plain pictures,
    such as white pages, are not compared.

    Args:
        data: The datamodule, after `setup`.
        most: The most pictures of each split, chosen at random by the seed of the set's splits.
        threads: Number of pictures to read at once.
        progress: As for `vmoe.evaluate`.
    """
    splits = {name: _Split(images) for name, images in data.image_sets().items() if len(images)}
    for name, split in splits.items():
        order = np.random.default_rng(data.config.split_seed).permutation(len(split.images))[:most]
        with ThreadPoolExecutor(threads) as pool:
            seen = pool.map(lambda index, of=split: _taken_in(data, of.images, index), np.sort(order).tolist())
            for index, found in zip(np.sort(order).tolist(), shown(seen, f"looking at {name}", progress), strict=False):
                _gather(split, index, found, is_training=name == "train")
    train = splits.get("train")
    pairs = [
        pair for name, split in splits.items() if train is not None and name != "train"
        for pair in _near_duplicates(data, name, split, train)
    ]  # fmt: skip
    mean, std = _colours(train) if train is not None and train.sums.pixels else ([], [])
    return Inspection(
        looked_at={name: len(split.sizes) + len(split.damaged) for name, split in splits.items()},
        images={name: len(split.images) for name, split in splits.items()},
        sizes={name: _sizes(split.sizes) for name, split in splits.items() if split.sizes},
        mean=mean,
        std=std,
        damaged={name: split.damaged for name, split in splits.items()},
        near_duplicates=pairs,
    )


def _taken_in(data: ImageDataModule, images: ImageSet, index: int) -> tuple[np.ndarray, tuple[int, int]] | str:
    """A picture prepared for the model, and its own size; or a line if it cannot be read."""
    try:
        image = images.read(index)
    except UserError as error:
        return str(error)
    return eval_crop(image, data.image_size, data.config.crop), (image.shape[0], image.shape[1])


def _gather(split: _Split, index: int, found: tuple[np.ndarray, tuple[int, int]] | str, is_training: bool) -> None:
    if isinstance(found, str):
        split.damaged.append(found)
        return
    image, size = found
    split.places.append(index)
    split.sizes.append(size)
    split.thumbs.append(eval_crop(displayed(image), _THUMB, "squash"))
    if is_training:
        split.sums.add(image)


def _colours(train: _Split) -> tuple[list[float], list[float]]:
    mean, std = train.sums.mean_and_std()
    return [_rounded(each) for each in mean], [_rounded(each) for each in std]


def _rounded(value: float) -> float:
    """With four digits behind the point, or four that count where it is small, as of pictures of 16 bits it may be."""
    return round(value, 4) if abs(value) >= 0.1 else float(f"{value:.4g}")


def _written(value: float) -> str:
    return f"{value:.3f}" if abs(value) >= 0.1 else f"{value:.3g}"


def _sizes(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    table = np.array(sizes)
    return [each.astype(int).tolist() for each in (table.min(0), np.median(table, 0), table.max(0))]


def _near_duplicates(data: ImageDataModule, name: str, split: _Split, train: _Split) -> list[NearDuplicate]:
    ours, theirs = _as_directions(split.thumbs), _as_directions(train.thumbs)
    if not len(ours) or not len(theirs):
        return []
    found = []
    for start in range(0, len(ours), _THUMBS_AT_ONCE):
        best, nearest = torch.full((len(ours[start : start + _THUMBS_AT_ONCE]),), -1.0), None
        for first in range(0, len(theirs), _THUMBS_AT_ONCE):
            likeness, place = (ours[start : start + _THUMBS_AT_ONCE] @ theirs[first : first + _THUMBS_AT_ONCE].T).max(1)
            is_better = likeness > best
            nearest = place + first if nearest is None else torch.where(is_better, place + first, nearest)
            best = torch.maximum(best, likeness)
        assert nearest is not None
        for row in torch.nonzero(best >= _ALIKE).flatten().tolist():
            index, other = split.places[start + row], train.places[int(nearest[row])]
            pictures = tuple(
                displayed(eval_crop(part.images.read(place), data.image_size, data.config.crop))
                for part, place in ((split, index), (train, other))
            )
            where = split.images.place(index), train.images.place(other)
            found.append(NearDuplicate(name, *where, float(best[row]), pictures))
    return found


def _as_directions(thumbs: Sequence[np.ndarray]) -> torch.Tensor:
    """Thumbnails as vectors of mean 0 and length 1, (n, D); zeros for plain pictures."""
    table = torch.from_numpy(np.stack(thumbs).reshape(len(thumbs), -1).astype(np.float32)) if thumbs else torch.empty(0)
    if not len(table):
        return table
    table = table - table.mean(1, keepdim=True)
    deviation = table.std(1, keepdim=True)
    return torch.where(deviation < _PLAIN, 0.0, table / table.norm(dim=1, keepdim=True).clamp_min(1e-6))


def _height_by_width(sides: Sequence[int]) -> str:
    return f"{sides[0]} x {sides[1]}"
