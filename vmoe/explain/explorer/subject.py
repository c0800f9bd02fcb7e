"""A model to explore and what is needed to show it images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.checkpoints import TrainedModel, require_single_label
from vmoe.data.config import Colour
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
    """

    name: str
    model: nn.Module
    class_names: Sequence[str]
    mean: Colour
    std: Colour
    image_size: ImageSize | None = None

    @classmethod
    def of(cls, checkpoint: TrainedModel, name: str) -> "Subject":
        """A checkpoint's model."""
        require_single_label(checkpoint, "vmoe explore")
        part = checkpoint
        return cls(name, part.model.eval(), part.class_names, part.mean, part.std, part.image_size)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def is_dense(self) -> bool:
        return not moe_layers(self.model)

    def pixels(self, images: Tensor) -> Tensor:
        """Undoes the normalisation: (B, 3, H, W) as the model sees them -> the same in [0, 1]."""
        return (images * self._channels(self.std) + self._channels(self.mean)).clamp(0, 1)

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
