"""The routing explorer: what the experts of a V-MoE do, measured over a data set."""

from vmoe.analysis.exploration.explore import Exploration, ExploreOptions, explore
from vmoe.analysis.exploration.files import read_images, write_exploration
from vmoe.analysis.exploration.subject import Subject

__all__ = ["Exploration", "ExploreOptions", "Subject", "explore", "read_images", "write_exploration"]
