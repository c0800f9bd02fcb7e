"""Writes webdataset's tar shards from class folders or a table."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vmoe.data.config import FILE_SETS, DataConfig, TableConfig
from vmoe.data.datasets import load_whole_splits
from vmoe.data.image_files import is_image_name
from vmoe.data.imageset import ImageSet
from vmoe.data.shards import CLASSES_FILE, load_shards
from vmoe.errors import UserError
from vmoe.extras import require_extras
from vmoe.files import new_folder, require_writable


def write_shards(
    source: Path,
    target: Path,
    images: int,
    megabytes: float,
    seed: int,
    show: Callable[[str, int, int], None],
    log: Callable[[str], object],
    table: TableConfig | None = None,
) -> dict[str, int]:
    """Copies the pictures of class folders or of a table into tar shards. The files' bytes do not change.

    Args:
        source: A folder or a table as a run reads it. Without splits, the test images that a run would cut off are.
        target: The new folder. It appears once it is complete.
        images: The most images per shard.
        megabytes: The most megabytes per shard.
        seed: Seed of the order of images.
        show: Called with the split, the number of its written images, and their total.
        log: Called with each line on the images, such as on ignored files.
        table: The columns of a table.

    Returns:
        The number of shards of each split.

    Raises:
        UserError: The source has no training images, the target exists, or the package is missing.
    """
    require_extras("webdataset")
    from webdataset import ShardWriter

    if target.exists():
        raise UserError(f"--out {target}: exists already; remove it or name another folder")
    require_writable(target.parent)
    is_table = FILE_SETS.get(source.suffix.lower()) == "table" and not source.is_dir()
    if table is not None and not is_table:
        raise UserError(f"--columns: are those of a table, and {source} is none; leave them out")
    sets, classes = _sets_of(source, "table" if is_table else "folder", table or TableConfig(), log)
    with new_folder(target) as folder:
        for split, part in sets.items():
            order = np.random.default_rng(seed).permutation(len(part))
            limits = {"maxcount": images, "maxsize": megabytes * 1e6, "verbose": 0}
            with ShardWriter(str(folder / f"{split}-%06d.tar"), **limits) as writer:
                for done, index in enumerate(order.tolist(), 1):
                    path = Path(part.place(index))
                    form = path.suffix[1:].lower()
                    sample = {"__key__": f"{index:09d}", form: _file_bytes(path), **_label_file(part.labels[index])}
                    writer.write(sample)
                    show(split, done, len(part))
        (folder / CLASSES_FILE).write_text(json.dumps(classes, ensure_ascii=False), encoding="utf-8")
        load_shards(folder)  # writes the index, and checks that the shards can be read
    return {split: len(list(target.glob(f"{split}-*.tar"))) for split in sets}


def _sets_of(
    source: Path, name: str, table: TableConfig, log: Callable[[str], object]
) -> tuple[dict[str, ImageSet], list[str]]:
    """The images of each split, and the class names."""
    found = load_whole_splits(DataConfig(name, str(source), table=table, val_fraction=0.0))
    if not len(found.train):
        raise UserError(f"{source}: has no training images; add train/CLASS/IMAGE, or rows of train to a table")
    for line in found.notes:
        log(line)
    sets = {"train": found.train}
    if found.val is not None:
        sets["val"] = found.val
    if found.test is not found.val:
        sets["test"] = found.test
    for split, part in sets.items():
        if not len(part):
            raise UserError(f"{source}: no images are left for {split}; give each class more, or split it yourself")
        for index in range(len(part)):
            if not is_image_name(Path(part.place(index)).name):
                raise UserError(f"{part.place(index)}: a shard cannot hold a picture by this name; rename the file")
    return sets, found.class_names


def _label_file(label: np.ndarray) -> dict[str, bytes]:
    """The file of an image's class or classes, by its suffix: numbers in classes.json."""
    if label.ndim:
        return {"json": json.dumps({"label": np.flatnonzero(label).tolist()}).encode()}
    return {"cls": str(label).encode()}


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); repair or remove it") from error
