"""Named V-MoEs are timm models like any other."""

import pytest
import timm
import torch
from torch import nn

import vmoe
from vmoe import MoeConfig
from vmoe.models.released import RELEASED, is_released

NAMES = [name for name in timm.list_models("vmoe_*") if not is_released(name)]
CIFAR = "vmoe_tiny_patch4_32"
SMALL = {"embed_dim": 24, "num_heads": 2, "depth": 4}


def small(**arguments) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(CIFAR, **{**SMALL, "num_classes": 5, **arguments})


def moe_of(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, layer.num_experts) for name, layer in vmoe.moe_layers(model)]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_makes_its_model(name):
    model = timm.create_model(name, device="meta", num_classes=7, **({"depth": 6} if "_e" in name else {}))
    side = model.default_cfg["input_size"][-1]
    assert model(torch.empty(2, 3, side, side, device="meta")).shape == (2, 7)
    blocks = [int(layer.split(".")[1]) for layer, _ in moe_of(model)]
    depth = len(model.blocks)
    if "_e" in name:
        assert blocks == list(range(1, depth, 2))[-2 if "last2" in name else 0 :]
        assert {experts for _, experts in moe_of(model)} == {int(name.rpartition("_e")[2])}
        assert model.patch_embed.patch_size[0] == int(name.split("patch")[1].split("_")[0])


def test_the_papers_sizes():
    names = ["small_patch32", "base_patch16", "large_patch16", "huge_patch14"]
    models = [timm.create_model(f"vmoe_{name}_every2_e32", device="meta") for name in names]
    sizes = [(len(m.blocks), m.embed_dim, m.blocks[0].attn.num_heads, m.blocks[0].mlp.fc1.out_features) for m in models]
    assert sizes == [(8, 512, 8, 2048), (12, 768, 12, 3072), (24, 1024, 16, 4096), (32, 1280, 16, 5120)]
    assert isinstance(models[0].norm, nn.LayerNorm) and models[0].norm.eps == 1e-6
    x = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(models[0].blocks[0].mlp.act(x), nn.functional.gelu(x, approximate="tanh"))


def test_the_name_keeps_or_changes_its_moe_layers():
    assert moe_of(vmoe.create_model(CIFAR, **SMALL)) == [("blocks.1.mlp", 8), ("blocks.3.mlp", 8)]
    other = MoeConfig(layers=[2], num_experts=3)
    assert moe_of(vmoe.create_model(CIFAR, other, **SMALL)) == [("blocks.2.mlp", 3)]
    assert moe_of(vmoe.create_model("vmoe_vit", **SMALL)) == []


def test_the_dense_twin_shares_the_weights_outside_the_experts():
    torch.manual_seed(0)
    dense = vmoe.create_model(CIFAR, moe=False, num_classes=5, **SMALL)
    assert moe_of(dense) == []
    sparse = small().state_dict()
    shared = [name for name in dense.state_dict() if ".mlp." not in name]
    assert all(torch.equal(sparse[name], dense.state_dict()[name]) for name in shared)
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    empty = vmoe.create_model(CIFAR, MoeConfig(layers=[]), num_classes=5, **SMALL)
    torch.testing.assert_close(empty.eval()(images), dense.eval()(images))


def test_features():
    model, images = small().eval(), torch.randn(2, 3, 32, 32)
    final, maps = model.forward_intermediates(images, indices=[1, 3])
    assert [tuple(one.shape) for one in maps] == [(2, 24, 8, 8)] * 2
    torch.testing.assert_close(final, model.forward_features(images))
    torch.testing.assert_close(model.forward_head(final), model(images))


def test_feature_extraction():
    model = small(features_only=True, out_indices=[0, 2]).eval()
    assert [tuple(one.shape) for one in model(torch.randn(2, 3, 32, 32))] == [(2, 24, 8, 8)] * 2
    assert model.feature_info.channels() == [24, 24]
    assert moe_of(model) == [("model.blocks.1.mlp", 8)]  # the blocks behind the last one asked for are cut off


def test_reset_classifier():
    model, images = small().eval(), torch.randn(2, 3, 32, 32)
    model.reset_classifier(3)
    assert model(images).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0, "avg")
    assert model(images).shape == (2, 24)
    assert model.get_classifier() is model.head


def test_grad_checkpointing_changes_no_gradient():
    images, gradients = torch.randn(2, 3, 32, 32), []
    for checkpointing in (False, True):
        model = small(moe=MoeConfig(noise_std=0.0, num_experts=4, inject_auxiliary_loss=True)).train()
        model.set_grad_checkpointing(checkpointing)
        model(images).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_parameter_groups():
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    model = small()
    layers = param_groups_layer_decay(model, 0.05, layer_decay=0.5)
    assert len({group["lr_scale"] for group in layers}) == 4 + 2
    undecayed = {id(p) for p in param_groups_weight_decay(model, 0.05, model.no_weight_decay())[0]["params"]}
    assert id(model.blocks[1].mlp.experts.fc1.bias) in undecayed
    assert id(model.blocks[1].mlp.experts.fc1.weight) not in undecayed


def test_timm_loads_and_saves_its_checkpoints(tmp_path):
    model, images = small().eval(), torch.randn(2, 3, 32, 32)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.pth")
    torch.manual_seed(1)
    other = timm.create_model(CIFAR, **SMALL, num_classes=5)
    timm.models.load_checkpoint(other, str(tmp_path / "x.pth"))
    torch.testing.assert_close(other.eval()(images), model(images), rtol=0, atol=0)
    third = timm.create_model(CIFAR, **SMALL, num_classes=5, checkpoint_path=str(tmp_path / "x.pth"))
    torch.testing.assert_close(third.eval()(images), model(images), rtol=0, atol=0)


def test_another_input_size_and_channels():
    model = small(img_size=16, in_chans=1).eval()
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 5)


def test_default_config():
    config = timm.data.resolve_model_data_config(small())
    assert config["input_size"] == (3, 32, 32) and config["mean"] == (0.5, 0.5, 0.5)
    assert timm.create_model("vmoe_small_patch32_last2_e8", device="meta").num_classes == 1000


def test_pre_logits_stand_before_the_head():
    model = timm.create_model("vmoe_vit", **SMALL, img_size=32, patch_size=8, pre_logits=7, num_classes=5).eval()
    features = model.forward_head(model.forward_features(torch.randn(2, 3, 32, 32)), pre_logits=True)
    assert features.shape == (2, 7) and features.abs().max() < 1
    assert model.head_hidden_size == 7 and model.head(features).shape == (2, 5)


def test_no_pretrained_weights_are_claimed():
    assert not {*timm.list_models("vmoe_*", pretrained=True)} - {*RELEASED}


def test_convolutions_make_the_tokens_of_vmoe_cct():
    model = timm.create_model("vmoe_cct", num_classes=5, depth=2, embed_dim=24, num_heads=2, patch_size=4)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == 2
    x = torch.randn(2, 3, 32, 32)
    tokens = model.patch_embed(x)
    assert tokens.shape == (2, 64, 24) and model.patch_embed.grid_size == (8, 8)
    x[:, :, :4, :4] += 1  # a corner's patch, whose neighbours see it too: the tokens overlap
    changed = (model.patch_embed(x) != tokens).any(-1)[0].view(8, 8)
    assert changed[:2, :2].all() and not changed[3:].any() and not changed[:, 3:].any()
    assert model(x).shape == (2, 5)
    with pytest.raises(ValueError, match="patch_size=6: must be 2, 4, 8"):
        timm.create_model("vmoe_cct", patch_size=6)


def test_timms_features_by_fx_take_moe_layers_as_nodes():
    arguments = {"features_only": True, "out_indices": (1, 3)}
    by_getter, by_fx = small(**arguments).eval(), small(**arguments, feature_cls="fx").eval()
    images = torch.randn(2, 3, 32, 32)
    for grid, tokens in zip(by_getter(images), by_fx(images), strict=True):
        torch.testing.assert_close(tokens[:, 1:].mT.reshape(grid.shape), grid)  # without the class token
    sum(tokens.square().sum() for tokens in by_fx.train()(images)).backward()
    assert all(layer.experts.fc1.weight.grad.any() for _, layer in vmoe.moe_layers(by_fx))


@pytest.mark.parametrize(
    ("name", "chosen"), [("convnext_atto", {}), ("convnext_atto", {"feature_cls": "fx"}), ("hiera_tiny_224", {})]
)
def test_features_of_any_backbone_are_as_timm_gives_them(name, chosen):
    small = {"convnext_atto": {"dims": (8, 12, 16, 24)}, "hiera_tiny_224": {"embed_dim": 16, "num_heads": 1}}[
        name
    ] | chosen
    on_backbone = {"backbone": name, "moe": {"num_experts": 2}, **small}
    dense = timm.create_model(name, features_only=True, device="meta", **small)
    sparse = timm.create_model("vmoe_on_backbone", features_only=True, device="meta", **on_backbone)
    images = torch.empty(1, 3, 224, 224, device="meta")
    assert [part.shape for part in sparse(images)] == [part.shape for part in dense(images)]
    assert sparse.feature_info.channels() == dense.feature_info.channels()


def test_scripting_is_refused_in_a_line():
    with pytest.raises(RuntimeError, match="MoE layers are made of; use torch") as error:
        torch.jit.script(small())
    assert "\n" not in str(error.value)
