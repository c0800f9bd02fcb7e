"""A model to explore, with the preparation of its images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.checkpoints import TrainedModel
from vmoe.data.channels import displayed_batch
from vmoe.data.config import Colour
from vmoe.errors import UserError
from vmoe.moe import moe_layers
from vmoe.sizes import ImageSize, height_and_width


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode.

    Attributes:
        name: Its name in the report.
        model: The model.
        class_names: Names of its classes.
        mean: Mean of the channels in [0, 1] for normalisation.
        std: Standard deviation of the channels for normalisation.
        image_size: Side of its images in pixels, or (height, width); None for any size.
        multi_label: Whether an image may have several classes, or none; None takes it from the labels.
        thresholds: With several classes the least probability of each class that an image has; None means 0.5 for all.
        channels: Number of channels of its images. None for RGB of 8 bits.
    """

    name: str
    model: nn.Module
    class_names: Sequence[str]
    mean: Colour
    std: Colour
    image_size: ImageSize | None = None
    multi_label: bool | None = None
    thresholds: Sequence[float] | None = None
    channels: int | None = None

    @classmethod
    def of(cls, checkpoint: TrainedModel, name: str) -> "Subject":
        """The subject of a checkpoint."""
        part = checkpoint
        known = (part.class_names, part.mean, part.std, part.image_size, part.multi_label, part.thresholds)
        return cls(name, part.model.eval(), *known, part.channels)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def is_dense(self) -> bool:
        return not moe_layers(self.model)

    def pixels(self, images: Tensor) -> Tensor:
        """Undoes the normalisation of images (B, 3, H, W): returns them in [0, 1].

        If the model has `channels`, it returns their display (see `displayed`).
        """
        values = self._values(images)
        return values.clamp(0, 1) if self.channels is None else displayed_batch(values)

    def _values(self, images: Tensor) -> Tensor:
        return images * self._of_channels(self.std) + self._of_channels(self.mean)

    def require_labels(self, labels: Tensor) -> None:
        """Checks that labels are of the model's kind: (B,) for one class each, or (B, C) of 0 and 1 for several.

        Raises:
            UserError: They are of the other kind.
        """
        if self.multi_label is not None and self.multi_label != (labels.dim() == 2):
            several, one = "several classes per image", "one class per image"
            model, images = (several, one) if self.multi_label else (one, several)
            raise UserError(f"{self.name}: knows {model}, and these images have {images}; take other images")

    def found(self, logits: Tensor) -> Tensor:
        """The predicted classes with several classes per image: (B, C) logits -> (B, C) bool."""
        thresholds = self.thresholds or [0.5] * logits.shape[-1]
        return logits.float().sigmoid() >= torch.tensor(thresholds, device=logits.device)

    def is_right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Whether the model is right about each image (with several classes: about all of them), (B,) bool."""
        if labels.dim() == 2:
            return (self.found(logits) == (labels > 0)).all(-1)
        return logits.argmax(-1) == labels

    def as_seen_by(self, other: "Subject", images: Tensor) -> Tensor:
        """Converts images from this model's normalisation to another model's normalisation and size."""
        size = tuple(images.shape[-2:]) if other.image_size is None else height_and_width(other.image_size)
        if (self.mean, self.std, tuple(images.shape[-2:])) == (other.mean, other.std, size):
            return images
        if self.channels != other.channels:
            raise UserError(
                f"{other.name}: reads pictures by data.channels={other.channels}, and {self.name} by {self.channels}; "
                "compare models of the same images"
            )
        pixels = self.pixels(images) if self.channels is None else self._values(images)
        if size != images.shape[-2:]:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        return (pixels - self._of_channels(other.mean)) / self._of_channels(other.std)

    def _of_channels(self, values: Colour) -> Tensor:
        return torch.tensor(values, device=self.device).view(-1, 1, 1)
