"""`record_routing` sees what was routed and changes nothing."""

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import vmoe
from vmoe import MoeConfig
from vmoe.models.cost import flops_per_image


def model_of(**knobs) -> nn.Module:
    torch.manual_seed(0)
    return vmoe.create_model(
        "vit_tiny_patch16_224",
        MoeConfig(**{"num_experts": 4, "eval_capacity_factor": 0.5, "capacity_multiple_of": 1, "group": 2, **knobs}),
        img_size=(16, 24),
        patch_size=4,
        embed_dim=24,
        depth=4,
        num_heads=2,
        num_classes=3,
    ).eval()


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def test_shapes_and_consistency():
    model = model_of()
    with vmoe.record_routing(model) as trace:
        model(images())
    assert list(trace.layers) == ["blocks.1.mlp", "blocks.3.mlp"]
    routing = trace.layers["blocks.1.mlp"]
    assert routing.grid == (4, 6) and routing.num_prefix_tokens == 1
    assert routing.gates.shape == (5, 25, 4) and routing.gates.dtype == torch.float32
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(5, 25))
    best = routing.gates.topk(2)
    assert torch.equal(routing.chosen, best.indices)
    assert 0 < routing.dropped.float().mean() < 1
    torch.testing.assert_close(routing.combine_weights, best.values * ~routing.dropped)
    assert not routing.gates.requires_grad


def test_nothing_is_dropped_without_a_capacity():
    model = model_of(eval_capacity_factor=None)
    with vmoe.record_routing(model) as trace:
        model(images())
    assert not any(routing.dropped.any() for routing in trace.layers.values())


def test_recording_changes_no_result():
    model = model_of()
    expected = model(images())
    with vmoe.record_routing(model):
        recorded = model(images())
    assert torch.equal(recorded, expected)
    assert torch.equal(model(images()), expected)


def test_a_pass_without_the_head_is_recorded():
    model = model_of()
    with vmoe.record_routing(model) as trace:
        model.forward_features(images())
    assert trace.layers["blocks.1.mlp"].gates.shape == (5, 25, 4)


def test_several_passes_stand_behind_one_another():
    model = model_of(eval_capacity_factor=None)
    with vmoe.record_routing(model) as whole:
        model(images())
    with vmoe.record_routing(model) as parts:
        model(images()[:3])
        model(images()[3:])
    for name, routing in whole.layers.items():
        torch.testing.assert_close(parts.layers[name].gates, routing.gates)
        assert torch.equal(parts.layers[name].chosen, routing.chosen)


def test_nothing_is_recorded_after_the_block():
    model = model_of()
    with vmoe.record_routing(model) as trace:
        model(images(2))
    model(images(3))
    assert trace.layers["blocks.1.mlp"].gates.shape[0] == 2


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_recorded(in_place):
    model = model_of()
    expected = model(images())
    with vmoe.record_routing(model) as plain:
        model(images())
    compiled = model
    if in_place:
        model.compile(backend="aot_eager")
    else:
        compiled = torch.compile(model, backend="aot_eager")
    compiled(images())  # compiled before recording begins
    with vmoe.record_routing(compiled) as trace:
        torch.testing.assert_close(compiled(images()), expected)
    for name, routing in plain.layers.items():
        assert torch.equal(trace.layers[name].chosen, routing.chosen)


@pytest.mark.parametrize(
    ("name", "arguments", "names"),
    [
        ("vit_tiny_patch16_224", {"reg_tokens": 1}, ("class token", "register 1")),
        (
            "vit_tiny_patch16_224",
            {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
            ("register 1", "register 2"),
        ),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, ()),
        ("deit_tiny_distilled_patch16_224", {}, ("class token", "distillation token")),
    ],
)
def test_tokens_before_the_patches_have_names(name, arguments, names):
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = vmoe.create_model(name, MoeConfig(), **small, **arguments)
    with vmoe.record_routing(model) as trace:
        model(torch.randn(1, 3, 16, 16))
    routing = trace.layers["blocks.1.mlp"]
    assert routing.prefix_names == names and routing.num_prefix_tokens == len(names)


def test_another_image_size_is_refused_in_one_trace_and_drawn_rightly_alone():
    model = vmoe.create_model(
        "vit_tiny_patch16_224",
        MoeConfig(),
        img_size=16,
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=2,
        dynamic_img_size=True,
    )
    with vmoe.record_routing(model) as trace:
        model(torch.randn(1, 3, 24, 8))
    assert trace.layers["blocks.1.mlp"].grid == (6, 2)
    with vmoe.record_routing(model) as trace:
        model(torch.randn(1, 3, 24, 8))
        model(torch.randn(1, 3, 16, 16))
    with pytest.raises(ValueError, match="one size at a time"):
        _ = trace.layers


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="no MoE layer"), vmoe.record_routing(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_slots_are_recorded_as_dispatch_and_combine(router):
    torch.manual_seed(0)
    model = vmoe.create_model(
        "vit_tiny_patch16_224",
        MoeConfig(router=router, num_experts=4, capacity_factor=1.0, layers=[1]),
        img_size=(16, 24),
        patch_size=4,
        embed_dim=24,
        depth=2,
        num_heads=2,
    ).eval()
    seen = []
    layer = model.blocks[1].mlp
    layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad(), vmoe.record_routing(model) as trace:
        model(images(3))
        model(images(5)[3:])
    routing = trace.layers["blocks.1.mlp"]
    slots = 6  # of 25 tokens for 4 experts
    assert routing.chosen is None and routing.combine_weights is None and routing.dropped is None
    assert routing.gates.shape == (5, 25, 4) and routing.valid is None
    assert routing.dispatch.shape == routing.combine.shape == (5, 25, 4, slots)
    torch.testing.assert_close(routing.dispatch.sum(1), torch.ones(5, 4, slots))
    # The record is the whole mapping: it gives the layer's output back
    x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    mixed = torch.einsum("bnec,bnd->ebcd", routing.dispatch, x)
    experts = layer.experts
    hidden = torch.einsum("ebcd,ehd->ebch", mixed, experts.fc1.weight) + experts.fc1.bias[:, None, None]
    result = torch.einsum("ebch,edh->ebcd", experts.act(hidden), experts.fc2.weight) + experts.fc2.bias[:, None, None]
    torch.testing.assert_close(torch.einsum("bnec,ebcd->bnd", routing.combine, result), y)


def test_blocks_within_each_other_each_hold_the_passes_inside_them():
    model = model_of(eval_capacity_factor=None)
    with vmoe.record_routing(model) as outer:
        model(images(2))
        with vmoe.record_routing(model) as inner:
            model(images(3))
        model(images(1))
    for name in outer.layers:
        assert inner.layers[name].gates.shape[0] == 3
        assert torch.equal(outer.layers[name].gates[2:5], inner.layers[name].gates)
        assert outer.layers[name].gates.shape[0] == 6
    assert torch.equal(model(images(1)), model(images(1)))


def test_a_pass_that_failed_leaves_the_next_one_right():
    model = model_of(eval_capacity_factor=None)
    handle = model.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with vmoe.record_routing(model) as trace:
        with pytest.raises(ZeroDivisionError):
            model(images(4))
        handle.remove()
        model(images(3))
    assert [len(routing.gates) for routing in trace.layers.values()] == [3, 3]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_in_the_backward_pass_is_no_pass(use_reentrant):
    model = model_of(inject_auxiliary_loss=True).train()
    with vmoe.record_routing(model) as trace:
        checkpoint(model, images(3).requires_grad_(), use_reentrant=use_reentrant).sum().backward()
        model(images(2))
    assert [len(routing.gates) for routing in trace.layers.values()] == [5, 5]


def test_a_count_of_operations_is_no_pass():
    model = model_of(eval_capacity_factor=None)
    with vmoe.record_routing(model) as trace:
        model(images(3))
        flops = flops_per_image(model, (16, 24))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            model(fake.from_tensor(images(2)))
        model(images(1))
    assert flops == flops_per_image(model, (16, 24))
    routing = trace.layers["blocks.3.mlp"]
    assert len(routing.gates) == 4 and routing.gates.device.type == "cpu"


def test_a_trace_joins_its_layers_once_and_grows_with_later_passes():
    model = model_of(eval_capacity_factor=None)
    with vmoe.record_routing(model) as trace:
        model(images(2))
        before = trace.layers
        assert trace.layers["blocks.1.mlp"] is before["blocks.1.mlp"]
        model(images(3))
    assert [len(routing.gates) for routing in trace.layers.values()] == [5, 5]
    assert trace.layers["blocks.1.mlp"] is trace.layers["blocks.1.mlp"]
    assert torch.equal(trace.layers["blocks.1.mlp"].gates[:2], before["blocks.1.mlp"].gates)


@pytest.mark.parametrize("router", ["token_choice", "expert_choice"])
def test_a_trace_keeps_no_tokens_and_no_scores(router):
    """One gate, and for each choice an expert, a weight and two flags: what a map is drawn from."""
    model = model_of(eval_capacity_factor=1.0, capacity_factor=1.0, router=router, group="image")
    tokens, width, experts, choices = 5 * 25, 24, 4, 2
    gc.collect()
    before = float_storages()
    with torch.no_grad(), vmoe.record_routing(model):
        model(images())
        floats = sum(size for place, size in float_storages().items() if place not in before) // 4
    assert floats <= 100 + len(vmoe.moe_layers(model)) * tokens * (experts + choices) < tokens * width


def test_an_evaluation_keeps_no_weights_of_soft_slots():
    layer = vmoe.MoeMlp(8, 16, moe=vmoe.MoeConfig(num_experts=4, router="soft"), tokens=16).eval()
    x = torch.randn(20, 16, 8)
    gc.collect()
    before = float_storages()
    with torch.no_grad():
        layer(x)
    assert sum(size for place, size in float_storages().items() if place not in before) < 1000
    assert layer.statistics.load.sum() > 0


def float_storages() -> dict[int, int]:
    """The bytes of everything that a float tensor holds, by its place."""
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor and t.is_floating_point()]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
