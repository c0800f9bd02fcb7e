"""The LightningModule: one step of training, one of evaluation, and the sums that become an epoch's metrics."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

import vmoe
from vmoe.data import Batch
from vmoe.training.config import OptimConfig
from vmoe.training.guard import Guard
from vmoe.training.optim import build_optimizer, learning_rate
from vmoe.training.statistics import RoutingStatistics


class Classifier(LightningModule):
    """Trains an image classifier, adding the auxiliary losses of its MoE layers.

    Metrics are sums on the device that the host reads at most every `log_every` steps: a step never waits for the GPU.

    Args:
        model: (B, 3, H, W) float32 images -> (B, classes) logits; may be dense.
        config: The optimiser and schedule.
        epochs: Epochs of the whole run.
        updates_per_epoch: Updates of the optimiser in an epoch.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, epochs: int, updates_per_epoch: int) -> None:
        super().__init__()
        self.model = model
        self.optim = config
        self.total_updates = epochs * updates_per_epoch
        self.warmup_updates = math.ceil(config.warmup_epochs * updates_per_epoch)
        self.train_sums = torch.zeros(4)
        self.evaluation_sums = torch.zeros(4)
        self.routing = RoutingStatistics()
        self.guard = Guard()
        self.damaged: dict[str, None] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = self.model(batch.images)
        targets = batch.labels if batch.targets is None else batch.targets
        loss = F.cross_entropy(logits, targets, label_smoothing=self.optim.label_smoothing)
        total = loss + vmoe.auxiliary_loss(self.model)
        self.guard.watch_forward(batch.images, total)
        self.train_sums = self.train_sums + _sums(logits, batch.labels, loss)
        self.routing.update(self.model)
        self.damaged.update(dict.fromkeys(batch.damaged))
        return total

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, **_: Any) -> None:
        """Clips the gradients and lets the guard block the update if they, or the loss, are not finite."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # Lightning leaves this to fused optimisers, which would do it after the clipping
            scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.optim.clip_norm or math.inf)
        self.guard.check_update(optimizer, norm, self.global_step, scaler)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self.model(batch.images)
        loss = F.cross_entropy(logits, batch.labels)
        self.evaluation_sums = self.evaluation_sums + _sums(logits, batch.labels, loss)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_train_start(self) -> None:
        self._move_sums()

    def on_train_epoch_start(self) -> None:
        self.train_sums = torch.zeros_like(self.train_sums)
        self.routing.reset()

    def on_validation_epoch_start(self) -> None:
        self._move_sums()
        self.evaluation_sums = torch.zeros_like(self.evaluation_sums)

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def train_metrics(self) -> dict[str, float]:
        """Mean loss (smoothed, without auxiliary losses) and accuracy over the training images of this epoch so far."""
        loss, top1, _ = _means(self.train_sums)
        return {"train/loss": loss, "train/top1": top1}

    def evaluation_metrics(self, split: str) -> dict[str, float]:
        """Mean cross-entropy and top-1 and top-5 accuracy of the last validation or test."""
        return dict(zip((f"{split}/loss", f"{split}/top1", f"{split}/top5"), _means(self.evaluation_sums), strict=True))

    def rate(self, step: int) -> float:
        """The learning rate of update `step`, 0-based."""
        return learning_rate(step, self.total_updates, self.warmup_updates, self.optim)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.model, self.optim)
        optimizer.register_step_pre_hook(lambda optimizer, *_: self.guard.block(optimizer))
        optimizer.register_step_post_hook(lambda *_: vmoe.update_router_biases(self.model))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step) / self.optim.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def running_state(self) -> dict[str, Any]:
        """The sums of an unfinished epoch, as tensors on the CPU."""
        return {"train_sums": self.train_sums.cpu(), "routing": self.routing.state()}

    def load_running_state(self, state: dict[str, Any]) -> None:
        self.train_sums = state["train_sums"].to(self.train_sums.device)
        self.routing.load_state(state["routing"])

    def _move_sums(self) -> None:
        # Doubles keep sums over a million images exact to the digits shown; Apple's GPUs have none.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.train_sums = self.train_sums.to(self.device, dtype)
        self.evaluation_sums = self.evaluation_sums.to(self.device, dtype)
        self.routing.to(self.device)
        self.guard.to(self.device)


def _sums(logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """Sums over a batch: loss, right answers, right answers among the five likeliest, images. (4,) on the device."""
    likeliest = logits.detach().topk(min(5, logits.shape[1]), dim=1).indices
    hits = likeliest == labels[:, None]
    loss = loss.detach().float()
    images = torch.full_like(loss, len(labels))
    return torch.stack([loss * images, hits[:, 0].sum().to(loss), hits.sum().to(loss), images])


def _means(sums: Tensor) -> list[float]:
    *totals, images = sums.tolist()
    return [total / images if images else math.nan for total in totals]
