"""Auxiliary losses: their values, their way to the parameters, and their injection into foreign training loops."""

import copy
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import vmoe
from vmoe import MoeConfig, MoeMlp
from vmoe.models.cost import flops_per_image
from vmoe.moe import losses

ALL_LOSSES = {
    "importance_loss_weight": 0.1,
    "load_loss_weight": 0.2,
    "gshard_loss_weight": 0.3,
    "z_loss_weight": 0.4,
}


def layer_of(**knobs) -> MoeMlp:
    torch.manual_seed(0)
    return MoeMlp(6, 8, moe=MoeConfig(**{"num_experts": 4, **ALL_LOSSES, **knobs}), dtype=torch.float64).train()


def tokens() -> torch.Tensor:
    return torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("loss", ["importance", "gshard", "z", "load"])
def test_finite_with_exactly_equal_gates(loss):
    logits = torch.zeros(2, 8, 4, dtype=torch.float64, requires_grad=True)
    value = {
        "importance": lambda: losses.importance_loss(logits),
        "gshard": lambda: losses.gshard_loss(logits.softmax(-1)),
        "z": lambda: losses.z_loss(logits),
        "load": lambda: losses.load_loss(logits, logits, 2, 0.25),
    }[loss]()
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(logits.grad).all()


def test_hand_computed_values():
    # two tokens, two experts; gates (3/4, 1/4) and (1/2, 1/2): summed 5/4 and 3/4, mean 1, std 1/4
    logits = torch.tensor([[[3.0, 1.0], [1.0, 1.0]]], dtype=torch.float64).log()
    assert losses.importance_loss(logits).item() == pytest.approx(1 / 16)
    # mean gates 5/8 and 3/8; both tokens' first choice is expert 0: 2 * (5/8 * 1 + 3/8 * 0)
    assert losses.gshard_loss(logits.softmax(-1)).item() == pytest.approx(5 / 4)
    # log(3 + 1) and log(1 + 1)
    assert losses.z_loss(logits).item() == pytest.approx((1.3862943611**2 + 0.6931471806**2) / 2)


@settings(deadline=None)
@given(st.floats(0, 5), st.floats(0.1, 5))
def test_balance_losses_grow_with_skew(skew, more):
    def logits(offset):
        base = torch.randn(1, 64, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
        return base + offset * torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)

    for loss in (losses.importance_loss, lambda x: losses.gshard_loss(x.softmax(-1))):
        assert loss(logits(skew + more)) > loss(logits(skew)) - 1e-12


def test_gshard_loss_of_the_sigmoid_router_is_that_of_each_gate_s_share():
    """Perfectly balanced it is 1 whatever the gates, so that it cannot fall by pushing all of them to zero."""
    none = {f"{name}_loss_weight": 0.0 for name in ("importance", "load", "z")}
    layer = layer_of(router="sigmoid", gshard_loss_weight=1.0, **none)
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.eye(4, 6))
    for score in (3.0, -3.0):  # gates of 0.95 and 0.05
        x = torch.full((1, 4, 6), score, dtype=torch.float64)
        x[0, :, :4] += 1e-3 * torch.eye(4)  # each token has another first choice
        x.requires_grad_()
        layer(x)
        loss = vmoe.auxiliary_loss(layer)
        assert loss.item() == pytest.approx(1, abs=1e-3)
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.sum(-1).abs().max() < 1e-6  # no pull on all gates of a token together


def test_weighted_sum_over_layers():
    model = nn.Sequential(layer_of(noise_std=0.0), layer_of(noise_std=0.0, gshard_loss_weight=1.0))
    model(tokens())
    parts = [layer.last_auxiliary_loss for layer in model]
    assert parts[0] != parts[1]
    torch.testing.assert_close(vmoe.auxiliary_loss(model), parts[0] + parts[1])


def deep_model() -> nn.Module:
    """Four blocks, each with an MoE layer."""
    torch.manual_seed(0)
    moe = MoeConfig(layers="every-1", num_experts=4, noise_std=0.0, importance_loss_weight=1.0)
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 3}
    return vmoe.create_model("vit_tiny_patch16_224", moe, **small).train()


def loss_of(model: nn.Module, *blocks: int) -> torch.Tensor:
    return sum(model.blocks[block].mlp.last_auxiliary_loss for block in blocks)


@pytest.mark.parametrize("compiled", ["nothing", "some blocks", pytest.param("the model", marks=pytest.mark.slow)])
def test_layers_that_the_last_pass_did_not_run_do_not_count(compiled):
    model, images = deep_model(), torch.randn(2, 2, 3, 16, 16)
    graphs = []

    def keep_graph(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    for module in {"nothing": [], "the model": [model], "some blocks": model.blocks[:3]}[compiled]:
        module.compile(backend=keep_graph, fullgraph=True)
    for _ in range(3):
        model(images[0])
    assert len(graphs) == (compiled != "nothing")  # one for all blocks, and for every pass
    for _ in range(2):
        model(images[0])
        torch.testing.assert_close(vmoe.auxiliary_loss(model), loss_of(model, 0, 1, 2, 3))
        model.forward_intermediates(images[1], indices=[1], stop_early=True)
        torch.testing.assert_close(vmoe.auxiliary_loss(model), loss_of(model, 0, 1))
    if compiled != "some blocks":  # a compiled block cannot know that no block before it ran
        model(images[1])
        model.blocks[3](model.blocks[2](torch.randn(2, 5, 24)))
        torch.testing.assert_close(vmoe.auxiliary_loss(model), loss_of(model, 2, 3))
    twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="call the model first"):
        vmoe.auxiliary_loss(twin)
    twin.forward_intermediates(images[0], indices=[0], stop_early=True)
    torch.testing.assert_close(vmoe.auxiliary_loss(twin), loss_of(twin, 0))


def test_a_pass_that_checkpointing_repeats_is_the_same_pass():
    model = deep_model()
    model.set_grad_checkpointing()
    model(torch.randn(2, 3, 16, 16))
    before = vmoe.auxiliary_loss(model)
    before.backward()
    torch.testing.assert_close(vmoe.auxiliary_loss(model), before)


def test_counting_flops_is_no_pass():
    model = deep_model()
    model(torch.randn(2, 3, 16, 16))
    model.forward_intermediates(torch.randn(2, 3, 16, 16), indices=[1], stop_early=True)
    before = vmoe.auxiliary_loss(model)
    flops_per_image(model, 16)
    assert torch.equal(vmoe.auxiliary_loss(model), before)


def test_after_data_parallel_nothing_old_is_returned(monkeypatch):
    """Its copies keep their losses; those of an earlier pass of the model itself are gone."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda tensors, *_, **__: [tensors, tensors])
    model = deep_model()
    model(torch.randn(2, 3, 16, 16))
    for copied in replicate.replicate(model, [0, 1]):
        copied(torch.randn(2, 3, 16, 16))
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        vmoe.auxiliary_loss(model)
    model(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(vmoe.auxiliary_loss(model), loss_of(model, 0, 1, 2, 3))


def test_a_dense_model_has_none_and_an_unused_one_says_so():
    assert vmoe.auxiliary_loss(nn.Linear(2, 2)) == 0
    with pytest.raises(RuntimeError, match="call the model first"):
        vmoe.auxiliary_loss(layer_of())


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_injection_gives_the_gradients_of_the_added_loss(scale):
    added, injected = layer_of(), layer_of(inject_auxiliary_loss=True)
    torch.manual_seed(5)
    (added(tokens()).square().sum() + scale * vmoe.auxiliary_loss(added)).backward()
    if scale != 1.0:
        vmoe.set_auxiliary_scale(injected, torch.tensor(scale))
    torch.manual_seed(5)
    y = injected(tokens())
    y.square().sum().backward()
    torch.testing.assert_close(gradients(injected), gradients(added))


def test_the_scale_is_kept_by_reference():
    layer = layer_of(inject_auxiliary_loss=True)
    scale = torch.tensor(1.0)
    vmoe.set_auxiliary_scale(layer, scale)
    scale.fill_(0.0)
    (layer(tokens()) * 0).sum().backward()
    assert layer.router.gate.weight.grad.abs().sum() == 0


def test_half_precision_injection_without_a_scale_is_refused():
    layer = MoeMlp(6, 8, moe=MoeConfig(inject_auxiliary_loss=True)).train()
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="set_auxiliary_scale"):
        layer(torch.randn(2, 3, 6))


def test_injection_is_silent_at_evaluation():
    layer = layer_of(inject_auxiliary_loss=True).eval()
    (layer(tokens()) * 0).sum().backward()
    assert layer.router.gate.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("inject", [True, False])
def test_activation_checkpointing(inject):
    """Plain and injected losses survive it; the noise is drawn the same again."""
    plain, checkpointed = layer_of(inject_auxiliary_loss=inject), layer_of(inject_auxiliary_loss=inject)
    for layer, run in ((plain, plain), (checkpointed, lambda x: checkpoint(checkpointed, x, use_reentrant=False))):
        torch.manual_seed(3)
        loss = run(tokens().requires_grad_()).square().sum()
        (loss if inject else loss + vmoe.auxiliary_loss(layer)).backward()
    torch.testing.assert_close(gradients(checkpointed), gradients(plain))


def test_reentrant_checkpointing_without_injection_is_refused():
    layer = layer_of()
    checkpoint(layer, tokens().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="inject_auxiliary_loss"):
        vmoe.auxiliary_loss(layer)
