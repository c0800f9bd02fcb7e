"""Linear layers of experts with 8-bit integer weights, for exported programs."""

import torch.nn.functional as F
from torch import Tensor, nn

from vmoe.moe.int8 import dequantise, quantise


class Int8Linear(nn.Module):
    """A linear layer of int8 weights with a scale per output, computed in float32: (..., D) -> (..., O).

    Args:
        weight_OD: The weight to round.
        bias_O: The bias, which is not rounded, or None.
    """

    def __init__(self, weight_OD: Tensor, bias_O: Tensor | None) -> None:
        super().__init__()
        weight, scale = quantise(weight_OD)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias_O)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, dequantise(self.weight, self.scale), self.bias)
