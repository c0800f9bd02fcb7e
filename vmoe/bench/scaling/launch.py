"""Starts the processes that do jobs, and again for those that are left where one of them ended all."""

import itertools
import json
import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vmoe.bench.report import Row
from vmoe.bench.scaling.jobs import ScalingJob

_START_SECONDS = 150  # the most until the processes can exchange data
_GRACE_SECONDS = 45  # torchrun takes up to 30 s to end its processes


@dataclass
class Launcher:
    """Runs jobs in processes of their own.

    Attributes:
        log: A file for what the processes write.
        scratch: A folder in which they leave results and checkpoints for one another.
        device: The kind of device.
        part_seconds: The most that the jobs of one part may take together.
        job_seconds: The most that one job may take.
    """

    log: Path
    scratch: Path
    device: torch.device
    part_seconds: float
    job_seconds: float

    def run(self, jobs: list[ScalingJob]) -> Iterator[Row]:
        """A row for each job, as it ends; what fails, finds no memory or has no time left is a row that says so."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        left, spent = list(jobs), Counter[str]()
        while left:
            part = left[0].part
            if spent[part] >= self.part_seconds:
                yield left.pop(0).as_row() | {"state": "no time"}
                continue
            # Jobs that follow one another in the same processes
            _, alike = next(itertools.groupby(left, lambda job: (job.part, job.layout.processes)))
            for row in self._rows(list(alike), self.part_seconds - spent[part]):
                spent[part] += row["seconds"]
                yield left.pop(0).as_row() | row

    def _rows(self, jobs: list[ScalingJob], seconds: float) -> Iterator[Row]:
        """Rows of the jobs, in order, up to the first that is not done."""
        plan = self.scratch / "jobs.pickle"
        plan.write_bytes(pickle.dumps((self.device, self.scratch, jobs)))
        count, row = 0, {"state": "done"}
        with (
            open(self.log, "w", encoding="utf-8") as log,
            _running(_command(jobs[0].layout.processes, plan), log) as process,
        ):
            timer = self._timer(process, _START_SECONDS + self.job_seconds)
            for line in process.stdout:
                if count == len(jobs) or row["state"] != "done" or not line.startswith("{"):
                    continue
                timer.cancel()
                row, count = json.loads(line), count + 1
                seconds -= row["seconds"]
                if seconds > 0:
                    timer = self._timer(process, self.job_seconds)
                else:
                    process.terminate()
                yield row
            is_late = timer.finished.is_set()
            timer.cancel()
        if row["state"] == "done" and count < len(jobs) and seconds > 0:  # they ended without a row of this job
            end = " ".join(self.log.read_text(encoding="utf-8", errors="replace").split())[-600:]
            reason = f"took longer than {self.job_seconds:g} s" if is_late else f"the processes ended: {end}"
            yield {"state": "failed", "error": reason, "seconds": self.job_seconds}

    def _timer(self, process: subprocess.Popen, seconds: float) -> threading.Timer:
        timer = threading.Timer(seconds, process.terminate)
        timer.daemon = True
        timer.start()
        return timer


def _command(processes: int, plan: Path) -> list[str]:
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
    start = [*torchrun, str(processes), "-m"] if processes > 1 else []
    return [sys.executable, "-m", *start, "vmoe.bench.scaling.worker", str(plan)]


@contextmanager
def _running(command: list[str], log) -> Iterator[subprocess.Popen]:
    """The process of a command, in whose environment ranks find this package and each other; ended on the way out."""
    root = str(Path(__file__).parents[3])
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH")) if path)
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | os.environ | {"PYTHONPATH": paths}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        yield process
    except BaseException:
        process.terminate()
        raise
    finally:
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
