"""The sections of a data config, each checked when it is made."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from vmoe.data.pipelines import read_pipeline

Preset = Literal["none", "light", "strong", "autoaugment", "augmix", "three_augment"]
OF_WORKERS = ("autoaugment", "augmix", "three_augment")  # presets only of the pipeline "workers"


def nearest(word: str, names: Iterable[str]) -> str:
    """The names nearest to `word`, as "did you mean 'a' or 'b'?", or ""."""
    names = list(names)
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(repr(by_lower[name]) for name in close)}?" if close else ""


@dataclass(frozen=True)
class AugmentConfig:
    """The augmentation of training images. Evaluation images are never augmented.

    None takes the preset's own value. A warning reports values that the preset does not use.

    Args:
        preset: "none" resizes only; "light" crops and flips; "strong" adds RandAugment, colour jitter and
            random erasing. To crops and flips, "autoaugment" adds AutoAugment's policies (arXiv 1805.09501; those of
            CIFAR-10 for images up to 64 pixels, else those of ImageNet), "augmix" AugMix (arXiv 1912.02781), and
            "three_augment" one of grayscale, solarize and blur, and colour jitter (DeiT III, arXiv 2204.07118).
        albumentations: a pipeline of albumentations instead of a preset: a YAML or JSON file of `A.save`, or the
            content of `A.to_dict`; in Python also an `A.Compose`. It gets pictures in their own size, and its result is
            fitted to the image size. A run stores its content.
        crop_padding: crop by padding each side with this many pixels and cutting out a random window of the image size.
            The default up to 64 pixels, where None means an eighth of the image size. Not with crop_scale.
        crop_scale: crop a random rectangle with a share of the area between these two, and resize it to the image size.
            The default over 64 pixels, where None means [0.08, 1.0]. Not with crop_padding.
        flip: probability of a horizontal flip. None: 0.5, and 0 for digits.
        randaugment_ops: RandAugment operations per image, 0 for none. None: 2 in "strong".
        randaugment_magnitude: strength of RandAugment, 0 to 30 as in torchvision (timm counts to 10: its m9 is about 27
            here). With [lowest, highest] every operation of every image draws its own integer, both ends included;
            [0, 30] with one operation is TrivialAugment (arXiv 2103.10158) over RandAugment's ranges. None: 9 in
            "strong".
        color_jitter: largest relative change of brightness, contrast and saturation, 0 to 1. None: 0.2 in "strong",
            0.3 in "three_augment".
        erasing: probability of erasing a random rectangle. None: 0.25 in "strong".
    """

    preset: Preset = "light"
    albumentations: str | dict[str, Any] | None = None
    crop_padding: int | None = None
    crop_scale: tuple[float, float] | None = None
    flip: float | None = None
    randaugment_ops: int | None = None
    randaugment_magnitude: int | tuple[int, int] | None = None
    color_jitter: float | None = None
    erasing: float | None = None

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, get_args(Preset))
        if self.albumentations is not None:
            self._take_albumentations()
        if self.crop_padding is not None:
            check_range("crop_padding", self.crop_padding, 0, 1024)
        if self.crop_scale is not None:
            _check_crop_scale(self.crop_scale)
            if self.crop_padding is not None:
                raise ValueError(
                    f"crop_padding={self.crop_padding}: cannot be combined with crop_scale={self.crop_scale}; keep one"
                )
        if self.randaugment_magnitude is not None:
            _check_magnitude(self.randaugment_magnitude)
        for name, largest in (("flip", 1), ("randaugment_ops", 16), ("color_jitter", 1), ("erasing", 1)):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, largest)

    def _take_albumentations(self) -> None:
        """Replaces a pipeline or its file by its content."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "albumentations"}
        changed = [f"{name}={value}" for name, value in given.items() if value != getattr(AugmentConfig, name)]
        if changed:
            raise ValueError(f"albumentations: takes the place of a preset; leave out {', '.join(changed)}")
        object.__setattr__(self, "albumentations", read_pipeline(self.albumentations))


@dataclass(frozen=True)
class MixConfig:
    """Mixing of training images and their targets in pairs: mixup (arXiv 1710.09412), CutMix (arXiv 1905.04899).

    An image is mixed with the one before it in its group of 8 consecutive images of the batch, by its own share. With
    both alphas at 0 nothing is mixed.

    Args:
        mixup_alpha: mixup blends two images by a share drawn from Beta(alpha, alpha); 0 turns it off.
        cutmix_alpha: CutMix pastes a rectangle with a share of the area drawn from Beta(alpha, alpha); 0 turns it off.
        prob: probability that an image is mixed.
        switch_prob: probability of CutMix instead of mixup, if both are on.
        until: share of the epochs after which mixing ends; 1 mixes to the end.
    """

    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    prob: float = 1.0
    switch_prob: float = 0.5
    until: float = 1.0

    def __post_init__(self) -> None:
        check_range("mixup_alpha", self.mixup_alpha, 0, 100)
        check_range("cutmix_alpha", self.cutmix_alpha, 0, 100)
        for name in ("prob", "switch_prob", "until"):
            check_range(name, getattr(self, name), 0, 1)

    @property
    def is_on(self) -> bool:
        """Whether any image is mixed."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    @property
    def has_both(self) -> bool:
        """Whether both mixup and CutMix are on."""
        return self.mixup_alpha > 0 and self.cutmix_alpha > 0


@dataclass(frozen=True)
class SubsetConfig:
    """A deterministic, stratified part of a data set.

    A smaller fraction (or number per class) of one set is contained in every larger one.

    Args:
        fraction: share of the training images of each class, over 0 and up to 1; at least one image per class is kept.
        per_class: number of training images of each class. Not with fraction.
        imbalance: makes a balanced training set long-tailed: class c of C keeps imbalance^(-c / (C - 1)) of its images,
            at least one, so that the first class has this many times the images of the last. Not with the two above.
        classes: names (or indices) of the classes to keep in every split; labels are renumbered in this order.
    """

    fraction: float | None = None
    per_class: int | None = None
    imbalance: float | None = None
    classes: list[str | int] | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction={self.fraction}: must be over 0 and at most 1")
        if self.per_class is not None:
            check_range("per_class", self.per_class, 1, None)
            if self.fraction is not None:
                raise ValueError(
                    f"per_class={self.per_class}: cannot be combined with fraction={self.fraction}; keep one"
                )
        if self.imbalance is not None:
            check_range("imbalance", self.imbalance, 1, 1_000_000)
            for name in ("fraction", "per_class"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"imbalance={self.imbalance}: cannot be combined with {name}={getattr(self, name)}; keep one"
                    )
        if self.classes is not None:
            if not self.classes:
                raise ValueError("classes=[]: must name at least one class, or be null for all of them")
            object.__setattr__(self, "classes", [str(name) for name in self.classes])


@dataclass(frozen=True)
class TableConfig:
    """The columns of the sets "table", by their names in the header, and "huggingface".

    Args:
        path: the picture's file; relative paths are below the table's folder. None: the column called path, file,
            filename, image or similar. With "huggingface" the column of pictures; None: the only one.
        label: the class. None: the column called label, class, target, category or similar.
        split: train, val or test. None: the column called split, set, subset or partition; without one, the pictures
            are split like a folder without splits.
        separator: separator of several labels per picture, such as "|"; an empty cell has no label. None: a cell is one
            label, but lists of "huggingface" and in a .json of "webdataset" are several. With "webdataset" and a
            separator labels may be in KEY.txt too.
        columns: columns with 0 or 1 for each class, instead of a column of labels: their names, or "others" for all
            except path and split.
    """

    path: str | None = None
    label: str | None = None
    split: str | None = None
    separator: str | None = None
    columns: Literal["others"] | list[str] | None = None

    def __post_init__(self) -> None:
        if self.separator is not None and not self.separator.strip():
            raise ValueError(f"separator={self.separator!r}: must be a mark such as '|' or ';'")
        if isinstance(self.columns, str) and self.columns != "others":
            raise ValueError(f"columns={self.columns!r}: must be a list of columns, or others for all")
        if isinstance(self.columns, list) and len(set(self.columns)) != len(self.columns):
            raise ValueError(f"columns={self.columns}: names a column twice; name each once")
        if self.columns is not None:
            for name in ("label", "separator"):
                if getattr(self, name) is not None:
                    value = getattr(self, name)
                    raise ValueError(f"{name}={value}: cannot be combined with columns={self.columns}; keep one")


@dataclass(frozen=True)
class FractalConfig:
    """The generated set "fractals": its classes, its size, and the variation of pictures within a class.

    Every picture draws each variation uniformly between plus and minus the given value; 0 leaves it out.

    Args:
        classes: number of classes; the class of a number is the same in every run.
        epoch_images: training images per epoch (times data.repeat), for any number of different ones in data.images.
            Validation has an eighth as many, the test set a quarter.
        shape: largest relative change of each entry of a map's matrix, 0 to 0.5.
        shift: largest change of each map's translation, as a share of half the picture's side, 0 to 0.5.
        rotation: largest rotation of a picture, in degrees to either side, 0 to 180.
        colour: largest change of each channel of a map's colour, as a share of the whole range, 0 to 1.
    """

    classes: int = 4096
    epoch_images: int = 65_536
    shape: float = 0.2
    shift: float = 0.15
    rotation: float = 23.0
    colour: float = 0.4

    def __post_init__(self) -> None:
        check_range("classes", self.classes, 2, 65_536)
        check_range("epoch_images", self.epoch_images, 8, 10_000_000)
        for name, largest in (("shape", 0.5), ("shift", 0.5), ("rotation", 180), ("colour", 1)):
            check_range(name, getattr(self, name), 0, largest)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Checks that a value is one of those allowed.

    Raises:
        ValueError: It is not. The message has the nearest allowed value.
    """
    if value not in allowed:
        hint = nearest(str(value), allowed)
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(allowed)}{'; ' + hint if hint else ''}")


def check_range(name: str, value: Any, low: float, high: float | None) -> None:
    """Checks that a number is in a range. Without `high` there is no upper end.

    Raises:
        ValueError: It is outside, or NaN.
    """
    # written so that NaN is refused too
    if not (value >= low and (high is None or value <= high)):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={value}: must be {allowed}")


def _check_crop_scale(scale: tuple[float, float]) -> None:
    if not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
        raise ValueError(f"crop_scale={scale}: must be two shares of the area, 0 < smallest <= largest <= 1")


def _check_magnitude(magnitude: Any) -> None:
    ends = magnitude if isinstance(magnitude, list | tuple) else (magnitude, magnitude)
    if not (len(ends) == 2 and all(isinstance(end, int) for end in ends) and 0 <= ends[0] <= ends[1] <= 30):
        raise ValueError(
            f"randaugment_magnitude={magnitude}: must be a whole number from 0 to 30, or two such, [lowest, highest]"
        )
