"""Which parameters get which method, learning rate and weight decay."""

import pytest
import timm
import torch

import vmoe
from vmoe import MoeConfig
from vmoe.training.config import OptimConfig
from vmoe.training.optim.groups import build_optimizer, parameter_groups
from vmoe.training.optim.muon import Muon

KWARGS = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 16, "num_classes": 3}


def vit(moe: MoeConfig | None = None, **kwargs) -> torch.nn.Module:
    return vmoe.create_model("vit_tiny_patch16_224", moe, **{**KWARGS, **kwargs})


def settings(model: torch.nn.Module, **options) -> dict[str, dict]:
    """The group of each parameter, by the parameter's name."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(**options))
    result = {names[parameter]: group for group in groups for parameter in group["params"]}
    assert result.keys() == set(names.values())
    return result


@pytest.mark.parametrize("router", ["token_choice", "cosine", "soft"])
def test_muon_takes_matrices_of_layers_and_experts_and_adamw_the_rest(router):
    moe = MoeConfig(num_experts=4, router=router, shared_experts=1, capacity_factor=1.0)
    by_name = settings(vit(moe), name="muon", lr=2e-3, adamw_lr=1e-3)
    muons = {name for name, group in by_name.items() if group["method"] == "muon"}
    linears = ("attn.qkv", "attn.proj")
    dense = {f"blocks.{block}.{part}.weight" for block in (0, 2) for part in (*linears, "mlp.fc1", "mlp.fc2")}
    parts = (*linears, *(f"mlp.{kind}.{layer}" for kind in ("experts", "shared") for layer in ("fc1", "fc2")))
    assert muons == dense | {f"blocks.{block}.{part}.weight" for block in (1, 3) for part in parts}
    assert all(group["lr"] == (2e-3 if name in muons else 1e-3) for name, group in by_name.items())


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224"])
def test_muon_finds_matrices_in_other_models(name):
    model = timm.create_model(name, num_classes=3)
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    assert isinstance(optimizer, Muon)
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    of_heads = {id(p) for head in heads for p in head.parameters()}
    muons = [p for group in optimizer.param_groups if group["method"] == "muon" for p in group["params"]]
    assert muons and not of_heads & {id(p) for p in muons}


def test_without_a_rate_of_its_own_adamw_takes_muon_s():
    assert {group["lr"] for group in settings(vit(), name="muon", lr=3e-3).values()} == {3e-3}


def test_layers_further_from_the_classifier_learn_slower():
    by_name = settings(vit(MoeConfig(num_experts=4)), lr=1.0, layer_decay=0.5)
    assert by_name["head.weight"]["lr"] == 1.0
    third, second = by_name["blocks.3.mlp.experts.fc1.weight"]["lr"], by_name["blocks.2.mlp.fc1.bias"]["lr"]
    assert third == 2 * second and third < 1
    assert by_name["patch_embed.proj.weight"]["lr"] < by_name["blocks.0.mlp.fc1.weight"]["lr"]


def test_experts_have_a_weight_decay_of_their_own():
    by_name = settings(vit(MoeConfig(num_experts=4, shared_experts=1)), weight_decay=0.1, expert_weight_decay=0.3)
    decays = {name: group["weight_decay"] for name, group in by_name.items()}
    assert decays["blocks.1.mlp.experts.fc1.weight"] == 0.3
    assert decays["blocks.1.mlp.experts.fc1.bias"] == 0
    assert decays["blocks.1.mlp.shared.fc1.weight"] == decays["blocks.0.mlp.fc1.weight"] == 0.1
    assert decays["pos_embed"] == 0
