"""Which files are pictures, in every room, and what is passed over and said."""

import os
import socket
import tarfile

import numpy as np
import pytest
from PIL import Image
from support import saved_runs

from vmoe.cli.main import main
from vmoe.data import DataConfig, load_image
from vmoe.data.datasets import load_splits
from vmoe.data.image_files import FORMATS, IMAGE_SUFFIXES, IgnoredFiles, find_images, find_pictures
from vmoe.errors import UserError


def picture(path, level=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    form = next(form for form, suffixes in FORMATS.items() if path.suffix.lower() in suffixes)
    Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)).save(path, form)
    return path


def tree(root):
    """ROOT with train and val of the classes ant and bee, two pictures each, in PNG."""
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            for number in range(2):
                picture(root / split / name / f"{number}.png")
    return root


def load(root):
    return load_splits(DataConfig(name="folder", root=str(root), val_fraction=0))


def test_every_format_of_the_list_is_read_by_every_room(tmp_path, capsys):
    pytest.importorskip("webdataset")
    root = tree(tmp_path / "set")
    for suffix in sorted(IMAGE_SUFFIXES):
        picture(root / "train" / "ant" / f"x{suffix.upper()}")
    assert len(load(root).train) == 4 + len(IMAGE_SUFFIXES) == len(find_images([root / "train"], IgnoredFiles()))
    assert main(["make-shards", str(root), "--out", str(tmp_path / "shards")]) == 0
    with tarfile.open(tmp_path / "shards" / "train-000000.tar") as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"cls"} | {
            suffix[1:] for suffix in IMAGE_SUFFIXES
        }
    shards = load_splits(DataConfig(name="webdataset", root=str(tmp_path / "shards"), val_fraction=0))
    assert all(shards.train.read(index).shape == (8, 8, 3) for index in range(len(shards.train)))
    assert "passed over" not in capsys.readouterr().err


def test_what_is_no_picture_is_counted_and_said(tmp_path, capsys):
    pytest.importorskip("webdataset")
    root = tree(tmp_path / "set")
    for name in ("foojpg", "notes.txt", "a.heic", "b.heic", "._0.png", ".DS_Store"):
        (root / "train" / "ant" / name).write_bytes(b"no picture")
    for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints", ".thumbnails"):
        picture(root / "train" / name / "0.png")
        picture(root / "val" / "bee" / name / "0.png")
    picture(root / "val" / "stray.png")
    os.mkfifo(root / "train" / "bee" / "pipe.png")
    (root / "train" / "bee" / "broken.png").symlink_to("nowhere.png")
    splits = load(root)
    assert splits.class_names == ["ant", "bee"] and (len(splits.train), len(splits.test)) == (4, 4)
    note, ant = splits.notes[0], root / "train" / "ant"
    assert note == (
        f"{root}: ignored: 4 files of other formats (.heic, no ending, .txt; the first is {ant}/a.heic), "
        f"6 names that begin with a dot (the first is {root}/train/.ipynb_checkpoints), "
        f"4 folders of the system's own (the first is {root}/train/@eaDir), "
        f"2 pipes, sockets, devices or broken links (the first is {root}/train/bee/broken.png) "
        f"and 1 picture outside the class folders ({root}/val/stray.png)"
    )
    assert main(["make-shards", str(root), "--out", str(tmp_path / "shards")]) == 0
    assert note in capsys.readouterr().err.splitlines()


def test_links_in_class_folders_are_followed_once(tmp_path):
    root = tree(tmp_path / "set")
    plain = load(root)
    (root / "train" / "ant" / "loop").symlink_to("..")
    (root / "train" / "ant" / "up").symlink_to(tmp_path)
    (root / "train" / "ant" / "aside").symlink_to("../bee")
    (root / "train" / "ant" / "same.png").symlink_to("0.png")
    (root / "train" / "ant" / "other.png").symlink_to("../../val/ant/0.png")
    (root / "train" / "wasp").symlink_to("bee")
    linked = load(root)
    assert linked.class_names == ["ant", "bee"]
    for part in ("train", "test"):
        before, after = getattr(plain, part), getattr(linked, part)
        assert [before.place(i) for i in range(len(before))] == [after.place(i) for i in range(len(after))]
        assert before.labels.tolist() == after.labels.tolist()
    assert linked.notes[0] == (f"{root}: ignored: 6 links to what is there already (the first is {root}/train/wasp)")


def test_links_to_pictures_elsewhere_are_taken(tmp_path):
    for number in range(3):
        picture(tmp_path / "store" / "inside" / f"{number}.png", number)
    root = tree(tmp_path / "set")
    (root / "train" / "ant" / "more").symlink_to(tmp_path / "store")
    (root / "train" / "bee" / "one.png").symlink_to(tmp_path / "store" / "inside" / "0.png")
    splits = load(root)
    assert np.bincount(splits.train.labels).tolist() == [5, 2]  # each real file once: with ant, or with bee
    assert splits.notes[0] == f"{root}: ignored: 1 link to what is there already ({root}/train/bee/one.png)"


def test_pictures_are_sorted_by_folder_and_name(tmp_path):
    names = ["b/1.png", "a-b/1.png", "a/b/1.png", "a/2.png", "a/10.png"]
    for name in names:
        picture(tmp_path / name)
    (found,) = find_pictures([tmp_path], IgnoredFiles())
    assert [os.path.relpath(path, tmp_path) for path in found] == [
        "a/10.png", "a/2.png", "a-b/1.png", "a/b/1.png", "b/1.png",
    ]  # fmt: skip


def test_a_split_that_is_a_link_to_another_is_refused(tmp_path):
    root = tree(tmp_path / "set")
    (root / "test").symlink_to("train")
    with pytest.raises(UserError, match=r"test: is the same folder as .*train, by a link"):
        load(root)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    place = socket.socket(socket.AF_UNIX)
    place.bind(str(tmp_path / "socket.png"))
    for path in (tmp_path / "pipe.png", tmp_path / "socket.png", "/dev/zero"):
        for read in (load_image, lambda path: find_images([path], IgnoredFiles())):
            with pytest.raises(UserError, match=f"{path}: is no regular file but"):
                read(path)
    place.close()


def test_a_folder_stands_for_its_images(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in find_images([tmp_path], IgnoredFiles())] == ["a.jpg", "b.PNG"]
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing.png"):
        with pytest.raises(UserError, match=path.name):
            find_images([path], IgnoredFiles())


def test_a_folder_of_pictures_is_the_same_to_every_job(tmp_path, capsys):
    saved_runs.save_run(tmp_path / "run", {"num_experts": 4, "top_k": 2})
    folder = tmp_path / "pictures"
    for name in ("p.JPG", "deep/er/x.jfif"):
        picture(folder / name)
    (folder / "._p.JPG").write_bytes(b"\0\5\x16\7")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf")
    os.mkfifo(folder / "pipe.png")
    said = {}
    for job, options in {"predict": (), "heatmap": ("--out", str(tmp_path / "maps"))}.items():
        assert main([job, str(tmp_path / "run"), str(folder), *options]) == 0
        out, error = capsys.readouterr()
        said[job] = error.splitlines()[0]  # a slow machine adds lines of progress
        assert "p.JPG: " in out and "x.jfif: " in out
    assert (
        said["predict"]
        == said["heatmap"]
        == (
            f"ignored: 1 file of another format (.db; {folder}/Thumbs.db), 1 name that begins with a dot "
            f"({folder}/._p.JPG) and 1 pipe, socket, device or broken link ({folder}/pipe.png)"
        )
    )


def test_a_broken_link_that_is_named_is_refused(tmp_path):
    (tmp_path / "broken.png").symlink_to("lost.png")
    with pytest.raises(UserError, match=r"broken\.png: is a broken link"):
        find_images([tmp_path / "broken.png"], IgnoredFiles())
