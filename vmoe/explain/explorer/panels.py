"""Panels of the explorer's figures: matrices, plots and pictures side by side on a page, each with a title."""

import textwrap
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes

from vmoe.figures.style import BODY, DIVERGING, MARGIN, MUTED, PAPER, SHADES, SMALL, Page, plain_axes
from vmoe.palette import expert_hex, ink_on

_HEAD_HEIGHT = 110  # pixels of the page's title
_TITLE_HEIGHT = 34  # of a panel's
_LETTER_WIDTH = 8.2  # upper bound of the mean width of a letter in body size


def panel_page(
    title: str, subtitle: str, legend: str, count: int, size: tuple[float, float], columns: int, left: float = 0
) -> tuple[Page, Iterator[tuple[float, float]]]:
    """A page for `count` panels of `size` (width, height), at most `columns` per row, and their upper left corners.

    The `legend` at the bottom explains the figure. `left` pixels beside each panel are free for names. A panel's title
    is above its area.
    """
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    width, height = size[0] + left + 60, size[1] + _TITLE_HEIGHT + 66
    wide = max(columns * width + 2 * MARGIN - 20, 760)
    lines = textwrap.wrap(legend, int((wide - 2 * MARGIN) / _LETTER_WIDTH))
    page = Page(wide, _HEAD_HEIGHT + rows * height + 24 * len(lines) + MARGIN)
    page.heading(title, subtitle)
    for index, line in enumerate(reversed(lines)):
        page.text(MARGIN, page.height - MARGIN + 6 - 24 * index, line, BODY, color=MUTED)
    places = (
        (MARGIN + left + index % columns * width, _HEAD_HEIGHT + _TITLE_HEIGHT + index // columns * height)
        for index in range(count)
    )
    return page, places


def panel_title(page: Page, x: float, y: float, title: str, width: float) -> None:
    """Writes a panel's title above its upper left corner."""
    page.text(x, y - 12, page.fit(title, BODY, max(width, 120), weight="bold"), BODY, weight="bold")


def plot(page: Page, x: float, y: float, size: tuple[float, float], title: str) -> Axes:
    """Axes with a title."""
    panel_title(page, x, y, title, size[0])
    return plain_axes(page.axes(x, y, *size))


def matrix(
    page: Page,
    corner: tuple[float, float],
    cell: tuple[int, int],
    values: np.ndarray,
    colours: np.ndarray,
    row_experts: bool = True,
    column_names: Sequence[str] | None = None,
    form: str | None = None,
) -> None:
    """Draws a matrix as coloured cells, with numbers in cells that are large enough.

    Args:
        page: The page to draw on.
        corner: The upper left corner, x and y in pixels.
        cell: Width and height of a cell in pixels.
        values: (rows, columns) numbers.
        colours: (rows, columns, 3) colours of the cells.
        row_experts: Whether rows are experts, which are marked by their colours.
        column_names: Names of the columns; None if columns are experts.
        form: Format of numbers, such as ".2f"; None writes none.
    """
    rows, columns = values.shape
    x, y = corner
    width, height = cell
    pixels = np.repeat(np.repeat(colours, height, 0), width, 1)
    page.picture(x, y, pixels)
    for row in range(rows if row_experts else 0):
        _expert_mark(page, x - 10, y + row * height, row, height)
    size = min(SMALL, height - 2, width - 2)
    for column in range(columns):
        middle = x + (column + 0.5) * width
        if column_names is not None and size >= 6:
            page.text(middle, y + rows * height + 8, column_names[column], size, ha="center", va="top", rotation=90)
        elif column_names is None:
            page.rectangle(x + column * width, y + rows * height + 3, width, 6, face=expert_hex(column))
    if form is not None and width >= 34 and height >= 15:
        for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
            ink = ink_on(colours[row, column])
            place = x + (column + 0.5) * width, y + (row + 0.5) * height
            text = _signless_zero(format(values[row, column], form))
            page.text(*place, text, 11, color=ink, ha="center", va="center_baseline")


def _signless_zero(number: str) -> str:
    """Returns a number unchanged, but 0.0 for -0.0."""
    return number if any(digit in number for digit in "123456789") else number.lstrip("-")


def _expert_mark(page: Page, right: float, top: float, expert: int, height: float) -> None:
    page.rectangle(right - 6, top, 6, height, face=expert_hex(expert))
    if height >= 9:
        page.text(right - 12, top + height / 2, str(expert), min(SMALL, height - 1), ha="right", va="center_baseline")


def shades(values: np.ndarray, largest: float) -> np.ndarray:
    """Shades from 0 to `largest`, (..., 3)."""
    return SHADES(np.clip(np.nan_to_num(values) / max(largest, 1e-12), 0, 1))[..., :3]


def diverging(values: np.ndarray, largest: float) -> np.ndarray:
    """Colours (..., 3): blue above 0, orange below, grey for missing numbers."""
    colours = DIVERGING(np.clip(0.5 + np.nan_to_num(values) / (2 * max(largest, 1e-12)), 0, 1))[..., :3]
    return np.where(np.isfinite(values)[..., None], colours, 0.93)


def ramp(page: Page, x: float, y: float, colours: np.ndarray, texts: Sequence[str]) -> None:
    """Draws a colour scale: colours (n, 3) from left to right, with texts at its ends and middle."""
    page.picture(x, y, np.repeat(np.repeat(colours[None], 10, 0), 2, 1))
    for text, share in zip(texts, np.linspace(0, 1, len(texts)), strict=True):
        page.text(x + 2 * len(colours) * share, y + 27, text, SMALL, ha="center", color=MUTED)


def interval(axes: Axes, x: float, part: dict, colour: str, filled: bool = True, key: str = "value") -> None:
    """Draws a point with its 95 % interval."""
    axes.plot([x, x], [part["low"], part["high"]], color=colour, linewidth=1.4, solid_capstyle="butt")
    axes.plot([x], [part[key]], "o", color=colour, markersize=5.5, markerfacecolor=colour if filled else PAPER)


def layer_ticks(axes: Axes, names: Sequence[str]) -> None:
    """Writes the layers along the horizontal axis, with as many names as fit."""
    step = max(1, len(names) // 8)
    axes.set_xticks(range(0, len(names), step))
    axes.set_xticklabels([short_layer(name) for name in names[::step]])
    axes.set_xlim(-0.5, len(names) - 0.5)


def short_layer(name: str) -> str:
    """The numbers in a layer's name: "11" for "blocks.11.mlp", "0.1" for "layers.0.blocks.1.mlp"."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    return ".".join(numbers) or name
