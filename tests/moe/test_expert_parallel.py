"""Experts on two processes: the layer computes what it does in one, forward and backward, whatever its routing."""

from pathlib import Path

import pytest
import torch
from support.forks import run_forked

from vmoe.moe import MoeConfig, MoeMlp
from vmoe.moe.kernels import TRITON
from vmoe.moe.parallel import shard_experts

SCRIPT = Path(__file__).parents[1] / "support" / "expert_parallel_worker.py"
CAN_INTERPRET = TRITON.experts is not None and not torch.cuda.is_available()


def layers_computed(*ways: str) -> str:
    """What two processes print."""
    done = run_forked(SCRIPT, 2, *ways)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def on_the_cpu() -> str:
    """The layers in each way that needs no GPU, by processes that start once."""
    told = layers_computed("cpu", *(["interpreted"] if CAN_INTERPRET else []))
    assert told.count("threads of gloo: 0") == 2  # one that is left may abort its process
    return told


@pytest.mark.parametrize(
    "how",
    [
        "cpu",
        pytest.param("interpreted", marks=pytest.mark.skipif(not CAN_INTERPRET, reason="needs Triton, and no GPU")),
    ],
)
def test_a_layer_in_two_processes_is_the_layer_in_one(on_the_cpu, how):
    found = [line for line in on_the_cpu.splitlines() if line.endswith("as in one process")]
    assert sum(line.startswith(f"{how}, ") for line in found) == 20  # ten layers, in training and evaluation


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_layer_on_two_gpus_is_the_layer_on_one():
    assert layers_computed("cuda").count("as in one process") == 20


class _TwoProcesses:
    def size(self) -> int:
        return 2


def test_experts_that_cannot_be_dealt_out_are_refused():
    layer = MoeMlp(8, 16, moe=MoeConfig(num_experts=3))
    with pytest.raises(ValueError, match="num_experts=3: cannot be sharded over 2 ranks"):
        shard_experts(layer, _TwoProcesses())
