"""The layer computes what the original JAX code computes: recorded cases, tolerance 1e-5."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vmoe.moe import MoeConfig, losses
from vmoe.moe.assignment import Capacity, assign, expert_capacity
from vmoe.moe.experts import Experts, ExpertSpec
from vmoe.moe.groups import Groups
from vmoe.moe.routers import token_choice
from vmoe.moe.routing import Routing
from vmoe.moe.scores import full_precision_linear

FIXTURES = Path(__file__).parent.parent / "fixtures"
RECORDED = np.load(FIXTURES / "vmoe_jax_routers.npz")
DESCRIPTION = json.loads((FIXTURES / "vmoe_jax_routers.json").read_text())
CASES = DESCRIPTION["cases"]
# bfloat16 routers and dispatchers are left out on purpose: here they stay float32
TOKEN_CHOICE = [name for name in CASES if name.startswith("top_experts/") and "bf16" not in name]
TIES = [name for name in CASES if name.startswith("dispatch_ties/k")]
LOSSES = [name for name in CASES if name.startswith("losses/")]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def recorded(name: str) -> torch.Tensor:
    return torch.from_numpy(RECORDED[name])


def has(name: str) -> bool:
    return name in RECORDED.files


def slot_masks(routing, num_experts: int) -> torch.Tensor:
    """(G, S, E, C) one-hot dispatch mask, the original's form of a routing."""
    num_groups, size, _ = routing.chosen_GSK.shape
    mask = torch.zeros(num_groups, size, num_experts, routing.capacity, dtype=torch.bool)
    for g, s, k in routing.kept_GSK.nonzero().tolist():
        mask[g, s, routing.chosen_GSK[g, s, k], routing.slots_GSK[g, s, k]] = True
    return mask


class Case:
    """One recorded token-choice case, run through our router, assignment, experts and losses."""

    def __init__(self, name: str) -> None:
        case, shared = CASES[name], f"shared/{CASES[name]['shared']}"
        self.name, self.case = name, case
        self.x = recorded(f"{shared}/inputs").requires_grad_()
        self.kernel = recorded(f"{shared}/router_kernel").requires_grad_()
        self.noise_scale = case["noise_scale"]
        num_groups, size, width = self.x.shape
        out_width = recorded(f"{shared}/expert_b").shape[-1]
        self.moe = MoeConfig(
            num_experts=case["num_experts"],
            top_k=case["num_selected_experts"],
            noise_std=case.get("noise_std", 1.0),
            importance_loss_weight=case.get("importance_loss_weight", 1.0),
            load_loss_weight=case.get("load_loss_weight", 1.0),
            gshard_loss_weight=case.get("gshard_loss_weight", 0.0),
        )
        groups = Groups(num_groups, size, size, size)
        logits = full_precision_linear(self.x.reshape(-1, width), self.kernel.t()).view(num_groups, size, -1)
        noisy = logits
        if self.noise_scale:
            noisy = logits + self.noise_scale * recorded(f"{name}/noise_unit_normal")
        dispatcher = case["dispatcher"]
        capacity = expert_capacity(
            size * self.moe.top_k, self.moe.num_experts, dispatcher["capacity_factor"], "ceil", 4
        )
        routing = token_choice(logits, noisy, groups, self.moe.top_k)
        self.routing = assign(routing, Capacity(capacity), dispatcher["batch_priority"])

        self.experts = Experts(
            self.moe.num_experts, ExpertSpec(width, out_width, out_width, torch.nn.Tanh(), bias=(True, False))
        )
        with torch.no_grad():  # the second layer is the identity: recorded experts have one layer
            self.experts.fc1.weight.copy_(recorded(f"{shared}/expert_A").transpose(1, 2))
            self.experts.fc1.bias.copy_(recorded(f"{shared}/expert_b"))
            self.experts.fc2.weight.copy_(torch.eye(out_width).expand(self.moe.num_experts, -1, -1))
        self.combined = self.experts(self.x.reshape(-1, width), self.routing).view(num_groups, size, out_width)
        self.losses = losses.auxiliary_losses(self.routing, self.moe, is_noisy=self.noise_scale > 0)
        self.auxiliary_loss = losses.weighted_sum(self.losses, self.moe)
        self.cotangent = recorded(f"{shared}/cotangent")


@pytest.mark.parametrize("name", TOKEN_CHOICE)
def test_token_choice(name):
    run = Case(name)
    assert run.routing.capacity == CASES[name]["capacity"]
    torch.testing.assert_close(run.routing.gates_GSE, recorded(f"{name}/gates"), **TOLERANCE)
    torch.testing.assert_close(run.combined, recorded(f"{name}/combined"), **TOLERANCE)
    if has(f"{name}/dispatch_weights"):
        assert torch.equal(slot_masks(run.routing, run.moe.num_experts), recorded(f"{name}/dispatch_weights").bool())
    if has(f"{name}/metrics/auxiliary_loss"):
        torch.testing.assert_close(run.auxiliary_loss, recorded(f"{name}/metrics/auxiliary_loss").mean(), **TOLERANCE)
    for loss, value in run.losses.items():
        if has(f"{name}/metrics/{loss}_loss"):
            torch.testing.assert_close(value, recorded(f"{name}/metrics/{loss}_loss").mean(), **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in TOKEN_CHOICE if has(f"{name}/grad/inputs")])
def test_token_choice_gradients(name):
    run = Case(name)
    ((run.combined * run.cotangent).sum() + run.auxiliary_loss).backward()
    fc1 = run.experts.fc1
    torch.testing.assert_close(run.x.grad, recorded(f"{name}/grad/inputs"), **TOLERANCE)
    torch.testing.assert_close(run.kernel.grad, recorded(f"{name}/grad/router/dense/kernel"), **TOLERANCE)
    torch.testing.assert_close(fc1.weight.grad.transpose(1, 2), recorded(f"{name}/grad/expert_A"), **TOLERANCE)
    torch.testing.assert_close(fc1.bias.grad, recorded(f"{name}/grad/expert_b"), **TOLERANCE)


@pytest.mark.parametrize("name", TIES)
def test_ties(name):
    """Slots among exactly equal gates; the recorded ones count on beyond the capacity."""
    case = CASES[name]
    expert_and_slot, weights = recorded(f"{name}/indices").long(), recorded(f"{name}/indices_combine_weights")
    chosen = expert_and_slot[..., 0].view(16, -1)
    gates = torch.zeros(16, 4).scatter(1, chosen, weights.view(16, -1))
    routing = Routing(Groups(1, 16, 16, 16), None, gates[None], gates[None], gates[None], chosen[None], weights[None])
    routing = assign(routing, Capacity(case["capacity"]), case["batch_priority"])
    assert torch.equal(routing.slots_GSK[0], expert_and_slot[..., 1].view(16, -1))
    assert torch.equal(slot_masks(routing, 4)[0], recorded(f"{name}/einsum_dispatch_weights").bool())


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients(name):
    case = CASES[name]
    logits = recorded(f"{name}/logits")[None].requires_grad_()
    noisy = recorded(f"{name}/logits_noisy")[None].requires_grad_()
    load = losses.load_loss(logits, noisy, case["num_selected_experts"], case["noise_std_absolute"]).sum()
    torch.testing.assert_close(load, recorded(f"{name}/load_loss"), **TOLERANCE)
    gradients = torch.autograd.grad(load, (logits, noisy))
    torch.testing.assert_close(gradients[0][0], recorded(f"{name}/load_loss_grad_logits_partial"), **TOLERANCE)
    torch.testing.assert_close(gradients[1][0], recorded(f"{name}/load_loss_grad_logits_noisy_partial"), **TOLERANCE)

    importance = losses.importance_loss(logits).sum()
    torch.testing.assert_close(importance, recorded(f"{name}/importance_loss_of_clean_softmax"), **TOLERANCE)
    (gradient,) = torch.autograd.grad(importance, logits)
    torch.testing.assert_close(gradient[0], recorded(f"{name}/importance_grad_logits"), **TOLERANCE)

    gshard = losses.gshard_loss(noisy.softmax(-1)).sum()
    torch.testing.assert_close(gshard, recorded(f"{name}/gshard_loss_of_noisy_softmax"), **TOLERANCE)


@pytest.mark.parametrize("row", DESCRIPTION["compute_capacity"]["rows"], ids=str)
def test_capacity(row):
    choices, num_experts, factor, rounding, multiple_of, expected = row
    arguments = (choices, num_experts, factor, rounding, multiple_of or 1)
    if expected == "ValueError":
        with pytest.raises(ValueError, match="capacity_factor"):
            expert_capacity(*arguments)
    else:
        assert expert_capacity(*arguments) == expected


# Of Tutel (1d56b9b): K * int(factor * ceil(tokens / E)), then up to a multiple
@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "factor", "multiple_of", "expected"),
    [(144, 1, 32, 1.25, 1, 6), (144, 1, 8, 1.25, 4, 24), (48, 1, 4, 1.25, 1, 15), (10, 2, 4, 1.5, 1, 8)],
)
def test_tutel_s_capacity(tokens, top_k, num_experts, factor, multiple_of, expected):
    moe = MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        eval_capacity_factor=factor,
        capacity_rounding="tutel",
        capacity_multiple_of=multiple_of,
        group="image",
    )
    padding = 7
    groups = Groups.of(2, tokens + padding, "image")
    valid_GS = torch.arange(tokens + padding).expand(2, -1) < tokens
    for exportable in (False, True):
        each_G = Capacity.of_pass(groups, valid_GS, moe, is_training=False, exportable=exportable).each_G
        assert each_G.tolist() == [expected, expected]
    assert Capacity.of_pass(Groups.of(2, tokens, "image"), None, moe, is_training=False).most == expected
