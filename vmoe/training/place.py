"""Which of a run's processes this is; known before torch is imported."""

import os
from typing import NamedTuple


class Place(NamedTuple):
    """Where a process stands.

    Attributes:
        rank: Its number among all processes.
        count: Processes in all.
        local_rank: Its number on its machine.
        local_count: Processes on its machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @classmethod
    def of_this(cls) -> "Place":
        """As torchrun tells it in the environment; one process alone where it did not start this one."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return cls(*(int(os.environ[name]) for name in names)) if "TORCHELASTIC_RUN_ID" in os.environ else cls()

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0
