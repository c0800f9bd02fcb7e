"""Tables of pictures: what a row means, which split it belongs to, and what is refused."""

import numpy as np
import pytest
from PIL import Image
from support.saved_runs import save_run

import vmoe
from vmoe.data import DataConfig, ImageDataModule
from vmoe.data.config import TableConfig
from vmoe.data.datasets import load_splits
from vmoe.errors import UserError
from vmoe.evaluation.evaluate import data_for


@pytest.fixture
def table(tmp_path):
    """Writes a CSV of rows PICTURE,CLASS,..., and pictures of their row's number."""

    def write(text, name="labels.csv", pictures=30):
        for number in range(pictures):
            (tmp_path / "pics").mkdir(exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / "pics" / f"{number}.png")
        path = tmp_path / name
        path.write_bytes(text.encode("utf-8-sig"))
        return path

    return write


def rows(ending=lambda number: "", count=30):
    return "".join(f"pics/{number}.png,{'cat' if number % 3 else 'dog'}{ending(number)}\n" for number in range(count))


def load(path, **options):
    return load_splits(DataConfig("table", str(path), image_size=8, **options))


def test_a_table_without_splits_is_cut_like_a_folder_without_splits(table):
    splits = load(table("path,label\n" + rows()))
    assert splits.class_names == ["cat", "dog"]
    assert (len(splits.train), len(splits.val), len(splits.test)) == (21, 3, 6)
    parts = (splits.train, splits.val, splits.test)
    assert {part.read(index)[0, 0, 0] for part in parts for index in range(len(part))} == set(range(30))
    assert np.bincount(splits.test.labels).tolist() == [4, 2]
    for index, label in enumerate(splits.train.labels):
        assert (splits.train.read(index)[0, 0, 0] % 3 == 0) == (label == 1)
    assert any("has no split of its own" in note for note in splits.notes)


def test_a_column_says_which_split_a_row_belongs_to(table):
    split_of = ("Train", "train", "validation", "test")
    lines = "".join(f"{split_of[number % 4]}\t{number % 4 + 8}\tpics/{number}.png\n" for number in range(24))
    of_training = "".join(f"train\t{label}\tpics/{24 + index}.png\n" for index, label in enumerate((10, 11)))
    splits = load(table("Split\tClass\tFile\n" + lines + of_training, "a.tsv"))
    assert splits.class_names == ["8", "9", "10", "11"]  # by their value, not "10" before "8"
    assert (len(splits.train), set(splits.val.labels), set(splits.test.labels)) == (14, {2}, {3})


def test_cells_may_be_separated_by_semicolons_and_hold_what_yaml_would_change(table):
    splits = load(table("path;label\r\n" + "".join(f"pics/{n}.png;{('010', 'yes')[n % 2]}\r\n" for n in range(20))))
    assert splits.class_names == ["010", "yes"]
    tabs = load(table("path\tlabel\n" + "".join(f"pics/{n}.png\t{n % 2}\n" for n in range(20))))
    assert tabs.class_names == ["0", "1"]
    quoted = load(table("path, label\n" + "".join(f'pics/{n}.png, "a, {n % 2}"\n' for n in range(20))))
    assert quoted.class_names == ["a, 0", "a, 1"]


def test_a_picture_counts_once_however_a_path_leads_to_it(table, tmp_path):
    path = table("path,label\npics/0.png,cat\npics/link.png,dog\n")
    (tmp_path / "pics" / "link.png").symlink_to("0.png")
    with pytest.raises(UserError, match="line 2 and line 3 are the same picture"):
        load(path)
    with pytest.raises(UserError, match=r"one column of .* cannot be two of path, label and split"):
        load(path, table=TableConfig(label="path"))


def test_columns_are_named_where_their_names_are_others(table):
    path = table("id,bild,art\n" + "".join(f"{n},pics/{n}.png,{'ab'[n % 2]}\n" for n in range(20)))
    data = ImageDataModule(path, image_size=8, table={"path": "bild", "label": "art"}, batch_size=4)
    assert data.class_names == ["a", "b"]
    assert next(iter(data.train_dataloader())).images.shape == (4, 3, 8, 8)


SEVERAL = ("cat|dog", "dog", "", " cat | dog ", "owl")


def test_a_cell_may_hold_several_labels_or_none(table):
    lines = "".join(f"pics/{number}.png,{SEVERAL[number % 5]}\n" for number in range(30))
    splits = load(table("path,label\n" + lines), table=TableConfig(separator="|"))
    assert splits.class_names == ["cat", "dog", "owl"]
    parts = [(part.read(index)[0, 0, 0] % 5, part.labels[index].tolist()) for part in vars(splits).values()
             if hasattr(part, "labels") for index in range(len(part))]  # fmt: skip
    assert len(parts) == 30
    expected = [[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert all(labels == expected[number] for number, labels in parts)
    assert splits.val.labels.any(1).sum() >= 2  # cut from training by the rarest label of each picture


def test_what_looks_like_several_labels_is_said(table):
    lines = "".join(f"pics/{number}.png,{SEVERAL[number % 2]}\n" for number in range(30))
    (line,) = [note for note in load(table("path,label\n" + lines)).notes if "one class here" in note]
    assert line.endswith("'cat|dog' is one class here; where a picture may have several, give data.table.separator='|'")
    with pytest.raises(UserError, match=r"the label is empty .* give data\.table\.separator where a picture may have"):
        load(table("path,label\npics/0.png,\n"))


def test_a_column_per_class_holds_0_or_1(table, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lines = "".join(f"pics/{number}.png,{number % 2},{int(number % 3 == 0)},train\n" for number in range(24))
    path = table("path,odd,third,split\n" + lines.replace("23.png,1,0,train", "23.png,1,0,test"))
    chosen = TableConfig(columns=["third", "odd"])
    splits = load(path, table=chosen, val_fraction=0.2)
    assert splits.class_names == ["third", "odd"] and splits.test.labels.tolist() == [[0, 1]]
    assert splits.train.is_multi_label and splits.train.class_counts(2)[0] == 6
    rows = [line.split(",") for line in path.read_text(encoding="utf-8-sig").splitlines()]
    columns = dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
    flags = {name: [cell == "1" for cell in columns[name]] for name in ("odd", "third")}
    other = {"path": columns["path"], "split": columns["split"]}
    parquet.write_table(pyarrow.table(other | flags), tmp_path / "a.parquet")
    again = load(tmp_path / "a.parquet", table=TableConfig(columns="others"), val_fraction=0.2)
    assert again.class_names == ["odd", "third"] and again.test.labels.tolist() == [[1, 0]]


@pytest.mark.parametrize(
    ("text", "columns", "line"),
    [
        ("path,label\n" + rows(), {"columns": "others"}, "line 2: column label holds 'dog'; a column per class must"),
        ("path,odd\n" + rows(), {"columns": ["od"]}, "has no column od; did you mean 'odd'"),
        ("path,odd\n" + rows(), {"columns": ["path"]}, "data.table.columns: path is the path or the split"),
        ("path,label\npics/0.png,\n", {"separator": "|"}, "no picture has a label"),
    ],
)
def test_what_is_wrong_with_several_labels_is_one_line(table, text, columns, line):
    with pytest.raises(UserError, match=line):
        load(table(text), table=TableConfig(**columns))


def test_a_parquet_table_is_read_by_its_columns(table, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table("")
    numbers = list(range(20))
    columns = {
        "image": [f"pics/{n}.png" for n in numbers],
        "label": [n % 2 for n in numbers],
        "more": [[n] for n in numbers],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    assert load(tmp_path / "t.parquet").class_names == ["0", "1"]
    floats = {"image": [f"pics/{n}.png" for n in numbers], "label": [float(n % 2) for n in numbers]}
    parquet.write_table(pyarrow.table(floats), tmp_path / "f.parquet")
    assert load(tmp_path / "f.parquet").class_names == ["0", "1"]
    floats["label"][3] = float("nan")
    parquet.write_table(pyarrow.table(floats), tmp_path / "f.parquet")
    with pytest.raises(UserError, match="row 4: the label is empty or no text"):
        load(tmp_path / "f.parquet")
    columns["image"] = [{"bytes": b"", "path": each} for each in columns["image"]]
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"column image holds struct.*; it must hold texts or numbers"):
        load(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("path,kind\na,b\n", r"labels.csv: no column is named label, class, class_name or so; it has path, kind"),
        ("path,file,label\n", r"labels.csv: both path and file may be the path; name one as data.table.path"),
        ("", r"labels.csv: no column is named path, file, filename or so; it has none; rename one"),
        ("path,label\n", "labels.csv: has no row below its header"),
        ("path,label\npics/0.png,cat,\n", "line 2 has 3 cells, but the header has 2"),
        ("path,label\npics/0.png,\npics/1.png,\n", "line 2, and 1 others: the label is empty or no text"),
        ("path,label\npics/0.png,cat\npics/x.png,dog\n", "line 3: there is no file .*pics/x.png; mend the path"),
        ("path,label\npics/0.png,cat\npics/0.png,dog\n", "line 2 and line 3 are the same picture, .*0.png; keep one"),
        ("path,label,split\npics/0.png,cat,fold1\n", "line 2: split 'fold1' is none of train, val and test"),
        ("path,label,split\npics/0.png,a,train\npics/1.png,b,test\n", "class 'b' of test has no training picture"),
        ("path,label,split\npics/0.png,a,test\n", "needs training images, rows of the split train"),
        ('path,label\n"pics/0.png,cat\n', "cannot be read as a table"),
        ("\n\npath,label\n\npics/0.png,\"a\nb\"\npics/x.png,dog\n", "line 7: there is no file .*pics/x.png"),
        ("path,label,label\npics/0.png,cat,dog\n", "has two columns named 'label'; rename one"),
        ("path,label\npics/0.png,cat\npics/../pics/0.png,dog\n", "line 2 and line 3 are the same picture"),
        ("path,label\n~nobody_here/0.png,cat\n", "line 2: there is no file .*~nobody_here/0.png; mend the path"),
        (f"path,label\n{'x' * 5000},cat\n", "line 2: there is no file .*xxx; mend the path"),
        ("path,label\npics/\0.png,cat\n", r"(cannot be read as a table|line 2: the path is empty or no text)"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_table_is_one_line(table, text, line):
    with pytest.raises(UserError, match=line) as refused:
        load(table(text))
    assert "\n" not in str(refused.value)


def test_a_table_that_is_not_there_and_a_column_that_is_not_in_it(table, tmp_path):
    path = table("path,label\npics/0.png,cat\n")
    with pytest.raises(UserError, match=r"for 'table' this must be the table itself; it is a folder that holds labels"):
        load(tmp_path)
    with pytest.raises(
        UserError, match=r"data.table.label=lable: .*labels.csv has no such column; it has path, label; did"
    ):
        load(path, table=TableConfig(label="lable"))


def test_a_model_of_a_table_is_measured_on_other_sets_too(tmp_path):
    columns = {"name": "table", "root": str(tmp_path / "labels.csv"), "table": {"path": "bild", "label": "art"}}
    model = vmoe.load(save_run(tmp_path / "run", data=columns))
    assert data_for(model).table == TableConfig("bild", "art")
    assert data_for(model, "digits").name == "digits"
