"""The backend for the CPU against a plain loop over experts in float64, and the memory that its steps share."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import library, nn
from torch.utils.checkpoint import checkpoint

import vmoe
from vmoe import MoeConfig
from vmoe.moe.experts import Experts, ExpertSpec, choose_backend
from vmoe.moe.groups import Groups
from vmoe.moe.kernels import memory
from vmoe.moe.kernels.experts import cpu, segments
from vmoe.moe.kernels.interface import Choices
from vmoe.moe.mlps import Glu


@pytest.fixture(autouse=True)
def share_memory_of_any_size(monkeypatch):
    monkeypatch.setattr(memory, "SMALLEST", 1)


def random_choices(tokens, num_experts, top_k, skew, drop_rate, generator, dtype=torch.float64):
    """Distinct experts for each token; the later experts stay idle as the skew grows."""
    scores = torch.randn(tokens, num_experts, generator=generator) - skew * torch.arange(num_experts)
    chosen_TK = scores.topk(top_k).indices
    weights_TK = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64).to(dtype)
    kept_TK = torch.rand(tokens, top_k, generator=generator) >= drop_rate if drop_rate else None
    return Choices(chosen_TK, weights_TK.requires_grad_(), kept_TK, None, Groups.of(1, tokens, "batch"), None)


def random_experts(num_experts, widths, bias, generator, approximate="none", dtype=torch.float64):
    experts = Experts(num_experts, ExpertSpec(*widths, nn.GELU(approximate), bias=bias), dtype=torch.float64)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return experts.to(dtype)


def oracle(x_TD, choices, mlp):
    """One choice after the other."""
    y_TO = []
    for token in range(x_TD.shape[0]):
        total = x_TD.new_zeros(mlp.weight2.shape[1])
        for choice in range(choices.chosen_TK.shape[1]):
            if choices.kept_TK is not None and not choices.kept_TK[token, choice]:
                continue
            expert = choices.chosen_TK[token, choice]
            bias1, bias2 = (None if bias is None else bias[expert] for bias in (mlp.bias1, mlp.bias2))
            hidden = mlp.activation(F.linear(x_TD[token], mlp.weight1[expert], bias1))
            total = total + choices.weights_TK[token, choice] * F.linear(hidden, mlp.weight2[expert], bias2)
        y_TO.append(total)
    return torch.stack(y_TO)


def run(function, x, choices, experts, cotangent, dtype):
    x = x.detach().clone().requires_grad_()
    y = function(x, choices, experts._mlp(dtype))
    if not y.requires_grad:  # the oracle's, of nothing
        y = y + 0 * x.sum()
    learned = [x, choices.weights_TK, *experts.parameters()]
    return [y.detach(), *torch.autograd.grad(y, learned, cotangent.to(y.dtype), materialize_grads=True)]


def example(tokens=37, num_experts=4, top_k=2, widths=(8, 16, 12), dtype=torch.float32, skew=0.3, drop_rate=0.2):
    generator = torch.Generator().manual_seed(0)
    choices = random_choices(tokens, num_experts, top_k, skew, drop_rate, generator, dtype)
    experts = random_experts(num_experts, widths, (True, True), generator, dtype=dtype)
    x, cotangent = (torch.randn(tokens, width, generator=generator).to(dtype) for width in widths[::2])
    return x, choices, experts, cotangent


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 40),
    num_experts=st.sampled_from([1, 2, 5, 9]),
    top_k=st.integers(1, 4),
    skew=st.sampled_from([0.0, 0.5, 20.0]),
    drop_rate=st.sampled_from([0.0, 0.3, 1.0]),
    widths=st.sampled_from([(4, 6, 3), (8, 16, 8), (5, 1, 7)]),
    bias=st.tuples(st.booleans(), st.booleans()),
    approximate=st.sampled_from(["none", "tanh"]),
)
def test_outputs_and_gradients(tokens, num_experts, top_k, skew, drop_rate, widths, bias, approximate):
    generator = torch.Generator().manual_seed(tokens)
    choices = random_choices(tokens, num_experts, min(top_k, num_experts), skew, drop_rate, generator)
    experts = random_experts(num_experts, widths, bias, generator, approximate)
    x, cotangent = (torch.randn(tokens, width, generator=generator, dtype=torch.float64) for width in widths[::2])
    expected = run(oracle, x, choices, experts, cotangent, torch.float64)
    torch.testing.assert_close(run(cpu.expert_mlp, x, choices, experts, cotangent, torch.float64), expected)
    with torch.no_grad():
        y = cpu.expert_mlp(x, choices, experts._mlp(torch.float64))
    torch.testing.assert_close(y, expected[0])


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 2e-6),
        (torch.bfloat16, torch.float32, 1.5e-2),
        (torch.float16, torch.float32, 2e-3),
        (torch.bfloat16, torch.bfloat16, 1.5e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("keep_casts", [False, True])
def test_lower_precision(dtype, parameter_dtype, tolerance, keep_casts):
    x, choices, experts, cotangent = example(tokens=150, widths=(32, 64, 24), dtype=parameter_dtype)
    exact = copy.deepcopy(experts).double()
    weights = choices.weights_TK.detach().double().requires_grad_()
    expected = run(oracle, x.double(), choices._replace(weights_TK=weights), exact, cotangent.double(), torch.float64)
    experts.keep_casts(keep_casts)
    for value, truth in zip(run(cpu.expert_mlp, x, choices, experts, cotangent, dtype), expected, strict=True):
        assert (value.double() - truth).norm() <= tolerance * truth.norm()


@pytest.mark.parametrize("backend", ["cpu", "segments"])
def test_casts_that_inference_kept_serve_training(backend):
    torch.manual_seed(0)
    layer, x = vmoe.MoeMlp(8, 16, moe=MoeConfig(num_experts=2, noise_std=0.0, backend=backend)), torch.randn(2, 9, 8)

    def gradients():
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return torch.autograd.grad(y.float().sum(), list(layer.experts.parameters()))

    expected = gradients()
    layer.experts.keep_casts()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert all(map(torch.equal, gradients(), expected))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        copy.deepcopy(layer)(x)  # whose weights count no versions


def test_bitwise_repeatable_whatever_lies_in_memory():
    arguments = example(tokens=500, widths=(32, 64, 24))
    first = run(cpu.expert_mlp, *arguments, torch.float32)
    for _ in range(3):
        held = [memory.shared_memory().take(size, dtype=torch.float32) for size in (32 * 64 * 4, 24 * 64 * 4, 64000)]
        for tensor in held:
            tensor.fill_(torch.nan)
        del held, tensor
        assert all(map(torch.equal, run(cpu.expert_mlp, *arguments, torch.float32), first))


def test_graphs_that_wait_keep_what_they_need():
    """A layer used twice before the backward pass, a graph that is walked twice and gradients that are kept."""
    x, choices, experts, cotangent = example()
    expected = run(cpu.expert_mlp, x, choices, experts, cotangent, torch.float32)
    mlp, learned = experts._mlp(torch.float32), list(experts.parameters())
    x = x.requires_grad_()
    y, other = cpu.expert_mlp(x, choices, mlp), cpu.expert_mlp(x * 3, choices, mlp)
    for _ in range(2):
        grads = torch.autograd.grad(y, [x, choices.weights_TK, *learned], cotangent, retain_graph=True)
        torch.autograd.grad(other, learned, cotangent, retain_graph=True)
        assert all(map(torch.equal, [y, *grads], expected))


def test_second_derivatives():
    x, choices, experts, cotangent = example(tokens=9, dtype=torch.float64)
    results = []
    for function in (cpu.expert_mlp, oracle):
        learned = [x.requires_grad_(), choices.weights_TK, *experts.parameters()]
        y = function(x, choices, experts._mlp(torch.float64))
        grads = torch.autograd.grad(y, learned, cotangent, create_graph=True)
        results.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads) + y.sum(), learned))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "frozen", ["x", "combine", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc1", "fc", "only fc2.bias"]
)
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    x, choices, experts, cotangent = example()
    named = {"x": x.requires_grad_(), "combine": choices.weights_TK, **dict(experts.named_parameters())}
    cpu.expert_mlp(x, choices, experts._mlp(torch.float32)).backward(cotangent)
    expected = {name: tensor.grad for name, tensor in named.items()}
    for name, tensor in named.items():
        tensor.grad = None
        stays = name == "fc2.bias" if frozen.startswith("only") else not name.startswith(frozen)
        tensor.requires_grad_(stays)
    cpu.expert_mlp(x, choices, experts._mlp(torch.float32)).backward(cotangent)
    for name, tensor in named.items():
        if tensor.requires_grad:
            assert torch.equal(tensor.grad, expected[name]), name
        else:
            assert tensor.grad is None, name


def test_checkpointed_layer_gives_the_same():
    layer = vmoe.MoeMlp(8, 16, moe=MoeConfig(num_experts=4, noise_std=0.0, inject_auxiliary_loss=True))
    x = torch.randn(2, 9, 8)
    layer(x).square().sum().backward()
    expected = [parameter.grad for parameter in layer.parameters()]
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(layer.parameters(), expected, strict=True))


def test_deterministic_mode_and_an_empty_batch():
    layer = vmoe.MoeMlp(8, 16, moe=MoeConfig(num_experts=4))
    torch.use_deterministic_algorithms(True)
    try:
        layer(torch.randn(2, 9, 8)).sum().backward()
        layer.zero_grad()
        empty = layer(torch.randn(0, 9, 8, requires_grad=True))
        empty.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert empty.shape == (0, 9, 8)
    assert layer.experts.fc1.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("bias", [True, False])
def test_operator_passes_torchs_own_checks(bias):
    x, choices, experts, _ = example(tokens=6, dtype=torch.float64)
    layout = segments.segment_layout(choices, 4)
    mlp = experts._mlp(torch.float64)
    biases = (mlp.bias1, mlp.bias2) if bias else (None, None)
    parameters = mlp.weight1, biases[0], mlp.weight2, biases[1]
    arguments = (x.requires_grad_(), choices.weights_TK, *parameters, None, None, *layout, torch.float64, False, True)
    # not the check that compares all outputs: rows of dropped choices hold anything
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(torch.ops.vmoe.cpu_experts.default, arguments, test_utils=checks)


@pytest.mark.parametrize("capacity_factor", [0.5, pytest.param(None, marks=pytest.mark.slow)])
def test_compilation_gives_the_same(capacity_factor):
    moe = MoeConfig(num_experts=4, eval_capacity_factor=capacity_factor)
    layer, x = vmoe.MoeMlp(8, 16, moe=moe).eval(), torch.randn(3, 9, 8)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize(
    ("knobs", "backend"),
    [
        ({"activation": nn.GELU()}, cpu),
        ({"activation": nn.ReLU()}, segments),
        ({"activation": Glu(nn.GELU(), True)}, segments),
        ({"activation": nn.GELU(), "norm_layer": nn.LayerNorm}, segments),
        ({"activation": nn.GELU(), "dropout": 0.5}, segments),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_choice_of_the_backend(knobs, backend, device):
    experts = Experts(4, ExpertSpec(8, 16, 8, **knobs), device=device)
    x, backend = torch.empty(3, 8, device=device), segments if device == "meta" else backend
    choices = random_choices(3, 4, 2, 0, 0, torch.Generator())
    assert choose_backend(x, choices, experts._mlp(torch.float32)) is backend


def test_memory_is_taken_again_only_when_nothing_refers_to_it():
    kept = memory.Memory()
    first = kept.take(1000, dtype=torch.float32)
    address, view = first.data_ptr(), first.view(10, 100)[3]
    del first
    assert kept.take(1000, dtype=torch.float32).data_ptr() != address
    del view
    assert address in {tensor.data_ptr() for tensor in [kept.take(900, dtype=torch.float32) for _ in range(2)]}
    held = [kept.take(500, dtype=torch.bfloat16) for _ in range(3)]
    assert len({tensor.data_ptr() for tensor in held}) == 3


def test_memory_that_nobody_wants_is_given_back(monkeypatch):
    monkeypatch.setattr(memory, "MAX_IDLE", 5)
    kept = memory.Memory()
    kept.take(10**6, dtype=torch.uint8)
    for _ in range(10):
        kept.take(10**4, dtype=torch.uint8)
    assert kept.size < 10**6


def test_memory_goes_with_the_last_experts(monkeypatch):
    monkeypatch.setattr(memory, "_alive", weakref.WeakValueDictionary())
    experts = Experts(2, ExpertSpec(4, 8, 4, nn.GELU()))
    copied = copy.deepcopy(experts)
    assert copied._memory is experts._memory is memory.shared_memory()
    held = weakref.ref(experts._memory)
    del experts
    gc.collect()
    assert held() is copied._memory
    del copied
    gc.collect()
    assert held() is None
