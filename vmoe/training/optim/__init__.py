"""Optimisers, their parameter groups and learning rates, and the average of the weights."""
