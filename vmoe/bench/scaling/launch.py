"""Runs jobs in processes of torchrun. If a job ends the processes, it starts them again for the remaining jobs."""

import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from vmoe.bench.report import Row
from vmoe.bench.scaling.jobs import ScalingJob

_START_SECONDS = 150  # the most until the processes can exchange data


@dataclass
class Launcher:
    """Runs jobs in separate processes."""

    log: Path  # a file for what the processes write
    device: torch.device  # the kind of device
    part_seconds: float  # the most that the jobs of one part may take together
    job_seconds: float  # the most that one job may take

    def run(self, jobs: list[ScalingJob]) -> Iterator[Row]:
        """Yields a row for each job as it ends. A job that fails or lacks memory or time has a row with the reason."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        left = Counter({job.part: self.part_seconds for job in jobs})
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
            # consecutive jobs run in the same processes
            for (part, _), group in itertools.groupby(jobs, lambda job: (job.part, job.layout.processes)):
                waiting = list(group)
                if left[part] > 0:
                    with closing(self._rows(list(waiting), Path(scratch), left[part])) as rows:
                        for row in rows:
                            yield waiting.pop(0).as_row() | row
                            left[part] -= row["seconds"]
                            if left[part] <= 0:
                                break
                yield from (job.as_row() | {"state": "no time"} for job in waiting)

    def _rows(self, jobs: list[ScalingJob], scratch: Path, seconds: float) -> Iterator[Row]:
        """A row for each job, in their order; a job that ended its processes fails."""
        plan, done = scratch / "jobs.pickle", 0
        plan.write_bytes(pickle.dumps((self.device, scratch, self.job_seconds, jobs)))
        plan.with_suffix(".begun").unlink(missing_ok=True)
        with open(self.log, "w", encoding="utf-8") as log, _torchrun_started(_command(jobs, plan), log) as process:
            end = threading.Timer(_START_SECONDS + seconds + self.job_seconds, process.terminate)  # if no row comes
            end.start()
            try:
                for row in (json.loads(line) for line in process.stdout if line.startswith("{")):
                    number = row.pop("job")
                    if number >= done:  # else another process has failed at the same job
                        yield from (self._lost() for _ in range(done, number))
                        yield row
                        done = number + 1
            except BaseException:
                process.terminate()
                raise
            finally:
                end.cancel()
        yield from (self._lost() for _ in range(done, len(jobs)))

    def _lost(self) -> Row:
        end = " ".join(self.log.read_text(encoding="utf-8", errors="replace").split())[-600:]
        return {"state": "failed", "error": f"the processes ended: {end}", "seconds": self.job_seconds}


def _command(jobs: list[ScalingJob], plan: Path) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    counts = ["--nproc-per-node", str(jobs[0].layout.processes), "--max-restarts", str(len(jobs))]
    return [*torchrun, *counts, "-m", "vmoe.bench.scaling.worker", str(plan)]


def _torchrun_started(command: list[str], log) -> subprocess.Popen:
    """Starts torchrun with an environment in which ranks find this package and each other."""
    root = str(Path(__file__).parents[3])
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH")) if path)
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | os.environ | {"PYTHONPATH": paths}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
