"""Writes checkpoints in the background in two processes, and holds the writes back at critical moments.

The first process prints its findings, and `test_async_save.py` checks them.
"""

import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from gloo_threads import gloo_threads
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from vmoe.checkpoints import copy_checkpoint
from vmoe.checkpoints.sharded import read_folder
from vmoe.errors import UserError
from vmoe.training.parallel.collectives import connect, disconnect, gather, new_mesh, total
from vmoe.training.parallel.folder_writer import FolderWriter
from vmoe.training.parallel.process import Process

write, may_write = dcp.FileSystemWriter.write_data, threading.Event()
disk_is_full = False


def held_write(self, *arguments):
    """Waits until it may write."""
    may_write.wait()
    if disk_is_full and Process.this().rank == 1:
        raise OSError(28, "No space left on device")
    return write(self, *arguments)


def state(value: float) -> dict[str, Tensor]:
    """A sharded weight, its average and step, and a weight that all processes have whole."""
    sharded = distribute_tensor(torch.full((3, 2), value), new_mesh("cpu", (2,)), [Shard(0)])
    whole, step = torch.full((2,), value), torch.tensor(value)
    return {"weights/a": sharded, "weights/b": whole, "optimizer/a/step": step, "ema/a": sharded.clone()}


def plain(epoch: int) -> dict:
    """A small plain part of a checkpoint."""
    return {"vmoe": {"epoch": torch.tensor(epoch), "ema": {}}, "optimizer_states": [{}]}


def train(tensors: dict[str, Tensor]) -> None:
    """Changes tensors in place and communicates, as training does."""
    for tensor in tensors.values():
        tensor.add_(1)
        total(torch.ones(3))


def content(path: Path) -> list[float]:
    """The values of a folder's tensors; each tensor has one value throughout."""
    found = read_folder(path)
    step = found["optimizer_states"][0]["state"]["a"]["step"]
    tensors = [*found["state_dict"].values(), step, found["vmoe"]["ema"]["weights"]["a"], found["vmoe"]["epoch"]]
    return [value for tensor in tensors for value in tensor.unique().tolist()]


def log(line: object) -> None:
    """Prints a line of the first process, once all processes have reached this point."""
    gather(None)
    if Process.this().is_first:
        print(line, flush=True)
    gather(None)


best, last = Path(sys.argv[1]) / "best.ckpt", Path(sys.argv[1]) / "last.ckpt"
dcp.FileSystemWriter.write_data = held_write
connect("cpu")
writer = FolderWriter(in_background=True)
tensors, rest = state(1.0), plain(1)
writer.write(tensors, rest, best)
writer.then(partial(copy_checkpoint, best, last))
train(tensors)
rest["vmoe"]["epoch"] += 1
log(f"under way: {best.exists()} {last.exists()} {writer.failed}")
may_write.set()
writer.wait()
log(f"written: {content(best)} {content(last)}" if Process.this().is_first else "")

may_write.clear()
writer.write(tensors, rest, best)
threading.Timer(0.5, may_write.set).start()
writer.write(state(3.0), plain(3), last)  # waits for the previous folder
log(f"the one before: {content(best)}" if Process.this().is_first else "")
writer.wait()
log(f"both: {content(best)} {content(last)}" if Process.this().is_first else "")

disk_is_full = True
writer.write(state(4.0), plain(4), best)
writer.then(partial(copy_checkpoint, best, last))
while not writer.failed:
    time.sleep(0.01)
try:
    writer.wait()
except UserError as error:
    log(f"failed: {error.everywhere} {error}")
log(f"left: {content(best)} {content(last)} {sorted(path.name for path in last.parent.iterdir())} {writer.failed}")
disk_is_full = False
writer.write(state(5.0), plain(5), last)
writer.wait()
log(f"again: {content(last)}" if Process.this().is_first else "")
disconnect()
if Process.this().is_first:
    print(f"threads of gloo: {gloo_threads()}")
