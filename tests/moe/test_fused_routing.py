"""The fused backend's kernels for routing and order beside the formulas: on a GPU, else by Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmoe import MoeConfig
from vmoe.moe import assignment, losses
from vmoe.moe.groups import Groups
from vmoe.moe.routers import token_choice

pytest.importorskip("triton", reason="the fused backend needs Triton")

from vmoe.moe.kernels import counting
from vmoe.moe.kernels import routing as kernels
from vmoe.moe.kernels.counting import expert_rows
from vmoe.moe.kernels.experts.fused.row_kernels import rows_in_shares
from vmoe.moe.kernels.routing.order import order_in_groups

pytestmark = pytest.mark.usefixtures("uninitialised_memory_holds_nan")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 90),
    st.sampled_from([1, 3, 40]),
    st.integers(1, 3),
    st.floats(0, 3),
    st.booleans(),
)
def test_ranks_and_order_equal_the_sorts(groups, size, num_experts, top_k, skew, ordered):
    generator = torch.Generator().manual_seed(size)
    top_k = min(top_k, num_experts)
    logits = torch.randn(groups, size, num_experts, generator=generator) - skew * torch.arange(num_experts)
    chosen = logits.topk(top_k).indices
    chosen[:, size // 2 :: 3] = num_experts  # padding
    best = (torch.rand(groups, size, generator=generator) * 8).round()
    order = best.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(kernels.descending_order(best.to(DEVICE)).cpu(), order)
    order = order if ordered else None
    ranks = kernels.ranks(chosen.to(DEVICE), None if order is None else order.to(DEVICE), num_experts).cpu()
    is_real = chosen < num_experts
    assert torch.equal(ranks[is_real], assignment.rank_in_order(chosen, order, num_experts)[is_real])


def test_descending_order_of_nan_is_still_an_order():
    values = torch.tensor([[1.0, float("nan"), 3.0, float("inf"), float("nan"), -float("inf")]], device=DEVICE)
    assert kernels.descending_order(values).sort().values.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_rows_stand_together_and_start_at_multiples_of_128():
    chosen = torch.tensor([[0, 2], [2, 0], [2, 1], [0, 2]], device=DEVICE)
    kept = torch.tensor([[True, True], [True, False], [True, True], [True, True]], device=DEVICE)
    rows, starts, counts = expert_rows(chosen, kept, 4)
    same, choices, *_ = kernels.rows_as_needed(chosen, kept, 4)
    assert torch.equal(same, rows)
    used = {row: choice for choice, row in enumerate(rows.flatten().tolist()) if row >= 0}
    assert choices.tolist() == [used.get(row, -1) for row in range(choices.numel())]
    assert starts.tolist() == [0, 128, 256, 384]
    assert counts.tolist() == [2, 1, 4, 0]
    assert rows.tolist() == [[0, 256], [257, -1], [258, 128], [1, 259]]


@settings(max_examples=20, deadline=None)
@given(
    images=st.integers(1, 5),
    tokens=st.integers(1, 40),
    group=st.integers(1, 3),
    num_experts=st.sampled_from([1, 3, 40]),
    top_k=st.integers(1, 3),
    capacity=st.integers(1, 9),
    ordered=st.booleans(),
    max_blocks=st.sampled_from([0, 32]),
)
def test_places_in_shares_equal_the_assignment(
    images, tokens, group, num_experts, top_k, capacity, ordered, max_blocks
):
    """Of an incomplete last group too, which has a capacity of its own."""
    generator = torch.Generator().manual_seed(images * tokens)
    groups, top_k = Groups.of(images, tokens, group), min(top_k, num_experts)
    logits = groups.split(torch.randn(images * tokens, num_experts, generator=generator))
    last = max(1, capacity // 2)
    bounds = torch.tensor([capacity] * (groups.count - 1) + [last])
    valid = groups.valid(None, logits.device)
    routing = token_choice(logits, logits, groups, top_k, valid_GS=valid)
    routing = assignment.assign(routing, assignment.Capacity(capacity, bounds), ordered)
    merge = groups.merge
    chosen, kept, slots = merge(routing.chosen_GSK), merge(routing.kept_GSK), merge(routing.slots_GSK)
    share = groups.count * capacity + 5
    group_of = (torch.arange(images * tokens) // groups.size)[:, None]
    expected = torch.where(kept, chosen * share + group_of * capacity + slots, -1)
    order = None
    if ordered:
        best = merge(routing.gates_GSE).amax(-1).to(DEVICE)
        order = order_in_groups(best, groups.count, groups.size, groups.last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting, "MAX_BLOCKS", max_blocks)
        rows = kernels.place_in_shares(chosen.to(DEVICE), order, groups, num_experts, (capacity, last), share)
    assert torch.equal(rows.row_TK.cpu().long(), expected)
    inverse = torch.full((num_experts * share,), -1)
    inverse[expected[kept]] = torch.arange(chosen.numel()).view_as(chosen)[kept]
    assert torch.equal(rows.choice_R.cpu().long(), inverse)


def test_rows_in_shares_leave_each_group_its_slots():
    chosen = torch.tensor([[0, 2], [2, 0], [2, 1], [0, 2]], device=DEVICE)
    kept = torch.tensor([[True, True], [True, False], [True, True], [True, True]], device=DEVICE)
    slots = torch.tensor([[0, 1], [0, 5], [0, 0], [0, 1]], device=DEVICE)
    rows = rows_in_shares(chosen, kept, slots, 2, 3, 128)  # two groups of two tokens
    assert rows.tolist() == [[0, 257], [256, -1], [259, 131], [3, 260]]


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("groups", "size", "num_experts", "top_k"), [(2, 37, 5, 2), (1, 100, 8, 3), (3, 20, 40, 1)])
def test_gates_and_balance_equal_the_formulas(groups, size, num_experts, top_k, renormalize):
    generator = torch.Generator().manual_seed(0)
    logits, noise, cotangent_TE = (torch.randn(groups * size, num_experts, generator=generator) for _ in range(3))
    noise, cotangent_TK = noise / num_experts, torch.randn(groups * size, top_k, generator=generator)
    capacity = size * top_k // num_experts
    split = Groups(groups, size, size, size)
    moe = MoeConfig(num_experts=num_experts, top_k=top_k)

    logits.requires_grad_()
    clean, noisy = split.split(logits), split.split(logits + noise)
    routing = assignment.assign(token_choice(clean, noisy, split, top_k, renormalize), assignment.Capacity(capacity))
    each, usage = losses.losses_and_usage(routing, moe, is_noisy=True)
    objective = (split.merge(routing.weights_GSK) * cotangent_TK).sum() + 3 * each["importance"] + 2 * each["load"]
    objective = objective + (split.merge(routing.gates_GSE) * cotangent_TE).sum()
    (expected,) = torch.autograd.grad(objective, logits)

    ours = logits.detach().to(DEVICE).requires_grad_()
    gates, chosen, weights = kernels.gates(ours + noise.to(DEVICE), top_k, renormalize)
    noisy = (ours + noise.to(DEVICE)).view(groups, size, -1)
    chosen_GSK = chosen.view(groups, size, -1)
    importance, load, statistics, _ = kernels.balance(
        ours.view(groups, size, -1), noisy, chosen_GSK, capacity, moe.logit_noise
    )
    objective = (weights * cotangent_TK.to(DEVICE)).sum() + 3 * importance + 2 * load
    (gradient,) = torch.autograd.grad(objective + (gates * cotangent_TE.to(DEVICE)).sum(), ours)

    assert torch.equal(chosen.cpu(), split.merge(routing.chosen_GSK))
    torch.testing.assert_close(weights.cpu(), split.merge(routing.weights_GSK))
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack([importance, load]).cpu(), torch.stack([each["importance"], each["load"]]))
    expected = [usage.load, *(each[None] for each in (usage.dropped, usage.entropy, importance.cpu(), load.cpu()))]
    torch.testing.assert_close(statistics.cpu(), torch.cat(expected))


@pytest.mark.parametrize("num_experts", [3, 64])
def test_scores_and_their_gradients(num_experts):
    generator = torch.Generator().manual_seed(0)
    x, weight, cotangent = (
        torch.randn(shape, generator=generator) for shape in ((200, 72), (num_experts, 72), (200, num_experts))
    )
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = [exact[0] @ exact[1].t()]
    expected += torch.autograd.grad((expected[0] * cotangent).sum(), exact)
    ours = [x.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_()]
    values = [kernels.scores(*ours)]
    values += torch.autograd.grad((values[0] * cotangent.to(DEVICE)).sum(), ours)
    for value, truth in zip(values, expected, strict=True):
        assert (value.double().cpu() - truth).norm() < 2e-6 * truth.norm()

    logits, tokens = kernels.scores_and_tokens(*ours)
    grads = torch.autograd.grad((logits * cotangent.to(DEVICE)).sum() + (3 * tokens).sum(), ours)
    for value, truth in zip(grads, (expected[1] + 3, expected[2]), strict=True):
        assert (value.double().cpu() - truth).norm() < 2e-6 * truth.norm()
