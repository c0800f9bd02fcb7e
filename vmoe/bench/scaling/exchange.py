"""How much of a step the processes' exchange takes, and how much of that is hidden behind computation."""

from typing import NamedTuple

import torch

Span = tuple[float, float]  # start and end, in microseconds
_KINDS = {"sendrecv": "tokens", "alltoall": "tokens", "allgather": "weights", "reducescatter": "gradients",
          "allreduce": "gradients"}  # fmt: skip

# What torch and Lightning write between kernels
_MARKS = ("FSDP::", "Optimizer.", "ProfilerStep", "nccl:", "DistributedDataParallel", "[pl]", "PyTorch Profiler")


class Shares(NamedTuple):
    """Shares of a step's time on the device. A kernel that waits for another process counts as exchange.

    Attributes:
        exchange: All kernels of NCCL.
        tokens: Of these, those by which tokens travel to experts and back.
        weights: Those that bring weights together.
        gradients: Those that sum gradients, and numbers.
        hidden: The share of the exchange, from 0 to 1, during which another kernel ran.
        idle: The device ran nothing.
    """

    exchange: float
    tokens: float
    weights: float
    gradients: float
    hidden: float
    idle: float


class Profile:
    """The profiler on a few steps of a GPU. Where it fails, for want of rights or memory, there are no shares."""

    def __init__(self) -> None:
        self._profiler: torch.profiler.profile | None = None

    def start(self) -> None:
        try:
            torch.cuda.synchronize()
            profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            profiler.start()
            self._profiler = profiler
        except Exception as error:  # must not lose the times that were measured before
            print(f"no profile: {error}", flush=True)

    def stop(self) -> Shares | None:
        """The shares of the time since `start`."""
        if self._profiler is None:
            return None
        try:
            torch.cuda.synchronize()
            self._profiler.stop()
            return shares_of(_kernel_spans(self._profiler))
        except Exception as error:  # likewise
            print(f"no profile: {error}", flush=True)
            return None


def _kernel_spans(profile: torch.profiler.profile) -> list[tuple[str, Span]]:
    """The name and time of all that ran on the device."""
    spans = []
    for event in profile.events():
        span = event.time_range.start, event.time_range.end
        is_mark = getattr(event, "is_user_annotation", False) or event.name.startswith(_MARKS)
        if event.device_type == torch.autograd.DeviceType.CUDA and span[1] > span[0] and not is_mark:
            spans.append((event.name, span))
    return spans


def shares_of(spans: list[tuple[str, Span]]) -> Shares | None:
    """The shares of the time from the first kernel to the last; None where nothing ran."""
    if not spans:
        return None
    kinds: dict[str, list[Span]] = {"tokens": [], "weights": [], "gradients": [], "other": []}
    computing = []
    for name, span in spans:
        if "nccl" in name.lower():
            kind = next((kind for part, kind in _KINDS.items() if part in name.lower().replace("_", "")), "other")
            kinds[kind].append(span)
        else:
            computing.append(span)
    exchange = _union([span for of_kind in kinds.values() for span in of_kind])
    computing = _union(computing)
    whole = max(end for _, (_, end) in spans) - min(start for _, (start, _) in spans)
    busy, exchanging = _length(_union([*exchange, *computing])), _length(exchange)
    both = exchanging + _length(computing) - busy
    parts = (_length(_union(kinds[kind])) / whole for kind in ("tokens", "weights", "gradients"))
    return Shares(exchanging / whole, *parts, both / exchanging if exchanging else 0.0, 1 - busy / whole)


def _union(spans: list[Span]) -> list[Span]:
    """The spans without overlaps, in order."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def _length(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)
