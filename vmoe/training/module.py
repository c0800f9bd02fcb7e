"""The LightningModule: one step of training, one of evaluation, and the sums that become an epoch's metrics."""

import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

import vmoe
from vmoe.data import Batch
from vmoe.data.sharing import NOT_COUNTED
from vmoe.evaluation.engine import batch_sums, likeliest_classes, means_of
from vmoe.moe.routers import SigmoidRouter
from vmoe.training.averaging import GradientMeans
from vmoe.training.config import OptimConfig
from vmoe.training.distillation import Teacher
from vmoe.training.ema import Ema
from vmoe.training.graph import GraphedStep
from vmoe.training.guard import Guard
from vmoe.training.optim import build_optimizer, by_number, learning_rate, optimizer_groups, parameter_groups
from vmoe.training.processes import Place, is_alone, total
from vmoe.training.sample_draws import SampleDraws
from vmoe.training.sharding import clip_gradients
from vmoe.training.statistics import RoutingStatistics

RAW_TOP1 = "val/raw_top1"


class Classifier(LightningModule):
    """Trains an image classifier, adding the auxiliary losses of its MoE layers.

    Metrics are sums on the device that the host reads at most every `log_every` steps: a step never waits for the GPU.

    Args:
        model: (B, 3, H, W) float32 images -> (B, classes) logits; may be dense.
        config: The optimiser and schedule.
        epochs: Epochs of the whole run.
        updates_per_epoch: Updates of the optimiser in an epoch.
        ema_decay: Decay of the average of the weights, by which validation is done; None keeps no average.
        cuda_graph: Captures the whole step as a CUDA graph; then a batch is an update.
        draws: Draws router noise and dropout by image, once installed in the model; None leaves it to torch.
        cut: Cuts the model into the parts of several processes (see `vmoe.training.sharding.shard`); None leaves it.
        teacher: A model whose answers are learnt too; None learns the labels alone.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        epochs: int,
        updates_per_epoch: int,
        ema_decay: float | None = None,
        cuda_graph: bool = False,
        draws: SampleDraws | None = None,
        cut: Callable[[nn.Module], None] | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optim = config
        self.total_updates = epochs * updates_per_epoch
        self.warmup_updates = math.ceil(config.warmup_epochs * updates_per_epoch)
        self.train_sums = torch.zeros(4)
        self.evaluation_sums = torch.zeros(4)
        self.raw_sums = torch.zeros(4)  # of the weights themselves where validation is by their average
        self.routing = RoutingStatistics()
        self.guard = Guard()
        self.draws = draws
        self.teacher = teacher
        self._cut = cut
        self._is_cut = False
        self._means: GradientMeans | None = None  # where Lightning's strategy does not average
        self.ema = None if ema_decay is None else Ema(model, ema_decay)
        self.damaged: dict[str, None] = {}
        self._graphed_step = GraphedStep(self._step) if cuda_graph else None
        self._step_number = torch.zeros(())  # of the update, for the graph

    def configure_model(self) -> None:
        if self._cut is not None:
            self._cut(self.model)
            self._cut, self._is_cut = None, True  # what cuts may hold a whole model
            if self.ema is not None:
                self.ema = Ema(self.model, self.ema.decay)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.damaged.update(dict.fromkeys(batch.damaged))
        if self._graphed_step is None:
            return self._loss(batch) * self._share(batch_idx)
        self._step_number.fill_(self.global_step)
        return self._graphed_step(batch)

    def _share(self, batch_idx: int) -> float:
        """What makes an update the mean over its batches: Lightning divides by `accumulate` also where an epoch's last
        update has fewer.
        """
        most, batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        return most / min(most, batches - batch_idx // most * most)

    def _loss(self, batch: Batch) -> Tensor:
        if self.draws is not None:
            self.draws.keys = batch.keys
        logits = self.model(batch.images)
        targets = batch.labels if batch.targets is None else batch.targets
        loss = F.cross_entropy(logits, targets, label_smoothing=self.optim.label_smoothing)
        learnt = loss if self.teacher is None else self.teacher.mixed_into(loss, batch.images, logits)
        total = learnt + vmoe.auxiliary_loss(self.model)
        self.guard.watch_forward(batch.images, total)
        self.train_sums += batch_sums(likeliest_classes(logits), batch.labels, loss)
        self.routing.update(self.model)
        return total

    def _step(self, batch: Batch) -> Tensor:
        """All that Lightning would do with a batch, up to the update, without the host: the part that is captured."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        vars(optimizer).pop("found_inf", None)  # of the last step, whose memory the graph must not read
        optimizer.zero_grad()
        kind = self.device.type
        is_mixed, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            batch = self.trainer.datamodule.made(batch)
        with torch.autocast(kind, dtype, enabled=is_mixed, cache_enabled=False):  # a graph must not keep casts
            loss = self._loss(batch)
        with torch.autocast(kind, enabled=False):
            loss.backward()
            self.guard.check_update(optimizer, self._clip(optimizer), self._step_number)
            optimizer.step()
        return loss.detach()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._graphed_step is None:
            super().backward(loss, *args, **kwargs)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        if self._graphed_step is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()  # calls training_step, which has done the update

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, **_: Any) -> None:
        """Clips the gradients and lets the guard block the update if they, or the loss, are not finite."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # Lightning leaves this to fused optimisers, which would do it after the clipping
            scaler.unscale_(optimizer)
        self.guard.check_update(optimizer, self._clip(optimizer), self.global_step, scaler)

    def _clip(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Clips the gradients; their norm before, ()."""
        if self._means is not None:
            self._means.finish()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._is_cut:
            return clip_gradients(parameters, self.optim.clip_norm or math.inf)
        return nn.utils.clip_grad_norm_(parameters, self.optim.clip_norm or math.inf)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if self.ema is None:
            self.evaluation_sums += self._evaluated(batch)
            return
        self.raw_sums += self._evaluated(batch)
        with self.ema.applied():
            self.evaluation_sums += self._evaluated(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """By the model's weights as they are."""
        self.evaluation_sums += self._evaluated(batch)

    def _evaluated(self, batch: Batch) -> Tensor:
        logits = self.model(batch.images)
        is_counted = batch.labels != NOT_COUNTED
        labels = batch.labels.clamp(min=0)
        sums = batch_sums(likeliest_classes(logits), labels, F.cross_entropy(logits, labels))
        return sums * is_counted[0]  # of a batch all images are, or none

    def on_train_start(self) -> None:
        self._move_sums()
        is_graphed = self._graphed_step is not None
        if (self._is_cut or is_graphed) and not is_alone():
            self._means = GradientMeans(self.model.parameters(), self.trainer.accumulate_grad_batches == 1)
        schedule = self.lr_schedulers()
        groups = self.optimizers(use_pl_optimizer=False).param_groups
        for group, highest in zip(groups, schedule.base_lrs, strict=True):
            # By this run's schedule: a resumed one may have had fewer epochs.
            rate = highest * (self.rate(schedule.last_epoch) / self.optim.lr)
            # A graph reads the rate from the device, where the schedule writes it; elsewhere a number serves.
            group["lr"] = torch.tensor(rate, device=self.device) if is_graphed else rate
            group["capturable"] = is_graphed

    def on_train_end(self) -> None:
        for _, layer in vmoe.moe_layers(self.model):
            layer.last_auxiliary_loss = None  # FSDP2's hooks in its graph hold the model: a circle that is never freed
        self._graphed_step = None  # before the processes part: NCCL's communicators wait for graphs that hold them
        if self._means is not None:
            self._means.remove()
            self._means = None

    def on_train_epoch_start(self) -> None:
        self.train_sums.zero_()
        self.routing.reset()

    def on_validation_epoch_start(self) -> None:
        self._move_sums()
        self.evaluation_sums.zero_()
        self.raw_sums.zero_()

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def train_metrics(self) -> dict[str, float]:
        """Mean loss by the labels (smoothed, nothing added) and accuracy over the training images of this epoch."""
        means = means_of(total(self.train_sums))
        return {"train/loss": means.loss, "train/top1": means.top1}

    def train_images(self) -> int:
        """Training images of this epoch so far, of all processes."""
        return int(total(self.train_sums)[-1])

    def evaluation_metrics(self, split: str) -> dict[str, float]:
        """Mean cross-entropy and top-1 and top-5 accuracy of the last validation or test.

        Where validation is by the average of the weights, the accuracy of the weights themselves is beside it.
        """
        names = (f"{split}/loss", f"{split}/top1", f"{split}/top5")
        metrics = dict(zip(names, means_of(total(self.evaluation_sums)), strict=True))
        return metrics | (
            {RAW_TOP1: means_of(total(self.raw_sums)).top1} if split == "val" and self.ema is not None else {}
        )

    def validation_metrics(self) -> dict[str, float]:
        """Those of images kept for validation; none where none are."""
        return self.evaluation_metrics("val") if self.trainer.datamodule.has_validation else {}

    def rate(self, step: int) -> float:
        """The learning rate of update `step`, 0-based."""
        return learning_rate(step, self.total_updates, self.warmup_updates, self.optim)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        groups = optimizer_groups(self.model, self.optim)
        for schedule in checkpoint["lr_schedulers"]:  # the saved run's may have been in other groups
            schedule["base_lrs"] = [group["lr"] for group in groups]
        if not self._is_cut:  # else the strategy has loaded the optimiser's state
            states = [by_number(state, self.optimizer_names(), groups) for state in checkpoint["optimizer_states"]]
            checkpoint["optimizer_states"] = states

    def optimizer_names(self) -> list[str]:
        """The parameters' names in the order in which an optimiser of a whole model numbers them."""
        names = {parameter: name for name, parameter in self.named_parameters()}
        return [names[p] for group in parameter_groups(self.model, self.optim) for p in group["params"]]

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.model, self.optim)
        optimizer.register_step_pre_hook(lambda optimizer, *_: self.guard.block(optimizer))
        optimizer.register_step_post_hook(lambda optimizer, *_: self._after_update(optimizer))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step) / self.optim.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _after_update(self, optimizer: torch.optim.Optimizer) -> None:
        for _, layer in vmoe.moe_layers(self.model):
            if isinstance(layer.router, SigmoidRouter):
                # Of a blocked update nothing may remain: without choices the biases stay as they are
                layer.router.choices.copy_(total(layer.router.choices) * (1 - optimizer.found_inf))
        vmoe.update_router_biases(self.model)
        if self.ema is not None:
            self.ema.update(optimizer.found_inf)

    def running_state(self) -> dict[str, Any]:
        """The sums of an unfinished epoch over all processes, as tensors on the CPU."""
        return {"train_sums": total(self.train_sums).cpu(), "routing": self.routing.state()}

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Goes on with the sums of all processes: in the first, so that they count once."""
        share = 1 if Place.of_this().is_first else 0
        self.train_sums = state["train_sums"].to(self.train_sums.device) * share
        self.routing.load_state(state["routing"])

    def _move_sums(self) -> None:
        # Doubles keep sums over a million images exact to the digits shown; Apple's GPUs have none.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.train_sums = self.train_sums.to(self.device, dtype)
        self.evaluation_sums = self.evaluation_sums.to(self.device, dtype)
        self.raw_sums = self.raw_sums.to(self.device, dtype)
        self._step_number = self._step_number.to(self.device)
        if self.ema is not None:
            self.ema.to(self.device)
        if self.teacher is not None:
            self.teacher.to(self.device)
        self.routing.to(self.device)
        self.guard.to(self.device)
