"""A steered model against the model itself, with other settings."""

import dataclasses

import pytest
import torch

import vmoe
from vmoe.export.steered import OFF, SteeredModel, layer_factor
from vmoe.moe.exportable import why_not_exportable

MOE = {"num_experts": 4, "top_k": 2, "layers": "every-2", "group": "image", "capacity_multiple_of": 1}


def make_model(**moe):
    torch.manual_seed(0)
    config = vmoe.MoeConfig(**(MOE | moe))
    sizes = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 16, "num_classes": 5}
    model = vmoe.create_model("vit_tiny_patch16_224", config, **sizes).eval()
    for _, layer in vmoe.moe_layers(model):
        torch.nn.init.normal_(layer.router.gate.weight)
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


NOTHING_OFF, NO_DROPS = torch.zeros(2, 4), torch.full((2,), 2.0)


@torch.no_grad()
@pytest.mark.parametrize("router", ["token_choice", "cosine"])
def test_nothing_changed_is_the_model(images, router):
    model = make_model(router=router, renormalize=True)
    logits, *told = SteeredModel(model)(images, NOTHING_OFF, NO_DROPS)
    torch.testing.assert_close(logits, model(images))
    with vmoe.record_routing(model) as trace:
        model(images)
    for layer, (gates, chosen, kept) in zip(trace.layers.values(), (told[:3], told[3:]), strict=True):
        torch.testing.assert_close(gates, layer.gates)
        assert torch.equal(chosen.long(), layer.chosen) and bool(kept.all())


@torch.no_grad()
@pytest.mark.parametrize("batch_priority", [False, True])
@pytest.mark.parametrize("factor", [0.3, 0.5, 1.0, 1.1])
def test_the_capacity_is_the_models(images, batch_priority, factor):
    model = make_model(batch_priority=batch_priority)
    steered = SteeredModel(model)
    vmoe.set_eval_capacity_factor(model, factor)
    with vmoe.record_routing(model) as trace:
        expected = model(images)
    logits, *told = steered(images, NOTHING_OFF, torch.full((2,), factor))
    torch.testing.assert_close(logits, expected)
    for layer, kept in zip(trace.layers.values(), told[2::3], strict=True):
        assert torch.equal(kept == 0, layer.dropped) and bool(layer.dropped.any())


@torch.no_grad()
def test_layers_start_with_the_places_they_have(images):
    model = make_model(eval_capacity_factor=0.8, capacity_multiple_of=4)
    factors = torch.tensor([layer_factor(layer, 17) for _, layer in vmoe.moe_layers(model)])
    torch.testing.assert_close(SteeredModel(model)(images, NOTHING_OFF, factors)[0], model(images))


@torch.no_grad()
def test_an_expert_that_is_off_is_chosen_by_none(images):
    model = make_model()
    bias = torch.zeros(2, 4)
    bias[0, 2] = bias[1, 0] = OFF
    logits, *told = SteeredModel(model)(images, bias, NO_DROPS)
    assert not (told[1] == 2).any() and not (told[4] == 0).any() and (told[1] == 0).any()
    for (_, layer), bias_E in zip(vmoe.moe_layers(model), bias, strict=True):
        scores = layer.router.scores
        layer.router.scores = lambda x, _kernels, s=scores, b=bias_E: (s(x)[0] + b, x)
    torch.testing.assert_close(logits, model(images))


@pytest.mark.parametrize("moe", [{"router": "expert_choice"}, {"router": "soft"}, {"router": "sigmoid"}])
def test_other_routers_are_refused(moe):
    with pytest.raises(ValueError, match=f"its router is {moe['router']}"):
        SteeredModel(make_other(**moe))


def test_routing_of_whole_images_is_refused():
    with pytest.raises(ValueError, match="route=image; the page draws where patches go"):
        SteeredModel(make_other(route="image", capacity_factor=None))


def make_other(**moe):
    plain = {key: value for key, value in MOE.items() if key in ("num_experts", "layers")}
    sizes = {"patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3, "img_size": 16, "num_classes": 5}
    return vmoe.create_model("vit_tiny_patch16_224", vmoe.MoeConfig(**(plain | moe)), **sizes).eval()


def test_a_capacity_of_the_batch_is_refused():
    model = make_model()
    for _, layer in vmoe.moe_layers(model):
        layer.config = dataclasses.replace(layer.config, eval_capacity_factor=1.0, group="batch")
    assert why_not_exportable(layer.config)
    with pytest.raises(ValueError, match="depend on the other images"):
        SteeredModel(model)
