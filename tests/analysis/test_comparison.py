"""Comparing runs: seeds are grouped, differences carry their compute and their n, foreign folders are refused."""

import json

import pytest
import yaml
from matplotlib.text import Text

from vmoe.analysis.comparison import differences, group_runs, read_run, table_rows, warnings_for
from vmoe.analysis.comparison_figure import apart, draw_comparison, short
from vmoe.errors import UserError


@pytest.fixture
def make_run(tmp_path):
    def make(name, top1=0.9, seed=0, moe=None, flops=100, device="a CPU", model="vit", data="digits", speed=50.0):
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "seed": seed,
            "output_dir": str(folder),
            "data": {"name": data, "image_size": 16},
            "model": {"name": model, "kwargs": {}},
            "moe": moe,
            "optim": {"lr": 0.001},
        }
        summary = {
            "metrics": {"test/top1": top1},
            "parameters": {"total": 4000 if moe else 1000, "active": 1200 if moe else 1000},
            "flops_per_image": flops,
            "images_per_second": speed,
            "device": device,
            "seed": seed,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "metrics.csv").write_text("epoch,step,val/top1\n0,10,0.5\n1,20,0.8\n")
        return folder

    return make


IMPOSSIBLE = (
    '{"metrics": {"test/top1": 0.9}, "parameters": {"total": 9, "active": 9}, "flops_per_image": 100, '
    '"images_per_second": 5.0, "device": "a CPU", "seed": 0}'
)
MOE = {"layers": "every-2", "num_experts": 8}


def test_a_run_is_read(make_run):
    run = read_run(make_run("one", moe=MOE))
    assert (run.name, run.top1, run.total_parameters, run.active_parameters) == ("one", 0.9, 4000, 1200)
    assert run.curve == [(0, 0.5), (1, 0.8)]
    assert not run.is_dense


def test_seeds_of_one_config_are_grouped(make_run):
    runs = [read_run(make_run(f"moe{seed}", top1, seed, MOE)) for seed, top1 in enumerate((0.90, 0.92, 0.97))]
    groups = group_runs([*runs, read_run(make_run("dense"))])
    assert [group.n for group in groups] == [3, 1]
    assert groups[0].mean("top1") == pytest.approx(0.93)
    assert groups[0].sd("top1") == pytest.approx((0.0026 / 2) ** 0.5)  # (.03^2 + .01^2 + .04^2) / 2
    assert groups[1].sd("top1") is None
    row = table_rows(groups)[0]
    assert (row["n"], row["seeds"], row["kind"]) == (3, "0 1 2", "V-MoE")


def test_the_difference_of_one_run_each_claims_nothing(make_run):
    groups = group_runs([read_run(make_run("dense", 0.90)), read_run(make_run("moe", 0.93, moe=MOE, flops=133))])
    (line,) = differences(groups)
    assert line.startswith("moe against dense: +3.00 points")
    assert "at unequal compute (1.33x the FLOPs an image, 4.00x the parameters)" in line
    assert "n=1 each" in line and "no significance" in line


def test_compute_within_five_percent_is_equal(make_run):
    groups = group_runs([read_run(make_run("dense", flops=100)), read_run(make_run("moe", moe=MOE, flops=104))])
    assert "at equal compute (1.04x" in differences(groups)[0]


def test_the_difference_of_several_seeds_states_their_spread(make_run):
    moe = [read_run(make_run(f"moe{seed}", 0.9 + 0.02 * seed, seed, MOE)) for seed in (0, 1)]
    dense = [read_run(make_run(f"dense{seed}", 0.8, seed)) for seed in (0, 1, 2)]
    (line,) = differences(group_runs(moe + dense))
    assert "+11.00 points" in line
    assert "sd 1.41 (n=2) against sd 0.00 (n=3)" in line


def test_runs_without_a_twin_stand_beside_the_first(make_run):
    groups = group_runs([read_run(make_run("a", moe=MOE)), read_run(make_run("b", moe=MOE | {"num_experts": 4}))])
    assert [line.split(":")[0] for line in differences(groups)] == ["b against a"]


def test_other_hardware_and_other_data_are_warned_of(make_run):
    here = read_run(make_run("here"))
    assert warnings_for([here, read_run(make_run("again", seed=1))]) == []
    (line,) = warnings_for([here, read_run(make_run("gpu", seed=1, device="a GPU"))])
    assert "images/s cannot be compared" in line and "a GPU" in line
    (line,) = warnings_for([here, read_run(make_run("cifar", data="cifar10"))])
    assert "neither accuracy nor images/s" in line and "cifar10" in line


def test_what_else_differs_than_the_moe_layers_is_told(make_run):
    dense, sparse = make_run("dense"), make_run("moe", moe=MOE)
    assert "also differ" not in differences(group_runs([read_run(sparse), read_run(dense)]))[0]
    config = yaml.safe_load((dense / "config.yaml").read_text())
    (dense / "config.yaml").write_text(yaml.safe_dump(config | {"optim": {"lr": 0.1}}))
    (line,) = differences(group_runs([read_run(sparse), read_run(dense)]))
    assert line.endswith("; not the MoE layers alone, they also differ in optim.lr")


def test_runs_of_one_seed_are_warned_of(make_run):
    (line,) = warnings_for([read_run(make_run("one")), read_run(make_run("again"))])
    assert line.startswith("one: several runs of one seed")


def test_groups_of_the_same_folder_name_are_told_apart(make_run, tmp_path):
    (tmp_path / "x").mkdir()
    runs = [read_run(make_run("run")), read_run(make_run("x/run", moe=MOE))]
    assert [group.name for group in group_runs(runs)] == ["run", "run (2)"]


@pytest.mark.parametrize("file", ["config.yaml", "summary.json", "metrics.csv"])
def test_an_unfinished_run_is_refused(make_run, file):
    folder = make_run("run")
    (folder / file).unlink()
    with pytest.raises(UserError, match=rf"run: holds no {file}"):
        read_run(folder)


@pytest.mark.parametrize(
    "file, content",
    [
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", '{"metrics": {}}'),
        ("config.yaml", "- a\n- b\n"),
        ("config.yaml", "a: [\n"),
        ("config.yaml", "seed: 1\n"),
        ("config.yaml", "data: {}\n"),
        ("summary.json", IMPOSSIBLE.replace("0.9", "NaN")),
        ("summary.json", IMPOSSIBLE.replace("100", "0")),
        ("metrics.csv", "epoch,loss\n0,1\n"),
        ("metrics.csv", "epoch,val/top1\nzero,1\n"),
    ],
)
def test_a_foreign_folder_is_refused(make_run, file, content):
    folder = make_run("run")
    (folder / file).write_text(content)
    with pytest.raises(UserError, match="run: not the folder of a finished run"):
        read_run(folder)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        read_run(tmp_path / "missing")


def test_the_picture_shows_every_group_where_its_figures_are(make_run):
    groups = group_runs([read_run(make_run("dense", 0.90)), read_run(make_run("moe", 0.93, moe=MOE, flops=133))])
    page = draw_comparison(groups, ["a note"])
    flops = page.figure.axes[0]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in flops.lines] == [(100, 90), (133, pytest.approx(93))]
    assert len(page.figure.axes[4].lines) == 2  # learning curves
    texts = [text.get_text() for text in page.figure.findobj(Text)]
    assert "dense  n=1" in texts and "moe  n=1" in texts and "a note" in texts


def test_short_numbers():
    assert [short(number) for number in (5_717_416, 1234, 12, 2.5e9)] == ["5.72 M", "1.23 k", "12", "2.5 G"]


def test_ticks_keep_apart():
    assert apart([14.75, 14.70]) == [14.70]
    assert apart([1.5, 0.45]) == [0.45, 1.5]
    assert apart([1, 2, 3, 4, 5]) == [1, 5]
