"""Training on several ranks: the ranks themselves, their communication, and the sharding of models and batches."""
