"""Runs of `vmoe train` in forked processes, which are stopped at a moment that is counted in calls of functions.

So every moment can be hit, again and again: in a step, in validation, in the middle of a write.
"""

import csv
import json
import os
import resource
import sys
import traceback
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
import yaml
from support.forks import FORKS

from vmoe.checkpoints import ENTRY, RunFolder, load_checkpoint
from vmoe.cli.train import main


class End(NamedTuple):
    """How a process ended: its exit code, or minus the signal that killed it; what it said; the calls it made."""

    code: int
    error: str
    calls: int


class Attack(NamedTuple):
    """What happens to a process: a signal, or from then on a full disk.

    Args:
        at: At which call of a function, Python's own included.
        signum: The signal that it sends itself; None for the disk.
        after: Calls are counted from the moment on that this function is entered; None: from the start.
        entry: Which of its entries that is, counted from 1.
        bytes_of_files: How large a file can still grow.
    """

    at: int
    signum: int | None
    after: str | None = None
    entry: int = 2
    bytes_of_files: int = 0

    def happen(self) -> None:
        if self.signum is not None:
            os.kill(os.getpid(), self.signum)
        else:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes_of_files, hard))


def train(arguments: list[str], attack: Attack | None = None) -> End:
    """Runs `vmoe train` with these arguments in a process of its own."""
    # A pipe: a full disk would take the child's words too
    told, telling = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=_child, args=(arguments, attack, telling))
    process.start()
    telling.close()
    process.join()
    os.set_blocking(told.fileno(), False)
    with os.fdopen(os.dup(told.fileno()), errors="replace") as words:
        text = words.read()
    told.close()
    error, _, calls = text.rpartition("calls: ")
    return End(process.exitcode, error or text, int(calls) if calls.strip().isdecimal() else 0)


def _child(arguments: list[str], attack: Attack | None, telling: Connection) -> None:
    code = 1
    try:
        os.dup2(telling.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        torch.set_num_threads(1)
        code = _counted(arguments, attack)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # nothing that Python does at its end counts


def _counted(arguments: list[str], attack: Attack | None) -> int:
    calls, entries, start = 0, 0, 0 if attack is None or attack.after is None else None

    def count(frame, event, argument):
        nonlocal calls, entries, start
        if event not in ("call", "c_call"):
            return
        calls += 1
        if start is None and event == "call" and frame.f_code.co_name == attack.after:
            entries += 1
            start = calls if entries == attack.entry else None
        if attack is not None and start is not None and calls - start == attack.at:
            attack.happen()

    sys.setprofile(count)
    try:
        code = main(arguments)
    finally:
        sys.setprofile(None)
    print(f"calls: {calls}", file=sys.stderr)
    return code


def rows(folder: RunFolder) -> list[dict[str, str]]:
    """metrics.csv without the one column that tells of time; every row is whole."""
    with open(folder.metrics, newline="") as file:
        found = list(csv.DictReader(file))
    assert all(None not in row.values() and None not in row for row in found)
    return [{key: value for key, value in row.items() if key != "train/images_per_second"} for row in found]


def assert_readable(folder: RunFolder) -> None:
    """Whatever there is of a run can be read, by the tools and by anyone."""
    if folder.config.exists():
        assert set(yaml.safe_load(folder.config.read_text())) > {"data", "model", "moe"}
    if folder.metrics.exists():
        rows(folder)
    for checkpoint in (folder.last, folder.best):
        if checkpoint.exists():
            load_checkpoint(checkpoint)
    if folder.summary.exists():
        assert "metrics" in json.loads(folder.summary.read_text())


def assert_same_run(ours: RunFolder, expected: RunFolder) -> None:
    """Metrics, weights, averages and the optimiser's state, bit for bit; and nothing half-written lies about."""
    assert rows(ours) == rows(expected)
    one, other = (json.loads(folder.summary.read_text()) for folder in (ours, expected))
    assert one["metrics"] == other["metrics"] and one["best_epoch"] == other["best_epoch"]
    for name in ("last", "best"):
        one, other = (torch.load(getattr(folder, name), weights_only=True) for folder in (ours, expected))
        for key in ("global_step", "epoch", "state_dict", "optimizer_states"):
            assert_equal(one[key], other[key], key)
        for key in ("ema", "best", "epochs_done", "random"):
            assert_equal(one[ENTRY][key], other[ENTRY][key], key)
    assert not [path for path in ours.path.rglob(".*") if path.name != ".launch"]


def assert_equal(one, other, place: str) -> None:
    """Nested plain values and tensors, bit for bit."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for number, (each, its) in enumerate(zip(one, other, strict=True)):
            assert_equal(each, its, f"{place}.{number}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    else:
        assert one == other, place
