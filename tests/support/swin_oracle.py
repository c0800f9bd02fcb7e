"""A plain forward pass of a dense Swin-MoE from the tensors of its file: a token attends to all tokens of its window.

It makes no tensors of windows: a token's window and its position follow from its coordinates.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(weights: dict[str, Tensor], images: Tensor, window_size: int, trained_windows: list[int]) -> Tensor:
    """(B, 3, side, side) -> (B, classes).

    Args:
        weights: Weights by the original's names.
        images: Prepared images.
        window_size: Side of the windows in all stages with that many tokens.
        trained_windows: Side of each stage's windows in training, which scales offsets.
    """
    stem = weights["patch_embed.proj.weight"]
    x = F.conv2d(images, stem, weights["patch_embed.proj.bias"], stride=stem.shape[-1]).permute(0, 2, 3, 1)
    x = _norm(weights, "patch_embed.norm", x)
    stages = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    for stage in range(stages):
        window = min(window_size, x.shape[1])
        depth = 1 + max(int(name.split(".")[3]) for name in weights if name.startswith(f"layers.{stage}.blocks."))
        for block in range(depth):
            shift = window // 2 if block % 2 and x.shape[1] > window else 0
            name = f"layers.{stage}.blocks.{block}"
            normed = _norm(weights, f"{name}.norm1", x)
            x = x + _attention(weights, f"{name}.attn", normed, window, shift, trained_windows[stage])
            hidden = F.gelu(_linear(weights, f"{name}.mlp.fc1", _norm(weights, f"{name}.norm2", x)))
            x = x + _linear(weights, f"{name}.mlp.fc2", hidden)
        if stage + 1 < stages:
            corners = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
            x = _norm(weights, f"layers.{stage}.downsample.norm", torch.cat(corners, -1))
            x = _linear(weights, f"layers.{stage}.downsample.reduction", x)
    return _linear(weights, "head", _norm(weights, "norm", x).mean((1, 2)))


def _attention(weights: dict[str, Tensor], name: str, x: Tensor, window: int, shift: int, trained: int) -> Tensor:
    images, side, _, width = x.shape
    bias_HNN = _bias(weights, name, side, window, shift, trained)
    q, k, v = _linear(weights, f"{name}.qkv", x.flatten(1, 2)).unflatten(-1, (3, len(bias_HNN), -1)).unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1]) + bias_HNN
    y = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).reshape(images, side, side, width)
    return _linear(weights, f"{name}.proj", y)


def _bias(weights: dict[str, Tensor], name: str, side: int, window: int, shift: int, trained: int) -> Tensor:
    """(heads, N, N): the bias of two tokens' offset within a window, -100 across the image's border, else -inf."""
    place = (torch.arange(side) - shift) % side  # position of each row after the shift
    region = (place >= side - window).int() + (place >= side - shift).int() if shift else torch.zeros(side)
    rows, columns = (each.flatten() for each in torch.meshgrid(place, place, indexing="ij"))
    regions = torch.cartesian_prod(region, region)
    extent = window - 1
    offsets = torch.cartesian_prod(torch.arange(-extent, window), torch.arange(-extent, window)) / (trained - 1) * 8
    scaled = offsets.sign() * (offsets.abs() + 1).log2() / math.log2(8)
    table = _linear(weights, f"{name}.cpb_mlp.2", _linear(weights, f"{name}.cpb_mlp.0", scaled).relu())
    down, right = (each[:, None] - each + extent for each in (rows, columns))  # not negative for tokens of one window
    is_shared = (rows[:, None] // window == rows // window) & (columns[:, None] // window == columns // window)
    bias = table[(down * (2 * window - 1) + right).where(is_shared, 0)]
    bias = bias - 100.0 * (regions[:, None] != regions).any(-1)[..., None]
    return bias.where(is_shared[..., None], -math.inf).permute(2, 0, 1)


def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-5)
