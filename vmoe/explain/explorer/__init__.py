"""The routing explorer: what the experts of a V-MoE do, measured over a data set."""

from vmoe.explain.explorer.explore import Exploration, ExploreOptions, explore
from vmoe.explain.explorer.files import read_images, write_exploration
from vmoe.explain.explorer.subject import Subject

__all__ = ["Exploration", "ExploreOptions", "Subject", "explore", "read_images", "write_exploration"]
