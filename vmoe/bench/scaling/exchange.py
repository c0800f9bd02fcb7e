"""How much of a step the processes' exchange takes, and how much of that is hidden behind computation."""

from typing import NamedTuple

import torch

Span = tuple[float, float]  # start and end, in microseconds
_KINDS = {"sendrecv": "tokens", "alltoall": "tokens", "allgather": "weights", "reducescatter": "gradients",
          "allreduce": "gradients"}  # fmt: skip


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


def kernel_spans(profile: torch.profiler.profile) -> list[tuple[str, Span]]:
    """The name and time of all that ran on the device."""
    return [
        (event.name, (event.time_range.start, event.time_range.end))
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and event.time_range.end > event.time_range.start
        and not getattr(event, "is_user_annotation", False)
    ]  # fmt: skip


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
