"""MoE layers as exporters see them, against the layers themselves."""

from pathlib import Path

import pytest
import torch
from support.backbones import KINDS, SUPPORTED, Example
from torch import Tensor, nn

import vmoe
from vmoe import MoeConfig, MoeMlp
from vmoe.export.int8 import Int8Linear
from vmoe.export.layer import DenseExportedMoe, ExportedMoe, dense_cost, exportable_copy
from vmoe.export.programs import TOLERANCE, compare, convert
from vmoe.models.families import eligible_mlps

DIM, TOKENS = 8, 9
ROUTINGS = {
    **{f"K={k}": {"top_k": k} for k in (1, 2, 3)},
    "sigmoid": {"router": "sigmoid"},
    "cosine": {"router": "cosine", "renormalize": True},
    "hash": {"router": "hash", "top_k": 2},
    "expert choice": {"router": "expert_choice", "capacity_factor": 1.5},
    "soft": {"router": "soft", "capacity_factor": 1.0},
    "capacity": {"eval_capacity_factor": 0.6, "group": "image", "capacity_multiple_of": 1},
    "batch priority": {
        "eval_capacity_factor": 0.6, "group": "image", "capacity_multiple_of": 1, "batch_priority": True,
    },
    "shared": {"shared_experts": 1},
    "whole images": {"route": "image", "capacity_factor": None},
}  # fmt: skip
# Each takes seconds to export; K=2, K=3 and capacity are parts of others.
IN_ONNX = [name for name in ROUTINGS if name not in ("K=2", "K=3", "capacity")]


class Parallel(nn.Module):
    """Layers side by side on the same tokens, so that one export tries them all."""

    def __init__(self, layers: list[MoeMlp]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers], 1)


def make_layer(**moe) -> MoeMlp:
    layer = MoeMlp(DIM, 16, moe=MoeConfig(num_experts=3, **moe), tokens=TOKENS).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def parallel(routings: list[str]) -> Parallel:
    torch.manual_seed(0)
    return Parallel([make_layer(**ROUTINGS[name]) for name in routings]).eval()


@pytest.mark.slow  # a model's ONNX program is compared in tests/cli/test_predict.py
@torch.no_grad()
def test_onnx_computes_the_same(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    layers, path = parallel(IN_ONNX), tmp_path / "layers.onnx"
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(exportable_copy(layers), (torch.zeros(2, TOKENS, DIM),), dynamic_shapes=shapes)
    torch.onnx.export(program, (), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    for batch in (1, 3, 8, 33):
        x = torch.randn(batch, TOKENS, DIM)
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        expected = layers(x)
        for index, name in enumerate(IN_ONNX):
            torch.testing.assert_close(found[:, index], expected[:, index], atol=1e-4, rtol=1e-5, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("name", ROUTINGS)
def test_the_copy_computes_the_same(name):
    torch.manual_seed(0)
    layer = make_layer(**ROUTINGS[name])
    x = torch.randn(5, TOKENS, DIM)
    torch.testing.assert_close(exportable_copy(nn.Sequential(layer))(x), layer(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_padding_is_no_one_s_token_in_onnx(tmp_path):
    """Of 10 choices by 5 real tokens, 0.6 leaves each of 3 experts exactly 2 slots, in float32 a little more."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layer = make_layer(**ROUTINGS["capacity"])
    x, mask = torch.randn(TOKENS, TOKENS, DIM), torch.ones(TOKENS, TOKENS).tril().bool()
    batch = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(
        exportable_copy(nn.Sequential(layer))[0], (x[:2], mask[:2]), dynamic_shapes={"x": batch, "token_mask": batch}
    )
    torch.onnx.export(program, (), tmp_path / "layer.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "layer.onnx")
    (found,) = session.run(None, {"x": x.numpy(), "token_mask": mask.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), layer(x, mask), atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_no_expert_is_lost_that_the_example_did_not_visit():
    """Tokens along one axis choose that axis's expert; the program was traced with zeros."""
    layer = make_layer(top_k=1)
    layer.router.gate.weight.copy_(10 * torch.eye(3, DIM))
    program = torch.export.export(
        exportable_copy(nn.Sequential(layer)),
        (torch.zeros(2, TOKENS, DIM),),
        dynamic_shapes=({"input": {0: torch.export.Dim("batch", min=1)}}),
    )
    for expert in range(3):
        x = torch.eye(DIM)[expert].expand(1, TOKENS, DIM).contiguous()
        expected = layer(x)
        assert layer.statistics.load[expert] == 1
        torch.testing.assert_close(program.module()(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_equal_gates_are_served_in_the_layers_order():
    for routing in ("expert choice", "capacity", "batch priority"):
        layer = make_layer(**ROUTINGS[routing])
        x = torch.randn(2, 1, DIM).expand(2, TOKENS, DIM).contiguous()
        torch.testing.assert_close(exportable_copy(nn.Sequential(layer))(x), layer(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_is_no_one_s_token():
    x, mask = torch.randn(5, TOKENS, DIM), torch.rand(5, TOKENS) < 0.6
    mask[2] = False
    for name, routing in ROUTINGS.items():
        layer = make_layer(**routing)
        expected, found = layer(x, mask), exportable_copy(nn.Sequential(layer))[0](x, mask)
        torch.testing.assert_close(found[mask], expected[mask], atol=1e-5, rtol=1e-5, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("name", ROUTINGS)
def test_experts_computed_densely_are_the_sparse_ones(name):
    """In float64, in which they may differ by the order of sums alone; no shape depends on the data."""
    torch.manual_seed(2)
    layer, x = make_layer(**ROUTINGS[name]), torch.randn(5, TOKENS, DIM, dtype=torch.float64)
    sparse, dense = (
        exportable_copy(nn.Sequential(layer), layer_type=kind).double() for kind in (ExportedMoe, DenseExportedMoe)
    )
    torch.testing.assert_close(dense(x), sparse(x), atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(dense(x), layer.double()(x), atol=1e-13, rtol=1e-13)
    used = " ".join(str(node.target) for node in torch.export.export(dense, (x,)).graph.nodes)
    assert "matmul" in used or "linear" in used
    assert "index_add" not in used and "nonzero" not in used


def test_the_cost_of_experts_computed_densely():
    for name, times in (("K=1", 3), ("K=2", 1.5), ("expert choice", 2), ("soft", 1)):
        assert dense_cost(nn.Sequential(make_layer(**ROUTINGS[name]))) == times
    assert dense_cost(nn.Linear(2, 2)) == 1


def test_the_model_stays_as_it_is():
    layers = parallel(list(ROUTINGS))
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    layers.train()
    copied = exportable_copy(layers)
    assert layers.training and not copied.training
    assert all(isinstance(layer, MoeMlp) for layer in layers.layers)
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    assert all(parameter.requires_grad for parameter in layers.parameters())


@torch.no_grad()
def test_rounded_experts_are_close_and_hold_bytes():
    layer = make_layer()
    rounded = exportable_copy(nn.Sequential(layer), Int8Linear)
    x = torch.randn(4, TOKENS, DIM)
    expected = layer(x)
    assert 0 < (rounded(x) - expected).norm() / expected.norm() < 0.02
    assert rounded[0].experts[0].fc1.weight.dtype == torch.int8
    assert rounded[0].router.gate.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("moe", "told"),
    [
        ({"router": "random"}, "random"),
        ({"router": "balanced"}, "place in the batch"),
        ({"eval_capacity_factor": 1.0}, "other images of its batch"),
    ],
)
def test_refused_with_the_reason(moe, told):
    with pytest.raises(ValueError, match=told):
        exportable_copy(nn.Sequential(make_layer(**moe)))


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(each, id=each.name, marks=pytest.mark.slow if each.name in KINDS else pytest.mark.long)
        for each in SUPPORTED
    ],
)
def test_families(example: Example, tmp_path: Path):
    """Every family that `sparsify` takes is exported. One MoE layer is enough: each takes seconds."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    dense = example.make_small().eval()
    last = len(eligible_mlps(dense, example.pixels)) - 1
    moe = MoeConfig(layers=[last], num_experts=3, renormalize=True)
    model = vmoe.sparsify(dense, moe, image_size=example.pixels)
    # first a program of torch.export, from which the ONNX program is made
    _, run = convert(tmp_path / "model.onnx", "onnx", exportable_copy(model), example.pixels, {}, "model")
    assert max(compare(run, model, example.pixels).values()) <= TOLERANCE
