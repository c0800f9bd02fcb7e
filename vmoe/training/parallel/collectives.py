"""What the processes of a run say to one another.

With one process every function here returns what it was given.
"""

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from vmoe.errors import UserError
from vmoe.training.parallel.process import Process, cluster_environment

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=10)  # of a process that hangs; torchrun notices one that died in seconds
_meshes: list[DeviceMesh] = []


def connect(device_type: str) -> None:
    """Lets the processes talk, once: on GPUs through NCCL, and through gloo what is on the host."""
    if dist.is_initialized():
        return
    process = Process.this()
    rank_zero_only.rank = process.rank  # which Lightning's loggers ask, and only its Trainer knows under mpirun
    backend = "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(process.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    rank, world_size = process.rank, process.world_size
    if world_size == 1:
        store = dist.HashStore()
    else:
        environment = cluster_environment()
        os.environ |= {"MASTER_ADDR": environment.main_address, "MASTER_PORT": str(environment.main_port)}
        store, _, _ = next(rendezvous(f"env://?rank={rank}&world_size={world_size}", timeout=_TIMEOUT))
        # Apart from what processes of an earlier attempt left in torchrun's store: their addresses
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)


@cache
def second_host_group() -> dist.ProcessGroup:
    """Another group of all processes, through gloo, for the one thread beside the main one; all must call it."""
    return dist.new_group(timeout=_TIMEOUT, backend="gloo")


def new_mesh(device_type: str, shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> DeviceMesh:
    """All processes in an array, of use until `disconnect`; all must call it."""
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
    _meshes.append(mesh)
    return mesh


def disconnect() -> None:
    """Ends what `connect` began, and its threads where nobody holds a group any more; all must call it.

    A thread of gloo frees what it sent after the sender has gone on, and needs the interpreter for it: where that ends
    meanwhile the process aborts (https://github.com/pytorch/pytorch/issues/190489). Groups wait for their threads.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    second_host_group.cache_clear()
    for mesh in _meshes:  # which torch keeps with what it has computed of DTensors
        getattr(mesh, "_pg_registry", {}).clear()
    _meshes.clear()
    gc.collect()  # models and trainers, in cycles


def is_alone() -> bool:
    """Whether there is nobody to talk to."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def rank_of_all() -> tuple[int, int]:
    """This process's rank and the number of processes, whoever has connected them: also Lightning's own launcher."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes; all must call it."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def largest(tensor: Tensor) -> Tensor:
    """The largest of each element over the processes; all must call it."""
    return _reduced(tensor, dist.ReduceOp.MAX)


class Flag:
    """A flag that any process may raise; all see it raised in the same step, the one after, and none waits for it."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Any] | None = None

    def seen(self, is_raised: bool) -> bool:
        """Whether one of the processes had raised it when they called this the last time; all must call it."""
        if is_alone():
            return is_raised
        was_raised = self.settle()
        flag = torch.tensor(int(is_raised or was_raised))  # on the host: nobody waits for a GPU
        self._pending = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        return was_raised

    def settle(self) -> bool:
        """What the last call of `seen` was about."""
        if self._pending is None:
            return False
        flag, work = self._pending
        work.wait()
        self._pending = None
        return bool(flag)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(value: T) -> list[T]:
    """Everybody's plain value, by rank; all must call it."""
    if is_alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(job: Callable[[], T]) -> T:
    """What `job` returns, once it has succeeded in all processes.

    Raises:
        UserError: it did so in one of them: then in all, so that none waits for it, with the lines of all that differ.
    """
    result, line = None, None
    try:
        result = job()
    except UserError as error:
        line = str(error)
    lines = gather(line)
    if any(lines):
        differing = dict.fromkeys(line for line in lines if line)
        ranks = ["" if None not in lines else f"rank {lines.index(line)}: " for line in differing]
        joined = "; ".join(rank + line for rank, line in zip(ranks, differing, strict=True))
        raise UserError(joined, everywhere=not is_alone())
    return result


def _reduced(tensor: Tensor, how: Any) -> Tensor:
    if is_alone():
        return tensor
    reduced = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.clone()
    dist.all_reduce(reduced, how)
    return reduced.to(tensor.dtype)
