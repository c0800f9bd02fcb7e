"""The config of a training run: every option of a recipe, typed, documented and checked."""

import os
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vmoe.data import DataConfig
from vmoe.data.super_classes import read_super_classes
from vmoe.moe import MoeConfig


@dataclass(frozen=True)
class ModelConfig:
    """The backbone: a timm model, in which `moe` replaces some MLPs.

    Args:
        name: Name of a timm model, such as vit_tiny_patch16_224.
        kwargs: Arguments of that timm model: depth, embed_dim, patch_size, drop_path_rate, proj_drop_rate, ...
            The number of classes and the image size come from the data.
        moe_drop_path: Drop path rate of the MoE layers alone (the second branch of their blocks); null takes the
            backbone's rate. It has no effect on the dense twin.
    """

    name: str = "vit_tiny_patch16_224"
    kwargs: dict[str, Any] = field(default_factory=dict)
    moe_drop_path: float | None = None

    def __post_init__(self) -> None:
        if isinstance(path := self.kwargs.get("checkpoint_path"), str):
            object.__setattr__(self, "kwargs", self.kwargs | {"checkpoint_path": os.path.expanduser(path)})
        rate = self.moe_drop_path
        _need(self, "moe_drop_path", rate is None or 0 <= rate < 1, "in [0, 1), or null")
        for key, source in (
            ("num_classes", "the data set"),
            ("img_size", "data.image_size"),
            ("in_chans", "data.channels"),
        ):
            if key in self.kwargs:
                raise ValueError(f"kwargs.{key}={self.kwargs[key]!r}: must be left out, {source} gives it")
        for key, value in self.kwargs.items():
            if key.endswith("_rate") and not (isinstance(value, int | float) and 0 <= value < 1):
                raise ValueError(f"kwargs.{key}={value!r}: must be in [0, 1)")


SCHEDULES = ("cosine", "constant", "step", "plateau", "warmup_stable_decay", "one_cycle")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser with linear warm-up, then a schedule.

    Args:
        name: adamw; muon: Muon for the matrices of linear layers and experts, AdamW for all else; or timm:NAME, one of
            timm's optimisers, such as timm:lion.
        kwargs: Further arguments of timm's optimiser, such as {betas: [0.9, 0.99]}.
        lr: Highest learning rate, reached at the end of the warm-up. With muon it is that of the matrices.
        adamw_lr: With muon, the highest learning rate of the parameters that AdamW trains; null is lr.
        min_lr: Lowest learning rate after the warm-up, at the end of a cosine. Parameters with another highest rate
            fall by the same factor. Not for schedule=constant.
        schedule: After the warm-up: cosine, half a cosine down to min_lr; constant; step, down by decay_rate every
            decay_epochs; plateau, down by decay_rate when val/loss has not fallen for patience_epochs;
            warmup_stable_decay, constant, then linear to min_lr over the last decay_epochs; one_cycle, a warm-up by
            half a cosine up from lr / 25 (Smith and Topin 2018), then a cosine.
        decay_epochs: With step, the epochs between two falls, counted from the run's start; null is a third of the run.
            With warmup_stable_decay, the epochs of the last fall; null is a fifth of the run.
        decay_rate: With step and plateau, the factor by which the learning rate falls.
        patience_epochs: With plateau, the epochs without a lower val/loss before the learning rate falls; the count
            then starts again.
        warmup_epochs: Length of the linear warm-up in epochs; a fraction is allowed.
        weight_decay: Decoupled weight decay of matrices; biases, norms and position embeddings have none.
        expert_weight_decay: Weight decay of the routed experts' matrices; null is weight_decay.
        layer_decay: For fine-tuning: a factor on the learning rate per layer, from the classifier down; null gives all
            layers the same rate.
        betas: AdamW's decay rates of the gradient's first and second moment.
        clip_norm: Gradients are scaled down to this norm; null never clips.
        label_smoothing: Share of the target that is spread over all classes in training.
    """

    name: str = "adamw"
    kwargs: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-3
    adamw_lr: float | None = None
    min_lr: float = 1e-5
    schedule: Literal["cosine", "constant", "step", "plateau", "warmup_stable_decay", "one_cycle"] = "cosine"
    decay_epochs: float | None = None
    decay_rate: float = 0.1
    patience_epochs: int = 5
    warmup_epochs: float = 5.0
    weight_decay: float = 0.05
    expert_weight_decay: float | None = None
    layer_decay: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = 1.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _need(self, "name", self.name in ("adamw", "muon") or self.is_of_timm, "adamw, muon or timm:NAME")
        _need(self, "kwargs", self.is_of_timm or not self.kwargs, "empty with adamw and muon, which have their options")
        _need(self, "lr", 0 < self.lr < float("inf"), "above 0 and finite")
        _need(
            self, "adamw_lr", self.adamw_lr is None or 0 < self.adamw_lr < float("inf"), "above 0 and finite, or null"
        )
        why_none = f"null with name={self.name}, which takes lr={self.lr}"
        _need(self, "adamw_lr", self.adamw_lr is None or self.name == "muon", why_none)
        _need(self, "min_lr", 0 <= self.min_lr <= self.lr, f"between 0 and lr={self.lr}")
        self._check_schedule()
        _need(self, "warmup_epochs", 0 <= self.warmup_epochs < float("inf"), ">= 0 and finite")
        _need(self, "weight_decay", 0 <= self.weight_decay < float("inf"), ">= 0 and finite")
        decay = self.expert_weight_decay
        _need(self, "expert_weight_decay", decay is None or 0 <= decay < float("inf"), ">= 0 and finite, or null")
        _need(self, "layer_decay", self.layer_decay is None or 0 < self.layer_decay <= 1, "in (0, 1], or null")
        has_betas = not self.is_of_timm or self.betas == OptimConfig.betas
        _need(self, "betas", has_betas, f"left out with name={self.name}; give kwargs.betas where it takes them")
        _need(
            self, "betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"
        )
        _need(
            self,
            "clip_norm",
            self.clip_norm is None or 0 < self.clip_norm < float("inf"),
            "above 0 and finite, or null",
        )
        _need(self, "label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")

    def _check_schedule(self) -> None:
        _need(self, "schedule", self.schedule in SCHEDULES, " or ".join(SCHEDULES))
        decay = self.decay_epochs
        _need(self, "decay_epochs", decay is None or 0 < decay < float("inf"), "above 0 and finite, or null")
        _need(self, "decay_rate", 0 < self.decay_rate < 1, "between 0 and 1")
        _need(self, "patience_epochs", self.patience_epochs >= 1, "a whole number >= 1")
        for name, of in (
            ("decay_epochs", ("step", "warmup_stable_decay")),
            ("decay_rate", ("step", "plateau")),
            ("patience_epochs", ("plateau",)),
        ):
            is_used = self.schedule in of or getattr(self, name) == getattr(OptimConfig, name)
            _need(self, name, is_used, f"left out with schedule={self.schedule}; it is for {' and '.join(of)}")

    @property
    def is_of_timm(self) -> bool:
        """Whether the optimiser is one of timm's."""
        return self.name.startswith("timm:")


@dataclass(frozen=True)
class LossConfig:
    """The training loss by the labels. Validation and test always measure plain cross-entropy.

    Args:
        name: cross_entropy, of the softmax over all classes; bce, binary cross-entropy of each class, as timm's
            --bce-loss; for images of several classes also asymmetric (Ridnik et al. 2021) or focal (Lin et al. 2017).
            null is cross_entropy, and bce where images have several classes.
        class_weights: Weight of an image by its class: balanced, the inverse of the class's number of training images;
            auto, the inverse of its effective number (Cui et al. 2019), which is milder; or a list of a weight per
            class. They are scaled to a mean of 1 over the training images. null weights all images equally.
        effective_beta: With class_weights=auto, beta of the effective number (1 - beta^n) / (1 - beta) of n images.
            Values closer to 1 are closer to balanced.
        logit_adjustment: With cross_entropy, the factor on the logarithm of a class's share of the training images that
            is added to its logit in training (Menon et al. 2021 use 1); 0 adds nothing.
        gamma: With focal, how strongly the loss concentrates on wrong predictions; 0 is bce.
        gamma_neg: With asymmetric, the same for classes that an image does not have.
        gamma_pos: With asymmetric, the same for classes that an image has.
        clip: With asymmetric, the probability up to which a class that an image does not have costs nothing.
        super_classes: Guides the router of moe.route=image, which then has one expert per super-class (Daxberger et al.
            2023): a YAML or JSON file with the super-class of each class, such as `vmoe super-classes` writes, or
            cifar100 for its 20 coarse classes. A run keeps the content of the file. null guides nothing.
        guidance_weight: Weight of the router's cross-entropy against the super-class of the label.
    """

    name: Literal["cross_entropy", "bce", "asymmetric", "focal"] | None = None
    class_weights: Literal["auto", "balanced"] | list[float] | None = None
    effective_beta: float = 0.999
    logit_adjustment: float = 0.0
    gamma: float = 2.0
    gamma_neg: float = 4.0
    gamma_pos: float = 1.0
    clip: float = 0.05
    super_classes: str | dict[str, Any] | None = None
    guidance_weight: float = 0.3

    def __post_init__(self) -> None:
        _expand_home(self, "super_classes")
        names = (None, "cross_entropy", "bce", "asymmetric", "focal")
        _need(self, "name", self.name in names, "cross_entropy, bce, asymmetric, focal or null")
        weights = self.class_weights
        if isinstance(weights, list):
            is_allowed = all(0 <= weight < float("inf") for weight in weights) and any(weights)
            _need(self, "class_weights", is_allowed, "finite and >= 0 for each class, and above 0 for one")
        else:
            is_known = weights in (None, "auto", "balanced")
            _need(self, "class_weights", is_known, "auto, balanced, a list of a weight per class, or null")
        _need(self, "effective_beta", 0 <= self.effective_beta < 1, "in [0, 1)")
        has_effect = weights == "auto" or self.effective_beta == LossConfig.effective_beta
        _need(self, "effective_beta", has_effect, "left out without class_weights=auto")
        _need(self, "logit_adjustment", 0 <= self.logit_adjustment < float("inf"), ">= 0 and finite")
        for option, loss in (
            ("gamma", "focal"),
            *((each, "asymmetric") for each in ("gamma_neg", "gamma_pos", "clip")),
        ):
            value = getattr(self, option)
            has_effect = self.name == loss or value == getattr(LossConfig, option)
            _need(self, option, has_effect, f"left out without name={loss}")
            if option == "clip":
                _need(self, option, 0 <= value < 1, "in [0, 1)")
            _need(self, option, 0 <= value < float("inf"), ">= 0 and finite")
        weight = self.guidance_weight
        _need(self, "guidance_weight", 0 < weight < float("inf"), "above 0 and finite")
        is_used = self.super_classes is not None or weight == LossConfig.guidance_weight
        _need(self, "guidance_weight", is_used, "left out without super_classes")
        has_softmax = not self.logit_adjustment or self.name in (None, "cross_entropy")
        _need(self, "logit_adjustment", has_softmax, f"0 with name={self.name}")

    def with_super_classes(self) -> "LossConfig":
        """The same loss with the content of the file of super-classes, so that nothing needs the file again.

        Raises:
            UserError: The file cannot be read, or is not of its form.
        """
        if not isinstance(self.super_classes, str) or self.super_classes == "cifar100":
            return self
        return replace(self, super_classes=read_super_classes(self.super_classes))

    @property
    def counts_classes(self) -> bool:
        """Whether the loss needs the number of training images of each class."""
        return self.class_weights is not None or self.logit_adjustment > 0


# Lightning's names -> ours
_LIGHTNING_PRECISIONS = {"32-true": "32", "bf16-mixed": "bf16", "16-mixed": "fp16"}


LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")


def logger_options(loggers: list[str | dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options of each logger of `TrainerConfig.loggers`, by its name."""
    named = [each if isinstance(each, dict) else {each: {}} for each in loggers]
    return {name: dict(options or {}) for each in named for name, options in each.items()}


@dataclass(frozen=True)
class TrainerConfig:
    """The training loop: epochs, device, precision, logging.

    Args:
        epochs: Passes over the training set.
        device: Where to train; auto takes an NVIDIA or AMD GPU when there is one, mps is Apple's.
        precision: 32, or mixed precision with bf16 or fp16 (a GPU; with loss scaling). The router is float32 in all.
            Lightning's 32-true, bf16-mixed and 16-mixed mean the same.
        accumulate: Number of batches per update; their gradients are averaged.
        compile: Compile the model with torch.compile.
        grad_checkpointing: Compute the activations of each block again in the backward pass instead of keeping them:
            less memory for about a third more time, with the same results.
        cuda_graph: Capture the whole step, the update included, as one CUDA graph. It saves host time with small
            models. Turned off on a CPU.
        ema_decay: Decay per update of an average of the weights (EMA), which validation, test and the best checkpoint
            use; at update t at most (1 + t) / (10 + t). null keeps no average.
        early_stopping: Stop after this many epochs without a better val/top1 (val/mAP with several classes per image),
            or an equal one with a lower val/loss; null never stops early. Needs images for validation.
        loggers: Where metrics go: csv (metrics.csv, which is always written), tensorboard, wandb, mlflow; each a name,
            or a name with the options of Lightning's logger, such as [csv, {wandb: {project: digits}}].
        log_every: Steps between two reads from the device: of the bar's loss, and of the flag for NaN or inf.
    """

    epochs: int = 20
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: str | int = "32"
    accumulate: int = 1
    compile: bool = False
    grad_checkpointing: bool = False
    cuda_graph: bool = False
    ema_decay: float | None = None
    early_stopping: int | None = None
    loggers: list[str | dict[str, Any]] = field(default_factory=lambda: ["csv", "tensorboard"])
    log_every: int = 50

    def __post_init__(self) -> None:
        _need(self, "epochs", self.epochs >= 1, "a whole number >= 1")
        _need(self, "device", self.device in ("auto", "cpu", "cuda", "mps"), "auto, cpu, cuda or mps")
        precision = str(self.precision)  # YAML reads 32 as a number
        object.__setattr__(self, "precision", _LIGHTNING_PRECISIONS.get(precision, precision))
        _need(self, "precision", self.precision in ("32", "bf16", "fp16"), "32, bf16 or fp16")
        needs_cuda = self.device in ("cpu", "mps") and self.precision == "fp16"
        _need(self, "precision", not needs_cuda, f"32 or bf16 with device={self.device}")
        _need(self, "accumulate", self.accumulate >= 1, "a whole number >= 1")
        _need(self, "cuda_graph", not self.cuda_graph or self.precision != "fp16", "false with precision=fp16")
        accumulates = self.cuda_graph and self.accumulate > 1
        _need(self, "cuda_graph", not accumulates, f"false with accumulate={self.accumulate}")
        keeps = not (self.cuda_graph and self.grad_checkpointing)
        _need(self, "cuda_graph", keeps, "false with grad_checkpointing, which reads random numbers' state")
        _need(self, "ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "in (0, 1), or null")
        _need(self, "early_stopping", self.early_stopping is None or self.early_stopping >= 1, ">= 1, or null")
        names = ", ".join(LOGGERS)
        is_each_one = all(isinstance(each, str) or len(each) == 1 for each in self.loggers)
        is_known = is_each_one and set(logger_options(self.loggers)) <= set(LOGGERS)
        _need(self, "loggers", is_known, f"a list of {names}, each a name or a name with its options")
        options = logger_options(self.loggers)
        _need(self, "loggers", not (options.get("csv") or options.get("tensorboard")), "without options of these two")
        _need(self, "log_every", 1 <= self.log_every <= 50, "from 1 to 50, so that a broken run stops soon")


@dataclass(frozen=True)
class ParallelConfig:
    """Training on several ranks, started by torchrun, srun or mpirun.

    `data.batch_size` is that of all ranks together, and learning rates do not change. A single process ignores this
    section.

    Args:
        strategy: none, one process. ddp: each rank has the whole model and a part of every batch. fsdp: also the
            weights, gradients and the optimiser's state are sharded. expert: the experts of a layer are on different
            ranks, and tokens are sent to them. auto: the strategy, with its expert_size and dense, for which the
            planner (`vmoe plan`) expects the shortest step.
        expert_size: With strategy=expert, the number of ranks over which the experts of a layer are sharded. Each
            shard is sharded further over the groups of that many ranks.
        dense: With strategy=expert, all parameters except the experts: "shard" shards them as fsdp does; "whole" keeps
            them on each rank as ddp does, which takes more memory and gathers nothing.
        draws: Router noise and dropout: with "process" each rank draws its own; with "sample" they are drawn per image,
            so results do not depend on the number of ranks, but steps are slower.
        async_save: With fsdp and expert, training continues while a checkpoint is written. Meanwhile the host's memory
            holds a copy of it. A run ends when its last checkpoint is written.
    """

    strategy: Literal["auto", "none", "ddp", "fsdp", "expert"] = "none"
    expert_size: int = 1
    dense: str = "shard"
    draws: Literal["process", "sample"] = "process"
    async_save: bool = False

    def __post_init__(self) -> None:
        allowed = ("auto", "none", "ddp", "fsdp", "expert")
        _need(self, "strategy", self.strategy in allowed, "auto, none, ddp, fsdp or expert")
        _need(self, "expert_size", self.expert_size >= 1, "a whole number >= 1")
        only = self.expert_size == 1 or self.strategy == "expert"
        _need(self, "expert_size", only, f"1 with strategy={self.strategy}")
        object.__setattr__(self, "dense", "shard" if self.dense == "cut" else self.dense)  # its name in older configs
        _need(self, "dense", self.dense in ("shard", "whole"), "shard or whole")
        where = f"expert_size={self.expert_size}" if self.strategy == "expert" else f"strategy={self.strategy}"
        _need(self, "dense", self.dense == "shard" or self.expert_size > 1, f"shard with {where}")
        _need(self, "draws", self.draws in ("process", "sample"), "process or sample")
        can_save_so = not self.async_save or self.strategy in ("fsdp", "expert")
        _need(self, "async_save", can_save_so, f"false with strategy={self.strategy}; it is for fsdp and expert")


@dataclass(frozen=True)
class DistillConfig:
    """Knowledge distillation: the run learns the predictions of a trained model, the teacher, beside the labels.

    Args:
        teacher: A checkpoint or run's folder, sparse or dense, for the same images and classes; null distils nothing.
        weight: Share of the loss that is the distance to the teacher's predictions; the rest is the loss by the labels.
        temperature: Both models' logits are divided by it before the softmax, or before the sigmoid where an image may
            have several classes.
    """

    teacher: str | None = None
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _expand_home(self, "teacher")
        for name, default in (("weight", 0.5), ("temperature", 1.0)):
            has_effect = self.teacher is not None or getattr(self, name) == default
            _need(self, name, has_effect, "left out without distill.teacher")
        _need(self, "weight", 0 < self.weight <= 1, "above 0 and at most 1")
        _need(self, "temperature", 0 < self.temperature < float("inf"), "above 0")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA): small matrices learn beside frozen weights. The files of the run hold both.

    Args:
        rank: Rank of each adapter, those of experts included; null adds none. With adapters all else is frozen, except
            the classifier and the routers.
        alpha: Adapters are multiplied by alpha / rank.
        targets: Which modules get adapters, of attention, mlp and experts; null is all of them that the model has.
    """

    rank: int | None = None
    alpha: float = 16.0
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        _need(self, "rank", self.rank is None or self.rank >= 1, "a whole number >= 1, or null")
        _need(self, "alpha", 0 < self.alpha < float("inf"), "above 0 and finite")
        known = ("attention", "mlp", "experts")
        is_known = self.targets is None or (bool(self.targets) and set(self.targets) <= set(known))
        _need(self, "targets", is_known, f"a list of {', '.join(known)}, or null")
        for name in ("alpha", "targets"):
            has_effect = self.rank is not None or getattr(self, name) == getattr(LoraConfig, name)
            _need(self, name, has_effect, "left out without finetune.lora.rank")


@dataclass(frozen=True)
class FinetuneConfig:
    """Which parts of a model learn, for fine-tuning from `init_from`.

    Args:
        freeze: Parts with frozen weights, one or a list of: experts, routers, backbone (all but the classifier, the
            experts and the routers), all_but_head (all but the classifier: a linear probe, with the rest in evaluation
            mode), or patterns of parameters' names, such as blocks.[0-5].*; null freezes nothing.
        unfreeze_epochs: Gradual unfreezing (Howard and Ruder 2018): the classifier learns alone in the first epoch,
            then layers join it from epoch to epoch, from the last one down, until all learn after so many epochs. With
            1 the classifier learns alone for an epoch, then all. null: all learn from the start.
        lora: Low-rank adapters.
    """

    freeze: list[str] | str | None = None
    unfreeze_epochs: int | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        _need(self, "freeze", self.freeze is None or len(self.freeze) > 0, "one or several words, or null")
        epochs = self.unfreeze_epochs
        _need(self, "unfreeze_epochs", epochs is None or epochs >= 1, "a whole number >= 1, or null")


@dataclass(frozen=True)
class TrainConfig:
    """Train a timm model, dense or with sparse MoE layers, and test its best checkpoint.

    Args:
        seed: Seed of everything random: weights, order, augmentation, router noise, dropout.
        output_dir: The run's folder; by default runs/ and the name of the config file, or of the images without one.
        resume: Go on with the run in output_dir from its last checkpoint, as if it had never stopped; "auto" starts a
            new run if there is none.
        init_from: Where a new run's weights start: a checkpoint or run's folder, a file of weights that timm wrote, a
            released model, a name of the hub or an address (docs/models.md), or "pretrained" for the weights that timm,
            or a released model, has by the model's name. Dense ones are upcycled where this run has MoE layers; the
            classifier starts fresh where the classes differ.
        data: The images.
        model: The backbone.
        moe: The MoE layers; null trains the dense twin.
        optim: The optimiser.
        loss: The loss by the labels.
        trainer: The loop.
        parallel: Several processes.
        distill: A teacher to learn from.
        finetune: Which parts learn.
    """

    seed: int = 0
    output_dir: str | None = None
    resume: bool | Literal["auto"] = False
    init_from: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoeConfig | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)

    def resolved(self) -> "TrainConfig":
        """The same config, with the router's defaults filled in where `moe` leaves them open."""
        return self if self.moe is None else replace(self, moe=self.moe.resolved())

    def __post_init__(self) -> None:
        for name in ("output_dir", "init_from"):
            _expand_home(self, name)
        _need(self, "resume", self.resume in (False, True, "auto"), "true, false or auto")
        _need(self, "seed", 0 <= self.seed < 2**32, "from 0 to 4294967295")
        if self.moe is not None and self.moe.inject_auxiliary_loss:
            raise ValueError("moe.inject_auxiliary_loss=True: must be false here, this trainer adds the loss itself")
        if self.moe is not None and self.moe.shared_router and self.trainer.grad_checkpointing:
            raise ValueError("trainer.grad_checkpointing=True: must be false with moe.shared_router")
        if self.loss.super_classes is not None and (self.moe is None or self.moe.route != "image"):
            found = "this model is dense" if self.moe is None else f"moe.route is {self.moe.route}"
            raise ValueError(f"loss.super_classes: guides a router of images, and {found}; give moe.route=image")
        if self.finetune.lora.rank is not None:
            if self.optim.name == "muon":
                raise ValueError("finetune.lora.rank: must be null with optim.name=muon, which is for whole matrices")
            if self.parallel.strategy in ("fsdp", "expert"):
                raise ValueError(f"finetune.lora.rank: must be null with parallel.strategy={self.parallel.strategy}")
        self._check_unfreezing()
        if self.parallel.strategy in ("fsdp", "expert"):
            why = f"with parallel.strategy={self.parallel.strategy}"
            if self.trainer.precision == "fp16":
                raise ValueError(f"trainer.precision=fp16: must be 32 or bf16 {why}")
            if self.optim.is_of_timm:
                raise ValueError(f"optim.name={self.optim.name}: must be adamw or muon {why}")
        if self.trainer.cuda_graph:
            if self.optim.is_of_timm:
                raise ValueError(f"trainer.cuda_graph=True: must be false with optim.name={self.optim.name}")
            if self.parallel.draws == "sample":
                raise ValueError("trainer.cuda_graph=True: must be false with parallel.draws=sample")
            if self.parallel.strategy == "fsdp":
                raise ValueError("trainer.cuda_graph=True: must be false with parallel.strategy=fsdp")
            if self.parallel.strategy == "expert" and self.parallel.dense == "shard":
                raise ValueError("trainer.cuda_graph=True: must be false with parallel.dense=shard; whole goes with it")
        if self.trainer.compile and self.parallel.draws == "sample":
            raise ValueError("trainer.compile=True: must be false with parallel.draws=sample")

    def _check_unfreezing(self) -> None:
        epochs = self.finetune.unfreeze_epochs
        if epochs is None:
            return
        option = f"finetune.unfreeze_epochs={epochs}"
        for name, value in (("compile", self.trainer.compile), ("cuda_graph", self.trainer.cuda_graph)):
            if value:
                raise ValueError(f"{option}: must be null with trainer.{name}=true, which fixes what learns")
        if self.parallel.strategy != "none":
            raise ValueError(f"{option}: must be null with parallel.strategy={self.parallel.strategy}")
        if epochs >= self.trainer.epochs:
            raise ValueError(
                f"{option}: must be below trainer.epochs={self.trainer.epochs}, so that all layers learn in the end"
            )


def _expand_home(config: Any, name: str) -> None:
    """Replaces a leading ~ of a path by the home folder; YAML does not."""
    path = getattr(config, name)
    object.__setattr__(config, name, os.path.expanduser(path) if isinstance(path, str) else path)


def _need(config: Any, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={getattr(config, name)!r}: must be {allowed}")
