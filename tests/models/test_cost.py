"""Parameters and FLOPs against closed formulas."""

import pytest
import torch

import vmoe
from vmoe import MoeConfig
from vmoe.models.cost import check_training_capacity, count_parameters, flops_per_image, image_cost

WIDTH, DEPTH, HEADS, CLASSES, PATCH, SIDE = 24, 4, 2, 5, 4, 16
TOKENS = (SIDE // PATCH) ** 2 + 1
SMALL = {
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "num_classes": CLASSES,
    "patch_size": PATCH,
    "img_size": SIDE,
}


def model(moe: MoeConfig | None = None) -> torch.nn.Module:
    return vmoe.create_model("vit_tiny_patch16_224", moe, **SMALL)


def vit_flops(mlps_per_block: list[float], num_experts: int = 0, moe_blocks: int = 0) -> float:
    """Multiply-adds of a ViT, times 2; `mlps_per_block` counts the MLPs a token meets in each block."""
    embed = (TOKENS - 1) * 3 * PATCH**2 * WIDTH
    attention = TOKENS * 4 * WIDTH**2 + 2 * TOKENS**2 * WIDTH
    mlp = TOKENS * 2 * WIDTH * 4 * WIDTH
    router = moe_blocks * TOKENS * WIDTH * num_experts
    return 2 * (embed + DEPTH * attention + sum(mlps_per_block) * mlp + router + WIDTH * CLASSES)


def test_dense_flops():
    assert flops_per_image(model(), SIDE) == vit_flops([1] * 4)


def test_blocks_that_are_given_a_parameter():
    """In cait, two blocks get the class token and look at all patches; the heads of the others are mixed twice."""
    cait = vmoe.create_model("cait_xxs24_224", embed_dim=WIDTH, depth=1, num_heads=HEADS, num_classes=5, img_size=64)
    patches = (64 // 16) ** 2
    heads = 2 * patches**2 * HEADS**2
    block = patches * 12 * WIDTH**2 + 2 * patches**2 * WIDTH + heads
    class_block = (10 + 2 * (patches + 1)) * WIDTH**2 + 2 * (patches + 1) * WIDTH
    embed = patches * 3 * 16**2 * WIDTH
    assert flops_per_image(cait, 64) == 2 * (embed + block + 2 * class_block + WIDTH * CLASSES)


def test_sparse_flops_count_k_experts_whatever_their_number():
    for num_experts, top_k in ((4, 1), (4, 2), (16, 2)):
        sparse = model(MoeConfig(num_experts=num_experts, top_k=top_k))
        assert flops_per_image(sparse, SIDE) == vit_flops([1, top_k, 1, top_k], num_experts, 2)


@pytest.mark.parametrize("backend", ["auto", "padded", "segments"])
@pytest.mark.parametrize(("factor", "most"), [(0.1, 1), (0.5, 5), (3.0, 100)])
def test_choices_that_find_no_slot_are_not_counted_whatever_the_backend(backend, factor, most):
    """An expert has `most` slots for the 17 tokens of an image, of which 34 choices are made."""
    moe = MoeConfig(num_experts=4, eval_capacity_factor=factor, capacity_multiple_of=1, backend=backend)
    mlps = min(4 * most, 2 * TOKENS) / TOKENS
    assert flops_per_image(model(moe), SIDE) == pytest.approx(vit_flops([1, mlps, 1, mlps], 4, 2))


def test_tokens_of_an_image_that_each_moe_layer_routes():
    sparse = model(MoeConfig(num_experts=4))
    assert image_cost(sparse, SIDE).moe_tokens == {"blocks.1.mlp": TOKENS, "blocks.3.mlp": TOKENS}
    assert image_cost(model(), SIDE).moe_tokens == {}


def test_shared_experts_are_counted():
    sparse = model(MoeConfig(num_experts=4, top_k=1, shared_experts=1))
    assert flops_per_image(sparse, SIDE) == vit_flops([1, 2, 1, 2], 4, 2)


def test_two_experts_of_half_the_width_cost_the_dense_mlp():
    sparse = model(MoeConfig(num_experts=4, top_k=2, expert_width=0.5))
    assert flops_per_image(sparse, SIDE) == vit_flops([1, 1, 1, 1], 4, 2)
    dense = count_parameters(model())
    router, second_output_bias = WIDTH * 4, WIDTH
    assert count_parameters(sparse).active == dense.total + 2 * (router + second_output_bias)


def test_an_activation_that_experts_share_is_always_active():
    sparse = vmoe.create_model(
        "vit_tiny_patch16_224", MoeConfig(num_experts=4, top_k=1), **SMALL, act_layer=torch.nn.PReLU
    )
    dense = count_parameters(vmoe.create_model("vit_tiny_patch16_224", **SMALL, act_layer=torch.nn.PReLU))
    assert count_parameters(sparse).active == dense.total + 2 * WIDTH * 4  # the routers


def test_counting_leaves_the_model_as_it_is():
    sparse = model(MoeConfig()).train()
    before = {name: value.clone() for name, value in sparse.state_dict().items()}
    flops_per_image(sparse, SIDE)
    assert sparse.training and sparse.blocks[1].mlp.statistics is None
    assert all(torch.equal(value, before[name]) for name, value in sparse.state_dict().items())


def test_counting_keeps_the_mode_of_every_module_and_runs_no_hook():
    """Such as a frozen BatchNorm's, whose statistics would start to move."""
    sparse = model(MoeConfig(num_experts=2)).train()
    sparse.blocks[0].eval()
    sparse.blocks[3].drop_path2.eval()
    modes = {name: module.training for name, module in sparse.named_modules()}
    seen = []
    sparse.blocks[0].register_forward_hook(lambda *_: seen.append("hook"))
    flops_per_image(sparse, SIDE)
    check_training_capacity(sparse, 4, SIDE)
    assert {name: module.training for name, module in sparse.named_modules()} == modes
    assert not seen


def test_parameters():
    dense = count_parameters(model())
    assert dense.total == dense.active == sum(p.numel() for p in model().parameters())
    one_expert = 2 * WIDTH * 4 * WIDTH + 4 * WIDTH + WIDTH
    sparse = count_parameters(model(MoeConfig(num_experts=4, top_k=1)))
    assert sparse.total == dense.total + 2 * (3 * one_expert + WIDTH * 4)
    assert sparse.active == dense.total + 2 * WIDTH * 4
    assert count_parameters(model(MoeConfig(num_experts=4, top_k=2))).active == sparse.active + 2 * one_expert
