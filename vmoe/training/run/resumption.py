"""Checks whether a run may start or resume in a folder, and reads its last checkpoint if the config is unchanged."""

import dataclasses
import os
import re
import shlex
import socket
from pathlib import Path
from typing import Any

from vmoe.checkpoints import WITHOUT_EFFECT, RunFolder, flatten
from vmoe.checkpoints.run_folder import config_text, is_config_of_run
from vmoe.checkpoints.state import SavedRun, read_saved_run
from vmoe.config_values import from_plain, to_plain
from vmoe.errors import UserError
from vmoe.files import aside, atomic_write, is_aside, recover, remove_leftovers
from vmoe.moe import MoeConfig
from vmoe.training.config import TrainConfig
from vmoe.training.parallel.collectives import gather

_EPOCHS = "trainer.epochs"
_MOST_NAMED = 4  # differences of configs in one line
_FREE = (*WITHOUT_EFFECT, "data.root")  # options that may differ when a run is resumed
_SHARDING = ("parallel.strategy", "parallel.expert_size", "parallel.dense")
_WHOLE = {"none", "ddp"}  # strategies that shard nothing


def restarted(config: TrainConfig, folder: RunFolder) -> TrainConfig:
    """The config with `resume` set, if torchrun restarts this run after a failure.

    It stays unchanged if the folder holds a run of another torchrun command, which the first attempt refused to resume.
    """
    if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return config
    is_ours = gather(folder.launch.is_file() and folder.launch.read_text(encoding="utf-8") == _launch())[0]
    return dataclasses.replace(config, resume="auto") if is_ours else config


def mark_launch(folder: RunFolder) -> None:
    """Records in a run's folder which torchrun command runs it. Only the first rank calls it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with atomic_write(folder.launch) as temporary:
            temporary.write_text(_launch(), encoding="utf-8")


def _launch() -> str:
    """An identifier, on the first rank, that all attempts of one torchrun command share and no other has."""
    number = os.environ["TORCHELASTIC_RUN_ID"]
    # commands without a run id share a default one; the id of torchrun's process then distinguishes them
    return f"{os.getppid()} of {socket.gethostname()}" if number == "none" else number


def write_config(folder: RunFolder, config: TrainConfig) -> None:
    """Writes a run's config.yaml. Only one rank calls it."""
    with atomic_write(folder.config) as temporary:
        plain = {key: value for key, value in to_plain(config).items() if key != "resume"}
        text = config_text(plain)
        temporary.write_text(text if config.moe is None else _with_defaults(text, config.moe), encoding="utf-8")


def _with_defaults(text: str, moe: MoeConfig) -> str:
    """A config's YAML. A comment after each null of `moe` gives the router's default; the value stays null."""
    resolved = to_plain(moe.resolved())
    before, heading, after = text.partition("\nmoe:\n")

    def line(match: re.Match[str]) -> str:
        value = resolved.get(match[1])
        return match[0] if value is None else f"{match[0]}  # {value}"

    return before + heading + re.sub(r"^  (\w+): null$", line, after, flags=re.MULTILINE)


def recover_checkpoints(folder: RunFolder) -> None:
    """Restores a checkpoint folder that a killed process had moved aside, and removes its unfinished files.

    Only one rank calls it.
    """
    recover(folder.last)
    recover(folder.best)
    for path in (folder.config, folder.metrics, folder.summary, folder.last, folder.best, folder.launch):
        remove_leftovers(path)


def check_folder(folder: RunFolder, config: TrainConfig) -> None:
    """Checks that a run can start or resume in a folder. It writes nothing.

    Raises:
        UserError: There is a run and no --resume, or no run to resume.
    """
    if not config.resume:
        refuse_run(folder.path)
    holds_run, has_last = _holds_run(folder), _has_last(folder)
    is_users = folder.config.exists() and not is_config_of_run(folder.config)
    if config.resume is True and not holds_run:
        raise UserError(
            f"--resume: there is no run in {folder.path}; give a run's folder as --output_dir, or --resume auto, which "
            "begins one where there is none"
        )
    if is_users and not has_last:
        raise UserError(
            f"--output_dir {folder.path}: holds a config.yaml that no run wrote; this run would replace it by its "
            "own: give another folder"
        )
    if holds_run and not has_last and folder.summary.exists():
        raise UserError(
            f"--resume: the finished run in {folder.path} has lost its last.ckpt; give another --output_dir"
        )


def refuse_run(path: Path) -> None:
    """Refuses a folder for a new run if it holds a run.

    Raises:
        UserError: It holds a run.
    """
    if _holds_run(RunFolder(path)):
        raise UserError(f"--output_dir {path}: holds a run already; give another folder, or --resume to go on with it")


def last_config(path: Path) -> dict[str, Any] | None:
    """The config in a run's last checkpoint, without `output_dir` and `resume`; None without a run.

    Raises:
        UserError: The checkpoint cannot be read.
    """
    folder = RunFolder(path)
    if not _has_last(folder):
        return None
    last = folder.last if folder.last.exists() else aside(folder.last)
    config = read_saved_run(last).facts.config
    return {key: value for key, value in config.items() if key not in ("output_dir", "resume")}


def _has_last(folder: RunFolder) -> bool:
    return folder.last.exists() or is_aside(folder.last)


def _holds_run(folder: RunFolder) -> bool:
    return _has_last(folder) or folder.metrics.exists() or is_config_of_run(folder.config)


def saved_state(folder: RunFolder, config: TrainConfig) -> SavedRun | None:
    """The last checkpoint of a run to resume, or None to start a new one. Call `check_folder` before.

    A resumed run may have more epochs than before.

    Raises:
        UserError: The run had another config.
    """
    if not config.resume or not folder.last.exists():
        return None
    saved = read_saved_run(folder.last)
    before = flatten(to_plain(from_plain(TrainConfig, saved.facts.config).resolved()))
    now = flatten(to_plain(config.resolved()))
    free = _FREE
    if config.optim.name == "muon" and not {before["parallel.strategy"], now["parallel.strategy"]} <= _WHOLE:
        free = tuple(key for key in free if key not in _SHARDING)  # sharding decides which parameters Muon trains
    if now[_EPOCHS] > before[_EPOCHS]:
        free = (*free, _EPOCHS)
        saved = dataclasses.replace(saved, progress=dataclasses.replace(saved.progress, finished=False))
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key) and key not in free]
    if changed:
        named = [f"{key} (was {before.get(key)!r}, now {now.get(key)!r})" for key in changed[:_MOST_NAMED]]
        named += [f"{len(changed) - _MOST_NAMED} more"] if len(changed) > _MOST_NAMED else []
        raise UserError(
            f"--resume: the run in {folder.path} had another config: {', '.join(named)}; to go on with its own: "
            f"{resuming_command(folder)}; or give another --output_dir"
        )
    return saved


def resuming_command(folder: RunFolder) -> str:
    """The command line that resumes a run."""
    return f"vmoe train --resume --output_dir {shlex.quote(str(folder.path))}"
