"""The device pipeline as a trainer sees it: the batches of the other one, kept on the device."""

import dataclasses

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from vmoe.data import AugmentConfig, DataConfig, ImageDataModule, MixConfig, SubsetConfig
from vmoe.errors import UserError


def module(pipeline="device", name="digits", root="data", seed=0, **options):
    data = ImageDataModule(DataConfig(name=name, root=str(root), pipeline=pipeline, **options), seed)
    data.setup()
    return data


def training_batches(data, epoch=0, start=0):
    loader = data.train_dataloader()
    data.train_sampler.set_epoch(epoch)
    data.train_sampler.start_batch = start
    return list(loader)


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.damaged == b.damaged
        for name in ("keys", "targets", "patch_labels"):
            x, y = getattr(a, name), getattr(b, name)
            assert x is y is None or torch.equal(x, y)


@pytest.mark.parametrize("name", ["digits", "patchwork"])
def test_evaluation_and_unaugmented_training_are_those_of_the_workers(name):
    options = {"name": name, "augment": AugmentConfig(preset="none"), "subset": SubsetConfig(fraction=0.1)}
    ours, theirs = (module(pipeline, eval_batch_size=70, **options) for pipeline in ("device", "workers"))
    assert len(ours.train_dataloader()) == len(theirs.train_dataloader())
    assert_equal(training_batches(ours, 3), training_batches(theirs, 3))
    for make in ("val_dataloader", "test_dataloader"):
        assert len(getattr(ours, make)()) == len(getattr(theirs, make)())
        assert_equal(list(getattr(ours, make)()), list(getattr(theirs, make)()))
    assert_equal(list(ours.random_dataloader("test", 0)), list(theirs.random_dataloader("test", 0)))


@pytest.mark.parametrize("workers", [0, 2])
def test_files_are_read_at_the_size_they_are_used(image_tree, workers):
    root = image_tree(size=300)
    data = module(name="folder", root=root, workers=workers, image_size=70, batch_size=4)
    loader = data.train_dataloader()
    assert loader.images.pixels.shape[1:] == (3, 80, 80) and loader.images.pixels.dtype == torch.uint8
    padded = module(name="folder", root=root, image_size=70, batch_size=4, augment=AugmentConfig(crop_padding=3))
    assert padded.train_dataloader().images.pixels.shape[1:] == (3, 70, 70)
    assert_equal(
        list(data.test_dataloader()),
        list(module("workers", "folder", root, image_size=70, batch_size=4).test_dataloader()),
    )


@pytest.mark.parametrize("preset", ["light", "strong"])
def test_an_image_does_not_depend_on_the_batch(npz, preset):
    path, seen = npz(train=80), []
    for size in (24, 8):
        data = module(name="npz", root=path, batch_size=size, augment=AugmentConfig(preset=preset))
        batches = training_batches(data, 2)
        seen.append({int(k[1]): image for batch in batches for k, image in zip(batch.keys, batch.images, strict=True)})
    both = seen[0].keys() & seen[1].keys()
    assert len(both) > 40 and all(torch.equal(seen[0][index], seen[1][index]) for index in both)
    assert_equal(training_batches(data, 2, start=3), batches[3:])


def test_an_iterator_made_before_the_epoch_is_set_gives_that_epoch(npz):
    data = module(name="npz", root=npz(), batch_size=16)
    expected = training_batches(data, epoch=4)
    iterator = iter(data.train_dataloader())
    data.train_sampler.start_batch = 1
    data.train_sampler.set_epoch(4)
    assert_equal(list(iterator), expected[1:])


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_replaced_counted_and_named_as_by_the_workers(image_tree, workers):
    root = image_tree(("train", "val", "test"))
    for path in ("ant/2.png", "cow/4.png", "cow/5.png"):
        (root / "train" / path).write_bytes(b"damaged")
    options = {"image_size": 8, "batch_size": 6, "augment": AugmentConfig(preset="none")}
    ours = module(name="folder", root=root, workers=workers, **options)
    theirs = module("workers", "folder", root, **options)
    for epoch in (0, 1):
        assert_equal(training_batches(ours, epoch), training_batches(theirs, epoch))
    damaged = [place for batch in training_batches(ours) for place in batch.damaged]
    assert set(damaged) == {str(root / "train" / path) for path in ("ant/2.png", "cow/4.png", "cow/5.png")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_stops_evaluation_with_one_line(image_tree, workers):
    root = image_tree()
    damaged = root / "val" / "bee" / "3.png"
    damaged.write_bytes(b"damaged")
    data = module(name="folder", root=root, workers=workers, image_size=8)
    with pytest.raises(UserError) as caught:
        data.test_dataloader()
    assert str(caught.value) == (
        f"{damaged}: cannot be read as an image (no known image format); replace or remove the file"
    )


def test_training_without_one_readable_image_is_an_error(image_tree):
    root = image_tree()
    for file in (root / "train").rglob("*.png"):
        file.write_bytes(b"damaged")
    data = module(name="folder", root=root, image_size=8)
    with pytest.raises(UserError, match="neither this nor any other training image can be read"):
        data.train_dataloader()


def test_a_set_that_does_not_fit_is_refused_before_anything_is_read(image_tree, monkeypatch):
    root = image_tree()
    for file in root.rglob("*.png"):
        file.write_bytes(b"not read")
    monkeypatch.setattr("os.sysconf", lambda name: 2**15)  # 2**30 bytes of memory
    module(name="folder", root=root, image_size=224)
    with pytest.raises(UserError) as caught:
        module(name="folder", root=root, image_size=4096)
    assert str(caught.value) == (
        "data.pipeline=device: 36 images take 1.9 GiB on cpu, where 0.5 GiB may be used; "
        "take data.pipeline=workers, a smaller data.image_size or data.subset"
    )


def test_processes_on_one_cpu_share_its_memory(image_tree, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 2**15)
    config = DataConfig(pipeline="device", name="folder", root=image_tree(), image_size=1024)  # 0.1 GiB
    ImageDataModule(config, 0, "cpu", part=0, parts=4).setup("fit")
    with pytest.raises(UserError, match=r"take 0\.1 GiB on cpu, where 0\.1 GiB may be used"):
        ImageDataModule(config, 0, "cpu", part=0, parts=8).setup("fit")


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for():
    config = DataConfig(pipeline="device", augment=AugmentConfig(preset="strong"), mix=MixConfig(1.0, 1.0))
    data = ImageDataModule(config, 0, "cuda")
    data.setup()
    loader, validation = data.train_dataloader(), data.val_dataloader()
    data.on_after_batch_transfer(next(iter(loader)), 0)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
        batches += list(validation)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(batch.images.is_cuda and batch.labels.is_cuda for batch in batches)
    assert torch.cat([batch.images for batch in batches]).isfinite().all()


class Recorder(LightningModule):
    """Keeps a sum of each step's images and targets."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        targets = None if batch.targets is None else batch.targets.amax(1).mean().item()
        self.seen.append((self.current_epoch, batch.images.sum().item(), targets))
        return self.weight * 0

    def validation_step(self, batch, _):
        assert batch.targets is None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, tmp_path, epochs):
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(recorder, datamodule=data)
    return recorder.seen


@pytest.mark.parametrize("pipeline", ["workers", "device"])
def test_lightning_sets_epochs_and_mixes_until_its_time(npz, tmp_path, pipeline):
    config = DataConfig(name="npz", root=str(npz()), batch_size=16, pipeline=pipeline)
    plain = fit(ImageDataModule(config, 0), tmp_path, epochs=4)
    alone = module(pipeline, "npz", config.root, batch_size=16)
    expected = [(epoch, batch.images.sum().item()) for epoch in range(4) for batch in training_batches(alone, epoch)]
    assert [row[:2] for row in plain] == expected and all(row[2] is None for row in plain)
    mixing = dataclasses.replace(config, mix=MixConfig(mixup_alpha=1.0, until=0.5))
    mixed = fit(ImageDataModule(mixing, 0), tmp_path, epochs=4)
    assert all(one != other for one, other in zip(mixed, plain, strict=True) if one[0] < 2)
    assert [row[:2] for row in mixed if row[0] >= 2] == [row[:2] for row in plain if row[0] >= 2]
    assert all((row[2] == 1) == (row[0] >= 2) for row in mixed)


def test_the_end_of_mixing_needs_a_trainer():
    data = module(mix=MixConfig(cutmix_alpha=1.0, until=0.9))
    batch = training_batches(data)[0]
    with pytest.raises(UserError, match=r"data\.mix\.until=0\.9: needs a trainer"):
        data.on_after_batch_transfer(batch, 0)
    assert module().on_after_batch_transfer(batch, 0) is batch  # nothing to mix
