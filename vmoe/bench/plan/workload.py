"""The planner's description of a model and its training."""

from typing import Any, NamedTuple

import torch

from vmoe.checkpoints import build_model
from vmoe.moe import MoeConfig
from vmoe.sizes import ImageSize


class Workload(NamedTuple):
    """A model and its training."""

    name: str  # name of the timm model
    kwargs: dict[str, Any]  # timm's arguments
    moe: MoeConfig | None  # its MoE layers; None for none
    classes: int
    image_size: ImageSize  # side in pixels, or (height, width)
    batch: int  # images per batch, of all processes
    accumulate: int = 1  # batches per update
    dtype: torch.dtype = torch.bfloat16  # type of autocast; float32 for none
    mixes: bool = False  # whether targets are shares of all classes
    moments: int = 2  # numbers that the optimiser keeps per parameter
    has_average: bool = False  # whether an average of the weights is kept
    channels: int | None = None  # of images, where the data give them; None: three
    graphed: bool = False  # whether the step is captured as a CUDA graph, which the host launches as one

    def build(self) -> torch.nn.Module:
        """Builds the model with weights.

        Raises:
            UserError: timm has no such model, or cannot build it with these arguments.
        """
        kwargs = self.kwargs | {"pretrained": False}
        return build_model(self.name, kwargs, self.moe, self.classes, self.image_size, self.channels)

    def meta_model(self) -> torch.nn.Module:
        """The model on the meta device; raises as `build` does."""
        with torch.device("meta"):
            return self.build()
