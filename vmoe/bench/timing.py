"""Timing of several jobs in one process, so that their ratios mean something."""

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Job = Callable[[], object]


@dataclass
class Measurement:
    """What was seen of one job.

    Attributes:
        times: Milliseconds a call, one a round.
        peak_mib: Memory allocated at most during a call beyond what was before it; None off CUDA.
        synchronizes: Whether a call waits for the device; None off CUDA.
        error: Why it could not run, else None.
    """

    times: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    synchronizes: bool | None = None
    error: str | None = None

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


def measure(jobs: dict[str, Job], device: torch.device, rounds: int, calls: int) -> dict[str, Measurement]:
    """Warms up every job, looks at its memory and waits, then times all in a shuffled order, round by round.

    Args:
        jobs: By name. A job that fails is reported with its error and left out.
        device: Where they run.
        rounds: How often each is timed.
        calls: Calls between two readings of the clock.
    """
    results = {name: _first_look(job, device) for name, job in jobs.items()}
    order = [name for name, result in results.items() if result.error is None]
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            jobs[name]()  # whatever the job before left in the caches
            results[name].times.append(time_calls(jobs[name], device, calls))
    return results


def time_calls(job: Job, device: torch.device, calls: int) -> float:
    """Milliseconds a call."""
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


def _first_look(job: Job, device: torch.device) -> Measurement:
    result = Measurement()
    try:
        for _ in range(3):
            job()
        if device.type == "cuda":
            result.peak_mib = _peak_mib(job, device)
            result.synchronizes = _synchronizes(job)
    except Exception as error:  # whatever a foreign or unfit implementation raises becomes its row of the table
        result.error = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return result


def _peak_mib(job: Job, device: torch.device) -> float:
    gc.collect()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    job()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _synchronizes(job: Job) -> bool:
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
