"""Experts on two processes: the layer computes what it does in one, forward and backward, whatever its routing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vmoe.moe import MoeConfig, MoeMlp
from vmoe.moe.kernels import fused
from vmoe.moe.parallel import deal_out_experts

SCRIPT = Path(__file__).parents[1] / "expert_parallel_worker.py"


@pytest.mark.parametrize("how", ["cpu", "interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_layer_in_two_processes_is_the_layer_in_one(how):
    if how == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if how == "interpreted" and (fused is None or torch.cuda.is_available()):
        pytest.skip("needs Triton, and no GPU")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(SCRIPT), how], capture_output=True, text=True, timeout=90, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as in one process") == 14  # seven layers, in training and evaluation


class _TwoProcesses:
    def size(self) -> int:
        return 2


def test_experts_that_cannot_be_dealt_out_are_refused():
    layer = MoeMlp(8, 16, moe=MoeConfig(num_experts=3))
    with pytest.raises(ValueError, match="num_experts=3: cannot be dealt out to 2 processes"):
        deal_out_experts(layer, _TwoProcesses())
