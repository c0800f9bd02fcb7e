"""Makes trained models smaller: with fewer experts, or with experts merged into one MLP."""
