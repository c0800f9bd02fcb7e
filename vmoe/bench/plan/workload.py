"""What is trained, as far as the planner needs it."""

from typing import Any, NamedTuple

import torch

from vmoe.checkpoints import build_model
from vmoe.moe import MoeConfig


class Workload(NamedTuple):
    """A model and its training.

    Attributes:
        name: Name of the timm model.
        kwargs: timm's arguments.
        moe: Its MoE layers; None for none.
        classes: Number of classes.
        image_size: Side in pixels.
        batch: Images per batch, of all processes.
        accumulate: Batches per update.
        dtype: Type of autocast; float32 for none.
        mixes: Whether targets are shares of all classes.
        moments: Numbers that the optimiser keeps per parameter.
        has_average: Whether an average of the weights is kept.
        graphed: Whether the step is captured as a CUDA graph, which the host launches as one.
    """

    name: str
    kwargs: dict[str, Any]
    moe: MoeConfig | None
    classes: int
    image_size: int
    batch: int
    accumulate: int = 1
    dtype: torch.dtype = torch.bfloat16
    mixes: bool = False
    moments: int = 2
    has_average: bool = False
    graphed: bool = False

    def build(self) -> torch.nn.Module:
        """The model, with weights of its own.

        Raises:
            UserError: timm has no such model, or it cannot be built so.
        """
        return build_model(self.name, self.kwargs | {"pretrained": False}, self.moe, self.classes, self.image_size)

    def meta_model(self) -> torch.nn.Module:
        """The model on the meta device; raises as `build` does."""
        with torch.device("meta"):
            return self.build()
