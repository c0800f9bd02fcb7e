"""The result of importers of others' checkpoints."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from vmoe.moe import MoeConfig


@dataclass(frozen=True)
class ImportedModel:
    """A model with the arguments to rebuild it: `create_model(name, moe, img_size=..., num_classes=..., **kwargs)`.

    Args:
        model: In evaluation mode, float32, on the CPU.
        name: timm's name of the model.
        kwargs: Plain arguments of the named model.
        moe: The MoE layers; None for a dense model.
        image_size: (rows, columns) in pixels.
        num_classes: 0 without a classifier.
        mean: Mean of each channel for normalisation, for pixels in [0, 1].
        std: Standard deviation of each channel, as for `mean`.
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
    """The `mlp_ratio` for which timm's int(width * ratio) equals `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
