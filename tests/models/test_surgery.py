"""timm models become V-MoEs and stay timm models."""

import copy

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

import vmoe
from vmoe import MoeConfig
from vmoe.models.surgery import set_moe_drop_path

SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}
FAMILIES = [
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
]


def sparse(name: str = FAMILIES[0], **knobs) -> nn.Module:
    torch.manual_seed(0)
    return vmoe.create_model(name, MoeConfig(num_experts=4, **knobs), **SMALL)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model = sparse(name)
    assert [layer for layer, _ in vmoe.moe_layers(model)] == ["blocks.1.mlp", "blocks.3.mlp"]
    y = model.train()(torch.randn(3, 3, 16, 16))
    y = y[0] if isinstance(y, tuple) else y
    (y.sum() + vmoe.auxiliary_loss(model)).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None and "head_dist" not in n]
    assert y.shape == (3, 5) and not missing


def test_parameters_keep_timms_names_with_a_leading_expert_axis():
    shapes = {name: tuple(value.shape) for name, value in sparse().blocks[1].mlp.experts.state_dict().items()}
    assert shapes == {
        "fc1.weight": (4, 96, 24),
        "fc1.bias": (4, 96),
        "fc2.weight": (4, 24, 96),
        "fc2.bias": (4, 24),
    }


def test_no_layers_is_the_dense_twin():
    torch.manual_seed(0)
    dense = vmoe.create_model(FAMILIES[0], **SMALL)
    empty = sparse(layers=[])
    assert not vmoe.moe_layers(empty)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(empty.eval()(images), dense.eval()(images), rtol=0, atol=0)


def test_the_twin_shares_all_weights_outside_the_experts():
    torch.manual_seed(0)
    dense = vmoe.create_model(FAMILIES[0], **SMALL).state_dict()
    shared = {name: value for name, value in sparse().state_dict().items() if name in dense}
    assert len(shared) == len(dense) - 2 * 4
    assert all(torch.equal(value, dense[name]) for name, value in shared.items())


def test_upcycled_experts_are_copies_of_the_mlp():
    dense = timm.create_model(FAMILIES[0], **SMALL).eval()
    model = vmoe.sparsify(copy.deepcopy(dense), MoeConfig(num_experts=4, renormalize=True), init="upcycle")
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(model(images), dense(images), rtol=1e-5, atol=1e-5)


def test_device_type_and_mode_are_kept():
    dense = timm.create_model(FAMILIES[0], **SMALL).to(torch.bfloat16).eval()
    layer = vmoe.sparsify(dense, MoeConfig()).blocks[1].mlp
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert not layer.training and not layer.experts.training
    with torch.device("meta"):
        on_meta = vmoe.create_model(FAMILIES[0], MoeConfig(), **SMALL)
    assert all(parameter.is_meta for parameter in on_meta.parameters())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vitamin_small_224"])  # the second's MLPs have their own norm
def test_no_part_leaves_the_mode_of_a_model_in_evaluation(name):
    small = SMALL if name == FAMILIES[0] else {"num_classes": 5}
    with torch.device("meta"):
        model = vmoe.sparsify(timm.create_model(name, **small).eval(), MoeConfig(num_experts=2))
    set_moe_drop_path(model, 0.5)
    assert not any(module.training for module in model.modules())
    set_moe_drop_path(model.train(), 0.25)
    assert all(module.training for module in model.modules())


def test_weight_decay_groups():
    """Stacked weights decay; biases, also the two-dimensional stacked ones, do not."""
    model = sparse()
    no_decay, decay = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in decay["params"]}
    undecayed = {names[id(parameter)] for parameter in no_decay["params"]}
    assert "blocks.1.mlp.experts.fc1.weight" in decayed and "blocks.1.mlp.router.gate.weight" in decayed
    assert "blocks.1.mlp.experts.fc1.bias" in undecayed and "pos_embed" in undecayed
    assert {"blocks.1.mlp.experts.fc1.bias", "blocks.3.mlp.experts.fc2.bias", "pos_embed"} <= model.no_weight_decay()


def test_layer_decay_groups():
    model = sparse()
    groups = param_groups_layer_decay(
        model, 0.1, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5, verbose=False
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert scale["blocks.1.mlp.experts.fc1.weight"] == scale["blocks.1.attn.qkv.weight"]
    assert scale["blocks.1.mlp.experts.fc1.weight"] < scale["blocks.3.mlp.router.gate.weight"]


def test_timm_methods_still_work():
    model = sparse().eval()
    images = torch.randn(2, 3, 16, 16)
    assert model.forward_features(images).shape == (2, 5, 24)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    state = model.state_dict()
    model.load_state_dict(state)
    copy.deepcopy(model)
    model.train().set_grad_checkpointing()
    (model(images.requires_grad_()).sum() + vmoe.auxiliary_loss(model)).backward()


def test_refusals():
    with pytest.raises(ValueError, match="ResNet"):
        vmoe.sparsify(timm.create_model("resnet18"), MoeConfig())
    with pytest.raises(ValueError, match="already"):
        vmoe.sparsify(sparse(), MoeConfig())
    with pytest.raises(ValueError, match="init="):
        vmoe.sparsify(timm.create_model(FAMILIES[0], **SMALL), MoeConfig(), init="copy")
    with pytest.raises(ValueError, match=r"layers=\[4\]"):
        sparse(layers=[4])
    with pytest.raises(RuntimeError, match="Unknown model"):
        vmoe.create_model("vit_gigantic")
