"""One run from start to end: data, model, fit, the test of the best checkpoint, summary.json."""

import dataclasses
import math
from contextlib import ExitStack
from pathlib import Path
from traceback import clear_frames
from typing import Any

import torch
from lightning import seed_everything
from lightning.pytorch import Trainer

from vmoe.checkpoints import RunFolder, read_checkpoint, unmerged_weights
from vmoe.checkpoints.run_folder import is_tested, note_epochs
from vmoe.checkpoints.state import SavedRun, read_saved_run
from vmoe.data import ImageDataModule
from vmoe.data.draws import DRAWS_VERSION
from vmoe.errors import UserError
from vmoe.files import write_json
from vmoe.text import counted
from vmoe.training.callbacks import Ema, ExactResume, GradualUnfreezing, NanGuard, RoutingMonitor
from vmoe.training.classifier import Classifier
from vmoe.training.config import ParallelConfig, TrainConfig
from vmoe.training.distillation import load_teacher
from vmoe.training.optim.timm_optimizers import check_optimizer
from vmoe.training.parallel.collectives import connect, disconnect, gather, together
from vmoe.training.parallel.folder_writer import FolderWriter
from vmoe.training.parallel.process import Process
from vmoe.training.parallel.sharding import load_weights
from vmoe.training.parallel.strategies import fallback_of_muon
from vmoe.training.run import summary
from vmoe.training.run.checkpoints import RunCheckpoints
from vmoe.training.run.data import check_files, images_of_run
from vmoe.training.run.journal import Clock, Journal, MetricsTable
from vmoe.training.run.lock import locked
from vmoe.training.run.loggers import open_loggers, rate_monitors, require_loggers
from vmoe.training.run.model import (
    built_model,
    costs_of,
    facts_of_run,
    learning_line,
    many_tokens,
    new_module,
    start_model,
    unfreezing_line,
)
from vmoe.training.run.progress import TrainingProgress
from vmoe.training.run.resumption import (
    check_folder,
    mark_launch,
    recover_checkpoints,
    restarted,
    resuming_command,
    saved_state,
    write_config,
)
from vmoe.training.run.stopping import Interrupted, stopped_at_once
from vmoe.training.run.trainer import device_of, new_trainer, quiet_lightning
from vmoe.version import versions

_FEW_TO_CHOOSE_BY = 100  # fewer validation images give a warning
_FEW_UPDATES = 100  # fewer updates in a run do as well
_SMALL_BATCH = 16  # images; batches of fewer have noisy gradients


def train(config: TrainConfig, progress: TrainingProgress, command: str) -> dict[str, Any] | None:
    """Trains, or resumes, the run in `config.output_dir` and tests its best checkpoint.

    Args:
        config: The run. `output_dir` is set. With several ranks `parallel.strategy` must not be auto: `vmoe train`
            resolves it.
        progress: Shows progress; quiet on all ranks except the first.
        command: The command of the run, for summary.json.

    Returns:
        The content of summary.json; None on all ranks except the first.

    Raises:
        UserError: The folder holds a run already, the resumed config differs, data or device are missing, or the loss
            became NaN.
        Interrupted: A signal stopped the run. Its training up to then is saved.
    """
    if Process.this().world_size == 1:  # a single process needs no strategy and runs the same code without its cost
        config = dataclasses.replace(config, parallel=ParallelConfig(draws=config.parallel.draws))
    if config.parallel.strategy == "auto":
        raise UserError("parallel.strategy=auto: is chosen by `vmoe train`; give ddp, fsdp or expert", everywhere=True)
    check_optimizer(config.optim)
    config = dataclasses.replace(config, loss=config.loss.with_super_classes())
    device = device_of(config)
    progress.log(summary.device_line(device, config.trainer.device))
    if device.type != "cuda":
        config = _without_cuda(config, progress)
    if config.parallel.strategy == "none":
        with stopped_at_once():
            return _Run(config, progress, command, device).go()
    connect(device.type)
    try:
        with stopped_at_once():
            result = _Run(config, progress, command, device).go()
    except (Interrupted, UserError) as stop:
        if stop.everywhere:  # else other ranks may still wait for this one
            _forget(stop)
            disconnect()
        raise
    disconnect()
    return result


def _without_cuda(config: TrainConfig, progress: TrainingProgress) -> TrainConfig:
    """The run without GPU options that do not change results, so that a recipe for GPUs trains on any machine."""
    if not config.trainer.cuda_graph:
        return config
    progress.log("trainer.cuda_graph: turned off, since it needs a GPU of CUDA, and this run has none")
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, cuda_graph=False))


def _forget(stop: BaseException | None) -> None:
    """Clears the frames of an exception's traceback, which hold the model and the trainer."""
    while stop is not None:
        clear_frames(stop.__traceback__)
        stop = stop.__context__


class _Run:
    """A run in its folder. Every rank has one; only the first rank's writes."""

    def __init__(self, config: TrainConfig, progress: TrainingProgress, command: str, device: torch.device) -> None:
        self.folder = RunFolder(Path(config.output_dir))
        self.config = restarted(config, self.folder)
        self.progress, self.log = progress, progress.log
        self.command, self.device = command, device
        self.is_first = Process.this().is_first

    def go(self) -> dict[str, Any] | None:
        """Locks the folder, then trains or resumes the run; see `train`."""
        folder, config = self.folder, self.config
        together(lambda: check_folder(folder, config))
        with ExitStack() as held:
            together(lambda: held.enter_context(locked(folder.path, self.log, self.command)) if self.is_first else None)
            together(lambda: check_folder(folder, config))  # another process may have started a run there meanwhile
            together(lambda: require_loggers(config))
            together(lambda: recover_checkpoints(folder) if self.is_first and config.resume else None)
            saved = together(lambda: saved_state(folder, config))
            result = gather(folder.read_summary())[0] if saved is not None and saved.progress.finished else None
            if result is None or not is_tested(result):
                return self._train(saved, held)
            self.log(f"{folder.path}: this run is finished, after {counted(saved.progress.epochs_done, 'epoch')}")
            self.log(summary.result_line(result, config.output_dir))
            return result if self.is_first else None

    def _train(self, saved: SavedRun | None, held: ExitStack) -> dict[str, Any] | None:
        config, folder = self.config, self.folder
        self._warn_of_surprises(saved)
        data = self._data(saved)
        teacher = together(lambda: load_teacher(config.distill, data, config.loss))
        seed_everything(config.seed, verbose=False)
        built = together(lambda: built_model(config, saved))
        fresh = dataclasses.replace(config, init_from=None, model=built) if saved else config
        model, shard = start_model(fresh, data, self.device, self.log)
        self.log(summary.model_line(config.model, model))
        if self.device.type == "cpu" and (line := many_tokens(model, data.image_size)) is not None:
            self.log(line)
        costs = costs_of(dataclasses.replace(config, model=built), model, data)
        self.progress.console.print(summary.cost_table(f"{config.model.name}, {folder.path}", *costs))
        module = new_module(config, model, shard, teacher, facts_of_run(config, built, data))
        if (line := learning_line(model)) is not None:
            self.log(line)
        if config.finetune.unfreeze_epochs is not None:
            self.log(unfreezing_line(model, config))
        loggers = together(lambda: held.enter_context(open_loggers(config, folder)))
        if self.is_first:
            mark_launch(folder)
            if saved is None or not folder.config.exists():
                write_config(folder, config)
            else:
                note_epochs(folder, config.trainer.epochs)
        with quiet_lightning():
            trainer = self._fit(module, data, saved, loggers)
            test, untested = {}, None
            try:
                test = self._test_best(trainer, module, data)
            except Exception as error:  # the results of training are written in any case
                untested = error
        result = None
        if self.is_first:
            result = self._summary(test) | summary.cost_entries(*costs)
            result |= summary.token_entries(costs[0], data, result["epochs"])
            write_json(folder.summary, result)
        if isinstance(untested, UserError):
            again = f"the run is trained but not tested; then test it by: {resuming_command(folder)}"
            raise UserError(f"{untested}; {again}", everywhere=untested.everywhere) from untested
        if untested is not None:
            raise untested
        if result is not None:
            self.log(summary.result_line(result, config.output_dir))
        return result

    def _warn_of_surprises(self, saved: SavedRun | None) -> None:
        config = self.config
        if config.resume and saved is None:
            self.log(f"{self.folder.path}: no checkpoint to resume, so this run starts from the beginning")
        if saved is not None and config.trainer.epochs > (before := saved.facts.config["trainer"]["epochs"]):
            self.log(f"the run goes on to {config.trainer.epochs} epochs in place of {before}, by their learning rates")
        if config.optim.warmup_epochs > config.trainer.epochs:
            self.log(
                f"warning: optim.warmup_epochs={config.optim.warmup_epochs} is longer than "
                f"trainer.epochs={config.trainer.epochs}: the learning rate never reaches optim.lr={config.optim.lr}"
            )
        if (line := fallback_of_muon(config, Process.this().world_size)) is not None:
            self.log(line)

    def _data(self, saved: SavedRun | None) -> ImageDataModule:
        """Opens the images and prints lines on them.

        Raises:
            UserError: They are missing or malformed, or differ from the saved run's.
        """
        config = self.config
        data = images_of_run(config, self.device)
        for line in (*summary.data_lines(config.data, data), *data.notes):
            self.log(line)
        if data.has_validation and (count := data.number_of_images("val")) < _FEW_TO_CHOOSE_BY:
            self.log(
                f"warning: {counted(count, 'image')} for validation: too few to choose an epoch by, as one is "
                f"{1 / count:.1%} of them; give it more images (where they are cut from training, by data.val_fraction)"
            )
        updates = config.trainer.epochs * math.ceil(len(data.train_sampler) / config.trainer.accumulate)
        if updates < _FEW_UPDATES:
            batch, accumulate = config.data.batch_size, config.trainer.accumulate
            advice = [f"lower trainer.accumulate={accumulate}"] * (accumulate > 1)
            advice += [f"lower data.batch_size={batch}"] * (batch > _SMALL_BATCH)
            advice += [f"raise trainer.epochs={config.trainer.epochs}"]
            self.log(f"warning: {counted(updates, 'update')} in all, which is few to learn from: {' or '.join(advice)}")
        if saved is not None and saved.facts.class_names != data.class_names:
            raise UserError(
                f"data.root={config.data.root}: holds other classes than the run in {self.folder.path} was trained on",
                everywhere=True,
            )
        if saved is not None and saved.progress.images not in (None, data.fingerprint):
            raise UserError(
                f"data.root={config.data.root}: the training images or their labels are not those that the run in "
                f"{self.folder.path} began with; put them back, or begin a run on the new ones with another "
                "--output_dir",
                everywhere=True,
            )
        if saved is None or config.data.check:
            check_files(config, data, self.log)
        return data

    def _fit(self, module: Classifier, data: ImageDataModule, saved: SavedRun | None, loggers: list[Any]) -> Trainer:
        config, folder = self.config, self.folder
        clock, writer = Clock(), FolderWriter(config.parallel.async_save)
        monitor = RoutingMonitor(images=4 if loggers else 0, warn=False)
        ema_decay, unfreeze_epochs = config.trainer.ema_decay, config.finetune.unfreeze_epochs
        callbacks = [
            NanGuard(config.trainer.log_every),
            monitor,
            *([] if ema_decay is None else [Ema(ema_decay)]),
            *([] if unfreeze_epochs is None else [GradualUnfreezing(unfreeze_epochs)]),
            ExactResume(config.seed),
            *rate_monitors(loggers),
            Journal(folder, clock, self.progress, monitor, saved.step if saved else 0, config.trainer),
            RunCheckpoints(folder, clock, config.trainer.early_stopping, writer),
        ]
        trainer = new_trainer(config, self.device, callbacks, writer, loggers)
        if saved is not None:
            self._log_resumed(saved)
        if saved is None or not saved.progress.finished:
            resume_from = folder.last if saved else None
            trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
        return trainer

    def _log_resumed(self, saved: SavedRun) -> None:
        path = self.folder.path
        inside = f" and {counted(saved.batches_done, 'batch', 'batches')}" if saved.batches_done else ""
        self.log(f"resuming {path} after {counted(saved.progress.epochs_done, 'epoch')}{inside}")
        if saved.draws != DRAWS_VERSION:
            self.log(
                f"warning: {path} was started by a version of vmoe that drew other random numbers for the same "
                "seed: from here on its augmentation and mixing differ from those of an unbroken run"
            )

    def _test_best(self, trainer: Trainer, module: Classifier, data: ImageDataModule) -> dict[str, float]:
        """Tests the best checkpoint on the test images, and on training images without augmentation.

        The difference shows how far the model has only memorised its training images.
        """
        load_weights(module.model, unmerged_weights(read_checkpoint(self.folder.best)))
        module.average = None  # it belongs to the last update, not to the best checkpoint
        metrics = {}
        for split, loader in (("test", data.test_dataloader()), ("train_clean", data.train_eval_dataloader())):
            module.tested_split = split
            trainer.test(module, loader, verbose=False)
            metrics |= module.evaluation_metrics(split)
        return metrics

    def _summary(self, test: dict[str, float]) -> dict[str, Any]:
        last = read_saved_run(self.folder.last)
        best = last.progress.best
        return {
            "metrics": {**test, **{name: value for name, value in best.items() if name != "epoch"}},
            "best_epoch": best["epoch"],
            "classes": len(last.facts.class_names),
            "epochs": last.progress.epochs_done,
            "images_per_second": MetricsTable(self.folder.metrics, [], last.step).median("train/images_per_second"),
            "train_seconds": last.progress.clock["total"],
            "peak_memory_mib": summary.peak_memory_mib(self.device),
            "device": summary.device_name(self.device),
            "precision": self.config.trainer.precision,
            "seed": self.config.seed,
            "versions": versions(),
            "command": self.command,
        }
