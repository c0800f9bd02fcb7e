"""What learns in a model of which parts are frozen."""

import pytest
import torch

import vmoe
from vmoe import MoeConfig
from vmoe.models.freezing import is_linear_probe, put_in_training_mode

MOE = MoeConfig(num_experts=3, layers="last-1", shared_experts=1)


def small(moe: MoeConfig | None = MOE) -> torch.nn.Module:
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2, "num_classes": 5}
    return vmoe.create_model("vit_tiny_patch16_224", moe, **kwargs)


def learning(what: str | list[str]) -> set[str]:
    return {name for name, parameter in vmoe.freeze(small(), what).named_parameters() if parameter.requires_grad}


def test_parts_by_name():
    every = {name for name, _ in small().named_parameters()}
    head = {"head.weight", "head.bias"}
    router = {name for name in every if ".router." in name}
    experts = {name for name in every if ".experts." in name or ".shared." in name}
    assert router and experts
    assert learning("experts") == every - experts
    assert learning("routers") == every - router
    assert learning("backbone") == head | router | experts
    assert learning("all_but_head") == head
    assert learning(["backbone", "routers"]) == head | experts
    assert learning("blocks.0.*") == {name for name in every if not name.startswith("blocks.0.")}


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("bloks.*", "matches the name of no parameter, such as cls_token or head.bias"),
        (["backbone", "head.*", "experts", "routers"], "leaves no parameter to learn"),
        ("*", "leaves no parameter to learn"),
    ],
)
def test_refusals_change_nothing(what, reason):
    model = small()
    with pytest.raises(ValueError, match=reason):
        vmoe.freeze(model, what)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="has no experts"):
        vmoe.freeze(small(moe=None), "experts")


def test_a_linear_probe_s_backbone_computes_as_in_evaluation():
    model = vmoe.freeze(small(), "all_but_head")
    assert is_linear_probe(model) and not is_linear_probe(small())
    put_in_training_mode(model)
    assert model.head.training and not any(module.training for module in model.blocks.modules())
    put_in_training_mode(vmoe.freeze(other := small(), "experts"))
    assert all(module.training for module in other.modules())


def test_a_frozen_router_keeps_its_bias():
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moved = []
    for frozen in (False, True):
        model = small(MoeConfig(num_experts=3, layers="last-1", router="sigmoid"))
        if frozen:
            vmoe.freeze(model, "routers")
        model(x)
        vmoe.update_router_biases(model)
        moved.append(bool(model.blocks[1].mlp.router.bias.any()))
    assert moved == [True, False]


@pytest.mark.parametrize("what", ["backbone", "all_but_head", ["routers", "experts"]])
def test_a_part_with_adapters_is_not_frozen_with_them(what):
    model = vmoe.add_lora(small(), rank=2)
    with pytest.raises(ValueError, match="has low-rank adapters, which would not learn"):
        vmoe.freeze(model, what)
    vmoe.freeze(model, ["routers", "blocks.0.*"])
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".experts." in name for name in learning)
    assert not any(".router." in name or name.startswith("blocks.0.") for name in learning)
