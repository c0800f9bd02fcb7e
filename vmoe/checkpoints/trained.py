"""A trained model that knows its classes and how its images are prepared: what `vmoe.load` returns."""

import functools
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vmoe.checkpoints.entry import ModelFacts
from vmoe.errors import UserError
from vmoe.sizes import ImageSize

if TYPE_CHECKING:
    from vmoe.checkpoints.prediction import Picture, Predictions
    from vmoe.progress import Progress

_KNOWN = (*(each.name for each in fields(ModelFacts) if each.name != "architecture"), "epoch", "step", "path")


class TrainedModel(nn.Module):
    """A trained model: timm's own model, which also knows its classes and how its images are prepared.

    It is the very model that timm builds, in evaluation mode: `model(images)` gives logits (B, classes) for prepared
    images (B, 3, height, width), and its layers, its `state_dict()` and timm's methods have their usual names.

    Attributes:
        config: The run's whole config as plain types: seed, output_dir, data, model, moe, optim, trainer. Of a model
            that a folder or a hub described, `model` has timm's own name and all arguments.
        class_names: Name of each class, in the order of the logits.
        image_size: Side of the square images it was trained on, in pixels, or (height, width).
        crop: How pictures of another shape are fitted to that: "centre", "squash" or "letterbox".
        mean: Mean of each channel that images are normalised with, for pixels in [0, 1].
        std: Standard deviation of each channel, for the same.
        epoch: Number of finished epochs.
        step: Number of updates.
        path: The file it was read from.
        bit_depth: How many bits the values of its training files with more than 8 bits per channel use (see
            `vmoe.prepare_image`); None where it met no such file.
        multi_label: Whether an image may have several classes, or none: each logit is then of a sigmoid of its own.
        thresholds: With `multi_label` the probability of each class from which an image has it; None: 0.5 for all.
        calibration: What `vmoe.calibrate` found, by which `Predictions.sets` gives sets of classes; None without it.
    """

    config: dict[str, Any]
    class_names: list[str]
    image_size: ImageSize
    crop: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    epoch: int
    step: int
    path: Path
    bit_depth: int | None
    multi_label: bool
    thresholds: list[float] | None
    calibration: dict[str, Any] | None = None

    @property
    def model(self) -> "TrainedModel":
        """The model itself, under the name by which the record that was returned before held it."""
        return self

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next((each.device for each in self.parameters()), torch.device("cpu"))

    def predict(
        self,
        pictures: "Picture | Iterable[Picture]",
        *,
        batch_size: int = 32,
        bit_depth: int | None = None,
        skip_damaged: bool = False,
        tta: bool = False,
        features: bool = False,
        progress: "Progress" = True,
    ) -> "Predictions":
        """Names what is in pictures of any size, each prepared by `vmoe.prepare_image`.

        Args:
            pictures: Paths of image files, folders (all pictures in them), images of Pillow, and arrays (height, width,
                3) or (height, width) uint8, in any mixture; or one of these alone.
            batch_size: Images at once.
            bit_depth: Of files with more than 8 bits per channel. None: the model's own, else measured on these files.
            skip_damaged: Leaves out what cannot be read as an image, in place of an error; `left_out` names it.
            tta: Takes the mean of the logits of a picture and of its mirror image (test-time augmentation).
            features: Also gives what the classifier takes, such as for a search by likeness.
            progress: Shows a progress bar on stderr where that is a terminal. A function of the batches and a
                description shows progress its own way, such as `rich.progress.track`.

        Raises:
            UserError: A path does not exist, a folder holds no picture, a picture cannot be read, an argument is of no
                such kind, a logit is not finite, or the model has no features.
        """
        from vmoe.checkpoints.prediction import predict

        return predict(self, pictures, batch_size, bit_depth, skip_damaged, tta, features, progress)

    def train(self, mode: bool = True) -> "TrainedModel":
        """Sets training or evaluation mode as any module does; a model that is to be trained is not calibrated."""
        if mode:
            self.calibration = None
        return super().train(mode)

    @property
    def facts(self) -> ModelFacts:
        """What a file must tell of this model."""
        return ModelFacts(
            self.config,
            self.class_names,
            self.image_size,
            self.mean,
            self.std,
            self.bit_depth,
            crop=self.crop,
            multi_label=self.multi_label,
            thresholds=self.thresholds,
            calibration=self.calibration,
        )

    def with_facts_for(self, other: nn.Module, class_names: list[str] | None = None) -> "TrainedModel":
        """Makes another model, in place, know what this one knows, except its calibration.

        Args:
            other: A model for the same images.
            class_names: The names of its classes; None: this one's.
        """
        names = self.class_names if class_names is None else class_names
        facts = replace(self.facts, class_names=names, calibration=None)
        if self.thresholds is not None:
            of_class = dict(zip(self.class_names, self.thresholds, strict=True))
            facts = replace(facts, thresholds=[of_class.get(name, 0.5) for name in names])
        return as_trained(other, facts, epoch=self.epoch, step=self.step, path=self.path)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = super().__reduce_ex__(2)[2]
        return _blank, (type(self).__mro__[2],), state


def require_single_label(model: TrainedModel, what: str) -> None:
    """Refuses a model for several classes per image, for a job that is of one class each.

    Args:
        model: The model.
        what: The job, or its option.

    Raises:
        UserError: It is such a model.
    """
    if model.multi_label:
        raise UserError(f"{model.path}: knows several classes per image, and {what} is for models of one; take another")


def as_trained(model: nn.Module, facts: ModelFacts, *, epoch: int, step: int, path: Path) -> TrainedModel:
    """Makes a model, in place, a `TrainedModel`.

    Args:
        model: Any model of images (B, 3, height, width) to logits (B, classes).
        facts: Of the model.
        epoch: Number of finished epochs.
        step: Number of updates.
        path: The file that it comes from.
    """
    if not isinstance(model, TrainedModel):
        model.__class__ = _class_for(type(model))
    known = vars(facts) | {"class_names": list(facts.class_names), "epoch": epoch, "step": step, "path": path}
    for name in _KNOWN:
        setattr(model, name, known[name])
    assert isinstance(model, TrainedModel)
    return model


@functools.cache
def _class_for(kind: type[nn.Module]) -> type[TrainedModel]:
    """A class of the same name that is both: so no name of a layer or of a weight changes, as it would in a wrapper."""
    return type(kind.__name__, (TrainedModel, kind), {"__module__": kind.__module__, "__doc__": TrainedModel.__doc__})


def _blank(kind: type[nn.Module]) -> TrainedModel:
    """What a copy or an unpickled model starts from."""
    own = _class_for(kind)
    return own.__new__(own)
