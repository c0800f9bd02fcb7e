"""The largest model that trains: a ViT whose depth grows by pairs of a dense and an MoE block until memory is full."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from vmoe.bench.scaling.fit import Images, Stopwatch, train
from vmoe.bench.scaling.jobs import CLASSES, Job
from vmoe.checkpoints import build_model
from vmoe.training.ema import local
from vmoe.training.parallel import cut_of
from vmoe.training.processes import gather

_ROOM = 0.97  # of the memory that is there may be planned with; the rest goes in pieces too small to use


def grow(job: Job, device: torch.device, known: dict[int, float], failed: int | None) -> Iterator[dict[str, Any]]:
    """Trains larger and larger models, and yields a row for each that fits.

    Args:
        job: The training; its model's depth is of no meaning.
        device: Of this process.
        known: MiB at most of a process, by pairs of blocks, of those that fitted before.
        failed: The fewest pairs that did not fit before; None where that is not known.

    Raises:
        Exception: the model does not fit, or something failed. `pairs` on it tells its size.
    """
    known = dict(known)
    while (pairs := next_size(known, failed, _capacity_mib(job, device))) is not None:
        try:
            row = _train_one(job, device, pairs)
        except Exception as error:
            error.pairs = pairs
            raise
        known[pairs] = max(row["peak_mib"])
        yield row


def next_size(known: dict[int, float], failed: int | None, capacity: float) -> int | None:
    """The size to try next; None when the largest that fits is known closely enough.

    Args:
        known: Memory by size, of those that fitted; grows evenly with size.
        failed: The smallest size that did not fit, or None.
        capacity: Memory that there is, in the same unit.
    """
    if not known:
        return 1 if failed is None else None
    best = max(known)
    if failed is not None:
        return None if failed - best <= max(1, best // 16) else (best + failed) // 2
    if len(known) == 1:
        return best + 1
    small, large = min(known), best
    each = (known[large] - known[small]) / (large - small)
    return max(best + 1, int(large + (_ROOM * capacity - known[large]) / each)) if each > 0 else best + 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was lacking, on a GPU or on the host; NCCL and gloo say so by messages alone."""
    says_so = any(words in str(error).lower() for words in ("out of memory", "allocate memory"))
    return says_so or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _train_one(job: Job, device: torch.device, pairs: int) -> dict[str, Any]:
    model = replace(job.model, kwargs={**job.model.kwargs, "depth": 2 * pairs})
    job = replace(job, model=model)
    with torch.device("meta"):
        model = build_model(model.name, model.kwargs, job.moe(), CLASSES, model.image_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cut = cut_of(job.config(device.type).parallel, job.processes, device.type)
    if cut is None:
        start(model, device)
    else:
        cut = partial(_cut_and_start, cut=cut, device=device)
    watch = Stopwatch(job.steps, device, warm_up=1)
    train(job, device, Images(job, 1 + job.steps, device, different=False), [watch], model=model, cut=cut)
    speed = watch.result()
    peaks = gather(speed.peak_mib)
    return {"pairs": pairs, "blocks": 2 * pairs, "parameters": parameters, "peak_mib": peaks, "step_ms": speed.step_ms}


def _cut_and_start(model: nn.Module, cut: Callable[[nn.Module], None], device: torch.device) -> None:
    cut(model)
    start(model, device)


@torch.no_grad()
def start(model: nn.Module, device: torch.device) -> None:
    """Gives a model on the meta device memory, of which each process takes its part only, and random weights."""
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            local(parameter).normal_(std=0.02)
        else:
            local(parameter).fill_(1.0 if name.endswith("weight") else 0.0)
    for buffer in model.buffers():
        buffer.zero_()


def _capacity_mib(job: Job, device: torch.device) -> float:
    """What this process can allocate; the least of all processes'."""
    if device.type != "cuda":
        return min(gather((job.memory or 1.0) * 2**10))
    free, whole = torch.cuda.mem_get_info(device)
    mine = (free + torch.cuda.memory_reserved(device)) / 2**20
    limit = whole / 2**20 if job.memory is None else job.memory * 2**10
    return min(gather(min(mine, limit)))
