"""The explorer's folder: index.html, figures/ and data/."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.explain.explorer.explore import Exploration
from vmoe.explain.explorer.figures import draw_figures
from vmoe.explain.explorer.galleries import draw_galleries
from vmoe.explain.page import write_page
from vmoe.files import atomic_write, write_json


def write_exploration(exploration: Exploration, out: str | Path) -> None:
    """Writes the numbers, the figures and the page, each file at once or not at all.

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
        np.savez_compressed(temporary, **flat_images(exploration.images))


def flat_images(images: dict[str, Any]) -> dict[str, np.ndarray]:
    """The sample as one level of arrays: "layers/0/gates" and so on; what is None is left out."""
    flat = {name: value for name, value in images.items() if name != "layers"}
    for index, layer in enumerate(images["layers"]):
        flat |= {f"layers/{index}/{name}": value for name, value in layer.items() if value is not None}
    return flat


def read_images(path: str | Path) -> dict[str, Any]:
    """The sample back from data/images.npz."""
    with np.load(path, allow_pickle=False) as arrays:
        images: dict[str, Any] = {name: arrays[name] for name in arrays.files if "/" not in name}
        count = 1 + max(int(name.split("/")[1]) for name in arrays.files if "/" in name)
        names = ("gates", "dispatch", "chosen", "dropped", "entropy", "valid")
        images["layers"] = [
            {name: arrays[key] if (key := f"layers/{index}/{name}") in arrays.files else None for name in names}
            for index in range(count)
        ]
    return images
