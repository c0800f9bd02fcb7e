"""Interventions do what they say, on the same images, and leave no trace."""

import math

import numpy as np
import pytest
import torch

import vmoe
from vmoe.errors import UserError
from vmoe.explain.explorer.causes import _Trials, capacity, find_causes, random_routing, without
from vmoe.explain.explorer.measures import paired_change
from vmoe.explain.explorer.subject import Subject

TOKEN_ROUTERS = ("token_choice", "sigmoid", "cosine")


def subject_of(model):
    return Subject("", model, list("abcde"), (0.5,) * 3, (0.5,) * 3)


def recorded(model, images):
    with torch.no_grad(), vmoe.record_routing(model) as trace:
        logits = model(images)
    return logits, trace.layers["blocks.1.mlp"]


@pytest.mark.parametrize("router", TOKEN_ROUTERS)
def test_without_an_expert_the_next_best_is_chosen(make_model, make_batches, router):
    model = make_model(router, top_k=2)
    images = make_batches()[0][0]
    layer = model.blocks[1].mlp
    if router == "sigmoid":
        layer.router.bias += torch.tensor([0.3, 5.0, 0.0, -0.1])  # expert 1 would be chosen whatever its gate
    expected, plain = recorded(model, images)
    with without(layer, 1):
        _, routing = recorded(model, images)
    assert not (routing.chosen == 1).any() and (plain.chosen == 1).any()
    ranking = plain.gates + (layer.router.bias if router == "sigmoid" else 0)
    order = ranking.index_fill(-1, torch.tensor(1), -torch.inf).argsort(-1, descending=True)
    assert torch.equal(routing.chosen, order[..., :2])
    assert torch.equal(recorded(model, images)[0], expected)  # nothing stays behind


def test_without_an_expert_gates_are_the_softmax_of_the_others(make_model, make_batches):
    model = make_model()
    images = make_batches()[0][0]
    with without(model.blocks[1].mlp, 2):
        logits, routing = recorded(model, images)
    _, plain = recorded(model, images)
    others = torch.tensor([0, 1, 3])
    expected = plain.gates[..., others] / plain.gates[..., others].sum(-1, keepdim=True)
    torch.testing.assert_close(routing.gates[..., others], expected)
    assert not routing.gates[..., 2].any()
    # a router whose score for expert 2 is minus infinity, made by hand
    model.blocks[1].mlp.router.scores = _with_infinity(model.blocks[1].mlp.router.scores)
    torch.testing.assert_close(model(images), logits)


def _with_infinity(scores):
    def changed(x, kernels):
        result, tokens = scores(x, kernels)
        result[:, 2] = -torch.inf
        return result, tokens

    return changed


@pytest.mark.parametrize("router", TOKEN_ROUTERS)
@pytest.mark.parametrize("renormalize", [False, True])
def test_without_an_expert_all_others_are_chosen_once_where_a_token_takes_all(
    make_model, make_batches, router, renormalize
):
    model = make_model(router, top_k=4, renormalize=renormalize)
    images = make_batches()[0][0]
    _, plain = recorded(model, images)
    with without(model.blocks[1].mlp, 1):
        _, routing = recorded(model, images)
    everyone = torch.arange(4).expand(routing.chosen.shape)
    assert torch.equal(routing.chosen.sort(-1).values, everyone)
    weights = torch.zeros_like(routing.gates).scatter_add(-1, routing.chosen, routing.combine_weights)
    assert not weights[..., 1].any()
    expected = plain.gates.index_fill(-1, torch.tensor(1), 0)
    if router != "sigmoid" or renormalize:  # as shares of the others'
        expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, expected)


def test_an_expert_that_nobody_chooses_is_not_missed(make_model, make_batches):
    model = make_model(top_k=1)
    model.blocks[1].mlp.router.gate.weight.data[3] = 0
    model.blocks[1].mlp.router.gate.weight.data[:3] *= 100  # of three others one is always above zero, almost surely
    images = make_batches()[0][0]
    expected, routing = recorded(model, images)
    free = ~(routing.chosen == 3).any((1, 2))
    with without(model.blocks[1].mlp, 3):
        logits = model(images)
    torch.testing.assert_close(logits[free], expected[free])


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_without_an_expert_where_experts_have_slots(make_model, make_batches, router):
    model = make_model(router)
    images = make_batches()[0][0]
    with without(model.blocks[1].mlp, 1):
        _, routing = recorded(model, images)
    assert not routing.combine[:, :, 1].any() and routing.combine[:, :, 0].any()
    if router == "soft":
        torch.testing.assert_close(routing.combine.sum((2, 3)), torch.ones(routing.combine.shape[:2]))


@pytest.mark.parametrize("router", [*TOKEN_ROUTERS, "hash", "expert_choice", "soft"])
def test_random_routing_keeps_the_sizes_of_the_gates_and_forgets_the_expert(make_model, make_batches, router):
    model = make_model(router)
    images = torch.cat([images for images, _ in make_batches(200)])
    _, plain = recorded(model, images)
    with random_routing(model.blocks[1].mlp, torch.Generator().manual_seed(0)):
        _, routing = recorded(model, images)
    torch.testing.assert_close(routing.gates.sort(-1).values.sum(-1), plain.gates.sort(-1).values.sum(-1))
    if router == "soft":
        torch.testing.assert_close(routing.dispatch.sum(1), torch.ones_like(routing.dispatch.sum(1)))
        return
    torch.testing.assert_close(routing.gates.sort(-1).values, plain.gates.sort(-1).values)
    if router != "expert_choice":
        torch.testing.assert_close(routing.combine_weights, plain.combine_weights)
        assert torch.bincount(routing.chosen[..., 0].flatten()) / routing.chosen[..., 0].numel() == pytest.approx(
            np.full(4, 0.25), abs=0.03
        )
        assert (routing.chosen[..., 0] != routing.chosen[..., 1]).all()


def test_capacity_and_priority_are_set_and_restored(make_model, make_batches):
    model = make_model(eval_capacity_factor=None, group=1)
    images = make_batches()[0][0]
    with capacity(model, 0.5, True):
        config = model.blocks[1].mlp.config
        assert (config.eval_capacity_factor, config.batch_priority) == (0.5, True)
        _, routing = recorded(model, images)
    gates = routing.gates.amax(-1)
    dropped = routing.dropped[..., 0]
    assert gates[dropped].mean() < gates[~dropped].mean()
    config = model.blocks[1].mlp.config
    assert (config.eval_capacity_factor, config.batch_priority) == (None, False)


def test_changes_are_paired_on_the_same_images(make_model, make_batches):
    model, batches = make_model(), make_batches(80)
    found = find_causes(subject_of(model), batches, [0.5, 2.0], seed=0)
    assert found.images == 80 and list(found.ablation) == list(found.random_router) == ["blocks.1.mlp", "blocks.3.mlp"]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    base = model(images).argmax(-1) == labels
    with without(model.blocks[3].mlp, 2):
        now = model(images).argmax(-1) == labels
    entry = found.ablation["blocks.3.mlp"][2]
    expected = paired_change(int((now & ~base).sum()), int((base & ~now).sum()), 80)
    assert (entry["change"], entry["low"], entry["high"]) == expected and entry["expert"] == 2
    is_b = labels == 1
    assert entry["by_class"][1] == pytest.approx(float((now[is_b].double() - base[is_b].double()).mean()))
    assert [(part["factor"], part["priority"]) for part in found.capacity] == [
        (0.5, False), (0.5, True), (2.0, False), (2.0, True)
    ]  # fmt: skip
    assert found.capacity[0]["dropped"] > 0.2 > found.capacity[2]["dropped"]


def test_capacities_that_cannot_be_are_left_out(make_model, make_batches):
    found = find_causes(subject_of(make_model("expert_choice")), make_batches(16), [0.01, 1.0, 50.0], seed=0)
    assert [part["factor"] for part in found.capacity] == [1.0]
    rounded = make_model(capacity_rounding="round", group=1)
    found = find_causes(subject_of(rounded), make_batches(16), [0.01, 1.0], seed=0)
    assert {part["factor"] for part in found.capacity} == {1.0}
    one = make_model(num_experts=1, top_k=1)
    assert find_causes(subject_of(one), make_batches(16), [1.0], seed=0).ablation == {}


def test_a_capacity_that_only_the_smaller_last_batch_cannot_have_is_left_out(make_model, make_batches):
    model = make_model(capacity_rounding="round", group="batch")
    found = find_causes(subject_of(model), make_batches(17), [0.01, 1.0], seed=0)
    assert len(make_batches(17)[-1][0]) == 1 and found.images == 17
    assert {part["factor"] for part in found.capacity} == {1.0}
    assert list(found.ablation) == ["blocks.1.mlp", "blocks.3.mlp"]


def test_an_infinite_capacity_drops_nothing(make_model, make_batches):
    model, batches = make_model(eval_capacity_factor=0.3), make_batches(16)
    found = find_causes(subject_of(model), batches, [0.3, math.inf], seed=0)
    assert [part["factor"] for part in found.capacity] == [0.3, 0.3, None, None]
    assert found.capacity[0]["dropped"] > 0.2 and found.capacity[2]["dropped"] == found.capacity[3]["dropped"] == 0
    assert model.blocks[1].mlp.config.eval_capacity_factor == 0.3


@pytest.mark.parametrize(
    ("router", "factor", "reason"),
    [
        ("token_choice", 2000.0, "2000: must be > 0 and at most 1000, or inf to drop nothing"),
        ("expert_choice", math.inf, "inf: .*expert_choice"),
    ],
)
def test_a_capacity_that_cannot_be_set_is_refused(make_model, make_batches, router, factor, reason):
    model = make_model(router)
    with pytest.raises(UserError, match=f"capacity_factor={reason}"):
        find_causes(subject_of(model), make_batches(16), [1.0, factor], seed=0)
    assert model.blocks[1].mlp.config.eval_capacity_factor is None


def test_layers_weigh_by_their_choices_where_stages_see_fewer_tokens(make_swin, make_batches):
    model, batches = make_swin(), make_batches(8, (32, 32), 8)
    model.layers[1].blocks[1].mlp.router.gate.weight.data.zero_()  # expert 0 takes all of the stage of fewer tokens
    found = find_causes(subject_of(model), batches, [1.0], seed=0)
    with capacity(model, 1.0, False), torch.no_grad(), vmoe.record_routing(model) as trace:
        model(batches[0][0])
    dropped = torch.cat([layer.dropped.flatten() for layer in trace.layers.values()])
    assert found.capacity[0]["dropped"] == pytest.approx(float(dropped.double().mean()), abs=1e-6)


def counts_of(modules):
    """How often each module computes something from here on."""
    counts = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: counts.update({name: counts.get(name, 0) + 1}))
    return counts


def in_full(patched):
    """From here on every pass computes everything."""
    patched.setattr(_Trials, "_differs", lambda *_: True)


@pytest.mark.parametrize(
    "router",
    [
        "token_choice",
        "soft",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sigmoid", "cosine", "expert_choice")),
    ],
)
def test_what_stands_before_the_changed_layer_is_computed_once(make_model, make_batches, router, monkeypatch):
    model, batches = make_model(router), make_batches(16)
    with monkeypatch.context() as patched:
        in_full(patched)
        expected = find_causes(subject_of(model), batches, [0.5, 1.0], seed=0)
    counts = counts_of({"first": model.blocks[0].attn, "third": model.blocks[2].attn, "last": model.blocks[3].attn})
    assert find_causes(subject_of(model), batches, [0.5, 1.0], seed=0) == expected
    assert counts["first"] == 2  # a pass without an intervention, and one that counts choices
    assert counts["third"] == counts["last"] - 6  # four experts, the random router, and a pass to see that it is right
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_later_batches_compute_a_block_again_only_behind_a_changed_layer(make_model, make_batches, monkeypatch):
    model = make_model().double()
    batches = [(images.double(), labels) for images, labels in make_batches(48)]
    assert len(batches) == 3
    subject = subject_of(model)
    with monkeypatch.context() as patched:
        in_full(patched)
        expected = find_causes(subject, batches, [0.5, 1.0], seed=0)
    parts = {("attention", index): block.attn.qkv for index, block in enumerate(model.blocks)}
    counts = counts_of(parts | {("mlp", index): block.mlp for index, block in enumerate(model.blocks)})
    assert find_causes(subject, batches[:1], [0.5, 1.0], seed=0).images == 16
    of_first = dict(counts)
    counts.clear()
    assert find_causes(subject, batches, [0.5, 1.0], seed=0) == expected
    once, onwards = 1, 1  # the plain pass, and the part of one from the first MoE layer (block 1) to the next (block 3)
    changed_1, changed_3 = 4 + 1 + 4, 4 + 1  # without each expert, by random routing, and at four capacities
    assert {part: (count - of_first[part]) / 2 for part, count in counts.items()} == {
        ("attention", 0): once,
        ("mlp", 0): once,
        ("attention", 1): once,
        ("mlp", 1): once + onwards + changed_1,
        ("attention", 2): once + onwards + changed_1,
        ("mlp", 2): once + onwards + changed_1,
        ("attention", 3): once + onwards + changed_1,
        ("mlp", 3): once + changed_1 + changed_3,
    }


class Unusual(torch.nn.Module):
    """Changes in place what a module gave, and goes past modules."""

    def __init__(self, body):
        super().__init__()
        self.body, self.same = body, torch.nn.Identity()

    def forward(self, images):
        x = self.body.patch_embed(images)
        before = x
        x = self.same(x)
        x += 1  # also of `before`
        x = torch.cat([self.body.cls_token.expand(len(x), -1, -1), x], 1) + self.body.pos_embed
        outputs = []
        for block in self.body.blocks:
            x = block(x)
            outputs.append(x)
        return self.body.head(self.body.norm(x + 0.5 * outputs[0] + 0.1 * before.square().mean(1, keepdim=True))[:, 0])


def test_a_model_that_does_not_come_out_the_same_again_is_run_in_full(make_model, make_batches, monkeypatch):
    model, batches = Unusual(make_model()).eval(), make_batches(16)
    counts = counts_of({"first": model.body.blocks[0].attn})
    found = find_causes(subject_of(model), batches, [0.5, 1.0], seed=0)
    assert counts["first"] > 14
    in_full(monkeypatch)
    assert find_causes(subject_of(model), batches, [0.5, 1.0], seed=0) == found


def test_outputs_of_blocks_that_a_loop_keeps_are_given_again(make_model, make_batches, monkeypatch):
    model, batches = Unusual(make_model()).eval(), make_batches(16)
    model.same = torch.nn.Softplus()  # gives a tensor of its own
    counts = counts_of({"first": model.body.blocks[0].attn})
    found = find_causes(subject_of(model), batches, [0.5, 1.0], seed=0)
    assert counts["first"] < 10
    in_full(monkeypatch)
    assert find_causes(subject_of(model), batches, [0.5, 1.0], seed=0) == found
