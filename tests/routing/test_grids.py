"""Recorded tokens lie where the model took them from, whatever the order in which it keeps them."""

import pytest
import timm
import torch
from timm.models.nest import blockify
from torch import nn

import vmoe
from vmoe import MoeConfig

EVERY = MoeConfig(layers="every-1", num_experts=2)


def record(model: nn.Module, *inputs, **named):
    vmoe.sparsify(model.eval(), EVERY)
    with torch.no_grad(), vmoe.record_routing(model) as trace:
        model(*inputs, **named)
    return trace.layers


def places(rows: int, columns: int) -> torch.Tensor:
    """Each place's number, as a map (1, rows, columns, 1)."""
    return torch.arange(rows * columns).view(1, rows, columns, 1)


def test_hiera_keeps_mask_units_together():
    model = timm.create_model("hiera_tiny_224", img_size=64, embed_dim=16, num_heads=1, stages=(1, 1, 2, 1))
    layers = list(record(model, torch.randn(2, 3, 64, 64)).values())
    order = model.unroll(places(16, 16).view(1, -1, 1)).flatten()  # what the model itself does with its patches
    assert torch.equal(layers[0].order, order) and not torch.equal(order, order.sort().values)
    for layer, columns in zip(layers[1:3], (16, 8), strict=True):
        # pooling merges the tokens j, j + N/4, ...: the four patches of one larger patch
        row, column = order.view(4, -1) // columns, order.view(4, -1) % columns
        pooled = row // 2 * (columns // 2) + column // 2
        assert (pooled == pooled[0]).all()
        order = pooled[0]
        assert layer.grid == (columns // 2, columns // 2) and torch.equal(layer.order, order)


def test_nest_goes_block_by_block():
    model = timm.models.nest.Nest(
        img_size=64, embed_dims=(16, 16, 32), depths=(1, 1, 1), num_heads=(1, 1, 2), num_classes=2
    )
    layers = list(record(model, torch.randn(2, 3, 64, 64)).values())
    assert [layer.grid for layer in layers] == [(16, 16), (8, 8), (4, 4)]
    assert torch.equal(layers[0].order, blockify(places(16, 16), 4).flatten())


def test_mobilevit_goes_pixel_of_the_patch_by_pixel():
    model = timm.create_model("mobilevitv2_050", num_classes=2)
    first = next(iter(record(model, torch.randn(1, 3, 64, 128)).values()))
    assert first.grid == (8, 16)
    unfolded = places(8, 16).view(4, 2, 8, 2).permute(1, 3, 0, 2)
    assert torch.equal(first.order, unfolded.flatten())


@pytest.mark.parametrize("name", ["hiera_tiny_224", "vit_tiny_patch16_224"])
def test_on_grid_puts_every_token_in_its_place(name):
    small = {"hiera_tiny_224": {"stages": (1, 1, 1, 1), "num_heads": 1}}.get(name, {"depth": 1, "num_heads": 2})
    model = timm.create_model(name, img_size=64, embed_dim=16, num_classes=2, **small)
    routing = next(iter(record(model, torch.randn(2, 3, 64, 64)).values()))
    rows, columns = routing.grid
    prefix = routing.num_prefix_tokens
    number = torch.arange(rows * columns) if routing.order is None else routing.order
    tokens = torch.cat([torch.full((prefix,), -1), number]).expand(2, -1)
    assert torch.equal(routing.on_grid(tokens)[1, ..., None], places(rows, columns)[0])


@pytest.mark.parametrize(
    ("name", "options", "size", "expected"),
    [
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, (64, 96), [(16, 24), (8, 12), (4, 6), (2, 3)]),
        (
            "twins_svt_small",
            {"img_size": (64, 96), "depths": (1, 1, 1, 1)},
            (64, 96),
            [(16, 24), (8, 12), (4, 6), (2, 3)],
        ),
        ("xcit_nano_12_p16_224", {"depth": 1}, (96, 32), [(6, 2)]),
        ("swin_tiny_patch4_window7_224", {"img_size": (56, 112), "depths": (1, 1)}, (56, 112), [(14, 28), (7, 14)]),
        # padded to whole patches
        ("davit_tiny", {"depths": (1, 1, 1, 1)}, (100, 75), [(25, 19), (13, 10), (7, 5), (4, 3)]),
    ],
)
def test_pictures_that_are_not_square(name, options, size, expected):
    model = timm.create_model(name, num_classes=2, **options)
    layers = record(model, torch.randn(1, 3, *size))
    assert list(dict.fromkeys(layer.grid for layer in layers.values())) == expected
    assert {layer.num_prefix_tokens for layer in layers.values()} == {0}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("convit_tiny", {((4, 4), 0), ((4, 4), 1)}),  # the class token joins late
        ("cait_xxs24_224", {((4, 4), 0)}),
        ("vit_so150m_patch16_reg4_gap_256", {((4, 4), 4)}),
        ("deit_tiny_distilled_patch16_224", {((4, 4), 2)}),
    ],
)
def test_prefix_tokens(name, expected):
    options = {"embed_dim": 12, "depth": 2, "num_heads": 2, "img_size": 64}
    options |= {"local_up_to_layer": 1} if name == "convit_tiny" else {}
    layers = record(timm.create_model(name, num_classes=2, **options), torch.randn(1, 3, 64, 64))
    assert {(layer.grid, layer.num_prefix_tokens) for layer in layers.values()} == expected


def test_a_model_inside_another_is_recorded():
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)

        def forward(self, x):
            return self.backbone(x)

    routing = record(Wrapper(), torch.randn(1, 3, 32, 32))["backbone.blocks.0.mlp"]
    assert routing.grid == (2, 2) and routing.num_prefix_tokens == 1


def test_features_alone_are_recorded():
    model = vmoe.sparsify(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1), EVERY)
    with vmoe.record_routing(model) as trace:
        model.forward_features(torch.randn(1, 3, 32, 32))
    assert trace.layers["blocks.0.mlp"].grid == (2, 2)
