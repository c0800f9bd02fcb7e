"""Routing maps of one image as pixels: choices, the gate of an expert, drops, and the router's entropy.

R x C patches of an image, E experts, K choices per token. Pictures are (H, W, 3) in [0, 1]; H and W are multiples of
the numbers of rows and columns.
"""

import math

import numpy as np
import torch
from PIL import Image

from vmoe.explain.heatmap.routed import patch_part
from vmoe.figures.style import SHADES
from vmoe.palette import expert_colours
from vmoe.routing.recording import LayerRouting

_OUTLINED_FROM = 8  # patches of at least this side in pixels get outlines
_DROPPED = np.array([0.1, 0.1, 0.12])


def overlaid(background: np.ndarray, colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Overlays a picture with one colour per patch.

    Args:
        background: (H, W, 3).
        colours: (rows, columns, 3), or (3,) for one colour everywhere.
        opacity: (rows, columns) in [0, 1].

    Returns:
        (H, W, 3): opacity * colour + (1 - opacity) * background.
    """
    rows, columns = opacity.shape
    size = background.shape[0] // rows, background.shape[1] // columns
    alpha = _enlarge(opacity, size)[..., None]
    over = _enlarge(np.broadcast_to(colours, (rows, columns, 3)), size)
    return alpha * over + (1 - alpha) * background


def pale(picture: np.ndarray) -> np.ndarray:
    """A pale grey version of a picture, as a background for colours."""
    grey = picture @ np.array([0.2126, 0.7152, 0.0722])
    return np.repeat((0.6 + 0.37 * grey)[..., None], 3, axis=-1)


def largest_gate(routing: LayerRouting) -> float:
    """The largest gate of all experts and patches, at which maps are fully opaque."""
    return max(float(patch_part(routing).gates.max()), 1e-12)


def choices_of_rank(routing: LayerRouting, rank: int) -> np.ndarray:
    """Each patch's expert of a rank (0: first choice), (rows, columns); -1 if no expert took it."""
    return patch_part(routing).chosen[0, :, rank].reshape(routing.grid).numpy()


def choice_map(background: np.ndarray, routing: LayerRouting, rank: int) -> np.ndarray:
    """The patches in the colours of their experts of a rank, with outlines around regions of one expert.

    Opacity is the gate over the largest gate.
    """
    chosen = choices_of_rank(routing, rank)
    patches = patch_part(routing)
    gates = patches.gates[0].gather(1, patches.chosen[0, :, rank : rank + 1].clamp_min(0)).reshape(routing.grid).numpy()
    colours = expert_colours(patches.gates.shape[-1])[chosen]
    opacity = np.where(chosen >= 0, gates / largest_gate(routing), 0)
    return _outline(overlaid(background, colours, opacity), chosen, colours, chosen >= 0)


def gate_map(background: np.ndarray, routing: LayerRouting, expert: int) -> np.ndarray:
    """One expert's gate on every patch, with outlines around patches that chose it. Opacity is as in `choice_map`."""
    patches = patch_part(routing)
    gates = patches.gates[0, :, expert].reshape(routing.grid).numpy()
    colour = expert_colours(expert + 1)[expert]
    taken = (patches.chosen[0] == expert).any(-1).reshape(routing.grid).numpy()
    pixels = overlaid(background, colour, gates / largest_gate(routing))
    return _outline(pixels, taken, np.broadcast_to(colour, (*taken.shape, 3)), taken)


def dropped_map(background: np.ndarray, routing: LayerRouting) -> np.ndarray:
    """The patches, darkened by the dropped share of their choices."""
    share = patch_part(routing).dropped[0].float().mean(-1).reshape(routing.grid).numpy()
    return overlaid(background, _DROPPED, 0.9 * share)


def entropies(routing: LayerRouting) -> np.ndarray:
    """The entropy of each patch's gates over its maximum ln E, (rows, columns); 0 if no expert took it."""
    gates = patch_part(routing).gates[0].double()
    shares = gates / gates.sum(-1, keepdim=True).clamp_min(1e-300)
    entropy = torch.special.entr(shares).sum(-1) / math.log(max(gates.shape[-1], 2))
    return entropy.reshape(routing.grid).numpy()


def entropy_map(background: np.ndarray, routing: LayerRouting) -> np.ndarray:
    """The patches in shades by the entropy of their gates."""
    entropy = entropies(routing)
    return overlaid(background, SHADES(entropy)[..., :3], np.full_like(entropy, 0.7))


def panel_size(grid: tuple[int, int], side: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of a panel of about `side` pixels in which every patch is the same whole number of pixels.

    Args:
        grid: (rows, columns) of patches.
        side: The longer side.
        shape: (height, width, ...) of the shown picture.
    """
    sides = (side * each / max(shape[:2]) for each in shape[:2])
    return tuple(count * max(1, round(each / count)) for count, each in zip(grid, sides, strict=True))


def scaled(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scales a picture (H, W, 3) uint8 to (height, width) as floats. The pixels of small pictures stay visible."""
    method = Image.Resampling.NEAREST if min(picture.shape[:2]) <= 64 else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(picture).resize(size[::-1], method)) / 255.0


def _enlarge(patches: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.repeat(np.repeat(patches, size[0], axis=0), size[1], axis=1)


def _outline(pixels: np.ndarray, regions: np.ndarray, colours: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Draws lines inside each patch of `where`, on the sides towards other regions.

    Patches that are too small get none.
    """
    height, width = pixels.shape[0] // regions.shape[0], pixels.shape[1] // regions.shape[1]
    if min(height, width) < _OUTLINED_FROM:
        return pixels
    pixels = pixels.copy()
    thick = int(np.clip(min(height, width) // 10, 1, 4))
    for row, column in np.argwhere(where):
        patch = pixels[row * height : (row + 1) * height, column * width : (column + 1) * width]
        for side, down, right in (
            (np.s_[:thick], -1, 0),
            (np.s_[-thick:], 1, 0),
            (np.s_[:, :thick], 0, -1),
            (np.s_[:, -thick:], 0, 1),
        ):
            y, x = row + down, column + right
            inside = 0 <= y < regions.shape[0] and 0 <= x < regions.shape[1]
            if inside and regions[y, x] != regions[row, column]:
                patch[side] = colours[row, column]
    return pixels
