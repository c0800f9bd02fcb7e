"""Which of several processes this is, by the variables of each launcher."""

import socket

import pytest

from vmoe.errors import UserError
from vmoe.training.parallel.process import Process

SLURM = {"SLURM_STEP_ID": 0, "SLURM_NTASKS": 4, "SLURM_PROCID": 3, "SLURM_LOCALID": 1, "SLURM_NODEID": 1}
TORCHRUN = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RUN_ID": "one"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "a", "MASTER_ADDR": "b", "MASTER_PORT": 1, "RANK": 1, "WORLD_SIZE": 2}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Process()),
        (TORCHRUN, Process(1, 2, 1, 2)),
        (SLURM | {"SLURM_NTASKS_PER_NODE": 2}, Process(3, 4, 1, 2)),
        (SLURM | TORCHRUN, Process(1, 2, 1, 2)),  # srun has started torchrun
        ({name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}, Process()),  # a batch script
        (SLURM | {"SLURM_STEP_NUM_TASKS": 1, "SLURM_JOB_NAME": "mine"}, Process()),  # the shell of an interactive job
        (SLURM | {"SLURM_NTASKS_PER_NODE": 2, "SLURM_JOB_NAME": "interactive"}, Process(3, 4, 1, 2)),  # srun in it
        (SLURM | {"SLURM_NTASKS_PER_NODE": 4, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, Process(3, 4, 1, 2)),
        (KUBERNETES, Process(1, 2, 0, 1)),
        ({"RANK": 1, "WORLD_SIZE": 2}, Process()),
    ],
)
def test_launchers_say_which_process_this_is(monkeypatch, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    assert Process.this() == expected


@pytest.mark.parametrize(
    ("per_node", "line"),
    [("3,1", "SLURM: 3,1 tasks per machine"), ("3", "4 processes, 3 of them on")],
)
def test_machines_with_unlike_numbers_of_tasks_are_one_line(monkeypatch, per_node, line):
    for name, value in (SLURM | {"SLURM_NTASKS_PER_NODE": 3, "SLURM_STEP_TASKS_PER_NODE": per_node}).items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=line):
        Process.this()


def test_lsf_says_which_process_this_is(monkeypatch, tmp_path):
    (tmp_path / "hosts").write_text(f"launcher\n{socket.gethostname()}\n{socket.gethostname()}\n")
    variables = {"JSM_NAMESPACE_RANK": 1, "JSM_NAMESPACE_SIZE": 2, "JSM_NAMESPACE_LOCAL_RANK": 1}
    variables |= {"JSM_NAMESPACE_LOCAL_SIZE": 2, "LSB_JOBID": 1, "MASTER_ADDR": "of the test", "MASTER_PORT": 1}
    for name, value in (variables | {"LSB_DJOB_RANKFILE": tmp_path / "hosts"}).items():
        monkeypatch.setenv(name, str(value))
    assert Process.this() == Process(1, 2, 1, 2)


def test_slurm_without_the_tasks_of_a_node_is_one_line(monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": 5}).items():
        monkeypatch.setenv(name, str(value))
    from vmoe.training.parallel import process

    process._environment.cache_clear()
    with pytest.raises(UserError, match=r"SLURM: .*--ntasks-per-node=5"):
        Process.this()
