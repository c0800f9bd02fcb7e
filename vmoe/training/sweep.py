"""A study: arms of one recipe with several seeds each. Runs train side by side, each in its own process."""

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vmoe.checkpoints.run_folder import RunFolder, is_tested
from vmoe.errors import UserError

_SECONDS_BETWEEN_LOOKS = 0.2
_JOB = "import sys; from vmoe.cli.main import main; sys.exit(main())"


@dataclass(frozen=True)
class Training:
    """One run of a study: `vmoe train` with these options."""

    arm: str
    seed: int
    folder: Path
    options: tuple[str, ...]  # without the run's folder

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def log_file(self) -> Path:
        """The file for the run's output. Its folder must exist."""
        return self.folder.parent / "logs" / f"{self.name}.log"

    @property
    def is_done(self) -> bool:
        """Whether the run was trained and tested."""
        return is_tested(RunFolder(self.folder).read_summary())

    @property
    def arguments(self) -> list[str]:
        """The arguments after `vmoe`: for a new run, or to resume a stopped one."""
        resume = ["--resume", "auto"] if self.folder.exists() else []
        return ["train", *self.options, "--output_dir", str(self.folder), *resume]

    @property
    def command(self) -> str:
        """The command line, to copy."""
        return shlex.join(["vmoe", *self.arguments])


def read_study(
    path: Path, folder: Path, arms: Sequence[str] = (), seeds: Sequence[int] = (), common: Sequence[str] = ()
) -> list[Training]:
    """The runs of a study's file, seed by seed.

    The file holds `config` (a recipe's file in the same folder), `seeds` and `arms`. An arm has a name and the options
    in which it differs from the recipe, by the dotted names of `vmoe train`.

    Args:
        path: The study's YAML file.
        folder: The folder of the runs, named ARM_sSEED.
        arms: The arms to train; empty for all.
        seeds: Seeds instead of the file's.
        common: Further options of `vmoe train`, for all runs.

    Raises:
        UserError: The file is no study, lacks an arm, or has a run twice.
    """
    study = _read_study(path)
    of_seeds = ("--seeds", seeds) if seeds else (f"{path}: seeds", study["seeds"])
    for where, given in (("--arms", arms), of_seeds):
        twice = [each for each in given if given.count(each) > 1]
        if twice:  # else two processes would train in one folder
            raise UserError(f"{where}: {twice[0]} is given twice; leave one out")
    unknown = [arm for arm in arms if arm not in study["arms"]]
    if unknown:
        raise UserError(f"--arms {unknown[0]}: {path} has no such arm; it has {', '.join(study['arms'])}")
    config = Path(os.path.normpath(path.parent / os.path.expanduser(study["config"])))
    if not config.is_file():
        raise UserError(f"{path}: config: {config} is not there")
    return [
        Training(
            arm,
            seed,
            folder / f"{arm}_s{seed}",
            ("--config", str(config), *study["arms"][arm], "--seed", str(seed), *common),
        )
        for seed, arm in itertools.product(seeds or study["seeds"], arms or study["arms"])
    ]


def _read_study(path: Path) -> dict[str, Any]:
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        study = None if node is None else loader.construct_document(node)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: no readable YAML file: {error}") from error
    if not isinstance(study, dict) or set(study) != {"config", "seeds", "arms"}:
        raise UserError(f"{path}: must hold config, seeds and arms, and nothing else")
    arms, seeds = study["arms"], study["seeds"]
    if (
        not isinstance(arms, dict)
        or not all(isinstance(options, dict | type(None)) for options in arms.values())
        or not arms
    ):
        raise UserError(f"{path}: arms: must be names, each with options by dotted name")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError(f"{path}: seeds: must be a list of whole numbers from 0")
    written = {key.value: value for key, value in node.value}
    return study | {"config": written["config"].value, "arms": _arms(loader, written["arms"])}


def _arms(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, list[str]]:
    """The options of each arm for the command line. Names and values stay as written: an arm may be called "no"."""
    arms = {}
    for name, options in node.value:
        arms[name.value] = []
        if isinstance(options, yaml.MappingNode):
            loader.flatten_mapping(options)
            values = {key.value: _text(value) for key, value in options.value}  # the last one of a repeated key
            arms[name.value] = [text for key, value in values.items() for text in (f"--{key}", value)]
    return arms


def _text(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return node.value or ("null" if node.tag.endswith(":null") else "")
    return yaml.serialize(_flow(node), Dumper=yaml.SafeDumper, width=float("inf")).strip()


def _flow(node: yaml.Node) -> yaml.Node:
    """Sets flow style: YAML on one line, in brackets."""
    if isinstance(node, yaml.CollectionNode):
        node.flow_style = True
        for value in node.value:
            for each in value if isinstance(value, tuple) else (value,):
                _flow(each)
    return node


@dataclass
class Sweep:
    """Trains runs side by side.

    Args:
        runs: The runs, in order. Each is taken when a job is free. Finished runs are skipped.
        jobs: Number of runs at once.
        devices: Values of CUDA_VISIBLE_DEVICES. A run gets the one with the fewest runs; empty leaves it alone.
        log: Called with a line for each run that ends.
        ended: Called with each run that ends and its exit code.
    """

    runs: Iterable[Training]
    jobs: int
    devices: list[str] = field(default_factory=list)
    log: Callable[[str], None] = print
    ended: Callable[[Training, int], None] | None = None
    _working: dict[Training, tuple[subprocess.Popen, str | None]] = field(default_factory=dict, init=False)

    def run(self) -> list[Training]:
        """Trains all runs, and returns those that failed.

        Ctrl-C or SIGTERM stops all runs as it stops `vmoe train`: they save and can be resumed. Then this raises
        KeyboardInterrupt. A UserError of `ended` stops them too.
        """
        todo = (run for run in self.runs if not run.is_done)
        failed: list[Training] = []
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            while self._start(todo) or self._working:
                failed += self._ended()
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        except (KeyboardInterrupt, UserError):
            for process, _ in self._working.values():
                process.terminate()
            for process, _ in self._working.values():
                process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
        return failed

    def progress(self) -> str:
        """A line on the runs that are training."""
        return f"training {', '.join(run.name for run in list(self._working)) or 'no run'}"

    def _start(self, todo: Iterator[Training]) -> bool:
        """Starts runs until all jobs are taken. Returns whether it started any."""
        started = False
        while len(self._working) < self.jobs and (run := next(todo, None)) is not None:
            device = self._freest()
            environment = os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
            with open(run.log_file, "ab") as file:
                # a session of its own, so that Ctrl-C in a terminal reaches the run only once, from here
                process = subprocess.Popen(
                    [sys.executable, "-c", _JOB, *run.arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            self._working[run] = process, device
            started = True
        return started

    def _freest(self) -> str | None:
        taken = [device for _, device in self._working.values()]
        return min(self.devices, key=taken.count, default=None)

    def _ended(self) -> list[Training]:
        """Prints a line for each run that ended, and returns those that failed."""
        failed = []
        for run, (process, _) in list(self._working.items()):
            if process.poll() is None:
                continue
            del self._working[run]
            if self.ended is not None:
                self.ended(run, process.returncode)
            if process.returncode:
                failed.append(run)
                self.log(f"{run.name}: FAILED with exit code {process.returncode}: {last_line(run.log_file)}")
            else:
                self.log(f"{run.name}: {last_line(run.log_file)}")
        return failed


def last_line(log_file: Path) -> str:
    """The last line of a log file that is not empty."""
    lines = log_file.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
