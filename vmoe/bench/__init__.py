"""Benchmarks: how long MoE layers and models take beside their dense twins."""
