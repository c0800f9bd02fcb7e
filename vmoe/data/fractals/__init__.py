"""Endless pictures: attractors of iterated function systems, generated during training.

`systems` holds the classes. `pictures` makes batches of their pictures, with `kernel` for GPUs. `store` makes them a
data set for the rest of the data room.
"""

from vmoe.data.fractals.store import FractalImages, load_fractals

__all__ = ["FractalImages", "load_fractals"]
