"""Writes webdataset's tar shards from class folders."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vmoe.data.folders import find_split_folders, read_class_folders
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
    say: Callable[[str], object],
) -> dict[str, int]:
    """Copies ROOT/train/CLASS/IMAGE, and the same in val and test, into tar shards. The files' bytes do not change.

    Args:
        source: ROOT.
        target: The new folder. It appears once it is complete.
        images: The most images per shard.
        megabytes: The most megabytes per shard.
        seed: Seed of the order of images.
        show: Called with the split, the number of its written images, and their total.
        say: Called with a line on ignored files, if there are any.

    Returns:
        The number of shards of each split.

    Raises:
        UserError: The source has no such folders, the target exists, or the package is missing.
    """
    require_extras("webdataset")
    from webdataset import ShardWriter

    if target.exists():
        raise UserError(f"--out {target}: exists already; remove it or name another folder")
    found = find_split_folders(source) if source.is_dir() else {}
    if "train" not in found or len(found) < 2:
        raise UserError(f"{source}: must hold train/CLASS/IMAGE and val/CLASS/IMAGE (or test)")
    require_writable(target.parent)
    folders = read_class_folders(found)
    if folders.passed_over:
        say(f"{source}: passed over: {folders.passed_over}")
    with new_folder(target) as folder:
        for split, samples in folders.samples.items():
            order = np.random.default_rng(seed).permutation(len(samples))
            limits = {"maxcount": images, "maxsize": megabytes * 1e6, "verbose": 0}
            with ShardWriter(str(folder / f"{split}-%06d.tar"), **limits) as writer:
                for done, index in enumerate(order, 1):
                    path, label = Path(samples[index][0]), samples[index][1]
                    form = path.suffix[1:].lower()
                    writer.write({"__key__": f"{index:09d}", form: _file_bytes(path), "cls": str(label).encode()})
                    show(split, done, len(samples))
        (folder / CLASSES_FILE).write_text(json.dumps(folders.classes, ensure_ascii=False), encoding="utf-8")
        load_shards(folder)  # writes the index, and checks that the shards can be read
    return {split: len(list(target.glob(f"{split}-*.tar"))) for split in found}


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); repair or remove it") from error
