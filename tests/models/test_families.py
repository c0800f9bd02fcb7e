"""Every family of timm whose blocks hold MLPs becomes a V-MoE, and comes back."""

import copy
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from support.backbones import KINDS, REFUSED, SUPPORTED, Example, page, row
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

import vmoe
from vmoe import MoeConfig
from vmoe.models.families import EligibleMlp, eligible_mlps, survey

PAGE = Path(__file__).parents[2] / "docs" / "backbones.md"
KNOWN = set(timm.list_models())
TIMM = tuple(map(int, timm.__version__.split(".")[:3]))
EVERY = MoeConfig(layers="every-1", num_experts=3, renormalize=True)


def cases(examples: list[Example]) -> list:
    """One case per example; those of models that an older timm lacks are left out."""
    return [
        pytest.param(example, id=example.name, marks=[] if example.name in KINDS else [pytest.mark.slow])
        for example in examples
        if example.name in KNOWN
    ]


def cases_on_meta(examples: list[Example]) -> list:
    """The cases of models that are made on the meta device."""
    reads_values = pytest.mark.skipif(
        TIMM < (1, 0, 30), reason="timm before 1.0.30 reads values while it makes this model"
    )
    return [
        pytest.param(example, id=example.name, marks=[reads_values] if example.family == "gemma4_vit" else [])
        for example in examples
        if example.name in KNOWN
    ]


def pictures(example: Example, count: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, example.pixels, example.pixels)


def logits(outputs: Tensor | tuple | list) -> Tensor:
    """The outputs as one vector: some models have several heads in training."""
    if isinstance(outputs, Tensor):
        return outputs.flatten()
    return torch.cat([logits(output) for output in outputs if isinstance(output, Tensor | tuple | list)])


class Case(NamedTuple):
    example: Example
    dense: nn.Module
    sparse: nn.Module
    places: list[EligibleMlp]


@pytest.fixture(scope="module", params=cases(SUPPORTED))
def case(request) -> Case:
    """A small dense model and what upcycling makes of it; tests change copies."""
    torch.manual_seed(0)
    dense = request.param.make_small().eval()
    sparse = vmoe.sparsify(copy.deepcopy(dense), EVERY, init="upcycle", image_size=request.param.pixels)
    return Case(request.param, dense, sparse, eligible_mlps(dense, request.param.pixels))


def test_upcycled_it_computes_the_same(case):
    example, dense, sparse, places = case
    images = pictures(example)
    with torch.no_grad(), vmoe.record_routing(sparse) as trace:
        got = logits(sparse(images))
        expected = logits(dense(images))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert [name.removesuffix(".moe") for name in trace.layers] == [place.name for place in places]
    for routing, place in zip(trace.layers.values(), places, strict=True):
        rows, columns = routing.grid
        assert routing.gates.shape == (2, routing.num_prefix_tokens + rows * columns, 3)
        assert routing.gates.shape[1] == place.tokens
        assert rows == columns and routing.on_grid(routing.gates).shape == (2, rows, columns, 3)


def test_it_runs_in_bfloat16(case):
    """As in the validation of a run in bf16."""
    images = pictures(case.example)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, expected = logits(case.sparse(images)).float(), logits(case.dense(images)).float()
    assert (got - expected).norm() < 0.2 * expected.norm()


def test_it_comes_back(case):
    back = vmoe.densify(copy.deepcopy(case.sparse))
    assert str(back) == str(case.dense) and type(back) is type(case.dense)
    expected = case.dense.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in back.state_dict().items())


def test_it_keeps_names_types_and_timms_methods(case):
    _, dense, sparse, places = case
    layers = dict(vmoe.moe_layers(sparse))
    replaced = tuple(name.removesuffix(".moe") + "." for name in layers)
    assert {name for name in dense.state_dict() if not name.startswith(replaced)} <= sparse.state_dict().keys()
    for place in places:
        layer = layers.get(place.name) or layers[f"{place.name}.moe"]
        like = next(place.mlp.parameters())
        assert {(value.dtype, value.device) for value in layer.parameters()} == {(like.dtype, like.device)}
        assert not layer.training

    own = set(dense.no_weight_decay()) if hasattr(dense, "no_weight_decay") else set()
    stacked = {name for name, value in sparse.named_parameters() if ".experts.fc" in name and value.dim() == 2}
    assert own | stacked <= sparse.no_weight_decay()
    if hasattr(dense, "group_matcher"):
        before, after = groups(dense), groups(sparse)
        for prefix in replaced:
            ids = [{group for name, group in each.items() if name.startswith(prefix)} for each in (before, after)]
            assert ids[0] == ids[1] and len(ids[1]) == 1


def groups(model: nn.Module) -> dict[str, int]:
    """The layer-decay group of every parameter."""
    matched = group_with_matcher(model.named_parameters(), model.group_matcher(coarse=False))
    return {name: group for group, names in matched.items() for name in names}


def test_gradients_reach_every_layer(case):
    sparse = copy.deepcopy(case.sparse).train()
    (logits(sparse(pictures(case.example))).square().sum() + vmoe.auxiliary_loss(sparse)).backward()
    for name, layer in vmoe.moe_layers(sparse):
        for part, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), f"{name}.{part}"
        assert layer.experts.fc1.weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("example", cases_on_meta(REFUSED))
def test_refused_with_the_reason(example):
    with torch.device("meta"):
        model = timm.create_model(example.name)
    line = row(example)
    assert line in PAGE.read_text().splitlines()
    reason = line.split("|")[-2].strip()
    with pytest.raises(ValueError, match=type(model).__name__) as error:
        vmoe.sparsify(model, MoeConfig())
    assert reason in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("example", cases_on_meta(SUPPORTED[4::8]))  # not Sequencer, whose LSTMs take seconds
def test_the_page_is_up_to_date(example):
    assert row(example) in PAGE.read_text().splitlines()


def test_the_page_lists_every_example():
    cells = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    listed = [(family.strip(), name.strip()) for _, family, name, *_ in cells]
    assert listed == [("family", "example"), *_names(SUPPORTED), ("family", "example"), *_names(REFUSED)]


def _names(examples: list[Example]) -> list[tuple[str, str]]:
    return [(example.family, example.name) for example in examples]


@pytest.mark.long
def test_the_whole_page_is_up_to_date():
    assert page() == PAGE.read_text()


def test_layers_count_in_the_order_of_the_forward_pass():
    """Crossvit's branches take turns; the modules' own order would give the same only by luck."""
    with torch.device("meta"):
        model = timm.create_model("crossvit_tiny_240")
    calls = []
    for name, module in model.named_modules():
        if name.endswith("mlp"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(torch.zeros(1, 3, 240, 240, device="meta"))
    in_order = list(calls)
    assert [place.name for place in eligible_mlps(model)] == in_order


def test_the_survey_leaves_the_model_as_it_is():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    survey(model)
    assert model.training and not model.blocks[0].mlp._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["tiny_vit_5m_224", "efficientformer_l1"])
def test_sparsify_after_a_pass_with_gradients(name):
    """These keep biases of their attention that have a graph, and so cannot be deep-copied."""
    example = next(example for example in SUPPORTED if example.name == name)
    model = example.make_small().eval()
    model(pictures(example, 1))
    assert vmoe.moe_layers(vmoe.sparsify(model, EVERY, image_size=example.pixels))


def test_nobodys_hooks_run_in_sparsify():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    seen = []
    model.blocks[0].register_forward_hook(Watcher(seen).see)
    vmoe.sparsify(model, EVERY)
    assert not seen
    model(torch.randn(1, 3, 32, 32))
    assert len(seen) == 1


class Watcher:
    """The owner of a hook, which cannot be copied."""

    def __init__(self, seen: list) -> None:
        self.seen, self.lock = seen, threading.Lock()

    def see(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.seen.append(module)


def test_shared_mlps_are_left_alone():
    with torch.device("meta"):
        model = timm.create_model("coat_tiny")
    places, left_out = survey(model)
    assert len(places) == 8 and {name.split(".")[0] for name in left_out} == {"parallel_blocks"}


def test_soft_moe_learns_its_slots_from_the_model_and_the_image_size():
    moe = MoeConfig(router="soft", num_experts=2, capacity_factor=1.0, layers="every-1")
    model = timm.create_model("convnext_atto", dims=(8, 12, 16, 24), depths=(1, 1, 1, 1), num_classes=3)
    slots = [layer.router.mu.shape[-1] for _, layer in vmoe.moe_layers(vmoe.sparsify(copy.deepcopy(model), moe))]
    assert slots == [56 * 56 // 2, 28 * 28 // 2, 14 * 14 // 2, 24]
    small = vmoe.sparsify(model, moe, image_size=(64, 32))
    assert [layer.router.mu.shape[-1] for _, layer in vmoe.moe_layers(small)] == [64, 16, 4, 1]
    assert small(torch.randn(2, 3, 64, 32)).shape == (2, 3)


def test_an_image_size_the_model_cannot_take():
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    with pytest.raises(ValueError, match="image_size"):
        vmoe.sparsify(model, MoeConfig(), image_size=64)


def test_other_channels_and_types():
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1, img_size=32, depth=2).to(torch.bfloat16)
    vmoe.sparsify(model, MoeConfig(num_experts=2))
    assert model(torch.randn(1, 1, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
