"""A model to explore and what is needed to show it images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.checkpoints import TrainedModel
from vmoe.data.config import Colour
from vmoe.errors import UserError
from vmoe.moe import moe_layers
from vmoe.sizes import ImageSize, height_and_width


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode.

    Attributes:
        name: What the report calls it.
        model: The model.
        class_names: Names of its classes.
        mean: Mean of the channels in [0, 1], by which images are normalised for it.
        std: Standard deviation of the channels, by which images are normalised for it.
        image_size: Side of its images in pixels, or (height, width); None where it takes what it is given.
        multi_label: Whether an image may have several classes, or none; None: as the labels are.
        thresholds: Of several classes the probability of each from which an image has it; None: 0.5 for all.
    """

    name: str
    model: nn.Module
    class_names: Sequence[str]
    mean: Colour
    std: Colour
    image_size: ImageSize | None = None
    multi_label: bool | None = None
    thresholds: Sequence[float] | None = None

    @classmethod
    def of(cls, checkpoint: TrainedModel, name: str) -> "Subject":
        """A checkpoint's model."""
        part = checkpoint
        known = (part.class_names, part.mean, part.std, part.image_size, part.multi_label, part.thresholds)
        return cls(name, part.model.eval(), *known)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def is_dense(self) -> bool:
        return not moe_layers(self.model)

    def pixels(self, images: Tensor) -> Tensor:
        """Undoes the normalisation: (B, 3, H, W) as the model sees them -> the same in [0, 1]."""
        return (images * self._channels(self.std) + self._channels(self.mean)).clamp(0, 1)

    def require_labels(self, labels: Tensor) -> None:
        """Makes sure that labels are of the model's kind: (B,) of one class each, or (B, C) of 0 and 1 of several.

        Raises:
            UserError: They are of the other.
        """
        if self.multi_label is not None and self.multi_label != (labels.dim() == 2):
            several, one = "several classes per image", "one class per image"
            model, images = (several, one) if self.multi_label else (one, several)
            raise UserError(f"{self.name}: knows {model}, and these images have {images}; take other images")

    def found(self, logits: Tensor) -> Tensor:
        """Which of several classes an image has by the model: (B, C) logits -> (B, C) bool."""
        thresholds = self.thresholds or [0.5] * logits.shape[-1]
        return logits.float().sigmoid() >= torch.tensor(thresholds, device=logits.device)

    def is_right(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Whether the model is right about each image, of several classes about every one: (B,) bool."""
        if labels.dim() == 2:
            return (self.found(logits) == (labels > 0)).all(-1)
        return logits.argmax(-1) == labels

    def as_seen_by(self, other: "Subject", images: Tensor) -> Tensor:
        """Images that are normalised for this model, normalised and resized for another one."""
        size = tuple(images.shape[-2:]) if other.image_size is None else height_and_width(other.image_size)
        if (self.mean, self.std, tuple(images.shape[-2:])) == (other.mean, other.std, size):
            return images
        pixels = self.pixels(images)
        if size != images.shape[-2:]:
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        return (pixels - self._channels(other.mean)) / self._channels(other.std)

    def _channels(self, values: Colour) -> Tensor:
        return torch.tensor(values, device=self.device).view(3, 1, 1)
