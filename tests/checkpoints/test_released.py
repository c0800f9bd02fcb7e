"""Released models by name, from a server on this machine that has recorded files in the released layout."""

import dataclasses
import errno
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support import file_server
from support.jax_writer import write_checkpoint

import vmoe
from vmoe.checkpoints import downloading
from vmoe.checkpoints import released as by_name
from vmoe.checkpoints.released import fetch_released
from vmoe.classes import find_outputs
from vmoe.cli.main import main
from vmoe.errors import UserError
from vmoe.files import writing
from vmoe.models import released
from vmoe.training.config import ModelConfig, TrainConfig
from vmoe.training.run.initial import initial_model

FIXTURES = Path(__file__).parents[1] / "fixtures"
SPARSE, ENSEMBLE = "vmoe_s32_last2.ilsvrc2012", "eee_s32_last2.ilsvrc2012_ft_cifar100"
SWIN = "swin_moe_small_e8.imagenet22k"
BACKBONE = {"patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0}
TINY = {  # what differs from the released models
    SPARSE: {
        "backbone": ("vmoe_vit", BACKBONE),
        "image_size": 32,
        "num_classes": 10,
        "moe": {"num_experts": 4, "top_k": 2, "group": 8, "expert_dropout": 0.2},
    },
    ENSEMBLE: {
        "image_size": 32,
        "num_classes": 10,
        "moe": {"num_experts": 8, "top_k": 1, "ensemble": 2, "group": 4},
    },
    SWIN: {"image_size": 64, "num_classes": 10, "moe": {"num_experts": 2, "top_k": 1}},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The publishers' files, by path."""
    found = {}
    recorded = FIXTURES / "vmoe_jax_token"
    for path in recorded.iterdir():
        found[path.name.replace("vmoe_tiny_token", released.RELEASED[SPARSE].file)] = path.read_bytes()
    folder = tmp_path_factory.mktemp("ensemble")
    arrays = np.load(FIXTURES / "vmoe_jax_e3_vit.npz")
    params = {name.removeprefix("params/"): arrays[name] for name in arrays.files if name.startswith("params/")}
    # Routers without an axis of members, which the publisher's config for fine-tuning says the first model has
    flat = {name: value.reshape(len(value), -1) if "Router" in name else value for name, value in params.items()}
    write_checkpoint(folder / released.RELEASED[ENSEMBLE].file, flat)
    found |= {path.name: path.read_bytes() for path in folder.iterdir()}
    found[f"{released.RELEASED[SWIN].file}.zip"] = zipped(FIXTURES / "swin_moe" / "tiny_linear_2expert_sliced_4rank")
    return found


def zipped(folder, prefix="../../escaped/"):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in folder.glob("*.pth.*"):
            archive.write(path, prefix + path.name)
        archive.writestr("README.md", b"is passed over")
        archive.writestr("__MACOSX/._tiny.pth.rank0", b"is passed over")
    return content.getvalue()


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    """The server, to which the table's addresses lead, and an empty cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(downloading, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(
        released.ReleasedModel, "class_names", lambda model: [f"class {i}" for i in range(model.num_classes)]
    )
    with file_server.serving(dict(files)) as server:
        for name, changes in TINY.items():
            model = released.RELEASED[name]
            address = server.address + model.address.rpartition("/")[2]
            monkeypatch.setitem(released.RELEASED, name, dataclasses.replace(model, address=address, **changes))
        yield server


def recorded(name):
    """Recorded arrays, and their images as a model takes them."""
    arrays = np.load(FIXTURES / name)
    return arrays, torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)


def file_of(name, suffix=""):
    return f"{released.RELEASED[name].file}{suffix}"


def kept(name):
    """What is in a model's folder of the cache, beside the lock."""
    return sorted(path.name for path in by_name.cache_folder(name).iterdir() if path.name != ".lock")


@torch.no_grad()
def test_a_model_by_name_gives_the_original_s_logits(server):
    arrays, images = recorded("vmoe_jax_vit.npz")
    expected = torch.from_numpy(arrays["token_nodrop/logits"])
    model = vmoe.load(SPARSE)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
    assert model.class_names[3] == "class 3" and model.mean == (0.5, 0.5, 0.5) and model.image_size == 32
    assert "in_chans" not in model.config["model"]["kwargs"]  # which the recipe of a student, or a run, refuses
    assert model.config["moe"]["expert_dropout"] == 0.2  # in the table only
    assert model.config["moe"]["capacity_factor"] == 1.05 and model.config["data"]["name"] == "imagenet"
    for create in (vmoe.create_model, timm.create_model):
        created = create(SPARSE, pretrained=True).eval()
        torch.testing.assert_close(created(images), expected, rtol=0, atol=1e-5)
    assert created.pretrained_cfg["tag"] == "ilsvrc2012" and created.num_classes == 10
    assert server.count(file_of(SPARSE, ".index")) == 1  # it was fetched and converted once
    vmoe.set_eval_capacity_factor(created, 1.05)  # as the publisher's config has it
    torch.testing.assert_close(created(images), torch.from_numpy(arrays["token_cf1.05/logits"]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_ensemble_by_name(server):
    arrays, images = recorded("vmoe_jax_e3_vit.npz")
    model = vmoe.load(ENSEMBLE)
    vmoe.set_eval_capacity_factor(model, 1.05)
    of_members = torch.from_numpy(arrays["logits"]).unflatten(0, (-1, 2))
    torch.testing.assert_close(model(images), of_members.softmax(-1).mean(1).log(), rtol=0, atol=1e-5)
    assert (
        model.crop == "squash" and model.config["moe"]["ensemble"] == 2 and model.config["data"]["name"] == "cifar100"
    )


@torch.no_grad()
def test_a_swin_moe_by_name(server, tmp_path):
    arrays = np.load(FIXTURES / "swin_moe" / "tiny_linear_2expert_sliced_4rank" / "expected.npz")
    model = vmoe.create_model(SWIN, pretrained=True).eval()
    for images, expected in zip(arrays["images_int8"], arrays["eval_nodrop/logits"], strict=True):
        torch.testing.assert_close(
            model(torch.from_numpy(images).float() / 32), torch.from_numpy(expected), rtol=0, atol=1e-5
        )
    assert kept(SWIN) == sorted([by_name.converted_file(SWIN).name, by_name.RECORD, file_of(SWIN, ".zip")])
    assert not list(tmp_path.rglob("escaped*"))


@torch.no_grad()
def test_timm_s_ways_with_a_pretrained_model(server):
    model = timm.create_model(SPARSE, pretrained=True, num_classes=3, img_size=64).eval()
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 3)
    assert torch.equal(model.blocks[1].mlp.experts.fc1.weight, vmoe.load(SPARSE).blocks[1].mlp.experts.fc1.weight)
    other = vmoe.MoeConfig(layers=[1, 3], num_experts=4, top_k=1)
    assert vmoe.create_model(SPARSE, other, pretrained=True).blocks[1].mlp.config.top_k == 1
    with pytest.raises(ValueError, match="its weights do not fit these arguments or this moe") as error:
        vmoe.create_model(SPARSE, vmoe.MoeConfig(layers=[1], num_experts=2), pretrained=True)
    assert "\n" not in str(error.value)


def test_a_pretrained_model_is_written_and_opened_again(server, tmp_path):
    model = vmoe.create_model(SPARSE, pretrained=True)
    vmoe.save(model, tmp_path / "mine.safetensors", [str(i) for i in range(10)])
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(vmoe.load(tmp_path / "mine.safetensors")(x), model.eval()(x))


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A working folder with two pictures, and a set of them."""
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(f"{i}.png")
        folder = tmp_path / "set" / "test" / f"class {i}"
        folder.mkdir(parents=True)
        Image.open(f"{i}.png").save(folder / "a.png")


def test_jobs_take_the_name(server, pictures, capsys):
    for job in (
        f"predict {SPARSE} 0.png --routing",
        f"evaluate {SPARSE} --data set --capacity-factor 1.05",
        f"export {SPARSE} --out s32.safetensors",
    ):
        assert main(job.split()) == 0, capsys.readouterr().err
    assert "0.png: class " in capsys.readouterr().out and Path("s32.safetensors").is_file()
    assert json.loads(Path("evaluation.json").read_text())["results"][0]["images"] == 2
    assert server.count(file_of(SPARSE, ".index")) == 1


@pytest.mark.slow  # it opens the model as the jobs above do, and the figures take its time
def test_from_a_name_to_a_heatmap(server, pictures):
    assert main(f"heatmap {SPARSE} 0.png 1.png --out maps".split()) == 0
    assert Path("maps/index.html").is_file()


@pytest.mark.parametrize("init_from", ["pretrained", pytest.param(SPARSE, marks=pytest.mark.slow)])
def test_a_run_starts_from_a_released_model(server, init_from):
    source = vmoe.load(SPARSE)
    moe = vmoe.MoeConfig(layers=[1, 3], num_experts=4)
    config = TrainConfig(model=ModelConfig(SPARSE), moe=moe, init_from=init_from)
    model = initial_model(config, ["class 3", "class 0"], 64)
    assert torch.equal(model.blocks[1].mlp.experts.fc1.weight, source.blocks[1].mlp.experts.fc1.weight)
    assert torch.equal(model.head.weight, source.head.weight[[3, 0]])  # by the names of its classes


def test_a_broken_download_goes_on_at_the_next_call(server, monkeypatch):
    monkeypatch.setattr(downloading, "WAITS", ())
    data = file_of(SPARSE, ".data-00000-of-00004")
    server.breaks_after = [10**9, 100_000]  # of the index, and of the first data file
    with pytest.raises(ValueError, match=f"{SPARSE}: .*data-00000-of-00004: cannot be downloaded .*it broke off after"):
        fetch_released(SPARSE)
    server.asked.clear()
    fetch_released(SPARSE)
    assert server.asked[0] == (data, "bytes=100000-") and server.count(file_of(SPARSE, ".index")) == 0


def cut(content):
    return content[: len(content) // 2]


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("name", "suffix", "spoil", "line"),
    [
        (SPARSE, ".index", cut, "cut off or not msgpack"),
        (SPARSE, ".data-00001-of-00004", cut, "cut off"),
        (SPARSE, ".data-00001-of-00004", lambda _: b"{}", "not a data file|cut off"),
        (SWIN, ".zip", cut, r"no \.zip, or damaged"),
        pytest.param(SWIN, ".zip", flipped, "damaged", marks=pytest.mark.slow),
        (SWIN, ".zip", lambda _: zipped(FIXTURES / "swin_moe" / "tiny_dense"), "num_experts is 0"),
    ],
)
def test_damaged_cut_and_wrong_files_are_one_line_and_fetched_again(server, name, suffix, spoil, line):
    good = server.files[file_of(name, suffix)]
    server.files[file_of(name, suffix)] = spoil(good)
    with pytest.raises(ValueError, match=f"{name}: what came from .* is not this model .*({line})") as error:
        fetch_released(name)
    told = str(error.value)
    assert "\n" not in told and told.endswith("run this again to fetch them again") and kept(name) == [by_name.RECORD]
    assert str(by_name.cache_folder(name)) not in told
    server.files[file_of(name, suffix)] = good
    fetch_released(name)


def test_files_that_come_twice_the_same_are_not_downloaded_again_and_again(server):
    server.files[file_of(SWIN, ".zip")] = zipped(FIXTURES / "swin_moe" / "tiny_dense")
    for line in ("its files are removed", "twice the same; please report this line", "twice the same"):
        with pytest.raises(UserError, match=f"num_experts is 0, .*{line}"):
            fetch_released(SWIN)
    assert len(server.asked) == 2 and kept(SWIN) == sorted([by_name.RECORD, file_of(SWIN, ".zip")])


def test_a_full_disk_costs_no_download(server, monkeypatch):
    def unzip(path, folder):
        with writing(folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_name, "_unzip", unzip)
        with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\)"):
            fetch_released(SWIN)
    assert kept(SWIN) == [file_of(SWIN, ".zip")]
    fetch_released(SWIN)
    assert len(server.asked) == 1


def test_a_file_that_is_not_that_of_the_first_download(server):
    fetch_released(SPARSE)
    folder = by_name.cache_folder(SPARSE)
    record = json.loads((folder / by_name.RECORD).read_text())
    assert len(record["files"]) == 5 and len(record["files"][file_of(SPARSE, ".index")]["sha256"]) == 64
    converted = by_name.converted_file(SPARSE)
    converted.write_bytes(converted.read_bytes()[:1000])  # damaged: it is made again of the files that are here
    server.asked.clear()
    fetch_released(SPARSE)
    assert server.asked == []
    converted.unlink()
    (folder / file_of(SPARSE, ".index")).unlink()
    server.files[file_of(SPARSE, ".index")] += b" "
    with pytest.raises(ValueError, match=r"is not what it was: its SHA-256 is .*, and that of the first download is"):
        fetch_released(SPARSE)


def test_without_a_network_and_offline(server, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["predict", SPARSE, "0.png"]) == 2
    line = capsys.readouterr().err
    assert f"{SPARSE}: HF_HUB_OFFLINE forbids to fetch it, and it is not here yet" in line and not server.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetch_released(SPARSE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert vmoe.load(SPARSE).num_classes == 10  # is here now


def test_the_table():
    of_each_kind = {model.names: model for model in released.RELEASED.values()}
    classes = {kind: model.class_names() for kind, model in of_each_kind.items()}
    for name, model in released.RELEASED.items():
        assert model.address.startswith("https://") and model.source.startswith("https://")
        assert len(classes[model.names]) == len(set(classes[model.names])) == model.num_classes, name
    names = classes["imagenet-1k"]
    assert names[0] == "tench, Tinca tinca (n01440764)" and find_outputs(names, ["n02012849", "n01440764"]) == [134, 0]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(SPARSE, marks=pytest.mark.slow),
        ENSEMBLE,
        pytest.param("swin_moe_small_e32_cosine.imagenet22k", marks=pytest.mark.slow),
    ],
)
def test_the_architecture_of_a_released_model_without_its_weights(name):
    model, created = released.RELEASED[name], vmoe.create_model(name, device="meta")
    layers = [layer.config for _, layer in vmoe.moe_layers(created)]
    assert [(each.num_experts, each.ensemble) for each in layers] == [(model.moe["num_experts"], model.members)] * len(
        model.moe["layers"]
    )
    assert created.num_classes == model.num_classes
    assert not list(vmoe.moe_layers(vmoe.create_model(name.partition(".")[0], False, device="meta")))


def test_an_unknown_tag_and_the_moe_layers_of_an_architecture():
    with pytest.raises(RuntimeError, match=r"Invalid pretrained tag \(wrong\) for vmoe_s32_last2; .*ilsvrc2012_ft384"):
        vmoe.create_model("vmoe_s32_last2.wrong")
    for moe in (vmoe.MoeConfig(layers=[1], num_experts=3), {"layers": [1], "num_experts": 3}):
        created = timm.create_model("vmoe_s32_last2", moe=moe, device="meta")
        assert [layer.config.num_experts for _, layer in vmoe.moe_layers(created)] == [3]
