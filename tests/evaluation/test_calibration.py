"""Temperature scaling, and sets of classes of a given coverage."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.saved_runs import save_run

import vmoe
from vmoe.checkpoints.calibration import calibration_of, class_sets, is_calibration, least_probability
from vmoe.checkpoints.program import facts_of_program, program_metadata
from vmoe.errors import UserError
from vmoe.evaluation.calibration import fit_temperature

MOE = {"num_experts": 3, "top_k": 2, "layers": [1]}


def drawn(images: int, classes: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (images, classes) and labels that are drawn from them."""
    probabilities = rng.dirichlet(np.full(classes, 0.3), images)
    return probabilities, (rng.random((images, 1)) > probabilities.cumsum(1)).sum(1).clip(0, classes - 1)


@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_the_temperature_is_that_by_which_labels_were_drawn(temperature):
    probabilities, labels = drawn(20_000, 10, np.random.default_rng(0))
    logits = torch.from_numpy(np.log(probabilities + 1e-30)) * temperature
    assert fit_temperature(logits, torch.from_numpy(labels)) == pytest.approx(temperature, rel=0.03)


def test_answers_without_a_mistake_give_a_temperature_that_is_bounded():
    assert fit_temperature(torch.eye(4, dtype=torch.float64), torch.arange(4)) == pytest.approx(1 / 20, rel=1e-3)


@pytest.mark.parametrize(("images", "coverage"), [(30, 0.9), (99, 0.8), (3000, 0.95)])
def test_sets_have_the_coverage_on_average(images, coverage):
    """At least it, and at most 1 / (n + 1) more, or a step of what is kept (Angelopoulos & Bates 2021, theorem D.2)."""
    rng, covered = np.random.default_rng(1), []
    for _ in range(300):
        probabilities, labels = drawn(images + 200, 8, rng)
        right = probabilities[np.arange(len(labels)), labels]
        least = least_probability(calibration_of(1.0, 0, right[:images]), coverage)
        covered.append((right[images:] >= least).mean())
    error = 4 * np.std(covered) / math.sqrt(len(covered))
    assert coverage - error <= np.mean(covered) <= coverage + 1 / min(images + 1, 1000) + error


def test_what_is_kept_of_many_images_never_promises_more():
    right = np.random.default_rng(2).random(20_000)
    kept = calibration_of(1.0, 0, right)
    assert len(kept["least_probabilities"]) == 999
    for coverage in (0.5, 0.9, 0.9004, 0.999):
        exact = np.sort(right)[math.floor((len(right) + 1) * (1 - coverage)) - 1]
        assert exact - 2e-3 < least_probability(kept, coverage) <= exact


def test_the_most_probable_class_is_in_every_set():
    probabilities = np.array([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25]])
    assert class_sets(probabilities, 0.9).tolist() == [[True, False, False]] * 2
    assert class_sets(probabilities, 0.3).tolist() == [[True, True, False]] * 2


def test_a_coverage_that_cannot_be_had_is_refused():
    kept = calibration_of(1.0, 0, np.linspace(0, 1, 9))
    for coverage, line in (
        (1.0, "between 0 and 1"),
        (0.0, "between 0 and 1"),
        (0.95, "must be at most 0.9 with so few"),
    ):
        with pytest.raises(UserError, match=line):
            least_probability(kept, coverage)
    assert least_probability(kept, 0.9) == 0


@pytest.mark.parametrize("kept", [[], [0.5, 0.2], [-0.1], [0.2, 1.1], None])
def test_a_damaged_calibration_is_known(kept):
    assert not is_calibration({"temperature": 1.0, "images": 3, "least_probabilities": kept})
    assert is_calibration({"temperature": 1.0, "images": 3, "least_probabilities": [0, 0.2, 1]})


@pytest.fixture
def model(tmp_path):
    return vmoe.load(save_run(tmp_path / "run", MOE))


def test_a_calibrated_model_gives_scaled_logits_and_keeps_that_in_its_file(model, tmp_path):
    images, picture = torch.randn(3, 3, 16, 16), np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    with torch.no_grad():
        before = model(images)
        report = vmoe.calibrate(model, progress=False)
        torch.testing.assert_close(model(images), before / report["temperature"])
    assert report["after"]["nll"] < report["before"]["nll"]  # the model is untrained and too sure
    assert vmoe.evaluate(model, progress=False)["nll"] == pytest.approx(report["after"]["nll"], rel=1e-4)
    for each in report["sets"]:
        assert each["found"] > each["coverage"] - 0.15 and 1 <= each["classes"] <= 10
    vmoe.save(model, tmp_path / "calibrated.safetensors")
    again = vmoe.load(tmp_path / "calibrated.safetensors")
    assert again.calibration == model.calibration and again.calibration["temperature"] == report["temperature"]
    found = again.predict(picture)
    (names,) = found.sets(0.9)
    assert names[0] == found.labels[0] and set(names) <= set(again.class_names)
    told = facts_of_program(json.dumps(program_metadata(again.facts)), Path("x.onnx"))
    assert told.calibration == again.calibration
    with pytest.raises(
        UserError, match=r"coverage=0\.9: needs a model that vmoe\.calibrate has calibrated, without tta"
    ):
        again.predict(picture, tta=True).sets(0.9)
    assert again.train().calibration is None


def test_the_same_images_calibrate_every_time(model):
    first, second = vmoe.calibrate(model, progress=False), model.calibration
    again = vmoe.load(model.path)
    assert first == vmoe.calibrate(again, progress=False) and second == again.calibration


def test_a_model_of_other_classes_is_refused(tmp_path):
    other = vmoe.load(save_run(tmp_path / "run", None, None, tuple("abc")))
    with pytest.raises(UserError, match=r"digits has 10 classes, the checkpoint 3; calibration needs the same classes"):
        vmoe.calibrate(other)


def test_data_of_several_classes_per_image_are_refused(model, tmp_path):
    arrays = {"class_names": np.array(model.class_names)}
    for split in ("train", "val", "test"):
        arrays |= {f"{split}_x": np.zeros((10, 16, 16, 3), np.uint8), f"{split}_y": np.eye(10, dtype=np.uint8)}
    np.savez(tmp_path / "several.npz", **arrays)
    with pytest.raises(UserError, match=r"data\.name: npz has several classes per image, and the checkpoint knows one"):
        vmoe.calibrate(model, tmp_path / "several.npz")
