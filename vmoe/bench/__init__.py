"""Benchmarks of MoE layers and models beside their dense twins."""

from vmoe.extras import require_extras

require_extras("train", "analysis")
