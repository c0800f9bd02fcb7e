"""Training: a LightningModule, its callbacks, and the run that combines them."""

from vmoe.extras import require_extras

require_extras("train")
