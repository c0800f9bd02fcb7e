"""What all drawn figures share: the colours of experts, and pages of text and pictures."""
