"""Runs beside each other: arms of a study, their intervals and their figure."""
