"""Evaluates models: accuracy on a set, quality of features, and comparison of runs."""
