"""One run, start to end: data, model, fit, the test of the best checkpoint, summary.json."""

import dataclasses
import re
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from traceback import clear_frames
from typing import Any

import torch
from lightning import seed_everything
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from torch import nn

from vmoe.checkpoints import (
    ModelFacts,
    RunFolder,
    read_checkpoint,
    timm_arguments,
    trained_weights,
)
from vmoe.checkpoints.run_folder import config_text, is_tested, note_epochs
from vmoe.checkpoints.state import SavedRun, read_saved_run
from vmoe.config_values import to_plain
from vmoe.data import ImageDataModule
from vmoe.data.checking import is_worth_checking, refusal
from vmoe.data.datamodule import EvalLoader
from vmoe.data.draws import DRAWS_VERSION
from vmoe.errors import UserError
from vmoe.files import atomic_write, write_json
from vmoe.models.cost import check_training_capacity
from vmoe.models.sources import architecture_of
from vmoe.moe import MoeConfig
from vmoe.moe.assignment import CapacityError
from vmoe.text import counted
from vmoe.training.callbacks import Ema, ExactResume, NanGuard, RoutingMonitor
from vmoe.training.classifier import Classifier
from vmoe.training.config import ModelConfig, ParallelConfig, TrainConfig
from vmoe.training.distillation import Teacher, load_teacher
from vmoe.training.parallel.collectives import connect, disconnect, gather, together
from vmoe.training.parallel.folder_writer import FolderWriter
from vmoe.training.parallel.process import Process
from vmoe.training.parallel.sample_draws import SampleDraws
from vmoe.training.parallel.sharding import cut_and_start, load_weights
from vmoe.training.parallel.strategies import check_parts, cut_of, fallback_of_muon
from vmoe.training.run import summary
from vmoe.training.run.checkpoints import RunCheckpoints
from vmoe.training.run.initial import initial_model
from vmoe.training.run.journal import Clock, Journal, MetricsTable
from vmoe.training.run.lock import locked
from vmoe.training.run.loggers import open_loggers, rate_monitors, require_loggers
from vmoe.training.run.progress import TrainingProgress
from vmoe.training.run.resumption import (
    check_folder,
    mark_launch,
    recover_checkpoints,
    restarted,
    resuming_command,
    saved_state,
)
from vmoe.training.run.stopping import Interrupted, stopped_at_once
from vmoe.training.run.trainer import new_trainer, quiet_lightning
from vmoe.version import versions

_MOST_TOKENS = 1024  # of an image, without a warning on a CPU
Cut = Callable[[nn.Module], None]  # the model into the parts of several processes
_FEW_TO_CHOOSE_BY = 100  # images of validation, fewer than which are warned of


def train(config: TrainConfig, progress: TrainingProgress, command: str) -> dict[str, Any] | None:
    """Trains, or resumes, the run in `config.output_dir` and tests its best checkpoint.

    Args:
        config: The run; `output_dir` is set. Of several ranks `parallel.strategy` is not auto, which `vmoe train`
            resolves.
        progress: Shows progress; quiet in all ranks but the first.
        command: What began the run, for summary.json.

    Returns:
        The content of summary.json; None in all processes but the first.

    Raises:
        UserError: the folder holds a run already, the resumed config differs, data or device are missing, or the loss
            became NaN.
        Interrupted: a signal stopped the run; what it had done in training is saved.
    """
    process = Process.this()
    if process.world_size == 1:  # there is nothing to share: the same code, and no cost, as without a strategy
        config = dataclasses.replace(config, parallel=ParallelConfig(draws=config.parallel.draws))
    if config.parallel.strategy == "auto":
        raise UserError("parallel.strategy=auto: is chosen by `vmoe train`; give ddp, fsdp or expert", everywhere=True)
    device = _device(config)
    progress.say(summary.device_line(device, config.trainer.device))
    if device.type == "cpu":
        config = _for_cpu(config, progress)
    if config.parallel.strategy == "none":
        with stopped_at_once():
            return _run(config, command, progress, device, process)
    connect(device.type)
    try:
        with stopped_at_once():
            result = _run(config, command, progress, device, process)
    except (Interrupted, UserError) as stop:
        if stop.everywhere:  # else others may still wait for this process, in vain
            _forget(stop)
            disconnect()
        raise
    disconnect()
    return result


def _forget(stop: BaseException | None) -> None:
    """Frees what the frames that an exception has come through hold: the model, the trainer."""
    while stop is not None:
        clear_frames(stop.__traceback__)
        stop = stop.__context__


def _run(
    config: TrainConfig, command: str, progress: TrainingProgress, device: torch.device, process: Process
) -> dict[str, Any] | None:
    folder = RunFolder(Path(config.output_dir))
    config = restarted(config, folder)
    together(lambda: check_folder(folder, config))
    with ExitStack() as held:
        together(lambda: held.enter_context(locked(folder.path, progress.say, command)) if process.is_first else None)
        together(lambda: check_folder(folder, config))  # another process may have been faster
        return _run_in(folder, config, command, progress, device, process, held)


def _run_in(
    folder: RunFolder, config: TrainConfig, command: str, progress: TrainingProgress, device: torch.device,
    process: Process, held: ExitStack,
) -> dict[str, Any] | None:  # fmt: skip
    """Trains or resumes the run of a folder that is this process's alone."""
    together(lambda: require_loggers(config))
    together(lambda: recover_checkpoints(folder) if process.is_first and config.resume else None)
    saved = together(lambda: saved_state(folder, config))
    result = gather(folder.read_summary())[0] if saved is not None and saved.progress.finished else None
    if result is not None and is_tested(result):
        progress.say(f"{folder.path}: this run is finished, after {counted(saved.progress.epochs_done, 'epoch')}")
        progress.say(summary.result_line(result, config.output_dir))
        return result if process.is_first else None
    _say_what_may_surprise(config, folder, saved, process, progress)
    data = _data(config, device, process)
    for line in (*summary.data_lines(config.data, data), *data.notes):
        progress.say(line)
    if data.has_validation and (count := sum(data.images_of_classes("val"))) < _FEW_TO_CHOOSE_BY:
        progress.say(
            f"warning: {counted(count, 'image')} for validation: too few to choose an epoch by, as one is "
            f"{1 / count:.1%} of top-1; give it more images (where they are cut from training, by data.val_fraction)"
        )
    if saved is not None and saved.facts.class_names != data.class_names:
        raise UserError(
            f"data.root={config.data.root}: holds other classes than the run in {folder.path} was trained on",
            everywhere=True,
        )
    if saved is None or config.data.check:
        _check_files(config, data, progress)
    teacher = together(lambda: load_teacher(config.distill, data))
    seed_everything(config.seed, verbose=False)
    built = together(lambda: _built_model(config, saved))
    fresh = dataclasses.replace(config, init_from=None, model=built) if saved else config
    model, cut = _model(fresh, data, device, process, progress)
    progress.say(summary.model_line(config.model, model))
    if device.type == "cpu" and (line := _many_tokens(model, data.image_size)) is not None:
        progress.say(line)
    costs = _costs(dataclasses.replace(config, model=built), model, data)
    progress.console.print(summary.cost_table(f"{config.model.name}, {folder.path}", *costs))
    loggers = together(lambda: held.enter_context(open_loggers(config, folder)))
    if process.is_first:
        mark_launch(folder)
        if saved is None or not folder.config.exists():
            _write_config(folder, config)
        else:
            note_epochs(folder, config.trainer.epochs)
    module = new_module(config, model, cut, teacher, _facts(config, built, data))
    trainer = _fit(config, module, data, folder, saved, device, process, progress, loggers)
    test, untested = {}, None
    try:
        with quiet_lightning():
            test = _test_best(trainer, module, data, folder)
    except Exception as error:  # what the training gave is written down in any case
        untested = error
    result = None
    if process.is_first:
        result = _summary(config, folder, command, trainer, test) | summary.cost_entries(*costs)
        result |= summary.token_entries(costs[0], data, result["epochs"])
        write_json(folder.summary, result)
    if isinstance(untested, UserError):
        again = f"the run is trained but not tested; then test it by: {resuming_command(folder)}"
        raise UserError(f"{untested}; {again}", everywhere=untested.everywhere) from untested
    if untested is not None:
        raise untested
    if result is not None:
        progress.say(summary.result_line(result, config.output_dir))
    return result


def _say_what_may_surprise(
    config: TrainConfig, folder: RunFolder, saved: SavedRun | None, process: Process, progress: TrainingProgress
) -> None:
    if config.resume and saved is None:
        progress.say(f"{folder.path}: no checkpoint to resume, so this run starts from the beginning")
    if saved is not None and config.trainer.epochs > (before := saved.facts.config["trainer"]["epochs"]):
        progress.say(f"the run goes on to {config.trainer.epochs} epochs in place of {before}, by their learning rates")
    if config.optim.warmup_epochs > config.trainer.epochs:
        progress.say(
            f"warning: optim.warmup_epochs={config.optim.warmup_epochs} is longer than "
            f"trainer.epochs={config.trainer.epochs}: the learning rate never reaches optim.lr={config.optim.lr}"
        )
    if (line := fallback_of_muon(config, process.world_size)) is not None:
        progress.say(line)


def _built_model(config: TrainConfig, saved: SavedRun | None) -> ModelConfig:
    """The model by timm's own name and all arguments: what rebuilds it where a folder or hub that it came from is gone.

    Raises:
        UserError: they cannot be read.
    """
    if saved is None:
        name, kwargs = architecture_of(config.model.name, config.model.kwargs)
    else:
        built = saved.facts.by_architecture().config["model"]
        name, kwargs = built["name"], built["kwargs"]
    return dataclasses.replace(config.model, name=name, kwargs=timm_arguments(kwargs))


def _many_tokens(model: nn.Module, image_size: int) -> str | None:
    """A warning where the images and the patches make a model too slow for a CPU; None where they do not."""
    tokens = getattr(getattr(model, "patch_embed", None), "num_patches", 0)
    if tokens <= _MOST_TOKENS:
        return None
    return (
        f"warning: at {image_size} pixels an image has {tokens:,} tokens, which is slow on a CPU; "
        "lower data.image_size, or raise model.kwargs.patch_size"
    )


def _model(
    config: TrainConfig, data: ImageDataModule, device: torch.device, process: Process, progress: TrainingProgress
) -> tuple[nn.Module, Cut | None]:
    """The model at its start, and what cuts it over the processes, where the strategy does."""
    cut = cut_of(config.parallel, process.world_size, device.type)
    model = together(lambda: _initial_model(config, data, progress) if cut is None or process.is_first else None)
    if cut is None:
        return model, None
    # One process of all has the whole model, on its host.
    cut = partial(cut_and_start, cut=cut, source=model, device=device)
    with torch.device("meta"):
        return _initial_model(dataclasses.replace(config, init_from=None), data, progress), cut


def _initial_model(config: TrainConfig, data: ImageDataModule, progress: TrainingProgress) -> nn.Module:
    return initial_model(config, list(data.class_names), data.image_size, progress.say)


def _costs(config: TrainConfig, model: nn.Module, data: ImageDataModule) -> tuple[summary.Cost, summary.Cost]:
    """Of the model and of its dense twin."""
    try:
        check_training_capacity(model, config.data.batch_size, data.image_size)
        cost = summary.Cost.of(model, data.image_size)  # an evaluation of one image, the smallest group
    except CapacityError as error:
        raise UserError(f"moe.{error}", everywhere=True) from error
    return cost, summary.twin_cost(config.model, data.num_classes, data.image_size)


def _write_config(folder: RunFolder, config: TrainConfig) -> None:
    with atomic_write(folder.config) as temporary:
        plain = {key: value for key, value in to_plain(config).items() if key != "resume"}
        text = config_text(plain)
        temporary.write_text(text if config.moe is None else _with_defaults(text, config.moe), encoding="utf-8")


def _with_defaults(text: str, moe: MoeConfig) -> str:
    """A config's YAML, with what the router decides beside each null of `moe`, which stays null."""
    resolved = to_plain(moe.resolved())
    before, heading, after = text.partition("\nmoe:\n")

    def line(match: re.Match[str]) -> str:
        value = resolved.get(match[1])
        return match[0] if value is None else f"{match[0]}  # {value}"

    return before + heading + re.sub(r"^  (\w+): null$", line, after, flags=re.MULTILINE)


def new_module(
    config: TrainConfig, model: nn.Module, cut: Cut | None, teacher: Teacher | None, facts: ModelFacts | None
) -> Classifier:
    """The module of a run: as the config says, it draws by image, captures its steps and compiles its model."""
    draws = SampleDraws(config.seed) if config.parallel.draws == "sample" else None
    if draws is not None:
        draws.install(model)
    module = Classifier(model, **to_plain(config.optim))
    module.facts, module.draws, module.shard, module.teacher = facts, draws, cut, teacher
    if config.trainer.cuda_graph:
        module.capture_steps()
    if config.trainer.compile:
        # In place: no name of a weight changes. Static: the smaller last batch of a validation would otherwise make
        # torch compile for any batch size, training included, in many small graphs.
        model.compile(dynamic=False)
    return module


def _fit(
    config: TrainConfig, module: Classifier, data: ImageDataModule, folder: RunFolder,
    saved: SavedRun | None, device: torch.device, process: Process, progress: TrainingProgress, loggers: list[Logger],
) -> Trainer:  # fmt: skip
    clock, writer = Clock(), FolderWriter(config.parallel.async_save)
    every, steps_done = config.trainer.log_every, saved.step if saved else 0
    monitor = RoutingMonitor(images=4 if loggers else 0, warn=False)
    callbacks = [
        NanGuard(every),
        monitor,
        *([] if config.trainer.ema_decay is None else [Ema(config.trainer.ema_decay)]),
        ExactResume(config.seed),
        *rate_monitors(loggers),
        Journal(folder, clock, progress, monitor, steps_done, config.trainer),
        RunCheckpoints(folder, clock, config.trainer.early_stopping, writer),
    ]
    with quiet_lightning():
        trainer = new_trainer(config, device, process, callbacks, writer, loggers)
        if saved is not None:
            _say_resumed(progress, folder, saved)
        if saved is None or not saved.progress.finished:
            resume_from = folder.last if saved else None
            trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
        return trainer


class _TrainingData(ImageDataModule):
    """Without images for validation a batch of training images tells whether the weights have overflowed."""

    def val_dataloader(self) -> EvalLoader:
        size = self.config.eval_batch_size or self.config.batch_size
        return super().val_dataloader() if self.has_validation else self.train_eval_dataloader(most=size)


def _data(config: TrainConfig, device: torch.device, process: Process) -> ImageDataModule:
    """The images, of which each process gets a part.

    Raises:
        UserError: they are missing or malformed, batches cannot be shared by so many processes, or there are no images
            to stop early by.
    """
    data = _TrainingData(config.data, config.seed, device, process.rank, process.world_size, config.trainer.cuda_graph)
    together(lambda: data.prepare_data() if process.local_rank == 0 else None)  # one process of a machine downloads

    def setup() -> None:
        data.setup("fit")
        check_parts(config, data.train_sampler.batch_size, process.world_size)
        if config.trainer.early_stopping is not None and not data.has_validation:
            raise UserError(
                f"trainer.early_stopping={config.trainer.early_stopping}: waits for a better val/top1, and "
                "data.val_fraction=0 leaves no images for validation; change one of them"
            )

    together(setup)
    return data


def _check_files(config: TrainConfig, data: ImageDataModule, progress: TrainingProgress) -> None:
    """Opens all images where that is little work beside the run, and says where it is not done.

    Raises:
        UserError: an image of validation or test cannot be read; one of training is replaced by the next.
    """
    passes = config.trainer.epochs * config.data.repeat
    is_wanted = is_worth_checking(data.files, passes) if config.data.check is None else config.data.check
    if not data.files:
        return
    if not is_wanted:
        advice = "" if config.data.check is False else "; --data.check true opens them"
        progress.say(f"data.check: the {data.files:,} image files are not opened before the run{advice}")
        return
    threads = config.data.workers or torch.get_num_threads()
    by_process = gather(data.damaged_files(threads))
    damaged = {split: [line for each in by_process for line in each[split]] for split in by_process[0]}
    if refused := [line for split in ("val", "test") for line in damaged.get(split, [])]:
        raise UserError(refusal(refused), everywhere=True)
    count = len(damaged["train"])
    beside = f", of which {count} of training cannot be read and are replaced: {damaged['train'][0]}" if count else ""
    progress.say(f"data.check: all {data.files:,} image files were opened{beside}")


def _device(config: TrainConfig) -> torch.device:
    process = Process.this()
    wanted = config.trainer.device
    if process.world_size > 1 and config.parallel.strategy == "none":
        raise UserError(
            f"--parallel.strategy none: there are {process.world_size} processes; use auto, ddp, fsdp or expert",
            everywhere=True,
        )
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("--trainer.device cuda: no usable GPU here; use cpu or auto")
    device = torch.device("cpu")
    if wanted != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", process.local_rank) if process.world_size > 1 else torch.device("cuda")
    if device.type == "cpu" and config.trainer.precision == "fp16":
        raise UserError("--trainer.precision fp16: needs a GPU, and there is none here; use bf16 or 32")
    return device


def _for_cpu(config: TrainConfig, progress: TrainingProgress) -> TrainConfig:
    """The run without what needs a GPU and changes nothing of its result, so that a recipe for GPUs trains anywhere."""
    if not config.trainer.cuda_graph:
        return config
    progress.say("trainer.cuda_graph: turned off, since it needs a GPU and this run is on a CPU")
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, cuda_graph=False))


def _facts(config: TrainConfig, built: ModelConfig, data: ImageDataModule) -> ModelFacts:
    is_described = built.name != config.model.name  # by a folder or hub, which may be gone when it is opened
    return ModelFacts(
        config=to_plain(config) | {"resume": False},
        class_names=data.class_names,
        image_size=data.image_size,
        mean=data.mean,
        std=data.std,
        bit_depth=data.bit_depth,
        architecture={"name": built.name, "kwargs": to_plain(built.kwargs)} if is_described else None,
    )


def _test_best(trainer: Trainer, module: Classifier, data: ImageDataModule, folder: RunFolder) -> dict[str, float]:
    """The best checkpoint on the test images, and on training images as they are: are they learnt, or only recalled?"""
    load_weights(module.model, trained_weights(read_checkpoint(folder.best)))
    module.average = None  # which is of the last update
    metrics = {}
    for split, loader in (("test", data.test_dataloader()), ("train_clean", data.train_eval_dataloader())):
        module.tested_split = split
        trainer.test(module, loader, verbose=False)
        metrics |= module.evaluation_metrics(split)
    return metrics


def _summary(
    config: TrainConfig, folder: RunFolder, command: str, trainer: Trainer, test: dict[str, float]
) -> dict[str, Any]:
    last = read_saved_run(folder.last)
    table = MetricsTable(folder.metrics, [], last.step)
    best = last.progress.best
    return {
        "metrics": {**test, **{name: value for name, value in best.items() if name != "epoch"}},
        "best_epoch": best["epoch"],
        "classes": len(last.facts.class_names),
        "epochs": last.progress.epochs_done,
        "images_per_second": table.median("train/images_per_second"),
        "train_seconds": last.progress.clock["total"],
        "peak_memory_mib": summary.peak_memory_mib(trainer.strategy.root_device),
        "device": summary.device_name(trainer.strategy.root_device),
        "precision": config.trainer.precision,
        "seed": config.seed,
        "versions": versions(),
        "command": command,
    }


def _say_resumed(progress: TrainingProgress, folder: RunFolder, saved: SavedRun) -> None:
    inside = f" and {counted(saved.batches_done, 'batch', 'batches')}" if saved.batches_done else ""
    progress.say(f"resuming {folder.path} after {counted(saved.progress.epochs_done, 'epoch')}{inside}")
    if saved.draws != DRAWS_VERSION:
        progress.say(
            f"warning: {folder.path} was started by a version of vmoe that drew other random numbers for the same "
            "seed: from here on its augmentation and mixing differ from those of an unbroken run"
        )
