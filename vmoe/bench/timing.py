"""Timing of several jobs in one process, so that their ratios mean something."""

import gc
import random
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

TimedJob = Callable[[], object]
Log = Callable[[str], None]


class DeviceLost(RuntimeError):
    """A job broke the device's context. Whatever runs later in this process would fail or be wrong."""


@dataclass
class Measurement:
    """The measurements of one job."""

    times: list[float] = field(default_factory=list)  # milliseconds per call, one for each round
    # milliseconds in which the host issues a call's work to an idle device, at best; None without CUDA
    issue_ms: float | None = None
    peak_mib: float | None = None  # the most memory during a call beyond what was allocated before it; None off CUDA
    synchronizes: bool | None = None  # whether the host synchronises with the device in a call; None off CUDA
    error: str | None = None  # why it could not run, else None

    @property
    def median(self) -> float:
        """Median of the times."""
        return statistics.median(self.times)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.times) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.times, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def silent(line: str) -> None:
    """Discards a line."""


def time_made_jobs(
    makers: dict[str, Callable[[], TimedJob]], device: torch.device, rounds: int, calls: int, log: Log = silent
) -> dict[str, Measurement]:
    """Makes jobs and times them as `time_jobs` does. A job that cannot be made is reported with its error."""
    jobs, results = {}, {}
    for name, make in makers.items():
        log(f"making {name}")
        try:
            jobs[name] = make()
        except Exception as error:  # such as a lack of memory, which must not end the others
            results[name] = Measurement(error=reason_of_failure(name, error, device))
    results |= time_jobs(jobs, device, rounds, calls, log)
    jobs.clear()
    release(device)
    return {name: results[name] for name in makers}


def time_jobs(
    jobs: dict[str, TimedJob], device: torch.device, rounds: int, calls: int, log: Log = silent
) -> dict[str, Measurement]:
    """Warms up every job and measures its memory and synchronisations. Then it times all in rounds, in shuffled order.

    A job that fails is reported with its error and left out. There are `calls` between two readings of the clock. `log`
    gets a line before the first call of each job, and when the timing starts.

    Raises:
        DeviceLost: A job left the device unusable; the message names it.
    """
    results = {}
    for name, job in jobs.items():
        log(f"first look at {name}")
        results[name] = _first_look(name, job, device)
    order = [name for name, result in results.items() if result.error is None]
    log(f"{rounds} rounds of {len(order)} jobs")
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in list(order):
            try:
                jobs[name]()  # one untimed call, since the previous job has filled the caches
                results[name].times.append(time_calls(jobs[name], device, calls))
            except Exception as error:  # see `_first_look`
                results[name].error = reason_of_failure(name, error, device)
                order.remove(name)
    return results


def reason_of_failure(name: str, error: Exception, device: torch.device) -> str:
    """The reason that a table gives for a job that failed.

    Raises:
        DeviceLost: The device no longer responds.
    """
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as broken:
            raise DeviceLost(f"{name}: {reason}") from broken
        traceback.clear_frames(error.__traceback__)  # frees the memory that its frames hold
        release(device)
    return reason


def release(device: torch.device) -> None:
    """Frees unreferenced memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_calls(job: TimedJob, device: torch.device, calls: int) -> float:
    """Milliseconds per call."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            job()
        return (time.perf_counter() - start) / calls * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        job()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def matmul_peak(device: torch.device, dtype: torch.dtype, shapes: list[tuple[int, int, int]]) -> float:
    """The best rate of matrix products of the given (rows, depth, columns) in this process, in FLOP/s."""
    best = 0.0
    for rows, depth, columns in shapes:
        left, right = torch.randn(rows, depth, device=device), torch.randn(columns, depth, device=device)
        left, right = left.to(dtype), right.to(dtype)

        def product(left=left, right=right):
            return torch.nn.functional.linear(left, right)

        product()
        time_ms = statistics.median(time_calls(product, device, 5 if device.type == "cuda" else 1) for _ in range(7))
        best = max(best, 2 * rows * depth * columns / time_ms * 1e3)
    return best


def copy_bandwidth(device: torch.device) -> float:
    """The rate of a copy much larger than the caches, in bytes/s. Reads and writes both count."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy():
        target.copy_(source)

    copy()
    calls = 5 if device.type == "cuda" else 1
    return 2 * size / statistics.median(time_calls(copy, device, calls) for _ in range(7)) * 1e3


def _first_look(name: str, job: TimedJob, device: torch.device) -> Measurement:
    result = Measurement()
    try:
        for _ in range(3):
            job()
        if device.type == "cuda":
            result.peak_mib = _peak_mib(job, device)
            result.issue_ms = min(_issue_ms(job, device) for _ in range(3))
            result.synchronizes = _synchronizes(job)
    except Exception as error:  # whatever a foreign or unfit implementation raises becomes its row of the table
        result.error = reason_of_failure(name, error, device)
    return result


def _peak_mib(job: TimedJob, device: torch.device) -> float:
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    job()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _issue_ms(job: TimedJob, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    job()
    issued = time.perf_counter()
    torch.cuda.synchronize(device)
    return (issued - start) * 1e3


def _synchronizes(job: TimedJob) -> bool:
    torch.cuda.set_sync_debug_mode("error")
    try:
        job()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False
