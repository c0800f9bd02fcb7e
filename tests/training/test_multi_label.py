"""Images of several classes: their losses by plain formulas, and a run from its data to its predictions."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.loss import AsymmetricLossMultiLabel
from torch.utils.data import DataLoader, TensorDataset

import vmoe
from vmoe.checkpoints import RunFolder, read_checkpoint
from vmoe.checkpoints.program import facts_of_program, program_metadata
from vmoe.cli.calibrate import main as calibrate
from vmoe.cli.distill import main as distill
from vmoe.cli.evaluate import main as evaluate
from vmoe.cli.heatmap import main as heatmap
from vmoe.cli.predict import main as predict
from vmoe.cli.prune import main as prune
from vmoe.cli.train import main as train
from vmoe.data import DataConfig
from vmoe.data.config import MixConfig
from vmoe.errors import UserError
from vmoe.evaluation.evaluate import data_for, open_data
from vmoe.explain.explorer import Subject
from vmoe.explain.explorer.collection import collect
from vmoe.export.card import model_card
from vmoe.serve.demo_page import write_demo_page
from vmoe.serve.uploads import Upload
from vmoe.training.config import LossConfig, ModelConfig
from vmoe.training.label_loss import LabelLoss

SMALL = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
NAMES = ["red", "green", "blue"]


def drawn(mixed):
    """Logits (B, C), labels (B, C) int8, and their shares, mixed in pairs or not."""
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(9, 4, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 2, (9, 4), generator=draw)
    return logits, labels.to(torch.int8), 0.7 * labels + 0.3 * labels.roll(1, 0) if mixed else labels.double()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "config",
    [LossConfig(), LossConfig("focal", gamma=1.5), LossConfig("asymmetric"), LossConfig("asymmetric", gamma_pos=0.0)],
)
def test_losses_are_their_formulas(config, smoothing, mixed):
    logits, labels, shares = drawn(mixed)
    y = shares * (1 - smoothing) + smoothing / 2
    p = logits.sigmoid()
    if config.name is None:
        expected = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    elif config.name == "focal":
        right = p * y + (1 - p) * (1 - y)
        expected = -(y * p.log() + (1 - y) * (1 - p).log()) * (1 - right) ** 1.5
        expected = expected.mean()
    else:
        absent = (1 - p + 0.05).clamp(max=1)
        weight = (1 - p * y - absent * (1 - y)) ** (config.gamma_pos * y + config.gamma_neg * (1 - y))
        expected = -((y * p.log() + (1 - y) * absent.log()) * weight).sum(1).mean()
    found = LabelLoss(config, smoothing, multi_label=True)(logits.float(), labels, shares.float() if mixed else None)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-9)


def test_the_asymmetric_loss_is_timm_s():
    logits, labels, _ = drawn(mixed=False)
    theirs = AsymmetricLossMultiLabel()(logits.float(), labels.float())
    found = LabelLoss(LossConfig("asymmetric"), 0.0, multi_label=True)(logits.float(), labels)
    # timm's older versions sum over the images, too
    assert any(torch.allclose(found, theirs / divisor) for divisor in (1, len(logits)))


def arrays(path, count=160):
    """Squares of three colours on noise, in an .npz file; returns the test images."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, (count, 3))
    images = draw.integers(0, 60, (count, 16, 16, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        for colour in np.flatnonzero(label):
            row, column = draw.integers(0, 10, 2)
            image[row : row + 6, column : column + 6, colour] = 230
    parts = {"train": slice(0, 96), "val": slice(96, 128), "test": slice(128, None)}
    content = {
        f"{name}_{key}": each[part]
        for name, part in parts.items()
        for key, each in zip("xy", (images, labels), strict=True)
    }
    np.savez(path, **content, class_names=NAMES)
    return images[128:], labels[128:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of an .npz file, its test images and their labels."""
    folder = tmp_path_factory.mktemp("several")
    images, labels = arrays(folder / "squares.npz")
    run = vmoe.fit(
        data=DataConfig("npz", str(folder / "squares.npz"), batch_size=32, mix=MixConfig(mixup_alpha=0.2)),
        model=ModelConfig("vit_tiny_patch16_224", SMALL),
        moe=vmoe.MoeConfig(num_experts=4),
        epochs=7,
        output_dir=folder / "run",
        options={
            "optim.lr": 6e-3, "loss.name": "asymmetric", "trainer.ema_decay": 0.8, "trainer.device": "cpu",
            "trainer.loggers": ["csv"],
        },
        progress=False,
    )  # fmt: skip
    return run, images, labels


def test_a_run_learns_and_its_best_checkpoint_is_by_map(trained):
    run, *_ = trained
    columns = run.history[0].keys()
    assert {"train/f1", "val/mAP", "val/f1"} <= columns and not {"train/top1", "val/top1"} & columns
    by_map = [row["val/mAP"] for row in run.history]
    assert run.metrics["val/mAP"] == max(by_map) > 0.9
    assert run.metrics["test/mAP"] > 0.9


def test_thresholds_are_chosen_on_validation_and_kept(trained):
    run, images, labels = trained
    entry = read_checkpoint(RunFolder(run.path).best)["vmoe"]
    assert entry["multi_label"] is True and len(entry["thresholds"]) == 3
    model = run.model
    assert model.multi_label and model.thresholds == entry["thresholds"]
    found = model.predict(images, progress=False)
    assert found.labels == [
        [NAMES[index] for index in np.argsort(-row, kind="stable") if row[index] >= model.thresholds[index]]
        for row in found.probabilities
    ]
    np.testing.assert_allclose(found.probabilities, 1 / (1 + np.exp(-found.logits)), rtol=1e-5)
    assert found.labels_from(1.0) == [[]] * len(images)
    result = vmoe.evaluate(model, progress=False)
    right = sum(
        {NAMES[i] for i in np.flatnonzero(row)} == set(names) for row, names in zip(labels, found.labels, strict=True)
    )
    assert result["exact_match"] == pytest.approx(right / len(images))
    assert result["average_precision"] == pytest.approx(run.metrics["test/mAP"], abs=1e-6)


def test_a_classifier_that_goes_on_has_the_thresholds_before_its_first_validation(trained):
    run, *_ = trained
    best = RunFolder(run.path).best
    assert vmoe.Classifier.load_from_checkpoint(best).thresholds == run.model.thresholds
    resumed = vmoe.Classifier(run.model, multi_label=True)
    resumed.on_load_checkpoint(read_checkpoint(best))
    assert resumed.thresholds == run.model.thresholds


def test_the_command_line_measures_and_predicts(trained, tmp_path, capsys):
    run, images, _ = trained
    assert evaluate([str(run.path), "--out", str(tmp_path)]) == 0
    (result,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert result["class_images"] == vmoe.evaluate(run.model, progress=False)["class_images"]
    assert {path.name for path in tmp_path.glob("*.png")} == {"precision_recall.png"}
    assert f"{result['average_precision']:.2%}" in capsys.readouterr().out
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    table = tmp_path / "answers.csv"
    assert predict([str(run.path), str(tmp_path / "a.png"), "--csv", str(table)]) == 0
    (names,) = run.model.predict(images[:1], progress=False).labels
    assert f"a.png: {', '.join(names) or 'no class'} (" in capsys.readouterr().out
    with open(table, newline="") as file:
        assert {row["class"] for row in csv.DictReader(file) if row["is_label"] == "True"} == set(names)
    assert predict([str(run.path), str(tmp_path / "a.png"), "--csv", str(table), "--top=1", "--threshold=0"]) == 0
    with open(table, newline="") as file:  # every label has a row, also those after the most probable class
        assert [(row["rank"], row["is_label"]) for row in csv.DictReader(file)] == [(str(n), "True") for n in (1, 2, 3)]


def test_a_label_that_the_model_does_not_know_is_left_out_and_its_images_stay(trained, tmp_path):
    run, *_ = trained
    arrays = {"class_names": np.array([*NAMES, "unknown to it"])}
    for split in ("train", "val", "test"):
        shape = len(NAMES) + 1
        arrays |= {f"{split}_x": np.zeros((shape, 16, 16, 3), np.uint8), f"{split}_y": np.eye(shape, dtype=np.uint8)}
    np.savez(tmp_path / "more.npz", **arrays)
    data, lines = open_data(run.model, data_for(run.model, tmp_path / "more.npz"), "known")
    assert data.number_of_images("test") == len(NAMES) + 1 and list(data.class_names) == list(NAMES)
    assert lines[-1].endswith("does not know, with 1 label of test images; the images stay")


def test_a_file_that_leaves_the_machine_keeps_the_thresholds_in_the_order_of_the_classes(trained, tmp_path):
    run, *_ = trained
    vmoe.save(run.model, tmp_path / "model.safetensors")
    again = vmoe.load(tmp_path / "model.safetensors")
    assert again.multi_label and again.thresholds == run.model.thresholds
    view = again.with_facts_for(again, class_names=NAMES[::-1])
    assert view.thresholds == run.model.thresholds[::-1]


def test_a_model_of_one_s_own_loop_is_saved_for_several_classes(trained, tmp_path):
    run, images, _ = trained
    model = vmoe.create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, **SMALL)
    path = tmp_path / "mine.safetensors"
    vmoe.save(model, path, NAMES, mean=run.model.mean, std=run.model.std, multi_label=True, thresholds=[0.2, 0.5, 0.7])
    mine = vmoe.load(path)
    assert mine.multi_label and mine.thresholds == [0.2, 0.5, 0.7]
    probabilities = mine.predict(images, progress=False).probabilities
    right = ((probabilities >= mine.thresholds) == trained[2]).all(1).mean()
    assert vmoe.evaluate(mine, run.path.parent / "squares.npz", progress=False)["exact_match"] == pytest.approx(right)
    vmoe.save(run.model, path, multi_label=False)
    assert not vmoe.load(path).multi_label
    for arguments, line in (
        ({"thresholds": [0.5] * 3}, "thresholds: are for several classes per image; give multi_label=True too"),
        ({"multi_label": True, "thresholds": [0.5]}, "thresholds: are 1, but the classes are 3"),
        ({"multi_label": True, "thresholds": [0.5, 2, 0.5]}, "must be probabilities from 0 to 1"),
    ):
        with pytest.raises(UserError, match=line):
            vmoe.save(model, path, NAMES, **arguments)


def test_experts_are_pruned_and_a_student_is_distilled(trained, tmp_path, capsys):
    run, *_ = trained
    pruned, student = tmp_path / "pruned", tmp_path / "student"
    assert prune([str(run.path), "--keep", "2", "--merge", "--finetune", "1", "--out", str(pruned)]) == 0
    rows = json.loads((pruned / "prune.json").read_text())["results"]
    assert rows["before"]["average_precision"] == pytest.approx(run.metrics["test/mAP"], abs=1e-6)
    assert rows["fine-tuned"].keys() == rows["after"].keys() and "mAP" in capsys.readouterr().out
    assert vmoe.load(pruned).thresholds == run.model.thresholds
    assert (
        distill([str(run.path), "--out", str(student), "--", "--trainer.epochs", "3", "--distill.weight", "0.9"]) == 0
    )
    metrics = json.loads((student / "summary.json").read_text())["metrics"]
    assert vmoe.load(student).multi_label and metrics["test/mAP"] > 0.9
    options = ["--data.name", "digits", "--distill.teacher", str(run.path), "--output_dir", str(tmp_path / "no")]
    assert train(options) == 2
    assert "knows several classes per image and these images have one class" in capsys.readouterr().err
    assert train([*options, "--loss.name", "bce"]) == 2
    assert "must be cross_entropy with distill.teacher" in capsys.readouterr().err


def test_heatmaps_and_the_explorer_decide_by_the_thresholds(trained, tmp_path, capsys):
    run, images, _ = trained
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    index = vmoe.write_heatmaps(run.model, [tmp_path / "a.png"], tmp_path / "maps")
    found = run.model.predict(images, progress=False)
    assert index["images"][0]["labels"] == found.labels[0]
    assert heatmap([str(run.path), str(tmp_path / "a.png"), "--out", str(tmp_path / "by_job")]) == 0
    said = capsys.readouterr().out
    assert all(f"{name} {share:.1%}" in said for name, share in zip(NAMES, found.probabilities[0], strict=True))
    data, _ = open_data(run.model, data_for(run.model))
    seen = collect(Subject.of(run.model, "mine"), data.random_dataloader("test", 0), replicates=2, sample=40)
    assert seen.correct / seen.images == vmoe.evaluate(run.model, progress=False)["exact_match"]
    names = [[NAMES[i] for i in np.flatnonzero(row)] for row in seen.sample["predicted"]]
    assert sorted(names) == sorted(sorted(labels, key=NAMES.index) for labels in found.labels)


def test_programs_cards_and_the_server_say_several_classes(trained, tmp_path):
    run, images, _ = trained
    found = facts_of_program(json.dumps(program_metadata(run.model.facts)), tmp_path)
    assert found.multi_label and found.thresholds == run.model.thresholds
    card = model_card(run.model, run.path, None)
    assert f"| test mAP | {run.metrics['test/mAP']:.2%}" in card and "several of the 3 classes" in card
    server = pytest.importorskip("vmoe.serve.server")
    service = server.ModelService(run.path, lambda: torch.device("cpu"), 2)
    service.model = run.model
    answers = service.predict([Upload(image, top=1, routing=False) for image in images[:2]])
    assert [answer["labels"] for answer in answers] == run.model.predict(images[:2], progress=False).labels


def test_calibration_moves_probabilities_and_thresholds_alike(trained, tmp_path, capsys):
    run, images, labels = trained
    path, report = tmp_path / "calibrated.safetensors", tmp_path / "report.json"
    assert calibrate([str(run.path), "--out", str(path), "--json", str(report)]) == 0
    found, after = json.loads(report.read_text()), vmoe.load(path)
    assert "binary cross-entropy" in capsys.readouterr().out and found["images"] == 32
    before = run.model.predict(images, progress=False)
    now = after.predict(images, progress=False)
    np.testing.assert_allclose(now.logits, before.logits / found["temperature"], rtol=1e-4, atol=1e-4)
    assert now.labels == before.labels
    p = now.probabilities.astype(float)
    bce = -np.where(labels == 1, np.log(p), np.log(1 - p)).mean()
    assert found["after"]["bce"] == pytest.approx(bce, rel=1e-4)
    data, _ = open_data(run.model, data_for(run.model))
    (validation,) = [(run.model(batch.images).detach().double(), batch.labels) for batch in data.val_dataloader()]
    losses = [
        torch.nn.functional.binary_cross_entropy_with_logits(validation[0] / t, validation[1].double())
        for t in (found["temperature"] * factor for factor in (1, 0.98, 1.02))
    ]
    assert losses[0] == min(losses)
    assert predict([str(path), str(report), "--coverage", "0.9"]) == 2
    assert "--coverage: is for one class per image" in capsys.readouterr().err


def test_calibration_of_answers_without_a_mistake_keeps_the_classes_and_says_its_bound(trained, tmp_path, capsys):
    run, images, _ = trained
    path, out = tmp_path / "model.safetensors", tmp_path / "calibrated.safetensors"
    sure = vmoe.load(run.path)
    with torch.no_grad():
        sure.head.weight.mul_(4)
    vmoe.save(sure, path, thresholds=[0.9, 0.95, 0.99], multi_label=True)
    found = vmoe.load(path).predict(images, progress=False)
    arrays = {f"{split}_{key}": each for split in ("train", "val", "test")
              for key, each in (("x", images), ("y", (found.logits > 0).astype(np.uint8)))}  # fmt: skip
    np.savez(tmp_path / "right.npz", **arrays, class_names=NAMES)
    assert calibrate([str(path), "--out", str(out), "--data", str(tmp_path / "right.npz")]) == 0
    assert "at the smallest temperature that is allowed" in capsys.readouterr().err
    assert vmoe.load(out).predict(images, progress=False).labels == found.labels


@pytest.mark.slow  # an export takes seconds
def test_the_demo_page_has_the_thresholds(trained, tmp_path):
    pytest.importorskip("onnxscript")
    (tmp_path / "runtime" / "dist").mkdir(parents=True)
    for name in ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
        (tmp_path / "runtime" / "dist" / name).write_bytes(b"")
    write_demo_page(tmp_path / "page", trained[0].path, [], runtime=tmp_path / "runtime")
    about = json.loads((tmp_path / "page" / "about.js").read_text().removeprefix("globalThis.ABOUT = ").rstrip(";\n"))
    assert about["thresholds"] == trained[0].model.thresholds and "several of them, or none" in about["summary"]


def test_corruptions_and_ensembles_are_measured_by_map(trained, tmp_path, capsys):
    run, images, labels = trained
    last = vmoe.load(RunFolder(run.path).last)
    arguments = ["--corruptions", "contrast", "--severities", "5", "--ensemble-with", str(last.path)]
    assert evaluate([str(run.path), *arguments, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "evaluation.json").read_text())
    found = report["corruptions"]
    assert found["mean_average_precision"] == found["average_precision"]["contrast"]["5"]
    assert "mAP on corrupted images" in capsys.readouterr().out
    probabilities = [model.predict(images, progress=False).probabilities for model in (run.model, last)]
    found = np.mean(probabilities, 0) >= run.model.thresholds
    assert report["results"][0]["exact_match"] == pytest.approx((found == labels).all(1).mean())


@pytest.mark.parametrize("arguments", [["--probe", "knn"], ["--data", "digits"]])
def test_what_is_of_one_class_per_image_is_refused(trained, capsys, arguments):
    path = str(trained[0].path)
    assert evaluate([path, *arguments]) == 2
    assert "several classes per image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss.name": "cross_entropy"}, "loss.name=cross_entropy: is for images of one class"),
        ({"loss.class_weights": "balanced"}, "loss.class_weights: is for images of one class"),
        ({"data.sampler": "class_balanced"}, "data.sampler=class_balanced: needs images of one class each"),
        ({"data.subset.per_class": 3}, "data.subset.per_class=3: needs images of one class each"),
    ],
)
def test_options_for_one_class_per_image_are_refused(trained, tmp_path, options, message):
    data = trained[0].path.parent / "squares.npz"
    with pytest.raises(UserError, match=message):
        vmoe.fit(data=data, output_dir=tmp_path / "new", options=options, progress=False)
    assert not (tmp_path / "new" / "config.yaml").exists()


def test_a_classifier_of_any_trainer_takes_labels_of_several_classes(tmp_path):
    import lightning as L

    loader = DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.randint(0, 2, (8, 3))), batch_size=4)
    model = vmoe.create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, **SMALL)
    task = vmoe.Classifier(model, multi_label=True, loss={"name": "focal"}, class_names=NAMES)
    run = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    run.fit(task, loader, loader)
    assert {"train/f1", "val/mAP"} <= run.callback_metrics.keys()
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = vmoe.Classifier.load_from_checkpoint(tmp_path / "one.ckpt")
    assert again.multi_label and again.loss.name == "focal" and len(again.model.thresholds) == 3
    with pytest.raises(UserError, match=r"must be \(B, C\) of 0 and 1"):
        task.validation_step((torch.randn(8, 3, 16, 16), torch.arange(8) % 3), 0)
