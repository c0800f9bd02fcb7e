"""Routing maps: the numbers are the routing's, and the pixels are the palette's, blended by the gate."""

import numpy as np
import pytest
import torch
from matplotlib.text import Text

import vmoe
from vmoe.data import eval_transform
from vmoe.errors import UserError
from vmoe.explain.heatmap.figure import draw_layer, draw_overview
from vmoe.explain.heatmap.maps import choice_map, dropped_map, entropies, entropy_map, gate_map, overlaid, pale
from vmoe.explain.heatmap.routed import (
    RoutedImage,
    describe_layer,
    drawable,
    output_names,
    route_image,
    select_layers,
)
from vmoe.palette import expert_colours
from vmoe.routing.recording import LayerRouting

RED, BLUE = np.array([1.0, 0, 0]), np.array([0, 0, 1.0])


def make_routing(rows=2, columns=3, num_experts=4, top_k=2, prefix=1, seed=0, dropped=()):
    gates = torch.randn(1, prefix + rows * columns, num_experts, generator=torch.Generator().manual_seed(seed)).softmax(
        -1
    )
    weights, chosen = gates.topk(top_k)
    lost = torch.zeros_like(chosen, dtype=torch.bool)
    for token, rank in dropped:
        lost[0, token, rank] = True
    return LayerRouting(
        gates,
        chosen,
        weights.masked_fill(lost, 0),
        lost,
        (rows, columns),
        prefix,
        prefix_names=("class token", *(f"register {index}" for index in range(1, 5)))[:prefix],
    )


def make_image(**layers):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return RoutedImage(picture, picture, np.array([0.1, 0.7, 0.2]), layers)


def shown_texts(page):
    return [text.get_text() for text in page.figure.findobj(Text) if text.get_text()]


def test_blend_is_opacity_times_colour_plus_the_rest_of_the_background():
    background = np.full((4, 4, 3), 0.5)
    pixels = overlaid(background, np.array([[RED, BLUE]]), np.array([[0.25, 1.0]]))
    assert np.allclose(pixels[:, :2], [0.25 + 0.375, 0.375, 0.375])
    assert np.allclose(pixels[:, 2:], BLUE)


def test_choice_map_shows_the_gate_at_patch_centres_and_lines_between_experts():
    routing = make_routing()
    background = pale(np.random.default_rng(1).random((40, 60, 3)))
    for rank in (0, 1):
        pixels = choice_map(background, routing, rank)
        for row, column in np.ndindex(2, 3):
            token = 1 + 3 * row + column
            expert = int(routing.chosen[0, token, rank])
            gate = float(routing.gates[0, token, expert])
            y, x = 20 * row + 10, 20 * column + 10
            opacity = gate / float(routing.gates[0, 1:].max())
            assert pixels[y, x] == pytest.approx(
                opacity * expert_colours(4)[expert] + (1 - opacity) * background[y, x], abs=1e-6
            )


def test_lines_stand_only_between_patches_of_different_experts():
    gates = torch.tensor([[[0.5, 0.1], [0.5, 0.1], [0.1, 0.8]]])
    chosen = gates.argmax(-1, keepdim=True)
    routing = LayerRouting(
        gates, chosen, gates.amax(-1, keepdim=True), torch.zeros_like(chosen, dtype=torch.bool), (1, 3), 0
    )
    pixels = choice_map(np.ones((20, 60, 3)), routing, 0)
    first, second = expert_colours(2)
    filled = 0.5 / 0.8 * first + 0.3 / 0.8
    assert np.allclose(pixels[10, [0, 19, 20, 37]], filled)  # the picture's edge, and within one region
    assert np.allclose(pixels[10, 39], first)
    assert np.allclose(pixels[10, 40], second)


def test_gate_map_shows_one_expert_everywhere():
    routing = make_routing()
    pixels = gate_map(np.ones((40, 60, 3)), routing, 2)
    for row, column in np.ndindex(2, 3):
        opacity = float(routing.gates[0, 1 + 3 * row + column, 2] / routing.gates[0, 1:].max())
        assert pixels[20 * row + 10, 20 * column + 10] == pytest.approx(
            opacity * expert_colours(3)[2] + 1 - opacity, abs=1e-6
        )


def test_small_patches_have_no_lines_that_would_fill_them():
    routing = make_routing()
    assert len(np.unique(choice_map(np.ones((14, 21, 3)), routing, 0).reshape(-1, 3), axis=0)) <= 6
    assert len(np.unique(choice_map(np.ones((16, 24, 3)), routing, 0).reshape(-1, 3), axis=0)) > 6


def test_entropy_map_is_white_for_a_sure_patch_and_darkest_for_an_undecided_one():
    gates = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.5, 0.5]]])
    chosen = gates.argmax(-1, keepdim=True)
    routing = LayerRouting(gates, chosen, gates.amax(-1, keepdim=True), torch.zeros_like(chosen).bool(), (1, 3), 0)
    assert entropies(routing)[0] == pytest.approx([0, -(0.9 * np.log2(0.9) + 0.1 * np.log2(0.1)), 1])
    pixels = entropy_map(np.ones((20, 60, 3)), routing)[10, 10::20].mean(-1)
    assert pixels[0] == pytest.approx(1) and pixels[0] > pixels[1] > pixels[2]


def test_dropped_map_darkens_by_the_share_of_dropped_choices():
    pixels = dropped_map(np.ones((20, 30, 3)), make_routing(dropped=[(1, 0), (1, 1), (2, 1), (0, 0)]))
    patches = pixels[5::10, 5::10, 0]
    assert patches[0, 0] < patches[0, 1] < 1
    assert (np.delete(patches.ravel(), [0, 1]) == 1).all()


def test_numbers_of_a_layer_by_hand():
    gates = torch.tensor([[[0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.5, 0.3]]])
    weights, chosen = gates.topk(2)
    dropped = torch.zeros_like(chosen, dtype=torch.bool)
    dropped[0, 2, 1] = dropped[0, 0, 0] = True
    numbers = describe_layer(LayerRouting(gates, chosen, weights, dropped, (1, 3), 1, prefix_names=("class token",)))
    assert numbers["grid"] == [1, 3]
    assert numbers["first_choice_share"] == pytest.approx([2 / 3, 1 / 3, 0])
    assert numbers["choice_share"] == pytest.approx([2 / 6, 2 / 6, 2 / 6])
    assert numbers["mean_gate"] == pytest.approx([1.3 / 3, 0.9 / 3, 0.8 / 3])
    assert (numbers["dropped_choices"], numbers["dropped_share"]) == (1, pytest.approx(1 / 6))
    (token,) = numbers["prefix_tokens"]
    assert token["token"] == "class token"
    assert token["experts"] == [2, 1]
    assert token["gates"] == pytest.approx([0.7, 0.2])
    assert token["dropped"] == [True, False]


def test_a_page_shows_the_maps_pixel_by_pixel():
    image = make_image(layer=make_routing(4, 4))
    page = draw_layer(image, "layer", "title", "subtitle")
    pixels = page.pixels()
    shown = page.figure.images[1]  # 0 is the picture, 1 the first choice
    side = shown.get_size()[0]
    left, top = shown.ox, page.height - shown.oy - side
    background = pale(np.repeat(np.repeat(image.detail, side // 16, 0), side // 16, 1) / 255)
    expected = choice_map(background, image.layers["layer"], 0)
    for row, column in np.ndindex(4, 4):
        y, x = int((row + 0.5) * side / 4), int((column + 0.5) * side / 4)
        assert pixels[top + y, left + x] == pytest.approx(255 * expected[y, x], abs=1)


def test_a_page_names_experts_tokens_and_drops():
    image = make_image(layer=make_routing(4, 4, prefix=3, dropped=[(5, 0), (6, 1)]))
    texts = shown_texts(draw_layer(image, "layer", "pay $5 for $6", "subtitle"))
    assert {"pay $5 for $6", "Second choice", "2 of 32 choices", "How undecided"} <= set(texts)
    assert {"0", "1", "2", "3"} <= set(texts)
    assert sum("class token" in text for text in texts) == 2  # of the first and of the second choice
    assert sum("register 2" in text for text in texts) == 2


def test_top_1_has_no_second_choice_and_nothing_dropped_is_said():
    texts = shown_texts(draw_layer(make_image(layer=make_routing(4, 4, top_k=1)), "layer", "title", "subtitle"))
    assert "Second choice" not in texts
    assert "no choice was dropped" in texts


def test_more_experts_than_colours_is_said():
    texts = shown_texts(draw_layer(make_image(layer=make_routing(4, 4, num_experts=40)), "layer", "title", "subtitle"))
    assert "39" in texts
    assert any("Colours repeat after 32 experts" in text for text in texts)


def test_the_overview_shows_each_layer():
    image = make_image(**{f"blocks.{index}.mlp": make_routing(4, 4, seed=index) for index in range(6)})
    texts = shown_texts(draw_overview(image, list(image.layers), "title", "subtitle"))
    assert set(image.layers) <= set(texts)


def make_model(moe):
    shape = {"num_classes": 5, "img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}
    torch.manual_seed(0)
    return vmoe.create_model("vit_tiny_patch16_224", moe, **shape).eval()


@pytest.mark.parametrize("size", [(16, 16), (3, 7), (300, 41)])
def test_an_image_is_prepared_as_in_evaluation(size):
    model = make_model(vmoe.MoeConfig(num_experts=4))
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    routed = route_image(model, image, 16, mean, std)
    with torch.no_grad(), vmoe.record_routing(model) as trace:
        logits = model(eval_transform(16, mean, std)(image)[None])
    assert routed.probabilities == pytest.approx(logits[0].softmax(-1).numpy(), abs=1e-6)
    assert list(routed.layers) == ["blocks.1.mlp", "blocks.3.mlp"]
    assert torch.equal(routed.layers["blocks.3.mlp"].chosen, trace.layers["blocks.3.mlp"].chosen)
    assert routed.model_input.shape == (16, 16, 3)
    assert routed.detail.shape[0] == max(16, min(size))


def test_a_dense_model_has_nothing_to_draw():
    with pytest.raises(UserError, match="dense"):
        route_image(make_model(None), np.zeros((16, 16, 3), np.uint8), 16, (0.5,) * 3, (0.5,) * 3)


def test_layers_are_selected_by_name_or_block():
    model = make_model(vmoe.MoeConfig(num_experts=4))
    assert select_layers(model, None) == ["blocks.1.mlp", "blocks.3.mlp"]
    assert select_layers(model, ["3"]) == select_layers(model, ["blocks.3.mlp", "3"]) == ["blocks.3.mlp"]
    with pytest.raises(UserError, match=r"--layers 2: .*blocks\.1\.mlp, blocks\.3\.mlp"):
        select_layers(model, ["2"])


def test_names_do_not_collide(tmp_path):
    paths = [tmp_path / name for name in ("a/cat.png", "b/cat.jpg", "cat-2.png", "CAT.gif", "dog.png")]
    names = output_names(paths)
    assert names[0] == "cat" and names[4] == "dog"
    assert len({name.casefold() for name in names}) == 5


@pytest.mark.parametrize("router", ["expert_choice", "soft"])
def test_slot_routers_are_drawn_by_what_each_expert_adds(router):
    model = make_model(vmoe.MoeConfig(num_experts=4, router=router, capacity_factor=1.0))
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    routed = route_image(model, image, 16, (0.5,) * 3, (0.5,) * 3)
    name = next(iter(routed.layers))
    routing = routed.layers[name]
    with vmoe.record_routing(model) as trace:
        model(eval_transform(16, (0.5,) * 3, (0.5,) * 3)(image)[None])
    shares = trace.layers[name].combine.sum(-1)
    torch.testing.assert_close(routing.gates, shares)
    weights = shares.topk(2).values
    torch.testing.assert_close(shares.gather(-1, routing.chosen.clamp_min(0)).where(routing.chosen >= 0, 0), weights)
    assert torch.equal(routing.chosen < 0, weights == 0)
    assert torch.equal(routing.dropped[..., 0], shares.sum(-1) == 0)
    lost = int(routing.dropped[0, 1:].sum())
    assert (lost > 0) == (router == "expert_choice")
    texts = shown_texts(draw_layer(routed, name, "title", "facts"))
    assert {"Largest share", "Second largest share"} <= set(texts)
    assert (f"{lost} of 16 patches" in texts) == (lost > 0)
    numbers = describe_layer(routing)
    assert sum(numbers["first_choice_share"]) == pytest.approx(1 - lost / 16)
    assert sum(numbers["choice_share"]) == pytest.approx(1)
    chosen = routing.chosen[0, 1:]
    assert numbers["choice_share"][0] == pytest.approx(int((chosen == 0).sum()) / int((chosen >= 0).sum()))


def test_patches_are_drawn_where_they_are_in_the_image():
    """A backbone that keeps its tokens in another order than row by row."""
    order = torch.tensor([3, 2, 1, 0])
    gates = torch.eye(4)[None]
    chosen = torch.arange(4).view(1, 4, 1)
    routing = LayerRouting(gates, chosen, torch.ones(1, 4, 1), torch.zeros(1, 4, 1, dtype=torch.bool), (2, 2), 0, order)
    assert drawable(routing).chosen.flatten().tolist() == [3, 2, 1, 0]


def test_pages_say_how_to_read_them_and_where_they_come_from():
    image = make_image(one=make_routing(4, 4), two=make_routing(2, 2, num_experts=8, prefix=5))
    footer = ["checkpoint runs/a · epoch 3", "command: vmoe heatmap " + " ".join(f"{i}.jpg" for i in range(500))]
    for page in (
        draw_layer(image, "one", "title", "subtitle", footer),
        draw_overview(image, ["one", "two"], "title", "subtitle", footer),
    ):
        texts = shown_texts(page)
        assert footer[0] in texts
        assert any(text.startswith("command: vmoe heatmap 0.jpg") and text.endswith("…") for text in texts)
        assert any("Opacity is the gate" in text for text in texts)
        page.pixels()
        renderer = page.canvas.get_renderer()
        for text in page.figure.findobj(Text):
            box = text.get_window_extent(renderer)
            assert box.x0 >= 0 and box.x1 <= page.width and box.y0 >= 0 and box.y1 <= page.height, text.get_text()


def test_layers_with_grids_of_their_own_stand_beside_each_other():
    """Grids that do not divide each other, as where a backbone rounds."""
    image = make_image(one=make_routing(7, 7, prefix=0), two=make_routing(3, 5, prefix=0))
    texts = shown_texts(draw_overview(image, ["one", "two"], "title", "subtitle"))
    assert {"one", "two", "Picture"} <= set(texts)
