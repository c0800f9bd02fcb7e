"""Pages of routing maps: one for each MoE layer of an image, and one with all layers side by side."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vmoe.explain.heatmap.maps import (
    choice_map,
    choices_of_rank,
    dropped_map,
    entropies,
    entropy_map,
    gate_map,
    largest_gate,
    overlaid,
    pale,
    panel_size,
    scaled,
)
from vmoe.explain.heatmap.routed import RoutedImage, describe_layer, patch_part
from vmoe.figures.style import BODY, HEADING, LINE, MARGIN, MUTED, RULE, SMALL, Page, wrapped
from vmoe.palette import NUM_COLOURS, expert_colours, expert_hex, ink_on
from vmoe.routing.recording import LayerRouting

PANEL = 400  # approximate side of a large panel in pixels: patches are whole pixels
GAP = 24
_EXPERTS_PER_ROW = 8
_INSET_BELOW = 128  # model inputs smaller than this are shown as an inset if the photo is finer
_HEAD_END = MARGIN + 108  # pixels from the upper edge to the first panels' titles
_BOUNDS = "Lines in the full colour bound the patches of one expert, its number in the corner, where there is room."


class _Panel(NamedTuple):
    title: str
    pixels: np.ndarray
    caption: str  # its explanation
    note: str = ""
    rank: int | None = None  # rank of the shown choices


def draw_layer(image: RoutedImage, layer: str, title: str, subtitle: str, footer: Sequence[str] = ()) -> Page:
    """Draws the page of one layer: picture, choices, drops, entropy, and the gate of each expert.

    The lines of `footer` give the page's source.
    """
    routing = image.layers[layer]
    num_experts, prefix = routing.gates.shape[-1], routing.num_prefix_tokens
    panels = _panels(image, routing)
    height, width = panels[0].pixels.shape[:2]
    columns = len(panels) if len(panels) <= 4 else 3
    inner = max(columns * (width + GAP), 3 * (PANEL + GAP)) - GAP
    captions = [wrapped(panel.caption, SMALL, width) for panel in panels]
    step = height + 64 + LINE * max(map(len, captions))
    gates = _HEAD_END + step * -(-len(panels) // columns) + 30 * prefix
    picture = scaled(
        image.detail, panel_size(routing.grid, (inner + GAP) // _EXPERTS_PER_ROW - GAP, image.detail.shape)
    )
    below = gates + 56 + -(-num_experts // _EXPERTS_PER_ROW) * (picture.shape[0] + 46)
    page = Page(inner + 2 * MARGIN, below + _legend_height(num_experts) + _footer_height(footer))
    page.heading(title, subtitle)
    for index, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        x, y = MARGIN + index % columns * (width + GAP), _HEAD_END + index // columns * step
        y += 30 * prefix * (index >= columns)  # the first row has the choices, with tokens below them
        _draw_panel(page, x, y, panel, caption)
        if panel.rank is not None:
            _region_numbers(page, routing, panel.rank, x, y, panel.pixels)
            _prefix_choices(page, routing, panel.rank, x, y + height + 22 + LINE * len(caption))
    _expert_maps(page, routing, picture, gates, inner)
    _legend_row(page, below, num_experts, f"{largest_gate(routing):.2f}", "the largest gate in this layer and image")
    _footer(page, footer)
    return page


def draw_overview(
    image: RoutedImage, layers: Sequence[str], title: str, subtitle: str, footer: Sequence[str] = ()
) -> Page:
    """Draws the page of an image: its picture, then the first choices in each layer by depth."""
    sizes = [panel_size(image.layers[layer].grid, PANEL, image.detail.shape) for layer in layers]
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    rows = math.ceil((len(layers) + 1) / 4)
    columns = math.ceil((len(layers) + 1) / rows)  # rows of equal length
    inner = max(columns * (width + GAP), 3 * (PANEL + GAP)) - GAP
    num_experts = max(image.layers[layer].gates.shape[-1] for layer in layers)
    step = height + 56 + 34 * any(image.layers[layer].num_prefix_tokens for layer in layers)
    chips = _HEAD_END - 12 + rows * step
    below = chips + 20 + 30 * math.ceil(num_experts / 16)
    page = Page(inner + 2 * MARGIN, below + _legend_height(num_experts) + _footer_height(footer))
    page.heading(title, subtitle)
    _draw_panel(page, MARGIN, _HEAD_END, _Panel("Picture", _with_inset(scaled(image.detail, sizes[0]), image), ""))
    for index, (layer, size) in enumerate(zip(layers, sizes, strict=True), start=1):
        x, y = MARGIN + index % columns * (width + GAP), _HEAD_END + index // columns * step
        routing = image.layers[layer]
        pixels = choice_map(pale(scaled(image.detail, size)), routing, 0)
        used = len(np.unique(choices_of_rank(routing, 0)[choices_of_rank(routing, 0) >= 0]))
        note = f"{used} of {routing.gates.shape[-1]} experts"
        _draw_panel(page, x, y, _Panel(page.fit(layer, HEADING, size[1] - 120, weight="bold"), pixels, "", note))
        _region_numbers(page, routing, 0, x, y, pixels)
        _token_chips(page, routing, x, y + size[0] + 10)
    page.text(MARGIN, chips + 17, "Expert", BODY, color=MUTED)
    for expert in range(num_experts):
        _number_chip(page, MARGIN + 80 + expert % 16 * 68, chips + 30 * (expert // 16), expert)
    _legend_row(page, below, num_experts, "largest", "each layer's largest gate on this image")
    _footer(page, footer)
    return page


def _panels(image: RoutedImage, routing: LayerRouting) -> list[_Panel]:
    """The panels in the upper part of a layer's page."""
    picture = scaled(image.detail, panel_size(routing.grid, PANEL, image.detail.shape))
    ground = pale(picture)
    num_experts, top_k = routing.gates.shape[-1], routing.chosen.shape[-1]
    height, width = image.model_input.shape[:2]
    inset = f"; in the corner the {height} x {width} pixels that it gets" if _has_inset(image) else ""
    seen = {"centre": "the central square" if height == width else "the central part", "squash": "all, squashed"}
    caption = f"What the model sees: {seen.get(image.crop, 'all, between stripes of grey')}{inset}."
    panels = [_Panel("Picture", _with_inset(picture, image), caption)]
    slots = routing.dispatch is not None
    titles = ("Largest share", "Second largest share") if slots else ("First choice", "Second choice")
    gate = "share of its result" if slots else "gate"
    dropped = patch_part(routing).dropped
    unhurt = "" if slots or dropped.any() else "no choice was dropped"
    for rank, (title, which) in enumerate(zip(titles[:top_k], ("largest", "second largest"), strict=False)):
        caption = f"Each patch in the colour of the expert with the {which} {gate}: the more opaque, the larger. "
        caption += _BOUNDS if rank == 0 else ""
        panels.append(_Panel(title, choice_map(ground, routing, rank), caption, unhurt if rank == 0 else "", rank))
    if dropped.any():
        caption = "Dark patches lost choices because the expert was full: the darker, the larger the share of them."
        if slots:
            caption = "Dark patches were taken by no expert."
        note = f"{int(dropped.sum())} of {dropped.numel()} {'patches' if slots else 'choices'}"
        panels.append(_Panel("Dropped", dropped_map(ground, routing), caption, note))
    most = math.log(num_experts)
    caption = (
        f"Entropy of a patch's {'shares' if slots else 'gates'}. White: one expert has all; darkest: all {num_experts} "
        f"have the same (ln {num_experts} = {most:.2f} nats)."
    )
    note = f"mean {entropies(routing).mean() * most:.2f} nats"
    panels.append(_Panel("How undecided", entropy_map(ground, routing), caption, note))
    return panels


def _draw_panel(page: Page, x: int, y: int, panel: _Panel, caption: Sequence[str] = ()) -> None:
    height, width = panel.pixels.shape[:2]
    page.text(x, y - 12, panel.title, HEADING, weight="bold")
    page.text(x + width, y - 12, panel.note, SMALL, color=MUTED, ha="right")
    page.picture(x, y, panel.pixels)
    for index, line in enumerate(caption):
        page.text(x, y + height + 20 + LINE * index, line, SMALL, color=MUTED)


def _expert_maps(page: Page, routing: LayerRouting, picture: np.ndarray, y: int, width: int) -> None:
    """Draws a small map of each expert's gate, in rows of `width` pixels below y. Titles are the colours' legend."""
    patches = math.prod(routing.grid)
    page.text(MARGIN, y, "Gate of each expert", HEADING, weight="bold")
    legend = (
        f"On every patch, the more opaque the larger; outlined, where there is room, if it is among the patch's "
        f"choices. Percent: its share of the choices of the {patches} patches."
    )
    page.text(MARGIN, y + 22, page.fit(legend, SMALL, width), SMALL, color=MUTED)
    step = (width - picture.shape[1]) / (_EXPERTS_PER_ROW - 1)
    for expert, share in enumerate(describe_layer(routing)["choice_share"]):
        left = round(MARGIN + expert % _EXPERTS_PER_ROW * step)
        top = y + 32 + expert // _EXPERTS_PER_ROW * (picture.shape[0] + 46)
        _number_chip(page, left, top + 8, expert)
        page.text(left + picture.shape[1], top + 23, f"{share:.0%}", SMALL, ha="right", color=MUTED)
        page.picture(left, top + 32, gate_map(pale(picture), routing, expert))


def _has_inset(image: RoutedImage) -> bool:
    sides = image.model_input.shape[:2]
    return sides != image.detail.shape[:2] and max(sides) <= _INSET_BELOW


def _with_inset(picture: np.ndarray, image: RoutedImage) -> np.ndarray:
    """The picture. If it is finer than the model's small input, the input is in its corner."""
    if not _has_inset(image):
        return picture
    sides = image.model_input.shape[:2]
    factor = max(1, 112 // max(sides))
    inset = scaled(image.model_input, tuple(side * factor for side in sides))
    height, width = inset.shape[:2]
    picture = picture.copy()
    picture[-height - 12 : -6, -width - 12 : -6] = 1  # a white frame
    picture[-height - 9 : -9, -width - 9 : -9] = inset
    return picture


def _region_numbers(page: Page, routing: LayerRouting, rank: int, x: int, y: int, pixels: np.ndarray) -> None:
    """Writes the expert's number into the upper left patch of each region of one expert."""
    rows, columns = routing.grid
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    if min(height, width) < 18:
        return
    chosen = choices_of_rank(routing, rank)
    starts = chosen >= 0
    starts[1:] &= chosen[1:] != chosen[:-1]
    starts[:, 1:] &= chosen[:, 1:] != chosen[:, :-1]
    for row, column in np.argwhere(starts):
        inset = int(np.clip(min(height, width) // 10, 1, 4)) + 2
        top, left = row * height + inset, column * width + inset
        ink = ink_on(pixels[top : top + SMALL, left : left + SMALL].mean((0, 1)))
        size = min(SMALL, 0.42 * height)
        page.text(x + left, y + top, str(chosen[row, column]), size, color=ink, va="top", weight="bold")


def _prefix_choices(page: Page, routing: LayerRouting, rank: int, x: int, y: int) -> None:
    """Writes a line for each class and register token: its expert and gate."""
    for index, name in enumerate(routing.prefix_names):
        expert = int(routing.chosen[0, index, rank])
        if expert < 0:
            text = f"{name}: no {'other ' * (rank > 0)}expert takes it"
        else:
            _number_chip(page, x, y + 30 * index, expert)
            text = f"{name}, gate {routing.gates[0, index, expert]:.2f}"
            text += ", dropped" if routing.dispatch is None and routing.dropped[0, index, rank] else ""
        page.text(x + 44, y + 16 + 30 * index, text, SMALL, color=MUTED)


def _token_chips(page: Page, routing: LayerRouting, x: int, y: int) -> None:
    """Draws the first choices of class and register tokens in one line."""
    for index, name in enumerate(routing.prefix_names):
        expert = int(routing.chosen[0, index, 0])
        if expert >= 0:
            _number_chip(page, x, y, expert)
        is_register = name.startswith("register")
        if not is_register or index == routing.num_prefix_tokens - 1:
            page.text(x + 42, y + 15, "registers" if is_register else name, SMALL, color=MUTED)
        x += 38 if is_register else 130


def _number_chip(page: Page, x: float, y: float, expert: int) -> None:
    """Draws a small box in an expert's colour with its number."""
    page.rectangle(x, y, 34, 21, face=expert_hex(expert))
    ink = ink_on(expert_colours(expert + 1)[expert])
    page.text(x + 17, y + 16, str(expert), SMALL, color=ink, ha="center", weight="bold")


def _legend_height(num_experts: int) -> int:
    return 70 + LINE * (num_experts > NUM_COLOURS)


def _legend_row(page: Page, y: int, num_experts: int, most: str, opaque: str) -> None:
    """Explains colour and opacity, beside a scale in the colours of some experts."""
    steps = np.linspace(0, 1, 200)[None]
    shown = min(3, num_experts)
    strips = [
        overlaid(np.full((7, 200, 3), 0.85), expert_colours(shown)[e], np.repeat(steps, 7, 0)) for e in range(shown)
    ]
    page.picture(MARGIN, y, np.concatenate(strips))
    page.text(MARGIN, y + 38, "gate 0", SMALL, color=MUTED)
    page.text(MARGIN + 200, y + 38, most, SMALL, color=MUTED, ha="right")
    lines = [
        "Colour and number name the expert: the same on all pages, and in the explorer.",
        f"Opacity is the gate: invisible at 0, full at {opaque}.",
    ]
    if num_experts > NUM_COLOURS:
        lines.append(f"Colours repeat after {NUM_COLOURS} experts: the numbers distinguish them.")
    for index, line in enumerate(lines):
        page.text(MARGIN + 230, y + 14 + (LINE + 3) * index, line, BODY, color=MUTED)


def _footer_height(footer: Sequence[str]) -> int:
    return MARGIN + (24 + LINE * len(footer) if footer else 0)


def _footer(page: Page, lines: Sequence[str]) -> None:
    """Writes the page's source below a rule."""
    top = page.height - _footer_height(lines)
    if lines:
        page.rectangle(MARGIN, top + 6, page.width - 2 * MARGIN, 1, face=RULE)
    for index, line in enumerate(lines):
        text = page.fit(line, SMALL, page.width - 2 * MARGIN)
        page.text(MARGIN, top + 28 + LINE * index, text, SMALL, color=MUTED)
