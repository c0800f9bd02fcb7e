"""The threads that torch computes with: as many as the cores that this process may use, which sleep while they wait."""

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from vmoe.text import counted

_GROUPS = Path("/sys/fs/cgroup")


def let_threads_sleep() -> None:
    """Lets threads that wait for others sleep; to be called before torch is imported.

    OpenMP's threads would keep their cores busy instead. Where other programs want these cores too, the threads that
    are waited for then hardly run: a training that shared two cores became 15 times as fast by this. A user's own
    choice in the environment stays.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def choose_threads(workers: int = 0, processes: int = 1) -> str:
    """Sets torch's threads, unless the environment has OMP_NUM_THREADS; the number and its reason, to print.

    Args:
        workers: Processes that load images meanwhile, each on a core of its own.
        processes: Processes like this one on this machine.
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
    """How many cores' time this process's control groups (a container's, a job's) give it; None where all they like.

    Args:
        folder: Where the groups are mounted.
        own: The file that names this process's groups.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
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
    """The folders of a group and of all above it; a container sees its own group as the highest."""
    path = folder / group.lstrip("/")
    yield from (each for each in (path, *path.parents) if each == folder or folder in each.parents)


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []


def _quota(*words: str) -> float | None:
    """Of a quota and its period, both in microseconds; None where there is none."""
    if len(words) != 2 or words[0] in ("max", "-1"):
        return None
    return int(words[0]) / int(words[1])


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
