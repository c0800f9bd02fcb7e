"""Compares runs: arms of a study, their intervals and their figure."""

from vmoe.extras import require_extras

require_extras("analysis")
