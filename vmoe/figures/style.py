"""The style of all figures: a page measured in pixels, its colours and font sizes. Nothing here uses pyplot."""

from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from vmoe.files import atomic_write
from vmoe.text import printable

# The light ones of palette.css, and the first expert's colour
INK = "#1b1f24"
MUTED = "#5b656d"
RULE = "#d5dade"
PAPER = "#ffffff"
ACCENT = "#1879c1"
# The colours of the explorer's page (assets/numbers.js). They are greyish, to differ from the experts' colours.
SHADES = LinearSegmentedColormap.from_list("vmoe_shades", [PAPER, "#d3dfe8", "#8fa9bd", "#4b6b85", "#16324a"])
DIVERGING = LinearSegmentedColormap.from_list("vmoe_diverging", ["#9c2f14", "#e0916f", PAPER, "#7fa6cf", "#1d4f91"])

TITLE, HEADING, BODY, SMALL = 26, 17, 15, 13  # font sizes in pixels
LINE = 18  # distance between lines of small text
MARGIN = 40

_DPI = 100


def points_of(pixels: float) -> float:
    """Converts a font size from pixels to Matplotlib's points."""
    return pixels * 72 / _DPI


class Page:
    """A white picture of `width` x `height` pixels. Coordinates are pixels from its upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = int(width), int(height)
        self.figure = Figure(figsize=(self.width / _DPI, self.height / _DPI), dpi=_DPI, facecolor=PAPER)
        self.canvas = FigureCanvasAgg(self.figure)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Axes over a rectangle of the page."""
        return self.figure.add_axes(
            (x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height)
        )

    def picture(self, x: int, y: int, pixels: np.ndarray) -> None:
        """Draws (H, W, 3) floats in [0, 1] at full size in a hairline frame, with the upper left corner at x, y."""
        height, width = pixels.shape[:2]
        # without axes of its own, which would take longer than all else on a page
        levels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
        self.figure.figimage(levels, x, self.height - y - height, origin="upper")
        self.rectangle(x - 0.5, y - 0.5, width + 1, height + 1, edge=RULE)

    def text(self, x: float, y: float, text: str, size: float = BODY, **style: object) -> Text:
        """Writes `text` literally (no mathematics, no control characters), its baseline at y."""
        style = {"color": INK, "va": "baseline", **style}
        return self.figure.text(
            x / self.width, 1 - y / self.height, printable(text), fontsize=points_of(size), parse_math=False, **style
        )

    def rectangle(self, x: float, y: float, width: float, height: float, face: object = "none", edge: object = "none"):
        """A filled or outlined rectangle."""
        box = (x / self.width, 1 - (y + height) / self.height), width / self.width, height / self.height
        self.figure.add_artist(Rectangle(*box, facecolor=face, edgecolor=edge, linewidth=points_of(1)))

    def heading(self, title: str, subtitle: str) -> None:
        """Writes the page's title and the line below it."""
        self.text(
            MARGIN, MARGIN + 20, self.fit(title, TITLE, self.width - 2 * MARGIN, weight="bold"), TITLE, weight="bold"
        )
        self.text(MARGIN, MARGIN + 50, self.fit(subtitle, BODY, self.width - 2 * MARGIN), color=MUTED)

    def fit(
        self, text: str, size: float, width: float, keep: Literal["start", "end"] = "start", **style: object
    ) -> str:
        """Shortens `text` to `width` pixels: keeps its start or end, with an ellipsis for the rest."""
        if text_width(text, size, **style) <= width:
            return text

        def shortened(letters: int) -> str:
            return text[:letters].rstrip() + "…" if keep == "start" else "…" + text[len(text) - letters :].lstrip()

        held, over = 0, len(text)  # numbers of letters that fit with the ellipsis, and that do not
        while over - held > 1:
            middle = (held + over) // 2
            fits = text_width(shortened(middle), size, **style) <= width
            held, over = (middle, over) if fits else (held, middle)
        return shortened(held)

    def pixels(self) -> np.ndarray:
        """The drawn page, (height, width, 3) uint8."""
        self.canvas.draw()
        return np.asarray(self.canvas.buffer_rgba())[..., :3].copy()

    def save(self, path: str | Path) -> None:
        """Writes the page as a PNG, atomically."""
        with atomic_write(path) as temporary:
            # level 6, the default, takes twice as long for 8 % smaller files
            Image.fromarray(self.pixels()).save(temporary, format="png", compress_level=3, dpi=(_DPI, _DPI))


@lru_cache(4096)
def text_width(text: str, size: float = BODY, **style: object) -> float:
    """The width of a line of text on a page, in pixels."""
    page = Page(10, 10)
    return page.text(0, 0, text, size, **style).get_window_extent(page.canvas.get_renderer()).width


def wrapped(text: str, size: float, width: float) -> list[str]:
    """Breaks a text between words into lines of at most `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def plain_axes(axes: Axes, size: float = SMALL) -> Axes:
    """Styles a plot: hairline axes on two sides, and a light grid behind it."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
        axes.spines[side].set_linewidth(points_of(1))
    axes.tick_params(labelsize=points_of(size), colors=MUTED, labelcolor=INK, width=points_of(1), length=4)
    axes.grid(color=RULE, linewidth=points_of(1))
    axes.set_axisbelow(True)
    return axes


def label(axes: Axes, x: str = "", y: str = "", size: float = SMALL) -> None:
    """Names the axes of a plot."""
    axes.set_xlabel(x, fontsize=points_of(size), color=INK)
    axes.set_ylabel(y, fontsize=points_of(size), color=INK)
