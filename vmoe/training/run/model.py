"""The model of a run at its start, its costs, and the LightningModule that trains it."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from vmoe.checkpoints import ModelFacts, timm_arguments
from vmoe.checkpoints.state import SavedRun
from vmoe.compiling import mend_compiler
from vmoe.config_values import to_plain
from vmoe.data import ImageDataModule
from vmoe.errors import UserError
from vmoe.models.cost import check_training_capacity
from vmoe.models.freezing import freeze, is_linear_probe, layers_from_the_top
from vmoe.models.lora import add_lora
from vmoe.models.sources import architecture_of
from vmoe.moe.assignment import CapacityError
from vmoe.sizes import ImageSize, size_text
from vmoe.text import counted
from vmoe.training.classifier import Classifier
from vmoe.training.config import ModelConfig, TrainConfig
from vmoe.training.distillation import Teacher
from vmoe.training.parallel.collectives import together
from vmoe.training.parallel.process import Process
from vmoe.training.parallel.sample_draws import SampleDraws
from vmoe.training.parallel.sharding import shard_and_fill
from vmoe.training.parallel.strategies import sharding_of
from vmoe.training.run.initial import initial_model
from vmoe.training.run.summary import Cost, twin_cost

_MOST_TOKENS = 1024  # tokens per image without a warning on a CPU
ShardModel = Callable[[nn.Module], None]  # shards a model over the ranks


def built_model(config: TrainConfig, saved: SavedRun | None) -> ModelConfig:
    """The model by timm's own name and all arguments. These rebuild it even if its folder or hub entry is gone.

    Raises:
        UserError: They cannot be read.
    """
    if saved is None:
        name, kwargs = architecture_of(config.model.name, config.model.kwargs)
    else:
        built = saved.facts.by_architecture().config["model"]
        name, kwargs = built["name"], built["kwargs"]
    return dataclasses.replace(config.model, name=name, kwargs=timm_arguments(kwargs))


def start_model(
    config: TrainConfig, data: ImageDataModule, device: torch.device, log: Callable[[str], object]
) -> tuple[nn.Module, ShardModel | None]:
    """The model at its start, and the function that shards it, or None."""
    shard = sharding_of(config.parallel, Process.this().world_size, device.type)
    classes, size = list(data.class_names), data.image_size
    is_here = shard is None or Process.this().is_first
    model = together(lambda: initial_model(config, classes, size, log) if is_here else None)
    if shard is None:
        return model, None
    # only the first rank holds the whole model, in host memory
    fill = partial(shard_and_fill, shard=shard, source=model, device=device)
    with torch.device("meta"):
        return initial_model(dataclasses.replace(config, init_from=None), classes, size, log), fill


def costs_of(config: TrainConfig, model: nn.Module, data: ImageDataModule) -> tuple[Cost, Cost]:
    """The costs of the model and of its dense twin."""
    try:
        check_training_capacity(model, config.data.batch_size, data.image_size)
        cost = Cost.of(model, data.image_size)  # evaluates one image, the smallest group
    except CapacityError as error:
        raise UserError(f"moe.{error}", everywhere=True) from error
    return cost, twin_cost(config.model, data.num_classes, data.image_size, data.channels)


def many_tokens(model: nn.Module, image_size: ImageSize) -> str | None:
    """A warning if images have so many tokens that a CPU is slow, else None."""
    tokens = getattr(getattr(model, "patch_embed", None), "num_patches", 0)
    if tokens <= _MOST_TOKENS:
        return None
    return (
        f"warning: at {size_text(image_size)} pixels an image has {tokens:,} tokens, which is slow on a CPU; "
        "lower data.image_size, or raise model.kwargs.patch_size"
    )


def new_module(
    config: TrainConfig, model: nn.Module, shard: ShardModel | None, teacher: Teacher | None, facts: ModelFacts | None
) -> Classifier:
    """The module of a run. By the config it draws per image, captures its steps and compiles its model."""
    draws = SampleDraws(config.seed) if config.parallel.draws == "sample" else None
    if draws is not None:
        draws.install(model)
    _choose_what_learns(model, config)
    if config.trainer.grad_checkpointing:
        _checkpoint_blocks(model, config.model.name)
    multi_label = facts is not None and facts.multi_label
    module = Classifier(model, loss=config.loss, multi_label=multi_label, **to_plain(config.optim))
    module.facts, module.draws, module.shard, module.teacher = facts, draws, shard, teacher
    if config.trainer.cuda_graph:
        module.capture_steps()
    if config.trainer.compile:
        # in place, so that no weight's name changes; static, since a validation's smaller last batch would make torch
        # compile for any batch size, training included, in many small graphs
        mend_compiler()
        model.compile(dynamic=False)
    return module


def _choose_what_learns(model: nn.Module, config: TrainConfig) -> None:
    """Adds low-rank adapters and freezes what the config asks for."""
    lora, what = config.finetune.lora, config.finetune.freeze
    try:
        if lora.rank is not None:
            add_lora(model, lora.rank, lora.alpha, lora.targets)
    except ValueError as error:
        raise UserError(f"finetune.lora.{error}", everywhere=True) from error
    try:
        if what is not None:
            freeze(model, what)
    except ValueError as error:
        raise UserError(f"finetune.freeze={error}", everywhere=True) from error


def _checkpoint_blocks(model: nn.Module, name: str) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm raises these for families without checkpointing
        raise UserError(
            f"trainer.grad_checkpointing: timm has none for model.name={name}; leave it out", everywhere=True
        ) from error


def learning_line(model: nn.Module) -> str | None:
    """A line on how much of a model learns; None if all does."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, learning = sum(count for count, _ in counts), sum(count for count, learns in counts if learns)
    if learning == total:
        return None
    probe = ", the classifier alone: a linear probe" if is_linear_probe(model) else ""
    return f"learning: {learning:,} of {total:,} parameters{probe}"


def unfreezing_line(model: nn.Module, config: TrainConfig) -> str:
    """How a model is unfrozen.

    Raises:
        UserError: it cannot be.
    """
    epochs = config.finetune.unfreeze_epochs
    try:
        layers = layers_from_the_top(model)
    except ValueError as error:
        raise UserError(f"finetune.unfreeze_epochs={epochs}: {error} ({config.model.name}); leave it out") from error
    parameters = dict(model.named_parameters())
    layers = [layer for layer in layers if any(parameters[name].requires_grad for name in layer)]
    if len(layers) < 2 or not any(parameters[name].requires_grad for name in layers[0]):
        raise UserError(
            f"finetune.unfreeze_epochs={epochs}: finetune.freeze={config.finetune.freeze} leaves no layer to unfreeze, "
            "or not the classifier; freeze less, or leave one of them out"
        )
    return f"learning: at first the classifier alone, after {counted(epochs, 'epoch')} all {len(layers)} layers"


def facts_of_run(config: TrainConfig, built: ModelConfig, data: ImageDataModule) -> ModelFacts:
    is_described = built.name != config.model.name  # the name was a folder or hub entry, which may be gone later
    return ModelFacts(
        config=to_plain(config) | {"resume": False},
        class_names=data.class_names,
        image_size=data.image_size,
        crop=config.data.crop,
        mean=data.mean,
        std=data.std,
        bit_depth=data.bit_depth,
        channels=data.channels,
        multi_label=data.multi_label,
        architecture={"name": built.name, "kwargs": to_plain(built.kwargs)} if is_described else None,
    )
