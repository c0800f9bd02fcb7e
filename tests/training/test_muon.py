"""Muon: against torch's for a matrix, expert by expert for stacks, and what blocks and resumes it."""

import copy

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from vmoe.training.optim.muon import Muon, orthogonalise

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BETAS = (0.9, 0.99)


def parameters(device="cpu") -> dict[str, torch.nn.Parameter]:
    """Three matrices, of which two are alike, a stack of experts of that shape, and a bias."""
    torch.manual_seed(0)
    shapes = {"a": (8, 16), "b": (8, 16), "tall": (24, 8), "experts": (3, 8, 16), "bias": (8,)}
    return {name: torch.nn.Parameter(torch.randn(shape).to(device)) for name, shape in shapes.items()}


def muon(values: dict[str, torch.nn.Parameter], lr=0.02) -> Muon:
    matrices = {"params": [v for name, v in values.items() if name != "bias"], "method": "muon", "lr": lr}
    rest = {"params": [values["bias"]], "method": "adamw", "lr": 0.01}
    return Muon([matrices | {"weight_decay": 0.1}, rest | {"weight_decay": 0.0}], BETAS)


def set_gradients(values, step: int) -> None:
    for index, value in enumerate(values.values()):
        generator = torch.Generator().manual_seed(100 * step + index)
        value.grad = torch.randn(value.shape, generator=generator).to(value.device)


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)])
def test_the_iteration_is_torch_s_for_each_matrix(shape):
    matrices = torch.randn(4, *shape)
    ours = orthogonalise(matrices, torch.bfloat16)
    theirs = [_zeropower_via_newtonschulz(m, (3.4445, -4.7750, 2.0315), 5, 1e-7) for m in matrices]
    torch.testing.assert_close(ours, torch.stack(theirs), rtol=0.05, atol=0.02)  # three digits in bfloat16


def test_singular_values_come_near_1():
    values = torch.linalg.svdvals(orthogonalise(torch.randn(5, 24, 48), torch.float32))
    assert values.min() > 0.6 and values.max() < 1.25


def test_a_matrix_without_gradient_stays_finite():
    assert torch.equal(orthogonalise(torch.zeros(2, 4, 4), torch.float32), torch.zeros(2, 4, 4))


def test_updates_of_matrices_are_torch_s():
    """Ours computes in float32 on the CPU, torch's in bfloat16."""
    ours, theirs = parameters(), parameters()
    optimizer = muon(ours)
    matrices = [theirs[name] for name in ("a", "b", "tall")]
    reference = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    start = parameters()
    for name in ("a", "b", "tall"):
        moved, expected = ours[name] - start[name], theirs[name] - start[name]
        assert (moved - expected).norm() < 0.02 * expected.norm()


def test_the_rest_is_torch_s_adamw():
    ours, theirs = parameters(), parameters()
    optimizer, reference = muon(ours), torch.optim.AdamW([theirs["bias"]], lr=0.01, betas=BETAS, weight_decay=0)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours["bias"], theirs["bias"])


def test_experts_are_orthogonalised_one_by_one():
    values = parameters()
    alone = [torch.nn.Parameter(expert.detach().clone()) for expert in values["experts"]]
    optimizer = muon(values)
    others = Muon([{"params": alone, "method": "muon", "lr": 0.02, "weight_decay": 0.1}], BETAS)
    for step in range(3):
        set_gradients(values, step)
        for expert, gradient in zip(alone, values["experts"].grad, strict=True):
            expert.grad = gradient.clone()
        optimizer.step()
        others.step()
    torch.testing.assert_close(values["experts"].detach(), torch.stack([expert.detach() for expert in alone]))


@pytest.mark.parametrize("device", DEVICES)
def test_a_blocked_step_changes_neither_weights_nor_state(device):
    values = parameters(device)
    optimizer = muon(values)
    set_gradients(values, 0)
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()
    weights, state = copy.deepcopy(list(values.values())), copy.deepcopy(optimizer.state_dict()["state"])
    for value in values.values():
        value.grad = torch.full_like(value, float("nan"))
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    assert all(torch.equal(now, before) for now, before in zip(values.values(), weights, strict=True))
    for index, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][name]) for name, value in entries.items())


@pytest.mark.parametrize("device", DEVICES)
def test_its_state_goes_on_exactly(device):
    unbroken, resumed = parameters(device), parameters(device)
    first, second = muon(unbroken), muon(resumed)
    for step in range(2):
        for values, optimizer in ((unbroken, first), (resumed, second)):
            set_gradients(values, step)
            optimizer.step()
    third = muon(resumed)
    third.load_state_dict(second.state_dict())
    for values, optimizer in ((unbroken, first), (resumed, third)):
        set_gradients(values, 2)
        optimizer.step()
    assert all(torch.equal(value, resumed[name]) for name, value in unbroken.items())


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"not shape \(4,\)"):
        Muon([{"params": [torch.nn.Parameter(torch.ones(4))], "method": "muon", "lr": 0.1, "weight_decay": 0}], BETAS)


@pytest.mark.gpu
def test_a_step_on_a_gpu_does_not_wait():
    values = parameters("cuda")
    optimizer = muon(values)
    for step in range(2):  # the first makes the state
        set_gradients(values, step)
        optimizer.found_inf = torch.zeros((), device="cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
