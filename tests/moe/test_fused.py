"""The fused backend against a float64 oracle: on a GPU, else through Triton's interpreter."""

import copy
import gc
import importlib
import inspect
import weakref
from itertools import accumulate

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import library, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import vmoe
from vmoe import MoeConfig
from vmoe.moe import layer as layer_module
from vmoe.moe.assignment import Capacity, assign
from vmoe.moe.groups import Groups
from vmoe.moe.kernels import PLAIN, TRITON, Kernels
from vmoe.moe.kernels.experts import composed, padded, requirements, segments
from vmoe.moe.kernels.interface import Choices, Mlp
from vmoe.moe.mlps import Glu
from vmoe.moe.routers import token_choice

pytest.importorskip("triton", reason="the fused backend needs Triton")

from vmoe.moe.kernels import routing as routing_kernels
from vmoe.moe.kernels.counting import expert_rows
from vmoe.moe.kernels.experts import fused
from vmoe.moe.kernels.experts.fused import mlp as fused_mlp
from vmoe.moe.kernels.experts.fused import shares

pytestmark = pytest.mark.usefixtures("uninitialised_memory_holds_nan")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes a second per example, and more for wide layers.
EXAMPLES = 80 if DEVICE == "cuda" else 6
WIDTHS = [(8, 16, 8), (16, 48, 24), *([(72, 136, 72)] if DEVICE == "cuda" else [])]
# numpy, and so the interpreter, has no bfloat16
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, **({torch.bfloat16: 1.5e-2} if DEVICE == "cuda" else {})}
ACTIVATIONS = [
    nn.GELU(), nn.GELU("tanh"), nn.SiLU(), Glu(nn.SiLU(), gate_first=True), Glu(nn.GELU(), gate_first=False)
]  # fmt: skip


def skewed_routing(
    images, tokens, group, num_experts, top_k, skew, generator, capacity=None, priority=False, padding=False
):
    """Random logits with ties; experts beyond the first ones stay idle as the skew grows.

    With `padding` a third of the tokens is no token, and each group has a capacity of its own.
    """
    groups = Groups.of(images, tokens, group)
    logits = torch.randn(images * tokens, num_experts, generator=generator, dtype=torch.float64)
    logits = (logits * 4).round() / 4 - skew * torch.arange(num_experts)
    split = groups.split(logits)
    mask = torch.rand(images * tokens, generator=generator) < 0.67 if padding else None
    valid_GS = groups.valid(mask, logits.device)
    routing = token_choice(split, split, groups, top_k, valid_GS=valid_GS)
    if capacity is None:
        return routing if valid_GS is None else routing._replace(kept_GSK=valid_GS[..., None].expand(-1, -1, top_k))
    each_G = torch.randint(capacity + 1, (groups.count,), generator=generator) if padding else None
    return assign(routing, Capacity(capacity, each_G), priority)


def outputs_and_gradients(
    backend, x, routing, parameters, cotangent, activation, device, parameter_dtype, dtype, recompute=False
):
    parameters = [p if p is None else p.to(device, parameter_dtype).requires_grad_() for p in parameters]
    x = x.to(device, parameter_dtype).requires_grad_()
    parts = Choices.of(routing)
    on_device = [part.to(device) if isinstance(part, torch.Tensor) else part for part in parts]
    choices = Choices(*on_device)
    weights = choices.weights_TK.to(torch.promote_types(parameter_dtype, torch.float32)).detach().requires_grad_()
    choices = choices._replace(weights_TK=weights)
    mlp = Mlp(*parameters, activation, None, 0.0, dtype, lambda weight: weight.detach().to(dtype), recompute=recompute)
    y = backend.expert_mlp(x, choices, mlp)
    learned = [x, weights, *(p for p in parameters if p is not None)]
    return [y, *torch.autograd.grad((y * cotangent.to(y)).sum(), learned)]


def check_against_oracle(
    x,
    routing,
    parameters,
    cotangent,
    activation,
    dtype,
    parameter_dtype=torch.float32,
    recompute=False,
    backend=fused,
):
    exact = outputs_and_gradients(
        segments, x, routing, parameters, cotangent, activation, "cpu", torch.float64, torch.float64
    )
    ours = outputs_and_gradients(
        backend, x, routing, parameters, cotangent, activation, DEVICE, parameter_dtype, dtype, recompute
    )
    for name, value, truth in zip(["y", "x", "weights", "p1", "p2", "p3", "p4"], ours, exact, strict=False):
        error = (value.double().cpu() - truth).norm()
        terms = cotangent.shape[1] if name == "weights" else 1
        size = truth.norm() + (truth.numel() * terms) ** 0.5  # sums of terms around 1 may cancel
        assert error <= TOLERANCE[dtype] * size, f"{name}: {error / size:.1e}"


def random_parameters(num_experts, width, hidden, out, bias, generator, gated=False):
    first = hidden * (1 + gated)
    shapes = ((num_experts, first, width), (num_experts, first), (num_experts, out, hidden), (num_experts, out))
    parameters = [torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5 for shape in shapes]
    return [p if bias or p.dim() == 3 else None for p in parameters]


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.integers(1, 4),
    tokens=st.integers(1, 40),
    group=st.integers(1, 3),
    num_experts=st.sampled_from([1, 2, 5]),
    top_k=st.sampled_from([1, 3]),
    capacity=st.sampled_from([None, 1, 4, 30]),
    priority=st.booleans(),
    skew=st.sampled_from([0.0, 0.5, 20.0]),
    widths=st.sampled_from(WIDTHS),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    recompute=st.booleans(),
    padding=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
)
@example(  # more rows and columns than a tile has
    images=4, tokens=40, group=3, num_experts=2, top_k=1, capacity=None, priority=True, skew=20.0, widths=(72, 136, 72),
    bias=True, activation=nn.GELU(), recompute=False, padding=False, dtype=torch.float32,
)  # fmt: skip
def test_outputs_and_gradients(
    images, tokens, group, num_experts, top_k, capacity, priority, skew, widths, bias, activation, recompute,
    padding, dtype,
):  # fmt: skip
    top_k = min(top_k, num_experts)
    generator = torch.Generator().manual_seed(images * 100 + tokens)
    routing = skewed_routing(images, tokens, group, num_experts, top_k, skew, generator, capacity, priority, padding)
    x, cotangent = (
        torch.randn(images * tokens, width, generator=generator, dtype=torch.float64) for width in widths[::2]
    )
    parameters = random_parameters(num_experts, *widths, bias, generator, isinstance(activation, Glu))
    check_against_oracle(x, routing, parameters, cotangent, activation, dtype, recompute=recompute)


class Elsewhere:
    """Rows leave for experts that know nothing of tokens, and return."""

    @staticmethod
    def expert_mlp(x_TD, choices, mlp):
        x_RD, share_rows = fused.dispatch_by_capacity(x_TD, choices, len(mlp.weight1), mlp.dtype)
        y_RD = composed.two_layers(x_RD, mlp, None, padded.padded_linear)
        return fused.combine_by_capacity(y_RD, choices, share_rows)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.integers(1, 4),
    tokens=st.integers(1, 40),
    group=st.integers(1, 3),
    num_experts=st.sampled_from([1, 2, 5, 9]),
    top_k=st.sampled_from([1, 3]),
    capacity=st.sampled_from([1, 4, 30]),
    skew=st.sampled_from([0.0, 0.5, 20.0]),
    widths=st.sampled_from([(8, 16, 8), (72, 136, 40)]),
    bias=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_rows_of_experts_elsewhere(images, tokens, group, num_experts, top_k, capacity, skew, widths, bias, dtype):
    top_k = min(top_k, num_experts)
    generator = torch.Generator().manual_seed(images * 100 + tokens)
    routing = skewed_routing(images, tokens, group, num_experts, top_k, skew, generator, capacity)
    x, cotangent = (
        torch.randn(images * tokens, width, generator=generator, dtype=torch.float64) for width in widths[::2]
    )
    parameters = random_parameters(num_experts, *widths, bias, generator)
    check_against_oracle(x, routing, parameters, cotangent, nn.GELU(), dtype, backend=Elsewhere)


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [None, 320])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("widths", [(192, 768, 192), (200, 328, 136)])
@pytest.mark.parametrize("activation", [nn.GELU(), Glu(nn.SiLU(), gate_first=True)], ids=["gelu", "swiglu"])
def test_tiles_of_many_rows(capacity, dtype, widths, activation, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    routing = skewed_routing(24, 100, 8, 7, 2, 0.2, generator, capacity, priority=True)
    x, cotangent = (torch.randn(2400, width, generator=generator, dtype=torch.float64) for width in widths[::2])
    parameters = random_parameters(7, *widths, True, generator, isinstance(activation, Glu))
    check_against_oracle(x, routing, parameters, cotangent, activation, dtype)
    monkeypatch.setattr(fused_mlp, "CHUNK_BYTES", 2**20)
    check_against_oracle(x, routing, parameters, cotangent, activation, dtype, parameter_dtype=dtype, recompute=True)


def test_operators_pass_torchs_own_checks():
    def random(*shape):
        return torch.randn(shape, device=DEVICE, requires_grad=True)

    chosen = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [1, 0]], device=DEVICE)
    rows, starts, counts = expert_rows(chosen, None, 3)
    _, choice_of_row = shares.scatter_shares(random(5, 8), rows, 512, torch.float32)
    parameters = random(3, 16, 8), random(3, 16), random(3, 8, 16), random(3, 8)
    casts = parameters[0].detach(), parameters[2].detach()
    # not the check that compiles and compares all outputs: it takes long, and what fused_experts keeps for the backward
    # pass has rows that nothing writes or reads
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for operator, arguments in (
        ("scores", (random(6, 8), random(4, 8))),
        ("scores_backward", (random(6, 4).detach(), random(8, 6).detach().t(), random(8, 4).detach().t(), None)),
        ("gates", (random(6, 4), 2, True)),
        ("balance", (random(1, 5, 3), random(1, 5, 3), chosen[None], 2, 0.3)),
        ("ranks", (chosen[None], None, 3)),
        ("descending_order", (random(2, 5).detach(),)),
        ("expert_rows", (chosen, chosen > 0, 3)),
        ("rows_in_shares", (chosen, chosen > 0, chosen, 5, 3, 128)),
        ("scatter", (random(5, 8), rows, 512, torch.float16)),
        ("gather_sum", (random(512, 8).detach(), rows, torch.float16)),
        ("combine", (random(512, 8), rows, choice_of_row, chosen, random(5, 2), 4, 128)),
        (
            "combine_gradient",
            (random(5, 8).detach(), random(512, 8).detach(), choice_of_row, random(5, 2).detach(), 4, 128),
        ),
    ):
        library.opcheck(getattr(torch.ops.vmoe, operator).default, arguments, test_utils=checks)
    arguments = (
        random(5, 8),
        rows,
        chosen,
        random(5, 2),
        starts,
        counts,
        *parameters,
        *casts,
        0,
        "gelu",
        "",
        True,
        False,
    )
    library.opcheck(torch.ops.vmoe.fused_experts.default, arguments, test_utils=checks)


def test_second_derivatives_are_refused():
    x, weight = (torch.randn(6, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    (slope,) = torch.autograd.grad(routing_kernels.scores(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives; compute them on the CPU"):
        slope.square().sum().backward()


@pytest.mark.parametrize(
    ("knobs", "lacks", "misfit"),
    [
        ({"act_layer": nn.ReLU}, "ReLU", None),
        ({"drop": 0.5}, "dropout", None),
        ({"norm_layer": nn.LayerNorm}, "norm", None),
        ({"hidden_features": 30}, None, "hidden_features=30"),
        ({"act_layer": nn.SiLU}, None, None),
        ({}, None, None),
    ],
)
def test_says_what_it_cannot_take(knobs, lacks, misfit):
    layer = vmoe.MoeMlp(16, **{"hidden_features": 32, **knobs}, moe=MoeConfig())
    mlp = layer.experts._mlp(torch.bfloat16)
    assert (lacks or "None") in str(requirements.missing_feature(mlp))
    assert (misfit or "None") in str(requirements.unsupported_width(mlp))


@pytest.mark.parametrize(("num_experts", "chunk", "recompute"), [(3, 1, True), (4, 2**12, False), (3, 2**14, True)])
def test_parts_of_the_hidden_layer_change_nothing(monkeypatch, num_experts, chunk, recompute):
    monkeypatch.setattr(fused_mlp, "CHUNK_BYTES", chunk)
    generator = torch.Generator().manual_seed(0)
    routing = skewed_routing(4, 20, 2, num_experts, 2, 0.3, generator, 30)
    x, cotangent = (torch.randn(80, width, generator=generator, dtype=torch.float64) for width in (8, 8))
    parameters = random_parameters(num_experts, 8, 16, 8, True, generator)
    check_against_oracle(x, routing, parameters, cotangent, nn.GELU(), torch.float32, recompute=recompute)


@pytest.mark.filterwarnings("ignore:backend=.fused.:UserWarning")  # the float64 layer has it computed elsewhere
@pytest.mark.parametrize(
    ("knobs", "is_compiled"),
    [
        ({"batch_priority": True, "shared_experts": 1}, False),
        pytest.param({"batch_priority": True, "shared_experts": 1}, True, marks=pytest.mark.slow),
        # one node of autograd's graph; of three images in groups of two the last group has one
        ({"batch_priority": True, "group": "image"}, False),
        ({"group": 3, "renormalize": True, "noise_std": 0.0}, False),
        ({"capacity_factor": 8.0, "batch_priority": True, "recompute_activation": True}, False),
        ({"group": 3, "capacity_factor": None, "top_k": 1, "inject_auxiliary_loss": True}, False),
        ({"capacity_factor": None, "top_k": 1}, False),
        # the steps one by one
        ({"gshard_loss_weight": 0.1, "batch_priority": True}, False),
        ({"gshard_loss_weight": 0.1, "capacity_factor": None, "top_k": 1}, False),
        ({"router": "cosine"}, False),
        ({"router": "sigmoid"}, False),
        ({"router": "expert_choice", "group": "image"}, False),
        ({"route": "image", "capacity_factor": None}, False),
    ],
    ids=[
        "priority",
        "priority, compiled",
        "images apart, priority",
        "no noise",
        "rows as needed",
        "no capacity, injected",
        "no capacity",
        "in steps, priority",
        "in steps, no capacity",
        "cosine",
        "sigmoid",
        "expert choice",
        "whole images",
    ],
)
def test_the_whole_layer_by_kernels_is_the_plain_one(knobs, is_compiled, monkeypatch):
    """Results, losses, usage and all gradients, and then an evaluation, where the layer hands the kernels on."""
    monkeypatch.setattr(layer_module, "kernels_for", lambda tensor: TRITON if tensor.dtype == torch.float32 else PLAIN)
    torch.manual_seed(0)
    options = {"num_experts": 4, "group": 2, "backend": "fused", "importance_loss_weight": 1.0, **knobs}
    layer = vmoe.MoeMlp(8, 16, moe=MoeConfig(**options), device=DEVICE)
    x, noise, cotangent = torch.randn(3, 7, 8), torch.randn(21, 4), torch.randn(3, 7, 8)
    exact, drawn = copy.deepcopy(layer).double(), noise.clone()
    ours = torch.compile(layer, fullgraph=True, backend="eager") if is_compiled else layer
    results = []
    for each, forward in ((exact, exact), (layer, ours)):
        parameter = next(each.parameters())
        each.router.draw_noise = lambda logits: noise.to(logits).flatten()[: logits.numel()].view_as(logits)
        own = x.to(parameter).requires_grad_()
        y = forward(own)
        loss = (y * cotangent.to(y)).sum() + each.last_auxiliary_loss
        grads = torch.autograd.grad(loss, [own, *each.parameters()], materialize_grads=True)
        results.append([part.double().cpu() for part in (y, loss, *each.statistics, *grads)])
        with torch.inference_mode():
            each.eval()
            y = each(own)
            results[-1] += [part.double().cpu() for part in (y, each.last_auxiliary_loss, *each.statistics)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(noise, drawn)


def test_an_evaluation_keeps_nothing_large_until_its_losses_are_read(monkeypatch):
    """As the experts' weights in the compute type."""
    monkeypatch.setattr(layer_module, "kernels_for", lambda tensor: TRITON)
    moe = MoeConfig(num_experts=4, group="image", backend="fused")
    layer = vmoe.MoeMlp(24, 48, moe=moe, device=DEVICE).eval()
    casts = []
    monkeypatch.setattr(layer.experts, "_cast", lambda weight, dtype: casts.append(weight.clone()) or casts[-1])
    with torch.inference_mode():
        layer(torch.randn(2, 5, 24, device=DEVICE))
    kept = [weakref.ref(cast) for cast in casts]
    casts.clear()
    assert len(kept) == 2 and not any(cast() is not None for cast in kept)
    assert layer.last_auxiliary_loss > 0


@pytest.mark.gpu
@pytest.mark.parametrize("capacity_factor", [1.05, None])
def test_repeats_bit_for_bit(capacity_factor):
    torch.manual_seed(0)
    moe = MoeConfig(num_experts=8, capacity_factor=capacity_factor, batch_priority=True, noise_std=0.0)
    layer = vmoe.MoeMlp(128, 256, moe=moe, device="cuda")
    x = torch.randn(16, 197, 128, device="cuda")
    results = []
    for _ in range(3):
        layer.zero_grad()
        x_ = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x_)
        (y.float().square().sum() + vmoe.auxiliary_loss(layer)).backward()
        results.append([y, x_.grad, *(p.grad.clone() for p in layer.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.gpu
def test_layer_in_a_cuda_graph_follows_new_inputs_and_weights():
    torch.manual_seed(0)
    layer = vmoe.MoeMlp(128, 256, moe=MoeConfig(noise_std=0.0, batch_priority=True), device="cuda")
    x = torch.randn(16, 65, 128, device="cuda", requires_grad=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            y = layer(x)
        return y, torch.autograd.grad(y.float().sum() + vmoe.auxiliary_loss(layer), [x, *layer.parameters()])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        layer.experts.fc1.weight.mul_(1.5)
    graph.replay()
    captured = [captured[0].clone(), *(grad.clone() for grad in captured[1])]
    y, grads = step()
    for value, truth in zip(captured, [y, *grads], strict=True):
        assert torch.equal(value, truth)


@pytest.mark.gpu
@pytest.mark.slow
def test_compiled_layer_agrees():
    torch.manual_seed(0)
    layer = vmoe.MoeMlp(128, 256, moe=MoeConfig(noise_std=0.0, batch_priority=True), device="cuda")
    x = torch.randn(16, 65, 128, device="cuda", requires_grad=True)
    results = []
    for forward in (layer, torch.compile(layer, fullgraph=True)):
        with torch.autocast("cuda", torch.bfloat16):
            y = forward(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.experts.parameters()])])
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=2e-2)


ROOMS = (
    "counting", "experts.fused.activations", "experts.fused.products", "experts.fused.row_kernels", "routing.balance",
    "routing.decision", "routing.gates", "routing.order", "routing.scores",
)  # fmt: skip


def kernels():
    """Every Triton kernel of the backend, by room and name."""
    rooms = [importlib.import_module(f"vmoe.moe.kernels.{room}") for room in ROOMS]
    named = {f"{room.__name__}.{name}": value for room in rooms for name, value in vars(room).items()}
    return {name: each for name, each in named.items() if isinstance(getattr(each, "pre_run_hooks", None), list)}


def variants(kernel, found):
    """Keeps in `found` what Triton compiles a variant for: arguments' types, constants, and which integers are even."""
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {name for name, kind in inspect.get_annotations(kernel.fn).items() if "constexpr" in str(kind)}
    free = {parameter.name for parameter in getattr(kernel, "params", ()) if parameter.do_not_specialize}
    free |= set(getattr(kernel, "kwargs", {}).get("do_not_specialize") or ())

    def kind(name, value):
        if isinstance(value, torch.Tensor):
            return value.dtype
        if name in constants or value is None or not isinstance(value, int):
            return value if name in constants or value is None else type(value)
        return None if name in free else (value == 1, value % 16 == 0)

    def hook(*args, **named):
        given = dict(zip(names, args, strict=False)) | named
        found.add(tuple((name, kind(name, value)) for name, value in given.items() if name in names))

    return hook


def test_batches_of_another_size_compile_nothing_again(monkeypatch):
    monkeypatch.setattr(layer_module, "kernels_for", lambda tensor: TRITON)
    moe = MoeConfig(num_experts=4, top_k=2, group=1, backend="fused", batch_priority=True)
    layer = vmoe.MoeMlp(16, 16, moe=moe, device=DEVICE)
    found = {name: set() for name in kernels()}
    for name, kernel in kernels().items():
        kernel.add_pre_run_hook(variants(kernel, found[name]))
    seen = []
    try:
        for images in (4, 3):
            generator = torch.Generator().manual_seed(0)
            parameters = random_parameters(4, 16, 16, 16, True, generator)
            x, weight = torch.randn(images * 4, 16, device=DEVICE), torch.randn(4, 16, device=DEVICE)
            for capacity in (None, 3):
                routing = skewed_routing(images, 4, 1, 4, 2, 0.0, generator, capacity, priority=True)
                outputs_and_gradients(
                    fused, x, routing, parameters, torch.ones_like(x), nn.GELU(), DEVICE, torch.float32, torch.float32
                )
            logits, tokens = routing_kernels.scores_and_tokens(x.requires_grad_(), weight.requires_grad_())
            _, chosen, weights = routing_kernels.gates(logits, 2, False)
            split = [each.view(images, 4, -1) for each in (logits, logits, chosen)]
            importance, load, *_ = routing_kernels.balance(*split, 2, 0.1)
            (weights.sum() + importance + load + tokens.sum()).backward()
            routing_kernels.ranks(split[2], None, 4)
            layer(x.detach().requires_grad_().view(images, 4, 16)).sum().backward()
            seen.append({name: set(each) for name, each in found.items()})
    finally:
        for kernel in kernels().values():
            kernel.pre_run_hooks.pop()
    assert sum(map(bool, seen[0].values())) > 15
    assert seen[0] == seen[1]


def test_routing_is_one_node_of_autograds_graph(monkeypatch):
    """In an eager training step. Each of its results may be left out of the objective."""
    monkeypatch.setattr(layer_module, "kernels_for", lambda tensor: TRITON)
    layer = vmoe.MoeMlp(8, 16, moe=MoeConfig(num_experts=4, group="image", backend="fused"), device=DEVICE)
    x = torch.randn(2, 5, 8, device=DEVICE, requires_grad=True)
    y, weight = layer(x), layer.router.gate.weight
    node = layer.last_auxiliary_loss.grad_fn
    assert "OneNode" in type(node).__name__
    assert node.next_functions[1][0].variable is weight  # right behind it: the parameter
    by_loss, by_both, by_result = (
        torch.autograd.grad(objective, [x, weight], retain_graph=True, allow_unused=True)
        for objective in (layer.last_auxiliary_loss, layer.last_auxiliary_loss + y.sum(), y.sum())
    )
    for loss_alone, both, result_alone in zip(by_loss, by_both, by_result, strict=True):
        torch.testing.assert_close(loss_alone + result_alone, both)
    (gradient,) = torch.autograd.grad(layer.last_auxiliary_loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_one_node_refuses_second_derivatives_with_a_frozen_router_too(monkeypatch):
    monkeypatch.setattr(layer_module, "kernels_for", lambda tensor: TRITON)
    layer = vmoe.MoeMlp(8, 16, moe=MoeConfig(num_experts=4, group="image", backend="fused"), device=DEVICE)
    layer.router.requires_grad_(False)
    weight = layer.experts.fc1.weight
    (gradient,) = torch.autograd.grad(layer(torch.randn(2, 5, 8, device=DEVICE)).sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        (gradient.square().sum() + weight.sum()).backward()


@pytest.mark.parametrize("kernels", [Kernels(None, TRITON.experts), TRITON], ids=["experts alone", "one node"])
@pytest.mark.parametrize("capacity_factor", [None, 1.05])
def test_parameters_may_have_any_strides(capacity_factor, kernels, monkeypatch):
    """As parametrizations make them, and `load_state_dict(assign=True)`."""
    monkeypatch.setattr(layer_module, "kernels_for", lambda tensor: kernels)
    moe = MoeConfig(num_experts=4, group="image", backend="fused", capacity_factor=capacity_factor, noise_std=0.0)
    layer = vmoe.MoeMlp(8, 16, moe=moe, device=DEVICE)
    x, cotangent = torch.randn(2, 2, 9, 8, device=DEVICE)
    results = []
    for _ in range(2):
        y = layer(x)
        results.append([y, *torch.autograd.grad((y * cotangent).sum(), list(layer.parameters()))])
        for parameter in layer.parameters():
            parameter.data = parameter.mT.clone(memory_format=torch.contiguous_format).mT
    torch.testing.assert_close(results[1], results[0])


class Doubled(nn.Module):
    """A parametrization that remembers what it made, as long as that lives."""

    def __init__(self):
        super().__init__()
        self.made = []

    def forward(self, weight):
        result = 2 * weight
        self.made.append(weakref.ref(result))
        return result


def test_a_pass_whose_graph_lives_on_holds_no_parametrized_weights(monkeypatch):
    monkeypatch.setattr(layer_module, "kernels_for", lambda tensor: TRITON)
    layer = vmoe.MoeMlp(8, 16, moe=MoeConfig(num_experts=4, group="image", backend="fused"), device=DEVICE)
    doubled = Doubled()
    nn.utils.parametrize.register_parametrization(layer.experts.fc1, "weight", doubled)
    y = layer(torch.randn(2, 5, 8, device=DEVICE))
    assert doubled.made[-1]() is not None
    y.sum().backward()
    assert "OneNode" in type(y.grad_fn).__name__
    assert doubled.made[-1]() is None


@pytest.mark.parametrize("observed", [vmoe.record_routing, lambda _: FlopCounterMode(display=False)])
def test_checkpointing_repeats_a_pass_that_is_observed_on_one_way_only(observed, monkeypatch):
    monkeypatch.setattr(layer_module, "kernels_for", lambda tensor: TRITON)
    layer = vmoe.MoeMlp(8, 16, moe=MoeConfig(num_experts=4, group="image", backend="fused"), device=DEVICE)
    x = torch.randn(2, 5, 8, device=DEVICE, requires_grad=True)
    with observed(layer):
        y = checkpoint(layer, x, use_reentrant=False)
    y.sum().backward()
    y = checkpoint(layer, x, use_reentrant=False)
    with observed(layer):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore:backend=.fused.:UserWarning")  # the plain layer has it computed elsewhere
@pytest.mark.parametrize("kernels", [PLAIN, TRITON], ids=["plain", "one node"])
def test_a_router_in_evaluation_mode_draws_no_noise_and_has_no_load_loss(kernels, monkeypatch):
    monkeypatch.setattr(layer_module, "kernels_for", lambda tensor: kernels)
    layer = vmoe.MoeMlp(8, 16, moe=MoeConfig(num_experts=4, group="image", backend="fused"), device=DEVICE)
    layer(torch.randn(2, 5, 8, device=DEVICE))
    assert layer.statistics.load_loss > 0
    layer.router.eval()
    layer(torch.randn(2, 5, 8, device=DEVICE))
    assert layer.statistics.load_loss == 0


def test_a_forward_of_the_routers_own_is_called_in_place_of_the_one_node(monkeypatch):
    """As libraries that move weights between devices, and experiments, set it on a module."""
    monkeypatch.setattr(layer_module, "kernels_for", lambda tensor: TRITON)
    layer = vmoe.MoeMlp(8, 16, moe=MoeConfig(num_experts=4, group="image", backend="fused"), device=DEVICE)
    calls = []
    for module in (layer.router, layer.router.gate):
        module.forward = lambda *inputs, own=module.forward: calls.append(own) or own(*inputs)
    layer(torch.randn(2, 5, 8, device=DEVICE))
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:backend=.fused.:UserWarning")  # the plain layer has it computed elsewhere
@pytest.mark.parametrize("noise_scale", [0.0, 1.0])
def test_noise_that_is_set_on_the_router_leaves_the_load_loss_as_it_is_configured(noise_scale, monkeypatch):
    layer = vmoe.MoeMlp(8, 16, moe=MoeConfig(num_experts=4, group="image", backend="fused"), device=DEVICE)
    layer.router.noise_scale = noise_scale
    x, noise = torch.randn(2, 5, 8, device=DEVICE), torch.randn(10, 4, device=DEVICE)
    layer.router.draw_noise = lambda logits: noise
    losses = []
    for kernels in (PLAIN, TRITON):
        monkeypatch.setattr(layer_module, "kernels_for", lambda tensor, kernels=kernels: kernels)
        layer(x)
        losses.append(layer.last_auxiliary_loss.detach())
    torch.testing.assert_close(losses[1], losses[0])


@pytest.mark.filterwarnings("ignore:backend=.fused.:UserWarning")
def test_hooks_that_make_weights_run_once_where_the_kernels_lack_the_activation(monkeypatch):
    monkeypatch.setattr(layer_module, "kernels_for", lambda tensor: TRITON)
    moe = MoeConfig(num_experts=4, group="image", backend="fused")
    layer = vmoe.MoeMlp(8, 16, act_layer=nn.ReLU, moe=moe, device=DEVICE)
    calls = []
    layer.experts.fc1.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(2, 5, 8, device=DEVICE))
    assert len(calls) == 1


@pytest.mark.gpu
def test_tensors_may_begin_at_any_address():
    layer = vmoe.MoeMlp(16, 32, moe=MoeConfig(num_experts=4), device="cuda").eval()
    aligned = torch.randn(2, 5, 16, device="cuda")
    shifted = torch.cat([aligned.new_zeros(1), aligned.flatten()])[1:].view_as(aligned)
    assert shifted.data_ptr() % 16
    for x in (aligned, shifted, aligned, shifted):  # compiled each, then looked up
        torch.testing.assert_close(layer(x), layer(aligned), rtol=0, atol=0)


@pytest.mark.gpu
def test_a_layer_on_the_cpu_refuses_tokens_on_a_gpu_after_it_was_there():
    layer = vmoe.MoeMlp(16, 32, moe=MoeConfig(num_experts=4), device="cuda").eval()
    x = torch.randn(2, 5, 16, device="cuda")
    with torch.no_grad():
        before = layer(x)
        with pytest.raises(ValueError, match="cpu tensor"):
            layer.cpu()(x)
        assert torch.equal(layer.cuda()(x), before)


def most_memory(work) -> int:
    """The most bytes in use at once while `work` runs, beyond those before it."""
    gc.collect()  # what is freed meanwhile would count as less
    if DEVICE == "cuda":
        work()  # the library takes memory of its own in its first call
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("kernels", [Kernels(None, TRITON.experts), TRITON], ids=["experts alone", "one node"])
def test_two_hidden_buffers_live_at_once(kernels, monkeypatch):
    """A third one would, if the backward pass freed what the forward pass kept only at its end."""
    monkeypatch.setattr(layer_module, "kernels_for", lambda tensor: kernels)
    moe = MoeConfig(num_experts=2, group="batch", backend="fused", noise_std=0.0)
    layer = vmoe.MoeMlp(8, 512, moe=moe, device=DEVICE)
    x = torch.randn(2, 50, 8, device=DEVICE)
    rows = 2 * 128  # 105 choices of each expert, and free ones
    assert most_memory(lambda: layer(x).sum().backward()) < 2.5 * rows * 512 * 4


@pytest.mark.parametrize("activation", [nn.GELU(), Glu(nn.SiLU(), gate_first=True)], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("kernels", [Kernels(None, TRITON.experts), TRITON], ids=["experts alone", "one node"])
def test_a_retained_graph_gives_its_gradients_again(kernels, activation, monkeypatch):
    """The last backward pass may overwrite what the forward pass kept; the others may not."""
    monkeypatch.setattr(layer_module, "kernels_for", lambda tensor: kernels)
    moe = MoeConfig(num_experts=2, group="batch", backend="fused", recompute_activation=True, noise_std=0.0)
    layer = vmoe.MoeMlp(8, 16, act_layer=lambda: activation, moe=moe, device=DEVICE)
    x = torch.randn(2, 9, 8, device=DEVICE, requires_grad=True)
    total = layer(x).square().sum()
    first, again, last = (
        torch.autograd.grad(total, [x, *layer.experts.parameters()], retain_graph=retain)
        for retain in (True, True, False)
    )
    for values in zip(first, again, last, strict=True):
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, x)
