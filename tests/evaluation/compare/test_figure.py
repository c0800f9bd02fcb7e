"""The pictures of a comparison show every arm where its figures are, and their labels can be read."""

from dataclasses import replace
from itertools import pairwise

import pytest
from matplotlib.text import Text

from vmoe.evaluation.compare.against import against, draw_against
from vmoe.evaluation.compare.figure import apart, draw_comparison, pareto_front, short
from vmoe.evaluation.compare.intervals import differences
from vmoe.evaluation.compare.runs import group_runs, read_run


def test_the_picture_shows_every_arm_where_its_figures_are(make_run):
    runs = [
        make_run("a", 0.90),
        make_run("b", 0.93, moe={"num_experts": 8}, flops=133),
        make_run("c", 0.91, moe={"num_experts": 2}, flops=140),
    ]
    arms = group_runs([read_run(run) for run in runs])
    page = draw_comparison(arms, differences(arms), ["a note"])
    flops, differ = page.figure.axes[0], page.figure.axes[3]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in flops.lines[:3]]
    assert points == [(100, 90), (133, pytest.approx(93)), (140, pytest.approx(91))]
    assert list(flops.lines[3].get_xdata()) == [100, 133]  # the Pareto front
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in differ.lines[:2]] == [
        (pytest.approx(3), 1),
        (pytest.approx(1), 2),
    ]
    assert len(page.figure.axes[4].lines) == 3  # learning curves
    texts = [text.get_text() for text in page.figure.findobj(Text)]
    assert {"1  dense  n=1", "2  E=8 K=2  n=1", "a note"} <= set(texts)


@pytest.mark.parametrize(
    ("validated", "chosen"),
    [
        ([True, True], "best in validation"),
        ([True, False], "best in validation, or of the last epoch where there was no validation"),
        ([False, False], "of the last epoch"),
    ],
)
def test_the_picture_says_which_checkpoints_were_tested(make_run, validated, chosen):
    runs = [
        read_run(make_run(f"r{index}", lr=0.1 * index, validated=is_so)) for index, is_so in enumerate(validated, 1)
    ]
    for curves in (True, False):  # which a recorded comparison may have left out
        arms = group_runs(runs if curves else [replace(run, curve=[]) for run in runs])
        page = draw_comparison(arms, differences(arms), [])
        texts = [text.get_text() for text in page.figure.findobj(Text)]
        assert f"runs: 2, arms: 2 · test accuracy of the checkpoint {chosen}" in texts
        assert ("Validation top-1 while training" in texts) == (curves and any(validated))


def test_a_few_arms_have_their_names_beside_their_points(make_run):
    names = ["dense", "E=8 K=2", "E=2 K=2", "E=16 K=2"]
    experts = (None, {"num_experts": 8}, {"num_experts": 2}, {"num_experts": 16})
    tops = (0.9, 0.93, 0.93, 0.9305)  # of which three lie on each other
    runs = [make_run(f"r{index}", top1, moe=moe) for index, (top1, moe) in enumerate(zip(tops, experts, strict=True))]
    arms = group_runs([read_run(run) for run in runs])
    page = draw_comparison(arms, differences(arms), [])
    page.canvas.draw()
    renderer = page.canvas.get_renderer()
    for axes in page.figure.axes[:3]:
        assert sorted(text.get_text() for text in axes.texts) == sorted(names)
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        assert not any(box.count_overlaps(boxes[:index]) for index, box in enumerate(boxes))
        markers = axes.transData.transform([(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines[:4]])
        assert not any(box.contains(*place) for box in boxes for place in markers)
        assert all(box.x0 > 0 and box.x1 < page.width for box in boxes)
    assert [tick.get_text() for tick in page.figure.axes[3].get_yticklabels()] == names


def test_arms_that_lie_on_each_other_share_a_line_of_numbers(make_run):
    runs = [make_run(f"r{index}", 0.9 if index % 2 else 0.7, lr=0.1 * index) for index in range(1, 8)]
    arms = group_runs([read_run(run) for run in runs])
    page = draw_comparison(arms, differences(arms), [])
    for axes in page.figure.axes[:3]:
        assert [(text.get_text(), text.xy[1]) for text in axes.texts] == [("1 3 5 7", 90), ("2 4 6", 70)]


def test_a_crowd_of_arms_says_how_many_it_is(make_run):
    runs = [make_run(f"r{index}", 0.9, lr=0.1 * index) for index in range(1, 8)] + [make_run("apart", 0.7, lr=0.9)]
    arms = group_runs([read_run(run) for run in runs])
    page = draw_comparison(arms, differences(arms), [])
    for axes in page.figure.axes[:3]:
        assert [text.get_text() for text in axes.texts] == ["7 arms", "8"]


def test_models_at_one_value_of_an_option_lie_beside_each_other(make_run):
    models = {"dense": None, "eight": {"num_experts": 8}, "four": {"num_experts": 4}}
    rates = (0.01, 0.1, 1.0)
    runs = [make_run(f"{name}{lr}", moe=moe, train=0.9, lr=lr) for name, moe in models.items() for lr in rates]
    page = draw_against(against([read_run(run) for run in runs], "optim.lr"), "optim.lr")
    test, train, gains = page.figure.axes
    for axes, drawn in ((test, 3), (train, 3), (gains, 2)):
        places = [list(container.lines[0].get_xdata()) for container in axes.containers]
        xs = [at for at in places if at]  # the dense model has no gain
        assert len(xs) == drawn
        for lr, *at in zip(rates, *xs, strict=True):
            assert len(set(at)) == drawn and at == sorted(at)
            assert at == pytest.approx([lr] * drawn, rel=0.1)
        assert list(axes.get_xticks()) == list(rates)


def test_numbers_of_small_differences_do_not_run_into_each_other(make_run):
    runs = [make_run("a", 0.9651), make_run("b", 0.9658, moe={"num_experts": 8}), make_run("c", 0.9639, lr=0.2)]
    arms = group_runs([read_run(run) for run in runs])
    page = draw_comparison(arms, differences(arms), [])
    page.canvas.draw()
    axes = page.figure.axes[3]
    low, high = axes.get_xlim()
    numbers = [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [number.get_window_extent() for number in numbers]
    assert len(boxes) > 2
    assert all(following.x0 - box.x1 > 4 for box, following in pairwise(boxes))


def test_many_arms_and_notes_stay_on_the_page(make_run):
    runs = [make_run(f"r{count}", moe={"num_experts": count}) for count in range(2, 30)]
    arms = group_runs([read_run(run) for run in runs])
    page = draw_comparison(arms, differences(arms), ["a note"] * 30)
    renderer = page.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in page.figure.texts]
    assert all(box.y0 >= 0 and box.x0 >= 0 and box.x1 <= page.width for box in boxes)


def test_the_pareto_front():
    points = [(1, 5), (2, 4), (2, 7), (3, 7), (4, 9)]
    assert pareto_front(points) == [0, 2, 4]
    assert pareto_front(points, more_is_better=True) == [4]
    assert pareto_front([(1, 9), (2, 8), (3, 7)], more_is_better=True) == [2, 1, 0]


def test_short_numbers():
    assert [short(number) for number in (5_717_416, 1234, 12, 2.5e9)] == ["5.72 M", "1.23 k", "12", "2.5 G"]


def test_ticks_keep_apart():
    assert apart([14.75, 14.70]) == [14.70]
    assert apart([1.5, 0.45]) == [0.45, 1.5]
    assert apart([1, 2, 3, 4, 5]) == [1, 5]
    assert apart([3.77, 4.39, 9.48]) == [3.77, 9.48]  # "3.77 M" is wider than that
