"""From dense to sparse and back."""

import copy

import pytest
import timm
import torch
from timm.layers import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from torch import nn

import vmoe
from vmoe import MoeConfig, MoeMlp
from vmoe.moe.mlps import put_together, take_apart

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
BACKBONES = ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "eva02_base_patch14_224", "vit_giant_patch14_dinov2"]


def norm(width: int, **placement) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-3, **placement)


MLPS = {
    "Mlp": lambda: Mlp(12, 20, 10, norm_layer=norm, bias=(True, False)),
    "conv Mlp": lambda: Mlp(12, 20, use_conv=True),
    "SwiGLU with norm": lambda: SwiGLU(12, 20, 10, norm_layer=norm),
    "SwiGLU without bias": lambda: SwiGLU(12, 20, bias=False),
    "GluMlp, gate last": lambda: GluMlp(12, 20, norm_layer=norm, gate_last=True),
    "GluMlp, gate first": lambda: GluMlp(12, 20, gate_last=False),
    "SwiGLUPacked": lambda: SwiGLUPacked(12, 20, norm_layer=norm),
}


def drawn(mlp: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    return mlp.eval()


def dense(name: str = BACKBONES[0]) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **SMALL).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.5)
    return model


def upcycled(model: nn.Module, noise: float = 0.0, **knobs) -> nn.Module:
    moe = MoeConfig(**{"num_experts": 4, "renormalize": True, **knobs})
    return vmoe.sparsify(copy.deepcopy(model), moe, init="upcycle", upcycle_noise=noise)


def pictures() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", MLPS)
def test_copies_of_an_mlp_compute_what_it_computes(kind):
    mlp = drawn(MLPS[kind]())
    layer = MoeMlp.from_mlp(mlp, MoeConfig(num_experts=3, renormalize=True))
    layer.copy_into_experts(mlp)
    x = torch.randn(2, 12, 3, 4) if "conv" in kind else torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x), mlp(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MLPS)
def test_put_together_undoes_take_apart(kind):
    mlp, other = drawn(MLPS[kind]()), MLPS[kind]()
    put_together(other, take_apart(mlp))
    expected = mlp.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", BACKBONES)
def test_logits_stay_the_dense_models(name, top_k):
    model = dense(name)
    torch.testing.assert_close(upcycled(model, top_k=top_k)(pictures()), model(pictures()), rtol=1e-5, atol=1e-5)


def test_logits_stay_with_shared_experts_that_still_learn():
    model = dense()
    sparse = upcycled(model, shared_experts=1)
    torch.testing.assert_close(sparse(pictures()), model(pictures()), rtol=1e-5, atol=1e-5)
    sparse(pictures()).square().sum().backward()
    assert sparse.blocks[1].mlp.shared.fc2.weight.grad.abs().max() > 0


def test_without_renormalised_weights_they_do_not():
    model = dense()
    difference = upcycled(model, renormalize=False)(pictures()) - model(pictures())
    assert difference.abs().max() > 1e-4


def test_noise_is_relative_to_the_weights():
    model = dense("eva02_base_patch14_224")
    with torch.no_grad():
        model.blocks[1].mlp.fc1_g.weight.mul_(1e-4)
    layer = upcycled(model, noise=0.1, num_experts=64).blocks[1].mlp
    parts = take_apart(model.blocks[1].mlp)
    for stacked, weight in ((layer.experts.fc1.weight, parts.fc1), (layer.experts.fc2.weight, parts.fc2)):
        relative = (stacked - weight).std((0, 2)) / weight.std(-1)
        torch.testing.assert_close(relative, torch.full_like(relative, 0.1), rtol=0.15, atol=0)
    assert torch.equal(layer.experts.fc1.bias, parts.bias1.expand_as(layer.experts.fc1.bias))


@pytest.mark.parametrize(("init", "noise"), [("random", 0.1), ("upcycle", -0.1)])
def test_noise_that_means_nothing_is_refused(init, noise):
    with pytest.raises(ValueError, match="upcycle_noise="):
        vmoe.sparsify(dense(), MoeConfig(), init=init, upcycle_noise=noise)


def test_experts_of_another_width_are_refused_both_ways():
    moe = MoeConfig(expert_width=0.5)
    model = dense()
    with pytest.raises(ValueError, match="must be 1 to upcycle"):
        vmoe.sparsify(model, moe, init="upcycle")
    assert not vmoe.moe_layers(model)  # nothing was done
    with pytest.raises(ValueError, match="times the dense width"):
        vmoe.densify(vmoe.sparsify(model, moe))


@pytest.mark.parametrize("how", ["merge", "expert"])
@pytest.mark.parametrize("name", [*BACKBONES, "vitamin_small_224"])
def test_densify_gives_the_dense_model_back(name, how):
    options = SMALL if name in BACKBONES else {"img_size": 32, "depth": 2, "num_classes": 5}
    model = timm.create_model(name, **options).eval()
    back = vmoe.densify(upcycled(model, num_experts=3), how, expert=2 if how == "expert" else 0)
    fresh = timm.create_model(name, **options).eval()
    fresh.load_state_dict(back.state_dict())
    assert torch.equal(fresh(pictures()), model(pictures()))
    assert type(back) is type(model) and "no_weight_decay" not in vars(back)
    vmoe.sparsify(back, MoeConfig())  # and it may become sparse again


def test_merging_weighs_the_experts():
    model = upcycled(dense(), noise=0.5, layers=[1, 3])
    experts = [copy.deepcopy(model.blocks[i].mlp.experts) for i in (1, 3)]
    share = torch.tensor([1.0, 0.0, 3.0, 0.0])
    back = vmoe.densify(model, weights={"blocks.1.mlp": share})
    weight = experts[0].fc1.weight
    torch.testing.assert_close(back.blocks[1].mlp.fc1.weight, 0.25 * weight[0] + 0.75 * weight[2])
    torch.testing.assert_close(back.blocks[3].mlp.fc2.weight, experts[1].fc2.weight.mean(0))


def test_one_expert_is_picked():
    model = upcycled(dense(), noise=0.5, layers=[1])
    weight = model.blocks[1].mlp.experts.fc2.weight.clone()
    assert torch.equal(vmoe.densify(model, "expert", 3).blocks[1].mlp.fc2.weight, weight[3])


def test_densify_keeps_type_mode_and_a_trained_activation():
    model = timm.create_model("caformer_s18", num_classes=2).to(torch.bfloat16)
    vmoe.sparsify(model, MoeConfig(layers=[0], num_experts=2))
    nn.init.constant_(model.stages[0].blocks[0].mlp.experts.act.scale, 3.0)
    mlp = vmoe.densify(model).stages[0].blocks[0].mlp
    assert mlp.act.scale == 3 and mlp.training and {value.dtype for value in mlp.parameters()} == {torch.bfloat16}


def test_a_copy_of_a_model_can_be_densified():
    model = dense()
    back = vmoe.densify(copy.deepcopy(upcycled(model)))
    assert torch.equal(back(pictures()), model(pictures()))


@pytest.mark.parametrize(
    ("knobs", "arguments", "message"),
    [
        ({}, {"how": "mean"}, "how="),
        ({}, {"how": "expert", "expert": 4}, "expert=4"),
        ({}, {"how": "expert", "weights": {"blocks.1.mlp": [1, 1, 1, 1]}}, "weights are for"),
        ({}, {"weights": {"blocks.0.mlp": [1, 1, 1, 1]}}, "blocks.0.mlp"),
        ({}, {"weights": {"blocks.1.mlp": [1, 1]}}, "4 numbers"),
        ({}, {"weights": {"blocks.1.mlp": [0, 0, 0, 0]}}, "4 numbers"),
        ({"shared_experts": 1}, {}, "shared experts"),
        ({}, {"how": "join"}, "4 experts of 96 rows to join; the MLP has 96"),
    ],
)
def test_densify_refuses(knobs, arguments, message):
    model = upcycled(dense(), **knobs)
    with pytest.raises(ValueError, match=message):
        vmoe.densify(model, **arguments)
    assert vmoe.moe_layers(model)  # nothing was done
