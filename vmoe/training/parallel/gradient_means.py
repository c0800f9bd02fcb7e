"""Averages gradients over the ranks while the backward pass still runs."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

BUCKET = 2**24  # numbers per bucket: large enough for the link's bandwidth, small beside a model


class GradientMeans:
    """Averages the gradients of parameters that are not sharded, in buckets, as DistributedDataParallel does.

    A bucket starts when all its gradients are ready and the buckets before it have started. So the order is the same on
    all ranks. The gradients become views of the bucket. Unlike DistributedDataParallel, a CUDA graph can capture it.

    Args:
        parameters: The parameters, in the order of the forward pass.
        in_backward: Whether buckets start in the backward pass. With several passes per update they start in `finish`.
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
        """Waits for the means. All ranks must call it after the last backward pass of each update."""
        self._start_until(len(self._buckets))
        for together, work in self._travelling:
            work.wait()
            together.div_(dist.get_world_size())
        self._travelling.clear()
        self._missing = [len(bucket) for bucket in self._buckets]
        self._started = 0

    def remove(self) -> None:
        """Removes the hooks from the parameters."""
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
    """Copies the gradients of some parameters into one buffer. From then on they are views of it."""
    if len(parameters) == 1:
        return parameters[0].grad
    together = torch.cat([parameter.grad.flatten() for parameter in parameters])
    for parameter, part in zip(parameters, together.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return together


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Splits tensors, in order, into buckets of one type. A bucket ends once it has `BUCKET` numbers."""
    for _, alike in groupby(tensors, key=lambda tensor: tensor.dtype):
        bucket: list[Tensor] = []
        for tensor in alike:
            bucket.append(tensor)
            if sum(map(Tensor.numel, bucket)) >= BUCKET:
                yield bucket
                bucket = []
        if bucket:
            yield bucket
