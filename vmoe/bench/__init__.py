"""Benchmarks: how long MoE layers and models take beside their dense twins."""

from vmoe.extras import require_extras

require_extras("train", "analysis")
