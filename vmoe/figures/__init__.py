"""What all drawn figures share: the colours of experts, and pages of text and pictures."""

from vmoe.extras import require_extras

require_extras("analysis")
