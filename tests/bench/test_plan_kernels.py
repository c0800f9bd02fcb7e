"""The planner beside the fused kernels, which Triton's interpreter runs where there is no GPU."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vmoe.bench.plan.trace import saved_bytes, trace_loss
from vmoe.moe import MoeConfig, MoeMlp, parallel
from vmoe.moe import layer as layer_module
from vmoe.moe.kernels import Kernels
from vmoe.moe.parallel import DistributedExperts

fused = pytest.importorskip(
    "vmoe.moe.kernels.experts.fused", reason="the fused backend needs Triton", exc_type=ImportError
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, WIDTH, IMAGES = 24, 32, 16


class _Alone(DistributedExperts):
    """Experts of the first of two processes, where what leaves arrives."""

    mesh = SimpleNamespace(size=lambda: 2)

    def _exchange(self, x_RD, arriving, sent):
        return x_RD * 1  # new memory, nothing kept

    def _local(self, parameter):
        return parameter


def _layer(device: str) -> nn.Sequential:
    moe = MoeConfig(num_experts=4, group=4, noise_std=0.0, capacity_multiple_of=1)
    return nn.Sequential(MoeMlp(WIDTH, 4 * WIDTH, moe=moe, tokens=TOKENS, device=device))


@pytest.mark.slow  # interpreted kernels; those of other layers: test_plan.py
def test_activations_of_experts_dealt_out_are_what_autograd_keeps(monkeypatch):
    model = _layer(DEVICE)
    experts = model[0].experts
    for module in (experts.fc1, experts.fc2):
        module.weight, module.bias = (nn.Parameter(part[:2].detach()) for part in (module.weight, module.bias))
    experts.__class__ = _Alone
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with saved_bytes(weights) as saved, monkeypatch.context() as patch:
        patch.setattr(layer_module, "kernels_for", lambda tensor: Kernels(None, fused))
        patch.setattr(parallel, "choose_backend", lambda *_: fused)
        result = model(torch.randn(IMAGES, TOKENS, WIDTH, device=DEVICE))
    assert result.isfinite().all()
    planned = _layer("meta")
    trace = trace_loss(planned, lambda: planned(torch.empty(IMAGES, TOKENS, WIDTH)).sum(), torch.float32, 2)
    assert trace.saved == pytest.approx(saved(), rel=0.05)
