"""Exports a trained model for others: as a program, as weights, or as a folder for the hub."""
