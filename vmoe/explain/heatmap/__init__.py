"""Heatmaps: where each patch of an image goes, as figures, a page and numbers."""
