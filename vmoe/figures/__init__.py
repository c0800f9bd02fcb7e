"""What all drawn figures share: pages of text and pictures, measured in pixels."""

from vmoe.extras import require_extras

require_extras("analysis")
