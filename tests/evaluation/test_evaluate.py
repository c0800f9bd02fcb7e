"""`vmoe.evaluate`: the numbers of `vmoe evaluate`, in a script."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.saved_runs import save_run

import vmoe
from vmoe.cli.evaluate import main
from vmoe.data import DataConfig

MOE = {"num_experts": 4, "top_k": 2, "layers": [1]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "mine", moe=MOE)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of class folders, and the same test images as an .npz file."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    for split, offset in (("train", 0), ("test", 20)):
        for index in range(20):
            place = folder / "photos" / split / str(index % 10)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[offset + index]).save(place / f"{index}.png")
    labels = np.arange(20) % 10
    arrays = {"train_x": images[:20], "train_y": labels, "test_x": images[20:], "test_y": labels}
    np.savez(folder / "photos.npz", **arrays)
    return folder


def without_time(result):
    assert result["images_per_second"] is None or result["images_per_second"] > 0
    return {name: value for name, value in result.items() if name != "images_per_second"}


def test_a_script_gets_the_numbers_of_the_command(run, tmp_path):
    arguments = ["--capacity-factor", "0.5", "--top-k", "1", "--batch-size", "100", "--out", str(tmp_path)]
    assert main([str(run), *arguments]) == 0
    (told,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    model = vmoe.load(run)
    result = vmoe.evaluate(model, "digits", capacity_factor=0.5, top_k=1, batch_size=100)
    assert without_time(result) == without_time(told) == without_time(json.loads(json.dumps(result)))
    assert result["dropped"] > 0.1 and list(result["layers"]) == ["blocks.1.mlp"]
    own = vmoe.evaluate(model)
    assert (own["capacity_factor"], own["top_k"], own["dropped"]) == (None, 2, 0)  # the model is as it was


def test_data_are_a_name_a_path_or_a_config(run, photographs):
    model = vmoe.load(run)
    same = [
        vmoe.evaluate(model, photographs / "photos"),
        vmoe.evaluate(model, str(photographs / "photos.npz")),
        vmoe.evaluate(model, "folder", root=photographs / "photos"),
        vmoe.evaluate(model, DataConfig(name="npz", root=str(photographs / "photos.npz"), image_size=8)),
    ]
    assert same[0]["images"] == 20
    for result in same[1:]:
        assert result["nll"] == pytest.approx(same[0]["nll"])


def test_the_model_stays_in_the_mode_it_is_in(run):
    model = vmoe.load(run).train()
    expected = without_time(vmoe.evaluate(vmoe.load(run)))
    assert without_time(vmoe.evaluate(model)) == expected and model.training and model.blocks[1].training


def test_classes_are_found_by_name_and_the_model_stays_what_it_was(run, photographs, tmp_path):
    renamed = _renamed(photographs, tmp_path)
    model, turned = vmoe.load(run), vmoe.load(run)
    model.class_names = [f"c{index}" for index in range(10)]
    own = vmoe.evaluate(model, renamed)
    order = list(range(10))[::-1]
    with torch.no_grad():
        turned.head.weight.copy_(turned.head.weight[order])
        turned.head.bias.copy_(turned.head.bias[order])
    turned.class_names = [f"c{index}" for index in order]
    logits = turned(torch.zeros(1, 3, 16, 16))
    with pytest.warns(UserWarning, match="matched by name: the set has them in another order"):
        result = vmoe.evaluate(turned, renamed)
    assert result["nll"] == pytest.approx(own["nll"]) and result["top1"] == own["top1"]
    assert turned.class_names[0] == "c9" and torch.equal(turned(torch.zeros(1, 3, 16, 16)), logits)
    letters = vmoe.load(save_run(tmp_path / "letters", class_names=tuple("abcdefghij")))
    with pytest.raises(ValueError, match=r"does not know c0, c1, .*; give classes='known' .* or classes='by-number'"):
        vmoe.evaluate(letters, renamed)
    with pytest.warns(UserWarning, match="taken by number, such as c0 for a"):
        assert vmoe.evaluate(letters, renamed, classes="by-number")["images"] == 20


def _renamed(photographs, folder):
    """The photographs, of classes with other names."""
    for place in (photographs / "photos").glob("*/*"):
        link = folder / "renamed" / place.parent.name / f"c{place.name}"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(place)
    return folder / "renamed"


def test_mistakes_are_value_errors_of_one_line_that_name_the_argument(run, tmp_path):
    model, dense = vmoe.load(run), vmoe.load(save_run(tmp_path / "dense"))
    three = vmoe.load(save_run(tmp_path / "three", class_names=("a", "b", "c")))
    vmoe.save(dense, tmp_path / "no_data.ckpt")
    no_data = vmoe.load(tmp_path / "no_data.ckpt")
    no_data.config.pop("data")
    for subject, arguments, line in (
        (model, {"data": "digitz"}, r"^data\.name='digitz': must be one of .*did you mean 'digits'"),
        (model, {"data": "folder", "root": tmp_path / "nowhere"}, "nowhere"),
        (model, {"split": "train"}, r"^split='train': must be one of test, val"),
        (model, {"batch_size": 0}, r"eval_batch_size=0: must be from 1"),
        (model, {"capacity_factor": 2000}, r"^capacity_factor=2000: must be > 0 and at most 1000"),
        (model, {"top_k": 9}, r"^top_k=9: must be at most num_experts=4"),
        (dense, {"capacity_factor": 1}, r"^capacity_factor=1: this checkpoint is a dense model"),
        (three, {}, r"^data\.name: digits has 10 classes, the checkpoint 3, which does not know 0, "),
        (no_data, {}, r"^data: is missing; .*no_data\.ckpt does not record"),
        (torch.nn.Identity(), {}, r"^model: a Identity does not know its classes"),
    ):
        with pytest.raises(ValueError, match=line) as caught:
            vmoe.evaluate(subject, **arguments)
        assert "\n" not in str(caught.value)
