"""Shared functions of the benchmarks' plots. None of them uses pyplot."""

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vmoe.figures.style import ACCENT, INK, MUTED, label, plain_axes
from vmoe.files import atomic_write

SERIES = {"dense": MUTED, "experts": "#e07b00", "layer": ACCENT}
_SIZE = 11  # font size of the axes, in pixels


def new_figure(width: float, height: float, title: str) -> Figure:
    """A white figure of `width` x `height` inches with its title at the upper left."""
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, int(width * 13)), x=0.01, ha="left", fontsize=10, color=INK, parse_math=False)
    return figure


def dress(axes: Axes, title: str, x: str, y: str) -> Axes:
    """Draws hairline axes on two sides, a light grid behind them, and the names of both axes."""
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    label(axes, x, y, _SIZE)
    return plain_axes(axes, _SIZE)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, atomically."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
