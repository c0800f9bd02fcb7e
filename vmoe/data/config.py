"""The config of a run's images: every setting of the data room, checked at construction."""

import math
import os
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from vmoe.config_values import from_plain, to_plain
from vmoe.data.addresses import is_address, shard_folder
from vmoe.data.image_files import is_image_name
from vmoe.data.sections import (
    OF_WORKERS,
    AugmentConfig,
    FractalConfig,
    MixConfig,
    SubsetConfig,
    TableConfig,
    check_choice,
    check_range,
    nearest,
)
from vmoe.errors import UserError
from vmoe.sizes import as_size
from vmoe.text import counted

SetName = Literal[
    "digits",
    "patchwork",
    "fractals",
    "cifar10",
    "cifar100",
    "imagenette",
    "imagenet",
    "folder",
    "table",
    "huggingface",
    "webdataset",
    "npz",
]
EMBEDDED_SETS = ("digits", "patchwork", "fractals")  # sets in this package
NAMED_SETS = (*EMBEDDED_SETS, "cifar10", "cifar100", "imagenette", "imagenet")  # other sets are the user's own
FILE_SETS = {".npz": "npz", ".csv": "table", ".tsv": "table", ".parquet": "table"}  # by the suffix of the file
_MOST_CHANNELS = 512
Pipeline = Literal["workers", "device"]
Crop = Literal["centre", "squash", "letterbox"]
SamplerName = Literal["shuffle", "class_balanced"]
Colour = tuple[float, ...]  # a number per channel


class SetDefaults(NamedTuple):
    """A data set's values for config fields that are None. `image_size` None means the arrays' own size."""

    image_size: int | None
    mean: Colour
    std: Colour
    flip: float


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFAULTS: dict[str, SetDefaults] = {
    "digits": SetDefaults(16, (0.305,) * 3, (0.376,) * 3, flip=0.0),  # a mirrored digit is another sign
    "patchwork": SetDefaults(48, (0.5,) * 3, (0.3,) * 3, flip=0.5),
    "fractals": SetDefaults(32, (0.08,) * 3, (0.17,) * 3, flip=0.0),  # a mirrored fractal may be another class
    "cifar10": SetDefaults(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), flip=0.5),
    "cifar100": SetDefaults(32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), flip=0.5),
    "imagenette": SetDefaults(224, _IMAGENET_MEAN, _IMAGENET_STD, flip=0.5),
    "imagenet": SetDefaults(224, _IMAGENET_MEAN, _IMAGENET_STD, flip=0.5),
    "folder": SetDefaults(224, _IMAGENET_MEAN, _IMAGENET_STD, flip=0.5),
    "table": SetDefaults(224, _IMAGENET_MEAN, _IMAGENET_STD, flip=0.5),
    "huggingface": SetDefaults(224, _IMAGENET_MEAN, _IMAGENET_STD, flip=0.5),
    "webdataset": SetDefaults(224, _IMAGENET_MEAN, _IMAGENET_STD, flip=0.5),
    "npz": SetDefaults(None, (0.5,) * 3, (0.5,) * 3, flip=0.5),
}


@dataclass(frozen=True)
class DataConfig:
    """The images of a run, with their splits, sizes, augmentation and batches.

    Args:
        name: "digits" (embedded), "patchwork" (generated, with known patches), "fractals" (generated without end, see
            fractals), "cifar10", "cifar100", "imagenette" (downloaded when missing), "imagenet" or "folder" (class
            folders in ROOT/train, ROOT/val and ROOT/test, or in ROOT alone, which is then split), "table" (a CSV, TSV
            or Parquet file with a row per picture, see table), "huggingface" (what `save_to_disk` of Hugging Face's
            datasets wrote, a folder of Parquet files, or a set of the hub, see root), "webdataset" (tar shards,
            train-*.tar and so on, as vmoe make-shards writes them) or "npz" (arrays in one file, see root).
        root: folder with the data; for "huggingface" also USER/NAME or USER/NAME:CONFIG, a set of the hub; for
            "webdataset" also an address of fsspec, such as s3://BUCKET/FOLDER or https://HOST/{train,val}-{00..12}.tar;
            for "table" the table itself, and for "npz" the file with train_x, train_y, test_x, test_y.
        table: with "table" and "huggingface", the columns to read; with "webdataset" the separator of labels.
        image_size: side in pixels of the square images given to the model, or [height, width]. None: the data
            set's own.
        crop: how images of another shape are fitted to the image size: "centre" cuts out the largest central part,
            "squash" changes the shape, and "letterbox" keeps the whole image between stripes of grey. Crops by scale
            then cut from the result at 8/7 of the image size; with "centre" they cut from the image itself.
        bit_depth: number of bits in image files with more than 8 bits per channel, such as 12 of 16, if the files do
            not declare it: white is 2**bit_depth - 1; 1 for fractions from 0 to 1. None: measured on a sample of the
            training images.
        channels: number of channels of own pictures that are not RGB, such as 1 for X-rays or 13 for satellites. Files
            with that many channels (PNG, TIFF, .npy) are read at their own depth, without rounding to 8 bits. 1 and 3
            read both gray pictures and RGB. None: RGB of 8 bits for any file.
        batch_size: training images per step.
        repeat: how many times an epoch goes over the training images; above 1, a small set is validated and saved less
            often. With "fractals" it multiplies fractals.epoch_images.
        sampler: "shuffle" gives each training image once per epoch; "class_balanced" draws the same number from every
            class, so images of small classes come several times per epoch, each time augmented differently.
        images: with "fractals", the number of different training images, which then repeat while the number of steps
            stays the same. None: endless, no image comes twice.
        fractals: with "fractals", its classes and the variation of pictures.
        shards_at_once: with "webdataset", the number of shards from which training images are drawn at a time; fewer
            read more locally, more shuffle better.
        eval_batch_size: images per step in validation and test. None: batch_size.
        pipeline: "workers" reads and augments images on the CPU, batch by batch; "device" keeps the whole set as bytes
            on the training device and augments there, for sets that fit.
        workers: number of processes that load images beside the main one. Batches do not depend on it. On a CPU
            training leaves them a core each, so its rounding depends on it. With the pipeline "device" they only read
            files, once at the start.
        check: whether every image of every split is opened before the run, so that damaged images of validation or test
            are found early. None: only if that is little work beside the run; a line reports if it is skipped.
        val_fraction: share of the training images of each class for validation, if a set has no validation split (at
            least one image per class). 0: all images are trained on, and the last epoch's checkpoint counts as best.
        augment: augmentation of training images.
        mix: mixing of training images.
        subset: use only a part of the data.
        mean: mean of the red, green and blue channel in [0, 1], subtracted. None: the data set's own; with channels,
            measured on a sample of the training images.
        std: standard deviation of the channels, divided by. None: as for mean.
        split_seed: seed of the validation split and of subsets, separate from the run's seed, so that runs of several
            seeds see the same data.
    """

    name: SetName = "digits"
    root: str = "data"
    table: TableConfig = field(default_factory=TableConfig)
    image_size: int | tuple[int, int] | None = None
    crop: Crop = "centre"
    bit_depth: int | None = None
    channels: int | None = None
    batch_size: int = 128
    repeat: int = 1
    sampler: SamplerName = "shuffle"
    images: int | None = None
    fractals: FractalConfig = field(default_factory=FractalConfig)
    shards_at_once: int = 16
    eval_batch_size: int | None = None
    pipeline: Pipeline = "workers"
    workers: int = 0
    check: bool | None = None
    val_fraction: float = 0.1
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    mean: Colour | None = None
    std: Colour | None = None
    split_seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", os.path.expanduser(self.root))
        check_choice("name", self.name, get_args(SetName))
        check_choice("pipeline", self.pipeline, get_args(Pipeline))
        self._check_sampler()
        check_range("batch_size", self.batch_size, 1, 1_000_000)
        check_range("repeat", self.repeat, 1, 10_000)
        check_range("shards_at_once", self.shards_at_once, 1, 1_000_000)
        check_range("workers", self.workers, 0, 256)
        check_range("split_seed", self.split_seed, 0, 2**32 - 1)
        check_choice("crop", self.crop, get_args(Crop))
        self._check_image_size()
        if self.bit_depth is not None:
            check_range("bit_depth", self.bit_depth, 1, 32)
        if self.images is not None:
            check_range("images", self.images, 1, 10_000_000)
        self._check_fractals()
        if self.pipeline == "device":
            self._check_device_augments()
        if is_address(self.root) and self.name != "webdataset":
            raise ValueError(f"root={self.root}: is an address, behind which only data.name=webdataset is read")
        if self.name == "webdataset":
            self._check_shards()
        elif self.name not in ("table", "huggingface") and self.table != TableConfig():
            raise ValueError(f"table: is for data.name=table and huggingface, not {self.name}; leave its columns out")
        if self.name == "huggingface":
            self._check_huggingface()
        if self.eval_batch_size is not None:
            check_range("eval_batch_size", self.eval_batch_size, 1, 1_000_000)
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction}: must be from 0 to under 1")
        if self.channels is not None:
            self._check_channels(self.channels)
            return
        if self.mean is not None and not (len(self.mean) == 3 and all(0 <= value <= 1 for value in self.mean)):
            raise ValueError(f"mean={self.mean}: must be three numbers from 0 to 1 (red, green, blue)")
        if self.std is not None and not (len(self.std) == 3 and all(0 < value <= 1 for value in self.std)):
            raise ValueError(f"std={self.std}: must be three numbers over 0 and up to 1 (red, green, blue)")

    @property
    def title(self) -> str:
        """The name for a run's folder: the set, or the user's own folder or file."""
        if self.name in NAMED_SETS:
            return self.name
        path = Path(shard_folder(self.root)) if is_address(self.root) else Path(self.root).resolve()
        return (path.stem if path.suffix.lower() in FILE_SETS else path.name) or self.name

    def _check_channels(self, channels: int) -> None:
        """Refuses what is made for red, green and blue of 8 bits."""
        check_range("channels", channels, 1, _MOST_CHANNELS)
        if self.name in NAMED_SETS:
            raise ValueError(f"channels={channels}: is for sets of your own; {self.name} has RGB: leave it out")
        if self.pipeline == "device":
            raise ValueError(f"channels={channels}: pipeline=device holds RGB of 8 bits; take pipeline=workers")
        augment = self.augment
        if augment.preset in OF_WORKERS:
            raise ValueError(
                f"channels={channels}: augment.preset={augment.preset} changes colours of RGB; take light or none"
            )
        if augment.preset == "strong" and (augment.randaugment_ops, augment.color_jitter) != (0, 0):
            raise ValueError(
                f"channels={channels}: RandAugment and colour jitter of augment.preset=strong are for RGB; take light, "
                "or give augment.randaugment_ops=0 and augment.color_jitter=0"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is None:
                continue
            if len(values) != channels or not all(math.isfinite(each) for each in values):
                raise ValueError(f"{name}={values}: must be {counted(channels, 'number')}, one per channel")
            if name == "std" and min(values) <= 0:
                raise ValueError(f"std={values}: must be numbers over 0")

    def _check_huggingface(self) -> None:
        if self.table.split is not None:
            raise ValueError(f"table.split={self.table.split}: is for tables; a set of datasets has its own splits")

    def _check_shards(self) -> None:
        for name in ("path", "label", "split", "columns"):
            if (value := getattr(self.table, name)) is not None:
                raise ValueError(f"table.{name}={value}: is for tables; of tar shards only table.separator is read")

    def _check_sampler(self) -> None:
        check_choice("sampler", self.sampler, get_args(SamplerName))
        if self.sampler == "shuffle":
            return
        if self.name in ("fractals", "webdataset"):
            why = "which has classes of equal size" if self.name == "fractals" else "which is read shard by shard"
            raise ValueError(f"sampler={self.sampler}: is not for data.name={self.name}, {why}; take shuffle")
        if self.mix.is_on and self.mix.until < 1:
            raise ValueError(
                f"sampler={self.sampler}: has no passes over the images by which mix.until={self.mix.until} could "
                "count; leave mix.until at 1"
            )

    def _check_image_size(self) -> None:
        if self.image_size is None:
            return
        if isinstance(self.image_size, int):
            check_range("image_size", self.image_size, 1, 4096)
            return
        if len(self.image_size) != 2:
            raise ValueError(f"image_size={list(self.image_size)}: must be one number, or two: height and width")
        for side in self.image_size:
            check_range("image_size", side, 1, 4096)
        object.__setattr__(self, "image_size", as_size(*self.image_size))
        if self.pipeline == "device" and not isinstance(self.image_size, int):
            raise ValueError(
                f"image_size={list(self.image_size)}: pipeline=device makes square images; give one number, or "
                "pipeline=workers"
            )

    def _check_device_augments(self) -> None:
        augment = self.augment
        if augment.albumentations is not None:
            raise ValueError("augment.albumentations: runs in the workers alone; take pipeline=workers")
        if augment.preset in OF_WORKERS:
            raise ValueError(
                f"augment.preset={augment.preset}: pipeline=device does not have it; take pipeline=workers, or the "
                "preset strong"
            )

    def _check_fractals(self) -> None:
        if self.name != "fractals":
            if self.images is not None:
                raise ValueError(
                    f"images={self.images}: is for data.name=fractals; data.subset makes other sets smaller"
                )
            return
        if self.images is not None and self.images < self.fractals.classes:
            raise ValueError(
                f"images={self.images}: leaves classes without images; give at least as many as data.fractals."
                f"classes={self.fractals.classes}, or fewer classes"
            )
        if self.subset != SubsetConfig():
            raise ValueError(
                "subset: is not for data.name=fractals; data.images and data.fractals.classes say how much there is"
            )
        if self.image_size is not None:
            if not isinstance(self.image_size, int):
                raise ValueError(f"image_size={list(self.image_size)}: fractals are square; give one number")
            check_range("image_size", self.image_size, 8, 512)


def data_config(data: "DataConfig | str | PathLike[str]", **options: Any) -> DataConfig:
    """The config of a data set, given as a config, a name or a path.

    Args:
        data: The name of a set, such as "cifar10"; a folder of class folders or of tar shards; a table (.csv, .tsv or
            .parquet); an .npz file; or a `DataConfig`. A set's name takes precedence over a path.
        **options: Fields to set.

    Raises:
        UserError: There is no such set, folder or file, or an option is unknown or its value not allowed.
    """
    known = [field.name for field in fields(DataConfig)]
    for name in options:
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"{name}: no such argument of a data set{'; ' + hint if hint else ''}")
    if isinstance(data, DataConfig):
        plain: dict[str, Any] = to_plain(data)
    else:
        set_name, root = set_and_root(data)
        plain = {"name": set_name} | ({} if root is None else {"root": str(root)})
    return from_plain(DataConfig, plain | {name: to_plain(value) for name, value in options.items()}, "data.")


def set_and_root(data: str | PathLike[str]) -> tuple[str, Path | str | None]:
    """The kind of a set, and its root if `data` is a path or the address of tar shards.

    A set's name takes precedence over a path.

    Raises:
        UserError: It is neither, or a missing path. `DataConfig` refuses unknown names.
    """
    if not isinstance(data, str | PathLike):
        raise UserError(f"data={data!r}: must be the name of a set, a path or a DataConfig")
    if data in get_args(SetName):
        return str(data), None
    if is_address(data):
        return "webdataset", str(data)
    path = Path(os.path.expanduser(data))
    if path.suffix.lower() in FILE_SETS:
        return FILE_SETS[path.suffix.lower()], path
    if os.path.isdir(path):  # unlike `Path.is_dir` it accepts names of any length
        return _kind_of_folder(path), path
    if "/" in str(data) or os.sep in str(data):
        raise UserError(
            f"data.name={str(data)!r}: no such folder; give a folder, a table (.csv, .tsv, .parquet), an .npz file or "
            "a set's name"
        )
    return str(data), None


def _kind_of_folder(folder: Path) -> str:
    if any(folder.glob("*.tar")):
        return "webdataset"
    if not is_huggingface(folder):
        return "folder"
    # a table may be in a folder with folders of pictures
    beside = not is_saved_dataset(folder) and not any(folder.glob("data/*.parquet"))
    has_pictures = beside and any(is_image_name(file.name) for form in ("*/*", "*/*/*") for file in folder.glob(form))
    return "folder" if has_pictures else "huggingface"


def is_huggingface(folder: Path) -> bool:
    """Whether a folder holds a data set of `save_to_disk` (Hugging Face), or Parquet files."""
    return is_saved_dataset(folder) or any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet"))


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder holds a data set of `save_to_disk` (Hugging Face)."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
