"""Low-rank adapters of attention, MLPs and experts: ours and PEFT's."""

import pytest
import timm
import torch
from torch import Tensor, nn

import vmoe
from vmoe import MoeConfig
from vmoe.models.lora import LowRank, merged_weights

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2, "num_classes": 5}


def sparse(**moe) -> nn.Module:
    torch.manual_seed(0)
    knobs = {"num_experts": 3, "layers": "last-1", "shared_experts": 1, "noise_std": 0.0, **moe}
    return vmoe.create_model("vit_tiny_patch16_224", MoeConfig(**knobs), **KWARGS).double().eval()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> nn.Module:
    """With adapters that are no longer zero."""
    for module in model.modules():
        if isinstance(module, LowRank):
            nn.init.normal_(module.up, std=0.1)
    return model


def adapted_layers(model: nn.Module) -> set[str]:
    return {name.split(".parametrizations")[0] for name, _ in model.named_parameters() if name.endswith(".up")}


def test_adapters_begin_with_the_model_and_learn_alone():
    model, x = sparse(), images()
    before = model(x)
    vmoe.add_lora(model, rank=2)
    assert torch.equal(model(x), before)
    attention = {f"blocks.{block}.attn.{part}" for block in (0, 1) for part in ("qkv", "proj")}
    moe = {f"blocks.1.mlp.{part}.{layer}" for part in ("experts", "shared") for layer in ("fc1", "fc2")}
    assert adapted_layers(model) == attention | moe | {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"}
    assert model.blocks[1].mlp.experts.fc1.parametrizations.weight[0].up.shape == (3, 96, 2)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    others = {name for name in learning if not name.endswith((".up", ".down"))}
    assert others == {"head.weight", "head.bias", "blocks.1.mlp.router.gate.weight"}
    trained(model)(x).square().sum().backward()
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if name in learning)


@pytest.mark.parametrize("knobs", [{}, {"router": "soft", "capacity_factor": 1.0}, {"backend": "padded"}], ids=str)
def test_merging_is_exact(knobs):
    model, x = sparse(**knobs), images()
    plain = sparse(**knobs)
    trained(vmoe.add_lora(model, rank=2, alpha=3.0))
    by_hand = model.state_dict()
    expected, weights = model(x), merged_weights(by_hand)
    assert not torch.allclose(expected, plain(x))
    name = "blocks.1.mlp.experts.fc1"
    low_rank = model.get_submodule(name).parametrizations.weight[0]
    one = plain.get_submodule(name).weight[1] + 1.5 * low_rank.up[1] @ low_rank.down[1]
    torch.testing.assert_close(weights[f"{name}.weight"][1], one)
    plain.load_state_dict(weights)
    assert torch.equal(plain(x), expected)
    vmoe.merge_lora(model)
    assert torch.equal(model(x), expected) and model.state_dict().keys() == weights.keys()
    assert type(model.get_submodule(name)) is type(plain.get_submodule(name))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_experts_do_not_start_from_an_mlp_with_adapters():
    dense = vmoe.add_lora(vmoe.create_model("vit_tiny_patch16_224", **KWARGS), rank=2)
    with pytest.raises(ValueError, match=r"vmoe\.merge_lora"):
        vmoe.sparsify(dense, MoeConfig(num_experts=2))
    assert vmoe.sparsify(vmoe.merge_lora(dense), MoeConfig(num_experts=2)) is dense


def test_autocast_does_not_round_an_adapter():
    model = trained(vmoe.add_lora(sparse().float(), rank=2))
    merged = sparse().float()
    merged.load_state_dict(merged_weights(model.state_dict()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images().float()), merged(images().float()))


def test_an_adapted_model_is_saved_as_a_plain_one(tmp_path):
    model = trained(vmoe.add_lora(sparse().float(), rank=2))
    before = model(images().float())
    vmoe.save(model, tmp_path / "model.safetensors", list("abcde"))
    assert torch.equal(vmoe.load(tmp_path / "model.safetensors")(images().float()), before)
    assert torch.equal(model(images().float()), before)  # it has its adapters still
    assert vmoe.models.lora.has_lora(model)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"rank": 0}, "rank=0: must be"),
        ({"targets": "router"}, "targets='router': must be attention, mlp, experts"),
        ({"targets": ["experts"]}, "targets='experts': the model has none"),
    ],
)
def test_refusals(arguments, reason):
    model = timm.create_model("test_vit")
    with pytest.raises(ValueError, match=reason):
        vmoe.add_lora(model, **arguments)
    assert all(parameter.requires_grad for parameter in model.parameters()) and not adapted_layers(model)
    with pytest.raises(ValueError, match="has low-rank adapters already"):
        vmoe.add_lora(vmoe.add_lora(model))
    with pytest.raises(ValueError, match="neither attention nor MLPs"):
        vmoe.add_lora(timm.create_model("test_resnet"))


def test_peft_adapts_and_merges_experts():
    """Its `target_parameters` attaches itself in each pass, so that the experts have to be called for their weights."""
    peft = pytest.importorskip("peft")
    model, x = sparse(), images()
    before = model(x)
    targets = {"target_modules": ["qkv"], "target_parameters": ["experts.fc1.weight", "experts.fc2.weight"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    after = adapted(x)
    assert not torch.allclose(after, before)
    after.square().sum().backward()
    of_experts = [p for name, p in adapted.named_parameters() if "experts" in name and "lora_" in name]
    assert len(of_experts) == 4 and all(parameter.grad.any() for parameter in of_experts)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x), after)
    assert merged.state_dict().keys() == sparse().state_dict().keys()
