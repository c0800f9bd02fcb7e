"""The data sets: the sources of their images and labels, and their splits.

| set | training | validation | test |
|---|---|---|---|
| digits | 80 % of the 1,797 images, a fixed stratified choice | cut from training | the other 20 % |
| patchwork | 6,000 generated images, always the same | cut from training | 2,000 |
| fractals | `data.images` different ones, or without end | others, always the same | others, always the same |
| cifar10, cifar100 | 50,000 | cut from training | 10,000 |
| imagenette, imagenet with train and val | train | cut from training | val (as ImageNet results are reported) |
| folder with train and val | train | val | val too, which a note says |
| folder or imagenet with train and test | train | cut from training | test |
| folder or imagenet with train, val and test | train | val | test |
| folder with train alone, or of classes alone | what remains | cut from training | 20 %, stratified, by split_seed |
| table | rows of train, or what remains | as folder | as folder |
| huggingface | its split train | as folder | as folder |
| webdataset | train-*.tar | as folder | as folder |
| npz | train_x, train_y | as folder | as folder |
"""

import dataclasses
import http.client
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100, Imagenette

from vmoe.data import subsets
from vmoe.data.bit_depth import Measured, brightest_level, clipped_lines, depth_lines, measure_bit_depth
from vmoe.data.config import DEFAULTS, DataConfig
from vmoe.data.folders import find_split_folders, has_pictures, read_class_folders, split_of
from vmoe.data.fractals import load_fractals
from vmoe.data.huggingface import HuggingFaceImages, load_huggingface
from vmoe.data.image_files import IgnoredFiles, list_class_folders
from vmoe.data.imageset import ArrayImages, FileImages, ImageSet, Splits
from vmoe.data.npz import load_npz
from vmoe.data.patchwork import load_patchwork
from vmoe.data.samples import load_digits
from vmoe.data.shards import ShardedImages, load_shards
from vmoe.data.tables import load_table
from vmoe.errors import UserError

_DOWNLOADED = ("cifar10", "cifar100", "imagenette")
_IMAGENETTE_IMAGES = (9469, 3925)  # train, val
# The scale of their values is unknown beforehand
_OF_THE_USER = ("imagenet", "folder", "table", "huggingface", "webdataset", "npz")
# Sets with training images but without class folders
_FORMS = {"webdataset": "train-*.tar", "table": "rows of the split train", "huggingface": "a split train"}
_TRIED = 8  # images, before a set is refused
_TEST_FRACTION = 0.2  # test share of a set without any split


def load_whole_splits(config: DataConfig) -> Splits:
    """Loads the data set as it comes, whole: without a cut for validation, and without `config.subset`.

    Raises:
        UserError: The data are missing, incomplete or malformed.
    """
    return _LOADERS[config.name](config)


def load_splits(config: DataConfig, for_training: bool = True) -> Splits:
    """Loads the data set, splits off a validation set if it has none, and keeps the part in `config.subset`.

    With `config.val_fraction` 0, a set without a validation split stays without one.

    First the classes are selected in every split, then the validation split is made, then the training set is reduced.
    So the validation split is the same for every fraction of the training set.

    Args:
        config: The set and its splits.
        for_training: Whether training images are required. Otherwise a test split alone is enough.

    Raises:
        UserError: The data are missing, incomplete or malformed.
    """
    splits = load_whole_splits(config)
    if for_training and not len(splits.train):
        form, advice = "train/CLASS/IMAGE", ", or rename folders of classes that have a split's name"
        if config.name in _FORMS:
            form, advice = _FORMS[config.name], ""
        raise UserError(
            f"data.root={config.root}: {config.name!r} needs training images, {form}, but has only those of other "
            f"splits; give the right folder{advice}"
        )
    train, val, test, names = splits.train, splits.val, splits.test, splits.class_names
    if config.subset.classes is not None:
        classes = subsets.find_classes(config.subset.classes, names)
        names = [names[index] for index in classes]
        is_tested = val is test
        train, test = train.keep_classes(classes), test.keep_classes(classes)
        val = test if is_tested else val.keep_classes(classes) if val is not None else None
    if val is None and config.val_fraction and len(train):
        remaining, picked = subsets.split(train.strata(), config.val_fraction, config.split_seed)
        train, val = train.take(remaining), train.take(picked)
    if train.is_multi_label:
        _require_single_labels(config)
        if for_training and len(train) and train.labels.all():
            raise UserError(
                f"data.root={config.root}: every training image has every class; a list of labels must hold the "
                "classes of its image, not a 0 or 1 per class"
            )
    if len(splits.train):
        train = train.take(subsets.choose_training(train.strata(), config.subset, names, config.split_seed))
    needed = {"training": train if for_training else None, "validation": val, "test": test}
    for name, part in needed.items():
        if part is not None and not len(part):
            raise UserError(
                f"data.root={config.root}: no {name} images for the {len(names)} classes; add images to them"
            )
    notes = list(splits.notes)
    if for_training and test is val:
        notes.append(f"{config.root}: has no test split: val is tested too, which makes the result a little too good")
    chosen = dataclasses.replace(splits, train=train, val=val, test=test, class_names=names, notes=notes)
    return _looked_at(chosen, config) if config.name in _OF_THE_USER else chosen


def _looked_at(splits: Splits, config: DataConfig) -> Splits:
    """The same splits with the bit depth of their files, given or measured, and notes on anything suspicious."""
    depth, measured, channels = config.bit_depth, None, config.channels
    if channels is not None:
        splits = _with_images(splits, channels=channels)
    measurable = splits.train if len(splits.train) else splits.test
    of_files = isinstance(measurable.images, FileImages | ShardedImages | HuggingFaceImages)
    if of_files or channels is not None:
        measured = measure_bit_depth(measurable.images, measurable.positions)
        if depth is None and measured is not None:
            depth = measured.bits
        splits = dataclasses.replace(_with_images(splits, bit_depth=depth), bit_depth=depth)
    lines = _empty_class_lines(config.root, splits) if len(splits.train) else []
    seen = splits.train if len(splits.train) else splits.test  # read with that depth
    if channels is not None:  # nothing is clipped then, and the mean and the standard deviation fit any range
        _require_readable(seen)
        return dataclasses.replace(splits, notes=[*splits.notes, *lines, *_range_lines(config, measured)])
    lines += depth_lines(config.root, config.bit_depth, measured, brightest_level(seen))
    parts = {"val": splits.val, "test": splits.test} if len(splits.train) and depth is not None else {}
    for name, part in parts.items():
        if part is not None and not (name == "test" and part is splits.val):
            found = measure_bit_depth(part.images, part.positions)
            lines += clipped_lines(f"{name} of {config.root}", depth, found) if found is not None else []
    return dataclasses.replace(splits, notes=[*splits.notes, *lines])


def _with_images(splits: Splits, **changes: int | None) -> Splits:
    """The same splits with other fields of their stores of images."""

    def changed(part: ImageSet | None) -> ImageSet | None:
        return part and dataclasses.replace(part, images=dataclasses.replace(part.images, **changes))

    val, test = changed(splits.val), changed(splits.test)
    return dataclasses.replace(
        splits, train=changed(splits.train), val=test if splits.val is splits.test else val, test=test
    )


def _require_readable(images: ImageSet) -> None:
    """Refuses a set of which all of some images are of another number of channels, or cannot be read.

    Raises:
        UserError: Of the first.
    """
    first = None
    for index in range(min(len(images), _TRIED)):
        try:
            images.read(index)
        except UserError as error:
            first = first or error
        else:
            return
    if first is not None:
        raise first


def _range_lines(config: DataConfig, measured: Measured | None) -> list[str]:
    if measured is None or config.bit_depth is not None or measured.bits == 16:
        return []
    how = "are taken as they are" if measured.bits == 1 else f"are divided by {2**measured.bits - 1}"
    values = f"values from {measured.smallest:g} to {measured.largest:g}"
    return [f"{config.root}: {values} {how} (data.bit_depth={measured.bits})"]


def _require_single_labels(config: DataConfig) -> None:
    """Refuses options that work class by class, for a set with several classes per image.

    Raises:
        UserError: The config has such an option.
    """
    asked = {
        "data.subset.per_class": config.subset.per_class,
        "data.subset.imbalance": config.subset.imbalance,
        "data.sampler": None if config.sampler == "shuffle" else config.sampler,
    }
    for option, value in asked.items():
        if value is not None:
            raise UserError(f"{option}={value}: needs images of one class each, and these have several; leave it out")


def _empty_class_lines(root: str, splits: Splits) -> list[str]:
    """A warning with the classes without a training image; empty if each class has one."""
    counts = splits.train.class_counts(len(splits.class_names))
    empty = [splits.class_names[label] for label in np.flatnonzero(counts == 0)]
    if not empty:
        return []
    named = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
    reason = ": labels begin at 1, and classes are numbered from 0" if counts[0] == 0 and len(empty) == 1 else ""
    return [f"warning: {root}: no training image has class {named}{reason}; number labels from 0, without gaps"]


def _joined_class_lines(root: str, names: Sequence[str]) -> list[str]:
    """A warning if a class name looks like several joined ones, such as "cat|dog" beside "cat"."""
    known = set(names)
    for name in names:
        for mark in "|;,":
            parts = [part.strip() for part in name.split(mark)]
            if len(parts) > 1 and known.intersection(parts):
                return [
                    f"warning: {root}: {name!r} is one class here; where a picture may have several, give "
                    f"data.table.separator={mark!r}"
                ]
    return []


def download(config: DataConfig) -> None:
    """Prepares a set: downloads one of torchvision's, indexes tar shards, or fetches one of Hugging Face's."""
    if config.name in (*_DOWNLOADED, "webdataset", "huggingface"):
        _LOADERS[config.name](config)


def _digits(_: DataConfig) -> Splits:
    images, labels = load_digits()
    pixels = np.round(images * (255 / 16)).astype(np.uint8)  # 17 levels of gray
    everything = ImageSet.all_of(ArrayImages(pixels[..., None], "digits"), labels)
    # the same test images for any config, so that results of all runs can be compared
    train, test = subsets.split(everything.labels, 0.2, seed=0)
    return Splits(everything.take(train), None, everything.take(test), [str(digit) for digit in range(10)])


def _cifar(kind: type[CIFAR10], config: DataConfig) -> Splits:
    what = f"{config.name} ({kind.base_folder})"
    train = _torchvision_set(what, config.root, lambda: kind(config.root, train=True, download=True))
    test = _torchvision_set(what, config.root, lambda: kind(config.root, train=False, download=True))
    sets = [
        ImageSet.all_of(ArrayImages(np.ascontiguousarray(part.data), f"{config.name} {name}"), part.targets)
        for part, name in ((train, "train"), (test, "test"))
    ]
    return Splits(sets[0], None, sets[1], list(train.classes))


def _imagenette(config: DataConfig) -> Splits:
    size = config.image_size or DEFAULTS["imagenette"].image_size
    variant = "160px" if size <= 160 else "320px" if size <= 320 else "full"
    name = {"160px": "imagenette2-160", "320px": "imagenette2-320", "full": "imagenette2"}[variant]
    verified = _torchvision_set(
        f"imagenette ({name})", config.root, lambda: Imagenette(config.root, "train", variant, download=True)
    )
    folders = read_class_folders({split: Path(config.root) / name / split for split in ("train", "val")})
    train, val = folders.samples["train"], folders.samples["val"]
    # torchvision treats any folder of that name as complete, even after an interrupted extraction
    if (len(train), len(val)) != _IMAGENETTE_IMAGES:
        raise UserError(
            f"data.root={config.root}: {name} is incomplete, {len(train)} + {len(val)} images of "
            f"{_IMAGENETTE_IMAGES[0]} + {_IMAGENETTE_IMAGES[1]}; remove that folder and run again"
        )
    return Splits(_file_set(train), None, _file_set(val), [names[0] for names in verified.classes])


def _torchvision_set(what: str, root: str, make: Callable[[], CIFAR10 | Imagenette]) -> CIFAR10 | Imagenette:
    """Makes a set of torchvision, which downloads and verifies it.

    Raises:
        UserError: The download fails.
    """
    try:
        return make()
    except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"data.root={root}: {what} is not there with the right checksums, and the download failed ({reason}); "
            "connect to the network, or put the unpacked folder there, or name the folder that holds it"
        ) from error


def _folder(config: DataConfig) -> Splits:
    root = Path(config.root)
    needs = f"data.root={root}: {config.name!r} needs train/CLASS/IMAGE and val/CLASS/IMAGE (or test) in this folder"
    if not root.is_dir():
        raise UserError(f"{needs}, or CLASS/IMAGE alone, but it does not exist; give the right folder as data.root")
    found = find_split_folders(root)
    others = [name for name in list_class_folders(root, IgnoredFiles()) if root / name not in found.values()]
    strange = [name for name in others if split_of(name) is None]
    unclear = [name for name in strange if list_class_folders(root / name, IgnoredFiles()) or has_pictures(root / name)]
    if list(found) == ["train"] and unclear:
        raise UserError(
            f"{needs}; it has train and {unclear[0]}, which is no split's name: rename it, move it away to have a part "
            "of train tested on, or rename train if it is a class"
        )
    if not found and len(others) == 1:
        raise UserError(f"{needs}, or several folders CLASS/IMAGE, but it has {others[0]} alone; give the right folder")
    folders = read_class_folders(found or {"train": root}, arrays=config.channels is not None)
    notes = [f"{root}: ignored: {folders.ignored}"] if folders.ignored else []
    for name in others if found else ():
        reason = "its name is no split's" if name in strange else "it has no class folders"
        notes.append(f"{root / name}: ignored: {reason}")
    sets = {split: _file_set(samples) for split, samples in folders.samples.items()}
    if config.name == "imagenet" and set(sets) == {"train", "val"}:
        sets["test"] = sets.pop("val")  # ImageNet results are reported on val, so val must not choose the checkpoint
    return _splits_of(sets, folders.classes, notes, config)


def _table(config: DataConfig) -> Splits:
    sets, classes = load_table(config)
    return _splits_of(sets, classes, _joined_class_lines(config.root, classes), config)


def _huggingface(config: DataConfig) -> Splits:
    sets, classes, notes = load_huggingface(config)
    return _splits_of(sets, classes, notes + _joined_class_lines(config.root, classes), config)


def _webdataset(config: DataConfig) -> Splits:
    return _splits_of(*load_shards(config.root, config.table.separator), config)


def _npz(config: DataConfig) -> Splits:
    sets, classes, side = load_npz(config.root, config.channels)
    return dataclasses.replace(_splits_of(sets, classes, [], config), image_size=side)


def _splits_of(sets: Mapping[str, ImageSet], classes: list[str], notes: list[str], config: DataConfig) -> Splits:
    """The given splits: without "test", "val" is used for both; without "train" that split is empty.

    Of training images alone test images are split off; `load_splits` then does validation's.
    """
    if list(sets) != ["train"]:
        test = sets["test" if "test" in sets else "val"]
        none = test.take(np.empty(0, dtype=np.int64))
        return Splits(sets.get("train", none), sets.get("val"), test, classes, notes=notes)
    everything = sets["train"]
    train, test = subsets.split(everything.strata(), _TEST_FRACTION, config.split_seed)
    validation = f", {config.val_fraction:.0%} of what remains for validation" if config.val_fraction else ""
    line = f"{config.root}: has no split of its own: {_TEST_FRACTION:.0%} of each class are cut off for the test"
    notes = [*notes, f"{line}{validation} (by data.split_seed={config.split_seed})"]
    return Splits(everything.take(train), None, everything.take(test), classes, notes=notes)


def _file_set(samples: list[tuple[str, int]]) -> ImageSet:
    return ImageSet.all_of(FileImages([path for path, _ in samples]), [label for _, label in samples])


_LOADERS: dict[str, Callable[[DataConfig], Splits]] = {
    "digits": _digits,
    "patchwork": lambda _: load_patchwork(),
    "fractals": load_fractals,
    "cifar10": lambda config: _cifar(CIFAR10, config),
    "cifar100": lambda config: _cifar(CIFAR100, config),
    "imagenette": _imagenette,
    "imagenet": _folder,
    "folder": _folder,
    "table": _table,
    "huggingface": _huggingface,
    "webdataset": _webdataset,
    "npz": _npz,
}
