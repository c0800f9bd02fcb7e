"""Layers that route whole images, against a plain loop over images in float64."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

import vmoe
from vmoe import MoeConfig, MoeMlp
from vmoe.models.cost import count_parameters, flops_per_image

NULL = {"capacity_factor": None, "eval_capacity_factor": None}
SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 5}


def layer_of(class_token: bool = False, **knobs) -> MoeMlp:
    torch.manual_seed(0)
    of_mlp = {
        name: knobs.pop(name) for name in ("act_layer", "norm_layer", "bias", "drop", "use_conv") if name in knobs
    }
    moe = MoeConfig(route="image", **{"num_experts": 3, "top_k": 1, "noise_std": 0.0, **NULL, **knobs})
    layer = MoeMlp(6, 10, **of_mlp, moe=moe, dtype=torch.float64)
    for parameter in layer.experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    layer.images.class_token = class_token
    return layer


def model_of(route="image", model=None, **knobs):
    torch.manual_seed(0)
    moe = MoeConfig(layers="every-2", route=route, **{"num_experts": 3, "top_k": 1, **NULL, **knobs})
    return vmoe.create_model("vit_tiny_patch16_224", moe, **SMALL, **(model or {}))


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def by_a_loop(layer: MoeMlp, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Each image by itself: pool, score, and the weighted experts of all its real tokens."""
    results = []
    for index, tokens in enumerate(x):
        real = torch.ones(len(tokens), dtype=torch.bool) if mask is None else mask[index]
        pooled = tokens[0] if layer.images.class_token else tokens[real].sum(0) / max(int(real.sum()), 1)
        gates = (layer.router.gate.weight @ pooled).softmax(0)
        best = gates.argsort(descending=True)[: layer.config.top_k]
        weights = gates[best] / gates[best].sum() if layer.config.renormalize else gates[best]
        total = torch.zeros_like(tokens)
        for expert, weight in zip(best, weights, strict=True):
            first, second = layer.experts.fc1, layer.experts.fc2
            hidden = F.gelu(tokens @ first.weight[expert].T + first.bias[expert])
            total = total + weight * (hidden @ second.weight[expert].T + second.bias[expert])
        if layer.shared is not None:
            total = total + layer.shared(tokens)
        results.append(total * real[:, None])
    return torch.stack(results)


@pytest.mark.parametrize("backend", ["auto", "segments"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 2},
        {"top_k": 2, "renormalize": True, "shared_experts": 1},
        {"class_token": True},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_equals_a_plain_loop_with_all_gradients(options, backend, padded):
    layer = layer_of(backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 7, 6, dtype=torch.float64, generator=generator)
    mask = None
    if padded:
        mask = torch.rand(5, 7, generator=generator) < 0.6
        mask[:, 0], mask[4] = True, False  # the last image is padding alone
    direction = torch.randn(5, 7, 6, dtype=torch.float64, generator=generator)
    found = {}
    for name, compute in {"layer": layer, "loop": lambda *given: by_a_loop(layer, *given)}.items():
        given = x.clone().requires_grad_()
        y = compute(given, mask)
        learned = [given, *layer.parameters()]
        found[name] = [y, *torch.autograd.grad((y * direction).sum(), learned)]
    torch.testing.assert_close(found["layer"], found["loop"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 2, "shared_experts": 1}, {"num_experts": 9}])
def test_one_image_at_evaluation_equals_a_plain_loop_and_repeats_bit_for_bit(options):
    layer = layer_of(**options).eval()
    x = torch.randn(1, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        y = layer(x)
        assert torch.equal(y, layer(x))
        torch.testing.assert_close(y, by_a_loop(layer, x), rtol=1e-12, atol=1e-14)
    assert layer(x[:, :0]).shape == (1, 0, 6)  # no token


@pytest.mark.parametrize(
    "options",
    [
        *({"router": router, "top_k": top_k} for router in ("token_choice", "sigmoid", "cosine") for top_k in (1, 2)),
        {"renormalize": True},
        {"removed_experts": 2},
        {"class_token": True, "bias": False},
        {"act_layer": lambda: torch.nn.GELU("tanh"), "shared_experts": 1},
        {"norm_layer": torch.nn.LayerNorm},
        {"backend": "segments"},
        {"use_conv": True},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_image_at_evaluation_is_the_pass_with_gradient(options, dtype):
    layer = layer_of(**options).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    for shape in ((1, 7, 6), (1, 3, 2, 6)) if not layer.use_conv else ((1, 6, 3, 2),):
        x = torch.randn(shape, generator=generator).to(dtype)
        expected = [layer(x), layer.last_image_logits, layer.last_auxiliary_loss, *layer.statistics]
        with torch.inference_mode():
            found = [layer(x), layer.last_image_logits, layer.last_auxiliary_loss, *layer.statistics]
        tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 1e-2}
        torch.testing.assert_close(found, [value.detach() for value in expected], **tolerance)


@pytest.mark.parametrize("part", ["router", "router.gate", "experts", "experts.fc1", "experts.act", "drop2"])
def test_one_image_at_evaluation_calls_what_has_a_hook(part):
    layer = layer_of(drop=0.1).eval()
    called = []
    layer.get_submodule(part).register_forward_hook(lambda *given: called.append(part))
    with torch.inference_mode():
        layer(torch.randn(1, 7, 6, dtype=torch.float64))
    assert called


def test_one_image_at_evaluation_under_autocast_follows_changed_weights():
    layer = layer_of().float().eval()
    layer.experts.keep_casts()
    x = torch.randn(1, 7, 6, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        torch.testing.assert_close(layer(x.bfloat16()), before, rtol=2e-2, atol=1e-2)
    with torch.no_grad():
        layer.experts.fc2.weight.mul_(2)
        layer.experts.fc2.bias.mul_(2)
        with torch.autocast("cpu", torch.bfloat16):
            after = layer(x)
    assert before.dtype == after.dtype == torch.bfloat16
    torch.testing.assert_close(after, 2 * before, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2])
def test_a_shared_router_without_other_layers_is_refused(count):
    layer = layer_of(shared_router=True).eval()
    with pytest.raises(RuntimeError, match=r"shared_router: .* vmoe\.sparsify"), torch.inference_mode():
        layer(torch.randn(count, 7, 6, dtype=torch.float64))


def test_balance_losses_are_those_of_the_images():
    layer = layer_of(gshard_loss_weight=1.0, z_loss_weight=1.0)
    x = torch.randn(6, 4, 6, dtype=torch.float64)
    layer(x)
    by_patch = MoeMlp(6, 10, moe=MoeConfig(**{**vars(layer.config), "route": "patch"}), dtype=torch.float64)
    by_patch.load_state_dict(layer.state_dict())
    by_patch(x.mean(1, keepdim=True))
    torch.testing.assert_close(layer.last_auxiliary_loss, by_patch.last_auxiliary_loss)
    torch.testing.assert_close(layer.statistics, by_patch.statistics)
    torch.testing.assert_close(layer.last_image_logits, x.mean(1) @ layer.router.gate.weight.T)


def test_the_class_token_speaks_for_the_image_where_the_model_has_one():
    with_token = vmoe.moe_layers(model_of())[0][1]
    without = vmoe.moe_layers(model_of(model={"class_token": False, "global_pool": "avg"}))[0][1]
    assert with_token.images.class_token and not without.images.class_token
    # and where the images have another size than the model was made for
    dense = timm.create_model("vit_tiny_patch16_224", **SMALL, dynamic_img_size=True)
    moe = MoeConfig(layers=[0], route="image", capacity_factor=None)
    assert vmoe.sparsify(dense, moe, image_size=64).blocks[0].mlp.images.class_token


def test_one_router_decides_for_all_layers():
    model = model_of(shared_router=True).train()
    (_, first), (_, second) = vmoe.moe_layers(model)
    assert not any(name.startswith("blocks.3.mlp.router") for name in model.state_dict())
    model(images())
    torch.testing.assert_close(first.statistics.load, second.statistics.load)
    loss = vmoe.auxiliary_loss(model)
    torch.testing.assert_close(loss, first.last_auxiliary_loss)  # counts once
    assert second.last_image_logits is None
    # the experts of the last layer teach the router of the first
    model.eval()
    first.experts.requires_grad_(False)
    gate = first.router.gate.weight
    decision = first.images.decision.recall()
    model(images()).sum().backward()
    assert first.images.decision.recall() is not decision
    assert gate.grad.abs().max() > 0
    copied = copy.deepcopy(model)
    copied(images())
    torch.testing.assert_close(copied(images()), model(images()))
    (_, own), (_, following) = vmoe.moe_layers(copied)
    assert following.router.decision is own.images.decision
    assert own.images.decision is not first.images.decision


def test_threads_that_run_a_model_at_once_do_not_take_each_other_s_decisions():
    model = model_of(shared_router=True).eval()
    batches = [images(2), images(2).flip(0) * 3]
    expected = [model(batch) for batch in batches]
    meet = threading.Barrier(2, timeout=5)

    def wait(*_: object) -> None:
        meet.wait()

    model.blocks[2].register_forward_pre_hook(wait)  # between the two MoE layers
    with ThreadPoolExecutor(2) as threads:
        for found, alone in zip(threads.map(model, batches), expected, strict=True):
            torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("shared_router", [False, True])
def test_compiled_in_one_graph(shared_router):
    model = model_of(shared_router=shared_router, noise_std=0.0).train()
    expected = model(images())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), expected)
    gate = vmoe.moe_layers(model)[0][1].router.gate.weight
    (compiled(images()).square().sum() + vmoe.auxiliary_loss(model)).backward()
    found, gate.grad = gate.grad, None
    (model(images()).square().sum() + vmoe.auxiliary_loss(model)).backward()
    torch.testing.assert_close(found, gate.grad)


def test_the_record_has_one_decision_per_image():
    model = model_of(top_k=2).eval()
    with vmoe.record_routing(model) as trace:
        model(images(3))
        model(images(2))
    layer = trace.layers["blocks.1.mlp"]
    assert (layer.gates.shape, layer.chosen.shape, layer.grid) == ((5, 3), (5, 2), (1, 1))
    torch.testing.assert_close(layer.combine_weights, layer.gates.gather(1, layer.chosen))
    assert layer.as_tokens().gates.shape == (5, 1, 3)


def test_torch_export_takes_a_batch_of_any_size():
    model = model_of(shared_router=True, top_k=2).eval()
    program = torch.export.export(model, (images(3),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    for count in (1, 4):
        torch.testing.assert_close(program.module()(images(count)), model(images(count)))


def test_it_costs_what_routing_of_patches_costs_but_for_the_router():
    by_image, by_patch = model_of(), model_of(route="patch")
    assert count_parameters(by_image) == count_parameters(by_patch)
    saved = flops_per_image(by_patch, 32) - flops_per_image(by_image, 32)
    assert saved == 2 * (2 * 24 * 3) * (5 - 1)  # in each of 2 layers, scores of 3 experts for 4 patches


def test_activation_checkpointing_changes_no_gradient():
    model = model_of(noise_std=0.0).train()
    found = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        loss = model(images()).square().mean() + vmoe.auxiliary_loss(model)
        found.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[1], found[0])


def test_a_shared_router_refuses_activation_checkpointing():
    """A later layer that is computed again would read the decision of another forward pass."""
    model = model_of(shared_router=True, noise_std=0.0).train()
    model.set_grad_checkpointing(True)
    with pytest.raises(RuntimeError, match="shared_router: activation checkpointing cannot compute a layer again"):
        model(images()).sum().backward()
