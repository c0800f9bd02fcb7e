"""NaFlex: images of several shapes in one batch, padded; padding is nobody's token."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import vmoe
from vmoe import MoeConfig
from vmoe.export.layer import exportable_copy
from vmoe.models.padding import real_tokens

GRIDS = [(2, 3), (4, 2), (1, 1)]
TOKENS = 8


def model_of(name: str = "naflexvit_base_patch16_gap", **knobs):
    """A model without LayerScale's 1e-5, which would hide what its MLPs do."""
    torch.manual_seed(0)
    dense = timm.create_model(name, embed_dim=24, depth=2, num_heads=2, num_classes=3, init_values=1.0).eval()
    moe = MoeConfig(layers="every-1", **{"num_experts": 3, "group": "batch", **knobs})
    return dense, vmoe.sparsify(copy.deepcopy(dense), moe, init="upcycle")


def batch(padding: float = 0.0) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    coords = torch.full((len(GRIDS), TOKENS, 2), 0)
    valid = torch.zeros(len(GRIDS), TOKENS, dtype=torch.bool)
    for image, (rows, columns) in enumerate(GRIDS):
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        coords[image, : rows * columns] = places
        valid[image, : rows * columns] = True
    patches = torch.randn(len(GRIDS), TOKENS, 16 * 16 * 3).masked_fill(~valid[..., None], padding)
    return {"patches": patches, "patch_coord": coords, "patch_valid": valid}


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_map"])
def test_padding_is_not_counted(name):
    dense, sparse = model_of(name, renormalize=True)
    with torch.no_grad():
        torch.testing.assert_close(sparse(batch()), dense(batch()), rtol=1e-5, atol=1e-5)
        load = sparse.blocks[0].mlp.statistics.load
        sparse(batch(padding=7.0))
    torch.testing.assert_close(sparse.blocks[0].mlp.statistics.load, load)


def real_tokens_of(model) -> int:
    """Patches and register tokens of the batch."""
    return int(batch()["patch_valid"].sum()) + len(GRIDS) * model.num_prefix_tokens


def test_capacity_is_counted_from_the_real_tokens():
    _, sparse = model_of(num_experts=1, top_k=1, capacity_multiple_of=1, eval_capacity_factor=0.5)
    with torch.no_grad():
        sparse(batch())
    real = real_tokens_of(sparse)
    assert sparse.blocks[1].mlp.statistics.dropped == pytest.approx((real // 2) / real)


@torch.no_grad()
@pytest.mark.parametrize(
    "routing",
    [
        {"eval_capacity_factor": 0.6, "capacity_multiple_of": 1, "group": "image"},
        {"eval_capacity_factor": 0.6, "capacity_multiple_of": 1, "group": "image", "batch_priority": True},
        {"router": "sigmoid", "eval_capacity_factor": 0.6, "group": "image"},
        {"router": "expert_choice", "group": "image", "capacity_factor": 1.5},
        {"router": "soft", "group": "image"},
    ],
    ids=str,
)
def test_predictions_do_not_depend_on_the_padded_length(routing):
    """Neither the model's nor those of its exported form."""
    _, sparse = model_of(**routing)
    for layer in sparse.modules():
        if isinstance(layer, vmoe.MoeMlp):  # experts that differ, and that one sees
            for parameter in layer.experts.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    sparse.double()
    short = {key: value.double() if value.is_floating_point() else value for key, value in batch().items()}
    long = {key: F.pad(value, [0, 0] * (value.dim() - 2) + [0, 24]) for key, value in short.items()}
    expected = sparse(short)
    assert expected.std() > 0.01
    torch.testing.assert_close(sparse(long), expected)
    exported = exportable_copy(sparse)
    for padded in (short, long):
        in_float = {key: value.float() if value.is_floating_point() else value for key, value in padded.items()}
        torch.testing.assert_close(exported(in_float).double(), expected, rtol=1e-4, atol=1e-4)


def test_pictures_have_no_padding_and_no_mask_stays_behind():
    _, sparse = model_of()
    sparse(batch())
    with vmoe.record_routing(sparse) as trace:
        sparse(torch.randn(2, 3, 64, 32))
    routing = trace.layers["blocks.0.mlp"]
    assert routing.valid is None and routing.grid == (4, 2)


def test_recorded_on_the_grid_of_each_image():
    _, sparse = model_of()
    with torch.no_grad(), vmoe.record_routing(sparse) as trace:
        sparse(batch())
    routing = trace.layers["blocks.1.mlp"]
    prefix = routing.num_prefix_tokens
    assert routing.grid == (4, 3)
    assert torch.equal(routing.valid[:, prefix:], batch()["patch_valid"])
    drawn = routing.on_grid(routing.gates)
    for image, (rows, columns) in enumerate(GRIDS):
        own = routing.gates[image, prefix : prefix + rows * columns]
        torch.testing.assert_close(drawn[image, :rows, :columns].flatten(0, 1), own)
        assert drawn[image, rows:].eq(0).all() and drawn[image, :, columns:].eq(0).all()


def test_padding_is_recorded_as_no_dropped_choice():
    _, sparse = model_of(eval_capacity_factor=0.5, capacity_multiple_of=1)
    with torch.no_grad(), vmoe.record_routing(sparse) as trace:
        sparse(batch())
    for name, routing in trace.layers.items():
        assert routing.dropped.any() and not routing.dropped[~routing.valid].any()
        real = routing.valid.sum() * routing.dropped.shape[-1]
        torch.testing.assert_close(sparse.get_submodule(name).statistics.dropped, routing.dropped.sum() / real)


def test_copies_have_masks_of_their_own():
    _, sparse = model_of()
    twin = copy.deepcopy(sparse)
    twin(batch())
    reader = next(hook.__self__ for hook in sparse.blocks[0]._forward_pre_hooks.values())
    assert reader.mask is None
    assert next(hook.__self__ for hook in twin.blocks[0]._forward_pre_hooks.values()).mask is not None


def test_checkpointing_hands_the_mask_through_too():
    _, sparse = model_of()
    sparse.train().set_grad_checkpointing()
    (sparse(batch()).sum() + vmoe.auxiliary_loss(sparse)).backward()
    assert sparse.blocks[0].mlp.experts.fc1.weight.grad.abs().sum() > 0
    load = sparse.blocks[0].mlp.statistics.load * real_tokens_of(sparse) * 2
    torch.testing.assert_close(load, load.round())  # shares of the real tokens' choices


def test_densify_takes_the_hooks_away():
    _, sparse = model_of()
    back = vmoe.densify(sparse)
    assert not any(block._forward_pre_hooks for block in back.blocks)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_masks_of_either_kind(kind, queries):
    valid = torch.tensor([[True, True, False], [True, False, False]])
    allowed = valid[:, None, None, :].expand(2, 1, queries, 3)
    mask = allowed if kind == torch.bool else torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(kind).min)
    assert torch.equal(real_tokens(mask), valid)
