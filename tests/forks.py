"""Scripts in processes as torchrun starts them, but forked from one that has imported what takes seconds to import."""

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

# Not from this process, whose autograd may have threads, which a fork cannot have
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["vmoe.cli.train"])
PATIENCE = 10  # seconds that processes get to end by themselves after one has failed


def run_forked(
    script: Path, processes: int, *arguments: str, seconds: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a script in so many processes; its return code is that of the first that failed."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    command = [str(script), *arguments]
    with TemporaryDirectory() as folder:
        outputs = [Path(folder, str(rank)) for rank in range(processes)]
        running = []
        for rank, output in enumerate(outputs):
            place = _place(rank, processes, store.port) if processes > 1 else {}
            running.append(FORKS.Process(target=_run, args=(command, {**environment, **place}, output)))
            running[-1].start()
        end = time.monotonic() + seconds
        while (left := [process for process in running if process.is_alive()]) and time.monotonic() < end:
            wait([process.sentinel for process in left], end - time.monotonic())
            if any(process.exitcode for process in running):
                end = min(end, time.monotonic() + PATIENCE)
        for process in running:
            process.kill()
            process.join()
        stdout, stderr = ("".join(path.with_suffix(suffix).read_text() for path in outputs) for suffix in (".1", ".2"))
    code = next((process.exitcode for process in running if process.exitcode), 0)
    return subprocess.CompletedProcess(command, code, stdout, stderr)


def _place(rank: int, processes: int, port: int) -> dict[str, str]:
    """What torchrun tells a process in its environment."""
    return {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "forked", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip


def _run(command: list[str], environment: dict[str, str], output: Path) -> None:
    for number in (1, 2):
        file = os.open(output.with_suffix(f".{number}"), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.environ |= environment
    torch.set_num_threads(1)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
