"""Where images and labels come from, and which split is what."""

import hashlib
import pickle
import shutil

import numpy as np
import pytest
import torchvision

from vmoe.data import DataConfig, SubsetConfig
from vmoe.data.datasets import load_splits
from vmoe.data.samples import load_digits
from vmoe.errors import UserError


def load(name="digits", root="data", **options):
    return load_splits(DataConfig(name=name, root=str(root), **options))


def places(part):
    return [part.place(index) for index in range(len(part))]


def test_digits_splits_are_disjoint_stratified_and_complete():
    splits = load()
    parts = [splits.train, splits.val, splits.test]
    assert len(set().union(*map(places, parts))) == sum(map(len, parts)) == 1797
    sizes = np.bincount(load_digits()[1])
    assert np.bincount(splits.test.labels).tolist() == [int(0.2 * size + 0.5) for size in sizes]
    images = [splits.train.read(index) for index in range(20)]
    assert all(image.shape == (8, 8, 3) and image.dtype == np.uint8 for image in images)
    assert max(image.max() for image in images) == 255


def test_digits_are_those_that_results_were_recorded_with():
    images, labels = load_digits()
    content = hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    assert content == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"  # of scikit-learn's
    test = load().test
    pixels = b"".join(test.read(index).tobytes() for index in range(len(test)))
    assert hashlib.sha256(pixels + test.labels.tobytes()).hexdigest()[:16] == "a4564cc608774eef"


def test_split_seed_moves_the_validation_but_never_the_test_images():
    one, other = load(split_seed=0), load(split_seed=1)
    assert places(one.test) == places(other.test)
    assert places(one.val) != places(other.val)
    assert places(one.val) == places(load(split_seed=0).val)


def test_the_training_fraction_leaves_validation_and_test_alone():
    whole, part = load(), load(subset=SubsetConfig(fraction=0.1))
    assert places(part.val) == places(whole.val) and places(part.test) == places(whole.test)
    assert 120 < len(part.train) < 140 and set(places(part.train)) < set(places(whole.train))


def test_classes_are_kept_in_every_split_and_renumbered(image_tree):
    splits = load("folder", image_tree(("train", "val", "test")), subset=SubsetConfig(classes=["cow", 0]))
    assert splits.class_names == ["cow", "ant"]
    for part in (splits.train, splits.val, splits.test):
        assert len(part) == 12
        for index in range(12):
            assert f"/{splits.class_names[part.labels[index]]}/" in part.place(index)


@pytest.mark.parametrize(
    ("name", "folders", "val", "test"),
    [
        ("folder", ("train", "val"), "val", "val"),
        ("folder", ("Train", "validation"), "validation", "validation"),
        ("folder", ("training", "valid", "TEST"), "valid", "TEST"),
        ("folder", ("train", "test"), "train", "test"),
        ("folder", ("train", "val", "test"), "val", "test"),
        ("imagenet", ("train", "val"), "train", "val"),
        ("imagenet", ("train", "val", "test"), "val", "test"),
    ],
)
def test_folders_become_splits(image_tree, name, folders, val, test):
    splits = load(name, image_tree(folders), val_fraction=0.5)
    assert splits.class_names == ["ant", "bee", "cow"]
    assert all(f"/{test}/" in place for place in places(splits.test))
    assert all(f"/{val}/" in place for place in places(splits.val))
    cut = val == "train"
    assert (len(splits.train), len(splits.val), len(splits.test)) == ((9, 9, 18) if cut else (18, 18, 18))
    assert not set(places(splits.train)) & set(places(splits.val))
    is_said = any("val is tested too, which makes the result a little too good" in note for note in splits.notes)
    assert is_said == (val == test)


@pytest.mark.parametrize("inside", [".", "train"])
def test_classes_without_a_split_are_split(image_tree, inside):
    root = image_tree(("train",), count=20) / ("." if inside == "train" else "train")
    if inside == "train":  # Kaggle's way: pictures without labels, which cannot be tested on
        (root / "test").mkdir()
        (root / "train" / "ant" / "0.png").rename(root / "test" / "0.png")
    splits = load("folder", root, val_fraction=0.25, split_seed=3)
    parts = [splits.train, splits.val, splits.test]
    assert [np.bincount(part.labels).tolist() for part in parts] == [
        [12 - (inside == "train"), 12, 12],
        [4] * 3,
        [4] * 3,
    ]
    assert len(set().union(*map(places, parts))) == sum(map(len, parts)) == 60 - (inside == "train")
    assert places(load("folder", root, val_fraction=0.25, split_seed=3).test) == places(splits.test)
    assert places(load("folder", root, val_fraction=0.25, split_seed=4).test) != places(splits.test)
    line = f"{root}: has no split of its own: 20% of each class are cut off for the test, 25% of what remains"
    assert any(note.startswith(line) for note in splits.notes)


def test_what_is_neither_splits_nor_classes_is_refused(image_tree):
    root = image_tree()
    for place, line in {root.parent: rf"the splits are in its folder tree; give data\.root={root}"}.items():
        with pytest.raises(UserError, match=line):
            load("folder", place)
    with pytest.raises(UserError, match="has ant alone; give the right folder"):
        for name in ("bee", "cow"):
            shutil.rmtree(root / "train" / name)
        load("folder", root / "train")
    (root / "val").rename(root / "vall")
    with pytest.raises(UserError, match="it has train and vall, which is no split's name"):
        load("folder", root)
    (root / "vall").rename(root / "val")
    (root / "valid" / "ant").mkdir(parents=True)
    with pytest.raises(UserError, match="has val and valid for one split"):
        load("folder", root)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_split_without_class_folders_is_refused(image_tree, name):
    root = image_tree(("train", "val"))
    for picture in list((root / "val").rglob("*.png")):
        picture.rename(root / "val" / f"{picture.parent.name}_{picture.name}")
    for folder in ("ant", "bee", "cow"):
        (root / "val" / folder).rmdir()
    with pytest.raises(UserError, match="val holds pictures without class folders; put each class's pictures in"):
        load(name, root)
    (root / "val").rename(root / "test")  # which nobody has labelled
    assert f"{root / 'test'}: ignored: it has no class folders" in load(name, root).notes
    for empty in ("val", "test"):
        shutil.rmtree(root / "test")
        (root / empty).mkdir()
        with pytest.raises(UserError, match=f"{empty} holds no class folders; fill it, or remove it"):
            load(name, root)
        (root / empty).rename(root / "test")


def test_what_is_beside_the_splits_is_ignored_for_its_name(image_tree):
    root = image_tree(("train", "val", "other"))
    assert f"{root / 'other'}: ignored: its name is no split's" in load("folder", root).notes


@pytest.mark.parametrize("name", ["train", "test"])
def test_a_class_with_folders_and_the_name_of_a_split_is_refused(image_tree, name):
    root = image_tree(("x",), classes=("car", name)) / "x"
    (root / name / "deeper").mkdir()
    for picture in list((root / name).glob("*.png")):
        picture.rename(root / name / "deeper" / picture.name)
    with pytest.raises(
        UserError, match=r"rename (train if it is a class|folders of classes that have a split.s name)$"
    ):
        load("folder", root)


def test_a_class_may_be_called_train(image_tree):
    root = image_tree(("x",), classes=("car", "train")) / "x"
    assert load("folder", root).class_names == ["car", "train"]


def test_no_fraction_for_validation_leaves_all_images_to_training(image_tree):
    splits = load(val_fraction=0)
    assert splits.val is None and places(splits.test) == places(load().test)
    assert set(places(splits.train)) == {*places(load().train), *places(load().val)}
    assert len(load("folder", image_tree(("train", "val", "test")), val_fraction=0).val) == 18  # the folder's own


def test_a_class_without_test_images_keeps_its_number(image_tree):
    root = image_tree()
    for file in (root / "val" / "bee").iterdir():
        file.unlink()
    (root / "val" / "bee").rmdir()
    assert np.bincount(load("folder", root).test.labels, minlength=3).tolist() == [6, 0, 6]


def test_missing_and_wrong_folders_in_one_line(image_tree, tmp_path):
    root = image_tree(("val",))
    messages = {}
    for name, path in (("no train", root), ("nowhere", tmp_path / "nowhere")):
        with pytest.raises(UserError) as caught:
            load("folder", path)
        messages[name] = str(caught.value)
    assert "train/CLASS/IMAGE" in messages["no train"] and "has only those of other splits" in messages["no train"]
    assert f"data.root={tmp_path / 'nowhere'}" in messages["nowhere"] and "does not exist" in messages["nowhere"]
    shutil.copytree(root / "val", root / "train")
    (root / "val" / "dog").mkdir(parents=True)
    with pytest.raises(UserError, match="class folder 'dog' is not in"):
        load("folder", root)
    (root / "train" / "empty").mkdir()
    with pytest.raises(UserError, match="class folder 'empty' holds no picture"):
        load("folder", root)


def test_npz_of_colour_and_gray_arrays(npz, rng):
    colour = load("npz", npz(), val_fraction=0.2)
    assert (len(colour.train), len(colour.val), len(colour.test)) == (48, 12, 15)
    assert colour.class_names == ["0", "1", "2"] and colour.image_size == 8
    for shape in ((60, 8, 8), (60, 8, 8, 1)):
        gray = rng.integers(0, 256, shape, dtype=np.uint8)
        splits = load("npz", npz(train_x=gray, class_names=["a", "b", "c"]))
        first = gray.reshape(60, 8, 8)[splits.train.positions[0]]
        assert np.array_equal(splits.train.read(0), np.stack([first] * 3, axis=2))
        assert splits.class_names == ["a", "b", "c"]


def test_npz_with_a_validation_split(npz):
    splits = load("npz", npz(val_x=np.zeros((6, 8, 8, 3), dtype=np.uint8), val_y=np.arange(6) % 3))
    assert len(splits.train) == 60 and len(splits.val) == 6


def test_npz_without_test_images_is_split_as_a_folder_is(npz):
    without = {"test_x": None, "test_y": None}
    splits = load("npz", npz(**without))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (42, 6, 12)
    assert splits.image_size == 8 and "has no split of its own: 20% of each class are cut off" in splits.notes[0]
    images = np.zeros((6, 8, 8, 3), dtype=np.uint8)
    splits = load("npz", npz(**without, val_x=images, val_y=np.arange(6) % 3))
    assert splits.test is splits.val and len(splits.train) == 60


def test_labels_from_1_and_with_gaps_are_said(npz):
    notes = load("npz", npz(train_y=np.arange(60) % 3 + 1, test_y=np.arange(15) % 3 + 1)).notes
    assert any(
        "no training image has class 0: labels begin at 1, and classes are numbered from 0" in note for note in notes
    )
    with pytest.raises(UserError, match="class_names has 3 names, but labels go up to 3; number the labels from 0"):
        load("npz", npz(train_y=np.arange(60) % 3 + 1, test_y=np.arange(15) % 3 + 1, class_names=["a", "b", "c"]))
    notes = load("npz", npz(train_y=np.arange(60) % 3 * 2)).notes
    assert any("no training image has class 1, 3; number labels from 0" in note for note in notes)
    assert not any("no training image" in note for note in load("npz", npz()).notes)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_x": None}, "has no array 'train_x'"),
        ({"test_y": None}, "has no array 'test_y'"),
        ({"test_x": None}, "has no array 'test_x'"),
        ({"test_x": None, "test_y": None, "tset_x": np.zeros(3)}, "has no array 'test_x'"),
        ({"train_x": np.zeros((60, 8), np.uint8)}, r"train_x has shape \(60, 8\); it must be"),
        ({"train_x": np.zeros((60, 3, 8, 8), np.uint8)}, r"train_x has shape \(60, 3, 8, 8\)"),
        ({"train_x": np.zeros((0, 8, 8, 3), np.uint8)}, "train_x has shape"),
        ({"train_x": np.zeros((60, 8, 8, 3), np.float32)}, "train_x is float32; it must be uint8"),
        ({"train_y": np.zeros(59, int)}, r"train_y is of shape \(59,\); it must hold one label for each of the 60"),
        ({"train_y": np.zeros((60, 1), int)}, "train_y is of shape"),
        ({"train_y": np.zeros((60, 3), int)}, r"labels' shapes differ in classes: train_y \(60, 3\), test_y \(15,\)"),
        ({"train_y": np.full((60, 3), 2)}, r"train_y is of shape \(60, 3\) and holds 2; a column per class"),
        ({"train_y": np.zeros(60)}, "train_y holds float64 from 0.0; it must hold integers from 0"),
        ({"train_y": np.full(60, -1)}, "train_y holds int64 from -1"),
        ({"train_y": np.full(60, 10**9)}, "labels go up to 1000000000, but there are 60 training images"),
        ({"class_names": np.array(["a"])}, "class_names has 1 names, but labels go up to 2"),
        ({"val_x": np.zeros((6, 8, 8, 3), np.uint8)}, "has no array 'val_y'"),
        ({"class_names": np.array([{}], dtype=object)}, "cannot be read as an .npz file"),
    ],
)
def test_malformed_npz(npz, arrays, message):
    with pytest.raises(UserError, match=message):
        load("npz", npz(**arrays))


def test_npz_that_is_none(tmp_path, npz):
    path = npz()
    with pytest.raises(UserError, match=r"must be the \.npz file itself; it is a folder that holds set\.npz"):
        load("npz", tmp_path)
    with pytest.raises(UserError, match="there is no such file"):
        load("npz", tmp_path / "other.npz")
    content = path.read_bytes()
    for damaged in (b"text", content[: len(content) // 2], content[:3000] + b"\xff" * 40 + content[3040:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"set\.npz"):
            load("npz", path)


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """CIFAR-10 in its own format, of 20 images a file, with checksums to match."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [name for name, _ in torchvision.datasets.CIFAR10.train_list + torchvision.datasets.CIFAR10.test_list]
    for name in names:
        batch = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"thing {i}" for i in range(10)]}))

    def checksums(pairs):
        return [[name, torchvision.datasets.utils.calculate_md5(folder / name)] for name, *_ in pairs]

    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", checksums(kind.train_list))
    monkeypatch.setattr(kind, "test_list", checksums(kind.test_list))
    meta = {**kind.meta, "md5": torchvision.datasets.utils.calculate_md5(folder / "batches.meta")}
    monkeypatch.setattr(kind, "meta", meta)
    return tmp_path


def no_network(*_, **__):
    raise OSError("no route to host")


def test_cifar_is_read_by_torchvision(small_cifar):
    splits = load("cifar10", small_cifar)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (90, 10, 20)
    assert splits.class_names[3] == "thing 3" and splits.train.read(0).flags.c_contiguous


def test_a_wrong_checksum_is_not_accepted(small_cifar, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    file = small_cifar / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes() + b".")
    with pytest.raises(UserError, match=r"cifar10 .*right checksums.*download failed \(no route to host\)"):
        load("cifar10", small_cifar)


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    for module in (torchvision.datasets.cifar, torchvision.datasets.imagenette):
        monkeypatch.setattr(module, "download_and_extract_archive", no_network)
    for name in ("cifar10", "cifar100", "imagenette"):
        with pytest.raises(UserError) as caught:
            load(name, tmp_path)
        line = str(caught.value)
        assert line.startswith(f"data.root={tmp_path}: {name}") and "no route to host" in line and "\n" not in line


def test_imagenette_by_size_and_its_completeness(image_tree, monkeypatch):
    tree = image_tree(classes=("n01440764", "n02102040"), count=3)
    for path in list(tree.rglob("*.png")):
        path.rename(path.with_suffix(".JPEG"))
    tree.rename(tree.parent / "imagenette2-160")
    with pytest.raises(UserError, match=r"imagenette2-160 is incomplete, 6 \+ 6 images of 9469 \+ 3925"):
        load("imagenette", tree.parent, image_size=64)
    monkeypatch.setattr("vmoe.data.datasets._IMAGENETTE_IMAGES", (6, 6))
    splits = load("imagenette", tree.parent, image_size=64)
    assert splits.class_names == ["tench", "English springer"]
    assert all("/val/" in place for place in places(splits.test))
