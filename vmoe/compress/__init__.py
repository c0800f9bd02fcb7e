"""Smaller models from trained ones: fewer experts, or experts merged into one MLP."""
