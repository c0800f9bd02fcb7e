"""Training: a LightningModule, its callbacks, and the run that puts them together."""

from vmoe.extras import require_extras

require_extras("train")
