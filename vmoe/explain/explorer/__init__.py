"""The routing explorer: what the experts of a V-MoE do, measured over a data set."""
# ruff: noqa: E402 - these imports need the extras

from vmoe.extras import require_extras

require_extras("train", "analysis")

from vmoe.explain.explorer.explore import DataFacts, Exploration, ExploreOptions, explore
from vmoe.explain.explorer.files import read_images, write_exploration
from vmoe.explain.explorer.subject import Subject

__all__ = ["DataFacts", "Exploration", "ExploreOptions", "Subject", "explore", "read_images", "write_exploration"]
