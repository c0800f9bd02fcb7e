"""torch's threads: one per core that this process may use. They sleep while they wait."""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from vmoe.text import counted

_GROUPS = Path("/sys/fs/cgroup")


def let_threads_sleep() -> None:
    """Makes waiting threads sleep. Call it before torch is imported.

    By default OpenMP's waiting threads keep their cores busy. If other programs need these cores too, working threads
    hardly run: this made a training on two shared cores 15 times as fast. A user's own setting in the environment
    stays.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def choose_threads(workers: int = 0, processes: int = 1) -> str:
    """Sets torch's threads, unless the environment has OMP_NUM_THREADS. Returns the number and its reason.

    Args:
        workers: Number of processes that load images, each on its own core.
        processes: Number of processes like this one on this machine.
    """
    import torch  # here, since --help and a mistyped option need not wait for it

    if "OMP_NUM_THREADS" in os.environ:
        return f"{torch.get_num_threads()}, by OMP_NUM_THREADS"
    cores, quota = _cores(), cpu_quota()
    usable = cores if quota is None else min(cores, max(1, math.floor(quota)))
    threads = max(1, usable // processes - workers)
    torch.set_num_threads(threads)
    reasons = [
        counted(cores, "core"),
        *([] if quota is None else [f"a quota of {quota:g}"]),
        *([counted(processes, "process", "processes")] if processes > 1 else []),
        *([counted(workers, "worker")] if workers else []),
    ]
    return f"{threads}, by {', '.join(reasons)}"


def cpu_quota(folder: Path = _GROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The number of cores that this process's control groups (of a container or job) allow; None without a limit.

    Args:
        folder: The mount point of the groups.
        own: The file that names this process's groups.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        return None
    quotas = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            quotas += [_quota(*_words(each / "cpu.max")) for each in _upwards(folder, group)]
        elif "cpu" in controllers.split(","):
            for each in _upwards(folder / "cpu", group):
                quotas.append(_quota(*_words(each / "cpu.cfs_quota_us"), *_words(each / "cpu.cfs_period_us")))
    return min((quota for quota in quotas if quota is not None), default=None)


def _upwards(folder: Path, group: str) -> Iterator[Path]:
    """The folders of a group and of all groups above it. A container sees its own group as the highest."""
    path = folder / group.lstrip("/")
    yield from (each for each in (path, *path.parents) if each == folder or folder in each.parents)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []


def _quota(*words: str) -> float | None:
    """The cores of a quota and its period, both in microseconds; None without a quota."""
    if len(words) != 2 or words[0] in ("max", "-1"):
        return None
    return int(words[0]) / int(words[1])


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
