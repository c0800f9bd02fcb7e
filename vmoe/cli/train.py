"""`vmoe train`: parses a command line and calls `vmoe.fit`."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from vmoe.checkpoints.run_folder import RunFolder
from vmoe.cli.common import job
from vmoe.cli.threads import choose_threads
from vmoe.cli.train_options import parse
from vmoe.errors import UserError
from vmoe.memory import is_out_of_memory, memory_line
from vmoe.training.config import TrainConfig
from vmoe.training.parallel.process import Process
from vmoe.training.run.progress import TrainingProgress
from vmoe.training.run.stopping import Interrupted, stopped_at_once

_FIND_LR, _FIND_BATCH_SIZE = "--find_lr", "--find_batch_size"  # actions on the config, not parts of it


@job()
def main(argv: list[str]) -> int:
    """Trains, or finds a learning rate or a batch size; see `vmoe train --help`."""
    options = [word for word in argv if word not in (_FIND_LR, _FIND_BATCH_SIZE)]
    if _FIND_LR in argv and _FIND_BATCH_SIZE in argv:
        raise UserError(f"{_FIND_LR}: finds a rate for one batch size; find that by {_FIND_BATCH_SIZE} first")
    if _FIND_LR in argv:
        return _find_lr(parse(options))
    if _FIND_BATCH_SIZE in argv:
        return _find_batch_size(parse(options))
    return trained(lambda: parse(argv), ["vmoe", "train", *argv])


def _find_lr(config: TrainConfig) -> int:
    from vmoe.training.run.finding import find_lr  # here, since a mistake in an option need not wait for Lightning

    choose_threads(config.data.workers if config.data.pipeline == "workers" else 0)
    found = find_lr(config)
    folder = Path(str(config.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    found.write(folder / "find_lr.csv")
    print(f"the loss falls fastest at --optim.lr {found.lr:.2g}; {len(found.rates)} rates are in {folder}/find_lr.csv")
    return 0


def _find_batch_size(config: TrainConfig) -> int:
    from vmoe.training.run.finding import LARGEST_BATCH, find_batch_size  # here, as above

    choose_threads(config.data.workers if config.data.pipeline == "workers" else 0)
    found = find_batch_size(config)
    size = found.batch_size
    why = "larger ones are not tried" if size == LARGEST_BATCH else "the training images are too few for twice as many"
    why = f"{2 * size} do not" if found.is_limited_by_memory else why
    print(f"a batch of {size} images fits, {why}: --data.batch_size {size}")
    return 0


def trained(make_config: Callable[[], TrainConfig], command: list[str]) -> int:
    """Trains the run of `make_config`, prints the result, and returns the job's exit code.

    `make_config` returns the config, or raises a UserError that is the same on all ranks. The `command` line is for
    summary.json.

    Raises:
        UserError: There is a mistake in the options, the config or the data.
    """
    process = Process.this()
    try:
        return _train(make_config, command, process)
    except UserError as error:
        if process.is_first:
            raise
        if error.everywhere:  # only the first rank prints it
            return 2
        raise UserError(f"rank {process.rank} of {process.world_size}: {error}") from error


def _train(make_config: Callable[[], TrainConfig], command: list[str], process: Process) -> int:
    progress = TrainingProgress(quiet=not process.is_first)
    try:
        config = make_config()
        if config.parallel.strategy == "auto":
            config = _resolved(config, process, progress)
    except UserError as error:
        raise UserError(str(error), everywhere=True) from error
    try:
        with stopped_at_once():
            from vmoe.training.fit import fit  # here, since a mistake in an option need not wait for Lightning
        busy = config.data.workers if config.data.pipeline == "workers" else 0  # others only read at the start
        progress.log(f"threads: {choose_threads(busy, process.local_world_size)}")
        fit(config, command=shlex.join(command))
    except Interrupted as stop:
        from vmoe.training.run.resumption import resuming_command

        folder = RunFolder(Path(config.output_dir))
        if process.is_first:
            then = (
                f"; the run is saved, go on with: {resuming_command(folder)}"
                if folder.config.exists()
                else " before the run began"
            )
            print(f"vmoe train: {stop}{then}", file=sys.stderr)
        return 128 + stop.signum
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(memory_line(error, _smaller(config))) from error
    return 0


def _smaller(config: TrainConfig) -> str:
    """A line on ways to use less memory."""
    batch, accumulate = config.data.batch_size, config.trainer.accumulate
    ways = [
        f"lower data.batch_size={batch} and raise trainer.accumulate={accumulate} as much, which changes no update",
        *(["set moe.recompute_activation"] if config.moe is not None and not config.moe.recompute_activation else []),
        *(["take trainer.precision=bf16"] if config.trainer.precision == "32" else []),
        "or take several GPUs (parallel.strategy)",
    ]
    return ", ".join(ways)


def _resolved(config: TrainConfig, process: Process, progress: TrainingProgress) -> TrainConfig:
    """The config with the planner's strategy instead of auto. It prints the reason."""
    from vmoe.bench.plan.choice import resolved  # here: it imports many modules

    config, why = resolved(config, process)
    if why is not None:
        progress.log(why)
    return config
