"""Comparing runs: seeds are grouped, differences carry their compute and their n, foreign folders are refused."""

import dataclasses

import pytest
import yaml

from vmoe.errors import UserError
from vmoe.evaluation.compare.intervals import differences, find_arm, sentence, table_rows
from vmoe.evaluation.compare.runs import group_runs, read_run, warnings_for

IMPOSSIBLE = (
    '{"metrics": {"test/top1": 0.9}, "parameters": {"total": 9, "active": 9}, "flops_per_image": 100, '
    '"images_per_second": 5.0, "device": "a CPU", "seed": 0}'
)
MOE = {"layers": "every-2", "num_experts": 8}


def test_a_run_is_read(make_run):
    run = read_run(make_run("one", moe=MOE))
    assert (run.name, run.score, run.total_parameters, run.active_parameters) == ("one", 0.9, 4000, 1200)
    assert run.train_score is None  # an older summary does not tell it
    assert read_run(make_run("two", train=0.95)).train_score == 0.95
    assert run.curve == [(0, 0.5), (1, 0.8)]
    assert not run.is_dense


def test_seeds_of_one_config_are_grouped(make_run):
    runs = [read_run(make_run(f"moe{seed}", top1, seed, MOE)) for seed, top1 in enumerate((0.90, 0.92, 0.97))]
    groups = group_runs([*runs, read_run(make_run("dense", train=0.99))])
    assert [group.n for group in groups] == [3, 1]
    assert groups[0].mean("score") == pytest.approx(0.93)
    assert groups[0].sd("score") == pytest.approx((0.0026 / 2) ** 0.5)  # (.03^2 + .01^2 + .04^2) / 2
    assert groups[1].sd("score") is None
    moe, dense = table_rows(groups, differences(groups))
    assert (moe["n"], moe["seeds"], moe["runs"], moe["kind"]) == (3, "0 1 2", "moe0 moe1 moe2", "V-MoE")
    assert (moe["train_clean_top1_mean"], dense["train_clean_top1_mean"]) == (None, 0.99)
    assert (moe["baseline"], moe["paired_seeds"], dense["baseline"]) == ("dense", 1, None)


def sentences(*runs, baseline=None):
    arms = group_runs([read_run(run) for run in runs])
    return [sentence(part) for part in differences(arms, baseline and find_arm(arms, baseline))]


def test_dense_arms_without_a_v_moe_stand_beside_the_first_of_them(make_run):
    runs = [make_run("a", moe=MOE), make_run("b"), make_run("c", model="wide")]
    assert [line.split(":")[0] for line in sentences(*runs)] == ["E=8 K=2 against dense", "dense wide against dense"]


def test_the_difference_of_one_run_each_claims_nothing(make_run):
    (line,) = sentences(make_run("a", 0.90), make_run("b", 0.93, moe=MOE, flops=133))
    assert line.startswith("E=8 K=2 against dense: +3.00 points of test top-1, n=1: ")
    assert "at unequal compute (1.33x the FLOPs per image, 4.00x the parameters)" in line
    assert "no significance" in line


def test_compute_within_five_percent_is_equal(make_run):
    assert "at equal compute (1.04x" in sentences(make_run("a", flops=100), make_run("b", moe=MOE, flops=104))[0]


def test_seeds_are_paired_and_the_interval_is_students(make_run):
    # Differences of seeds 0, 1, 2: 1, 2 and 3 points; seed 9 has no partner. t(0.975, 2) = 4.303, 1 / sqrt(3) = 0.577
    runs = [make_run(f"moe{seed}", 0.8 + 0.05 * seed + 0.01 * (seed + 1), seed, MOE) for seed in (0, 1, 2)]
    runs += [make_run(f"dense{seed}", 0.8 + 0.05 * seed, seed) for seed in (2, 0, 1)]
    runs.append(make_run("dense9", 0.1, 9))
    arms = group_runs([read_run(run) for run in runs])
    (found,) = differences(arms)
    assert (found.arm.name, found.baseline.name, found.pairs) == ("E=8 K=2", "dense", 3)
    assert found.mean == pytest.approx(0.02)
    assert (found.high + found.low) / 2 == pytest.approx(found.mean)
    assert found.high - found.mean == pytest.approx(0.04303 * 0.57735, rel=1e-3)
    assert "+2.00 points of test top-1, 95 % interval -0.48 to +4.48 (paired, n=3)" in sentence(found)


def test_without_a_seed_in_common_no_interval_is_given(make_run):
    (line,) = sentences(make_run("a", 0.8, 0), make_run("b", 0.9, 1, MOE), make_run("c", 0.9, 2, MOE))
    assert "+10.00 points of test top-1, no seed in common (n=2 and n=1): no interval" in line


def test_several_runs_of_a_seed_count_once(make_run):
    runs = [make_run("a", 0.8, 0), make_run("b", 0.9, 1), make_run("c", 0.82, 0, MOE), make_run("d", 0.86, 0, MOE)]
    assert "+4.00 points of test top-1, n=1" in sentences(*runs)[0]


def test_runs_without_a_twin_stand_beside_the_first(make_run):
    (line,) = sentences(make_run("a", moe=MOE), make_run("b", moe=MOE | {"num_experts": 4}))
    assert line.startswith("E=4 K=2 against E=8 K=2: ")


def test_of_several_dense_arms_the_one_of_the_same_recipe_is_the_twin(make_run):
    runs = [
        make_run("a", lr=0.1),
        make_run("b", lr=0.01),
        make_run("c", lr=0.01, moe=MOE),
        make_run("d", lr=0.1, moe=MOE),
    ]
    against = [line.split(":")[0] for line in sentences(*runs)]
    assert against == ["E=8 K=2 lr 0.01 against dense lr 0.01", "E=8 K=2 lr 0.1 against dense lr 0.1"]


def change(folder, **sections):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return read_run(folder)


def test_drop_path_of_the_moe_layers_keeps_the_twin(make_run):
    first = read_run(make_run("first"))
    twin = change(make_run("twin"), model={"kwargs": {"global_pool": "avg"}})
    sparse = change(make_run("sparse", moe={"top_k": 1}), model=twin.config["model"] | {"moe_drop_path": 0.3})
    arms = group_runs([first, twin, sparse], by_folder=True)
    (found,) = differences(arms)
    assert (found.arm.name, found.baseline.name) == ("sparse", "twin")
    assert sentence(found).endswith("they also differ in model.moe_drop_path")


@pytest.mark.parametrize("other", [{"table": {"label": "genus", "path": None}}, {"channels": 3}])
def test_a_run_of_other_labels_or_channels_of_the_same_table_is_no_twin(make_run, other):
    table = {"root": "birds.csv", "table": {"label": None, "path": None}, "subset": {"imbalance": None}}
    dense, before = change(make_run("a", data="table"), data=table), make_run("b", data="table", moe=MOE)
    before = change(before, data={"root": "birds.csv"})  # of a version without these options
    assert dense.is_twin_of(dense) and before.is_twin_of(dense) and not warnings_for([dense, before])
    sparse = change(make_run("c", data="table", moe=MOE), data=table | other)
    assert not sparse.is_twin_of(dense)
    warned = [line for line in warnings_for([dense, sparse]) if "other data.table" in line]
    assert len(warned) == ("table" in other)  # the same images with their labels can be compared


def test_settings_of_distillation_count_with_a_teacher_alone(make_run):
    before = read_run(make_run("before"))  # of a version without distillation
    after = change(make_run("after", seed=1), distill={"teacher": None, "weight": 0.5})
    taught = change(make_run("taught", seed=2), distill={"teacher": "runs/teacher", "weight": 0.5})
    assert [arm.n for arm in group_runs([before, after, taught])] == [2, 1]


def test_options_of_later_versions_that_are_not_set_leave_the_recipe_as_it_was(make_run):
    before = read_run(make_run("before"))
    after = change(make_run("after", seed=1), data={"images": None, "fractals": {"classes": 4096}})
    limited = change(make_run("limited", seed=2), data={"images": 1000})
    assert [arm.n for arm in group_runs([before, after, limited])] == [2, 1]


def test_a_baseline_is_named_by_its_label_or_by_a_run(make_run):
    runs = [make_run("a"), make_run("b", moe=MOE), make_run("c", moe=MOE | {"top_k": 1})]
    for name in ("E=8 K=1", "c"):
        against = [line.split(":")[0] for line in sentences(*runs, baseline=name)]
        assert against == ["dense against E=8 K=1", "E=8 K=2 against E=8 K=1"]
    with pytest.raises(UserError, match=r"--baseline densse: .*did you mean 'dense'"):
        sentences(*runs, baseline="densse")


def test_where_it_ran_is_not_part_of_the_recipe(make_run):
    folders = [make_run("a"), make_run("b", seed=1)]
    config = yaml.safe_load((folders[1] / "config.yaml").read_text())
    config["data"]["root"] = "/elsewhere"
    config |= {"trainer": config["trainer"] | {"device": "cuda", "compile": True}, "parallel": {"strategy": "ddp"}}
    (folders[1] / "config.yaml").write_text(yaml.safe_dump(config))
    assert len(group_runs([read_run(folder) for folder in folders])) == 1
    config["data"]["name"] = "folder"  # which its place alone tells from others
    for folder, root in zip(folders, ("/one", "/two"), strict=True):
        config["data"]["root"] = root
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert len(group_runs([read_run(folder) for folder in folders])) == 2


def test_other_hardware_and_other_data_are_warned_of(make_run):
    here = read_run(make_run("here"))
    assert warnings_for([here, read_run(make_run("again", seed=1))]) == []
    (line,) = warnings_for([here, read_run(make_run("gpu", seed=1, device="a GPU"))])
    assert "images/s cannot be compared" in line and "a GPU" in line
    (line,) = warnings_for([here, read_run(make_run("cifar", data="cifar10"))])
    assert "neither accuracy nor images/s" in line and "cifar10" in line and "other data.name)" in line
    few = dataclasses.replace(here, config=here.config | {"data": here.config["data"] | {"subset": {"fraction": 0.1}}})
    (line,) = warnings_for([here, few])
    assert "digits at 16 px; other data.subset)" in line


def test_what_else_differs_than_the_moe_layers_is_told(make_run):
    dense, other, sparse = make_run("a"), make_run("b", lr=0.1), make_run("c", moe=MOE)
    assert "differ" not in sentences(sparse, dense)[0]
    assert sentences(sparse, other)[0].endswith("; not the MoE layers alone, they also differ in optim.lr")
    assert sentences(dense, other)[0].endswith("; they differ in optim.lr")


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
