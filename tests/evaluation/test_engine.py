"""Figures of an evaluation against hand-computed cases, torchmetrics and the recorded routing."""

import math
import time

import pytest
import timm
import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_average_precision,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
    multilabel_auroc,
    multilabel_average_precision,
    multilabel_f1_score,
)

import vmoe
from vmoe.errors import UserError
from vmoe.evaluation.curves import best_thresholds
from vmoe.evaluation.engine import (
    eval_capacity_factor,
    evaluate_sweep,
    measure_batches,
)
from vmoe.evaluation.ensemble import Ensemble, RunningMemberFigures
from vmoe.evaluation.metrics import RunningMetrics, RunningMultiLabelMetrics

SHAPE = {"num_classes": 10, "img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 4, "num_heads": 3}


def make_model(**moe):
    torch.manual_seed(0)
    return vmoe.create_model("vit_tiny_patch16_224", vmoe.MoeConfig(**moe) if moe else None, **SHAPE)


def make_batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 16, 16, generator=generator), torch.randint(10, (size,), generator=generator), [])
        for size in sizes
    ]


def measure(probabilities, labels):
    probabilities = torch.tensor(probabilities)
    metrics = RunningMetrics(probabilities.shape[1])
    metrics.update(probabilities.log(), torch.tensor(labels))
    return metrics.compute()


def test_hand_computed_figures():
    figures = measure([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.95, 0.05]], [0, 1, 1, 0])
    assert figures["images"] == 4
    assert figures["top1"] == 0.75
    assert figures["top5"] == 1  # two classes: top-2
    assert figures["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.3) + math.log(0.8) + math.log(0.95)) / 4)
    assert figures["confusion"] == [[2, 0], [1, 1]]
    assert figures["class_accuracy"] == [1, 0.5] and figures["balanced_accuracy"] == 0.75
    assert figures["class_precision"] == [pytest.approx(2 / 3), 1]
    assert figures["class_f1"] == pytest.approx([4 / 5, 2 / 3]) and figures["f1"] == pytest.approx(11 / 15)
    # Bins of 1/15: .9 in the 14th, .7 in the 11th, .8 in the 12th, .95 in the 15th, one image each:
    # (|.9 - 1| + |.7 - 0| + |.8 - 1| + |.95 - 1|) / 4
    assert figures["ece"] == pytest.approx((0.1 + 0.7 + 0.2 + 0.05) / 4, abs=1e-6)
    # Of two classes both are as far off
    assert figures["brier"] == pytest.approx(2 * (0.1**2 + 0.7**2 + 0.2**2 + 0.05**2) / 4, abs=1e-6)


def test_images_of_one_bin_cancel_before_the_calibration_error():
    # Two images in the bin (9/15, 10/15]: mean confidence .63, accuracy .5.
    assert measure([[0.62, 0.38], [0.64, 0.36]], [0, 1])["ece"] == pytest.approx(0.13, abs=1e-6)


def test_certain_predictions_fall_in_the_last_bin():
    figures = measure([[1.0, 1e-30], [1.0, 1e-30]], [0, 0])
    assert figures["ece"] == pytest.approx(0, abs=1e-7)
    assert figures["nll"] == pytest.approx(0, abs=1e-7)


def test_a_class_without_images_has_no_accuracy():
    figures = measure([[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]], [0, 0])
    assert figures["class_accuracy"] == [0.5, None, None] and figures["balanced_accuracy"] == 0.5
    assert figures["class_precision"] == [1, 0, None]  # one image was taken for the second class, none for the third
    assert figures["class_f1"] == [pytest.approx(2 / 3), None, None] and figures["f1"] == pytest.approx(2 / 3)


def test_streaming_agrees_with_torchmetrics():
    generator = torch.Generator().manual_seed(3)
    logits, labels = 3 * torch.randn(257, 12, generator=generator), torch.randint(12, (257,), generator=generator)
    metrics = RunningMetrics(12, ranks_images=True)
    for part in torch.arange(257).split(100):
        metrics.update(logits[part], labels[part])
    figures = metrics.compute()
    assert figures["top1"] == pytest.approx(float(multiclass_accuracy(logits, labels, 12, average="micro")))
    assert figures["top5"] == pytest.approx(float(multiclass_accuracy(logits, labels, 12, average="micro", top_k=5)))
    assert figures["ece"] == pytest.approx(
        float(multiclass_calibration_error(logits.softmax(-1), labels, 12, n_bins=15)), abs=1e-6
    )
    assert figures["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-6)
    assert figures["confusion"] == multiclass_confusion_matrix(logits, labels, 12).tolist()
    for name, of_torchmetrics in (("f1", multiclass_f1_score), ("balanced_accuracy", multiclass_recall)):
        assert figures[name] == pytest.approx(float(of_torchmetrics(logits, labels, 12, average="macro")), rel=1e-6)
    for name, of_torchmetrics in (("auroc", multiclass_auroc), ("average_precision", multiclass_average_precision)):
        assert figures[f"class_{name}"] == pytest.approx(of_torchmetrics(logits, labels, 12, average="none").tolist())
        assert figures[name] == pytest.approx(float(of_torchmetrics(logits, labels, 12, average="macro")))
    precision = multiclass_precision(logits, labels, 12, average="none").tolist()
    assert figures["class_precision"] == pytest.approx(precision, rel=1e-6)


def test_precision_over_recall_by_hand():
    """Of the second class the images rank right, wrong, right: precision 1 up to half of them, 2/3 for all."""
    metrics = RunningMetrics(3, ranks_images=True)
    probabilities = torch.tensor([[0.1, 0.9, 0], [0.2, 0.8, 0], [0.3, 0.7, 0], [0.6, 0.4, 0]])
    metrics.update((probabilities + 1e-9).log(), torch.tensor([1, 0, 1, 0]))
    figures = metrics.compute()
    curve = figures["class_precision_at_recall"][1]
    assert curve == pytest.approx([1.0] * 11 + [2 / 3] * 10, abs=1e-6)
    assert figures["class_average_precision"][1] == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert figures["class_auroc"] == [0.75, 0.75, None] and figures["auroc"] == 0.75


def test_figures_of_several_classes_are_torchmetrics_s():
    generator = torch.Generator().manual_seed(4)
    labels = (torch.rand(300, 5, generator=generator) < torch.tensor([0.6, 0.3, 0.2, 0.1, 0.0])).to(torch.int8)
    logits = torch.randn(300, 5, generator=generator) + labels
    thresholds = [0.5, 0.6, 0.7, 0.4, 0.3]
    metrics = RunningMultiLabelMetrics(5, thresholds=thresholds)
    for part in (slice(0, 200), slice(200, 300)):
        metrics.update(logits[part], labels[part])
    figures, there = metrics.compute(), labels.long()
    found = (logits.sigmoid() >= torch.tensor(thresholds)).long()
    assert figures["f1_micro"] == pytest.approx(float(multilabel_f1_score(found, there, 5, average="micro")))
    of_classes = multilabel_f1_score(found, there, 5, average="none").tolist()
    assert figures["class_f1"][:4] == pytest.approx(of_classes[:4]) and figures["class_f1"][4] is None
    assert figures["f1_macro"] == pytest.approx(sum(of_classes[:4]) / 4)
    assert figures["exact_match"] == pytest.approx(float((found == there).all(1).double().mean()))
    average = multilabel_average_precision(logits, there, 5, average="none").tolist()
    assert figures["class_average_precision"][:4] == pytest.approx(average[:4])
    assert figures["average_precision"] == pytest.approx(sum(average[:4]) / 4)
    areas = multilabel_auroc(logits, there, 5, average="none").tolist()
    assert figures["class_auroc"][:4] == pytest.approx(areas[:4]) and figures["class_auroc"][4] is None
    assert figures["images"] == 300 and figures["class_images"] == labels.sum(0).tolist()
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
    assert figures["bce"] == pytest.approx(float(bce), rel=1e-6)


def test_the_best_thresholds_part_a_class_s_scores():
    scores = torch.tensor([[0.9, 0.2], [0.7, 0.3], [0.3, 0.8], [0.1, 0.9]])
    labels = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 0]])
    assert best_thresholds(scores, labels) == [pytest.approx(0.5), 0.5]  # half-way; and a class without images
    assert best_thresholds(scores[:2], labels[:2])[0] == pytest.approx(0.7)  # every image has it


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    metrics = RunningMetrics(3)
    metrics.update(torch.tensor([[0.0, bad, 1.0]]), torch.tensor([0]))
    with pytest.raises(UserError, match="not finite"):
        metrics.compute()


def test_a_set_without_images_is_refused():
    with pytest.raises(UserError, match="no images"):
        measure_batches(make_model(), [], 10)


def test_dropped_shares_and_loads_are_those_of_the_routing():
    model, batches = make_model(num_experts=4, eval_capacity_factor=0.5).eval(), make_batches(8, 8, 3)
    result = measure_batches(model, batches, 10)
    dropped, chosen = [], []
    for images, *_ in batches:
        with vmoe.record_routing(model) as trace:
            model(images)
        dropped.append(torch.stack([layer.dropped for layer in trace.layers.values()], 1))
        chosen.append(torch.stack([layer.chosen for layer in trace.layers.values()], 1))
    dropped, chosen = torch.cat(dropped), torch.cat(chosen)  # (B, layers, N, K)
    assert 0.2 < result.dropped < 0.8
    assert result.dropped == pytest.approx(float(dropped.double().mean()), abs=1e-6)
    for index, (name, use) in enumerate(result.layers.items()):
        assert name == f"blocks.{2 * index + 1}.mlp"
        assert use.dropped == pytest.approx(float(dropped[:, index].double().mean()), abs=1e-6)
        shares = torch.bincount(chosen[:, index].flatten(), minlength=4) / chosen[:, index].numel()
        assert use.load == pytest.approx((4 * shares).tolist(), abs=1e-5)
    assert result.capacity_factor == 0.5


def test_layers_weigh_by_their_choices_where_stages_see_fewer_tokens():
    torch.manual_seed(0)
    shape = {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": (2, 2), "num_heads": (2, 2)}
    dense = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, img_size=16, **shape)
    model = vmoe.sparsify(dense, vmoe.MoeConfig(num_experts=4, top_k=2, eval_capacity_factor=1.0)).eval()
    model.layers[1].blocks[1].mlp.router.gate.weight.data.zero_()  # two experts take all of the stage of fewer tokens
    (batch,) = make_batches(8)
    result = measure_batches(model, [batch], 10)
    with torch.no_grad(), vmoe.record_routing(model) as trace:
        model(batch[0])
    each = [layer.dropped.flatten() for layer in trace.layers.values()]
    assert len(each[0]) == 4 * len(each[1])  # 8 x 8 and 4 x 4 places
    assert [use.dropped for use in result.layers.values()] == pytest.approx([float(x.double().mean()) for x in each])
    assert result.dropped == pytest.approx(float(torch.cat(each).double().mean()), abs=1e-6)


def test_capacity_factors_are_swept_and_the_own_one_restored():
    model = make_model(num_experts=4, eval_capacity_factor=2.0)
    results = list(evaluate_sweep(model, make_batches(8, 8), 10, [0.25, 1.0, math.inf]))
    assert [result.capacity_factor for result in results] == [0.25, 1.0, None]
    assert results[0].dropped > results[1].dropped > results[2].dropped == 0
    assert eval_capacity_factor(model) == 2.0


def test_experts_a_token_are_swept_and_the_own_number_restored():
    model, batches = make_model(num_experts=4, top_k=2), make_batches(8, 8)
    own = measure_batches(model, batches, 10)
    results = list(evaluate_sweep(model, batches, 10, [1.0, math.inf], [1, 2, 4]))
    assert [(result.top_k, result.capacity_factor) for result in results] == [
        (top_k, factor) for top_k in (1, 2, 4) for factor in (1.0, None)
    ]
    assert results[3].nll == own.nll and len({result.nll for result in results[1::2]}) == 3
    for name, use in results[5].layers.items():  # all four experts take every token
        assert use.load == pytest.approx([1, 1, 1, 1]), name
    with vmoe.record_routing(model) as trace:
        model(batches[0][0])
    assert trace.layers["blocks.1.mlp"].chosen.shape[-1] == 2
    assert eval_capacity_factor(model) is None


def test_a_capacity_grows_with_the_experts_a_token():
    model = make_model(num_experts=4, top_k=1, group="image", capacity_multiple_of=1)
    (result,) = evaluate_sweep(model, make_batches(8), 10, [1.0], [4])
    assert result.dropped == 0  # K = E = 4: each expert has a place for each of the 17 tokens


@pytest.mark.parametrize("top_ks", [[9], [2, 9]])
def test_more_experts_a_token_than_there_are_is_refused_before_anything_is_measured(top_ks):
    model = make_model(num_experts=4, top_k=1)
    with pytest.raises(UserError, match=r"^top_k=9: must be at most num_experts=4"):
        next(evaluate_sweep(model, make_batches(2), 10, None, top_ks))
    assert measure_batches(model, make_batches(2), 10).top_k == 1


def test_experts_that_choose_have_no_number_a_token():
    model = make_model(num_experts=4, router="expert_choice")
    with pytest.raises(UserError, match=r"^top_k=2: .*expert_choice"):
        next(evaluate_sweep(model, make_batches(2), 10, None, [2]))
    assert measure_batches(model, make_batches(2), 10).top_k is None


@pytest.mark.parametrize(
    ("router", "factor", "reason"),
    [
        ("token_choice", 2000.0, "2000: must be > 0 and at most 1000, or inf to drop nothing"),
        ("token_choice", 1000.0001, "1000.0001: must be > 0 and at most 1000, or inf to drop nothing"),
        *[
            ("soft", each, f'{each:g}: must be inf with router="soft": the slots are part of its parameters')
            for each in (0.5, 2000.0)
        ],
        *[
            (
                "expert_choice",
                each,
                f'{each:g}: must be > 0 and at most 1000 with router="expert_choice", where experts fill slots',
            )
            for each in (2000.0, math.inf)
        ],
    ],
)
def test_a_capacity_that_cannot_be_set_is_told_as_the_options(router, factor, reason):
    model = make_model(num_experts=4, router=router)
    with pytest.raises(UserError) as told:
        list(evaluate_sweep(model, make_batches(2), 10, [factor]))
    assert str(told.value) == f"capacity_factor={reason}"


def test_each_member_of_an_ensemble_gets_its_own_settings_back():
    own = [{"top_k": 1, "eval_capacity_factor": 0.5}, {"top_k": 3}]
    members = [make_model(num_experts=4, **moe) for moe in own]
    layers = [layer for member in members for _, layer in vmoe.moe_layers(member)]
    before = [(layer.config, layer.router.top_k) for layer in layers]
    assert len(list(evaluate_sweep(Ensemble(members), make_batches(2), 10, [1.0, math.inf], [2, 4]))) == 4
    assert [(layer.config, layer.router.top_k) for layer in layers] == before


def test_members_of_an_ensemble_may_have_different_routers():
    members = [make_model(num_experts=4, router=router) for router in ("token_choice", "expert_choice", "soft")]
    assert len(list(evaluate_sweep(Ensemble(members), make_batches(2), 10))) == 1


def test_a_dense_model_has_no_capacity():
    with pytest.raises(UserError, match="capacity_factor=1: this"):
        list(evaluate_sweep(make_model(), make_batches(2), 10, [1.0]))
    with pytest.raises(UserError, match="top_k=1: this"):
        list(evaluate_sweep(make_model(), make_batches(2), 10, None, [1]))
    result = measure_batches(make_model(), make_batches(2), 10)
    assert (result.dropped, result.layers, result.capacity_factor) == (None, {}, None)


def test_images_per_second_leave_out_the_first_batch():
    def slow_start():
        for index, batch in enumerate(make_batches(4, 4, 4)):
            time.sleep(1.0 if index == 0 else 0)
            yield batch

    model = make_model()
    measure_batches(model, make_batches(4), 10)  # warm
    assert measure_batches(model, slow_start(), 10).images_per_second > 8 / 1.0
    assert measure_batches(model, make_batches(4), 10).images_per_second is None


def test_hand_computed_figures_of_members():
    running = RunningMemberFigures("cpu", torch.float64)
    first, second = [[0.9, 0.1], [0.4, 0.6]], [[0.8, 0.2], [0.7, 0.3]]
    running.update(torch.tensor([first, second]).log(), torch.tensor([0, 0]))
    figures = running.compute()
    assert (figures.members, figures.top1, figures.disagreement) == (2, 0.75, 0.5)
    assert figures.nll == pytest.approx(-sum(map(math.log, (0.9, 0.4, 0.8, 0.7))) / 4)
    pairs = [(p, q) for a, b in zip(first, second, strict=True) for p, q in ((a, b), (b, a))]
    divergences = [sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) for p, q in pairs]
    assert figures.kl == pytest.approx(sum(divergences) / 4, abs=1e-6)


def test_the_members_of_one_model_and_of_several_are_measured_alike():
    """Two copies of a model agree; the members of an ensemble in one model are those of its rows in training."""
    single = make_model()
    of_copies = measure_batches(Ensemble([single, single]), make_batches(4, 2), 10).members
    assert (of_copies.disagreement, of_copies.members) == (0, 2) and of_copies.kl == pytest.approx(0, abs=1e-6)
    assert measure_batches(single, make_batches(4), 10).members is None

    model = make_model(num_experts=4, top_k=1, ensemble=2, capacity_factor=None, noise_std=0)
    figures = measure_batches(model, make_batches(4, 2), 10)
    with torch.no_grad():
        rows = [(model.train()(images), labels) for images, labels, _ in make_batches(4, 2)]
    nll = sum(torch.nn.functional.cross_entropy(x, y.repeat_interleave(2), reduction="sum") for x, y in rows) / 12
    assert figures.members.nll == pytest.approx(nll.item(), rel=1e-5)
    assert figures.members.nll >= figures.nll  # the mean probability is never worse than the members by themselves
