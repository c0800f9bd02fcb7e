"""A whole training step as one CUDA graph: the host makes one launch instead of a thousand."""

from collections.abc import Callable

import torch
from torch import Tensor

from vmoe.data import Batch
from vmoe.errors import UserError
from vmoe.memory import is_out_of_memory

WARM_UP_STEPS = 3  # eager steps that compile, choose algorithms and create the optimiser's state


class GraphedStep:
    """Runs a step eagerly a few times, then captures it and replays the capture.

    Every batch is copied into the same memory. Batches of another shape, type or set of fields get a graph of their
    own. A graph advances the device's generator, so random numbers are the same as in eager steps.

    Args:
        step: Maps a batch to its loss, (). It updates tensors only in place and never synchronises with the device.
    """

    def __init__(self, step: Callable[[Batch], Tensor]) -> None:
        self._step = step
        # one stream for eager steps and captures: autograd accumulates a gradient on the stream of its first use
        self._stream = torch.cuda.Stream()
        self.forget()

    def forget(self) -> None:
        """Drops all graphs. Call it when the step changes."""
        self._steps_done: dict[tuple, int] = {}
        self._batches: dict[tuple, Batch] = {}
        self._captured: dict[tuple, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, batch: Batch) -> Tensor:
        """Runs the step. The next step overwrites the returned loss.

        Raises:
            UserError: The step cannot be captured.
        """
        signature = _signature(batch)
        batch = self._in_place(signature, batch)
        done = self._steps_done[signature] = self._steps_done.get(signature, 0) + 1
        if done <= WARM_UP_STEPS:
            return self._eager(batch)
        if signature not in self._captured:
            self._captured[signature] = self._capture(batch)
        graph, loss = self._captured[signature]
        graph.replay()
        return loss

    def _in_place(self, signature: tuple, batch: Batch) -> Batch:
        """Copies the batch into the memory that its graph reads."""
        if signature not in self._batches:
            # the first batch of a shape becomes the fixed memory of its graph
            self._batches[signature] = Batch(*(_cloned(field) for field in batch))
        static = self._batches[signature]
        for target, source in zip(static, batch, strict=True):
            if isinstance(target, Tensor):
                target.copy_(source)
        return static

    def _eager(self, batch: Batch) -> Tensor:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = self._step(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        return loss

    def _capture(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        try:
            # thread-local mode: the loader's thread may pin memory during the capture
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                loss = self._step(batch)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"trainer.cuda_graph: the step of this model cannot be captured ({reason})") from error
        return graph, loss


def _signature(batch: Batch) -> tuple:
    return tuple((tuple(field.shape), field.dtype) if isinstance(field, Tensor) else None for field in batch)


def _cloned(field: object) -> object:
    return field.clone() if isinstance(field, Tensor) else field
