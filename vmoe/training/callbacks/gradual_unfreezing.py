"""A callback for gradual unfreezing."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from vmoe.errors import UserError
from vmoe.models.freezing import layers_from_the_top, put_in_training_mode


class GradualUnfreezing(Callback):
    """Unfreezes the layers of a model one after the other, from the classifier down; for any Trainer.

    In the first epoch only the classifier learns. Then the same number of layers joins at the start of each epoch,
    until all learn after `epochs` epochs. With as many epochs as layers, one joins per epoch (Howard and Ruder 2018).
    With 1, all join after the first epoch. While only the classifier learns, the rest is in evaluation mode, as in a
    linear probe. Parameters that are frozen already, as by `vmoe.freeze`, stay frozen.

    The learning layers depend on the epoch alone, so a resumed training continues exactly. All parameters are in the
    optimiser from the start; it skips those without a gradient. Lightning's `BaseFinetuning` adds groups to the
    optimiser instead, with other rates and weight decays than those of `vmoe.Classifier`.

    It works in a single process, and not with a step that is captured as a CUDA graph or compiled.

    Args:
        epochs: The number of epochs after which all layers learn.

    Raises:
        UserError: `epochs` is not a whole number from 1.
    """

    def __init__(self, epochs: int) -> None:
        if type(epochs) is not int or epochs < 1:
            raise UserError(f"epochs={epochs!r}: must be a whole number >= 1")
        self.epochs = epochs
        self._layers: list[list[nn.Parameter]] = []  # all parameters that will learn, from the classifier down
        self._epoch = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise UserError("GradualUnfreezing: works in one process", everywhere=True)
        model = _model_of(pl_module)
        try:
            names = layers_from_the_top(model)
        except ValueError as error:
            raise UserError(f"GradualUnfreezing: {error}") from error
        parameters = dict(model.named_parameters())
        learning = [[parameters[name] for name in layer if parameters[name].requires_grad] for layer in names]
        if not learning[0] or not any(learning[1:]):
            raise UserError("GradualUnfreezing: must have the classifier and a layer more to unfreeze; freeze fewer")
        self._layers, self._epoch = [layer for layer in learning if layer], -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # not at the epoch's start: Lightning does not call that hook after a resumption within an epoch
        if trainer.current_epoch == self._epoch:
            return
        self._epoch = trainer.current_epoch
        learning = 1 + (len(self._layers) - 1) * min(self._epoch, self.epochs) // self.epochs
        for number, layer in enumerate(self._layers):
            for parameter in layer:
                parameter.requires_grad_(number < learning)
        put_in_training_mode(_model_of(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for layer in self._layers:
            for parameter in layer:
                parameter.requires_grad_(True)
        self._layers = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


def _model_of(pl_module: LightningModule) -> nn.Module:
    """The timm model of a LightningModule, which may be one itself."""
    model = getattr(pl_module, "model", pl_module)
    return model if isinstance(model, nn.Module) else pl_module
