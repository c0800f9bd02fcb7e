"""Putting files and folders in the place of others: whenever it is killed, one of the two is still there."""

import os

import pytest

from vmoe.errors import UserError
from vmoe.files import atomic_write, recover, remove_leftovers, replace, require_writable, write_json


def make(path, kind: str, content: str) -> None:
    if kind == "folder":
        path.mkdir()
        path = path / "part"
    path.write_text(content)


def content_of(path) -> str:
    return (path / "part" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("old", ["file", "folder", None])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_the_new_one_is_there_and_nothing_beside_it(tmp_path, old, new):
    path, temporary = tmp_path / "last.ckpt", tmp_path / "new"
    if old:
        make(path, old, "old")
    make(temporary, new, "new")
    replace(temporary, path)
    assert content_of(path) == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("old", ["file", "folder"])
@pytest.mark.parametrize("new", ["file", "folder"])
def test_killed_on_the_way_the_old_one_comes_back(tmp_path, monkeypatch, old, new):
    path, temporary = tmp_path / "last.ckpt", tmp_path / "new"
    make(path, old, "old")
    make(temporary, new, "new")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace(temporary, path)
    recover(path)
    assert content_of(path) == "old"
    monkeypatch.undo()
    replace(temporary, path)
    recover(path)
    assert content_of(path) == "new"


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_a_file_may_be_read_as_any_new_file(tmp_path, mask):
    """Also where a library makes it for its owner alone, as safetensors does."""
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "weights") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_folder_is_not_lost_where_a_file_is_to_be_written(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("precious")
    with pytest.raises(UserError, match=r"photos: is a folder, and a file is to be written; name a file, such as"):
        write_json(tmp_path / "photos", {})
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "a.jpg"]


def test_what_a_killed_write_left_is_removed_and_nothing_else(tmp_path):
    others = ["last.ckpt", ".last.old.ckpt", ".best.7.ckpt", ".last.7.csv", "last.7.ckpt"]
    for name in [*others, ".last.7.ckpt", ".last.12345.ckpt"]:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path / "last.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == set(others)


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    require_writable(tmp_path, tmp_path / "new" / "deep")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for path in ("file", "file/deep/er"):
        with pytest.raises(UserError, match=rf"{path}: cannot be written \(Not a directory\)"):
            require_writable(tmp_path / "new", tmp_path / path)


def test_a_file_that_is_read_meanwhile_is_named_itself(tmp_path):
    for lost in (tmp_path / "lost.txt", tmp_path / "elsewhere" / "lost.txt"):
        with (
            pytest.raises(UserError, match=r"lost\.txt: cannot be opened \(No such file"),
            atomic_write(tmp_path / "o"),
        ):
            lost.read_text()
    with (
        pytest.raises(UserError, match=r"o\.tar: cannot be written \(No such f"),
        atomic_write(tmp_path / "o.tar") as new,
    ):
        raise FileNotFoundError(2, "No such file or directory", str(new))
