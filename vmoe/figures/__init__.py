"""Shared code of all drawn figures: pages of text and pictures, measured in pixels."""

from vmoe.extras import require_extras

require_extras("analysis")
