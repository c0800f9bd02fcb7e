"""Gradients that all processes have become their means, on their way while the backward pass still runs."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET = 2**24  # numbers: large enough for the link's bandwidth, small beside a model


class GradientMeans:
    """Averages the gradients of the parameters that are not cut, in buckets, as torch's DistributedDataParallel does.

    A bucket starts when its last gradient is there and those before it have started: in the same order everywhere. The
    gradients become parts of it. Unlike DistributedDataParallel, all of it can be captured in a CUDA graph.

    Args:
        parameters: In the order of the forward pass.
        in_backward: Starts buckets in the backward pass; else in `finish`, where several passes make an update.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], in_backward: bool) -> None:
        whole = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
        self._buckets = list(buckets(whole[::-1]))
        self._missing = [len(bucket) for bucket in self._buckets]
        self._started = 0
        self._travelling: list[tuple[Tensor, dist.Work]] = []
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))
            for number, bucket in enumerate(self._buckets)
            for parameter in (bucket if in_backward else ())
        ]

    def finish(self) -> None:
        """Waits for the means; all processes must call it after each update's last backward pass."""
        self._start_until(len(self._buckets))
        for together, work in self._travelling:
            work.wait()
            together.div_(dist.get_world_size())
        self._travelling.clear()
        self._missing = [len(bucket) for bucket in self._buckets]
        self._started = 0

    def remove(self) -> None:
        """Leaves the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _arrived(self, number: int, _: nn.Parameter) -> None:
        self._missing[number] -= 1
        ready = next((n for n, missing in enumerate(self._missing) if missing), len(self._missing))
        self._start_until(ready)

    def _start_until(self, number: int) -> None:
        for bucket in self._buckets[self._started : number]:
            if learning := [parameter for parameter in bucket if parameter.grad is not None]:
                together = _together(learning)
                self._travelling.append((together, dist.all_reduce(together, async_op=True)))
        self._started = max(self._started, number)


def _together(parameters: list[nn.Parameter]) -> Tensor:
    """The gradients of some parameters in one piece of memory, of which they are parts from now on."""
    if len(parameters) == 1:
        return parameters[0].grad
    together = torch.cat([parameter.grad.flatten() for parameter in parameters])
    for parameter, part in zip(parameters, together.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return together


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type that travel together, in their order: each bucket as few as reach `BUCKET` numbers."""
    for _, alike in groupby(tensors, key=lambda tensor: tensor.dtype):
        bucket: list[Tensor] = []
        for tensor in alike:
            bucket.append(tensor)
            if sum(map(Tensor.numel, bucket)) >= BUCKET:
                yield bucket
                bucket = []
        if bucket:
            yield bucket
