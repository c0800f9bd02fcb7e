"""The other token-choice routers: parity with Mixtral and DeepSeek-V3, controls, and the table as a whole."""

from functools import partial

import pytest
import torch
from torch import nn

import vmoe
from vmoe import MoeConfig, MoeMlp
from vmoe.moe.config import ROUTER_NAMES
from vmoe.moe.mlps import Glu
from vmoe.moe.routers import ROUTERS, top_experts

WIDTH, HIDDEN, EXPERTS = 16, 24, 6


def tokens(images: int = 3, count: int = 5, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(images, count, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(1))


def glu_layer(**knobs) -> MoeMlp:
    moe = MoeConfig(num_experts=EXPERTS, top_k=2, renormalize=True, **knobs)
    return MoeMlp(WIDTH, HIDDEN, act_layer=partial(Glu, nn.SiLU(), gate_first=True), bias=False, moe=moe).eval()


def fill(block: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)


def test_mixtral():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(
        hidden_size=WIDTH, intermediate_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=2
    )
    block = mixtral.MixtralSparseMoeBlock(config).eval()
    fill(block)
    layer = glu_layer()
    with torch.no_grad():
        layer.router.gate.weight.copy_(block.gate.weight)
        layer.experts.fc1.weight.copy_(block.experts.gate_up_proj)
        layer.experts.fc2.weight.copy_(block.experts.down_proj)
    torch.testing.assert_close(layer(tokens()), block(tokens()), rtol=1e-5, atol=1e-5)


def test_deepseek_v3():
    deepseek = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = deepseek.DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=HIDDEN,
        n_routed_experts=EXPERTS,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    block = deepseek.DeepseekV3MoE(config).eval()
    fill(block)
    bias = torch.linspace(-0.4, 0.4, EXPERTS)  # large enough to change who is chosen
    block.gate.e_score_correction_bias.copy_(bias)
    layer = glu_layer(router="sigmoid", shared_experts=2)
    shared = block.shared_experts
    with torch.no_grad():
        layer.router.gate.weight.copy_(block.gate.weight)
        layer.router.bias.copy_(bias)
        layer.experts.fc1.weight.copy_(block.experts.gate_up_proj)
        layer.experts.fc2.weight.copy_(block.experts.down_proj)
        layer.shared.fc1.weight.copy_(torch.cat([shared.gate_proj.weight, shared.up_proj.weight]))
        layer.shared.fc2.weight.copy_(shared.down_proj.weight)
    expected = block(tokens())
    torch.testing.assert_close(layer(tokens()), expected, rtol=1e-5, atol=1e-5)
    layer.router.bias.zero_()
    assert not torch.allclose(layer(tokens()), expected)


def layer_of(router: str, **knobs) -> MoeMlp:
    torch.manual_seed(0)
    moe = MoeConfig(**{"router": router, "num_experts": EXPERTS, "top_k": 2, "capacity_factor": 1.0, **knobs})
    return MoeMlp(WIDTH, HIDDEN, moe=moe, tokens=5).train()


def decisions(layer: MoeMlp, *inputs: torch.Tensor) -> list:
    """How the layer routes each of the inputs."""
    seen = []
    layer.recorders = (lambda routing, shape: seen.append(routing),)
    for x in inputs:
        layer(x)
    return seen


def test_biases_balance_the_load_without_a_loss():
    layer = layer_of("sigmoid", bias_update_rate=0.02, importance_loss_weight=0.0, capacity_factor=None)
    with torch.no_grad():
        layer.router.gate.weight[0] += 0.5 * tokens().mean((0, 1))  # expert 0 is everybody's favourite
    x = tokens(40, 5)
    x = x + tokens().mean((0, 1))
    layer(x)
    before = layer.statistics.load.max()
    for _ in range(60):
        layer(x)
        vmoe.update_router_biases(layer)
    assert layer.statistics.load.max() < 1.3 / EXPERTS < before


def test_a_bias_moves_by_its_rate_towards_a_fair_load():
    layer = layer_of("sigmoid", bias_update_rate=0.25)
    layer(tokens())
    load = layer.statistics.load
    vmoe.update_router_biases(layer)
    assert torch.equal(layer.router.bias, 0.25 * (1 / EXPERTS - load).sign())
    vmoe.update_router_biases(layer)  # nothing was routed since
    assert torch.equal(layer.router.bias, 0.25 * (1 / EXPERTS - load).sign())


@pytest.mark.parametrize("convert", [lambda layer: layer.to(torch.bfloat16), nn.Module.half], ids=["to", "half"])
def test_a_bias_goes_on_moving_in_a_model_of_half_precision(convert):
    layer = convert(nn.Sequential(layer_of("sigmoid", num_experts=2, bias_update_rate=0.001)))[0]
    assert layer.experts.fc1.weight.dtype.itemsize == 2
    layer.router.bias.fill_(0.5)  # next to which bfloat16 has no number nearer than 0.002
    for _ in range(3):
        layer.router.choices.copy_(torch.tensor([0.75, 0.25]))
        vmoe.update_router_biases(layer)
    torch.testing.assert_close(layer.router.bias, torch.tensor([0.497, 0.503]))
    layer.double()
    assert layer.router.bias.dtype == torch.float64


def test_sigmoid_weights_leave_the_bias_out():
    layer = layer_of("sigmoid").eval()
    with torch.no_grad():
        layer.router.bias[3] = 10.0
    (routing,) = decisions(layer, tokens())
    assert (routing.chosen_GSK[..., 0] == 3).all()
    torch.testing.assert_close(routing.weights_GSK, routing.gates_GSE.gather(-1, routing.chosen_GSK))


def test_cosine_scores_ignore_length():
    layer = layer_of("cosine").eval()
    with torch.no_grad():
        layer.router.temperature.fill_(0.1)
    scores, _ = layer.router.scores(tokens().flatten(0, 1))
    torch.testing.assert_close(layer.router.scores(3 * tokens().flatten(0, 1))[0], scores)
    assert scores.abs().max() <= 10


def test_cosine_scores_in_a_space_of_given_size_with_a_bias():
    layer = MoeMlp(WIDTH, HIDDEN, moe=MoeConfig(num_experts=EXPERTS, router="cosine", cosine_dim=20, cosine_bias=True))
    router, x_TD = layer.router, tokens().flatten(0, 1)
    with torch.no_grad():
        router.projection_bias.normal_()
    projected_TP = x_TD @ router.projection.weight.T + router.projection_bias
    expected_TE = torch.cosine_similarity(projected_TP[:, None], router.gate.weight, dim=-1) / router.temperature
    assert router.gate.weight.shape == (EXPERTS, 20)
    torch.testing.assert_close(router.scores(x_TD)[0], expected_TE)


def test_hash_depends_on_the_position_alone():
    layer = layer_of("hash").eval()
    first, second = (
        routing.groups.merge(routing.chosen_GSK).view(-1, 40, 2)
        for routing in decisions(layer, tokens(3, 40), tokens(2, 40))
    )
    assert (first == first[:1]).all() and torch.equal(first[:2], second)
    assert (first[..., 0] != first[..., 1]).all()
    assert len(first[0, :, 0].unique()) == EXPERTS


def test_random_draws_distinct_experts_anew():
    layer = layer_of("random").eval()
    first, second = (routing.chosen_GSK for routing in decisions(layer, tokens(), tokens()))
    assert not torch.equal(first, second)
    assert (first[..., 0] != first[..., 1]).all()


def test_balanced_is_perfectly_fair():
    layer = layer_of("balanced", capacity_multiple_of=1, group="batch")
    layer(tokens(6, 5))
    assert torch.equal(layer.statistics.load, torch.full((EXPERTS,), 1 / EXPERTS))
    assert layer.statistics.dropped == 0


def test_top_experts_takes_the_lower_of_equal_gates():
    gates = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [0.1, 0.4, 0.1, 0.4]]])
    assert top_experts(gates, 3).tolist() == [[[0, 1, 2], [1, 3, 0]]]


def test_the_table_is_complete():
    assert set(ROUTERS) == set(ROUTER_NAMES)


@pytest.mark.parametrize("router", ROUTER_NAMES)
def test_every_router_trains_compiles_and_repeats(router):
    layer = layer_of(router)
    x = tokens(4, 5)
    torch.manual_seed(3)
    y = layer(x)
    (y.square().sum() + vmoe.auxiliary_loss(layer)).backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    torch.manual_seed(3)
    assert torch.equal(layer(x), y)
    if router != "random":
        layer.eval()
        expected = layer(x)
        torch.compiler.reset()  # each compiled layer counts towards one limit
        layer.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("router", ROUTER_NAMES)
def test_every_router_takes_empty_and_single_batches(router):
    layer = layer_of(router, capacity_factor=1.2)
    for images in (0, 1):
        y = layer(tokens(images, 5))
        (y.sum() + vmoe.auxiliary_loss(layer)).backward()
        assert y.shape == (images, 5, WIDTH)


@pytest.mark.parametrize(
    ("router", "knobs", "field"),
    [
        ("expert_choice", {"group": 8}, "group"),
        ("soft", {"group": "batch"}, "group"),
        ("soft", {"capacity_factor": None}, "capacity_factor"),
        ("soft", {"eval_capacity_factor": 2.0}, "eval_capacity_factor"),
        ("expert_choice", {"batch_priority": True}, "batch_priority"),
        ("expert_choice", {"renormalize": True}, "renormalize"),
        ("sigmoid", {"noise_std": 1.0}, "noise_std"),
        ("hash", {"z_loss_weight": 1.0}, "z_loss_weight"),
    ],
)
def test_combinations_that_cannot_work_are_refused(router, knobs, field):
    with pytest.raises(ValueError, match=f"^{field}="):
        MoeConfig(router=router, **knobs)


@pytest.mark.parametrize("router", [name for name in ROUTER_NAMES if name not in ("expert_choice", "soft")])
def test_experts_a_token_can_be_set_after_construction(router):
    torch.manual_seed(0)
    layer, three = (MoeMlp(WIDTH, HIDDEN, moe=MoeConfig(num_experts=EXPERTS, top_k=k, router=router)) for k in (1, 3))
    three.load_state_dict(layer.state_dict())
    vmoe.set_top_k(layer, 3)
    results = []
    for each in (layer.eval(), three.eval()):
        torch.manual_seed(1)  # for the random router
        results.append(each(tokens()))
    assert torch.equal(*results)
    for bad in (0, EXPERTS + 1):
        with pytest.raises(ValueError, match=f"top_k={bad}"):
            vmoe.set_top_k(layer, bad)
    assert layer.config.top_k == 3


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_experts_with_slots_have_no_number_a_token(router):
    layer = MoeMlp(WIDTH, HIDDEN, moe=MoeConfig(num_experts=EXPERTS, router=router), tokens=5)
    with pytest.raises(ValueError, match=f'top_k=2: has no meaning with router="{router}"'):
        vmoe.set_top_k(layer, 2)


def test_gates_that_underflow_choose_no_expert_twice():
    gates = torch.tensor([[[0.0, 1.0, 0.0, 0.0]]])
    assert top_experts(gates, 3).tolist() == [[[1, 0, 2]]]


def test_cosine_routing_looks_at_directions_alone():
    layer = MoeMlp(WIDTH, HIDDEN, moe=MoeConfig(num_experts=EXPERTS, router="cosine")).eval()
    expected = layer(tokens())
    with torch.no_grad():
        layer.router.gate.weight[2] *= 5
        layer.router.projection.weight *= 3
    torch.testing.assert_close(layer(tokens()), expected)
