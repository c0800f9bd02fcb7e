"""The explorer's numbers, against small cases worked out by hand and other libraries."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from vmoe.explain.explorer.measures import (
    class_log_ratio,
    clustered_order,
    coactivation,
    coefficient_of_variation,
    matched_agreement,
    mean_interval,
    normalised_mutual_information,
    paired_change,
    relative_load,
    wilson,
)


def nmi(table) -> float:
    return float(normalised_mutual_information(torch.tensor(table)))


def test_mutual_information_of_tables_worked_out_by_hand():
    assert nmi([[5, 0], [0, 5]]) == pytest.approx(1)  # each tells the other
    assert nmi([[2, 2], [3, 3]]) == pytest.approx(0)  # rows alike
    assert nmi([[4, 6]]) == 0  # a constant
    # p = [[1/2, 0], [1/4, 1/4]]: H(X) = ln 2; H(Y) = 3/4 ln 4/3 + 1/4 ln 4; H(X, Y) = 1/2 ln 2 + 1/2 ln 4 = 3/2 ln 2
    rows, columns, both = math.log(2), 0.75 * math.log(4 / 3) + 0.25 * math.log(4), 1.5 * math.log(2)
    assert nmi([[2, 0], [1, 1]]) == pytest.approx((rows + columns - both) / ((rows + columns) / 2))


def test_mutual_information_is_that_of_its_definition_and_takes_many_tables():
    random = np.random.default_rng(0)
    x, y = random.integers(0, 5, (2, 400))
    y = np.where(random.random(400) < 0.4, x, y)
    table = np.zeros((5, 5))
    np.add.at(table, (x, y), 1)
    counts = Counter(zip(x.tolist(), y.tolist(), strict=True)), Counter(x.tolist()), Counter(y.tolist())
    both, rows, columns = (-sum(n / 400 * math.log(n / 400) for n in each.values()) for each in counts)
    assert nmi(table) == pytest.approx((rows + columns - both) / ((rows + columns) / 2))
    stacked = torch.tensor(np.stack([table, np.eye(5), np.zeros((5, 5))]))
    assert normalised_mutual_information(stacked).tolist() == pytest.approx([nmi(table), 1, 0])


def test_load_is_relative_to_the_fair_share():
    load = relative_load(np.array([6.0, 2.0, 0.0, 0.0]))
    assert load.tolist() == [3, 1, 0, 0]
    # deviations 2, 0, -1, -1 from the mean 1: sqrt(6 / 4)
    assert coefficient_of_variation(load) == pytest.approx(math.sqrt(1.5))
    assert coefficient_of_variation(np.ones(4)) == 0


def test_log_ratio_is_shrunk_where_an_expert_has_few_choices():
    counts = np.array([[8.0, 0.0], [4.0, 12.0], [0.0, 0.0]])  # classes have 1/2 each
    plain = class_log_ratio(counts, prior_patches=1e-9)
    assert plain[0, 0] == pytest.approx(math.log(2)) and plain[1] == pytest.approx([math.log(0.5), math.log(1.5)])
    shrunk = class_log_ratio(counts, prior_patches=8)
    assert shrunk[0] == pytest.approx([math.log(12 / 16 / 0.5), math.log(4 / 16 / 0.5)])
    assert shrunk[2] == pytest.approx([0, 0])  # dead: nothing known
    assert class_log_ratio(np.array([[3.0, 0.0], [1.0, 0.0]]), 4)[:, 1].tolist() == [0, 0]  # a class without images


def test_clustering_puts_like_classes_side_by_side():
    columns = np.array([[1.0, -1.0, 0.9, -0.9], [0.0, 0.5, 0.1, 0.6]])
    order = clustered_order(columns)
    assert sorted(order) == [0, 1, 2, 3]
    assert abs(order.index(0) - order.index(2)) == abs(order.index(1) - order.index(3)) == 1
    assert clustered_order(columns[:, :2]) == [0, 1]


def test_coactivation_of_pairs_against_chance():
    # K=2 of E=3, four tokens: {0,1} {0,1} {0,1} {0,2}; shares 1, 3/4, 1/4, chance P(e) P(e') * (1 * 3) / (2 * 2)
    together = np.array([[4, 3, 1], [3, 3, 0], [1, 0, 1]], dtype=float)
    ratio = coactivation(together, 4, top_k=2)
    assert ratio[0, 1] == pytest.approx(0.75 / (1 * 0.75 * 0.75)) and ratio[1, 2] == 0
    assert np.isnan(np.diag(ratio)).all()
    # every pair equally often is chance
    fair = np.full((4, 4), 2.0) + 4 * np.eye(4)  # 12 tokens, each pair 2 times, each expert 6
    off = coactivation(fair, 12, top_k=2)[~np.eye(4, dtype=bool)]
    assert off == pytest.approx(np.ones(12))
    assert coactivation(np.diag([2.0, 2.0]), 4, top_k=1)[0, 1] == 0
    assert np.isnan(coactivation(np.diag([4.0, 0.0]), 4, top_k=1)[0, 1])  # a dead expert meets nobody
    # slots: experts that take half of the tokens each, independently
    assert coactivation(np.array([[4.0, 2.0], [2.0, 4.0]]), 8, top_k=None)[0, 1] == pytest.approx(1)


def test_intervals():
    share = wilson(8, 10)
    assert share == pytest.approx((0.8, 0.4901625, 0.9433178), abs=1e-6)  # the textbook example
    assert wilson(10, 10).high == pytest.approx(1) and wilson(0, 10).low == 0
    change = paired_change(gained=5, lost=15, trials=98)
    # Wald on 100 images with 5.5 and 15.5: -0.1 +- 1.96 sqrt((0.21 - 0.01) / 100)
    assert change == pytest.approx((-10 / 98, -0.1 - 1.959964 * math.sqrt(0.002), -0.1 + 1.959964 * math.sqrt(0.002)))
    nothing = paired_change(0, 0, 50)
    assert nothing.value == 0 and nothing.low < 0 < nothing.high
    mean = mean_interval(np.array([0.0, 1.0, 1.0, 0.0]))
    assert mean == pytest.approx((0.5, 0.5 - 1.959964 * math.sqrt(1 / 12), 0.5 + 1.959964 * math.sqrt(1 / 12)))


def test_wilson_and_paired_change_cover_the_truth():
    random = np.random.default_rng(0)
    inside_share = inside_change = 0
    for _ in range(1000):
        right = random.random(200) < 0.9
        now = np.where(random.random(200) < 0.06, ~right, right)  # of the right 6 % are lost, of the wrong 6 % gained
        share, change = wilson(right.sum(), 200), paired_change((now & ~right).sum(), (right & ~now).sum(), 200)
        inside_share += share.low <= 0.9 <= share.high
        inside_change += change.low <= -0.06 * 0.8 <= change.high
    assert 930 <= inside_share <= 980 and 930 <= inside_change <= 980


def test_agreement_finds_the_pairing():
    assert matched_agreement(np.array([[0, 9, 1], [8, 0, 0], [0, 0, 2]])) == pytest.approx(19 / 20)
    assert matched_agreement(np.array([[3, 0], [0, 3], [4, 0]])) == pytest.approx(7 / 10)  # one expert has no partner
