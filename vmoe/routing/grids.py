"""The positions of a layer's tokens in the image, for every family of timm.

B images; N tokens per image, of which P are patches, in a grid of rows and columns.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmoe.moe.mlps import class_key


class ModelInput(NamedTuple):
    """The input of a model.

    Attributes:
        size: (rows, columns) of pixels, or None if unknown.
        coords: (B, P, 2) row and column of each patch, if given (NaFlex).
        valid: (B, P) bool, which of these patches are real.
    """

    size: tuple[int, int] | None = None
    coords: Tensor | None = None
    valid: Tensor | None = None

    @classmethod
    def of(cls, inputs: tuple, named: dict) -> "ModelInput":
        """Reads the arguments of a model's forward."""
        x = inputs[0] if inputs else named.get("x")
        given = {**named, **x} if isinstance(x, dict) else named
        if given.get("patch_coord") is not None:
            coords, valid = given["patch_coord"], given.get("patch_valid")
            return cls(None, coords, (coords >= 0).all(-1) if valid is None else valid.bool())
        return cls(tuple(x.shape[-2:]) if isinstance(x, Tensor) and x.dim() == 4 else None)


class TokenGrid(NamedTuple):
    """The positions of a layer's tokens.

    Attributes:
        size: (rows, columns).
        num_prefix_tokens: Number of tokens before the patches.
        order: The position of each patch token, counted row by row: (P,), or (B, P) with -1 for padding; None if the
            tokens are in that order.
    """

    size: tuple[int, int]
    num_prefix_tokens: int = 0
    order: Tensor | None = None


def locate(model: nn.Module, name: str, shape: torch.Size, use_conv: bool, picture: ModelInput) -> TokenGrid:
    """Finds the grid of an MoE layer.

    Args:
        model: A timm model, or a module that holds one.
        name: The layer's name in it.
        shape: The shape of the layer's input.
        use_conv: Whether the input is channels first.
        picture: The model's input.

    Raises:
        ValueError: No grid has the layer's number of tokens.
    """
    owners = _owners(model, name)
    for owner_name, owner in owners:
        special = _SPECIAL.get(class_key(owner))
        if special is not None:
            return special(owner, name[len(owner_name) :].lstrip("."), shape, picture)
    if len(shape) == 4:
        return TokenGrid(tuple(shape[2:] if use_conv else shape[1:3]))
    declared = [owner.num_prefix_tokens for _, owner in owners if hasattr(owner, "num_prefix_tokens")]
    if picture.coords is not None:
        return _given(shape[1], picture, declared)
    return _counted(name, shape[1], picture, declared, [_patch_grid(owner, picture) for _, owner in owners])


def prefix_names(model: nn.Module, name: str, count: int) -> tuple[str, ...]:
    """The names of the `count` tokens before the patches of an MoE layer, in timm's order."""
    owner = next((owner for _, owner in _owners(model, name) if hasattr(owner, "cls_token")), None)
    tokens = (("cls_token", "class token"), ("dist_token", "distillation token"))
    names = [text for attribute, text in tokens if getattr(owner, attribute, None) is not None]
    if owner is None:  # the model does not declare its prefix tokens
        names = ["class token"]
    return (*names, *(f"register {number}" for number in range(1, count + 1)))[:count]


def _owners(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The modules that hold the layer, innermost first, with their names."""
    parts = name.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts) - 1, -1, -1)]
    return [(owner, model.get_submodule(owner)) for owner in names]


def _counted(name: str, tokens: int, picture: ModelInput, declared: list[int], grids: list) -> TokenGrid:
    """The grid with the layer's number of patches and the image's aspect ratio.

    Some families declare prefix tokens that join only in later blocks (cait, xcit, convit), some declare none (pit).
    """
    prefixes = [*declared, 0, 1, 2]
    for prefix in prefixes:
        for grid in grids:
            if grid is not None and grid[0] * grid[1] == tokens - prefix:
                return TokenGrid(grid, prefix)
    rows, columns = picture.size or (1, 1)
    for prefix in prefixes:
        grid = _factors(tokens - prefix, rows / columns)
        if grid is not None:
            return TokenGrid(grid, prefix)
    raise ValueError(f"{name}: {tokens} tokens make no grid of the shape of images of {picture.size} pixels")


def _patch_grid(owner: nn.Module, picture: ModelInput) -> tuple[int, int] | None:
    """The grid of a vision transformer's patch embedding, if it has one."""
    embed = getattr(owner, "patch_embed", None)
    if getattr(owner, "dynamic_img_size", False) and picture.size is not None:
        return tuple(embed.dynamic_feat_size(picture.size))
    grid = getattr(embed, "grid_size", None)
    return tuple(grid) if isinstance(grid, tuple | list) else None


def _factors(patches: int, aspect: float) -> tuple[int, int] | None:
    """Rows and columns with this product and, up to rounding, the ratio `aspect`."""
    pairs = [(rows, patches // rows) for rows in range(1, patches + 1) if patches % rows == 0]
    fitting = [(rows, columns) for rows, columns in pairs if abs(rows - aspect * columns) < max(1, aspect)]
    return min(fitting, key=lambda grid: abs(grid[0] - aspect * grid[1]), default=None)


def _given(tokens: int, picture: ModelInput, declared: list[int]) -> TokenGrid:
    """The smallest grid for the patches of all images, which may differ in rows and columns."""
    coords = picture.coords.long()
    if tokens - coords.shape[1] not in (*declared, 0):
        raise ValueError(f"{coords.shape[1]} patch coordinates for {tokens} tokens; record without patch dropout")
    rows, columns = (int(largest) + 1 for largest in coords[picture.valid].amax(0))
    order = coords[..., 0] * columns + coords[..., 1]
    return TokenGrid((rows, columns), tokens - coords.shape[1], order.masked_fill(~picture.valid, -1))


def _hiera(model: nn.Module, name: str, shape: torch.Size, picture: ModelInput) -> TokenGrid:
    """The grid of Hiera. It keeps the tokens of a mask unit together; its `reroll` restores their order."""
    return _unscrambled(model.reroll(torch.arange(shape[1]).view(1, -1, 1), int(name.split(".")[1])))


def _nest(level: nn.Module, name: str, shape: torch.Size, picture: ModelInput) -> TokenGrid:
    """The grid of NesT. Its tokens come block by block."""
    blocks, side = math.isqrt(shape[1]), level.block_size
    tokens = torch.arange(shape[1] * shape[2]).view(blocks, blocks, side, side).transpose(1, 2)
    return _unscrambled(tokens.reshape(1, blocks * side, blocks * side, 1))


def _mobilevit(block: nn.Module, name: str, shape: torch.Size, picture: ModelInput) -> TokenGrid:
    """The grid of MobileViT v2. Its fold turns (B, D, pixels of a patch, patches) into a map."""
    rows, columns = picture.size or (1, 1)
    grid = _factors(shape[3], rows / columns)
    if grid is None:
        raise ValueError(f"{name}: {shape[3]} patches make no grid of the shape of images of {picture.size} pixels")
    tokens = torch.arange(shape[2] * shape[3]).view(*block.patch_size, *grid).permute(2, 0, 3, 1)
    return _unscrambled(tokens.flatten(2).flatten(0, 1)[None, ..., None])


def _unscrambled(token_of_place: Tensor) -> TokenGrid:
    """The order of tokens, from a map of token indices (1, rows, columns, 1)."""
    return TokenGrid(tuple(token_of_place.shape[1:3]), 0, token_of_place.flatten().argsort())


_SPECIAL = {"hiera.Hiera": _hiera, "nest.NestLevel": _nest, "mobilevit.MobileVitV2Block": _mobilevit}
