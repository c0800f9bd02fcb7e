"""Tar shards: written from a folder, read in any order, like the folder itself."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from vmoe.cli.make_shards import main
from vmoe.data import DataConfig, EpochBatchSampler, ImageDataModule
from vmoe.data.config import TableConfig
from vmoe.data.datasets import load_splits, load_whole_splits
from vmoe.data.samplers import Blocks
from vmoe.errors import UserError


@pytest.fixture
def shards(image_tree, tmp_path):
    """Class folders and shards of them, 4 images each."""
    tree = image_tree(count=6)
    assert main([str(tree), "--out", str(tmp_path / "shards"), "--images", "4"]) == 0
    return tree, tmp_path / "shards"


def splits_of(root, separator=None):
    return load_whole_splits(DataConfig("webdataset", str(root), table=TableConfig(separator=separator)))


def add(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def module_of(root, name="webdataset", part=0, parts=1, **changes):
    config = DataConfig(name=name, root=str(root), image_size=8, batch_size=4, **changes)
    module = ImageDataModule(config, seed=3, part=part, parts=parts)
    module.prepare_data()
    module.setup()
    return module


def seen(loader):
    return [(batch.labels.tolist(), batch.images.mean((1, 2, 3)).tolist()) for batch in loader]


def test_shards_hold_what_the_folder_holds(shards):
    tree, written = shards
    folder, tars = (module_of(root, name) for root, name in ((tree, "folder"), (written, "webdataset")))
    assert tars.class_names == folder.class_names == ["ant", "bee", "cow"]
    both = [
        sorted(pair for batch in seen(m.test_dataloader()) for pair in zip(*batch, strict=True)) for m in (folder, tars)
    ]
    assert both[0] == both[1] and len(both[0]) == 18
    assert len(list(written.glob("train-*.tar"))) == 5


def test_webdataset_reads_them_too(shards):
    webdataset = pytest.importorskip("webdataset")
    urls = sorted(map(str, shards[1].glob("train-*.tar")))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(samples) == 18 and {sample["cls"] for sample in samples} == {0, 1, 2}
    assert samples[0]["png"].shape == (8, 8, 3)


def test_order_is_of_seed_and_epoch_whatever_workers_and_processes(shards):
    whole = seen(module_of(shards[1], shards_at_once=2).train_dataloader())
    assert seen(module_of(shards[1], shards_at_once=2, workers=2).train_dataloader()) == whole
    parts = [seen(module_of(shards[1], shards_at_once=2, part=part, parts=2).train_dataloader()) for part in (0, 1)]
    assert [(a + b, c + d) for (a, c), (b, d) in zip(*parts, strict=True)] == whole
    assert len(whole) == 4  # of 18 images


def test_goes_on_at_a_sample(shards):
    module = module_of(shards[1], shards_at_once=2)
    whole = seen(module.train_dataloader())
    module.train_sampler.start_batch = 2
    assert seen(module.train_dataloader()) == whole[2:]


def test_few_shards_at_a_time():
    blocks = np.repeat(np.arange(10), 20)
    sampler = EpochBatchSampler(200, 40, seed=1, groups=Blocks(blocks, 2))
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = [[index for _, index in batch] for batch in sampler]
        assert all(len(set(blocks[batch])) == 2 for batch in batches)
        assert sorted(index for batch in batches for index in batch) == list(range(200))
        orders.append(batches)
    assert orders[0] != orders[1] and orders[0][0] != sorted(orders[0][0])


def test_a_damaged_member_is_replaced_and_named(shards):
    images = splits_of(shards[1]).train.images
    with open(images.paths[0], "rb+") as file:
        file.seek(images.offsets[0])
        file.write(b"\0" * images.sizes[0])
    (shards[1] / "index-train.npz").unlink()
    damaged = [place for batch in module_of(shards[1]).train_dataloader() for place in batch.damaged]
    assert set(damaged) <= {images.place(0)}
    with pytest.raises(UserError, match=r"train-000000\.tar/0.*cannot be read as an image"):
        images.read(0)


def test_another_shard_is_seen_without_a_new_index(shards):
    before = len(splits_of(shards[1]).train)
    (shards[1] / "train-000004.tar").unlink()
    assert len(splits_of(shards[1]).train) < before


@pytest.mark.parametrize(
    ("members", "line"),
    [
        ({"1.png": b"x"}, "sample 1 has no label"),
        ({"1.cls": b"0"}, "sample 1 has no image"),
        ({"1.png": b"x", "1.cls": b"ant"}, "1.cls: holds 'ant'"),
        ({"1.png": b"x", "1.json": b'{"label": "ant"}'}, "1.json: holds 'ant'"),
        ({"1.png": b"x", "1.json": b'{"label": true}'}, "1.json: holds 'True'"),
        ({"1.png": b"x", "1.json": b'{"caption": "an ant"}'}, "1.json: has no label or cls or target"),
        ({"1.png": b"x", "1.json": b"[1"}, "1.json: is not JSON"),
        ({"1.png": b"x", "1.json": b'{"label": [0.5]}'}, "1.json: lists 0.5; a label must be"),
        ({"1.png": b"x", "1.json": b'{"label": [0, 1, 0]}'}, "1.json: lists 0 twice; a list must hold the classes"),
        (
            {"1.png": b"x", "1.json": b'{"label": [0]}', "2.png": b"x", "2.cls": b"0"},
            "2.png: has one label, and other samples have lists",
        ),
    ],
)
def test_malformed_shards_are_named(tmp_path, members, line):
    for split in ("train", "val"):
        add(tmp_path / f"{split}-0.tar", members)
    with pytest.raises(UserError, match=f"train-0.tar.*{line}"):
        splits_of(tmp_path)


def test_a_truncated_shard_is_named(shards):
    path = shards[1] / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UserError, match=r"train-000001\.tar"):
        splits_of(shards[1])


@pytest.mark.parametrize("form", ["names", "numbers", "text"])
def test_an_image_may_have_several_labels_or_none(tmp_path, form):
    given = [["cat", "dog"], [], ["dog"], ["owl"]]
    numbers = {"cat": 0, "dog": 1, "owl": 2}
    for split in ("train", "val"):
        members = {}
        for row, labels in enumerate(given):
            content = [numbers[each] for each in labels] if form == "numbers" else labels
            is_text = form == "text"
            members[f"{row}.png"] = b"x"
            members[f"{row}.txt"] = " | ".join(labels).encode() if is_text else b"a caption"
            members |= {} if is_text else {f"{row}.json": json.dumps({"label": content}).encode()}
        add(tmp_path / f"{split}-0.tar", members)
    if form == "numbers":
        (tmp_path / "classes.json").write_text('["cat", "dog", "owl"]')
    separator = "|" if form == "text" else None
    for _ in ("headers", "index"):
        splits = splits_of(tmp_path, separator)
        assert splits.class_names == ["cat", "dog", "owl"] and splits.train.is_multi_label
        assert splits.train.labels.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]
    if form == "text":  # the index is of this separator
        with pytest.raises(UserError, match="has no label"):
            splits_of(tmp_path)


@pytest.mark.parametrize(
    ("train", "val", "classes", "line"),
    [
        (b'{"label": ["cat"]}', b'{"label": 0}', None, "val has one label per sample, and train lists"),
        (b'{"label": ["cat"]}', b'{"label": [0]}', None, "some labels are names and some numbers"),
        (b'{"label": ["cat"]}', b'{"label": []}', '["dog"]', "json: does not hold the label 'cat'"),
        (b'{"label": []}', b'{"label": []}', None, "no sample has a label"),
    ],
)
def test_lists_of_labels_that_do_not_fit_are_named(tmp_path, train, val, classes, line):
    for split, content in (("train", train), ("val", val)):
        add(tmp_path / f"{split}-0.tar", {"1.png": b"x", "1.json": content})
    if classes is not None:
        (tmp_path / "classes.json").write_text(classes)
    with pytest.raises(UserError, match=line):
        splits_of(tmp_path)


def test_shards_have_a_separator_and_no_columns():
    with pytest.raises(ValueError, match="label=kind: is for tables; of tar shards only"):
        DataConfig("webdataset", "x", table=TableConfig(label="kind"))


@pytest.mark.parametrize("form", ["separator", "columns", "one"])
def test_shards_of_a_table_hold_what_the_table_holds(tmp_path, form):
    header, cells, columns = {
        "separator": ("kind", ("7|3", "3", "", "7"), ["label=kind", "separator=|"]),
        "columns": ("3,5,7", ("1,0,1", "1,0,0", "0,0,0", "0,0,1"), ["columns=3,5,7"]),
        "one": ("kind", ("7", "3", "3", "7"), ["label=kind"]),
    }[form]
    rows = []
    for number in range(20):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.PNG")
        rows.append(f"{number}.PNG,{'train' if number < 12 else 'test'},{cells[number % 4]}\n")
    (tmp_path / "table.csv").write_text(f"path,split,{header}\n" + "".join(rows))
    assert main([str(tmp_path / "table.csv"), "--out", str(tmp_path / "out"), "--columns", *columns]) == 0
    splits = splits_of(tmp_path / "out")
    assert splits.class_names == (["3", "5", "7"] if form == "columns" else ["3", "7"])
    for part, numbers in ((splits.train, range(12)), (splits.test, range(12, 20))):
        found = {int(part.read(index)[0, 0, 0]): part.labels[index] for index in range(len(part))}
        assert sorted(found) == list(numbers)
        for number, label in found.items():
            if form == "one":
                assert splits.class_names[label] == cells[number % 4]
            else:
                assert label[[0, -1]].tolist() == [[1, 1], [1, 0], [0, 0], [0, 1]][number % 4]


def test_lines_on_a_table_name_this_command_s_option(tmp_path, capsys):
    for number in range(20):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    rows = [f"{number}.png,{('cat', 'cat|dog')[number % 2]}" for number in range(20)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,label", *rows]))
    assert main([str(table), "--out", str(tmp_path / "out")]) == 0
    assert "where a picture may have several, give --columns separator='|'" in capsys.readouterr().err
    table.write_text("\n".join(["path,label", *rows, "20.png,"]))
    assert main([str(table), "--out", str(tmp_path / "other")]) == 2
    assert "or give --columns separator=... where a picture may have several labels" in capsys.readouterr().err


def test_shards_of_training_alone_are_split_as_a_folder_is(shards):
    tree, written = shards
    for name in ("val-000000.tar", "test-000000.tar"):
        (written / name).unlink(missing_ok=True)
    for path in written.glob("val-*"):
        path.unlink()
    runs = [module_of(root, name) for root, name in ((written, "webdataset"), (tree / "train", "folder"))]
    for split, count in (("train", 12), ("val", 3), ("test", 3)):
        assert [run.images_of_classes(split) for run in runs] == 2 * [3 * [count // 3]]
    places = [{images.place(index) for index in range(len(images))} for images in runs[0].image_sets().values()]
    assert len(set.union(*places)) == 18
    assert "has no split of its own: 20% of each class are cut off for the test" in runs[0].notes[0]
    add(written / "valdiation-0.tar", {"a": b""})
    with pytest.raises(UserError, match=r"has train-\*\.tar and valdiation-0\.tar, which is of no split; rename"):
        splits_of(written)


def test_no_shards(tmp_path, capsys):
    with pytest.raises(UserError, match="make-shards"):
        splits_of(tmp_path)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no class folders" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_set_that_leaves_no_test_images_writes_nothing(tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "pets" / name / "only.png")
    assert main([str(tmp_path / "pets"), "--out", str(tmp_path / "out")]) == 2
    assert "no images are left for test" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["folder", "table"])
def test_pictures_without_splits_get_the_test_images_that_a_run_on_them_has(tmp_path, capsys, source):
    rows = ["path,label"]
    for number in range(20):
        picture = tmp_path / "pets" / ("cat", "dog")[number % 2] / f"{number}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(picture)
        rows.append(f"{picture},{picture.parent.name}")
    (tmp_path / "pets.csv").write_text("\n".join(rows))
    root = tmp_path / {"folder": "pets", "table": "pets.csv"}[source]
    assert main([str(root), "--out", str(tmp_path / "out")]) == 0
    assert "has no split of its own: 20% of each class are cut off for the test (by" in capsys.readouterr().err
    runs = load_splits(DataConfig(source, str(root))), splits_of(tmp_path / "out")
    gray = [sorted(int(splits.test.read(index)[0, 0, 0]) for index in range(len(splits.test))) for splits in runs]
    assert gray[0] == gray[1] and len(gray[0]) == 4 and len(runs[1].train) == 16


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"),
        ("train_0000.tar", "val_0000.tar"),
        ("Train0000.tar", "valid0000.tar"),
        ("train-00000-of-00001.tar", "test-00000-of-00001.tar"),
        ("pretrain-test-train-0.tar", "train-test-0.tar"),
    ],
)
def test_shards_as_published_sets_name_them(tmp_path, train, val):
    for number, name in enumerate((train, val)):
        members = {f"{i}.jpg": b"x" for i in range(4 - number)}
        members |= {f"{i}.json": b'{"label": %d, "text": "a"}' % (i % 2) for i in range(4 - number)}
        add(tmp_path / name, members | {"0.cls": b"1", "0.txt": b"a caption", "._1.jpg": b"of a Mac"})
    add(tmp_path / "extra-0.tar", {"a": b""})
    splits = splits_of(tmp_path)
    assert splits.train.labels.tolist() == [1, 1, 0, 1]  # .cls before .json
    assert splits.test.labels.tolist() == [1, 1, 0]
    assert f"{tmp_path}: ignored: 1 tar file of no split, such as extra-0.tar" in splits.notes
