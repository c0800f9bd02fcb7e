"""A trained model with its classes and the preparation of its images: the result of `vmoe.load`."""

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    """A trained model: timm's own model, with its classes and the preparation of its images.

    It is the model that timm builds, in evaluation mode. `model(images)` returns logits (B, classes) for prepared
    images (B, 3, height, width), or with `channels` in place of 3. Its layers, its `state_dict()` and timm's methods
    have their usual names.

    Attributes:
        config: The run's whole config as plain types: seed, output_dir, data, model, moe, optim, trainer. If the model
            came from a folder or hub entry, `model` has timm's own name and all arguments.
        class_names: Name of each class, in the order of the logits.
        image_size: Side of its square training images in pixels, or (height, width).
        crop: How images of another shape are fitted to that size: "centre", "squash" or "letterbox".
        channels: Number of channels of its images, read at the depth of their files. None for RGB of 8 bits.
        mean: Mean of each channel for normalisation, for pixels in [0, 1].
        std: Standard deviation of each channel, as for `mean`.
        epoch: Number of finished epochs.
        step: Number of updates.
        path: The file it was read from.
        bit_depth: Number of bits in its training files with more than 8 bits per channel (see `vmoe.prepare_image`);
            None without such files.
        multi_label: Whether an image may have several classes, or none. Then each logit has its own sigmoid.
        thresholds: With `multi_label` the least probability of each class that an image has; None means 0.5 for all.
        calibration: The result of `vmoe.calibrate`, for `Predictions.sets`; None without it.
    """

    config: dict[str, Any]
    class_names: list[str]
    image_size: ImageSize
    crop: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epoch: int
    step: int
    path: Path
    bit_depth: int | None
    multi_label: bool
    thresholds: list[float] | None
    calibration: dict[str, Any] | None = None
    channels: int | None = None

    @property
    def model(self) -> "TrainedModel":
        """The model itself, for older code: `load` once returned a record with this field."""
        return self

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
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
        """Predicts the classes of pictures of any size. Each is prepared by `vmoe.prepare_image`.

        Args:
            pictures: Paths of image files, folders (all pictures in them), images of Pillow, and arrays (height, width,
                3) or (height, width) uint8, in any mixture; or one of these alone. If the model has `channels`, arrays
                are (height, width, channels) or (channels, height, width), with the values that files hold.
            batch_size: Images per batch.
            bit_depth: Bit depth of files with more than 8 bits per channel. None takes the model's, else measures it on
                these files.
            skip_damaged: Whether to leave out unreadable files instead of raising; `left_out` lists them.
            tta: Whether to average the logits of a picture and its mirror image (test-time augmentation).
            features: Whether to return the classifier's input too, for example to search for similar images.
            progress: Whether to show a progress bar on stderr if that is a terminal; or a function of the batches and a
                description, such as `rich.progress.track`.

        Raises:
            UserError: A path does not exist, a folder holds no picture, a picture cannot be read or has another type, a
                logit is not finite, or the model has no features.
        """
        from vmoe.checkpoints.prediction import predict

        return predict(self, pictures, batch_size, bit_depth, skip_damaged, tta, features, progress)

    def train(self, mode: bool = True) -> "TrainedModel":
        """Sets training or evaluation mode as any module does. Training mode drops the calibration."""
        if mode:
            self.calibration = None
        return super().train(mode)

    @property
    def facts(self) -> ModelFacts:
        """The facts of this model for a file."""
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
            channels=self.channels,
        )

    def with_facts_for(self, other: nn.Module, class_names: list[str] | None = None) -> "TrainedModel":
        """Gives another model, in place, this model's facts except its calibration.

        Args:
            other: A model for the same images.
            class_names: The names of its classes; None takes this model's.
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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode within the block. After it each module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True  # `train` would set it in all modules, and drop a calibration


def require_single_label(model: TrainedModel, what: str) -> None:
    """Refuses a model for several classes per image, for a job that needs one class per image.

    Args:
        model: The model.
        what: The job, or its option.

    Raises:
        UserError: It is such a model.
    """
    if model.multi_label:
        raise UserError(f"{model.path}: knows several classes per image, and {what} is for models of one; take another")


def as_trained(model: nn.Module, facts: ModelFacts, *, epoch: int, step: int, path: Path) -> TrainedModel:
    """Turns a model, in place, into a `TrainedModel`.

    Args:
        model: Any model from images (B, 3, height, width) to logits (B, classes).
        facts: The model's facts.
        epoch: Number of finished epochs.
        step: Number of updates.
        path: The model's file.
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
    """A subclass of both classes, with the same name. Unlike a wrapper it changes no name of a layer or weight."""
    return type(kind.__name__, (TrainedModel, kind), {"__module__": kind.__module__, "__doc__": TrainedModel.__doc__})


def _blank(kind: type[nn.Module]) -> TrainedModel:
    """An empty instance that copying and unpickling fill."""
    own = _class_for(kind)
    return own.__new__(own)
