"""Communication between the ranks of a run.

With one rank every function returns its input.
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
_TIMEOUT = timedelta(minutes=10)  # for a rank that hangs; torchrun notices one that died within seconds
_meshes: list[DeviceMesh] = []


def connect(device_type: str) -> None:
    """Connects the ranks, once: NCCL for tensors on GPUs, gloo for those on the host."""
    if dist.is_initialized():
        return
    process = Process.this()
    rank_zero_only.rank = process.rank  # Lightning's loggers read it; under mpirun only a Trainer would set it
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
        # a prefix per attempt: torchrun's store still holds the addresses of an earlier attempt's processes
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)


@cache
def second_host_group() -> dist.ProcessGroup:
    """A second gloo group of all ranks, for a thread beside the main one. All ranks must call it."""
    return dist.new_group(timeout=_TIMEOUT, backend="gloo")


def new_mesh(device_type: str, shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> DeviceMesh:
    """A device mesh of all ranks, valid until `disconnect`. All ranks must call it."""
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
    _meshes.append(mesh)
    return mesh


def disconnect() -> None:
    """Destroys the groups of `connect`, and with the last reference to a group its threads. All ranks must call it.

    A thread of gloo frees its buffers late and needs the interpreter for that. If the interpreter ends first, the
    process aborts (https://github.com/pytorch/pytorch/issues/190489). A freed group waits for its threads.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    second_host_group.cache_clear()
    for mesh in _meshes:  # torch's caches of DTensors keep the meshes alive, and these their groups
        getattr(mesh, "_pg_registry", {}).clear()
    _meshes.clear()
    gc.collect()  # frees models and trainers, which hold groups in reference cycles


def is_alone() -> bool:
    """Whether there is only one rank."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def rank_of_all() -> tuple[int, int]:
    """This process's rank and the world size, whichever launcher connected the ranks (Lightning's own included)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the ranks. All ranks must call it."""
    return _reduced(tensor, dist.ReduceOp.SUM)


def largest(tensor: Tensor) -> Tensor:
    """The elementwise maximum of a tensor over the ranks. All ranks must call it."""
    return _reduced(tensor, dist.ReduceOp.MAX)


class Flag:
    """A flag that any rank may raise. All ranks see it in the next step, and no rank waits for it."""

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Any] | None = None

    def seen(self, is_raised: bool) -> bool:
        """Whether any rank had raised the flag in the previous call. All ranks must call it."""
        if is_alone():
            return is_raised
        was_raised = self.settle()
        flag = torch.tensor(int(is_raised or was_raised))  # on the host, so that no rank synchronises with a GPU
        self._pending = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        return was_raised

    def settle(self) -> bool:
        """Waits for the previous call of `seen`, and returns whether any rank had raised the flag."""
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
    """The plain values of all ranks, in order of rank. All ranks must call it."""
    if is_alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(job: Callable[[], T]) -> T:
    """Runs `job` and returns its result once it has succeeded on all ranks.

    Raises:
        UserError: It failed on one rank. Then all ranks raise, so that none waits, with all different messages.
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
