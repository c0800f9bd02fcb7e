"""A run that learns from a teacher."""

import os
import signal

import pytest
import torch
from torch import nn

from vmoe.checkpoints import RunFolder, load_checkpoint
from vmoe.cli.train import main
from vmoe.data import DataConfig, ImageDataModule, SubsetConfig
from vmoe.training.classifier import Classifier
from vmoe.training.config import DistillConfig, LossConfig
from vmoe.training.distillation import Teacher, load_teacher, sigmoid_distance

RECIPE = """
data: {name: digits, batch_size: 40, subset: {per_class: 20}, mix: {mixup_alpha: 0.8}}
model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}
optim: {warmup_epochs: 0}
trainer: {epochs: 2, device: cpu}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The recipe's file, the folder of a sparse teacher and that of its dense student."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    teacher, student = folder / "teacher", folder / "student"
    sparse = ["--moe.num_experts", "4", "--trainer.epochs", "1", "--seed", "1"]
    assert main(["--config", str(recipe), "--output_dir", str(teacher), *sparse]) == 0
    assert main(["--config", str(recipe), "--output_dir", str(student), "--distill.teacher", str(teacher)]) == 0
    return recipe, teacher, student


def weights_of(folder) -> dict[str, torch.Tensor]:
    return torch.load(RunFolder(folder).last, weights_only=True)["state_dict"]


@pytest.mark.parametrize(("weight", "temperature"), [(0.25, 1.0), (0.5, 4.0), (1.0, 2.0)])
def test_the_loss_is_hintons(weight, temperature):
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), torch.randn(6, 3, 2, 2)
    teacher = Teacher(model, DistillConfig("teacher", weight, temperature))
    logits, loss = torch.randn(6, 5, requires_grad=True), torch.tensor(3.0)
    wanted = (model(images) / temperature).softmax(-1).detach()
    ours = (logits / temperature).softmax(-1)
    distance = (wanted * (wanted.log() - ours.log())).sum(-1).mean()
    expected = (1 - weight) * 3.0 + weight * temperature**2 * distance
    found = teacher.mixed_into(loss, images, logits)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert logits.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    same = teacher.mixed_into(loss, images, model(images))
    torch.testing.assert_close(same, torch.tensor((1 - weight) * 3.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("sum_classes", [False, True])
def test_of_several_classes_the_distance_is_that_of_each_on_its_own(sum_classes):
    torch.manual_seed(0)
    ours, theirs = 3 * torch.randn(2, 6, 5, dtype=torch.float64)
    p, q = theirs.sigmoid(), ours.sigmoid()
    each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    expected = each.sum(1).mean() if sum_classes else each.mean()
    torch.testing.assert_close(sigmoid_distance(ours, theirs, sum_classes), expected)


def test_the_teacher_is_in_no_checkpoint_and_stays_as_it_is(runs):
    _, teacher, student = runs
    module = Classifier(nn.Linear(2, 2))
    module.teacher = Teacher(nn.Linear(2, 2), DistillConfig("teacher"))
    assert {name for name, _ in module.named_parameters()} == {"model.weight", "model.bias"}
    assert weights_of(student).keys() == {f"model.{name}" for name in load_checkpoint(student).model.state_dict()}
    assert RunFolder(student).last.stat().st_size < RunFolder(teacher).last.stat().st_size


def test_the_student_draws_near_to_its_teacher(runs, tmp_path):
    recipe, teacher, student = runs
    alone = tmp_path / "alone"
    assert main(["--config", str(recipe), "--output_dir", str(alone)]) == 0
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted, taught, untaught = (
        load_checkpoint(RunFolder(folder).last).model(images).log_softmax(-1) for folder in (teacher, student, alone)
    )
    assert (wanted - taught).square().mean() < (wanted - untaught).square().mean()


def test_a_distilled_run_resumes_bit_for_bit(runs, tmp_path, monkeypatch):
    recipe, teacher, student = runs
    step, seen = Classifier.training_step, []

    def step_and_signal(self, *args):
        seen.append(None)
        if len(seen) == 3:  # in the middle of an epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", step_and_signal)
        arguments = ["--config", str(recipe), "--output_dir", str(tmp_path), "--distill.teacher", str(teacher)]
        assert main(arguments) == 128 + signal.SIGTERM
    torch.manual_seed(123)
    assert main(["--config", str(tmp_path / "config.yaml"), "--resume"]) == 0
    expected = weights_of(student)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(tmp_path).items())


def test_a_teacher_s_classes_are_matched_by_name(runs):
    _, teacher, _ = runs
    data = ImageDataModule(DataConfig(name="digits", subset=SubsetConfig(classes=["7", "1"])), seed=0)
    data.setup()
    data.mean, data.std = load_checkpoint(teacher).mean, load_checkpoint(teacher).std
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        whole = load_checkpoint(teacher).model(images)
        part = load_teacher(DistillConfig(str(teacher)), data, LossConfig()).model(images)
    assert torch.equal(part, whole[:, [7, 1]])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--distill.teacher", "nowhere"], "nowhere: no such file"),
        (["--distill.weight", "0.7"], "distill.weight=0.7: must be left out without distill.teacher"),
        (["--distill.teacher", "TEACHER", "--distill.weight", "0"], "distill.weight=0"),
        (["--distill.teacher", "TEACHER", "--distill.temperature", "0"], "distill.temperature=0"),
        (["--distill.teacher", "TEACHER", "--data.image_size", "20"], "its image_size is 16 and this run has 20"),
        (["--distill.teacher", "TEACHER", "--data.mean", "[0.5, 0.5, 0.5]"], "give it --data.mean of the teacher"),
        (["--distill.teacher", "TEACHER", "--data.name", "patchwork"], "its class_names is"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, capsys, options, told):
    recipe, teacher, _ = runs
    options = [str(teacher) if option == "TEACHER" else option for option in options]
    assert main(["--config", str(recipe), "--output_dir", str(tmp_path / "run"), *options]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
