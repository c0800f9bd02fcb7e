"""`explore` end to end: any router and backbone, planted specialists in a model, nothing changed by looking."""

import json
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import timm
import torch
from matplotlib.text import Text
from torch import nn

import vmoe
from vmoe import MoeConfig, MoeMlp
from vmoe.data.loading import Batch
from vmoe.data.patchwork import OBJECTS, PATCH_NAMES, make_patchwork
from vmoe.errors import UserError
from vmoe.explain.explorer import DataFacts, ExploreOptions, Subject, explore
from vmoe.explain.explorer.collection import collect
from vmoe.explain.explorer.figures import draw_figures
from vmoe.explain.explorer.galleries import draw_galleries
from vmoe.explain.page import write_page
from vmoe.moe.routers import _forced
from vmoe.moe.routing import Routed

FEW = ExploreOptions(sample=20, probe_images=20, cause_images=20, capacity_factors=(0.5, 1.0), replicates=20)
COUNT_ONLY = replace(FEW, probe_images=0, cause_images=0)


def check(exploration, images, layers, experts, grids):
    """What holds of every report."""
    report, sample = exploration.report, exploration.images
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["provenance"]["num_images"] == images
    assert [layer["name"] for layer in report["layers"]] == layers
    for layer, maps, grid in zip(report["layers"], sample["layers"], grids, strict=True):
        rows, columns = grid
        assert layer["grid"] == [rows, columns] and layer["num_experts"] == experts
        assert sum(layer["load"]) == pytest.approx(experts, rel=1e-4)
        assert sum(layer["experts_per_image"]["histogram"]) == images
        assert np.shape(layer["class_log_ratio"]["matrix"]) == (experts, len(report["classes"]))
        assert sorted(layer["class_log_ratio"]["order"]) == list(range(len(report["classes"])))
        assert np.shape(layer["coactivation"]) == (experts, experts)
        tokens = layer["prefix"] + rows * columns
        assert maps["gates"].shape == (min(images, 20), tokens, experts)
        assert maps["chosen"].shape[:2] == maps["entropy"].shape == maps["gates"].shape[:2]
        for expert in layer["experts"]:
            assert np.shape(expert["position"]) == (rows, columns)
            for told in [*expert["top"], *expert["random"]]:
                assert told["patch"] < rows * columns
                gate = maps["gates"][told["image"], layer["prefix"] + told["patch"], layer["experts"].index(expert)]
                assert told["gate"] == pytest.approx(float(gate), abs=1e-3)
    for flow in report["flows"]:
        assert np.sum(flow["matrix"]) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    "router",
    [
        *("token_choice", "hash", "expert_choice", "soft"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sigmoid", "cosine", "random", "balanced")),
    ],
)
def test_every_router(make_model, make_batches, router):
    found = explore(make_model(router), make_batches(), options=FEW)
    check(found, 60, ["blocks.1.mlp", "blocks.3.mlp"], 4, [(4, 6)] * 2)
    layer = found.report["layers"][0]
    fills_slots = router in ("expert_choice", "soft")
    assert layer["kind"] == ("slots" if fills_slots else "tokens") and layer["router"] == router
    assert (layer["top_k"] is None) == (found.images["layers"][0]["dispatch"] is not None) == fills_slots
    assert (layer["dropped"] is None) == (router == "soft") == (found.report["capacity"] is None)
    assert (layer["ablation"] is None) == (router in ("hash", "random", "balanced"))
    assert set(layer["random_router"]) == {"change", "low", "high"}


def test_class_and_register_tokens_stand_apart(make_model, make_batches):
    found = explore(make_model(model={"reg_tokens": 2}), make_batches(), options=FEW)
    check(found, 60, ["blocks.1.mlp", "blocks.3.mlp"], 4, [(4, 6)] * 2)
    assert found.report["layers"][0]["prefix"] == 3
    assert found.report["layers"][0]["prefix_names"] == ["class token", "register 1", "register 2"]


def test_a_whole_image_is_one_place(make_model, make_batches):
    """All that is said of an expert is said of images; experts of a shared router can be taken away too."""
    model = make_model(route="image", shared_router=True, capacity_factor=None)
    found = explore(model, make_batches(), options=FEW)
    check(found, 60, ["blocks.1.mlp", "blocks.3.mlp"], 4, [(1, 1)] * 2)
    report = found.report
    assert report["findings"][0].startswith("Images are routed as a whole")
    assert report["findings"][1].startswith("The layers share the router of blocks.1.mlp")
    assert not any("position" in line for line in report["findings"])
    assert report["capacity"] is None
    assert [len(layer["ablation"]) for layer in report["layers"]] == [4, 4]
    drawn = dict(chain(draw_figures(report), draw_galleries(report, found.images)))
    assert not drawn.keys() & {"flows", "experts-per-image"}
    texts = [text.get_text() for page in drawn.values() for text in page.figure.findobj(Text)]
    assert not [text for text in texts if "patch" in text or "position" in text]


def test_windows_and_stages_of_swin(make_swin, make_batches):
    found = explore(make_swin(), make_batches(size=(32, 32)), options=FEW)
    names = [layer["name"] for layer in found.report["layers"]]
    check(found, 60, names, 4, [(8, 8), (4, 4)])
    assert found.report["layers"][0]["prefix"] == 0


def test_looking_changes_no_logit(make_model, make_batches):
    model, batches = make_model(eval_capacity_factor=0.7), make_batches()
    before = [model(images) for images, _ in batches]
    explore(model, batches, options=FEW)
    assert all(torch.equal(model(images), logits) for (images, _), logits in zip(batches, before, strict=True))
    assert vmoe.moe_layers(model)[0][1].config.eval_capacity_factor == 0.7
    seen = []
    handle = model.register_forward_hook(lambda _, inputs, logits: seen.append(logits.clone()))
    collect(Subject("", model, list("abcde"), (0.5,) * 3, (0.5,) * 3), batches, replicates=20, sample=5)
    handle.remove()
    assert all(torch.equal(logits, recorded) for logits, recorded in zip(before, seen, strict=True))


def test_batch_sizes_change_no_count(make_model, make_batches):
    one, other = (explore(make_model(), make_batches(batch=size), options=COUNT_ONLY).report for size in (60, 7))
    for here, there in zip(one["layers"], other["layers"], strict=True):
        assert here["load"] == pytest.approx(there["load"], rel=1e-4)
        assert here["experts_per_image"] == there["experts_per_image"]
        assert here["specialisation"]["class"]["nmi"] == pytest.approx(
            there["specialisation"]["class"]["nmi"], abs=1e-3
        )
    assert one["accuracy"] == other["accuracy"]


def test_counts_are_those_of_the_records(make_model, make_batches):
    model, batches = make_model(eval_capacity_factor=0.5, group=1), make_batches()
    layer = explore(model, batches, options=COUNT_ONLY).report["layers"][1]
    with vmoe.record_routing(model) as trace:
        logits = torch.cat([model(images) for images, _ in batches])
    routing = trace.layers["blocks.3.mlp"]
    assert layer["load"] == pytest.approx(
        (torch.bincount(routing.chosen.flatten()) / 60 / 25 / 2 * 4).tolist(), rel=1e-4
    )
    assert layer["dropped"] == pytest.approx(float(routing.dropped.double().mean()), rel=1e-4)
    entropy = -(routing.gates * routing.gates.log()).sum(-1).mean()
    assert layer["entropy"] == pytest.approx(float(entropy), rel=1e-4)
    per_image = [len(chosen[1:].unique()) for chosen in routing.chosen]
    assert layer["experts_per_image"]["mean"] == pytest.approx(np.mean(per_image), rel=1e-4)
    position = routing.on_grid(torch.nn.functional.one_hot(routing.chosen, 4).sum(2))[..., 2].double().sum(0)
    assert np.allclose(layer["experts"][2]["position"], position / position.mean(), rtol=1e-3)
    labels = torch.cat([labels for _, labels in batches])
    accuracy = float((logits.argmax(-1) == labels).double().mean())
    assert explore(model, batches, options=COUNT_ONLY).report["accuracy"]["value"] == pytest.approx(accuracy, abs=1e-6)


class Planted(nn.Module):
    """Shows its MoE layer a token a patch; the router reads the expert from the patch's last blue pixel."""

    def __init__(self, router: str) -> None:
        super().__init__()
        self.num_classes = len(OBJECTS)
        self.mlp = MoeMlp(3, moe=MoeConfig(num_experts=12, top_k=1, router=router))
        if router == "hash":
            self.mlp.router = ReadsTheLabel()

    def forward(self, x):
        tokens = x[:, :, 7::8, 7::8].flatten(2).transpose(1, 2)
        return self.mlp(tokens).mean(1) @ torch.ones(3, self.num_classes)


class ReadsTheLabel(nn.Module):
    def forward(self, x, groups, valid=None, kernels=None):
        return Routed(_forced(groups, valid, (x[:, 2:] * 255).round().long(), 12, torch.float32), x)


@pytest.mark.parametrize(("router", "is_planted"), [("hash", True), ("random", False)])
def test_planted_specialists_are_found_in_a_model_and_random_routers_are_not(router, is_planted):
    torch.manual_seed(0)
    pixels, labels, patches = make_patchwork(300, seed=2)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    images[:, 2, 7::8, 7::8] = torch.from_numpy(patches).float() / 255
    parts = [torch.from_numpy(labels).split(100), torch.from_numpy(patches).split(100)]
    batches = [Batch(x, y, [], known) for x, y, known in zip(images.split(100), *parts, strict=True)]
    subject = Subject("planted", Planted(router), OBJECTS, (0.0,) * 3, (1.0,) * 3)
    found = explore(subject, batches, data=DataFacts(PATCH_NAMES), options=replace(COUNT_ONLY, replicates=50)).report
    (layer,) = found["layers"]
    label = layer["specialisation"]["patch label"]
    if is_planted:
        assert label["nmi"] == pytest.approx(1) and label["beats_null"]
        assert layer["patch_label_log_ratio"]["matrix"][3][3] > 1.5 > 0 > layer["patch_label_log_ratio"]["matrix"][3][4]
        assert any(line.startswith("Experts go strongly with the patch label") for line in found["findings"])
    else:
        assert not any(part["beats_null"] for part in layer["specialisation"].values())
        assert not any("Experts go" in line for line in found["findings"])


def test_other_runs_stand_beside_it(make_model, make_batches):
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    others = [
        Subject("stranger", make_model(seed=1, num_experts=3), list("abcde"), **half),
        Subject("dense", make_model(dense=True), list("abcde"), **half),
    ]
    subject = Subject("sparse", make_model(), list("abcde"), **half)
    found = explore(subject, make_batches(), others=others, options=FEW).report
    assert [run["name"] for run in found["runs"]] == ["sparse", "stranger", "dense"]
    assert [run["is_dense"] for run in found["runs"]] == [False, False, True]
    assert found["runs"][2]["layers"] == [] and len(found["runs"][1]["layers"]) == 2
    assert [part["run"] for part in found["agreement"]] == ["stranger"]
    for part in found["agreement"][0]["layers"].values():
        assert part["value"] < 0.9
    assert any("of dense (dense)" in line for line in found["findings"])


def test_each_run_sees_images_as_it_was_trained_on_them(make_model):
    one = Subject("", make_model(), list("abcde"), (0.5,) * 3, (0.5,) * 3)
    other = replace(one, mean=(0.4, 0.5, 0.6), std=(0.25,) * 3)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = one.as_seen_by(other, (pixels - 0.5) / 0.5)
    torch.testing.assert_close(seen, (pixels - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / 0.25)
    assert one.as_seen_by(one, pixels) is pixels
    assert one.as_seen_by(replace(other, image_size=24), pixels).shape == (2, 3, 24, 24)


def test_a_router_agrees_with_itself_renumbered(make_model, make_batches):
    model, twin = make_model(), make_model()
    permuted = torch.tensor([2, 0, 3, 1])
    for _, layer in vmoe.moe_layers(twin):
        layer.router.gate.weight.data = layer.router.gate.weight.data[permuted]
        for parameter in layer.experts.parameters():
            parameter.data = parameter.data[permuted]
    other = Subject("twin", twin, list("abcde"), (0.5,) * 3, (0.5,) * 3)
    found = explore(replace(other, name="one", model=model), make_batches(), others=[other], options=FEW).report
    for part in found["agreement"][0]["layers"].values():
        assert part["value"] == pytest.approx(1) and part["null_high"] < 0.9


@pytest.mark.parametrize("count", [1, 60])
def test_without_labels_what_needs_none_stays_the_same(make_model, make_batches, count):
    model, batches = make_model(), make_batches(count)
    bare = [(images, None) for images, _ in batches]
    other = Subject("other", make_model(seed=1), list("abcde"), (0.5,) * 3, (0.5,) * 3)
    names = [f"photo {number}.jpg" for number in range(count)]
    found = explore(model, bare, others=[other], data=DataFacts(image_names=names), options=FEW)
    labelled = explore(model, batches, others=[other], options=FEW).report
    report, images = found.report, found.images
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["accuracy"] is report["capacity"] is report["runs"][1]["accuracy"] is None
    assert report["provenance"]["cause_images"] == 0
    for layer, known in zip(report["layers"], labelled["layers"], strict=True):
        assert layer["class_log_ratio"] is layer["ablation"] is layer["random_router"] is None
        assert all(expert["classes"] == [] for expert in layer["experts"])
        assert layer["load"] == known["load"] and layer["consistency"] == known["consistency"]
        assert set(layer["specialisation"]) == {"position", "colour", "brightness", "edges"}
        assert layer["specialisation"] == {name: known["specialisation"][name] for name in layer["specialisation"]}
    assert report["flows"] == labelled["flows"] and report["agreement"] == labelled["agreement"]
    assert not any("ccuracy" in line or "class" in line for line in report["findings"])
    assert (images["label"] == -1).all()
    assert images["name"].tolist() == [f"photo {number}.jpg" for number in images["number"]]


def test_images_may_have_several_classes_or_none(make_model, make_batches, tmp_path):
    model = make_model()
    images = torch.cat([batch[0] for batch in make_batches()])
    with torch.no_grad():
        logits = model(images)
    labels = (logits > 0).to(torch.int8)
    labels[:20] = 1 - labels[:20]  # of which no class is right
    labels[20] = 0
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    found = explore(model, batches, options=replace(FEW, sample=60))
    report = found.report
    right = ((logits > 0) == (labels > 0)).all(-1)
    assert report["multi_label"] is True and report["accuracy"]["value"] == pytest.approx(float(right.double().mean()))
    (row,) = np.flatnonzero(found.images["number"] == 20)
    assert found.images["label"].shape == found.images["predicted"].shape and not found.images["label"][row].any()
    layer = report["layers"][0]
    assert len(layer["class_log_ratio"]["matrix"][0]) == len(layer["ablation"][0]["by_class"]) == 5
    write_page(report, found.images, tmp_path / "index.html")
    assert '"label":[[' in (tmp_path / "index.html").read_text()
    of_one = Subject("of one", model, list("abcde"), (0.5,) * 3, (0.5,) * 3, multi_label=False)
    with pytest.raises(UserError, match="of one: knows one class per image, and these images have several"):
        explore(of_one, batches, options=FEW)


def test_naflex_models_are_explored_on_images_of_one_size(make_batches):
    torch.manual_seed(0)
    shape = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5, "init_values": 1.0}  # experts that are seen
    model = timm.create_model("naflexvit_base_patch16_gap", **shape)
    model = vmoe.sparsify(model, MoeConfig(layers="every-1", num_experts=4)).eval()
    found = explore(model, make_batches(20, size=(64, 48)), options=FEW)
    check(found, 20, ["blocks.0.mlp", "blocks.1.mlp"], 4, [(4, 3)] * 2)


def test_images_of_several_sizes_are_refused(make_model, make_batches):
    (images, labels), *_ = make_batches(16)
    model = make_model(model={"dynamic_img_size": True})
    naflex = {"patches": torch.zeros(2, 8, 48), "patch_coord": torch.zeros(2, 8, 2), "patch_valid": torch.ones(2, 8)}
    for batches, named in (
        (
            [(images, labels), (images[:, :, :8], labels)],
            r"differ in size: blocks.1.mlp had \(4, 6\) patches, then \(2",
        ),
        ([(naflex, labels)], "NaFlex"),
    ):
        with pytest.raises(UserError, match=named):
            explore(model, batches, options=COUNT_ONLY)


def test_mistakes(make_model, make_batches):
    with pytest.raises(UserError, match="a dense model without experts"):
        explore(make_model(dense=True), make_batches())
    with pytest.raises(UserError, match="no images"):
        explore(make_model(), [])
    broken = make_model()
    broken.head.bias.data[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        explore(broken, make_batches())
    for knobs in ({"sample": 0}, {"replicates": 3}, {"probe_images": -1}, {"cause_images": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            ExploreOptions(**knobs)


def test_without_probes_and_causes_their_parts_are_empty(make_model, make_batches):
    report = explore(make_model(), make_batches(), options=COUNT_ONLY).report
    assert report["capacity"] is report["agreement"] is report["saturation"] is report["training"] is None
    assert all(
        layer["ablation"] is layer["consistency"] is layer["random_router"] is None for layer in report["layers"]
    )


def test_the_sample_is_uniform_and_bounded(make_model, make_batches):
    model, batches = make_model(), make_batches(200)
    found = [explore(model, batches, options=replace(COUNT_ONLY, seed=seed)).images for seed in (0, 1)]
    taken = [images["number"] for images in found]
    assert all(len(set(numbers)) == 20 and (np.diff(numbers) > 0).all() for numbers in taken)
    assert 60 < np.mean(taken) < 140 and (taken[0] != taken[1]).any()
    images = found[0]
    shown = torch.cat([images for images, _ in batches])[images["number"][0]] * 0.5 + 0.5
    assert np.abs(images["pixels"][0] - 255 * shown.clamp(0, 1).permute(1, 2, 0).numpy()).max() <= 0.5 + 1e-3
