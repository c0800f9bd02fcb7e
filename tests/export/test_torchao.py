"""What torchao makes of stacked experts, for which int8 experts are ours: a test that fails tells that it changed."""

import warnings

import pytest
import torch

import vmoe
from vmoe.moe.experts import ExpertLinear

quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)


@pytest.fixture
def model():
    torch.manual_seed(0)
    moe = vmoe.MoeConfig(layers=[1], num_experts=3)
    small = {"num_classes": 5, "img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return vmoe.create_model("vit_tiny_patch16_224", moe, **small).eval()


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_plain(parameter: torch.Tensor) -> bool:
    return type(parameter) is torch.nn.Parameter and parameter.dtype == torch.float32


@torch.no_grad()
def test_it_passes_experts_over_and_takes_the_router_with_the_linear_layers(model):
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    found = {name: is_plain(parameter) for name, parameter in model.named_parameters() if name.endswith(".weight")}
    assert not found["blocks.1.attn.qkv.weight"]
    assert not found["blocks.1.mlp.router.gate.weight"]  # which we keep in float32
    assert found["blocks.1.mlp.experts.fc1.weight"] and found["blocks.1.mlp.experts.fc2.weight"]
    assert model(torch.randn(2, 3, 16, 16)).isfinite().all()


@torch.no_grad()
def test_experts_that_it_is_made_to_take_do_not_run(model):
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, ExpertLinear)
    )
    assert not is_plain(model.blocks[1].mlp.experts.fc1.weight)
    with pytest.raises(NotImplementedError, match="unimplemented operator"):
        model(torch.randn(2, 3, 16, 16))
