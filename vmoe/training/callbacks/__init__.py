"""The callbacks that this package adds to Lightning's. Each works with any Trainer."""

from vmoe.training.callbacks.ema import Ema
from vmoe.training.callbacks.exact_resume import ExactResume
from vmoe.training.callbacks.gradual_unfreezing import GradualUnfreezing
from vmoe.training.callbacks.nan_guard import NanGuard
from vmoe.training.callbacks.routing_monitor import RoutingMonitor

__all__ = ["Ema", "ExactResume", "GradualUnfreezing", "NanGuard", "RoutingMonitor"]
