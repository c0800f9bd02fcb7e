"""Expert choice and Soft MoE: the recorded data of the original, and what must hold."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vmoe
from vmoe import MoeConfig, MoeMlp
from vmoe.moe.assignment import Capacity, CapacityError, expert_choice
from vmoe.moe.experts import Experts, ExpertSpec
from vmoe.moe.groups import Groups
from vmoe.moe.scores import full_precision_linear
from vmoe.moe.slot_routers import SoftRouter

FIXTURES = Path(__file__).parent.parent / "fixtures"
RECORDED = np.load(FIXTURES / "vmoe_jax_routers.npz")
CASES = json.loads((FIXTURES / "vmoe_jax_routers.json").read_text())["cases"]
EXPERT_CHOICE = [name for name in CASES if name.startswith("items_per_expert/")]
SOFT = [name for name in CASES if name.startswith("soft/")]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def recorded(name: str) -> torch.Tensor:
    return torch.from_numpy(RECORDED[name])


class Case:
    """Inputs and experts of a recorded case; the experts have one layer, so the second is the identity."""

    def __init__(self, name: str) -> None:
        self.case, shared = CASES[name], f"shared/{CASES[name]['shared']}"
        self.x = recorded(f"{shared}/inputs").requires_grad_()
        self.groups = Groups(*self.x.shape[:2], *[self.x.shape[1]] * 2)
        self.kernel = recorded(f"{shared}/router_kernel").requires_grad_()
        self.cotangent = recorded(f"{shared}/cotangent")
        width, out_width = self.x.shape[-1], self.cotangent.shape[-1]
        num_experts = self.case["num_experts"]
        self.experts = Experts(num_experts, ExpertSpec(width, out_width, out_width, nn.Tanh(), bias=(True, False)))
        with torch.no_grad():
            self.experts.fc1.weight.copy_(recorded(f"{shared}/expert_A").transpose(1, 2))
            self.experts.fc1.bias.copy_(recorded(f"{shared}/expert_b"))
            self.experts.fc2.weight.copy_(torch.eye(out_width).expand(num_experts, -1, -1))

    def run(self, routing) -> torch.Tensor:
        return self.experts(self.x.flatten(0, 1), routing).view_as(self.cotangent)

    def check_gradients(self, name: str, combined: torch.Tensor, router: dict[str, torch.Tensor]) -> None:
        (combined * self.cotangent).sum().backward()
        ours = {
            "inputs": self.x.grad,
            "expert_A": self.experts.fc1.weight.grad.transpose(1, 2),
            "expert_b": self.experts.fc1.bias.grad,
            **{path: parameter.grad for path, parameter in router.items()},
        }
        for path, gradient in ours.items():
            torch.testing.assert_close(gradient, recorded(f"{name}/grad/{path}"), **TOLERANCE)


@pytest.mark.parametrize("name", EXPERT_CHOICE)
def test_expert_choice(name):
    run = Case(name)
    logits = full_precision_linear(run.x, run.kernel.t())
    if run.case["noise_scale"]:
        logits = logits + run.case["noise_scale"] * recorded(f"{name}/noise_unit_normal")
    dispatcher = run.case["dispatcher"]
    moe = MoeConfig(
        router="expert_choice",
        num_experts=run.case["num_experts"],
        capacity_factor=dispatcher["capacity_factor"],
        capacity_rounding=dispatcher["capacity_ceil_or_round"],
        capacity_multiple_of=dispatcher["capacity_multiple_of"],
    )
    capacity = Capacity.of(run.groups, None, moe, moe.capacity_factor, "capacity_factor")
    assert capacity.most == run.case["capacity"]
    routing = expert_choice(logits.softmax(-1), run.groups, capacity)
    torch.testing.assert_close(routing.gates_GSE, recorded(f"{name}/gates"), **TOLERANCE)
    assert torch.equal(routing.dispatch_GSEC().bool(), recorded(f"{name}/dispatch_weights").bool())
    torch.testing.assert_close(routing.combine_GSEC(), recorded(f"{name}/combine_weights"), **TOLERANCE)
    combined = run.run(routing)
    torch.testing.assert_close(combined, recorded(f"{name}/combined"), **TOLERANCE)
    if f"{name}/grad/inputs" in RECORDED.files:
        run.check_gradients(name, combined, {"router/dense/kernel": run.kernel})


def test_expert_choice_serves_the_earlier_of_equal_tokens():
    gates = torch.tensor([[[0.5, 0.5], [0.5, 0.5], [0.75, 0.25], [0.25, 0.75]]])
    routing = expert_choice(gates, Groups(1, 4, 4, 4), Capacity(2))
    assert routing.chosen_GEC.tolist() == [[[2, 0], [3, 0]]]
    assert routing.dropped() == 0.25  # token 1


@pytest.mark.parametrize("name", SOFT)
def test_soft(name, monkeypatch):
    run = Case(name)
    size = run.groups.size
    slots = run.case["num_slots_actual"]
    moe = MoeConfig(
        router="soft",
        num_experts=run.case["num_experts"],
        capacity_factor=slots * run.case["num_experts"] / size,
        noise_std=run.case["noise_scale"],
    )
    router = SoftRouter(run.x.shape[-1], moe, size).train()
    with torch.no_grad():
        router.mu.copy_(recorded(f"{name}/mu"))
        router.scale.copy_(recorded(f"{name}/scale"))
    if moe.noise:
        draws = recorded(f"{name}/noise_unit_normal")
        monkeypatch.setattr(torch, "randn_like", lambda like: draws.reshape(like.shape))
    routing, _ = router(run.x.flatten(0, 1), run.groups, None)
    for part, values in (("dispatch", routing.dispatch_GSEC()), ("combine", routing.combine_GSEC())):
        if f"{name}/{part}_weights" in RECORDED.files:
            torch.testing.assert_close(values, recorded(f"{name}/{part}_weights"), **TOLERANCE)
    combined = run.run(routing)
    torch.testing.assert_close(combined, recorded(f"{name}/combined_without_bf16"), **TOLERANCE)
    if f"{name}/grad/inputs" in RECORDED.files:  # through the original's bfloat16, so only roughly
        (combined * run.cotangent).sum().backward()
        for ours, path in ((run.x.grad, "inputs"), (router.mu.grad, "router/mu"), (router.scale.grad, "router/scale")):
            theirs = recorded(f"{name}/grad/{path}")
            assert (ours - theirs).norm() < 0.02 * theirs.norm()


def layer_of(router: str, tokens: int = 6, **knobs) -> MoeMlp:
    torch.manual_seed(0)
    moe = MoeConfig(router=router, num_experts=3, capacity_factor=1.0, **knobs)
    layer = MoeMlp(4, 8, moe=moe, tokens=tokens, dtype=torch.float64)
    for parameter in layer.experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def tokens(images: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(images, count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
@pytest.mark.parametrize("training", [True, False])
def test_an_image_never_looks_at_other_images(router, training):
    layer = layer_of(router, noise_std=0.0).train(training)
    x = tokens(5, 6)
    torch.testing.assert_close(layer(x)[3:4], layer(x[3:4]))


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_gradients(router):
    layer = layer_of(router, noise_std=0.0).train()
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(run, (tokens(2, 6).requires_grad_(), *layer.parameters()), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_padding_changes_nothing(router, training):
    """Images of 6, 4, 2 and no tokens, filled up with others: each gives what it gives alone, forward and backward."""
    layer = layer_of(router, tokens=6, noise_std=0.0).train(training)
    sizes, padded = (6, 4, 2, 0), tokens(4, 16).requires_grad_()
    mask = torch.arange(16).expand(4, 16) < torch.tensor(sizes)[:, None]
    y = layer(padded, mask)
    used = layer.statistics
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    alone = [layer(image[None, :size]) for image, size in zip(padded, sizes, strict=True) if size]
    torch.testing.assert_close(y[mask], torch.cat([part[0] for part in alone]))
    learned = [padded, *layer.parameters()]
    gradients = torch.autograd.grad(y.square().sum(), learned)
    torch.testing.assert_close(gradients, torch.autograd.grad(sum(part.square().sum() for part in alone), learned))
    assert all(part.isfinite().all() for part in used)


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_a_batch_of_padding_alone_is_zero_and_drops_nothing(router):
    layer = layer_of(router, tokens=6).train()
    x = tokens(2, 6).requires_grad_()
    y = layer(x, torch.zeros(2, 6, dtype=torch.bool))
    gradients = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert (y == 0).all() and all((gradient == 0).all() for gradient in gradients)
    assert layer.statistics.dropped == 0 and layer.statistics.load.isfinite().all()


def test_slots_that_an_image_cannot_fill_are_empty():
    """A record of expert choice shows no padding in a slot, and no token beyond the capacity of the real ones."""
    gates = torch.rand(2, 6, 3).softmax(-1)
    mask = torch.tensor([[True] * 6, [True, False, True, False, False, True]])
    moe = MoeConfig(router="expert_choice", num_experts=3, capacity_factor=1.0)
    groups = Groups(2, 6, 6, 6)
    capacity = Capacity.of(groups, mask, moe, 1.0, "capacity_factor")
    dispatch = expert_choice(gates, groups, capacity, mask).dispatch_GSEC()
    assert dispatch.sum((1, 3)).tolist() == [[2.0] * 3, [1.0] * 3]  # tokens / experts
    assert (dispatch.sum((2, 3))[~mask] == 0).all()


def test_expert_choice_at_evaluation_takes_trainings_capacity_unless_told():
    layer = layer_of("expert_choice").eval()
    layer(tokens(2, 6))
    few = layer_of("expert_choice", eval_capacity_factor=0.5).eval()
    few(tokens(2, 6))
    assert few.statistics.dropped > layer.statistics.dropped


def test_more_slots_than_tokens_is_refused_in_expert_choice():
    layer = layer_of("expert_choice")
    layer.config = MoeConfig(router="expert_choice", num_experts=3, capacity_factor=4.0)
    with pytest.raises(ValueError, match=r"capacity_factor=4\.0"):
        layer(tokens(1, 6))


def test_a_capacity_that_cannot_be_is_told_under_the_name_that_set_it():
    def told(factor, training=False, **knobs):
        layer = layer_of("expert_choice", **knobs).train(training)
        if factor is not None:
            vmoe.set_eval_capacity_factor(layer, factor)
        with pytest.raises(CapacityError) as error:
            layer(tokens(1, 6))
        return str(error.value).partition(":")[0]

    assert told(100.0) == "eval_capacity_factor=100.0"  # more places than tokens
    assert told(0.01) == "eval_capacity_factor=0.01"  # no place
    assert told(None, eval_capacity_factor=0.01) == "eval_capacity_factor=0.01"
    small = {"capacity_multiple_of": 64}
    assert told(None, **small) == told(2.0, training=True, **small) == "capacity_factor=1.0"


def test_soft_needs_the_number_of_tokens():
    with pytest.raises(ValueError, match="tokens"):
        MoeMlp(4, moe=MoeConfig(router="soft"))


def test_soft_scale_is_where_the_learned_scale_starts():
    assert layer_of("soft", soft_scale=10.0).router.scale == 10.0


def test_statistics_are_fair():
    for router in ("expert_choice", "soft"):
        layer = layer_of(router).train()
        layer(tokens(2, 6))
        assert layer.statistics.load.sum() == pytest.approx(1)
        assert layer.last_auxiliary_loss == 0
