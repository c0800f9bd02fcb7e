"""The planner: what a training step needs and takes on hardware that is not there, by how it is spread."""
