"""What the experts do, to look at: heatmaps over images, and the explorer with its page."""
