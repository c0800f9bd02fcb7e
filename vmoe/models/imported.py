"""What the importers of others' checkpoints give."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from vmoe.moe import MoeConfig


@dataclass(frozen=True)
class ImportedModel:
    """A model and what builds its like: `create_model(name, moe, img_size=..., num_classes=..., **kwargs)`.

    Args:
        model: In evaluation mode, float32, on the CPU.
        name: What timm calls the model.
        kwargs: Plain arguments of the named model.
        moe: The MoE layers; None for a dense model.
        image_size: (rows, columns) in pixels.
        num_classes: 0 without a classifier.
        mean: Mean of each channel that images are normalised with, for pixels in [0, 1].
        std: Standard deviation of each channel, for the same.
    """

    model: nn.Module
    name: str
    kwargs: dict[str, Any]
    moe: MoeConfig | None
    image_size: tuple[int, int]
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def ratio_for(hidden: int, width: int) -> float:
    """The `mlp_ratio` of which timm's int(width * ratio) is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
