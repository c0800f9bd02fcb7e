"""The explorer's folder: index.html, figures/ and data/."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.explain.explorer.explore import Exploration
from vmoe.explain.explorer.figures import draw_figures
from vmoe.explain.explorer.galleries import draw_galleries
from vmoe.explain.explorer.sample import with_layers, without_layers
from vmoe.explain.page import write_page
from vmoe.files import atomic_write, write_json


def write_exploration(exploration: Exploration, out: str | Path) -> None:
    """Writes the numbers, the figures and the page, each file atomically.

    Raises:
        UserError: The folder cannot be written.
    """
    out = Path(out)
    write_page(exploration.report, exploration.images, out / "index.html")
    write_json(out / "data" / "report.json", exploration.report)
    pictures = draw_galleries(exploration.report, exploration.images)
    for name, page in chain(draw_figures(exploration.report), pictures):
        page.save(out / "figures" / f"{name}.png")
    with atomic_write(out / "data" / "images.npz") as temporary:
        np.savez_compressed(temporary, **without_layers(exploration.images))


def read_images(path: str | Path) -> dict[str, Any]:
    """Reads the sample from data/images.npz."""
    with np.load(path, allow_pickle=False) as arrays:
        return with_layers(dict(arrays))
