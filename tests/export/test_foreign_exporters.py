"""torch.jit.trace, torch.export and torch.onnx.export, which other libraries call on a model as it stands."""

import pytest
import torch
from torch import Tensor, nn

import vmoe
from vmoe import MoeConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # exporters warn of their own ways
BATCH = ({0: torch.export.Dim("batch", min=1)},)
CASES = [
    {},
    {"router": "expert_choice"},
    {"router": "soft"},
    {"router": "sigmoid", "shared_experts": 1},
    {"eval_capacity_factor": 0.6, "group": "image", "batch_priority": True},
    {"route": "image", "shared_router": True, "capacity_factor": None},
]


def make_model(**knobs) -> nn.Module:
    torch.manual_seed(0)
    moe = MoeConfig(num_experts=4, layers="every-1", **knobs)
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = vmoe.create_model("vit_tiny_patch16_224", moe, **small).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def check(program, model: nn.Module) -> None:
    """At other batches than the example's, past the group of 8 images too, which visit experts that it did not."""
    for batch in (1, 3, 17):
        images = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("knobs", CASES, ids=str)
def test_tracing(knobs):
    model = make_model(**knobs)
    check(torch.jit.trace(model, torch.randn(2, 3, 16, 16)), model)


@pytest.mark.parametrize("knobs", [CASES[0], pytest.param(CASES[1], marks=pytest.mark.slow)], ids=str)
def test_torch_export(knobs):
    model = make_model(**knobs)
    program = torch.export.export(model, (torch.randn(2, 3, 16, 16),), dynamic_shapes=BATCH)
    assert not any("vmoe" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
    check(program.module(), model)


@pytest.mark.parametrize("router", ["token_choice", "expert_choice", "soft", "sigmoid", "cosine", "hash"])
@pytest.mark.parametrize("by", ["tracing", pytest.param("export", marks=pytest.mark.slow)])
def test_under_autocast(by, router):
    torch.manual_seed(0)
    layer = vmoe.MoeMlp(8, 16, moe=MoeConfig(num_experts=3, router=router), tokens=9).eval()
    x = torch.randn(2, 9, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        program = torch.jit.trace(layer, x) if by == "tracing" else torch.export.export(layer, (x,)).module()
        y, expected = program(x), layer(x)
    torch.testing.assert_close(y, expected, rtol=0.05, atol=1e-4)
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("knobs", CASES[:2], ids=str)
@pytest.mark.parametrize("by", ["tracing", pytest.param("export", marks=pytest.mark.slow)])
def test_onnx(by, knobs, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images, file = make_model(**knobs), torch.randn(2, 3, 16, 16), tmp_path / "model.onnx"
    named = {"input_names": ["images"], "dynamo": by == "export", "verbose": False}
    shapes = {"dynamic_shapes": BATCH} if by == "export" else {"dynamic_axes": {"images": {0: "batch"}}}
    torch.onnx.export(model, (images,), file, **named, **shapes)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    check(run, model)


@pytest.mark.parametrize(
    ("moe", "training", "told"),
    [
        (MoeConfig(), True, "call model.eval"),
        (MoeConfig(eval_capacity_factor=1.0, group=2), False, "depend on the other images of its batch"),
        (MoeConfig(router="random"), False, "draws its experts each time"),
    ],
)
def test_refused_in_a_line(moe, training, told):
    layer, x = vmoe.MoeMlp(8, 16, moe=moe).train(training), torch.randn(2, 9, 8)
    with pytest.raises((RuntimeError, ValueError), match=told) as error:
        torch.jit.trace(layer, x)
    assert "\n" not in str(error.value)
