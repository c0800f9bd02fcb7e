"""Which of a run's processes this is: by Lightning's cluster environments, as every user of Lightning starts them.

It is known before torch is imported where a process is alone.
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
    """One of the processes of a run.

    Attributes:
        rank: Its number among all processes.
        world_size: Processes in all.
        local_rank: Its number on its machine.
        local_world_size: Processes on its machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def this(cls) -> "Process":
        """This process, as torchrun, srun, mpirun, jsrun or a PyTorchJob has started it; alone where none has.

        Raises:
            UserError: the cluster does not say enough.
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
    """What has started this process as one of several; None where it is alone.

    Lightning's own search would take a script of sbatch that does not call srun for one of several processes.

    Raises:
        UserError: the cluster does not say enough.
    """
    kind = _kind()
    return None if kind is None else _environment(kind)


@cache
def _environment(kind: str) -> "ClusterEnvironment":
    from lightning.fabric.plugins import environments  # here, since a process that is alone need not wait for it

    options = {"auto_requeue": False} if kind == "SLURM" else {}  # a run goes on by --resume
    try:
        return getattr(environments, f"{kind}Environment")(**options)
    except (RuntimeError, ModuleNotFoundError) as error:
        raise UserError(f"{kind}: {' '.join(str(error).split())}") from error


def _kind() -> str | None:
    """The name of Lightning's environment, by the variables that only processes of its launcher have."""
    given = os.environ
    if "TORCHELASTIC_RUN_ID" in given:  # first, since srun may start torchrun
        return "TorchElastic"
    if _is_several(given.get("OMPI_COMM_WORLD_SIZE")):  # before SLURM, since mpirun starts its daemons by srun
        return "MPI"
    # A batch script itself is no step, and an interactive shell may be one, of a single task
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
    """Processes on this machine, which Lightning leaves to its users to say."""
    name = type(environment).__name__
    if name == "MPIEnvironment":
        return environment._comm_local.Get_size()  # which `local_rank` has made
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
