"""Endless pictures: attractors of iterated function systems, made while a model trains on them.

`systems` holds the classes, `pictures` makes batches of their pictures, `kernel` is the part of it that a GPU does
fast, `store` gives the pictures to the rest of the data room as a data set.
"""

from vmoe.data.fractals.store import FractalImages, load_fractals

__all__ = ["FractalImages", "load_fractals"]
