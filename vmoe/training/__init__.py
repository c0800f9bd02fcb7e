"""Training: a LightningModule, its callbacks, and the run that puts them together."""
