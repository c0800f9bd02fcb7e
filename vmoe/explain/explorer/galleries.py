"""Figures with pictures: the patches of each expert, and maps of some images through the layers.

n sampled images of S x S pixels; N positions of a layer's grid.
"""

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np

from vmoe.figures.style import BODY, HEADING, LINE, MARGIN, MUTED, SMALL, Page, text_width
from vmoe.palette import expert_colours, expert_hex

_CROP, _GAP, _SHOWN = 72, 6, 8  # pixels of a crop and between crops, and number of crops per kind
_MAP, _IMAGES, _LAYERS = 140, 8, 12
_TOP = 162  # upper edge of the maps, below two lines of a layer's name


def draw_galleries(report: dict[str, Any], images: dict[str, Any]) -> Iterator[tuple[str, Page]]:
    """A page of galleries for each layer, and one of maps, by file name without suffix."""
    for index, layer in enumerate(report["layers"]):
        yield f"experts-{index}", _expert_page(layer, images)
    yield "maps", _maps_page(report, images)


def _expert_page(layer: dict[str, Any], images: dict[str, Any]) -> Page:
    """Each expert's patches with the largest gates and random ones of its patches, each with its surroundings."""
    row, half = _CROP + 40, _SHOWN * (_CROP + _GAP)
    left = MARGIN + 110
    page = Page(left + 2 * half + 40 + MARGIN, 150 + row * layer["num_experts"] + MARGIN)
    is_whole = layer["route"] == "image"
    shown = "the sampled images" if is_whole else "each framed patch in its surroundings, of the sampled images"
    page.heading(f"What experts take: {layer['name']}", shown)
    for x, text in ((left, "largest gates, one per image"), (left + half + 30, "at random")):
        page.text(x, 130, text, BODY, weight="bold")
    for index, expert in enumerate(layer["experts"]):
        y = 150 + row * index
        page.rectangle(MARGIN, y, 10, _CROP, face=expert_hex(index))
        page.text(MARGIN + 22, y + 30, str(index), HEADING, weight="bold")
        page.text(MARGIN + 22, y + 54, f"load {layer['load'][index]:.2f}", SMALL, color=MUTED)
        if expert["dead"]:
            page.text(left, y + 40, f"dead: it takes no {layer['route']}", BODY, color=MUTED)
        for x, patches in ((left, expert["top"]), (left + half + 30, expert["random"])):
            if patches:
                page.picture(x, y, _strip(patches[:_SHOWN], images["pixels"], layer["grid"]))
            for place, patch in enumerate(patches[:_SHOWN]):
                page.text(x + place * (_CROP + _GAP), y + _CROP + 18, f"{patch['gate']:.2f}", SMALL, color=MUTED)
    return page


def _strip(patches: list[dict[str, Any]], pixels: np.ndarray, grid: list[int]) -> np.ndarray:
    """The crops side by side as one picture, since an axis per crop would take minutes with many experts."""
    gap = np.ones((_CROP, _GAP, 3))
    crops = [part for patch in patches for part in (_crop(pixels[patch["image"]], patch["patch"], grid), gap)]
    return np.concatenate(crops[:-1], 1)


def _crop(pixels: np.ndarray, patch: int, grid: list[int]) -> np.ndarray:
    """The framed patch with one patch on each side, or the whole image: (crop, crop, 3) in [0, 1]."""
    rows, columns = grid
    if rows == columns == 1:
        return cv2.resize(pixels, (_CROP, _CROP), interpolation=cv2.INTER_AREA) / 255
    height, width = pixels.shape[0] / rows, pixels.shape[1] / columns
    row, column = divmod(patch, columns)
    centre = (column + 0.5) * width, (row + 0.5) * height
    scale = _CROP / (3 * max(height, width))
    matrix = np.array([[scale, 0, _CROP / 2 - scale * centre[0]], [0, scale, _CROP / 2 - scale * centre[1]]])
    crop = cv2.warpAffine(
        pixels, matrix, (_CROP, _CROP), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=(238,) * 3
    )
    reach = round(scale * width / 2) + 2, round(scale * height / 2) + 2
    corners = (_CROP // 2 - reach[0], _CROP // 2 - reach[1]), (_CROP // 2 + reach[0], _CROP // 2 + reach[1])
    cv2.rectangle(crop, *corners, (255, 255, 255), 3)
    cv2.rectangle(crop, *corners, (0, 0, 0), 1)
    return crop / 255


def _maps_page(report: dict[str, Any], images: dict[str, Any]) -> Page:
    """Some images with the first choice of each patch in the first layers. Opacity is the gate."""
    layers = list(zip(report["layers"], images["layers"], strict=True))[:_LAYERS]
    count = min(_IMAGES, len(images["label"]))
    step = _MAP + 16
    width = max(step * (1 + len(layers)), 680)
    page = Page(width + 2 * MARGIN, _TOP + (step + 24) * count + MARGIN)
    page.heading(
        f"Which expert takes which {layers[0][0]['route']}",
        "first choices in the experts' colours, the surer the stronger",
    )
    for column, (layer, _) in enumerate(layers):
        for line, text in enumerate(reversed(_name_lines(layer["name"]))):
            left = MARGIN + step * (1 + column)
            page.text(left, _TOP - 18 - LINE * line, page.fit(text, BODY, _MAP, weight="bold"), weight="bold")
    for row in range(count):
        y = _TOP + (step + 24) * row
        pixels = images["pixels"][row]
        page.picture(MARGIN, y, cv2.resize(pixels, (_MAP, _MAP), interpolation=cv2.INTER_AREA) / 255)
        page.text(MARGIN, y + _MAP + 20, page.fit(_caption(report, images, row), SMALL, width), SMALL, color=MUTED)
        for column, (layer, maps) in enumerate(layers):
            page.picture(MARGIN + step * (1 + column), y, _overlay(pixels, layer, maps, row))
    return page


def _name_lines(name: str) -> list[str]:
    """A layer's name in one line, or in two if it is wider than a map."""
    parts = name.split(".")
    half = len(parts) // 2
    if half == 0 or text_width(name, BODY, weight="bold") <= _MAP:
        return [name]
    return [".".join(parts[:half]) + ".", ".".join(parts[half:])]


def _caption(report: dict[str, Any], images: dict[str, Any], row: int) -> str:
    """An image's classes and predicted classes; without a label its name."""
    label, predicted = images["label"][row], images["predicted"][row]
    if label.ndim == 0 and label < 0:
        return str(images["name"][row]) if "name" in images else f"image {images['number'][row]}"
    name, taken = _class_text(report, label), _class_text(report, predicted)
    return name if name == taken else f"{name}, taken for {taken}"


def _class_text(report: dict[str, Any], label: np.ndarray) -> str:
    if label.ndim == 0:
        return report["classes"][label]
    return ", ".join(report["classes"][index] for index in np.flatnonzero(label)) or "no class"


def _overlay(pixels: np.ndarray, layer: dict[str, Any], maps: dict[str, Any], image: int) -> np.ndarray:
    grey = cv2.resize(pixels, (_MAP, _MAP), interpolation=cv2.INTER_AREA).mean(-1, keepdims=True) / 255
    first = maps["chosen"][image, layer["prefix"] :, 0].astype(int)
    gates = maps["gates"][image, layer["prefix"] :].astype(float)
    sure = np.where(first >= 0, np.take_along_axis(gates, first.clip(0)[:, None], 1)[:, 0], 0)
    colour = expert_colours(layer["num_experts"])[first.clip(0)]
    painted = np.concatenate([colour, (0.25 + 0.6 * sure * (first >= 0))[:, None] * (first >= 0)[:, None]], 1)
    painted = cv2.resize(painted.reshape(*layer["grid"], 4), (_MAP, _MAP), interpolation=cv2.INTER_NEAREST)
    return np.clip(painted[..., :3] * painted[..., 3:] + (0.5 + 0.5 * grey) * (1 - painted[..., 3:]), 0, 1)
