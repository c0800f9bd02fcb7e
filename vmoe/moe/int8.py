"""Expert weights as 8-bit integers: one scale for each output channel of each expert, symmetric about zero.

E experts; O outputs and D inputs of a layer.
"""

import torch
from torch import Tensor

LARGEST = 127


def quantise(weight_EOD: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds weights to int8.

    Args:
        weight_EOD: (..., O, D), floating point.

    Returns:
        Integers in [-127, 127] (..., O, D) int8, and their scales (..., O) float32.
    """
    weight_EOD = weight_EOD.float()
    scale_EO = weight_EOD.abs().amax(-1) / LARGEST
    scale_EO = scale_EO.masked_fill(scale_EO == 0, 1.0)  # a channel of zeros: no division by 0
    return (weight_EOD / scale_EO[..., None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale_EO


def dequantise(integers_EOD: Tensor, scale_EO: Tensor) -> Tensor:
    """The weights in the scales' type: integers times scales."""
    return integers_EOD.to(scale_EO.dtype) * scale_EO[..., None]
