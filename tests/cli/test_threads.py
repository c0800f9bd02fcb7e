"""Threads are chosen by the cores that a process may use: its affinity, its quota, its workers."""

import os
import subprocess
import sys

import pytest
import torch

from vmoe.cli.threads import choose_threads, cpu_quota


@pytest.fixture
def threads(monkeypatch):
    """Torch's threads, put back afterwards; nothing in the environment decides them."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("vmoe.cli.threads.cpu_quota", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr(sys, "platform", "linux")
    before = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("quota", "workers", "processes", "expected", "told"),
    [
        (None, 0, 1, 6, "6, by 6 cores"),
        (None, 2, 1, 4, "4, by 6 cores, 2 workers"),
        (None, 12, 1, 1, "1, by 6 cores, 12 workers"),
        (None, 0, 2, 3, "3, by 6 cores, 2 processes"),
        (2.5, 0, 1, 2, "2, by 6 cores, a quota of 2.5"),
        (0.5, 0, 1, 1, "1, by 6 cores, a quota of 0.5"),
    ],
)
def test_threads_are_the_cores_that_are_left(threads, quota, workers, processes, expected, told):
    threads.setattr("vmoe.cli.threads.cpu_quota", lambda: quota)
    assert choose_threads(workers, processes) == told
    assert torch.get_num_threads() == expected


def test_a_user_s_own_number_stays(threads):
    torch.set_num_threads(3)
    threads.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads() == "3, by OMP_NUM_THREADS"
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "400000 100000\n"}, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "400000 100000\n"}, 3),
        ("0::/../elsewhere\n", {"cpu.max": "200000 100000\n"}, 2),
        ("4:cpu,cpuacct:/c\n", {"cpu/c/cpu.cfs_quota_us": "50000\n", "cpu/c/cpu.cfs_period_us": "100000\n"}, 0.5),
        ("4:cpu,cpuacct:/c\n", {"cpu/c/cpu.cfs_quota_us": "-1\n", "cpu/c/cpu.cfs_period_us": "100000\n"}, None),
        ("3:memory:/c\n", {}, None),
    ],
)
def test_the_quota_of_control_groups(tmp_path, groups, files, quota):
    own = tmp_path / "own"
    own.write_text(groups)
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(text)
    assert cpu_quota(tmp_path / "mount", own) == quota
    assert cpu_quota(tmp_path / "mount", tmp_path / "none") is None


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_waiting_threads_sleep_before_torch_is_there(given, policy):
    code = "import os, sys\nfrom vmoe.cli.common import run\n"
    code += "run(lambda argv: print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules), [])"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{policy} False\n"
