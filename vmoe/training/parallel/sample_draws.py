"""Router noise, dropout and drop path per image: functions of (seed, epoch, index), as augmentation is.

So they do not depend on the number of ranks that share a batch. torch's generators are faster but cannot do this.
"""

import math
from collections.abc import Callable

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from vmoe.data.draws import draw_numbers, uniforms
from vmoe.errors import UserError
from vmoe.moe import moe_layers

Draw = Callable[..., Tensor]  # a shape with images first -> uniform numbers in [0, 1)
_RATES = ("p", "prob", "drop_prob")  # the names that torch's and timm's modules use
_APART = 2**32  # draws per image and layer; the first ones belong to augmentation


class SampleDraws:
    """Replaces the random generator in a model's training.

    Args:
        seed: The seed, not negative.

    Attributes:
        keys: (B, 2) int64, the keys of the images in the next forward pass.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.keys: Tensor | None = None
        self._streams = 0

    def install(self, model: nn.Module) -> None:
        """Makes a model's routers, dropouts and drop paths draw from this object.

        Raises:
            UserError: The model has a module that draws in another way and cannot draw per image.
        """
        for name, layer in moe_layers(model):
            if layer.config.ensemble > 1:
                raise UserError(
                    f"parallel.draws=sample: moe.ensemble={layer.config.ensemble} draws for each member; use process"
                )
            if layer.config.router == "random" or layer.experts.drop1.p > 0:
                raise UserError(f"parallel.draws=sample: {name} draws in its experts or moe.router=random; use process")
            layer.router.draw_noise = self._normal_stream()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Dropout) and module.p > 0 and name.endswith("attn_drop"):
                raise UserError("parallel.draws=sample: attention's dropout draws within its kernel; use process")
            parent, _, last = name.rpartition(".")
            if type(module) is nn.Dropout and module.p > 0:
                setattr(model.get_submodule(parent), last, SampleDropout(module.p, self._uniform_stream()))
            elif isinstance(module, DropPath) and module.drop_prob > 0:
                path = SampleDropPath(module.drop_prob, module.scale_by_keep, self._uniform_stream())
                setattr(model.get_submodule(parent), last, path)
            elif "Drop" in type(module).__name__ and any(getattr(module, rate, 0) > 0 for rate in _RATES):
                raise UserError(
                    f"parallel.draws=sample: {name} ({type(module).__name__}) draws in a way of its own; use process"
                )

    def _uniform_stream(self) -> Draw:
        self._streams += 1
        first = self._streams * _APART

        def draw(*shape: int) -> Tensor:
            count = math.prod(shape) // len(self.keys)
            numbers = draw_numbers(count, first, self.keys.device)
            return uniforms(self.seed, self.keys, numbers).t().reshape(shape)

        return draw

    def _normal_stream(self) -> Callable[[Tensor], Tensor]:
        """Draws normal numbers in the shape and type of a tensor with images first."""
        draw_uniform = self._uniform_stream()

        def draw(like: Tensor) -> Tensor:
            centred = 2 * draw_uniform(*like.shape) - (1 - 2.0**-24)  # never -1 or 1
            return (math.sqrt(2) * torch.erfinv(centred)).to(like.dtype)

        return draw


class SampleDropout(nn.Module):
    """Dropout of (B * anything, ...), with each image's values together."""

    def __init__(self, p: float, draw: Draw) -> None:
        super().__init__()
        self.p, self.draw = p, draw

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (self.draw(*x.shape) >= self.p).to(x.dtype) / (1 - self.p)


class SampleDropPath(nn.Module):
    """timm's DropPath of (B, ...)."""

    def __init__(self, drop_prob: float, scale_by_keep: bool, draw: Draw) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep, self.draw = drop_prob, scale_by_keep, draw

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = (self.draw(len(x), *[1] * (x.dim() - 1)) >= self.drop_prob).to(x.dtype)
        return x * (kept / (1 - self.drop_prob) if self.scale_by_keep else kept)
