"""Runs scripts in processes as torchrun does, but forked from a process that has already imported slow packages.

Unlike with torchrun, the processes share the seed of string hashes, skip Python's finalisation, do not see environment
variables that are read at import, and write their output to files, which a limit on file sizes would cut.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.distributed import TCPStore

# fork from a separate process: autograd in this one may have threads, which do not survive a fork
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vmoe.cli.train", "vmoe.training.run.train"])
SECONDS = 240  # limit of a run, so that a deadlock fails its test and does not block all tests
PATIENCE = 10  # seconds for the other processes to end by themselves after one has failed


def run_forked(script: Path, processes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in several processes. The return code is that of the first process that fails.

    Raises:
        AssertionError: A process did not end by itself.
    """
    command = [str(script), *arguments]
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
    running: list[multiprocessing.process.BaseProcess] = []
    with TemporaryDirectory() as folder:
        outputs = [[Path(folder, f"{rank}.{name}") for name in ("out", "err")] for rank in range(processes)]
        try:
            for rank, paths in enumerate(outputs):
                for path in paths:
                    path.touch()
                place = _place(rank, processes, store.port) if store else {}
                process = FORKS.Process(target=_run, args=(command, {**os.environ, **environment, **place}, paths))
                process.start()
                running.append(process)
            code = _first_failure(running)
            left = [rank for rank, process in enumerate(running) if process.is_alive()]
        finally:
            for process in running:
                process.kill()
                process.join()
        stdout, stderr = ("".join(path.read_text() for path in paths) for paths in zip(*outputs, strict=True))
    assert not left, f"ranks {left} did not end by themselves (exit code of the first that failed: {code}): {stderr}"
    return subprocess.CompletedProcess(command, code, stdout, stderr)


def _first_failure(running: list[multiprocessing.process.BaseProcess]) -> int:
    """Waits for all processes, and returns the exit code of the first that fails, or 0."""
    code, end = 0, time.monotonic() + SECONDS
    while left := [process.sentinel for process in running if process.is_alive()]:
        if not wait(left, max(0, end - time.monotonic())):
            break
        if not code and (code := next((process.exitcode for process in running if process.exitcode), 0)):
            end = time.monotonic() + PATIENCE
    return code or next((process.exitcode for process in running if process.exitcode), 0)


def _place(rank: int, processes: int, port: int) -> dict[str, str]:
    """Sets the environment variables that torchrun gives a process."""
    return {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"forked {port}", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def _run(command: list[str], environment: dict[str, str], outputs: list[Path]) -> None:
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.environ |= environment
    torch.set_num_threads(1)  # OMP_NUM_THREADS=1 would come too late here
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
