"""Checkpoint folders: each rank writes its shards of the tensors, through torch.distributed.checkpoint."""

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
    """Writes checkpoint folders. Each is written under a temporary name and renamed once all ranks have finished.

    All ranks must make the same calls, except `failed` and `leave`.

    Args:
        in_background: Whether a thread writes the tensors while training continues. Training waits only for their copy
            to the host, and for an earlier folder.
    """

    def __init__(self, in_background: bool = False) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._under_way: Future[None] | None = None

    def write(self, tensors: dict[str, Tensor], plain: dict[str, Any], path: Path) -> None:
        """Writes a folder, or starts to.

        Args:
            tensors: This rank's tensors, by names that all ranks share.
            plain: All else; the first rank's is written.
            path: The folder.

        Raises:
            UserError: A rank cannot write this folder or the one before. A folder that existed before stays.
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
            own_group = second_host_group()  # the thread's messages must not mix with training's
            copied = dcp.async_save(tensors, storage_writer=writer, process_group=own_group)
            self._under_way = self._thread.submit(_finish, copied.result, stack.pop_all(), path)

    def then(self, job: Callable[[], None]) -> None:
        """Runs `job` on the first rank once the last folder is complete. Its failure counts as one of the folder.

        Raises:
            UserError: The job failed, and no folder is being written.
        """
        is_first, before = Process.this().is_first, self._under_way
        if before is None:
            together(lambda: job() if is_first else None)
        elif is_first:
            self._under_way = self._thread.submit(_follow, before, job)

    @property
    def failed(self) -> bool:
        """Whether this rank already knows that the current folder has failed. `wait` then raises."""
        return self._under_way is not None and self._under_way.done() and self._under_way.exception() is not None

    def wait(self) -> None:
        """Waits until no folder is being written.

        Raises:
            UserError: The folder could not be written. A folder that existed before stays.
        """
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            together(under_way.result)

    def leave(self) -> str | None:
        """Waits on this rank alone, which another error has stopped. Returns the folder's failure, if any."""
        under_way, self._under_way = self._under_way, None
        error = None if under_way is None else under_way.exception()
        return None if error is None else " ".join(str(error).split())


def _finish(write: Callable[[], Any], folder: ExitStack, path: Path) -> None:
    """Renames a new folder to `path` once `write` has filled it, or removes it."""
    with folder:
        try:
            write()
        except CheckpointException as failed:  # raised on all ranks, with the failures of each
            error = next(iter(failed.failures.values()))[0]
            raise UserError(_line(path, error), everywhere=True) from error


def _follow(before: Future[None], job: Callable[[], None]) -> None:
    before.result()
    job()


def _write_plain(plain: dict[str, Any], folder: Path, path: Path) -> None:
    try:
        write_plain_part(folder, plain)
    except (OSError, RuntimeError) as error:  # torch raises these for a failed write
        raise UserError(_line(path, error)) from error


def _line(path: Path, error: BaseException) -> str:
    reason = " ".join(str(error).split())[:100]
    return f"{path}: cannot be written ({reason}); is the disk full?"


def load_tensors(targets: dict[str, Tensor], path: Path) -> None:
    """Fills each rank's shards of tensors from a checkpoint folder. All ranks must call it.

    Raises:
        UserError: The folder lacks some: Muon trained other parameters, since it needs matrices that are not sharded.
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
