"""What the benchmarks' plots share. Nothing here touches pyplot."""

import textwrap
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vmoe.files import atomic_write

INK, MUTED, RULE = "#1b1f24", "#667078", "#d5dade"
SERIES = {"dense": "#667078", "experts": "#e07b00", "layer": "#1879c1"}


def new_figure(width: float, height: float, title: str) -> Figure:
    """A white figure of so many inches, its title at the upper left."""
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(textwrap.fill(title, int(width * 13)), x=0.01, ha="left", fontsize=10, color=INK, parse_math=False)
    return figure


def dress(axes: Axes, title: str, x: str, y: str) -> Axes:
    """Hairline axes on two sides, a light grid behind, and the names of both axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(labelsize=8, colors=MUTED, labelcolor=INK)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_xlabel(x, fontsize=8, color=INK)
    axes.set_ylabel(y, fontsize=8, color=INK)
    return axes


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, atomically."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
