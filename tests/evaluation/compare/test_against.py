"""`--against moe.num_experts`: the loss of a V-MoE by the number of its experts, from the dense model on."""

from dataclasses import replace

import pytest

from vmoe.evaluation.compare.against import against, against_rows, draw_against, power_laws
from vmoe.evaluation.compare.runs import read_run

OPTION = "moe.num_experts"


@pytest.fixture
def series(make_run):
    """Two seeds, whose losses fall as E^-0.2 and E^-0.4 up to 16 experts, and rise after."""
    runs = []
    for seed, exponent in ((0, 0.2), (1, 0.4)):
        for experts in (1, 2, 4, 16, 32):
            moe = None if experts == 1 else {"num_experts": experts, "top_k": 1}
            run = read_run(make_run(f"e{experts}_s{seed}", 0.9, seed, moe))
            loss = 0.5 * experts**-exponent if experts < 32 else 0.4
            runs.append(replace(run, summary={**run.summary, "metrics": {**run.summary["metrics"], "test/loss": loss}}))
    return against(runs, OPTION)


def test_a_power_law_is_fitted_from_the_dense_model_to_the_least_loss(series):
    (law,) = power_laws(series)
    assert law.name == "K=1" and (law.last, law.most, law.seeds) == (16, 32, 2)
    assert law.exponent == pytest.approx(0.3) and law.factor == pytest.approx(0.5)
    assert law.low == pytest.approx(0.3 - 12.706 * 0.1, abs=1e-3)  # Student's t with one degree of freedom
    assert str(law).startswith("K=1: from the dense model to E=16 experts the test loss falls as E^-0.30 (95 %")


def test_v_moes_of_any_number_of_experts_are_compared_with_the_dense_model(series):
    rows = [row for row in against_rows(series, OPTION) if row["arm"] == "K=1"]
    assert [row[OPTION] for row in rows] == [2, 4, 16, 32] and all(row["paired_seeds"] == 2 for row in rows)
    losses, _ = draw_against(series, OPTION, power_laws(series)).figure.axes
    assert losses.get_yscale() == losses.get_xscale() == "log"
    (line,) = [line for line in losses.lines if list(line.get_xdata()) == [1, 16]]
    assert list(line.get_ydata()) == pytest.approx([0.5, 0.5 * 16**-0.3])


def test_without_losses_there_is_no_law(make_run):
    runs = [read_run(make_run(f"e{n}", 0.9, moe=None if n == 1 else {"num_experts": n, "top_k": 1})) for n in (1, 2, 4)]
    assert power_laws(against(runs, OPTION)) == []
