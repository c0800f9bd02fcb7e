"""A callback that logs per epoch what the routers do."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from vmoe.checkpoints.trained import evaluating
from vmoe.data import Batch
from vmoe.errors import UserError
from vmoe.moe import moe_layers
from vmoe.palette import expert_colours
from vmoe.routing.recording import LayerRouting, record_routing
from vmoe.training.classifier import Classifier
from vmoe.training.routing_sums import RoutingSums, as_metrics, dead_experts, warnings_of

_STRENGTH = 0.55  # opacity of an expert's colour over the image
_SMALLEST_SIDE = 96  # pixels of a logged image


class RoutingMonitor(Callback):
    """Logs what each MoE layer's router does, for any Trainer and any LightningModule that holds MoE layers.

    It logs per epoch and layer, as `moe/NAME/...`: `load/E` of each expert (1 is fair, 0 is dead), `max_load`, the
    share `dropped` of the choices, the gates' `entropy` in nats, and the number of `dead` experts. It warns of dead and
    dominant experts. Loggers that take images (TensorBoard, Weights & Biases, MLflow) also get a few validation images,
    in which each patch has the colour of its first expert. That needs a single rank and batches of `(images, labels)`.
    For a model without MoE layers it logs nothing; with `warn` it warns of that.

    Args:
        images: Number of images drawn per epoch; 0 draws none.
        per_expert: Whether to log the load of each expert, beside the summary of each layer.
        warn: Whether to warn of dead and dominant experts, and of a model without MoE layers.

    Raises:
        UserError: `images` is negative.

    Attributes:
        means: The last epoch's means by layer: load of each expert, dropped share, entropy.
    """

    def __init__(self, images: int = 4, per_expert: bool = True, warn: bool = True) -> None:
        if images < 0:
            raise UserError(f"images={images!r}: must be a whole number >= 0")
        self.images, self.per_expert, self.warn = images, per_expert, warn
        self.means: dict[str, tuple[list[float], float, float]] = {}
        self._sums = RoutingSums()
        self._sums_in_step = False  # whether the LightningModule adds to the sums itself
        self._draws = images > 0
        self._to_draw: Tensor | None = None  # (images, 3, H, W)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        first = next((each for each in trainer.callbacks if isinstance(each, RoutingMonitor)), self)
        sums = RoutingSums() if first is self else first._sums  # several monitors share the sums of a model
        self.means, self._sums, self._to_draw = {}, sums, None  # start fresh for this fit's model
        has_layers = bool(moe_layers(pl_module))
        self._draws = self.images > 0 and has_layers
        if self.warn and not has_layers:
            rank_zero_warn("RoutingMonitor: the model has no MoE layer, so nothing is logged")
        self._sums_in_step = isinstance(pl_module, Classifier)
        if isinstance(pl_module, Classifier):
            pl_module.routing = self._sums

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # not at the epoch's start: a resumed Trainer may skip that hook
        if batch_idx == 0 and not self._sums_in_step:
            self._sums.reset()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._sums_in_step:
            self._sums.update(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if not (self._draws and batch_idx == 0 and dataloader_idx == 0 and any(map(_takes_images, trainer.loggers))):
            return
        try:
            images = Batch.of(batch).images
        except UserError as error:
            rank_zero_warn(f"RoutingMonitor: draws no images: {error}")
            self._draws = False
            return
        if images.dim() == 4:
            self._to_draw = images[: self.images]
        else:
            rank_zero_warn(f"RoutingMonitor: draws no images, since those of a batch are {tuple(images.shape)}")
            self._draws = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        images, self._to_draw = self._to_draw, None
        if images is None or trainer.sanity_checking or not trainer.is_global_zero or trainer.world_size > 1:
            return
        for name, pictures in routing_pictures(getattr(pl_module, "model", pl_module), images).items():
            for logger in trainer.loggers:
                _log_images(logger, f"routing/{name}", pictures, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.means = self._sums.means()
        metrics = as_metrics(self.means)
        if not self.per_expert:
            metrics = {name: value for name, value in metrics.items() if "/load/" not in name}
        metrics |= {f"moe/{name}/dead": float(len(dead_experts(loads))) for name, (loads, _, _) in self.means.items()}
        pl_module.log_dict(metrics, sync_dist=trainer.world_size > 1)  # the same on all ranks
        if self.warn:
            for line in warnings_of(self.means):
                rank_zero_warn(line)


@torch.no_grad()
def routing_pictures(model: nn.Module, images: Tensor) -> dict[str, list[np.ndarray]]:
    """Images in which each patch has the colour of its first expert, by the name of the MoE layer.

    Args:
        model: A model with MoE layers.
        images: (B, 3, H, W), normalised.

    Returns:
        B pictures (H, W, 3) uint8 for each layer in which tokens choose experts.
    """
    with evaluating(model), torch.compiler.set_stance("force_eager"), record_routing(model) as trace:
        model(images)
    layers = {name: each.as_tokens() for name, each in trace.layers.items() if each.chosen is not None}
    low, high = (getattr(images.flatten(1), word)(1).values[:, None, None, None] for word in ("min", "max"))
    grey = ((images - low) / (high - low).clamp(min=1e-6)).mean(1).float().cpu().numpy()  # (B, H, W) in [0, 1]
    experts = {name: layer.num_experts for name, layer in moe_layers(model)}
    return {name: _coloured(grey, routing, experts[name]) for name, routing in layers.items()}


def _coloured(grey: np.ndarray, routing: LayerRouting, num_experts: int) -> list[np.ndarray]:
    first = routing.on_grid(routing.chosen[..., 0]).cpu().numpy()  # (B, rows, columns)
    colours = expert_colours(num_experts)[first]
    pictures = []
    for image, patches in zip(grey, colours, strict=True):
        scale = -(-_SMALLEST_SIDE // image.shape[0])
        image = image.repeat(scale, 0).repeat(scale, 1)
        rows, columns = (
            np.arange(side) * parts // side for side, parts in zip(image.shape, patches.shape, strict=False)
        )
        blended = (1 - _STRENGTH) * image[..., None] + _STRENGTH * patches[rows[:, None], columns]
        pictures.append((255 * blended).round().astype(np.uint8))
    return pictures


def _takes_images(logger: Any) -> bool:
    return (
        hasattr(logger, "log_image") or hasattr(getattr(logger, "experiment", None), "add_image") or _is_mlflow(logger)
    )


def _is_mlflow(logger: Any) -> bool:
    return hasattr(logger, "run_id") and hasattr(getattr(logger, "experiment", None), "log_image")


def _log_images(logger: Any, name: str, pictures: list[np.ndarray], step: int) -> None:
    """Sends pictures to a logger by its own method. A logger without one gets none."""
    if hasattr(logger, "log_image"):  # Weights & Biases, Comet
        logger.log_image(key=name, images=pictures, step=step)
    elif hasattr(logger.experiment, "add_image"):  # TensorBoard
        logger.experiment.add_image(name, np.concatenate(pictures, 1), step, dataformats="HWC")
    elif _is_mlflow(logger):
        logger.experiment.log_image(logger.run_id, np.concatenate(pictures, 1), key=name.replace("/", "_"), step=step)
