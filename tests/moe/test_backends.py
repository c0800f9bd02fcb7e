"""Every compute backend gives the same, and the layer compiles without a graph break."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library, nn
from torch.func import functional_call, grad, jacrev, vmap

import vmoe
from vmoe import MoeConfig
from vmoe.moe import experts as experts_module
from vmoe.moe.assignment import Capacity, assign
from vmoe.moe.experts import Experts, ExpertSpec
from vmoe.moe.groups import Groups
from vmoe.moe.kernels.experts import cpu, padded, segments
from vmoe.moe.kernels.interface import Choices
from vmoe.moe.mlps import Glu
from vmoe.moe.routers import token_choice


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),  # images
    st.integers(1, 5),  # tokens an image
    st.integers(1, 3),  # images a group
    st.sampled_from([1, 2, 5]),  # experts
    st.integers(1, 2),  # choices
    st.integers(1, 6),  # capacity
    st.floats(0, 6),  # skew of the router towards expert 0
    st.booleans(),  # biases
    st.booleans(),  # padding, with a capacity of each group
)
def test_backends_equal_one_another(images, tokens, group, num_experts, top_k, capacity, skew, bias, padded_images):
    """Outputs and all gradients, with drops, idle experts, incomplete groups and padding."""
    top_k = min(top_k, num_experts)
    generator = torch.Generator().manual_seed(images * 7 + tokens)
    groups = Groups.of(images, tokens, group)
    experts = Experts(num_experts, ExpertSpec(4, 6, 3, nn.GELU(), bias=(bias, bias)), dtype=torch.float64)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, generator=generator)
    x = torch.randn(images * tokens, 4, dtype=torch.float64, generator=generator)
    logits = torch.randn(images * tokens, num_experts, dtype=torch.float64, generator=generator)
    logits[:, 0] += skew
    cotangent = torch.randn(images * tokens, 3, dtype=torch.float64, generator=generator)
    mask, bound = None, Capacity(capacity)
    if padded_images:
        mask = torch.rand(images * tokens, generator=generator) < 0.7
        bound = Capacity(capacity, torch.randint(capacity + 1, (groups.count,), generator=generator))
    results = []
    for backend in (padded, segments, cpu):
        x_, logits_ = x.clone().requires_grad_(), logits.clone().requires_grad_()
        valid_GS = groups.valid(mask, x.device)
        split = groups.split(logits_)
        routing = assign(token_choice(split, split, groups, top_k, valid_GS=valid_GS), bound)
        y = backend.expert_mlp(x_, Choices.of(routing), experts._mlp(torch.float64))
        gradients = torch.autograd.grad((y * cotangent).sum(), [x_, logits_, *experts.parameters()])
        results.append([y, *gradients])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


@pytest.mark.parametrize("bias", [True, False])
def test_segment_linear_passes_torchs_own_checks(bias):
    """Fake kernel, autograd registration and schema of the custom operator."""
    arguments = (
        torch.randn(7, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True) if bias else None,
        torch.tensor([2, 2, 6], dtype=torch.int32),
    )
    library.opcheck(segments.segment_linear, arguments)
    torch.autograd.gradcheck(segments.segment_linear, arguments)
    torch.autograd.gradgradcheck(segments.segment_linear, arguments)


def small_model(**knobs) -> nn.Module:
    torch.manual_seed(0)
    return vmoe.create_model(
        "vit_tiny_patch16_224",
        MoeConfig(num_experts=4, noise_std=0.0, batch_priority=True, group=2, **knobs),
        img_size=16,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=3,
    )


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_whole_model_compiles_without_graph_break(training):
    model, images = small_model().train(training), torch.randn(5, 3, 16, 16)
    eager = model(images)
    (eager.sum() + vmoe.auxiliary_loss(model)).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.compile(fullgraph=True, backend="aot_eager")
    compiled = model(images)
    (compiled.sum() + vmoe.auxiliary_loss(model)).backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)
    assert model.blocks[1].mlp.statistics.load.sum() == pytest.approx(1)


@pytest.mark.slow
def test_a_fractional_capacity_compiles_with_dynamic_shapes():
    moe = MoeConfig(num_experts=4, capacity_factor=1.05, noise_std=0.0, backend="padded")
    layer = vmoe.MoeMlp(8, 16, moe=moe)
    torch.compiler.reset()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="eager")
    for images, tokens in ((4, 9), (5, 6)):
        x = torch.randn(images, tokens, 8, requires_grad=True)
        gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (layer(x), compiled(x))]
        torch.testing.assert_close(*gradients)


def test_compiling_too_says_that_another_backend_serves():
    layer = vmoe.MoeMlp(8, 16, moe=MoeConfig(num_experts=4, capacity_factor=None, noise_std=0.0, backend="padded"))
    torch.compiler.reset()
    experts_module._warn.cache_clear()
    with pytest.warns(UserWarning, match="it needs a capacity; another backend is used"):
        torch.compile(layer, fullgraph=True, backend="eager")(torch.randn(2, 9, 8))


@pytest.fixture(params=["auto", "padded", "segments"])
def loss_of(request):
    """A layer's parameters, and its loss as a function of them and of images' tokens (B, N, D)."""
    torch.manual_seed(0)
    moe = MoeConfig(num_experts=3, noise_std=0.0, capacity_factor=0.8, backend=request.param)
    layer = vmoe.MoeMlp(3, 4, moe=moe, dtype=torch.float64)
    parameters = {name: torch.randn_like(value) for name, value in layer.named_parameters()}
    return parameters, lambda parameters, x: functional_call(layer, parameters, (x,)).square().sum()


def test_gradients_of_each_image_by_torch_func(loss_of):
    parameters, loss = loss_of
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    by_image = vmap(grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    for image in range(3):
        learned = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        one = x[image : image + 1]
        expected = torch.autograd.grad(loss(learned, one), list(learned.values()))
        torch.testing.assert_close([by_image[name][image] for name in parameters], list(expected))
        torch.testing.assert_close(list(grad(loss)(parameters, one).values()), list(expected))


def test_second_derivatives_by_autograd_and_torch_func(loss_of):
    parameters, loss = loss_of
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(lambda x: loss(parameters, x), x)
    by_autograd = torch.autograd.functional.hessian(lambda x: loss(parameters, x), x)
    by_func = jacrev(jacrev(loss, argnums=1), argnums=1)(parameters, x.detach())
    torch.testing.assert_close(by_func, by_autograd)


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [{}, {"inject_auxiliary_loss": True}, {"capacity_factor": None}], ids=str)
def test_inductor_agrees(knobs):
    model, images = small_model(**knobs).train(), torch.randn(6, 3, 16, 16)
    eager = model(images)
    eager.sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.compiler.reset()  # what other tests compiled would make sizes dynamic here
    model.compile(fullgraph=True)
    compiled = model(images)
    compiled.sum().backward()
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capacity_factor", [None, 1.05, 0.5])
def test_gpu_equals_cpu_in_float64(dtype, capacity_factor):
    torch.manual_seed(0)
    moe = MoeConfig(num_experts=8, capacity_factor=capacity_factor, noise_std=0.0, group=4)
    exact = vmoe.MoeMlp(64, 128, moe=moe, dtype=torch.float64).train()
    layer = vmoe.MoeMlp(64, 128, moe=moe, device="cuda").train()
    layer.load_state_dict(exact.state_dict())
    x = torch.randn(10, 17, 64)
    expected = exact(x.double())
    expected.square().sum().backward()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x.cuda())
    y.float().square().sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(
        [y, *(p.grad for p in layer.parameters())], [expected, *(p.grad for p in exact.parameters())], strict=True
    ):
        error = (ours.double().cpu() - theirs).norm() / theirs.norm()
        assert error < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_gpu_path_never_waits_for_the_device(training):
    layer = vmoe.MoeMlp(64, 128, moe=MoeConfig(batch_priority=True, group=4), device="cuda").train(training)
    x = torch.randn(10, 17, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        layer(x)  # the first call may set up libraries
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            y = layer(x)
            (y.float().sum() + vmoe.auxiliary_loss(layer)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["fused", "cpu", "padded", "segments"])
@pytest.mark.parametrize("capacity_factor", [1.0, None])
def test_named_backends_agree_and_say_when_another_serves(backend, capacity_factor):
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16)
    results = []
    for name in ("segments", backend):
        moe = MoeConfig(num_experts=4, capacity_factor=capacity_factor, noise_std=0.0, backend=name)
        torch.manual_seed(1)
        layer = vmoe.MoeMlp(16, 32, moe=moe)
        experts_module._warn.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(layer(x))
            layer(x)
        cannot = name == "fused" or (name == "padded" and capacity_factor is None)
        assert [str(warning.message).startswith(f'backend="{name}"') for warning in caught] == [True] * cannot
    torch.testing.assert_close(*results)


class StarRelu(nn.Module):
    """An activation with parameters, which stay float32 under autocast and so does what they touch (MetaFormer's)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.scale * x.relu().square() + self.bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make_activation", [StarRelu, lambda: Glu(StarRelu(), True)])
@pytest.mark.parametrize("backend", ["segments", "padded"])
def test_activations_with_parameters_under_autocast(backend, make_activation, dtype):
    torch.manual_seed(0)
    moe = MoeConfig(num_experts=2, noise_std=0.0, backend=backend)
    layer, x = vmoe.MoeMlp(8, 16, act_layer=make_activation, moe=moe), torch.randn(2, 9, 8)
    learned = list(layer.experts.parameters())
    exact_y = layer(x)
    signs = exact_y.detach().sign()  # so that no gradient is a small difference of large ones
    exact = torch.autograd.grad((exact_y * signs).sum(), learned)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype == dtype
    for gradient, truth in zip(torch.autograd.grad((y.float() * signs).sum(), learned), exact, strict=True):
        assert gradient.dtype == torch.float32 and (gradient - truth).norm() <= 0.03 * truth.norm() + 1e-6


def test_experts_on_the_cpu_repeat_bit_for_bit_and_keep_their_memory_apart():
    """Also where the graph of one pass outlives the next, whose buffers could be the same."""
    torch.manual_seed(0)
    layer = vmoe.MoeMlp(64, 512, moe=MoeConfig(num_experts=4, noise_std=0.0))
    first, second = torch.randn(2, 2048, 64).unbind()

    def gradients(x):
        return torch.autograd.grad(layer(x[None]).square().sum(), list(layer.experts.parameters()))

    expected = [gradients(x) for x in (first, second)]
    y_first, y_second = (layer(x[None]).square().sum() for x in (first, second))
    for y, truth in ((y_first, expected[0]), (y_second, expected[1])):
        for _ in range(2):
            again = torch.autograd.grad(y, list(layer.experts.parameters()), retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(again, truth, strict=True))
