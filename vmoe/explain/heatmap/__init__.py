"""Heatmaps of routing: the experts of each patch of an image, as figures, a page and numbers."""
