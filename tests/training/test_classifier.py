"""`vmoe.Classifier` and the callbacks in a Trainer that knows nothing of vmoe."""

import csv
import re
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import vmoe
from vmoe.cli.predict import main as predict
from vmoe.data import DataConfig
from vmoe.data.config import SubsetConfig
from vmoe.errors import UserError

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
MOE = vmoe.MoeConfig(num_experts=4)
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def new_model(num_classes: int = 3, **others) -> nn.Module:
    return vmoe.create_model("vit_tiny_patch16_224", MOE, num_classes=num_classes, **SMALL, **others)


def trainer(folder, callbacks=(), logger=False, **options) -> L.Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return L.Trainer(
            default_root_dir=folder, callbacks=list(callbacks), logger=logger, **{"max_epochs": 2, **QUIET, **options}
        )


@pytest.fixture
def loader() -> DataLoader:
    """Three batches of tensors of three classes."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    images = torch.randn(24, 3, 16, 16, generator=draw) + 2 * labels[:, None, None, None]
    return DataLoader(TensorDataset(images, labels), batch_size=8)


@pytest.fixture
def trained(loader, tmp_path):
    """A Classifier after two epochs with the usual callbacks, its Trainer, and the path of the best checkpoint."""
    best = ModelCheckpoint(monitor="val/top1", mode="max", dirpath=tmp_path / "checkpoints")
    callbacks = [best, EarlyStopping("val/loss"), LearningRateMonitor(), vmoe.RoutingMonitor(images=0), vmoe.NanGuard()]
    run = trainer(tmp_path, callbacks, CSVLogger(tmp_path / "logs"), log_every_n_steps=2)
    task = vmoe.Classifier(new_model(), lr=1e-2, weight_decay=0.1, class_names=["a", "b", "c"])
    run.fit(task, loader, loader)
    return task, run, best.best_model_path


def test_it_logs_what_lightning_s_callbacks_and_loggers_read(trained):
    _, run, path = trained
    seen = run.callback_metrics
    names = {f"{split}/{name}" for split in ("train", "val") for name in ("loss", "top1")}
    layer = "moe/blocks.1.mlp"
    names |= {"val/top5", "train/loss_step", f"{layer}/load/3", f"{layer}/dropped", f"{layer}/entropy", f"{layer}/dead"}
    assert names <= seen.keys() and path
    assert sum(seen[f"{layer}/load/{expert}"].item() for expert in range(4)) == pytest.approx(4, abs=1e-5)
    folder = Path(run.logger.log_dir)
    text = (folder / "metrics.csv").read_text()
    assert "val/top1" in text and "lr-AdamW" in text and "train/loss_step" in text
    hparams = (folder / "hparams.yaml").read_text()
    assert "weight_decay: 0.1" in hparams and "num_experts: 4" in hparams


def test_its_checkpoint_is_opened_by_itself_by_load_and_by_the_command_line(trained, loader, tmp_path, capsys):
    task, run, path = trained
    again = vmoe.Classifier.load_from_checkpoint(path)
    assert again.optim.weight_decay == 0.1 and again.hparams.lr == 1e-2
    model = vmoe.load(path)
    assert model.class_names == ["a", "b", "c"] and model.epoch in (1, 2) and model.mean == (0.5, 0.5, 0.5)
    images = next(iter(loader))[0]
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(again.eval()(images), expected)
    (rows,) = trainer(tmp_path).predict(again, DataLoader(images, batch_size=8))
    torch.testing.assert_close(rows, expected.softmax(-1))
    assert run.test(task, loader, verbose=False)[0].keys() == {"test/loss", "test/top1", "test/top5"}
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    assert predict([path, str(tmp_path / "a.png")]) == 0 and "a.png" in capsys.readouterr().out


class _Learning(L.Callback):
    """Which layers learn in each epoch, as the last update left them."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def on_train_epoch_end(self, trainer, pl_module):
        names = [name for name, parameter in pl_module.model.named_parameters() if parameter.grad is not None]
        self.seen.append({".".join(name.split(".")[: 2 if name.startswith("blocks") else 1]) for name in names})


def test_layers_begin_to_learn_one_after_the_other(loader, tmp_path):
    model, learning = vmoe.freeze(new_model(), "pos_embed"), _Learning()
    task = vmoe.Classifier(model, name="muon")
    trainer(tmp_path, [vmoe.GradualUnfreezing(3), learning, vmoe.NanGuard()], max_epochs=4).fit(task, loader)
    stages = [{"head"}, {"blocks.1", "norm"}, {"blocks.0"}, {"patch_embed", "cls_token"}]
    assert learning.seen == [set().union(*stages[: number + 1]) for number in range(4)]
    trainer(tmp_path, [vmoe.GradualUnfreezing(1), learning], max_epochs=2).fit(task, loader)
    assert learning.seen[4:] == [stages[0], set().union(*stages)]
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["pos_embed"]
    for epochs, other, line in (
        (0, task, "epochs=0"),
        ("3", task, "epochs='3': must be a whole number"),
        (1, vmoe.Classifier(vmoe.freeze(model, "all_but_head")), "freeze fewer"),
    ):
        with pytest.raises(UserError, match=line):
            trainer(tmp_path, [vmoe.GradualUnfreezing(epochs)]).fit(other, loader)


def test_weights_alone_are_loaded_into_a_given_model(tmp_path):
    path = tmp_path / "weights.pt"
    weights = new_model().state_dict()
    torch.save(weights, path)
    with pytest.raises(UserError, match=r"weights\.pt.*load_from_checkpoint\(path, model="):
        vmoe.Classifier.load_from_checkpoint(path)
    task = vmoe.Classifier.load_from_checkpoint(path, model=new_model(), lr=1e-4)
    assert task.optim.lr == 1e-4
    assert all(torch.equal(value, weights[name]) for name, value in task.model.state_dict().items())
    with pytest.raises(UserError, match="do not fit this model"):
        vmoe.Classifier.load_from_checkpoint(path, model=new_model(num_classes=5))


def test_a_model_that_cannot_be_described_still_trains_and_says_so(loader, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    run = trainer(tmp_path, max_epochs=1)
    with pytest.warns(UserWarning, match="holds weights alone"):
        run.fit(vmoe.Classifier(model), loader)
        run.save_checkpoint(tmp_path / "a.ckpt")
    assert vmoe.Classifier.load_from_checkpoint(tmp_path / "a.ckpt", model=model).model is model


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"model": "vit_tiny"}, "model='vit_tiny': must be a model"),
        ({"lr": "fast"}, "lr='fast': must be a number"),
        ({"lr": -1.0}, "lr=-1.0: must be above 0"),
        ({"momentum": 0.9}, "momentum: no such option"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, line):
    with pytest.raises(UserError, match=line):
        vmoe.Classifier(**{"model": nn.Linear(1, 1), **arguments})


def test_the_average_is_validated_saved_and_tested(loader, tmp_path):
    ema = vmoe.Ema(0.9)
    run = trainer(tmp_path, [ema, vmoe.NanGuard()], accumulate_grad_batches=2)
    task = vmoe.Classifier(new_model(), lr=1e-2)
    run.fit(task, loader, loader)
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert "val/raw_top1" in run.callback_metrics
    average = task.average.weights
    assert all(torch.equal(value, average[name]) for name, value in vmoe.load(tmp_path / "a.ckpt").named_parameters())
    before = {name: value.clone() for name, value in task.model.named_parameters()}
    validated = run.callback_metrics["val/loss"]
    for tests in (run, trainer(tmp_path, [vmoe.Ema()])):
        assert tests.test(task, loader, verbose=False)[0]["test/loss"] == pytest.approx(validated.item(), rel=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in task.model.named_parameters())


@pytest.mark.parametrize("fused", [True, False])
def test_the_guard_keeps_the_weights_of_another_s_module(loader, tmp_path, fused):
    class Foreign(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            return loss * (float("nan") if self.global_step == 2 else 1)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), fused=fused)

    module = Foreign()
    with pytest.raises(UserError, match="step 3: the loss or its gradient became NaN"):
        trainer(tmp_path, [vmoe.NanGuard(), vmoe.Ema(0.9)]).fit(module, loader)
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("stop", [4, 6])
def test_a_resumed_training_is_the_one_that_never_stopped(tmp_path, stop):
    """After an epoch's last batch and in the middle, with the augmentation, mixing and router noise of a usual run."""
    config = DataConfig(batch_size=20, image_size=16, subset=SubsetConfig(per_class=8))

    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "stopped.ckpt")
                raise KeyboardInterrupt

    def fit(*callbacks, path=None):
        torch.manual_seed(0 if path is None else 1)
        run, task = (
            trainer(tmp_path, [vmoe.RoutingMonitor(images=0), vmoe.ExactResume(), *callbacks]),
            vmoe.Classifier(new_model(10), lr=1e-2),
        )
        try:
            run.fit(task, datamodule=vmoe.ImageDataModule(config), ckpt_path=path)
        except SystemExit:  # Lightning's answer to an interrupt
            assert callbacks
        return task, run

    whole, run = fit()
    fit(Stops())
    resumed, again = fit(path=tmp_path / "stopped.ckpt")
    assert run.global_step == again.global_step == 8
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    metrics = again.callback_metrics
    assert all(torch.equal(value, metrics[name]) for name, value in run.callback_metrics.items())


def test_routing_pictures_colour_patches_and_reach_a_logger(loader, tmp_path):
    from vmoe.training.callbacks.routing_monitor import routing_pictures

    images = next(iter(loader))[0][:2]
    ((name, pictures),) = routing_pictures(new_model(), images).items()
    assert name == "blocks.1.mlp" and len(pictures) == 2 and pictures[0].shape == (96, 96, 3)

    class Keeps(CSVLogger):
        def log_image(self, key, images, step):
            kept.append((key, len(images)))

    kept = []
    trainer(tmp_path, [vmoe.RoutingMonitor(images=3)], Keeps(tmp_path)).fit(
        vmoe.Classifier(new_model()), loader, loader
    )
    assert kept == [("routing/blocks.1.mlp", 3)] * 2


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of twelve pictures of each of two classes."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(12):
            Image.new("RGB", (20, 20), (10 * number, 0, 0)).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_a_folder_is_a_datamodule_that_knows_its_classes(photos, tmp_path):
    data = vmoe.ImageDataModule(photos, batch_size=6, image_size=16)
    assert data.num_classes == 2 and data.class_names == ["cat", "dog"] and data.config.batch_size == 6
    run = trainer(tmp_path)
    task = vmoe.Classifier(new_model(data.num_classes))
    run.fit(task, data)
    assert run.global_step == 6 and "val/top1" in run.callback_metrics
    assert run.predict(task, data)[0].shape[1] == 2
    run.save_checkpoint(tmp_path / "a.ckpt")
    model = vmoe.load(tmp_path / "a.ckpt")
    assert model.class_names == ["cat", "dog"] and list(model.mean) == list(data.mean)
    assert vmoe.evaluate(model, progress=False)["images"] > 0  # on the same folder


def test_a_datamodule_without_validation_still_trains(photos, tmp_path):
    data = vmoe.ImageDataModule(photos, batch_size=6, image_size=16, val_fraction=0.0)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(vmoe.Classifier(new_model(2)), data)
    assert "train/top1" in run.callback_metrics and "val/top1" not in run.callback_metrics


@pytest.mark.parametrize(
    ("data", "options", "line"),
    [
        ("nowhere/", {}, "data.name='nowhere/': no such folder"),
        ("digits", {"batch": 3}, "batch: no such argument"),
        ("digits", {"batch_size": "x"}, "batch_size='x': must be a whole number"),
    ],
)
def test_wrong_data_are_one_line(data, options, line):
    with pytest.raises(UserError, match=line):
        vmoe.ImageDataModule(data, **options)


class Plain(L.LightningModule):
    """Another's LightningModule around a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def training_step(self, batch, batch_idx):
        images, labels = batch.values() if isinstance(batch, dict) else batch[:2]
        return nn.functional.cross_entropy(self.model(images), labels)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class TakesImages(CSVLogger):
    """A logger of images, as those of Weights & Biases."""

    def log_image(self, key, images, step):
        self.__dict__.setdefault("kept", []).append((key, len(images)))


def dense_model() -> nn.Module:
    return vmoe.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL)


def test_an_evaluation_may_come_before_the_first_fit(loader, tmp_path):
    run, task = trainer(tmp_path, max_epochs=1), vmoe.Classifier(new_model())
    run.validate(task, loader, verbose=False)
    run.fit(task, loader, loader)
    assert run.callback_metrics["val/loss"].isfinite()


def test_the_monitor_leaves_a_dense_model_alone_and_says_so(loader, tmp_path):
    logger = TakesImages(tmp_path)
    run = trainer(tmp_path, [vmoe.RoutingMonitor()], logger, max_epochs=1)
    with pytest.warns(UserWarning, match="RoutingMonitor: the model has no MoE layer"):
        run.fit(vmoe.Classifier(dense_model()), loader, loader)
    assert not hasattr(logger, "kept") and not any("moe/" in name for name in run.callback_metrics)


def test_the_monitor_draws_no_images_of_batches_that_it_does_not_know(loader, tmp_path):
    dicts = DataLoader(
        loader.dataset, 8, collate_fn=lambda rows: dict(zip(("image", "label"), default_collate(rows), strict=True))
    )
    logger = TakesImages(tmp_path)
    run = trainer(tmp_path, [vmoe.RoutingMonitor()], logger)
    with pytest.warns(UserWarning, match="RoutingMonitor: draws no images: a batch of type dict") as warned:
        run.fit(Plain(new_model()), dicts, dicts)
    assert sum("draws no images" in str(each.message) for each in warned) == 1
    assert (
        run.global_step == 6 and not hasattr(logger, "kept") and "moe/model.blocks.1.mlp/dead" in run.callback_metrics
    )


def test_a_fit_after_one_that_the_guard_stopped_begins_clean(loader, tmp_path):
    guard, images = vmoe.NanGuard(), next(iter(loader))[0]
    bad = DataLoader(TensorDataset(torch.full_like(images, torch.nan), torch.zeros(len(images), dtype=torch.long)), 8)
    task = vmoe.Classifier(new_model())
    run = trainer(tmp_path, [guard, vmoe.Ema(0.9), vmoe.RoutingMonitor(images=0)], max_epochs=1)
    with pytest.raises(UserError, match=r"step 1: .*The model, and the last checkpoint .* hold the weights"):
        run.fit(task, bad)
    run.save_checkpoint(tmp_path / "a.ckpt")
    trainer(tmp_path, [guard], max_epochs=1).fit(task, loader)  # the same guard
    later = trainer(tmp_path, max_epochs=1)
    later.fit(task, loader, loader)
    assert task.guard is task.average is task.routing is None and "val/raw_top1" not in later.callback_metrics


def test_callbacks_begin_afresh_with_another_model(loader, tmp_path):
    ema, monitor = vmoe.Ema(0.9), vmoe.RoutingMonitor(images=0)
    callbacks = [ema, monitor]
    first = trainer(tmp_path, callbacks, max_epochs=1)
    first.fit(Plain(new_model()), loader, loader)
    second, module = trainer(tmp_path, callbacks, max_epochs=1), Plain(dense_model())
    second.fit(module, loader, loader)
    assert monitor.means == {} and ema.average.weights.keys() == dict(module.named_parameters()).keys()
    third, task = (
        trainer(tmp_path, callbacks, max_epochs=1),
        vmoe.Classifier(
            vmoe.create_model("vit_tiny_patch16_224", vmoe.MoeConfig(num_experts=6), num_classes=3, **SMALL)
        ),
    )
    third.fit(task, loader, loader)
    assert len(monitor.means["blocks.1.mlp"][0]) == 6 and task.average is ema.average


@pytest.mark.parametrize("scheduled", [True, False])
def test_a_subclass_may_have_an_optimiser_of_its_own(loader, tmp_path, scheduled):
    class Own(vmoe.Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)] if scheduled else []

    run, task = trainer(tmp_path, [vmoe.Ema(0.9), vmoe.NanGuard()]), Own(new_model())
    run.fit(task, loader)
    assert run.optimizers[0].param_groups[0]["lr"] == (0.075 if scheduled else 0.3)
    assert task.average.updates == 6
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = trainer(tmp_path, max_epochs=3)
    again.fit(Own(new_model()), loader, ckpt_path=tmp_path / "a.ckpt")
    assert again.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0375 if scheduled else 0.3)


def fits_exactly(module, data, folder, path=None, callbacks=()) -> tuple[L.LightningModule, L.Trainer]:
    """Three epochs with `ExactResume`; from another seed where they go on from a checkpoint."""
    torch.manual_seed(0 if path is None else 1)
    run, module = trainer(folder, [vmoe.ExactResume(), *callbacks], max_epochs=3), module()
    given = {"datamodule": data} if isinstance(data, L.LightningDataModule) else {"train_dataloaders": data}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, **given, ckpt_path=path)
    return module, run


class Foreign(L.LightningDataModule):
    """A shuffled loader, and an attribute of a name that `vmoe.ImageDataModule` has too."""

    def __init__(self, dataset, has_validation: bool):
        super().__init__()
        self.dataset, self.has_validation = dataset, has_validation
        self.train_sampler = torch.utils.data.RandomSampler(dataset)

    def train_dataloader(self):
        return DataLoader(self.dataset, 8, sampler=self.train_sampler)

    def val_dataloader(self):
        return DataLoader(self.dataset, 8) if self.has_validation else []


@pytest.mark.parametrize("kind", ["Classifier", "undescribed", "Plain", "with validation", "ImageDataModule"])
def test_other_models_and_data_resume_exactly_at_the_end_of_an_epoch(loader, tmp_path, kind):
    data = Foreign(loader.dataset, kind == "with validation")
    if kind == "ImageDataModule":
        data = vmoe.ImageDataModule("digits", batch_size=10, image_size=16, subset={"per_class": 3})
    classes = 10 if kind == "ImageDataModule" else 3

    def module():
        if kind == "undescribed":
            net = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(3 * 16 * 16, classes))
            return vmoe.Classifier(net)
        return (Plain if kind in ("Plain", "ImageDataModule") else vmoe.Classifier)(new_model(classes, drop_rate=0.2))

    keeps = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole, _ = fits_exactly(module, data, tmp_path, callbacks=[keeps])
    resumed, _ = fits_exactly(module, data, tmp_path, tmp_path / "epoch=0.ckpt")
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize("of_classifier", [True, False])
def test_the_average_of_a_checkpoint_is_tested_without_a_fit_before(loader, tmp_path, of_classifier):
    def module():
        return vmoe.Classifier(new_model(), lr=3e-2) if of_classifier else Plain(new_model())

    torch.manual_seed(0)
    run = trainer(tmp_path, [vmoe.Ema(0.99)], max_epochs=1)
    run.fit(module(), loader, loader)
    run.save_checkpoint(tmp_path / "a.ckpt")
    evaluated = {"model": module(), "dataloaders": loader, "ckpt_path": tmp_path / "a.ckpt", "verbose": False}
    (averaged,) = trainer(tmp_path, [vmoe.Ema(0.99)]).validate(**evaluated)
    assert averaged["val/loss"] == pytest.approx(run.callback_metrics["val/loss"].item(), rel=1e-6)
    (raw,) = trainer(tmp_path).validate(**evaluated)  # the same module, without the callback
    assert raw["val/loss"] != pytest.approx(averaged["val/loss"], rel=1e-5)
    with_none = trainer(tmp_path, max_epochs=1)
    with_none.fit(module(), loader)
    with_none.save_checkpoint(tmp_path / "none.ckpt")
    with pytest.warns(UserWarning, match="Ema: the checkpoint holds no average"):
        trainer(tmp_path, [vmoe.Ema()]).validate(**{**evaluated, "ckpt_path": tmp_path / "none.ckpt"})


def test_checkpoints_tell_of_the_data_of_their_own_fit(loader, photos, tmp_path):
    task = vmoe.Classifier(new_model(2))
    data = vmoe.ImageDataModule(photos, batch_size=6, image_size=16, mean=[0.1, 0.2, 0.3])
    for number, given in enumerate((DataLoader([(image, label % 2) for image, label in loader.dataset], 8), data)):
        run = trainer(tmp_path, max_epochs=1)
        run.fit(task, given)
        run.save_checkpoint(tmp_path / f"{number}.ckpt")
    first, second = vmoe.load(tmp_path / "0.ckpt"), vmoe.load(tmp_path / "1.ckpt")
    assert first.class_names == ["0", "1"] and second.class_names == ["cat", "dog"]
    assert first.mean == (0.5, 0.5, 0.5) and second.mean == (0.1, 0.2, 0.3)


def test_load_from_checkpoint_takes_other_rates_and_lightning_s_arguments(trained):
    _, _, path = trained
    again = vmoe.Classifier.load_from_checkpoint(path, lr=1e-6, strict=True, weights_only=True)
    assert again.optim.lr == again.optim.min_lr == 1e-6 and again.optim.weight_decay == 0.1
    assert again.hparams.warmup_epochs is None  # chosen again, by the next fit's epochs
    model = new_model()
    model.added = nn.Linear(1, 1)
    with pytest.raises(UserError, match="do not fit this model"):
        vmoe.Classifier.load_from_checkpoint(path, model=model)
    filled = vmoe.Classifier.load_from_checkpoint(path, model=model, strict=False)
    assert torch.equal(filled.model.head.weight, again.model.head.weight)


class WithCentres(vmoe.Classifier):
    """A subclass with parameters beside the model's."""

    def __init__(self, model: nn.Module, **options):
        super().__init__(model, **options)
        self.centres = nn.Linear(2, 2)


def test_the_modules_of_a_subclass_are_restored_or_their_lack_is_one_line(trained, loader, tmp_path):
    with pytest.raises(UserError, match=r"has no centres\.weight, .* WithCentres .* strict=False"):
        WithCentres.load_from_checkpoint(trained[2])
    task = WithCentres.load_from_checkpoint(trained[2], strict=False)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(task, loader)
    run.save_checkpoint(tmp_path / "a.ckpt")
    for model in (None, new_model()):
        again = WithCentres.load_from_checkpoint(tmp_path / "a.ckpt", model=model)
        assert torch.equal(again.centres.weight, task.centres.weight)


def test_two_monitors_share_the_sums(loader, tmp_path):
    first, second = vmoe.RoutingMonitor(images=0), vmoe.RoutingMonitor(images=0, per_expert=False)
    run = trainer(tmp_path, [first, second], max_epochs=1)
    run.fit(vmoe.Classifier(new_model()), loader)
    assert first.means == second.means and "moe/blocks.1.mlp/load/0" in run.callback_metrics


def test_lightning_s_tuner_sets_the_rate_and_the_batch_size(tmp_path):
    data = vmoe.ImageDataModule("digits", batch_size=4, image_size=16, subset={"per_class": 8})
    run, task = trainer(tmp_path, enable_checkpointing=True), vmoe.Classifier(new_model(10), lr=1e-6)
    found = Tuner(run).lr_find(task, datamodule=data, num_training=18, early_stop_threshold=None)
    found = found.suggestion()
    assert task.hparams.lr == task.optim.lr == found and task.optim.min_lr <= found != 1e-6
    assert task.configure_optimizers()["optimizer"].param_groups[0]["initial_lr"] == found
    size = Tuner(run).scale_batch_size(task, datamodule=data, init_val=8, max_trials=1, steps_per_trial=1)
    assert data.config.batch_size == data.train_sampler.batch_size == size > 4


def test_a_batch_that_is_larger_than_the_training_set_is_one_line(loader, tmp_path):
    with pytest.raises(UserError, match=r"the training loader gives no batch: .* drop_last"):
        trainer(tmp_path).fit(vmoe.Classifier(new_model()), DataLoader(loader.dataset, 32, drop_last=True))


def test_a_plateau_without_validation_is_refused(loader, tmp_path):
    task = vmoe.Classifier(new_model(), schedule="plateau")
    with pytest.raises(UserError, match="schedule=plateau: waits for a lower val/loss"):
        trainer(tmp_path, max_epochs=1).fit(task, loader)
    trainer(tmp_path, max_epochs=1).fit(task, loader, loader)


def test_images_alone_are_predicted(loader, tmp_path):
    images = loader.dataset.tensors[0]
    run, task = trainer(tmp_path), vmoe.Classifier(new_model())
    alone, rows = (run.predict(task, DataLoader(each, 8)) for each in (images, TensorDataset(images)))
    assert all(map(torch.equal, alone, rows))


def test_each_update_logs_a_loss_of_its_own(loader, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, [], logger, accumulate_grad_batches=2, log_every_n_steps=1).fit(
        vmoe.Classifier(new_model()), loader
    )
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        losses = [row["train/loss_step"] for row in csv.DictReader(file) if row["train/loss_step"]]
    assert len(set(losses)) == len(losses) == 4


@pytest.mark.slow
def test_two_ranks_of_lightning_s_own_share_the_batches_and_resume_exactly(tmp_path):
    """Each image is in one rank, and both log the same means."""
    script = tmp_path / "train.py"
    script.write_text(TWO_RANKS)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=400, cwd=tmp_path)
    logged = re.findall(r"rank \d: (\[.*?\])", run.stdout)  # both may be in one line: ranks print at the same time
    assert run.returncode == 0 and len(logged) == 2, run.stderr
    assert logged[0] == logged[1]


TWO_RANKS = """
import lightning as L, torch, vmoe
from lightning.pytorch.callbacks import ModelCheckpoint

data = vmoe.ImageDataModule("digits", batch_size=40, image_size=16, subset={"per_class": 8})
small = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_rate": 0.2}
moe = vmoe.MoeConfig(num_experts=4)
quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def fit(seed, path=None):
    L.seed_everything(seed)
    task = vmoe.Classifier(vmoe.create_model("vit_tiny_patch16_224", moe, num_classes=data.num_classes, **small))
    keeps = ModelCheckpoint(dirpath="kept", filename="{epoch}", save_top_k=-1)
    callbacks = [vmoe.RoutingMonitor(), vmoe.ExactResume(seed=0), vmoe.NanGuard(), vmoe.Ema(0.9), keeps]
    run = L.Trainer(max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", callbacks=callbacks, **quiet)
    run.fit(task, data, ckpt_path=path)
    return task.state_dict(), run


whole, run = fit(0)
assert data.parts == 2 and run.global_step == 4 and len(run.train_dataloader) == 2
names = ("train/loss", "val/loss", "val/top1", "moe/blocks.1.mlp/max_load")
print(f"rank {run.global_rank}: {[run.callback_metrics[name].item() for name in names]}", flush=True)
resumed, _ = fit(1, "kept/epoch=0.ckpt")
assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
"""
