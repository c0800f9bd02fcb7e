"""Ensembles in one model (E3): what the original JAX code recorded, and what must hold for any members."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vmoe.moe import MoeConfig, MoeMlp
from vmoe.moe.members import mean_prediction, tile

FIXTURES = Path(__file__).parent.parent / "fixtures"
RECORDED = np.load(FIXTURES / "vmoe_jax_e3_routers.npz")
CASES = json.loads((FIXTURES / "vmoe_jax_e3_routers.json").read_text())
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
MEMBERS, TOKENS, WIDTH = 2, 5, 8


def recorded(name: str) -> torch.Tensor:
    return torch.from_numpy(RECORDED[name])


def by_row(values: torch.Tensor) -> torch.Tensor:
    """(G, S, ...) with the members of a token one after the other -> (G*M, S/M, ...), the rows that a layer takes."""
    return values.unflatten(1, (-1, MEMBERS)).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("name", CASES)
def test_the_layer_computes_what_the_original_recorded(name):
    case = CASES[name]
    kernel = recorded(f"{name}/router_kernel")  # (D, M, E/M)
    moe = MoeConfig(
        num_experts=8,
        ensemble=MEMBERS,
        top_k=case["num_selected_experts"],
        capacity_factor=case["dispatcher"]["capacity_factor"],
        eval_capacity_factor=case["dispatcher"]["capacity_factor"],
        group="image",
        noise_std=case["noise_std"],
        gshard_loss_weight=0.1,
    )
    layer = MoeMlp(16, 12, 12, torch.nn.Tanh, bias=(True, False), moe=moe).train(not case["deterministic"])
    with torch.no_grad():  # the second layer is the identity: recorded experts have one layer
        layer.router.gate.weight.copy_(kernel.flatten(1).t())
        layer.experts.fc1.weight.copy_(recorded("shared/E3/expert_A").transpose(1, 2))
        layer.experts.fc1.bias.copy_(recorded("shared/E3/expert_b"))
        layer.experts.fc2.weight.copy_(torch.eye(12).expand(8, -1, -1))
    if not case["deterministic"]:
        assert layer.router.noise_scale == case["noise_scale"]
        of_members = recorded(f"{name}/noise_unit_normal_per_member")  # (G, M, S/M, E/M)
        noise = torch.zeros(2, MEMBERS, 12, MEMBERS, 4)
        for member in range(MEMBERS):
            noise[:, member, :, member] = of_members[:, member]
        layer.router.draw_noise = lambda logits: noise.reshape_as(logits)
    routings = []
    layer.recorders = (lambda routing, shape: routings.append(routing),)
    combined = layer(by_row(recorded("shared/E3/inputs")))

    (routing,) = routings
    assert routing.capacity == case["capacity"]
    torch.testing.assert_close(combined, by_row(recorded(f"{name}/combined")), **TOLERANCE)
    gates = routing.groups.merge(routing.gates_GSE).view(2 * MEMBERS, 12, 8)
    torch.testing.assert_close(gates, by_row(recorded(f"{name}/gates")), **TOLERANCE)
    taken = torch.zeros_like(routing.gates_GSE, dtype=torch.bool).scatter(2, routing.chosen_GSK, routing.kept_GSK)
    expected = by_row(recorded(f"{name}/dispatch_weights").any(-1))
    assert torch.equal(routing.groups.merge(taken).view(2 * MEMBERS, 12, 8), expected)
    of_record = {key: recorded(f"{name}/metrics/{key}_loss").mean() for key in ("importance", "gshard")}
    expected_loss = 0.005 * of_record["importance"] + 0.1 * of_record["gshard"]
    if not case["deterministic"]:
        expected_loss = expected_loss + 0.005 * recorded(f"{name}/metrics/load_loss").mean()
    torch.testing.assert_close(layer.last_auxiliary_loss, expected_loss, rtol=1e-5, atol=1e-7)


def layer_of(ensemble: int, **options) -> MoeMlp:
    torch.manual_seed(0)
    moe = MoeConfig(ensemble=ensemble, noise_std=0, **{"num_experts": 6, "capacity_factor": 0.7, "group": 2} | options)
    return MoeMlp(WIDTH, 16, moe=moe).double()


@pytest.mark.parametrize("options", [{}, {"batch_priority": True, "group": "batch"}, {"capacity_factor": None}])
def test_each_member_is_a_single_layer_of_its_own_experts(options):
    """Results, losses and gradients, in float64; the last group is incomplete."""
    options |= {"gshard_loss_weight": 0.1, "z_loss_weight": 0.1}
    whole = layer_of(3, top_k=2, **options)
    x = torch.randn(5, TOKENS, WIDTH, dtype=torch.float64)
    rows = tile(x, 3)
    weights = torch.randn_like(rows)
    result = whole(rows)
    ((result * weights).sum() + whole.last_auxiliary_loss).backward()
    loss = 0
    for member in range(3):
        single = layer_of(1, top_k=2, **options | {"num_experts": 2})
        own = slice(2 * member, 2 * member + 2)
        single.load_state_dict({name: value[own] for name, value in whole.state_dict().items()})
        of_member = single(x)
        torch.testing.assert_close(of_member, result[member::3], rtol=1e-12, atol=1e-12)
        ((of_member * weights[member::3]).sum() + single.last_auxiliary_loss / 3).backward()
        loss += single.last_auxiliary_loss / 3
        for name, parameter in single.named_parameters():
            gradient = whole.get_parameter(name).grad[own]
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole.last_auxiliary_loss, loss, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("ensemble", [2, 3, 6])
def test_members_never_share_an_expert(ensemble):
    layer = layer_of(ensemble, top_k=1, num_experts=12, batch_priority=True)
    routings = []
    layer.recorders = (lambda routing, shape: routings.append(routing),)
    layer(torch.randn(4 * ensemble, TOKENS, WIDTH, dtype=torch.float64))
    (routing,) = routings
    chosen_RN = routing.groups.merge(routing.chosen_GSK).view(-1, TOKENS)
    of_member = chosen_RN // (12 // ensemble)
    assert torch.equal(of_member, (torch.arange(4 * ensemble) % ensemble)[:, None].expand_as(of_member))


def test_an_ensemble_of_one_is_the_single_layer():
    single = MoeMlp(WIDTH, 16, moe=MoeConfig(capacity_factor=0.7))
    one = MoeMlp(WIDTH, 16, moe=MoeConfig(capacity_factor=0.7, ensemble=1))
    one.load_state_dict(single.state_dict())
    x, results = torch.randn(8, TOKENS, WIDTH), []
    for layer in (single, one):
        torch.manual_seed(1)
        results.append((layer(x), layer.last_auxiliary_loss))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_a_batch_that_is_no_whole_number_of_images_is_refused():
    with pytest.raises(ValueError, match=r"ensemble=2: .* was given 3 rows"):
        layer_of(2)(torch.randn(3, TOKENS, WIDTH, dtype=torch.float64))


def test_the_mean_prediction_is_of_probabilities():
    logits = torch.randn(6, 4)
    expected = logits.softmax(-1).view(3, 2, 4).mean(1)
    torch.testing.assert_close(mean_prediction(logits, 2).exp(), expected)
