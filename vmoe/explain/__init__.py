"""Shows what the experts do: heatmaps over images, and the explorer with its page."""
