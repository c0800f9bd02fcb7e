"""The drawing of routing maps: a page for each MoE layer of an image, and one of all its layers side by side."""

import cv2
import numpy as np

from vmoe.analysis.heatmap import RoutedImage, describe_layer, patch_part, prefix_names
from vmoe.analysis.palette import NUM_COLOURS, expert_colours, expert_hex, ink_on
from vmoe.analysis.recording import LayerRouting
from vmoe.analysis.style import BODY, HEADING, MARGIN, MUTED, SMALL, Page

PANEL = 400  # side of a large panel in pixels, about: patches are whole pixels
GAP = 24
_EXPERTS_A_ROW = 8
_INSET_BELOW = 128  # model inputs smaller than this are shown as an inset where the photo is finer


def blend(background: np.ndarray, colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Lays one colour a patch over a picture.

    Args:
        background: (H, W, 3) in [0, 1]; H and W are multiples of the numbers of rows and columns.
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
    """A picture as a background for colours: grey and light. (H, W, 3) in [0, 1] -> the same."""
    grey = picture @ np.array([0.2126, 0.7152, 0.0722])
    return np.repeat((0.6 + 0.37 * grey)[..., None], 3, axis=-1)


def choice_map(background: np.ndarray, routing: LayerRouting, rank: int) -> np.ndarray:
    """The patches in the colours of their experts of a rank (0: first choice): opacity = gate, and a line in the full
    colour where a neighbour has another expert. (H, W, 3).
    """
    patches = patch_part(routing)
    chosen = patches.chosen[0, :, rank].reshape(routing.grid).numpy()
    gates = patches.gates[0].gather(1, patches.chosen[0, :, rank : rank + 1]).reshape(routing.grid).numpy()
    colours = expert_colours(patches.gates.shape[-1])[chosen]
    return _outline(blend(background, colours, gates), chosen, colours)


def gate_map(background: np.ndarray, routing: LayerRouting, expert: int) -> np.ndarray:
    """One expert's gate on every patch: opacity = gate, outlined where it is among the choices. (H, W, 3)."""
    patches = patch_part(routing)
    gates = patches.gates[0, :, expert].reshape(routing.grid).numpy()
    colour = expert_colours(expert + 1)[expert]
    taken = (patches.chosen[0] == expert).any(-1).reshape(routing.grid).numpy()
    return _outline(blend(background, colour, gates), taken, np.broadcast_to(colour, (*taken.shape, 3)), taken)


def dropped_map(background: np.ndarray, routing: LayerRouting) -> np.ndarray:
    """The patches darkened by the share of their choices that was dropped. (H, W, 3)."""
    share = patch_part(routing).dropped[0].float().mean(-1).reshape(routing.grid).numpy()
    return blend(background, np.array([0.1, 0.1, 0.12]), 0.9 * share)


def draw_layer(image: RoutedImage, layer: str, title: str, subtitle: str) -> Page:
    """The page of one layer: picture, choices, dropped patches, and the gate of each expert."""
    routing = image.layers[layer]
    num_experts, ranks = routing.gates.shape[-1], min(routing.chosen.shape[-1], 2)
    picture = scaled(image.detail, panel_size(routing.grid, PANEL))
    height, width = picture.shape[:2]
    inner = max((2 + ranks) * width + (1 + ranks) * GAP, 3 * PANEL)
    small = scaled(image.detail, panel_size(routing.grid, inner // _EXPERTS_A_ROW - GAP))
    top = MARGIN + 112
    tokens = top + height + 24
    gates = tokens + 34 * routing.num_prefix_tokens + 52
    rows = -(-num_experts // _EXPERTS_A_ROW)
    page = Page(inner + 2 * MARGIN, gates + 16 + rows * (small.shape[0] + 46) + 118)
    page.heading(title, subtitle)

    left = MARGIN
    _panel(page, left, top, "Picture", _with_inset(picture, image))
    for rank in range(ranks):
        left += width + GAP
        pixels = choice_map(pale(picture), routing, rank)
        _panel(page, left, top, ("First choice", "Second choice")[rank], pixels)
        _numbers(page, routing, rank, left, top, pixels)
        _tokens(page, routing, rank, left, tokens)
    left += width + GAP
    _panel(page, left, top, "Dropped", dropped_map(pale(picture), routing), _dropped_note(routing))

    _expert_maps(page, routing, small, gates, inner)
    _legend(page, page.height - MARGIN - 52, num_experts, dropped=True)
    return page


def draw_overview(image: RoutedImage, layers: list[str], title: str, subtitle: str) -> Page:
    """The page of an image: its picture, then the first choices in each layer, in the order of depth."""
    grid = image.layers[layers[0]].grid
    picture = scaled(image.detail, panel_size(grid, PANEL))
    height, width = picture.shape[:2]
    columns = min(4, len(layers) + 1)
    rows = -(-(len(layers) + 1) // columns)
    inner = max(columns * width + (columns - 1) * GAP, 3 * PANEL)
    num_experts = max(image.layers[layer].gates.shape[-1] for layer in layers)
    chips = -(-num_experts // 16)
    page = Page(inner + 2 * MARGIN, MARGIN + 80 + rows * (height + 56) + 30 * chips + 118)
    page.heading(title, subtitle)
    for index, layer in enumerate([None, *layers]):
        x = MARGIN + index % columns * (width + GAP)
        y = MARGIN + 112 + index // columns * (height + 56)
        if layer is None:
            _panel(page, x, y, "Picture", _with_inset(picture, image))
            continue
        pixels = choice_map(pale(picture), image.layers[layer], 0)
        _panel(page, x, y, layer, pixels, "first choice")
        _numbers(page, image.layers[layer], 0, x, y, pixels)
    below = MARGIN + 80 + rows * (height + 56)
    page.text(MARGIN, below + 17, "Expert", BODY, color=MUTED)
    for expert in range(num_experts):
        _chip(page, MARGIN + 80 + expert % 16 * 68, below + 30 * (expert // 16), expert)
    _legend(page, page.height - MARGIN - 52, num_experts, dropped=False)
    return page


def panel_size(grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width of a panel of about `side` pixels in which every patch is the same whole number of pixels."""
    return tuple(count * max(1, round(side / count)) for count in grid)


def scaled(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture (H, W, 3) uint8 as floats at another size (height, width); small ones keep their pixels visible."""
    if min(picture.shape[:2]) <= 64:
        method = cv2.INTER_NEAREST
    else:
        method = cv2.INTER_AREA if picture.shape[0] > size[0] else cv2.INTER_CUBIC
    return cv2.resize(picture, size[::-1], interpolation=method) / 255.0


def _enlarge(patches: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.repeat(np.repeat(patches, size[0], axis=0), size[1], axis=1)


def _outline(
    pixels: np.ndarray, regions: np.ndarray, colours: np.ndarray, where: np.ndarray | None = None
) -> np.ndarray:
    """Draws, inside each patch (of `where`), a line at every side beyond which another region lies."""
    pixels = pixels.copy()
    height, width = pixels.shape[0] // regions.shape[0], pixels.shape[1] // regions.shape[1]
    thick = int(np.clip(min(height, width) // 10, 1, 4))
    for row, column in np.ndindex(regions.shape) if where is None else np.argwhere(where):
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


def _panel(page: Page, x: int, y: int, title: str, pixels: np.ndarray, note: str = "") -> None:
    page.text(x, y - 12, title, HEADING, weight="bold")
    page.text(x + pixels.shape[1], y - 12, note, SMALL, color=MUTED, ha="right")
    page.picture(x, y, pixels)


def _expert_maps(page: Page, routing: LayerRouting, picture: np.ndarray, y: int, width: int) -> None:
    """A small map of each expert's gate, in rows of `width` pixels below y; their titles are the legend of colours."""
    page.text(MARGIN, y, "Gate of each expert", HEADING, weight="bold")
    page.text(MARGIN + 200, y, "with its share of the patches' choices", BODY, color=MUTED)
    step = (width - picture.shape[1]) / (_EXPERTS_A_ROW - 1)
    for expert, share in enumerate(describe_layer(routing)["choice_share"]):
        left = round(MARGIN + expert % _EXPERTS_A_ROW * step)
        top = y + 16 + expert // _EXPERTS_A_ROW * (picture.shape[0] + 46)
        _chip(page, left, top + 8, expert)
        page.text(left + picture.shape[1], top + 23, f"{share:.0%}", SMALL, ha="right", color=MUTED)
        page.picture(left, top + 32, gate_map(pale(picture), routing, expert))


def _with_inset(picture: np.ndarray, image: RoutedImage) -> np.ndarray:
    """The picture, with the model's own small input in its corner where the picture is finer than that."""
    size = image.model_input.shape[0]
    if size == image.detail.shape[0] or size > _INSET_BELOW:
        return picture
    inset = scaled(image.model_input, (size * max(1, 112 // size),) * 2)
    side = inset.shape[0]
    picture = picture.copy()
    picture[-side - 12 : -6, -side - 12 : -6] = 1  # a white frame
    picture[-side - 9 : -9, -side - 9 : -9] = inset
    return picture


def _numbers(page: Page, routing: LayerRouting, rank: int, x: int, y: int, pixels: np.ndarray) -> None:
    """The expert's number in the upper left patch of each region of one expert."""
    rows, columns = routing.grid
    height, width = pixels.shape[0] // rows, pixels.shape[1] // columns
    if min(height, width) < 18:
        return
    chosen = patch_part(routing).chosen[0, :, rank].reshape(routing.grid).numpy()
    starts = np.ones(chosen.shape, bool)
    starts[1:] &= chosen[1:] != chosen[:-1]
    starts[:, 1:] &= chosen[:, 1:] != chosen[:, :-1]
    for row, column in np.argwhere(starts):
        inset = int(np.clip(min(height, width) // 10, 1, 4)) + 2
        top, left = row * height + inset, column * width + inset
        ink = ink_on(pixels[top : top + SMALL, left : left + SMALL].mean((0, 1)))
        size = min(SMALL, 0.42 * height)
        page.text(x + left, y + top, str(chosen[row, column]), size, color=ink, va="top", weight="bold")


def _tokens(page: Page, routing: LayerRouting, rank: int, x: int, y: int) -> None:
    for index, name in enumerate(prefix_names(routing)):
        expert = int(routing.chosen[0, index, rank])
        text = f"{name}, gate {routing.gates[0, index, expert]:.2f}"
        text += ", dropped" if routing.dropped[0, index, rank] else ""
        _chip(page, x, y + 34 * index, expert)
        page.text(x + 44, y + 16 + 34 * index, text, BODY, color=MUTED)


def _chip(page: Page, x: float, y: float, expert: int) -> None:
    """A small box in an expert's colour with its number."""
    page.rectangle(x, y, 34, 21, face=expert_hex(expert))
    ink = ink_on(expert_colours(expert + 1)[expert])
    page.text(x + 17, y + 16, str(expert), SMALL, color=ink, ha="center", weight="bold")


def _dropped_note(routing: LayerRouting) -> str:
    dropped = patch_part(routing).dropped
    count = int(dropped.sum())
    return f"{count} of {dropped.numel()} choices" if count else "no choice was dropped"


def _legend(page: Page, y: int, num_experts: int, dropped: bool) -> None:
    """How to read the maps, beside a ramp of opacity."""
    ramp = np.full((20, 200, 3), 0.85)
    steps = np.linspace(0, 1, 200)[None]
    page.picture(MARGIN, y, blend(ramp, expert_colours(1)[0], np.repeat(steps, 20, 0)))
    page.text(MARGIN, y + 38, "0", SMALL, color=MUTED)
    page.text(MARGIN + 100, y + 38, "gate", SMALL, color=MUTED, ha="center")
    page.text(MARGIN + 200, y + 38, "1", SMALL, color=MUTED, ha="right")
    lines = [
        "Colour and number: the expert. Opacity: its gate. Lines in the full colour bound the patches that chose it."
    ]
    if dropped:
        lines.append("Dropped patches darken with the share of their choices that found the expert full.")
    if num_experts > NUM_COLOURS:
        lines.append(f"Colours repeat after {NUM_COLOURS} experts: the numbers tell them apart.")
    for index, line in enumerate(lines):
        page.text(MARGIN + 230, y + 15 + 23 * index, line, BODY, color=MUTED)
