"""Batches: the same with any number of workers, after a resume, and whatever else draws random numbers."""

import gc
import random
import re
import subprocess
import sys
from contextlib import suppress
from multiprocessing import active_children

import cv2
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from vmoe.data import AugmentConfig, DataConfig, ImageDataModule, eval_transform, load_image
from vmoe.errors import UserError


def module(name="digits", root="data", seed=0, **options):
    data = ImageDataModule(DataConfig(name=name, root=str(root), **options), seed)
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


def test_batches_and_attributes():
    data = module()
    assert data.num_classes == 10 and data.class_names == [str(digit) for digit in range(10)]
    assert data.image_size == 16 and len(data.mean) == len(data.std) == 3
    batches = training_batches(data)
    assert len(batches) == len(data.train_dataloader())
    assert batches[0].images.shape == (128, 3, 16, 16) and batches[0].images.dtype == torch.float32
    assert batches[0].labels.dtype == torch.int64 and batches[0].damaged == []
    everything = torch.cat([batch.images for batch in data.val_dataloader()])
    assert abs(everything.mean()) < 0.1 and abs(everything.std() - 1) < 0.2  # the constants fit the images


def test_config_overrides_the_defaults_of_the_set():
    data = module(image_size=24, mean=(0.0, 0.0, 0.0), std=[1.0, 1.0, 1.0], eval_batch_size=7, batch_size=10_000)
    assert data.mean == (0.0, 0.0, 0.0) and data.std == (1.0, 1.0, 1.0)
    batch = next(iter(data.test_dataloader()))
    assert batch.images.shape == (7, 3, 24, 24) and batch.images.min() == 0 and batch.images.max() <= 1
    (only,) = training_batches(data)  # a set smaller than a batch gives one smaller batch
    assert len(only.labels) == 1293


def test_batches_come_through_pipes_where_shared_memory_is_full(monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    expected = training_batches(module())
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "share_memory_", full)
        with pytest.warns(UserWarning, match="--shm-size") as told:
            found = training_batches(module(workers=2))
    assert_equal(found, expected)
    assert type(found[0]) is type(expected[0]) and torch.equal(found[0].keys, expected[0].keys)
    assert len(told) == 1


@pytest.mark.slow
def test_a_container_s_small_shared_memory():
    """Batches of 100 MB in the 64 MiB that Docker gives, where such a file system may be mounted."""
    code = "from vmoe.data import DataConfig, ImageDataModule\n"
    code += "data = ImageDataModule(DataConfig(image_size=256, workers=2), 0)\n"
    code += "data.setup()\nprint(sum(len(batch.labels) for batch in data.train_dataloader()))"
    mounted = 'mount -t tmpfs -o size=64m none /dev/shm && exec "$0" -c "$1"'
    if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/dev/shm"], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    command = ["unshare", "-m", "sh", "-c", mounted, sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "1280\n"), done.stderr
    assert "--shm-size" in done.stderr


@pytest.mark.parametrize("preset", ["light", "strong"])
def test_workers_do_not_change_a_batch(npz, preset):
    options = {"augment": AugmentConfig(preset=preset), "batch_size": 8}
    one, several = (module("npz", npz(), workers=workers, **options) for workers in (0, 2))
    loader = several.train_dataloader()  # its workers live through all epochs
    for epoch in (0, 1):
        several.train_sampler.set_epoch(epoch)
        assert_equal(training_batches(one, epoch), list(loader))
    several.train_sampler.set_epoch(5)
    several.train_sampler.start_batch = 3
    assert_equal(training_batches(one, 5)[3:], list(loader))
    assert_equal(list(one.test_dataloader()), list(several.test_dataloader()))


def test_workers_start_although_opencv_had_threads_in_this_process(npz):
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        cv2.GaussianBlur(np.zeros((2000, 2000, 3), np.uint8), (15, 15), 0)  # large enough to start its threads
        data = module("npz", npz(), workers=1, batch_size=8)
        loader = data.train_dataloader()
        loader.timeout = 30  # seconds: a worker that waits for ever is an error here
        assert len(list(loader)) == len(loader)
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iterator_made_before_the_epoch_is_set_gives_that_epoch(npz, workers):
    """As Lightning does in the first epoch after a resume; iterators made and never used do not eat the start."""
    data = module("npz", npz(), workers=workers, batch_size=16)
    expected = training_batches(data, epoch=4)
    loader = data.train_dataloader()
    data.train_sampler.start_batch = 1
    iter(loader)
    iterator = iter(loader)
    data.train_sampler.set_epoch(4)
    assert_equal(list(iterator), expected[1:])


def test_epochs_and_seeds_differ(npz):
    path = npz()
    first = torch.cat([batch.images for batch in training_batches(module("npz", path))])
    for seed, epoch in ((0, 1), (1, 0)):
        other = torch.cat([batch.images for batch in training_batches(module("npz", path, seed=seed), epoch)])
        assert not torch.equal(first, other)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_neither_used_nor_changed(npz, workers):
    path, results = npz(), []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        data = module("npz", path, workers=workers, augment=AugmentConfig(preset="strong"))
        results.append(training_batches(data) + list(data.val_dataloader()))
        assert random.getstate() == before[0]
        assert np.random.get_state()[1].tolist() == before[1]
        assert torch.equal(torch.get_rng_state(), before[2])
    assert_equal(*results)


def test_evaluation_keeps_order_and_uses_the_public_transform(image_tree):
    data = module("folder", image_tree(count=4), image_size=6, batch_size=5)
    transform = eval_transform(6, data.mean, data.std)
    paths = sorted((data.config.root + "/val/" + name, name) for name in data.class_names)
    expected = [
        (transform(load_image(f"{folder}/{number}.png")), data.class_names.index(name))
        for folder, name in paths
        for number in range(4)
    ]
    batches = list(data.test_dataloader())
    assert torch.equal(torch.cat([batch.images for batch in batches]), torch.stack([image for image, _ in expected]))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [label for _, label in expected]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_training_image_is_replaced_by_the_next_and_named(image_tree, workers):
    root = image_tree(("train", "val", "test"))
    damaged = root / "train" / "ant" / "2.png"
    damaged.write_bytes(b"damaged")
    data = module("folder", root, workers=workers, image_size=8, batch_size=18, augment=AugmentConfig(preset="none"))
    (batch,) = training_batches(data)
    assert batch.damaged == [str(damaged)]
    gray = (batch.images[:, 0] * data.std[0] + data.mean[0]).mul(255).round()[:, 0, 0]
    levels = sorted(gray.int().tolist())  # image k of the training set has gray level k + 1
    assert levels == sorted([1, 2, 4, 4, *range(5, 19)])


def test_training_images_as_evaluation_sees_them_are_a_fixed_sample(npz):
    path = npz()
    every, one, other, again = (
        torch.cat([batch.images for batch in module("npz", path, seed=seed, **options).train_eval_dataloader(most)])
        for seed, most, options in ((0, 100, {}), (0, 20, {}), (0, 20, {"split_seed": 1}), (1, 20, {}))
    )
    assert len(every) == 54  # the rest of 60 is for validation
    assert len(one) == 20 and torch.equal(one, again) and not torch.equal(one, other)
    assert all((every == image).flatten(1).all(1).any() for image in one)


def test_a_damaged_image_of_that_sample_is_replaced_by_the_next(image_tree):
    root = image_tree(("train", "val", "test"))
    damaged = root / "train" / "ant" / "2.png"
    damaged.write_bytes(b"damaged")
    (batch,) = module("folder", root, image_size=8).train_eval_dataloader()
    assert batch.damaged == [str(damaged)] and len(batch.images) == 18
    assert torch.equal(batch.images[2], batch.images[3])


def test_the_replacement_brings_its_own_label_and_wraps_around(image_tree):
    root = image_tree(("train", "val", "test"), count=2)
    for path in ("ant/1.png", "cow/0.png", "cow/1.png"):
        (root / "train" / path).write_bytes(b"damaged")
    data = module("folder", root, image_size=8, batch_size=6)
    (batch,) = training_batches(data)
    # ant/1 -> bee/0; cow/0 -> cow/1 -> ant/0; cow/1 -> ant/0
    assert sorted(batch.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert len(set(batch.damaged)) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_stops_evaluation_with_one_line(image_tree, workers):
    root = image_tree()
    damaged = root / "val" / "bee" / "3.png"
    damaged.write_bytes(b"damaged")
    data = module("folder", root, workers=workers, image_size=8, batch_size=2)
    told = f"{damaged}: cannot be read as an image (no known image format); replace or remove the file"
    with pytest.raises(UserError, match=rf"\A{re.escape(told)}\Z"):
        list(data.test_dataloader())


@pytest.mark.parametrize("workers", [0, 1])
def test_training_without_one_readable_image_is_an_error(image_tree, workers):
    root = image_tree()
    for file in (root / "train").rglob("*.png"):
        file.write_bytes(b"damaged")
    data = module("folder", root, workers=workers, image_size=8)
    with pytest.raises(UserError, match=r"\A.*neither this nor any other training image can be read.*\Z"):  # one line
        training_batches(data)


def test_workers_end_when_their_error_has_been_dealt_with(image_tree):
    """By references alone: where a cycle waits for the garbage collection, PyTorch waits 5 s for each worker."""
    root = image_tree()
    for file in (root / "train").rglob("*.png"):
        file.write_bytes(b"damaged")
    before = set(active_children())
    loader = module("folder", root, workers=1, image_size=8).train_dataloader()
    gc.disable()
    try:
        with suppress(UserError):
            list(loader)
        ours = set(active_children()) - before
        assert ours
        del loader
        assert not ours & set(active_children())
    finally:
        gc.enable()


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(UserError, match="seed=-1: must be from 0"):
        ImageDataModule(DataConfig(), seed=-1)


class Recorder(LightningModule):
    """Keeps the first image of each step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append((self.current_epoch, batch.images.sum().item()))
        return self.weight * 0

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Echo(LightningModule):
    """Predicts the images themselves."""

    def predict_step(self, batch, _):
        return batch.images


@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_sets_the_epoch_of_the_sampler(npz, tmp_path, workers):
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data = ImageDataModule(DataConfig(name="npz", root=str(npz()), batch_size=16, workers=workers), 0)
    trainer.fit(recorder, datamodule=data)
    alone = module("npz", data.config.root, batch_size=16)
    expected = [(epoch, batch.images.sum().item()) for epoch in range(3) for batch in training_batches(alone, epoch)]
    assert recorder.seen == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_makes_its_loaders_again_with_another_sampler(npz, tmp_path, workers):
    data = ImageDataModule(DataConfig(name="npz", root=str(npz()), batch_size=16, workers=workers), 0)
    loader = data.test_dataloader()  # before anything called `setup`
    expected = torch.cat([batch.images for batch in loader])
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "default_root_dir": tmp_path}
    seen = Trainer(**quiet).predict(Echo(), loader)
    assert torch.equal(torch.cat(seen), expected)
    trainer = Trainer(max_epochs=1, overfit_batches=1, **quiet)
    trainer.fit(Recorder(), data.train_dataloader(), data.val_dataloader())
    assert trainer.global_step == 1


@pytest.mark.parametrize("pipeline", ["workers", "device"])
def test_without_validation_images_its_loaders_say_so(pipeline):
    data = module(val_fraction=0, pipeline=pipeline, batch_size=100)
    assert not data.has_validation and module().has_validation
    assert sum(len(batch.labels) for batch in training_batches(data)) == 1400  # of 1,437; with validation 1,200
    assert len(list(data.test_dataloader())) == 4
    for loader in (
        data.val_dataloader,
        lambda: data.random_dataloader("val", seed=0),
        lambda: data.corrupted_dataloader("val", "brightness", 1),
    ):
        with pytest.raises(UserError, match=r"data\.val_fraction=0: there are no images for validation"):
            loader()


def test_a_random_order_is_a_function_of_the_seed_and_holds_every_image_once():
    def first(seed):
        data = ImageDataModule(DataConfig(eval_batch_size=1000), seed=0)
        data.setup()
        return next(iter(data.test_dataloader())), next(iter(data.random_dataloader("test", seed)))

    (plain, one), (_, again), (_, other) = first(3), first(3), first(4)
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)
    assert not torch.equal(one.labels, plain.labels)
    assert torch.equal(one.images.flatten(1).sum(1).sort().values, plain.images.flatten(1).sum(1).sort().values)
