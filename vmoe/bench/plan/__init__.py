"""The planner: it predicts memory and time of a training step for each mesh layout, without the hardware."""
