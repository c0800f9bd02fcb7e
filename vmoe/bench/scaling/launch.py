"""Starts worker processes for jobs, again for those that are left where one of them ended all, and reads their rows."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vmoe.bench.scaling.jobs import Job
from vmoe.bench.scaling.size import next_size
from vmoe.bench.timing import Say

START_SECONDS = 150  # the most until the processes can talk
_GRACE_SECONDS = 45  # torchrun takes up to 30 s to end its processes
_ENDED = ("done", "failed", "no room", "no time")
Row = dict[str, Any]


class Launcher:
    """Runs jobs in worker processes.

    Args:
        folder: Of what the workers say.
        scratch: Where they leave weights for one another.
        device_type: "cuda" or "cpu".
        seconds_left: By part, the most that its jobs may take.
        say: Told of what is started and what failed.
        report: Called with all rows whenever there are more.
    """

    def __init__(
        self,
        folder: Path,
        scratch: Path,
        device_type: str,
        seconds_left: dict[str, float],
        say: Say,
        report: Callable[[list[Row]], None],
    ) -> None:
        self._folder, self._scratch, self._device_type = folder, scratch, device_type
        self._left = dict(seconds_left)
        self._say, self._report = say, report
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rows_path = self._folder / "rows.jsonl"
        self._rows_path.unlink(missing_ok=True)
        self._seen = 0
        self._launches = 0

    def run(self, jobs: list[Job]) -> None:
        """Does all jobs of one number of processes, in as many launches as it takes."""
        left = jobs
        while left:
            before = len(self.rows())
            code, errors = self._launch(left)
            rows = self.rows()[before:]
            self._spend(rows)
            left, failed = self._left_over(left, rows)
            if failed is not None:
                line = f"ended with {code}: {errors}"
                self._add(failed.as_row() | {"state": "failed", "error": line[-600:]})
                self._say(f"{failed.key}: {line[-300:]}")
            self._report(self.rows())

    def rows(self) -> list[Row]:
        """What the workers have written so far."""
        if not self._rows_path.exists():
            return []
        lines = self._rows_path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1]]  # the last may be half written

    def _left_over(self, jobs: list[Job], rows: list[Row]) -> tuple[list[Job], Job | None]:
        """The jobs to go on with, and the one that ended the processes without a word."""
        states = {}
        for row in rows:
            states.setdefault(row["key"], []).append(row["state"])
        left, failed = [], None
        for job in jobs:
            seen = states.get(job.key, [])
            if job.part == "size" and "no room" in seen and self._room_left(job):
                left.append(job)  # between the last that fits and the first that does not
            elif seen and not set(seen) & set(_ENDED):
                failed = job
            elif not seen:
                left.append(job)
        if failed is None and not rows and left:  # they never came to the first job
            failed, left = left[0], left[1:]
        return left, failed

    def _room_left(self, job: Job) -> bool:
        sizes = self._sizes().get(job.key, {})
        fitted = sizes.get("fitted")
        return bool(fitted) and self._left["size"] > 0 and next_size(fitted, sizes["failed"], 0.0) is not None

    def _sizes(self) -> dict[str, Any]:
        """What is known of the largest models, for `size.grow`."""
        sizes: dict[str, Any] = {}
        for row in self.rows():
            if row["part"] != "size":
                continue
            entry = sizes.setdefault(row["key"], {"fitted": {}, "failed": None})
            if row["state"] == "fits":
                entry["fitted"][row["pairs"]] = max(row["peak_mib"])
            elif row["state"] == "no room" and row.get("pairs"):
                entry["failed"] = min(row["pairs"], entry["failed"] or row["pairs"])
        return sizes

    def _spend(self, rows: list[Row]) -> None:
        """Takes what the jobs took off what their parts may."""
        seconds: dict[tuple[str, str], float] = {}
        for row in rows:
            of_job = row["part"], row["key"]
            seconds[of_job] = max(seconds.get(of_job, 0.0), row.get("seconds", 0.0))
        for (part, _), spent in seconds.items():
            self._left[part] -= spent

    def _add(self, row: Row) -> None:
        with open(self._rows_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _launch(self, jobs: list[Job]) -> tuple[int, str]:
        """One start of the processes for some jobs: their exit code, and the end of what they said."""
        self._launches += 1
        plan = self._folder / f"plan{self._launches}.json"
        ended = self._folder / f"ended{self._launches}"
        ended.unlink(missing_ok=True)
        plan.write_text(json.dumps({
            "jobs": [asdict(job) for job in jobs], "device": self._device_type, "folder": str(self._scratch),
            "seconds_left": self._left, "start_seconds": START_SECONDS, "sizes": self._sizes(), "ended": str(ended),
        }), encoding="utf-8")  # fmt: skip
        processes = jobs[0].processes
        self._say(f"{len(jobs)} jobs on {processes} process{'es' if processes > 1 else ''}")
        command = [sys.executable, "-m"]
        if processes > 1:
            command += ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
            command += ["--nproc-per-node", str(processes), "-m"]
        command += ["vmoe.bench.scaling.worker", str(plan), str(self._rows_path)]
        log = self._folder / f"log{self._launches}.txt"
        parts = {job.part for job in jobs}
        deadline = time.monotonic() + START_SECONDS + sum(self._left[part] for part in parts) + jobs[0].seconds
        with open(log, "w", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=_environment())
            code = self._watch(process, deadline)
        return code, " ".join(log.read_text(encoding="utf-8", errors="replace").split())

    def _watch(self, process: subprocess.Popen, deadline: float) -> int:
        """Reports rows while the processes run; ends them at the deadline."""
        try:
            while process.poll() is None and time.monotonic() < deadline:
                rows = self.rows()
                if len(rows) > self._seen:
                    for row in rows[self._seen :]:
                        self._say(f"{row['key']}: {row['state']}" + (f", {row['error']}" if row.get("error") else ""))
                    self._seen = len(rows)
                    self._report(rows)
                time.sleep(0.3)
            return process.wait(0.1) if process.poll() is not None else self._end(process)
        except BaseException:
            self._end(process)
            raise

    def _end(self, process: subprocess.Popen) -> int:
        """Ends the processes: torchrun ends its own."""
        process.terminate()
        try:
            return process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()  # what it leaves behind ends itself at its job's limit
            return process.wait()


def _environment() -> dict[str, str]:
    """This process's, in which workers of one machine find the package and each other."""
    root = str(Path(__file__).parents[3])
    paths = os.pathsep.join(path for path in (root, os.environ.get("PYTHONPATH")) if path)
    return {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | os.environ | {"PYTHONPATH": paths}
