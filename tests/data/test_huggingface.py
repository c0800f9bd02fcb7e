"""Sets of Hugging Face's `datasets`: saved to disk or as Parquet files, their columns and splits, what is refused."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from vmoe.data import DataConfig, ImageDataModule
from vmoe.data.config import TableConfig, set_and_root
from vmoe.data.datasets import load_splits
from vmoe.errors import UserError

datasets = pytest.importorskip("datasets")
NAMES = ["ant", "bee"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(level):
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(content, "PNG")
    return {"bytes": content.getvalue(), "path": None}


def rows_of(levels, label=None, **columns):
    """A set of pictures of these gray levels; the label is by the level, unless a feature for it is given."""
    features = {"image": datasets.Image(), "label": label or datasets.ClassLabel(names=NAMES)}
    content = {"image": [png(level) for level in levels], "label": [level % 2 for level in levels]} | columns
    if label is not None and label.dtype == "string":
        content["label"] = [NAMES[level % 2] for level in levels]
    features |= {name: datasets.ClassLabel(names=["p", "q"]) for name in columns if name not in features}
    return datasets.Dataset.from_dict(content, datasets.Features(features))


def load(root, **options):
    return load_splits(DataConfig("huggingface", str(root), image_size=8, **options))


@pytest.mark.parametrize("form", ["disk", "parquet"])
def test_splits_and_class_names_are_the_sets_own(tmp_path, form):
    parts = {"train": rows_of(range(10)), "validation": rows_of(range(10, 14)), "test": rows_of(range(14, 20))}
    root = tmp_path / "set"
    if form == "disk":
        datasets.DatasetDict(parts).save_to_disk(root)
    else:
        (root / "data").mkdir(parents=True)
        for name, part in parts.items():
            part.to_parquet(root / "data" / f"{name}-00000-of-00001.parquet")
    assert set_and_root(str(root)) == ("huggingface", root)
    splits = load(root)
    assert splits.class_names == NAMES
    levels = [[part.read(i)[0, 0, 0] for i in range(len(part))] for part in (splits.train, splits.val, splits.test)]
    assert levels == [list(range(10)), list(range(10, 14)), list(range(14, 20))]
    assert splits.train.labels.tolist() == [0, 1] * 5


def test_a_parquet_table_beside_class_folders_makes_no_set_of_hugging_face(tmp_path):
    rows_of(range(4)).to_parquet(tmp_path / "labels.parquet")
    assert set_and_root(tmp_path) == ("huggingface", tmp_path)
    for folder in (tmp_path / "train" / "ant", tmp_path / "bee"):
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(png(0)["bytes"])
        assert set_and_root(tmp_path) == ("folder", tmp_path)
        (folder / "1.png").unlink()


def test_one_split_alone_is_cut_and_text_labels_are_sorted(tmp_path):
    rows_of(range(40), label=datasets.Value("string")).save_to_disk(tmp_path / "set")
    splits = load(tmp_path / "set")
    assert splits.class_names == NAMES and (len(splits.train), len(splits.test)) == (28, 8)
    assert all(splits.test.read(i)[0, 0, 0] % 2 == splits.test.labels[i] for i in range(8))
    assert any("has no split of its own" in note for note in splits.notes)


def test_batches_come_from_worker_processes_too(tmp_path):
    rows_of(range(40)).save_to_disk(tmp_path / "set")
    batches = []
    for workers in (0, 1):
        module = ImageDataModule(tmp_path / "set", image_size=8, batch_size=4, workers=workers)
        module.setup()
        batches.append([batch.images.sum().item() for batch in module.train_dataloader()])
    assert batches[0] == batches[1] and len(batches[0]) == 7


def test_unlabelled_and_unknown_splits_are_passed_over(tmp_path):
    parts = {"train": rows_of(range(20)), "test": rows_of(range(4), label=datasets.ClassLabel(names=NAMES))}
    unlabelled = (
        parts["test"].remove_columns("label").add_column("label", [-1] * 4, feature=parts["test"].features["label"])
    )
    datasets.DatasetDict({**parts, "test": unlabelled, "extra": parts["test"]}).save_to_disk(tmp_path / "set")
    splits = load(tmp_path / "set")
    assert len(splits.train) + len(splits.val) + len(splits.test) == 20
    assert any("extra: ignored: its name is no split's" in note for note in splits.notes)
    assert any("test: ignored: it has no labels" in note for note in splits.notes)


def test_each_split_may_order_its_classes_otherwise(tmp_path):
    parts = {"train": rows_of(range(20)), "test": rows_of(range(4), label=datasets.ClassLabel(names=NAMES[::-1]))}
    for name, feature in (("turned", parts["test"].features["label"]), ("plain", datasets.Value("int64"))):
        part = parts["test"].cast_column("label", feature)
        datasets.DatasetDict({**parts, "test": part}).save_to_disk(tmp_path / name)
    assert load(tmp_path / "turned").test.labels.tolist() == [1, 0, 1, 0]
    assert load(tmp_path / "plain").test.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("feature", "labels", "line"),
    [
        (datasets.Sequence(datasets.ClassLabel(names=NAMES)), [[0], [0, 1]] * 10, "holds lists in one split and one"),
        (datasets.Value("float32"), [0.5, 1.5] * 10, "a label must be a text or a whole number"),
        (datasets.Value("string"), ["ant", "wasp"] * 10, "class 'wasp' of test is none of the classes of train"),
        (datasets.Value("int64"), [0, 7] * 10, "label 7 is of none of the 2 classes"),
    ],
)
def test_labels_that_are_no_class_are_refused(tmp_path, feature, labels, line):
    other = datasets.Dataset.from_dict(
        {"image": [png(level) for level in range(20)], "label": labels},
        datasets.Features({"image": datasets.Image(), "label": feature}),
    )
    datasets.DatasetDict({"train": rows_of(range(20)), "test": other}).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=line):
        load(tmp_path / "set")


SEVERAL = [[], ["bee"], ["ant", "bee"], ["ant"]]


def of_several(levels, **columns):
    """A set of pictures of these gray levels, with the labels `SEVERAL` in turn, in columns of these types."""
    labels = [SEVERAL[level % 4] for level in levels]
    forms = {
        "list": labels,
        "text": [" | ".join(each) for each in labels],
        **{name: [name in each for each in labels] for name in NAMES},
    }
    content = {"image": [png(level) for level in levels]}
    content |= {name: forms[form] for name, (form, _) in columns.items()}
    features = {"image": datasets.Image()} | {name: kind for name, (_, kind) in columns.items()}
    return datasets.Dataset.from_dict(content, datasets.Features(features))


@pytest.mark.parametrize(
    ("columns", "table"),
    [
        ({"label": ("list", datasets.Sequence(datasets.ClassLabel(names=NAMES)))}, {}),
        ({"tags": ("list", datasets.Sequence(datasets.Value("string")))}, {"label": "tags"}),
        ({"label": ("text", datasets.Value("string"))}, {"separator": "|"}),
        ({"ant": ("ant", datasets.Value("bool")), "bee": ("bee", datasets.Value("float32"))}, {"columns": "others"}),
    ],
)
def test_an_image_may_have_several_classes_or_none(tmp_path, columns, table):
    parts = {"train": of_several(range(20), **columns), "test": of_several(range(20, 24), **columns)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    splits = load(tmp_path / "set", table=TableConfig(**table))
    assert splits.class_names == NAMES and splits.train.is_multi_label
    assert splits.test.labels.tolist() == [[0, 0], [0, 1], [1, 1], [1, 0]]
    levels = [splits.train.read(index)[0, 0, 0] for index in range(len(splits.train))]
    assert all(
        splits.train.labels[i].tolist() == splits.test.labels[level % 4].tolist() for i, level in enumerate(levels)
    )


@pytest.mark.parametrize(
    ("labels", "kind", "table", "line"),
    [
        ([[0, 1, 0]], datasets.Sequence(datasets.Value("int64")), {}, "row 0: column label repeats a number; a list"),
        ([[0, 1], [1, 0]] * 5, datasets.Sequence(datasets.Value("int64")), {}, "every training image has every class"),
        ([["ant"], None], datasets.Sequence(datasets.Value("string")), {}, "row 1 of train has no label"),
        ([[0, -1]], datasets.Sequence(datasets.ClassLabel(names=NAMES)), {}, "label -1 is of none of the 2 classes"),
        ([[]], datasets.Sequence(datasets.Value("string")), {}, "no picture has a label in column label"),
        ([7], datasets.Value("int64"), {"separator": "|"}, r"data\.table\.separator: column label .* and no texts"),
        ([7], datasets.Value("int64"), {"columns": "others"}, "row 0: column label holds '7'; a column per class must"),
        ([7], datasets.Value("int64"), {"columns": ["lable"]}, "has no column lable; did you mean 'label'"),
    ],
)  # fmt: skip
def test_several_classes_that_cannot_be_read_end_in_a_line(tmp_path, labels, kind, table, line):
    content = {"image": [png(level) for level in range(len(labels))], "label": labels}
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    datasets.Dataset.from_dict(content, features).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=line):
        load(tmp_path / "set", table=TableConfig(**table))


@pytest.mark.parametrize("make", [rows_of, lambda levels: of_several(levels, label=("text", datasets.Value("string")))])
def test_a_split_without_rows_is_ignored(tmp_path, make):
    none = make(range(4)).filter(lambda row: False, keep_in_memory=True)
    parts = {"train": make(range(20)), "validation": none, "test": make(range(4))}
    # with a number of shards given, datasets 4 need not estimate sizes, which fails without rows
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set", num_shards=dict.fromkeys(parts, 1))
    splits = load(tmp_path / "set")
    assert f"{tmp_path}/set: validation: ignored: it has no rows" in splits.notes
    assert (len(splits.train) + len(splits.val), len(splits.test)) == (20, 4)
    datasets.DatasetDict({"train": none}).save_to_disk(tmp_path / "none", num_shards={"train": 1})
    with pytest.raises(UserError, match="none of its splits train is train, val or test and has rows"):
        load(tmp_path / "none")


def test_columns_are_named_where_two_may_be_meant(tmp_path):
    rows_of(range(20), coarse=[0] * 10 + [1] * 10).remove_columns("label").add_column(
        "fine", [0, 1] * 10, feature=datasets.ClassLabel(names=NAMES)
    ).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=r"both coarse and fine may be the label; name one as data\.table\.label"):
        load(tmp_path / "set")
    splits = load(tmp_path / "set", table=TableConfig(label="fine"))
    assert splits.class_names == NAMES
    with pytest.raises(UserError, match=r"data\.table\.label=fin: .* has no such column; .*did you mean 'fine'"):
        load(tmp_path / "set", table=TableConfig(label="fin"))
    with pytest.raises(UserError, match=r"data\.table\.path=fine: .* holds no pictures"):
        load(tmp_path / "set", table=TableConfig(label="coarse", path="fine"))


def test_what_cannot_be_read_ends_in_a_line(tmp_path):
    with pytest.raises(UserError, match="no such folder, and no set of this name"):
        load(tmp_path / "lost")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither what save_to_disk writes nor Parquet files"):
        load(tmp_path / "empty")
    rows_of(range(20)).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"set: cannot be read by datasets \("):
        load(tmp_path / "set")
    shutil.rmtree(tmp_path / "set")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="no column holds pictures; it has text"):
        load(tmp_path / "set")
    with pytest.raises(ValueError, match="split=part: is for tables"):
        DataConfig("huggingface", "x", table=TableConfig(split="part"))
