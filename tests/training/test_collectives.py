"""Processes that talk: an end leaves no thread of theirs."""

import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, distribute_tensor

from vmoe.training.parallel import collectives

MAIN = threading.main_thread()


class Slow:
    """Takes a thread of gloo a while to free, and tells when it is freed."""

    def __init__(self) -> None:
        self.is_freed = threading.Event()

    def __del__(self) -> None:
        if threading.current_thread() is not MAIN:
            time.sleep(0.3)
        self.is_freed.set()


def of_a_mesh() -> dist.ProcessGroup:
    """The group of all, which a mesh has too that torch keeps."""
    mesh = collectives.new_mesh("cpu", (1,))
    distribute_tensor(torch.ones(2), mesh, [Replicate()]).add_(1)
    return mesh.get_group()


def sent_late(group: dist.ProcessGroup) -> threading.Event:
    """What tells that a thread of gloo has freed a tensor it has sent, long after the sender went on."""
    for _ in range(100):  # where it has sent it before `then`, the main thread is the last that has it
        sent = torch.ones(2**24)  # enough to copy for that to be rare
        sent.slow = Slow()
        is_freed = sent.slow.is_freed
        work = dist.all_gather([torch.empty_like(sent)], sent, group=group, async_op=True)
        done = work.get_future()
        done.then(lambda _: None if threading.current_thread() is MAIN else time.sleep(0.3))
        done.wait()
        del work, done, sent
        if not is_freed.is_set():
            return is_freed
    raise AssertionError("the main thread was always the last")


@pytest.mark.parametrize("group_of", [of_a_mesh, collectives.second_host_group])
def test_the_end_waits_for_threads_that_have_yet_to_free_what_they_sent(group_of):
    collectives.connect("cpu")
    is_freed = sent_late(group_of())
    collectives.disconnect()
    assert is_freed.is_set()


def test_the_second_group_is_one_until_the_end_and_another_after_it():
    collectives.connect("cpu")
    first = id(collectives.second_host_group())
    assert id(collectives.second_host_group()) == first
    collectives.disconnect()
    collectives.connect("cpu")
    value = torch.ones(1)
    dist.all_reduce(value, group=collectives.second_host_group())
    collectives.disconnect()
    assert value == 1
