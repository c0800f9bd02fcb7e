"""Predicts the classes of images in any form with a trained model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vmoe.checkpoints.calibration import class_sets, least_probability
from vmoe.checkpoints.trained import TrainedModel, evaluating
from vmoe.data.bit_depth import depth_lines, depth_of_files
from vmoe.data.image_files import IgnoredFiles, find_images
from vmoe.data.images import prepare_image
from vmoe.errors import UserError
from vmoe.models.members import refuse_ensemble
from vmoe.progress import Progress, shown

UNKNOWN = "unknown"  # the label of an image without a class that is probable enough
Picture = str | PathLike[str] | Image.Image | np.ndarray


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for N pictures, in their order: `labels, probabilities = model.predict(pictures)`.

    Attributes:
        labels: (N) The name of each picture's most probable class. With several classes per picture, a list of the
            classes that reach their threshold, the most probable first; it may be empty.
        probabilities: (N, classes) float32, the softmax of the logits; with several classes the sigmoid of each.
        logits: (N, classes) float32.
        features: (N, D) float32, the classifier's input, with `features`; else None.
        pictures: (N) The source of each: the path of a file, or the index of an image or array in the argument.
        class_names: In the order of the columns of `probabilities`.
        left_out: With `skip_damaged`, a line for each picture that could not be read.
        notes: Further lines to print, such as on ignored files of folders.
        bit_depth: The bit depth of files with more than 8 bits per channel; None without such files.
        multi_label: Whether a picture may have several classes, or none.
        calibration: The model's calibration, for `sets`; None with `tta`, which has no calibration.
    """

    labels: list[str] | list[list[str]]
    probabilities: np.ndarray
    logits: np.ndarray
    features: np.ndarray | None
    pictures: list[Path | int]
    class_names: list[str]
    left_out: list[str]
    notes: list[str]
    bit_depth: int | None
    multi_label: bool = False
    calibration: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.labels, self.probabilities))

    def __len__(self) -> int:
        return len(self.labels)

    def top(self, count: int = 5) -> list[list[dict[str, Any]]]:
        """The `count` most probable classes of each picture, best first, as {"class": ..., "probability": ...}."""
        return [most_probable(row, self.class_names, count) for row in self.probabilities]

    def labels_from(self, threshold: float) -> list[str] | list[list[str]]:
        """The `labels`, with "unknown" for each picture without a class of at least this probability.

        With several classes per picture: all classes of at least this probability, instead of their own thresholds.

        Raises:
            UserError: The threshold is not from 0 to 1.
        """
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold={threshold}: must be a probability, from 0 to 1")
        if self.multi_label:
            return names_above(self.probabilities, self.class_names, threshold)
        sure = self.probabilities.max(-1, initial=0) >= threshold
        return [label if known else UNKNOWN for label, known in zip(self.labels, sure.tolist(), strict=True)]

    def sets(self, coverage: float) -> list[list[str]]:
        """A set of classes for each picture, the most probable first.

        A set holds the right class with probability `coverage`, on average over calibrations and pictures of the same
        kind (split conformal prediction).

        Raises:
            UserError: The model is for several classes per picture, is not calibrated, or not for such a high
                coverage.
        """
        if self.multi_label:
            raise UserError(f"coverage={coverage:g}: is for one class per picture; thresholds choose among several")
        if self.calibration is None:
            raise UserError(f"coverage={coverage:g}: needs a model that vmoe.calibrate has calibrated, without tta")
        chosen = class_sets(self.probabilities, least_probability(self.calibration, coverage))
        order = (-self.probabilities).argsort(-1, kind="stable")
        return [[self.class_names[index] for index in row if chosen[place, index]] for place, row in enumerate(order)]


def names_above(
    probabilities: np.ndarray, names: list[str], thresholds: float | Sequence[float] | None
) -> list[list[str]]:
    """The classes in each row of (N, classes) that reach their threshold (None: 0.5), the most probable first."""
    is_there = probabilities >= np.asarray(0.5 if thresholds is None else thresholds, dtype=np.float32)
    orders = (-probabilities).argsort(1, kind="stable")
    return [
        [names[index] for index in order if found[index]]
        for order, found in zip(orders.tolist(), is_there.tolist(), strict=True)
    ]


def most_probable(probabilities: np.ndarray, names: list[str], count: int) -> list[dict[str, Any]]:
    """The `count` most probable classes of (classes,), best first, in plain types. Ties keep their order."""
    order = (-probabilities).argsort(kind="stable")[:count]
    return [{"class": names[index], "probability": float(probabilities[index])} for index in order]


def predict(
    model: TrainedModel,
    pictures: Picture | Iterable[Picture],
    batch_size: int,
    bit_depth: int | None,
    skip_damaged: bool,
    tta: bool,
    features: bool,
    progress: Progress,
) -> Predictions:
    """See `TrainedModel.predict`."""
    if features:
        refuse_ensemble(model, f"{model.path}: each member has features of its own")
    if features and not hasattr(model, "forward_head"):
        raise UserError(f"{model.path}: this model has no features before its classifier (timm's forward_head)")
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(f"batch_size={batch_size!r}: must be a whole number from 1")
    notes: list[str] = []
    items = _numbered_pictures(pictures, model.channels is not None, notes)
    if bit_depth is None:
        files = [item for _, item in items if isinstance(item, Path)]
        bit_depth = model.bit_depth or _measured_depth(files, model.channels, notes)
    kept: list[Path | int] = []
    left_out: list[str] = []
    logits = [np.empty((0, len(model.class_names)), np.float32)]
    vectors: list[np.ndarray] = []
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    for batch in shown(batches, "predicting", progress):
        prepared = []
        for place, item in batch:
            try:
                of_model = model.image_size, model.mean, model.std, bit_depth, model.crop, model.channels
                prepared.append(prepare_image(item, *of_model))
            except UserError as error:
                line = str(error) if isinstance(item, Path) else f"pictures[{place}]: {error}"
                if not skip_damaged:
                    raise UserError(line) from error
                left_out.append(line)
                continue
            kept.append(item if isinstance(item, Path) else place)
        if prepared:
            images = torch.stack(prepared)
            # the mean over a picture and its mirror image
            views = [_outputs(model, view, features) for view in ([images, images.flip(-1)] if tta else [images])]
            logits.append(np.mean([view[0] for view in views], axis=0))
            vectors += [np.mean([view[1] for view in views], axis=0)] if features else []
    table = np.concatenate(logits)
    found = probabilities_of(model, torch.from_numpy(table)).numpy()
    if model.multi_label:
        labels = names_above(found, model.class_names, model.thresholds)
    else:
        labels = [model.class_names[index] for index in table.argmax(-1).tolist()]
    of_classifier = np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32) if features else None
    return Predictions(
        labels=labels,
        probabilities=found,
        logits=table,
        features=of_classifier,
        pictures=kept,
        class_names=model.class_names,
        left_out=left_out,
        notes=notes,
        bit_depth=bit_depth,
        multi_label=model.multi_label,
        calibration=None if tta else model.calibration,
    )


def probabilities_of(model: TrainedModel, logits: Tensor) -> Tensor:
    """(..., classes) probabilities from float32 logits: the softmax, or with several classes the sigmoid."""
    return logits.sigmoid() if model.multi_label else logits.softmax(-1)


@torch.inference_mode()
def _outputs(model: TrainedModel, images: Tensor, features: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits (B, classes) and features (B, D), or None, of prepared images (B, 3, H, W), in evaluation mode.

    Raises:
        UserError: A logit is not finite.
    """
    dtype = next((each.dtype for each in model.parameters()), torch.float32)
    with evaluating(model):
        images = images.to(model.device, dtype)
        if features:
            maps = model.forward_features(images)
            logits = model.forward_head(maps).float().cpu()
            vectors = model.forward_head(maps, pre_logits=True).flatten(1).float().cpu().numpy()
        else:
            logits, vectors = model(images).float().cpu(), None
    if not logits.isfinite().all():
        raise UserError(f"{model.path}: gives logits that are not finite; its training probably diverged")
    return logits.numpy(), vectors


def _numbered_pictures(
    pictures: Picture | Iterable[Picture], arrays: bool, notes: list[str]
) -> list[tuple[int, Picture]]:
    """Each picture with its index in the argument. All pictures of a folder have the folder's index.

    With `arrays`, .npy files in folders are pictures too.
    """
    if isinstance(pictures, str | PathLike | Image.Image) or (isinstance(pictures, np.ndarray) and pictures.ndim < 4):
        pictures = [pictures]
    ignored = IgnoredFiles()
    items: list[tuple[int, Picture]] = []
    for place, picture in enumerate(pictures):
        if isinstance(picture, str | PathLike):
            items += [(place, path) for path in find_images([fspath(picture)], ignored, arrays)]
        else:
            items.append((place, picture))
    if ignored:
        notes.append(f"ignored: {ignored}")
    return items


def _measured_depth(files: Sequence[Path], channels: int | None, notes: list[str]) -> int | None:
    measured = depth_of_files(files, channels) if files else None
    if measured is None:
        return None
    notes += depth_lines("images", None, measured, None)
    return measured.bits
