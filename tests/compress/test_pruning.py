"""Use of experts, alignment of hidden units, dropping and merging, and the way to a dense model."""

import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

import vmoe
from vmoe import MoeConfig, MoeMlp
from vmoe.compress.alignment import best_order, expert_weights, has_gate, reordered
from vmoe.compress.pruning import (
    check_prunable,
    experts_in_use,
    groups_of_layers,
    join_experts,
    joined_width,
    merged_groups,
    pruned_groups,
    regrouped_config,
    regrouped_weights,
)
from vmoe.compress.usage import ExpertUse, measure_use
from vmoe.explain.explorer.causes import without

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
LAYER = "blocks.1.mlp"
ROUTERS = ["token_choice", "sigmoid", "cosine", "expert_choice"]
MLPS = {
    "plain": lambda: Mlp(12, 20, norm_layer=nn.LayerNorm),
    "gated": lambda: SwiGLU(12, 20, norm_layer=nn.LayerNorm),
    "gate last": lambda: GluMlp(12, 40, gate_last=True),
    "without biases": lambda: Mlp(12, 20, bias=False),
}


def sparse(seed: int = 0, **knobs) -> nn.Module:
    torch.manual_seed(seed)
    moe = MoeConfig(**{"layers": [1], "num_experts": 4, "top_k": 2, **knobs})
    model = vmoe.create_model("vit_tiny_patch16_224", moe, **SMALL).eval()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def batches(count: int = 2) -> list[tuple[torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(3, 3, 16, 16, generator=draw),) for _ in range(count)]


def regrouped(model: nn.Module, groups, use) -> nn.Module:
    config = regrouped_config(model.get_submodule(LAYER).config, len(groups))
    smaller = vmoe.create_model("vit_tiny_patch16_224", config, **SMALL).eval()
    smaller.load_state_dict(regrouped_weights(model, {LAYER: groups}, use))
    return smaller


def layer_of(kind: str) -> MoeMlp:
    torch.manual_seed(0)
    layer = MoeMlp.from_mlp(MLPS[kind](), MoeConfig(num_experts=2, top_k=1)).double()
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter)
    return layer.eval()


@pytest.mark.parametrize("kind", MLPS)
def test_another_order_of_hidden_units_is_the_same_function(kind):
    layer = layer_of(kind)
    is_gated, x = has_gate(layer.experts), torch.randn(2, 5, 12, dtype=torch.float64)
    expected = layer(x)
    weights = expert_weights(layer.experts, 1)
    order = torch.randperm(20)
    with torch.no_grad():
        for name, value in reordered(weights, order, is_gated).items():
            assert name == "fc2.bias" or not torch.equal(value, weights[name])
            layer.experts.get_parameter(name)[1] = value
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MLPS)
def test_alignment_finds_the_order_back(kind):
    layer = layer_of(kind)
    is_gated = has_gate(layer.experts)
    weights = expert_weights(layer.experts, 0)
    shuffled = reordered(weights, torch.randperm(20), is_gated)
    noisy = {name: value + 0.05 * torch.randn_like(value) for name, value in shuffled.items()}
    back = reordered(shuffled, best_order(noisy, weights, is_gated), is_gated)
    assert all(torch.equal(back[name], value) for name, value in weights.items())


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS)
def test_use_is_what_the_records_say(router):
    model = sparse(router=router)
    use = measure_use(model, batches(), with_norms=True)[LAYER]
    layer, inputs = model.get_submodule(LAYER), []
    layer.register_forward_hook(lambda _, given, result: inputs.append(given[0]))
    with vmoe.record_routing(model) as trace:
        for (images,) in batches():
            model(images)
    record, x = trace.layers[LAYER], torch.cat(inputs)
    if router == "expert_choice":
        weights = record.combine.sum(-1).double()
    else:
        weights = torch.zeros_like(record.gates).scatter(-1, record.chosen, record.combine_weights).double()
    torch.testing.assert_close(use.mass_E, weights.mean((0, 1)))
    norms = []
    for expert in range(4):  # by hand: gelu MLP of each expert
        each = expert_weights(layer.experts, expert)
        hidden = nn.functional.gelu(x @ each["fc1.weight"].T + each["fc1.bias"])
        length = (hidden @ each["fc2.weight"].T + each["fc2.bias"]).norm(dim=-1)
        norms.append((length * weights[..., expert]).mean())
    torch.testing.assert_close(use.norm_E, torch.stack(norms).double(), rtol=1e-5, atol=0)
    assert torch.allclose(use.affinity_EE.diagonal(), torch.ones(4, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS)
def test_tokens_route_on_among_the_experts_that_are_kept(router):
    model = sparse(router=router)
    use = measure_use(model, batches())
    kept = [1, 2, 3]
    smaller = regrouped(model, [[expert] for expert in kept], use)
    layer, small = model.get_submodule(LAYER), smaller.get_submodule(LAYER)
    assert torch.equal(small.experts.fc1.weight, layer.experts.fc1.weight[kept])
    (images,) = batches(1)[0:1][0]
    with vmoe.record_routing(model) as trace:
        model(images)
    with vmoe.record_routing(smaller) as small_trace:
        smaller(images)
    gates, found = trace.layers[LAYER].gates[..., kept], small_trace.layers[LAYER].gates
    if router != "sigmoid":  # whose gates are each expert's own
        gates = gates / gates.sum(-1, keepdim=True)
    torch.testing.assert_close(found, gates)


def test_the_experts_that_score_highest_are_kept():
    mass, norm = torch.tensor([0.1, 0.4, 0.2, 0.3]), torch.tensor([4.0, 1.0, 2.0, 3.0])
    use = ExpertUse(mass, norm, torch.eye(4))
    assert pruned_groups(use, 2, "routed-mass") == [[1], [3]]
    assert pruned_groups(use, 2, "activation-norm") == [[0], [3]]


def test_others_join_the_head_that_they_are_most_like():
    affinity = torch.eye(4)
    affinity[0, 3], affinity[0, 1] = 0.9, -0.5
    affinity[2, 1], affinity[2, 3] = 0.2, 0.1
    use = ExpertUse(torch.tensor([0.1, 0.4, 0.2, 0.3]), None, affinity)
    assert merged_groups(use, 2, "routed-mass") == [[1, 2], [3, 0]]
    assert merged_groups(use, 1, "routed-mass") == [[1, 0, 2, 3]]


@torch.no_grad()
def test_copies_that_differ_in_the_order_of_units_merge_into_themselves():
    model = sparse(renormalize=True)
    layer, (images,) = model.get_submodule(LAYER), batches(1)[0]
    for expert in (1, 2, 3):  # of expert 0
        copied = reordered(expert_weights(layer.experts, 0), torch.randperm(96), is_gated=False)
        for name, value in copied.items():
            layer.experts.get_parameter(name)[expert] = value
    expected = model(images)
    use = measure_use(model, batches())
    merged = regrouped(model, [[2, 0], [1, 3]], use)
    torch.testing.assert_close(merged(images), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_merging_weighs_experts_and_router_by_routed_mass():
    model = sparse()
    use = {LAYER: ExpertUse(torch.tensor([3.0, 1.0, 0.0, 0.0]), None, torch.eye(4))}
    merged = regrouped(model, [[0, 1], [2, 3]], use).get_submodule(LAYER)
    layer = model.get_submodule(LAYER)
    bias, rows = layer.experts.fc2.bias, layer.router.gate.weight
    torch.testing.assert_close(merged.experts.fc2.bias[0], 0.75 * bias[0] + 0.25 * bias[1])
    torch.testing.assert_close(merged.router.gate.weight[0], 0.75 * rows[0] + 0.25 * rows[1])
    torch.testing.assert_close(merged.experts.fc2.bias[1], bias[2:].mean(0))  # no tokens: evenly


@torch.no_grad()
@pytest.mark.parametrize(("router", "knobs"), [("token_choice", {"renormalize": True}), ("sigmoid", {})])
def test_joined_experts_are_the_layer_whose_tokens_take_all_of_them_evenly(router, knobs):
    model = sparse(router=router, num_experts=2, expert_width=0.5, **knobs)
    model.get_submodule(LAYER).router.gate.weight.zero_()
    (images,) = batches(1)[0]
    expected = model(images)
    use = measure_use(model, batches())
    assert joined_width(model) == 2
    student = join_experts(model, {LAYER: [[0], [1]]}, use)
    assert not vmoe.moe_layers(student)
    torch.testing.assert_close(student(images), expected, rtol=1e-5, atol=1e-5)
    fresh = vmoe.create_model("vit_tiny_patch16_224", **SMALL)
    fresh.load_state_dict(student.state_dict())


@torch.no_grad()
@pytest.mark.parametrize("mlp", [GluMlp(12, 64, gate_last=True), SwiGLU(12, 32), Mlp(12, 32, bias=False)])
def test_join_keeps_the_halves_of_gated_experts_apart(mlp):
    class Model(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

    torch.manual_seed(0)
    model = Model(mlp)
    layer = MoeMlp.from_mlp(mlp, MoeConfig(num_experts=2, top_k=2, expert_width=0.5, renormalize=True)).eval()
    layer.dense_form = vmoe.models.surgery.DenseForm(mlp)
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter)
    layer.router.gate.weight.zero_()
    model.mlp = layer
    x = torch.randn(2, 5, 12)
    expected = layer(x)
    torch.testing.assert_close(vmoe.densify(model, "join").mlp(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "keep", "told"),
    [
        ({}, 0, "has 4 experts in blocks.1.mlp; keep 1 to 3"),
        ({}, 4, "keep 1 to 3"),
        ({"num_experts": 1, "top_k": 1}, 1, "keep its only one"),
        ({"router": "soft"}, 2, 'router="soft"'),
        ({"router": "hash"}, 2, 'router="hash"'),
        ({"router": "random"}, 2, 'router="random"'),
        ({"router": "balanced"}, 2, 'router="balanced"'),
        ({"router": "expert_choice", "capacity_factor": 2.0}, 1, "keep more"),
        ({"layers": []}, 2, "dense"),
    ],
)
def test_what_cannot_be_pruned_is_told(knobs, keep, told):
    with pytest.raises(ValueError, match=told):
        check_prunable(sparse(**knobs), keep)


def test_experts_of_which_no_number_is_as_wide_as_the_mlp_are_told():
    with pytest.raises(ValueError, match="expert_width"):
        joined_width(sparse(expert_width=0.75))


@pytest.mark.parametrize("knobs", [{}, {"shared_router": True}, {"router": "sigmoid", "noise_std": 0.0}, {"top_k": 2}])
def test_images_that_need_no_other_expert_keep_their_logits(knobs):
    options = {"layers": [0, 1], "num_experts": 6, "top_k": 1, "route": "image", "capacity_factor": None, **knobs}
    model = sparse(**options).double()
    wanted = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    use = measure_use(model, [(wanted,)])
    keep = experts_in_use(model, use)
    assert keep < 6
    groups = groups_of_layers(model, use, keep, "routed-mass")
    config = regrouped_config(model.blocks[0].mlp.config, keep, keeps_gates=True)
    smaller = vmoe.create_model("vit_tiny_patch16_224", config, **SMALL).eval().double()
    smaller.load_state_dict(regrouped_weights(model, groups, use, keeps_gates=True))
    torch.testing.assert_close(smaller(wanted), model(wanted), rtol=1e-12, atol=1e-12)
    # once more: what was removed before still counts
    again = regrouped_config(config, keep, keeps_gates=True)
    assert again == config
    assert groups["blocks.0.mlp"] == groups["blocks.1.mlp"] or not options.get("shared_router")


def test_an_expert_taken_away_leaves_removed_experts_their_share():
    """An image that uses none of them has the same logits as in the model that lost no expert."""
    model = sparse(num_experts=6, top_k=1, route="image", capacity_factor=None).double()
    layer, wanted = model.get_submodule(LAYER), batches(1)[0][0].double()
    with vmoe.record_routing(model) as trace:
        model(wanted)
    own = trace.layers[LAYER].chosen.unique().tolist()
    other = next(expert for expert in range(6) if expert not in own)
    groups = [[expert] for expert in sorted([*own, other])]
    config = regrouped_config(layer.config, len(groups), keeps_gates=True)
    smaller = vmoe.create_model("vit_tiny_patch16_224", config, **SMALL).eval().double()
    use = measure_use(model, [(wanted,)])
    smaller.load_state_dict(regrouped_weights(model, {LAYER: groups}, use, keeps_gates=True))
    with without(layer, other), without(smaller.get_submodule(LAYER), groups.index([other])):
        torch.testing.assert_close(smaller(wanted), model(wanted))
