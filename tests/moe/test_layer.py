"""`MoeMlp` against the oracle, and what must hold for every routing."""

import copy
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracle import oracle_layer
from timm.layers import Mlp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vmoe
from vmoe import MoeConfig, MoeMlp

WIDTH = 6


def layer_of(seed: int = 0, dtype=torch.float64, widths=(WIDTH, 10), **knobs) -> MoeMlp:
    torch.manual_seed(seed)
    layer = MoeMlp(*widths, moe=MoeConfig(**knobs), dtype=dtype)
    for parameter in layer.experts.parameters():  # larger than at the start, so that errors show
        nn.init.normal_(parameter, std=0.5)
    return layer


def tokens(images: int, count: int, seed: int = 1, dtype=torch.float64, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(images, count, width, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@st.composite
def knobs(draw) -> dict:
    num_experts = draw(st.sampled_from([1, 2, 3, 5, 8]))
    factors = st.sampled_from([None, 0.3, 0.7, 1.0, 1.05, 2.0])
    return {
        "num_experts": num_experts,
        "top_k": draw(st.integers(1, min(3, num_experts))),
        "capacity_factor": draw(factors),
        "eval_capacity_factor": draw(factors),
        "capacity_rounding": "ceil",
        "capacity_multiple_of": draw(st.sampled_from([1, 4])),
        "batch_priority": draw(st.booleans()),
        "group": draw(st.sampled_from(["image", "batch", 1, 2, 3])),
        "renormalize": draw(st.booleans()),
        "noise_std": 0.0,
    }


@settings(max_examples=80, deadline=None)
@given(knobs(), st.integers(1, 5), st.integers(1, 7), st.booleans(), st.integers(0, 9))
def test_equals_the_oracle(options, images, count, training, seed):
    layer = layer_of(seed, **options).train(training)
    x = tokens(images, count, seed)
    torch.testing.assert_close(layer(x), torch.from_numpy(oracle_layer(layer, x)), rtol=1e-9, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(knobs(), st.integers(1, 5), st.integers(1, 7), st.booleans(), st.data())
def test_equals_the_oracle_with_padding_anywhere(options, images, count, training, data):
    """Capacity is counted from a group's real tokens, also where an image or a whole group has none."""
    real = data.draw(st.lists(st.booleans(), min_size=images * count, max_size=images * count))
    layer, x = layer_of(**options).train(training), tokens(images, count)
    mask = torch.tensor(real).view(images, count)
    expected = torch.from_numpy(oracle_layer(layer, x, token_mask=mask))
    torch.testing.assert_close(layer(x, mask), expected, rtol=1e-9, atol=1e-11)


def test_noise_is_added_to_the_logits_in_training_only():
    layer = layer_of(num_experts=4, top_k=2, noise_std=2.0, capacity_factor=None).train()
    x = tokens(3, 5)
    torch.manual_seed(7)
    noisy = layer(x)
    torch.manual_seed(7)
    noise = torch.randn(15, 4, dtype=torch.float64) * 2.0 / 4
    torch.testing.assert_close(noisy, torch.from_numpy(oracle_layer(layer, x, noise)))
    layer.eval()
    torch.testing.assert_close(layer(x), torch.from_numpy(oracle_layer(layer, x)))


def test_one_expert_is_the_dense_mlp():
    layer = layer_of(num_experts=1, top_k=1)
    mlp = nn.Sequential(nn.Linear(WIDTH, 10), nn.GELU(), nn.Linear(10, WIDTH)).double()
    with torch.no_grad():
        for dense, stacked in ((mlp[0], layer.experts.fc1), (mlp[2], layer.experts.fc2)):
            dense.weight.copy_(stacked.weight[0])
            dense.bias.copy_(stacked.bias[0])
    torch.testing.assert_close(layer.eval()(tokens(2, 5)), mlp(tokens(2, 5)))


def test_all_experts_are_the_full_mixture():
    layer = layer_of(num_experts=3, top_k=3).eval()
    x = tokens(2, 4)
    gates = layer.router.gate(x).softmax(-1)
    experts = [
        nn.functional.gelu(x @ layer.experts.fc1.weight[e].T + layer.experts.fc1.bias[e])
        @ layer.experts.fc2.weight[e].T
        + layer.experts.fc2.bias[e]
        for e in range(3)
    ]
    torch.testing.assert_close(layer(x), sum(gates[..., e, None] * y for e, y in enumerate(experts)))


def test_prediction_is_independent_of_the_batch_when_nothing_is_dropped():
    layer = layer_of(num_experts=4, group="batch").eval()
    x = tokens(6, 5)
    torch.testing.assert_close(layer(x)[2:3], layer(x[2:3]))


@given(st.permutations(range(5)))
@settings(max_examples=20, deadline=None)
def test_permuting_tokens_permutes_results_when_nothing_is_dropped(order):
    layer = layer_of(num_experts=4).eval()
    x = tokens(2, 5)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_a_dropped_choice_contributes_zero():
    layer = layer_of(
        num_experts=2, top_k=1, capacity_factor=0.25, capacity_multiple_of=1, group="batch", noise_std=0.0
    ).train()
    with torch.no_grad():
        layer.router.gate.weight.zero_()  # equal gates: all tokens go to expert 0
    y = layer(tokens(1, 8))
    assert (y[0, 0] != 0).all()  # the capacity is 8 * 0.25 / 2 = 1
    assert (y[0, 1:] == 0).all()
    assert layer.statistics.dropped == pytest.approx(7 / 8)


def test_statistics():
    layer = layer_of(num_experts=4, top_k=2, noise_std=0.0).train()
    layer(tokens(3, 5))
    statistics = layer.statistics
    assert statistics.load.sum() == pytest.approx(1)
    assert 0 < statistics.entropy <= torch.log(torch.tensor(4.0))
    assert statistics.load_loss == 0 and statistics.importance_loss > 0
    assert not any(part.requires_grad for part in statistics)


def test_what_nobody_read_in_an_evaluation_is_of_its_last_pass_also_when_it_is_read_in_training():
    torch.manual_seed(0)
    layer = MoeMlp(16, 32, moe=MoeConfig(num_experts=4, top_k=2, z_loss_weight=0.1)).eval()
    first, second = torch.randn(2, 3, 10, 16)
    expected = []
    for x in (first, second):
        layer(x)  # with gradient all is computed at once
        expected.append((*layer.statistics, layer.last_auxiliary_loss.detach()))
    assert not torch.equal(expected[0][0], expected[1][0])
    with torch.inference_mode():
        layer(first)
        layer(second)
    layer.train()  # draws noise, but the pass drew none
    torch.testing.assert_close((*layer.statistics, layer.last_auxiliary_loss), expected[1], rtol=0, atol=0)
    assert vmoe.auxiliary_loss(layer.eval()) == expected[1][-1]
    with torch.no_grad():
        layer(first)
    assert copy.deepcopy(layer).statistics is None
    torch.testing.assert_close((*layer.statistics, layer.last_auxiliary_loss), expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_idle_experts_get_zero_gradients(training):
    layer = layer_of(num_experts=4, top_k=1, noise_std=0.0).train(training)
    with torch.no_grad():
        layer.router.gate.weight.zero_()
    layer(tokens(2, 3)).sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad[0].abs().sum() > 0
        assert (parameter.grad[1:] == 0).all()


@settings(max_examples=8, deadline=None)
@given(knobs(), st.integers(0, 5))
def test_gradients(options, seed):
    """Analytic gradients against finite differences, where no choice is about to flip."""
    layer = layer_of(seed, widths=(3, 4), **options).train()  # narrow: each number is moved to and fro
    x = tokens(2, 3, seed, width=3).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), eps=1e-6, atol=1e-6)


def test_every_leading_shape_and_channels_first():
    layer = layer_of(num_experts=4).eval()
    x = tokens(2, 12)
    flat = layer(x)
    torch.testing.assert_close(layer(x.view(2, 3, 4, WIDTH)).view(2, 12, WIDTH), flat)
    layer.use_conv = True
    torch.testing.assert_close(layer(x.view(2, 3, 4, WIDTH).movedim(-1, 1)).movedim(1, -1).reshape(2, 12, WIDTH), flat)


def test_an_empty_batch():
    layer = layer_of(num_experts=4).train()
    x = tokens(0, 5).requires_grad_()
    y = layer(x)
    (y.sum() + vmoe.auxiliary_loss(layer)).backward()
    assert y.shape == (0, 5, WIDTH)
    assert torch.isfinite(vmoe.auxiliary_loss(layer))


@settings(max_examples=30, deadline=None)
@given(knobs(), st.integers(0, 9))
def test_padding_takes_no_place_and_carries_no_loss(options, seed):
    """A batch with padding behind each image's tokens gives what the batch without it gives."""
    options["importance_loss_weight"] = options["gshard_loss_weight"] = options["z_loss_weight"] = 1.0
    layer = layer_of(seed, **options).train()
    x = tokens(4, 5, seed)
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[:, 5:] = False
    expected, expected_loss, usage = layer(x), vmoe.auxiliary_loss(layer), layer.statistics
    y = layer(torch.cat([x, tokens(4, 2, seed + 1)], 1), mask)
    torch.testing.assert_close(y[:, :5], expected)
    assert (y[:, 5:] == 0).all()
    torch.testing.assert_close(vmoe.auxiliary_loss(layer), expected_loss)
    torch.testing.assert_close(layer.statistics.load, usage.load)


def test_padding_leaves_the_places_to_real_tokens():
    layer = layer_of(num_experts=1, top_k=1, noise_std=0, capacity_factor=1.0, capacity_multiple_of=1, group=1).train()
    mask = torch.tensor([[False, False, True, True]])
    y = layer(tokens(1, 4), mask)
    assert (y[0, 2:] != 0).all() and (y[0, :2] == 0).all()


def test_router_stays_in_float32_under_autocast():
    layer = layer_of(dtype=torch.float32, num_experts=4)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.eval()(tokens(2, 3, dtype=torch.float32))
        routing, _ = layer.router(tokens(2, 3, dtype=torch.float32).view(6, -1), layer._groups(y))
    assert y.dtype == torch.bfloat16
    assert routing.gates_GSE.dtype == torch.float32


def test_experts_narrower_than_the_mlp():
    layer = MoeMlp(16, 64, moe=MoeConfig(num_experts=4, expert_width=0.5, shared_experts=1))
    assert layer.experts.fc1.weight.shape == (4, 32, 16) and layer.experts.fc2.weight.shape == (4, 16, 32)
    assert layer.shared.fc1.out_features == 32


@pytest.mark.parametrize("knobs", [{}, {"route": "image", "capacity_factor": None}], ids=["patches", "whole images"])
def test_a_layer_that_nobody_holds_is_freed_after_an_evaluation_at_once(knobs):
    """Not when Python next looks for cycles: its experts may take gigabytes."""
    layer = layer_of(num_experts=4, dtype=torch.float32, **knobs).eval()
    with torch.no_grad():
        layer(tokens(1, 3, dtype=torch.float32))
    held = weakref.ref(layer)
    del layer
    assert held() is None


def test_a_mask_may_have_the_tokens_of_an_image_in_a_row():
    layer = layer_of(num_experts=4, shared_experts=1).eval()
    x, mask = tokens(2, 6).view(2, 2, 3, WIDTH), torch.arange(12).view(2, 6) % 3 > 0
    assert torch.equal(layer(x, mask), layer(x, mask.view(2, 2, 3)))


def test_shared_experts_take_every_token():
    layer = layer_of(num_experts=4, top_k=1, shared_experts=2).eval()
    x = tokens(2, 3)
    routed = layer_of(num_experts=4, top_k=1).eval()
    routed.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("shared")})
    assert layer.shared.fc1.out_features == 2 * 10
    torch.testing.assert_close(layer(x), routed(x) + layer.shared(x))


def test_equal_and_different_starts():
    equal = MoeMlp(WIDTH, 10, moe=MoeConfig(experts_start="equal")).experts.fc1.weight
    different = MoeMlp(WIDTH, 10, moe=MoeConfig()).experts.fc1.weight
    assert (equal == equal[:1]).all() and equal.std() > 0
    assert (different[0] != different[1]).any()


def test_experts_start_equal_with_an_activation_that_was_learned():
    """What all experts share is no expert's: it stays as it is."""
    slopes = torch.linspace(0.1, 0.9, 10)
    mlp = Mlp(WIDTH, 10, act_layer=lambda: nn.PReLU(10))
    with torch.no_grad():
        mlp.act.weight.copy_(slopes)
    layer = MoeMlp.from_mlp(mlp, MoeConfig(num_experts=3, experts_start="equal"))
    assert torch.equal(layer.experts.act.weight, slopes)
    assert torch.equal(layer.experts.fc1.weight[2], layer.experts.fc1.weight[0])


def test_expert_dropout_acts_inside_the_hidden_layer():
    layer = MoeMlp(WIDTH, 10, drop=0.2, moe=MoeConfig(expert_dropout=0.5))
    assert layer.experts.drop1.p == 0.5
    assert layer.drop2.p == 0.2
    assert MoeMlp(WIDTH, 10, drop=0.2, moe=MoeConfig()).experts.drop1.p == 0.2


def test_a_layer_can_be_copied_after_a_forward_pass():
    layer = layer_of()
    layer(tokens(1, 4)).sum().backward()
    copied = copy.deepcopy(layer)
    torch.testing.assert_close(copied.eval()(tokens(1, 4)), layer.eval()(tokens(1, 4)))


def test_a_norm_that_is_no_layer_norm_is_refused():
    with pytest.raises(ValueError, match="BatchNorm1d"):
        MoeMlp(WIDTH, norm_layer=nn.BatchNorm1d, moe=MoeConfig())


def test_impossible_capacity_names_the_knob():
    layer = layer_of(num_experts=8, top_k=1, capacity_factor=0.1, capacity_rounding="round").train()
    with pytest.raises(ValueError, match=r"capacity_factor=0\.1"):
        layer(tokens(1, 4))


class _NoDoubles(TorchDispatchMode):
    """Refuses float64, which Apple's GPUs do not have."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for each in tree_leaves(results):
            assert not (isinstance(each, torch.Tensor) and each.dtype == torch.float64), function
        return results


@pytest.mark.parametrize("router", ["token_choice", "expert_choice", "soft", "sigmoid", "cosine", "hash"])
def test_nothing_on_the_device_is_in_double_precision(router):
    slots = {"capacity_factor": 1.0, "eval_capacity_factor": 1.0}
    fits = slots if router in ("soft", "expert_choice") else slots | {"top_k": 2, "batch_priority": router != "hash"}
    layer = MoeMlp(8, 16, moe=MoeConfig(num_experts=4, router=router, group="image", **fits), tokens=9, device="meta")
    x = torch.empty(2, 9, 8, device="meta", requires_grad=True)
    with _NoDoubles():
        (layer(x).sum() + layer.last_auxiliary_loss).backward()
        layer.eval()(x)
