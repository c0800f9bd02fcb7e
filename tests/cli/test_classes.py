"""A set's classes are a checkpoint's by name, whatever their order and number: in every job that measures or starts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import saved_runs

from vmoe.checkpoints import load_checkpoint
from vmoe.classes import find_outputs, known_outputs
from vmoe.cli.main import main

MOE = {"num_experts": 4}
NAMES = ("a", "b", "c")
COLOURS = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255), "d": (9, 9, 9)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model that is right on every picture of `pictures`: its logits are the mean levels of the channels."""
    folder = tmp_path_factory.mktemp("run") / "abc"
    content = saved_runs.content(MOE, {"name": "folder", "val_fraction": 0}, class_names=NAMES)
    weights = content["state_dict"]
    for name, value in weights.items():  # blocks that add nothing, and a norm that is left as it is
        if "model.norm" not in name:
            value.zero_()
    for channel in range(3):
        weights["model.patch_embed.proj.weight"][channel, channel] = 1.0
        weights["model.head.weight"][channel, channel] = 1.0
    content[saved_runs.ENTRY]["config"]["model"]["kwargs"] = saved_runs.KWARGS | {
        "global_pool": "avg",
        "fc_norm": False,
    }
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(content, folder / "checkpoints" / "best.ckpt")
    return folder


def pictures(root, order, splits=("train", "test"), count=4):
    """ROOT/split/class/0.png, ...: pictures in the colour of their class; `order` names the classes' folders."""
    for split in splits:
        for name in order:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (16, 16), COLOURS[name]).save(folder / f"{number}.png")
    return root


def as_npz(path, names, arrays):
    """The same as arrays, whose class_names are in any order."""
    x = np.stack([np.full((16, 16, 3), COLOURS[name], dtype=np.uint8) for name in arrays])
    y = np.array([names.index(name) for name in arrays])
    np.savez(path, train_x=x, train_y=y, test_x=x, test_y=y, class_names=np.array(names))
    return path


def evaluate(run, capsys, *options, expected=0):
    """The report of `vmoe evaluate`, and what it said on stderr."""
    out = run.parent / "out"
    assert main(["evaluate", str(run), "--out", str(out), *map(str, options)]) == expected
    said = capsys.readouterr().err
    return (json.loads((out / "evaluation.json").read_text()) if expected == 0 else None), said


def test_another_order_is_matched_by_name(run, tmp_path, capsys):
    path = as_npz(tmp_path / "cab.npz", ["c", "a", "b"], "abcab")
    report, said = evaluate(run, capsys, "--data", "npz", "--root", path)
    assert report["results"][0]["top1"] == 1.0 and report["class_names"] == ["c", "a", "b"]
    assert "classes: matched by name: the set has them in another order than the checkpoint" in said
    report, said = evaluate(run, capsys, "--data", "npz", "--root", path, "--classes", "by-number")
    assert report["results"][0]["top1"] == 0.0 and "classes: taken by number, such as c for a" in said


def test_a_subset_is_evaluated_on_its_own_classes(run, tmp_path, capsys):
    report, said = evaluate(run, capsys, "--data", "folder", "--root", pictures(tmp_path / "set", "cb"))
    (result,) = report["results"]
    assert result["top1"] == 1.0 and report["class_names"] == ["b", "c"]
    assert np.array(result["confusion"]).tolist() == [[4, 0], [0, 4]]
    assert "the set has 2 of the checkpoint's 3, and only these are predicted" in said


def test_unknown_classes_end_in_a_line_or_are_left_out(run, tmp_path, capsys):
    options = ("--data", "folder", "--root", pictures(tmp_path / "set", "bcd"))
    _, said = evaluate(run, capsys, *options, expected=2)
    assert (
        said.count("\n") == 1
        and "does not know d; give --classes known to leave their images out, or --classes by-number" in said
    )
    report, said = evaluate(run, capsys, *options, "--classes", "known")
    assert report["results"][0]["top1"] == 1.0 and report["results"][0]["images"] == 8
    assert "classes: left out d, which the checkpoint does not know, with 4 test images" in said
    report, _ = evaluate(run, capsys, *options, "--classes", "by-number")
    assert report["results"][0]["top1"] == 0.0
    _, said = evaluate(run, capsys, "--data", "digits", "--classes", "known", expected=2)
    assert "none of these is the checkpoint's" in said


def test_classes_without_names_are_taken_by_number(run, tmp_path, capsys):
    path = tmp_path / "set.npz"
    x = np.stack([np.full((16, 16, 3), COLOURS[name], dtype=np.uint8) for name in NAMES])
    np.savez(path, train_x=x, train_y=np.arange(3), test_x=x, test_y=np.arange(3))
    report, said = evaluate(run, capsys, "--data", "npz", "--root", path)
    assert report["results"][0]["top1"] == 1.0 and report["class_names"] == list(NAMES)
    assert "taken by number, such as 0 for a" in said


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_split_alone_is_enough_to_be_evaluated(run, tmp_path, capsys, split):
    root = pictures(tmp_path / "set", "abc", splits=(split,))
    report, _ = evaluate(run, capsys, "--data", "folder", "--root", root)
    assert report["results"][0]["top1"] == 1.0 and report["results"][0]["images"] == 12
    _, said = evaluate(run, capsys, "--data", "folder", "--root", root, "--probe", "knn", expected=2)
    assert "there are no training images" in said


def test_an_ensemble_is_matched_by_name(run, tmp_path, capsys):
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    content["state_dict"]["model.head.weight"] = content["state_dict"]["model.head.weight"][[2, 0, 1]]
    content[saved_runs.ENTRY]["class_names"] = ["c", "a", "b"]
    torch.save(content, tmp_path / "cab.ckpt")
    root = pictures(tmp_path / "set", "abc", splits=("test",))
    options = ("--data", "folder", "--root", root, "--ensemble-with")
    report, _ = evaluate(run, capsys, *options, tmp_path / "cab.ckpt")
    assert report["results"][0]["top1"] == 1.0
    alone, _ = evaluate(run, capsys, "--data", "folder", "--root", root)
    assert report["results"][0]["nll"] == pytest.approx(alone["results"][0]["nll"])
    saved_runs.save_run(tmp_path / "other", MOE, class_names=("a", "b", "x"))
    assert load_checkpoint(tmp_path / "other").mean  # of the same images
    assert main(["evaluate", str(run), "--out", str(tmp_path / "o"), *map(str, options), str(tmp_path / "other")]) == 2
    assert "--ensemble-with" in capsys.readouterr().err


def test_outputs_by_name():
    assert find_outputs(["a", "b", "c"], ["c", "a"]) == [2, 0]
    assert find_outputs(["a", "b"], ["b", "x"]) == [1, None] and known_outputs(["a", "b"], ["b", "x"]) is None
    assert find_outputs(["crane", "dog", "crane"], ["dog", "crane", "crane"]) == [1, 0, 2]
    assert find_outputs(["a", "b"], ["0", "1"]) == [0, 1]
    assert known_outputs(["0", "1"], ["a", "b"]) is None
    assert find_outputs(["0", "1", "2"], ["1", "0"]) == [1, 0]
