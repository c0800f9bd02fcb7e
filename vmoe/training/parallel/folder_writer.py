"""Checkpoint folders: each process writes its parts of the tensors, through torch.distributed.checkpoint."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from vmoe.checkpoints.sharded import SafeReader, write_plain_part
from vmoe.errors import UserError
from vmoe.files import new_folder
from vmoe.training.parallel.collectives import gather, second_host_group, together
from vmoe.training.parallel.process import Process


class FolderWriter:
    """Writes checkpoint folders, each beside its place, and renames it when it is whole in all processes.

    All processes must make the same calls, but for `failed` and `leave`.

    Args:
        in_background: Training goes on as soon as the tensors are copied to the host, while a thread writes them. One
            folder at a time: the next waits.
    """

    def __init__(self, in_background: bool = False) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._under_way: Future[None] | None = None

    def write(self, tensors: dict[str, Tensor], plain: dict[str, Any], path: Path) -> None:
        """Writes a folder, or begins to.

        Args:
            tensors: Of this process, by names that are the same in all.
            plain: All else, of the first process.
            path: The folder.

        Raises:
            UserError: one of the processes cannot write, this folder or the one before; what was there before stays.
        """
        self.wait()
        is_first = Process.this().is_first
        with ExitStack() as stack:
            own = together(lambda: stack.enter_context(new_folder(path)) if is_first else None)
            folder = gather(own)[0]
            writer = dcp.FileSystemWriter(folder)
            together(lambda: _write_plain(plain, folder, path) if is_first else None)
            if self._thread is None:
                together(lambda: _finish(lambda: dcp.save(tensors, storage_writer=writer), stack.pop_all(), path))
                return
            own_group = second_host_group()  # what the thread sends must not mix with what training sends
            copied = dcp.async_save(tensors, storage_writer=writer, process_group=own_group)
            self._under_way = self._thread.submit(_finish, copied.result, stack.pop_all(), path)

    def then(self, job: Callable[[], None]) -> None:
        """Does `job` in the first process once the last folder is in its place; a failure of it is one of the folder.

        Raises:
            UserError: the job failed, where nothing is under way.
        """
        is_first, before = Process.this().is_first, self._under_way
        if before is None:
            together(lambda: job() if is_first else None)
        elif is_first:
            self._under_way = self._thread.submit(_follow, before, job)

    @property
    def failed(self) -> bool:
        """Whether this process knows already that the folder under way has failed, which `wait` will tell."""
        return self._under_way is not None and self._under_way.done() and self._under_way.exception() is not None

    def wait(self) -> None:
        """Returns when nothing is under way.

        Raises:
            UserError: the folder under way could not be written; what was there before stays.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            together(under_way.result)

    def leave(self) -> str | None:
        """Waits in this process alone, which something else has stopped; what failed, if anything did."""
        under_way, self._under_way = self._under_way, None
        error = None if under_way is None else under_way.exception()
        return None if error is None else " ".join(str(error).split())


def _finish(write: Callable[[], Any], folder: ExitStack, path: Path) -> None:
    """Puts a new folder in its place once `write` has filled it, or removes it."""
    with folder:
        try:
            write()
        except CheckpointException as failed:  # in all processes; it knows what failed in each
            error = next(iter(failed.failures.values()))[0]
            raise UserError(_line(path, error), everywhere=True) from error


def _follow(before: Future[None], job: Callable[[], None]) -> None:
    before.result()
    job()


def _write_plain(plain: dict[str, Any], folder: Path, path: Path) -> None:
    try:
        write_plain_part(folder, plain)
    except (OSError, RuntimeError) as error:  # what torch makes of a failed write
        raise UserError(_line(path, error)) from error


def _line(path: Path, error: BaseException) -> str:
    reason = " ".join(str(error).split())[:100]
    return f"{path}: cannot be written ({reason}); is the disk full?"


def load_tensors(targets: dict[str, Tensor], path: Path) -> None:
    """Fills tensors, each process its parts of them, from a checkpoint folder; all processes must call it.

    Raises:
        UserError: the folder lacks some: other parameters were Muon's, which it is where matrices are whole.
    """
    reader = SafeReader(path)
    missing = targets.keys() - reader.read_metadata().state_dict_metadata.keys()
    if missing:
        raise UserError(
            f"{path}: has no {min(missing)}: optim.name=muon took other matrices with those processes; go on with as "
            "many, or with parallel.expert_size of all of them",
            everywhere=True,
        )
    dcp.load(targets, storage_reader=reader)
