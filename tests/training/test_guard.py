"""The guard blocks a bad update on the device, without the host's help."""

import pytest
import torch

from vmoe.errors import UserError
from vmoe.training.guard import Guard

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_blocked_fused_update_changes_neither_weights_nor_state(device):
    weight = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = Guard()
    guard.to(torch.device(device))
    guard.block(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    after_one = weight.detach().clone()
    assert (after_one < 1).all()

    guard.bad_step.fill_(1)
    guard.block(optimizer)
    weight.grad = torch.full_like(weight, float("nan"))
    optimizer.step()
    assert torch.equal(weight, after_one)
    state = optimizer.state[weight]
    assert state["step"].item() == 1
    assert state["exp_avg"].isfinite().all() and state["exp_avg_sq"].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("with_scaler", [False, True])
def test_on_a_gpu_all_updates_from_the_first_bad_one_are_blocked_without_a_wait(with_scaler):
    weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0) if with_scaler else None
    guard = Guard()
    guard.to(torch.device("cuda"))
    optimizer.register_step_pre_hook(lambda optimizer, *_: guard.block(optimizer))

    def update(step, factor):
        loss = weight.sum() * factor
        guard.watch_forward(torch.ones(2, device="cuda"), loss)
        optimizer.zero_grad()
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        guard.check_update(optimizer, torch.nn.utils.clip_grad_norm_([weight], 1.0), step, scaler)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    update(0, torch.ones((), device="cuda"))
    before = weight.detach().clone()
    nan, one = torch.full((), float("nan"), device="cuda"), torch.ones((), device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(1, nan)
        update(2, one)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(weight, before)
    with pytest.raises(UserError, match="step 2:"):
        guard.raise_if_bad()


def test_an_overflow_that_the_loss_scale_can_cure_is_no_error():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    guard = Guard()
    guard.check_update(optimizer, torch.tensor(float("inf")), 0, scaler)
    with pytest.raises(UserError, match="step 1:"):
        guard.check_update(optimizer, torch.tensor(float("inf")), 0)
