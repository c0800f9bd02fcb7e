"""Names and addresses that stand for a model: of the hub, of a server, and of paths that only look like them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from support import file_server, local_hub

import vmoe
from vmoe.checkpoints import downloading
from vmoe.checkpoints.source import is_remote, local_path
from vmoe.cli.main import main
from vmoe.errors import UserError

SHIPPED = Path(__file__).parents[2] / "assets" / "models" / "cifar100_tiny_dense.safetensors"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder and caches, with a picture."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(downloading, "WAITS", ())
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save("photo.png")
    return folder


@pytest.fixture
def hub(here, tmp_path, monkeypatch):
    """A hub with the one model me/model."""
    files = {"me/model/model.safetensors": SHIPPED.read_bytes()}
    with local_hub.serving(files, tmp_path / "cache", monkeypatch):
        yield files


@torch.no_grad()
@pytest.mark.parametrize("name", ["me/model", "me/model@main", f"me/model@{'0' * 40}", "hf-hub:me/model"])
def test_a_name_of_the_hub_opens_and_its_cache_does_without_the_hub(hub, monkeypatch, name):
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(vmoe.load(name)(x), vmoe.load(SHIPPED)(x))
    hub.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(vmoe.load(name)(x), vmoe.load(SHIPPED)(x))


def test_jobs_take_a_name_of_the_hub(hub, here, capsys):
    assert main(["predict", "me/model", "photo.png"]) == 0 and "photo.png: " in capsys.readouterr().out
    assert main(["export", "me/model", "--out", "mine.safetensors"]) == 0 and (here / "mine.safetensors").is_file()
    assert main(["predict", "me/other", "photo.png"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "me/other: no such file or folder here; from the hub: its model.safetensors cannot" in line


def test_offline_a_model_that_is_not_here_is_one_line(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("me/model", "hf-hub:me/model", "https://nowhere.invalid/x.safetensors"):
        with pytest.raises(UserError) as error:
            vmoe.load(name)
        assert "\n" not in str(error.value) and "HF_HUB_OFFLINE" in str(error.value)


def test_paths_come_first_and_a_mistyped_one_asks_nobody(here):
    (here / "runs" / "mine").mkdir(parents=True)
    assert local_path("runs/mine") == Path("runs/mine") and not is_remote("runs/mine")
    for mistyped in ("runs/mime", "lost.ckpt", "me/lost.safetensors", "/nowhere/mine", "a/b/c"):
        assert local_path(mistyped) == Path(mistyped) and not is_remote(mistyped)
        with pytest.raises(UserError, match="no such file"):
            vmoe.load(mistyped)
    (here / "me").mkdir()
    assert not is_remote("me/model")


@torch.no_grad()
def test_an_address_of_safetensors(here, capsys):
    with file_server.serving(
        {"a%20b/mine.safetensors": SHIPPED.read_bytes(), "x.safetensors": b"no tensors"}
    ) as server:
        address = f"{server.address}a%20b/mine.safetensors"
        x = torch.rand(1, 3, 32, 32)
        assert torch.equal(vmoe.load(address)(x), vmoe.load(SHIPPED)(x))
        assert main(["predict", address, "photo.png"]) == 0 and len(server.asked) == 1  # it is kept
        capsys.readouterr()
        for wrong, reason in (
            (f"{server.address}lost.safetensors", "there is no such file"),
            (f"{server.address}x.safetensors", "x.safetensors: no safetensors file came, or a damaged one"),
            ("https://[::1/x.safetensors", "is no address"),
            ("https://./x.safetensors", "cannot be downloaded"),
            ("https://host:port/x.safetensors", "nonnumeric port"),
            (
                f"{server.address}mine.ckpt",
                "must end in .safetensors, the one kind of file",
            ),
        ):
            assert main(["predict", wrong, "photo.png"]) == 2
            line = capsys.readouterr().err
            assert reason in line and line.count("\n") == 1
        server.files["x.safetensors"] = SHIPPED.read_bytes()  # what was damaged is not kept
        assert torch.equal(vmoe.load(f"{server.address}x.safetensors")(x), vmoe.load(SHIPPED)(x))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("my mod\u00e8le.safetensors", "my%20mod%C3%A8le.safetensors"),
        ("mine.safetensors?download=true#x", "mine.safetensors?download=true"),
    ],
)
def test_an_address_as_a_browser_shows_it(here, name, path):
    with file_server.serving({path: SHIPPED.read_bytes()}) as server:
        assert local_path(server.address + name).is_file()


def test_a_cache_that_cannot_be_written_names_its_variable(here, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(here / "photo.png"))
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\).*TORCH_HOME"):
        vmoe.load("https://nowhere.invalid/x.safetensors")
