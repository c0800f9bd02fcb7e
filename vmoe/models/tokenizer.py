"""A convolutional tokenizer that replaces the patch embedding. It helps small transformers on small images."""

import itertools
from typing import Any

from timm.layers import PatchEmbed
from torch import nn


class ConvTokenizer(PatchEmbed):
    """Makes tokens by overlapping 3x3 convolutions with ReLU and max pooling (CCT, arXiv 2104.05704, section 3.2).

    Each convolution halves the side, so there are log2(patch_size) of them and the grid is that of a plain patch
    embedding: (B, 3, height, width) -> (B, height / patch_size * width / patch_size, D).

    Args:
        patch_size: Side of a token's patch in pixels; a power of two, 2 or more.
        in_chans: Channels of an image.
        embed_dim: D. All convolutions except the last have 64 channels.
        **kwargs: Other arguments of PatchEmbed.

    Raises:
        ValueError: patch_size is not a power of two.
    """

    def __init__(self, patch_size: int = 4, in_chans: int = 3, embed_dim: int = 256, **kwargs: Any) -> None:
        steps = patch_size.bit_length() - 1
        if steps < 1 or patch_size != 2**steps:
            raise ValueError(f"patch_size={patch_size}: must be 2, 4, 8, ...: each convolution halves the side")
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **kwargs)
        placement: dict[str, Any] = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        widths = [in_chans, *[64] * (steps - 1), embed_dim]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            convolution = nn.Conv2d(before, after, 3, padding=1, bias=False, **placement)
            if not convolution.weight.is_meta:
                nn.init.kaiming_normal_(convolution.weight)
            layers += [convolution, nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
        self.register_module("proj", nn.Sequential(*layers))
