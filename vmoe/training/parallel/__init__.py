"""Several ranks: which one this is, what they say to one another, and how a model and its batches are shared."""
