"""The rank of this process, found by Lightning's cluster environments.

For a single process it is known without importing torch.
"""

import os
import re
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from vmoe.errors import UserError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment

_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_OF_PYTORCHJOB = {"KUBERNETES_SERVICE_HOST", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"}


class Process(NamedTuple):
    """One of the ranks of a run.

    Attributes:
        rank: The rank among all processes.
        world_size: The number of ranks.
        local_rank: The rank on its machine.
        local_world_size: The number of ranks on its machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def this(cls) -> "Process":
        """This process, as torchrun, srun, mpirun, jsrun or a PyTorchJob started it; else a single rank.

        Raises:
            UserError: The cluster's variables are incomplete.
        """
        environment = cluster_environment()
        if environment is None:
            return cls()
        local_rank, world_size = environment.local_rank(), environment.world_size()
        local_world_size = _local_world_size(environment)
        if world_size % local_world_size:
            raise UserError(
                f"{world_size} processes, {local_world_size} of them on this machine: start as many on each machine"
            )
        return cls(environment.global_rank(), world_size, local_rank, local_world_size)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0


def cluster_environment() -> "ClusterEnvironment | None":
    """The cluster environment that started this process as one of several ranks; None for a single process.

    Lightning's own search would treat a script of sbatch that does not call srun as one of several ranks.

    Raises:
        UserError: The cluster's variables are incomplete.
    """
    kind = _kind()
    return None if kind is None else _environment(kind)


@cache
def _environment(kind: str) -> "ClusterEnvironment":
    from lightning.fabric.plugins import environments  # here: a single process does not need this slow import

    options = {"auto_requeue": False} if kind == "SLURM" else {}  # runs resume by --resume instead
    try:
        return getattr(environments, f"{kind}Environment")(**options)
    except (RuntimeError, ModuleNotFoundError) as error:
        raise UserError(f"{kind}: {' '.join(str(error).split())}") from error


def _kind() -> str | None:
    """The name of Lightning's environment, from variables that only its launcher sets."""
    given = os.environ
    if "TORCHELASTIC_RUN_ID" in given:  # first, since srun may start torchrun
        return "TorchElastic"
    if _is_several(given.get("OMPI_COMM_WORLD_SIZE")):  # before SLURM, since mpirun starts its daemons by srun
        return "MPI"
    # a batch script itself is no SLURM step; an interactive shell may be a step of a single task
    tasks = given.get("SLURM_STEP_NUM_TASKS", given.get("SLURM_NTASKS"))
    if "SLURM_STEP_ID" in given and _is_several(tasks):
        return "SLURM"
    if "JSM_NAMESPACE_RANK" in given and _is_several(given.get("JSM_NAMESPACE_SIZE")):
        return "LSF"
    if any(_is_several(given.get(name)) for name in _OF_MPI):
        return "MPI"
    return "Kubeflow" if given.keys() >= _OF_PYTORCHJOB and _is_several(given["WORLD_SIZE"]) else None


def _is_several(count: str | None) -> bool:
    return count is not None and count.isdecimal() and int(count) > 1


def _local_world_size(environment: "ClusterEnvironment") -> int:
    """The number of ranks on this machine, which Lightning's environments do not provide."""
    name = type(environment).__name__
    if name == "MPIEnvironment":
        return environment._comm_local.Get_size()  # `local_rank` has created it
    if name == "SLURMEnvironment":
        return _slurm_tasks_per_node()
    variable = {"TorchElasticEnvironment": "LOCAL_WORLD_SIZE", "LSFEnvironment": "JSM_NAMESPACE_LOCAL_SIZE"}.get(name)
    return 1 if variable is None else int(os.environ[variable])


def _slurm_tasks_per_node() -> int:
    """The tasks of this step on each machine: SLURM writes "4(x2),3" for 4, 4 and 3."""
    per_node = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_NTASKS_PER_NODE", "1"))
    counts = {int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?", per_node)}
    if len(counts) > 1:
        raise UserError(f"SLURM: {per_node} tasks per machine: start as many on each machine")
    return counts.pop()
