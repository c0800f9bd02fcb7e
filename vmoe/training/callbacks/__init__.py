"""What is ours alone in a training, as callbacks.

`RoutingMonitor`, `ExactResume`, `NanGuard` and `Ema` go with any Trainer. `journal` and `run_checkpoints` keep a
run's folder.
"""

from vmoe.training.callbacks.ema import Ema
from vmoe.training.callbacks.exact_resume import ExactResume
from vmoe.training.callbacks.nan_guard import NanGuard
from vmoe.training.callbacks.routing_monitor import RoutingMonitor

__all__ = ["Ema", "ExactResume", "NanGuard", "RoutingMonitor"]
