"""The LightningModule: one step of training, one of evaluation, and the sums that become an epoch's metrics.

B images, C classes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from vmoe.checkpoints import ENTRY, ModelFacts
from vmoe.checkpoints.state import put_average, put_model
from vmoe.config_values import from_plain, to_plain
from vmoe.data import Batch
from vmoe.errors import UserError
from vmoe.evaluation.guidance import Guidance
from vmoe.models.freezing import is_linear_probe, put_in_training_mode
from vmoe.models.members import ensemble_size, of_rows, refuse_ensemble
from vmoe.moe import auxiliary_loss, moe_layers, update_router_biases
from vmoe.moe.routers import SigmoidRouter
from vmoe.training.classifier_files import found_facts, restored
from vmoe.training.config import LossConfig, OptimConfig
from vmoe.training.distillation import Teacher
from vmoe.training.graph import GraphedStep
from vmoe.training.guard import Guard
from vmoe.training.label_loss import LabelLoss
from vmoe.training.label_metrics import GuidedMetrics, LabelMetrics, MultiLabelMetrics, SingleLabelMetrics
from vmoe.training.optim.average import WeightAverage
from vmoe.training.optim.groups import build_optimizer, by_number, optimizer_groups, parameter_groups
from vmoe.training.optim.schedule import LearningRates, RateSchedule, planned_rates
from vmoe.training.optim.weight_passes import scale_down
from vmoe.training.parallel.collectives import is_alone, rank_of_all, total
from vmoe.training.parallel.gradient_means import GradientMeans
from vmoe.training.parallel.sample_draws import SampleDraws
from vmoe.training.parallel.sharding import clip_gradients
from vmoe.training.routing_sums import RoutingSums

RAW_TOP1 = "val/raw_top1"


class Classifier(LightningModule):
    """An ordinary LightningModule that trains an image classifier, and adds the auxiliary losses of its MoE layers.

    It works in any `lightning.Trainer`. A batch is `(images (B, 3, H, W), labels (B,))`, or the `Batch` of
    `vmoe.ImageDataModule`. Labels may also be shares of the classes (B, C). It logs `train/loss` and `train/top1` per
    epoch, and as `..._step` every `log_every_n_steps`. For `val/` and `test/` it logs `loss`, `top1` and `top5`.
    Validation and test take one loader each and refuse several.

    With `multi_label` an image may have several classes, and labels are (B, C) of 0 and 1. Then it logs `loss`, `f1`
    (micro, at a probability of 0.5) and in evaluation `mAP`. Checkpoints keep the threshold per class with the best F1
    in validation.

    Its checkpoints hold all that rebuilds the model. So `vmoe.load` and every job of the command line open them.

    The members of an ensemble (`MoeConfig.ensemble`) learn separately: the loss is the mean over them. Validation and
    test measure their mean prediction.

    Metrics are sums on the device. The host reads them only to log them, so no step synchronises with the GPU.

    Args:
        model: Maps (B, 3, H, W) float32 images to (B, C) logits; from `vmoe.create_model`, `vmoe.sparsify`,
            `vmoe.load` or timm. It may be dense. A model in evaluation mode is put in training mode.
        lr: The highest learning rate.
        class_names: Name of each class, in the order of the logits. None takes the names of the Trainer's datamodule,
            else a loaded model's, else "0", "1", ...
        mean: Mean of each channel for normalisation. None looks in the same places as `class_names`, then takes timm's
            mean for this model.
        std: Standard deviation of each channel. None as for `mean`.
        loss: The loss by the labels, a `vmoe.training.config.LossConfig` or its options, such as
            `{"class_weights": "balanced"}`. Options that count the training images of each class need a datamodule with
            `images_of_classes`, such as `vmoe.ImageDataModule`.
        multi_label: Whether an image may have several classes, or none. None takes it from the Trainer's datamodule,
            else from the loss.
        **optim: Any other option of `vmoe.training.config.OptimConfig`: `weight_decay`, `warmup_epochs`, `name`
            ("adamw", "muon", "timm:lion", ...), `schedule`, `label_smoothing`, ... By default the warm-up is a quarter
            of the epochs, at most 5.

    Raises:
        UserError: `model` is no model, or an option is unknown or its value is not allowed.

    Attributes:
        model: The model.
        optim: The `OptimConfig`.
        loss: The `LossConfig`.
        metrics: The sums from which metrics are logged.
        thresholds: With `multi_label`, the threshold of each class from the last validation; None before one.
        guidance: The guidance of the routers towards `loss.super_classes`; None without them.
        guard: The guard of `vmoe.NanGuard`; None without that callback.
        average: The average of the weights that `vmoe.Ema` keeps; None without that callback.
        routing: The sums that `vmoe.RoutingMonitor` reads; None without that callback.
        teacher: A teacher for knowledge distillation, or None.
        draws: Draws router noise and dropout per image, once it is installed in the model.
        shard: Shards the model over several ranks (see `vmoe.training.parallel.sharding.shard`).
        tested_split: The prefix of a test's metrics.
        facts: The facts on the run that checkpoints store; None lets this class find them (see `describe`).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = OptimConfig.lr,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        loss: LossConfig | dict[str, Any] | None = None,
        multi_label: bool | None = None,
        **optim: Any,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise UserError(f"model={model!r}: must be a model, such as vmoe.create_model and vmoe.load return")
        # `vmoe.load` returns models in evaluation mode, and Lightning keeps the mode
        self.model = model if model.training else model.train()
        if isinstance(lr, int | float):
            optim.setdefault("min_lr", min(OptimConfig.min_lr, lr))
        self.optim: OptimConfig = from_plain(OptimConfig, {"lr": lr, **optim})
        self.loss: LossConfig = from_plain(LossConfig, to_plain(loss or {}), "loss.").with_super_classes()
        guiding = self.loss.super_classes
        self.guidance = None if guiding is None else Guidance(guiding, self.model)
        self.class_names = None if class_names is None else [str(name) for name in class_names]
        self.mean, self.std = mean, std
        self.guard: Guard | None = None
        self.average: WeightAverage | None = None
        self.routing: RoutingSums | None = None
        self.teacher: Teacher | None = None
        self.draws: SampleDraws | None = None
        self.shard: Callable[[nn.Module], None] | None = None
        self.facts: ModelFacts | None = None
        self.tested_split = "test"
        count = 4 if self.guidance is None else 6
        self.train_sums = torch.zeros(count)
        self.evaluation_sums = torch.zeros(count)
        self.raw_sums = torch.zeros(count)  # for the weights themselves, if validation uses their average
        self.damaged: dict[str, None] = {}
        self._chooses_warmup = "warmup_epochs" not in optim
        self._logged_sums = torch.zeros(count)
        self._is_sharded = False
        self._found: ModelFacts | None = None  # found once per fit, for its checkpoints
        self._is_undescribed = False  # whether it is unknown how the model is built
        self._rates = LearningRates(self.optim)  # replaced in a fit, once its length is known
        self._schedule: RateSchedule | None = None  # a subclass may use another
        self._gradient_means: GradientMeans | None = None  # where Lightning's strategy does not average
        self._graphed_step: GraphedStep | None = None
        self._step_number = torch.zeros(())  # number of the update, which the CUDA graph reads
        self.thresholds: list[float] | None = None
        self._knows_labels = multi_label is not None
        self._set_labels(bool(multi_label) or self.loss.name in ("asymmetric", "focal"))
        options = to_plain(self.optim) | ({"warmup_epochs": None} if self._chooses_warmup else {})
        of_loss = {} if self.loss == LossConfig() else {"loss": to_plain(self.loss)}
        of_loss |= {"multi_label": multi_label} if multi_label else {}
        self.save_hyperparameters({**options, **of_loss, **_plain_description(model)})

    def _set_labels(self, multi_label: bool, counts: Callable[[], list[int]] | None = None) -> None:
        """Sets metrics and loss for one class per image, or for several. `counts` is None until a fit starts."""
        if multi_label:
            refuse_ensemble(self.model, "multi_label: an ensemble answers with the mean of softmax probabilities")
        self.multi_label = multi_label
        guided = SingleLabelMetrics() if self.guidance is None else GuidedMetrics(self.guidance)
        self.metrics: LabelMetrics = MultiLabelMetrics() if multi_label else guided
        self._label_loss = LabelLoss(self.loss, self.optim.label_smoothing, counts, multi_label)

    @property
    def lr(self) -> float:
        """The highest learning rate. Setting it also lowers a `min_lr` above it; the next fit uses the new value.

        Lightning's `Tuner.lr_find` sets it.
        """
        return self.optim.lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self.optim = replace(self.optim, lr=lr, min_lr=min(self.optim.min_lr, lr))
        self.hparams.update(lr=lr, min_lr=self.optim.min_lr)

    # One step of training, from top to bottom

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = Batch.of(batch, self.multi_label)
        self.damaged.update(dict.fromkeys(batch.damaged))
        if self._graphed_step is None:
            return self._loss(batch) * self._share(batch_idx)
        self._step_number.fill_(self.global_step)
        return self._graphed_step(batch)

    def _loss(self, batch: Batch) -> Tensor:
        """The loss of a batch, (). Also adds the batch to the sums."""
        if self.draws is not None:
            self.draws.keys = batch.keys
        logits = self.model(batch.images)
        members = ensemble_size(self.model)
        labels = of_rows(batch.labels, members)
        targets = None if batch.targets is None else of_rows(batch.targets, members)
        loss = self._label_loss(logits, labels, targets)
        learnt = loss if self.teacher is None else self.teacher.mixed_into(loss, batch.images, logits)
        total_loss = learnt + auxiliary_loss(self.model)
        if self.guidance is not None:
            total_loss = total_loss + self.loss.guidance_weight * self.guidance.loss(labels, targets)
        if self.guard is not None:
            self.guard.watch_forward(batch.images, total_loss)
        sums = self.metrics.train_sums(logits, labels, loss)
        self.train_sums += sums if members == 1 else sums / members
        if self.routing is not None:
            self.routing.update(self.model)
        return total_loss

    def _share(self, batch_idx: int) -> float:
        """The factor that makes an update the mean over its batches.

        Lightning divides by `accumulate` even if an epoch's last update has fewer batches.
        """
        most, batches = self.trainer.accumulate_grad_batches, self.trainer.num_training_batches
        return 1.0 if math.isinf(batches) else most / min(most, batches - batch_idx // most * most)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradients. The guard blocks the update if the gradients or the loss are not finite.

        The Trainer's `gradient_clip_val` overrides `clip_norm`.
        """
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:  # Lightning leaves this to fused optimisers, but they would unscale after the clipping
            scaler.unscale_(optimizer)
        if gradient_clip_val is not None and gradient_clip_algorithm == "value":
            norm = self._clip(optimizer, math.inf)
            nn.utils.clip_grad_value_(
                [p for group in optimizer.param_groups for p in group["params"]], gradient_clip_val
            )
        else:
            norm = self._clip(optimizer, gradient_clip_val or self.optim.clip_norm or math.inf)
        if self.guard is not None:
            self.guard.check_update(optimizer, norm, self.global_step, scaler)

    def _clip(self, optimizer: torch.optim.Optimizer, largest_norm: float) -> Tensor:
        """Clips the gradients and returns their norm before that, ()."""
        if self._gradient_means is not None:
            self._gradient_means.finish()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._is_sharded:
            return clip_gradients(parameters, largest_norm)
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        scale_down(parameters, largest_norm, norm)
        return norm

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = build_optimizer(self.model, self.optim)
        optimizer.register_step_post_hook(lambda optimizer, *_: self._after_update(optimizer))
        self._rates = planned_rates(self._trainer, self.optim, self._chooses_warmup)
        self.optim = self._rates.config
        self._schedule = RateSchedule(optimizer, lambda: self._rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule, "interval": "step"}}

    def _after_update(self, optimizer: torch.optim.Optimizer) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # () 1 where the update was blocked
        for _, layer in moe_layers(self.model):
            if isinstance(layer.router, SigmoidRouter):
                # a blocked update must change nothing: without choices the biases stay as they are
                counts = 1 if found_inf is None else 1 - found_inf
                layer.router.choices.copy_(total(layer.router.choices) * counts)
        update_router_biases(self.model)
        if self.average is not None:
            self.average.update(found_inf)

    def rate(self, step: int) -> float:
        """The learning rate of update `step`, 0-based."""
        return self._rates.rate(step, () if self._schedule is None else self._schedule.falls)

    # The same step as a CUDA graph

    def capture_steps(self) -> None:
        """Makes each step a CUDA graph, the update included. Then every batch is one update."""
        self._graphed_step = GraphedStep(self._whole_step)

    def _whole_step(self, batch: Batch) -> Tensor:
        """The captured part: all that Lightning would do with a batch, the update included, without the host."""
        optimizer = self.optimizers(use_pl_optimizer=False)
        vars(optimizer).pop("found_inf", None)  # the last step's flag: the graph must not read its memory
        optimizer.zero_grad()
        kind = self.device.type
        is_mixed, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            batch = self.trainer.datamodule.made(batch)
        with torch.autocast(kind, dtype, enabled=is_mixed, cache_enabled=False):  # a graph must not keep casts
            loss = self._loss(batch)
        with torch.autocast(kind, enabled=False):
            loss.backward()
            norm = self._clip(optimizer, self.optim.clip_norm or math.inf)
            if self.guard is not None:
                self.guard.check_update(optimizer, norm, self._step_number)
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

    # Evaluation and prediction

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images -> (B, C) logits."""
        return self.model(images)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch = Batch.of(batch, self.multi_label)
        if self.average is None:
            self.evaluation_sums += self._evaluated(batch)
            return
        if not self.multi_label:
            self.raw_sums += self._evaluated(batch)
        with self.average.applied():
            self.evaluation_sums += self._evaluated(batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Evaluates a batch with the model's current weights, never with their average."""
        self.evaluation_sums += self._evaluated(Batch.of(batch, self.multi_label))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """(B, C) float32 probabilities of a batch: images, [images] or (images, labels).

        With `multi_label` they are independent per class; else they sum to 1.
        """
        if isinstance(batch, list | tuple) and len(batch) == 1:
            (batch,) = batch
        images = batch if isinstance(batch, Tensor) else Batch.of(batch, self.multi_label).images
        logits = self.model(images).float()
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    def _evaluated(self, batch: Batch) -> Tensor:
        return self.metrics.evaluation_sums(self.model(batch.images), batch.labels)

    # Metrics

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer = self.trainer
        done = batch_idx + 1
        is_update = done % trainer.accumulate_grad_batches == 0 or done == trainer.num_training_batches
        is_shown = bool(trainer.loggers) or trainer.progress_bar_callback is not None
        if is_shown and is_update and trainer.log_every_n_steps and self.global_step % trainer.log_every_n_steps == 0:
            means = self.metrics.train_means(total(self.train_sums - self._logged_sums))
            self._logged_sums = self.train_sums.clone()
            self.log_dict({f"train/{name}_step": value for name, value in means.items()}, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        self._log_epoch(self.train_metrics())

    def on_validation_epoch_end(self) -> None:
        metrics = self.evaluation_metrics("val")
        self._log_epoch(metrics)
        is_training = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        if is_training and self._schedule is not None and self.optim.schedule == "plateau":
            self._schedule.observe(metrics["val/loss"], self.optim)
        if isinstance(self.metrics, MultiLabelMetrics) and getattr(self.trainer.datamodule, "has_validation", True):
            self.thresholds = self.metrics.thresholds()

    def on_test_epoch_end(self) -> None:
        self._log_epoch(self.evaluation_metrics(self.tested_split))

    def _log_epoch(self, metrics: dict[str, float]) -> None:
        """Logs means over all ranks. They are the same on each rank."""
        self.log_dict(metrics, prog_bar=True, sync_dist=not is_alone())

    def train_metrics(self) -> dict[str, float]:
        """Mean loss (with label smoothing, without auxiliary losses) and accuracy over this epoch's training images."""
        return {f"train/{name}": value for name, value in self.metrics.train_means(total(self.train_sums)).items()}

    def train_images(self) -> int:
        """Training images of this epoch so far, of all ranks."""
        return int(total(self.train_sums)[-1])

    def evaluation_metrics(self, split: str) -> dict[str, float]:
        """Mean cross-entropy, top-1 and top-5 accuracy of the last validation or test.

        With `multi_label`: mean binary cross-entropy, mAP and F1. If validation used the average of the weights, the
        accuracy of the weights themselves is included.
        """
        metrics = {f"{split}/{name}": value for name, value in self.metrics.means(total(self.evaluation_sums)).items()}
        if split != "val" or self.average is None or self.multi_label:
            return metrics
        return metrics | {RAW_TOP1: self.metrics.train_means(total(self.raw_sums))["top1"]}

    def validation_metrics(self) -> dict[str, float]:
        """The metrics of the last validation; empty if the data have no validation images."""
        return self.evaluation_metrics("val") if self.trainer.datamodule.has_validation else {}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            return
        # Not at the epoch's start: Lightning does not call that hook for the epoch after a resumed one's last batch
        self.train_sums.zero_()
        self._logged_sums.zero_()
        if self.routing is not None:
            self.routing.reset()

    def on_validation_epoch_start(self) -> None:
        self._move_sums()
        self.evaluation_sums.zero_()
        self.raw_sums.zero_()
        self.metrics.begin()

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def _move_sums(self) -> None:
        # Doubles keep sums over a million images exact to the digits shown. Apple's GPUs have no doubles.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        with torch.inference_mode(False):  # so that training can change sums that an earlier evaluation made
            for name in ("train_sums", "_logged_sums", "evaluation_sums", "raw_sums"):
                setattr(self, name, getattr(self, name).to(self.device, dtype))
            self._step_number = self._step_number.to(self.device)
            for part in (self.average, self.teacher, self.routing, self.guard, self._label_loss, self.guidance):
                if part is not None:
                    part.to(self.device)

    # The beginning and the end

    def setup(self, stage: str) -> None:
        """Drops the parts that callbacks of another Trainer have set, and facts found from other data."""
        held = [value for callback in self.trainer.callbacks for value in vars(callback).values()]
        for name in ("guard", "average", "routing"):
            if not any(value is getattr(self, name) for value in held):
                setattr(self, name, None)
        if stage == "fit":
            self._found, self._is_undescribed = None, False
        is_multi_label = self.multi_label
        if not self._knows_labels:
            is_multi_label = getattr(self.trainer.datamodule, "multi_label", is_multi_label)
        if stage == "fit" or is_multi_label != self.multi_label:
            self._set_labels(is_multi_label, self._class_counts if stage == "fit" else None)
        if self.guidance is not None:
            self.guidance.match(self._known_class_names())

    def _known_class_names(self) -> Sequence[str]:
        """The names of the classes, which super-classes are matched by.

        Raises:
            UserError: They are recorded nowhere.
        """
        for names in (
            self.class_names,
            *(getattr(at, "class_names", None) for at in (self.trainer.datamodule, self.model)),
        ):
            if names is not None:
                return names
        raise UserError("loss.super_classes: needs the names of the classes; give Classifier(class_names=...)")

    def _class_counts(self) -> list[int]:
        """The number of training images of each class. If they are unknown but the weights are given, all are 1.

        Raises:
            UserError: They are unknown, and the loss needs them.
        """
        data = self.trainer.datamodule
        if hasattr(data, "images_of_classes"):
            return data.images_of_classes("train")
        if isinstance(self.loss.class_weights, list) and not self.loss.logit_adjustment:
            return [1] * getattr(self.model, "num_classes", len(self.loss.class_weights))
        raise UserError(
            "loss: class_weights and logit_adjustment need the number of training images of each class, which a "
            "datamodule gives by images_of_classes; take vmoe.ImageDataModule, or give class_weights as a list"
        )

    def configure_model(self) -> None:
        if self.shard is not None:
            self.shard(self.model)
            self.shard, self._is_sharded = None, True  # frees `shard`, which may hold a whole model
            if self.average is not None:
                self.average = WeightAverage(self.model, self.average.decay)

    def on_train_start(self) -> None:
        validates = self.trainer.enable_validation and getattr(self.trainer.datamodule, "has_validation", True)
        if self.optim.schedule == "plateau" and self._schedule is not None and not validates:
            raise UserError(
                "schedule=plateau: waits for a lower val/loss, and there is no validation; give the Trainer a loader "
                "for it, or take another schedule"
            )
        self._move_sums()
        if is_linear_probe(self.model):
            put_in_training_mode(self.model)
        is_graphed = self._graphed_step is not None
        if (self._is_sharded or is_graphed) and not is_alone():
            self._gradient_means = GradientMeans(self.model.parameters(), self.trainer.accumulate_grad_batches == 1)
        schedule = self._schedule
        optimizers = self.trainer.optimizers
        if optimizers and (schedule is None or all(schedule.optimizer is not each for each in optimizers)):
            # a subclass has an optimiser of its own
            optimizers[0].register_step_post_hook(lambda optimizer, *_: self._after_update(optimizer))
        if all(each.scheduler is not schedule for each in self.trainer.lr_scheduler_configs):
            return
        for group, highest in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
            # from this run's schedule: the resumed run may have had fewer epochs
            rate = highest * (self.rate(schedule.last_epoch) / self._rates.config.lr)
            # a CUDA graph reads the rate from a tensor that the schedule updates; without a graph a number is enough
            group["lr"] = torch.tensor(rate, device=self.device) if is_graphed else rate
            group["capturable"] = is_graphed

    def on_train_end(self) -> None:
        for _, layer in moe_layers(self.model):
            layer.last_auxiliary_loss = None  # with FSDP2 its graph holds the model: a cycle that is never freed
        self._graphed_step = None  # before the ranks disconnect: NCCL's communicators wait for graphs that hold them
        if self._gradient_means is not None:
            self._gradient_means.remove()
            self._gradient_means = None

    # Checkpoints

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        *,
        strict: bool | None = None,
        weights_only: bool | None = None,
        model: nn.Module | None = None,
        **changes: Any,
    ) -> "Classifier":
        """The Classifier of a checkpoint, with its model, options and weights (their average if it holds one).

        Args:
            checkpoint_path: A .ckpt file of a Classifier, a run's folder, or a file of `vmoe.save`.
            map_location: The device to load to; None is the CPU.
            strict: Whether the weights' names must match `model` and a subclass's other modules; False ignores
                mismatches. None means True.
            weights_only: Accepted as in Lightning. Loading never runs code from a file.
            model: For a file of weights alone: a model of the same architecture, to be filled.
            **changes: Options to change, such as `lr`. A `min_lr` of the file above a new `lr` is lowered to it.

        Raises:
            UserError: The file is missing or damaged, its weights do not fit, or it does not describe its model and
                `model` is not given.
        """
        return restored(cls, checkpoint_path, torch.device(map_location or "cpu"), model, strict is not False, changes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what rebuilds the model, in this package's format. Entries of callbacks stay."""
        if self.facts is None and self._found is None and not self._is_undescribed:
            sections = {"optim": to_plain(self.optim), "loss": to_plain(self.loss)}
            if self._chooses_warmup:  # it depends on the epochs of this fit; another fit chooses again
                del sections["optim"]["warmup_epochs"]
            given = {"class_names": self.class_names, "mean": self.mean, "std": self.std}
            self._found = found_facts(self.model, self.trainer.datamodule, given, sections)
            self._is_undescribed = self._found is None
        facts = self.facts or self._found
        if facts is not None and self.multi_label:
            facts = replace(facts, multi_label=True, thresholds=self.thresholds)
        put_model(checkpoint, facts, epochs_done(self.trainer))
        put_average(checkpoint, None if self.average is None else self.average.state())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.thresholds = checkpoint.get(ENTRY, {}).get("thresholds")
        if type(self).configure_optimizers is not Classifier.configure_optimizers:
            return  # Lightning loads the states of a subclass's optimiser
        groups = optimizer_groups(self.model, self.optim)
        for schedule in checkpoint.get("lr_schedulers", ()):  # the saved run may have had other groups
            schedule["base_lrs"] = [group["lr"] for group in groups]
        if not self._is_sharded and "optimizer_states" in checkpoint:  # with shards the strategy loads them
            states = [by_number(state, self.optimizer_names(), groups) for state in checkpoint["optimizer_states"]]
            checkpoint["optimizer_states"] = states

    def optimizer_names(self) -> list[str]:
        """The parameters' names, in the order of an optimiser for the model without shards."""
        names = {parameter: name for name, parameter in self.named_parameters()}
        return [names[p] for group in parameter_groups(self.model, self.optim) for p in group["params"]]

    def running_state(self) -> dict[str, Any]:
        """The sums of an unfinished epoch over all ranks, as tensors on the CPU."""
        routing = {} if self.routing is None else self.routing.state()
        return {"train_sums": total(self.train_sums).cpu(), "routing": routing}

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Goes on with the sums of all ranks: in the first, so that they count once."""
        share = 0 if rank_of_all()[0] else 1
        self.train_sums = state["train_sums"].to(self.train_sums.device) * share
        if self.routing is not None:
            self.routing.load_state(state["routing"])


def epochs_done(trainer: Trainer) -> int:
    """The number of a Trainer's epochs in which all batches are done."""
    progress = trainer.fit_loop.epoch_progress.current
    is_through = trainer.fit_loop.epoch_loop.batch_progress.current.ready >= trainer.num_training_batches
    return progress.completed + (progress.started > progress.completed and is_through)


def _plain_description(model: nn.Module) -> dict[str, Any]:
    """A model's description for loggers, in plain types."""
    layers = moe_layers(model)
    return {"model": type(model).__name__, "moe": to_plain(layers[0][1].config) if layers else None}
