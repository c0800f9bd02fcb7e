"""A folder of files that are wrong in every way that comes to mind, beside some that are right."""

import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from support import saved_runs

from vmoe.checkpoints import ENTRY
from vmoe.checkpoints.entry import FORMAT_VERSION

MOE = {"num_experts": 4, "top_k": 2}
RECIPE = """
data: {name: digits, batch_size: 40, subset: {per_class: 20}, augment: {preset: none}}
model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}
moe: {num_experts: 4}
trainer: {epochs: 1, device: cpu}
"""
YAML = {
    "tiny": RECIPE,
    "list": "- data\n- model",
    "empty": "",
    "broken": "data: {name: [",
    "twice": "optim: {lr: 1, lr: 2}",
    "unknown_section": "optimiser: {lr: 1}",
    "unknown_key": "moe: {experts: 4}",
    "word": "optim: {lr: fast}",
    "flat": "optim: 3",
    "null": "data: null",
    "infinite": "optim: {lr: .inf}",
    "nan": "moe: {capacity_factor: .nan}",
    "code": "data: !!python/object/apply:os.system ['touch hacked']",
    "study": "config: tiny.yaml\nseeds: [0]\narms: {a: {}}",
    "study_without": "seeds: [0]\narms: {a: {}}",
    "study_lost": "config: lost.yaml\nseeds: [0]\narms: {a: {}}",
    "study_seeds": "config: tiny.yaml\nseeds: 3\narms: {a: {}}",
    "super": "\n".join(f"'{digit}': {'even' if digit % 2 == 0 else 'odd'}" for digit in range(10)),
    "study_arms": "config: tiny.yaml\nseeds: [0]\narms: [a]",
}


class RunsCode:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return (open, ("hacked", "w"))


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change that puts the last argument where the others lead."""
    *keys, last, value = path

    def change(content: dict[str, Any]) -> None:
        for key in keys:
            content = content[key]
        if value is None:
            del content[last]
        else:
            content[last] = value

    return change


CHECKPOINTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "newer": _set(ENTRY, "version", FORMAT_VERSION + 1),
    "versionless": _set(ENTRY, "version", None),
    "classes": _set(ENTRY, "class_names", ["a", "b"]),
    "class_number": _set(ENTRY, "class_names", 10),
    "image_size": _set(ENTRY, "image_size", "large"),
    "huge": _set(ENTRY, "image_size", 10**7),
    "mean": _set(ENTRY, "mean", [0.5]),
    "zero_std": _set(ENTRY, "std", [0.5, 0.0, 0.5]),
    "without_data": _set(ENTRY, "config", "data", None),
    "data_number": _set(ENTRY, "config", "data", 3),
    "data_value": _set(ENTRY, "config", "data", {"name": "digits", "batch_size": "many"}),
    "config_text": _set(ENTRY, "config", "digits"),
    "hub": _set(ENTRY, "config", "model", "name", "hf-hub:someone/model"),
    "kwargs": _set(ENTRY, "config", "model", "kwargs", 3),
    "class_argument": _set(ENTRY, "config", "model", "kwargs", {"norm_layer": "os.system"}),
    "knob": _set(ENTRY, "config", "moe", {"unheard_of": 1}),
    "knob_type": _set(ENTRY, "config", "moe", {"num_experts": "four"}),
    "without_weights": _set("state_dict", None),
    "weights_list": _set("state_dict", [1, 2]),
    "without_step": _set("global_step", None),
}


TABLES = {
    "good": "path,kind\nphoto.png,cat\n",
    "unlabelled": "path,size\nphoto.png,8\n",
    "missing": "path,label\nlost.png,cat\n",
    "strange_split": "path,label,split\nphoto.png,cat,fold1\n",
    "long_row": "path,label\nphoto.png,cat,dog\n",
}


def spoil(folder: Path) -> None:
    """Fills an empty folder."""
    for name, text in YAML.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "latin.yaml").write_bytes("# für".encode("latin-1"))
    (folder / "nothing").mkdir()
    _runs(folder)
    _checkpoints(folder)
    _safetensors(folder)
    _images(folder)
    _data(folder)
    for name, rows in TABLES.items():
        (folder / f"{name}.csv").write_text(rows)
    for file in (Path(__file__).parents[1] / "fixtures" / "vmoe_jax_token").iterdir():
        shutil.copy(file, folder / file.name.replace("vmoe_tiny_token", "jax"))
    for name in ("swin", "swin_without_rank"):
        shutil.copytree(
            Path(__file__).parents[1] / "fixtures" / "swin_moe" / "tiny_linear_2expert_sliced_4rank", folder / name
        )
    (folder / "swin_without_rank" / "tiny_linear_2expert_sliced_4rank.pth.rank1").unlink()


def _runs(folder: Path) -> None:
    saved_runs.save_run(folder / "run", MOE)
    saved_runs.save_run(folder / "dense")
    saved_runs.save_run(folder / "three", MOE, class_names=("a", "b", "c"))
    saved_runs.save_run(folder / "unvalidated", MOE, {"val_fraction": 0})
    saved_runs.save_run(folder / "one", MOE, class_names=("cat",))
    saved_runs.save_run(folder / "rounded", MOE | {"capacity_rounding": "round", "group": 1})
    model = saved_runs.save_run(folder / "model_alone", MOE) / "checkpoints" / "best.ckpt"
    model.rename(model.with_name("last.ckpt"))
    finished = folder / "finished"
    finished.mkdir()
    (finished / "config.yaml").write_text(RECIPE)
    (finished / "metrics.csv").write_text("epoch,val/top1\n1,0.5\n")
    (finished / "summary.json").write_text("{")


def _checkpoints(folder: Path) -> None:
    for name, change in CHECKPOINTS.items():
        content = saved_runs.content(MOE)
        change(content)
        torch.save(content, folder / f"{name}.ckpt")
    content = saved_runs.content(MOE)
    content["state_dict"]["model.head.bias"] *= float("nan")
    torch.save(content, folder / "nan.ckpt")
    whole = (folder / "run" / "checkpoints" / "best.ckpt").read_bytes()
    (folder / "cut.ckpt").write_bytes(whole[:-100])
    (folder / "flipped.ckpt").write_bytes(whole[:200] + bytes(200) + whole[400:])
    (folder / "text.ckpt").write_text("not a checkpoint")
    with zipfile.ZipFile(folder / "zip.ckpt", "w") as archive:
        archive.writestr("../hacked", "a")
    torch.save({ENTRY: RunsCode()}, folder / "code.ckpt")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps({ENTRY: {"version": 1}}))
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")


def _safetensors(folder: Path) -> None:
    (folder / "text.safetensors").write_text("not a checkpoint")
    (folder / "header.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / "shape.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    save_file({"w": torch.zeros(3)}, folder / "foreign.safetensors")
    told = {"version": FORMAT_VERSION + 1}
    save_file({"w": torch.zeros(3)}, folder / "newer.safetensors", metadata={ENTRY: json.dumps(told)})
    (folder / "text.onnx").write_text("not a program")


def _images(folder: Path) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    photo.save(folder / "photo.png")
    photo.save(folder / "photo.jpg")
    (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:2000])
    (folder / "text.jpg").write_text("not a photo")
    (folder / "empty.png").write_bytes(b"")
    Image.fromarray(np.asarray(photo.convert("F")) - 300).save(folder / "float.tif")
    os.mkfifo(folder / "pipe.png")
    # A header that promises more pixels than Pillow accepts
    content = bytearray((folder / "photo.png").read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    (folder / "bomb.png").write_bytes(content)


def _data(folder: Path) -> None:
    for tree, places in {
        "tree": ("train/cat", "train/dog", "val/cat", "val/dog"),
        "without_train": ("val/cat",),
        "flat_val": ("train/cat", "train/dog", "val"),
        "without_val": ("train/cat", "valdiation/cat"),
        "other_class": ("train/cat", "val/cat", "val/mouse"),
        "damaged_val": ("train/cat", "val/cat", "test/cat"),
    }.items():
        for place in places:
            (folder / tree / place).mkdir(parents=True)
            for number in range(6):
                shutil.copy(folder / "photo.png", folder / tree / place / f"{number}.png")
    (folder / "tree" / "train" / "empty").mkdir()
    (folder / "linked").mkdir()
    shutil.copytree(folder / "tree" / "val", folder / "linked" / "train")
    (folder / "linked" / "val").symlink_to("train")
    for split in ("val", "test"):
        shutil.copy(folder / "cut.png", folder / "damaged_val" / split / "cat" / "2.png")
    (folder / "class_folders" / "train").mkdir(parents=True)
    shutil.copy(folder / "photo.png", folder / "class_folders" / "train" / "a.png")
    (folder / "class_folders" / "val").mkdir()
    (folder / "text.npz").write_text("not arrays")
    x, y = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 2
    right = {"train_x": x, "train_y": y, "test_x": x, "test_y": y}
    for name, change in {
        "npz_without": {"test_y": None},
        "npz_float": {"train_x": x / 255},
        "npz_shape": {"train_x": x[..., 0, 0]},
        "npz_labels": {"train_y": y - 1},
        "npz_gaps": {"train_y": y + 1000},
        "npz_few": {"train_y": y[:5]},
        "npz_names": {"class_names": np.array(["a"])},
        "npz_code": {"class_names": np.array([RunsCode()], dtype=object)},
        "small": {},
    }.items():
        arrays = {key: value for key, value in (right | change).items() if value is not None}
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "shards").mkdir()
    (folder / "shards" / "train-000000.tar").write_text("no tar")
    (folder / "shards" / "val-000000.tar").write_text("no tar")
