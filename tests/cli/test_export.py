"""`vmoe export`."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import ModelCard

import vmoe
from vmoe.checkpoints import load_checkpoint
from vmoe.cli.evaluate import main as evaluate
from vmoe.cli.export import main
from vmoe.export import programs
from vmoe.export.card import model_card

SHIPPED = Path(__file__).parents[2] / "assets" / "models" / "cifar100_tiny.safetensors"
MOE = {"num_experts": 3, "top_k": 2, "layers": [1]}


def test_a_shared_file_is_evaluated_as_its_checkpoint(save_run, tmp_path, capsys):
    run = save_run(moe={"num_experts": 2, "top_k": 1, "layers": [1]})
    shared = tmp_path / "shared.safetensors"
    assert main([str(run), "--out", str(shared)]) == 0
    assert "shared.safetensors: " in capsys.readouterr().out
    for source, out in ((run, "a.json"), (shared, "b.json")):
        assert evaluate([str(source), "--json", str(tmp_path / out)]) == 0
    found, expected = (json.loads((tmp_path / name).read_text()) for name in ("b.json", "a.json"))
    assert found["results"][0]["top1"] == expected["results"][0]["top1"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "--out", "x.safetensors"], "nowhere: no such file"),
        (["nowhere", "--out", "x.bin"], "--out x.bin: must end in .safetensors"),
        (["nowhere", "--out", "x.safetensors", "--dtype", "int8"], "--dtype"),
        (["nowhere", "--out", "x.onnx", "--format", "tflite"], "--format"),
        (["nowhere", "--out", "x.bin", "--format", "onnx"], "--out x.bin: must end in .onnx"),
        (["nowhere", "--out", "x.onnx", "--format", "onnx", "--dtype", "float16"], "--dtype float16"),
        (["nowhere", "--out", "x.pt2", "--format", "torch-export"], "nowhere: no such file"),
        (["nowhere", "--out", "x.pt2", "--format", "aoti", "--push", "me/it"], "--push me/it"),
        (["nowhere", "--out", "x", "--format", "hub", "--quantize", "int8"], "--quantize int8"),
        (["nowhere", "--out", "x.safetensors", "--experts", "dense"], "--experts dense: goes with a program"),
    ],
)
def test_mistakes_are_one_line(arguments, told, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@torch.no_grad()
@pytest.mark.parametrize("quantize", [[], pytest.param(["--quantize", "int8"], marks=pytest.mark.slow)])
def test_a_program_of_torch_export(save_run, tmp_path, quantize):
    run, out = save_run(moe=MOE), tmp_path / "out" / "model.pt2"
    assert main([str(run), "--format", "torch-export", "--out", str(out), *quantize]) == 0
    assert {file.name for file in out.parent.iterdir()} == {"model.pt2", "export.json"}
    extra = {"vmoe": ""}
    program = torch.export.load(out, extra_files=extra).module()
    told = json.loads(extra["vmoe"])
    assert told["class_names"] == list("0123456789") and told["image_size"] == 16 and told["mean"] == [0.3] * 3
    images = torch.randn(7, 3, 16, 16)
    expected = load_checkpoint(run).model(images)
    error = (program(images) - expected).norm() / expected.norm()
    assert error <= (1e-2 if quantize else 1e-5)
    report = json.loads((out.parent / "export.json").read_text())["model.pt2"]
    assert report["parity"]["by_batch"].keys() == {"1", "3", "8", "33"}
    assert report["bytes"] == {"model.pt2": out.stat().st_size}


@torch.no_grad()
def test_a_program_with_dense_experts(save_run, tmp_path, capsys):
    run, out = save_run(moe=MOE), tmp_path / "model.pt2"
    assert main([str(run), "--format", "torch-export", "--experts", "dense", "--out", str(out)]) == 0
    assert "1.5 times the FLOPs of those chosen" in capsys.readouterr().out
    report = json.loads((tmp_path / "export.json").read_text())["model.pt2"]
    assert report["experts"] == {"computed": "dense", "times_the_flops_of_those_chosen": 1.5}
    assert main([str(save_run("twin")), "--format", "torch-export", "--experts", "dense", "--out", str(out)]) == 2
    assert "a dense model has no experts; leave the option out" in capsys.readouterr().err


@pytest.mark.slow
@torch.no_grad()
def test_onnx_with_its_weights_beside_it(save_run, tmp_path, monkeypatch):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(programs, "LARGEST_PROTOBUF", 1000)
    run, out = save_run(moe=MOE), tmp_path / "out" / "model.onnx"
    assert main([str(run), "--format", "onnx", "--out", str(out)]) == 0
    assert {file.name for file in out.parent.iterdir()} == {"model.onnx", "model.onnx.data", "export.json"}
    report = json.loads((out.parent / "export.json").read_text())["model.onnx"]
    assert report["opset"] == 20 and report["versions"]["onnxruntime"] == runtime.__version__
    assert max(report["parity"]["by_batch"].values()) <= 1e-4
    assert {node.domain for node in onnx.load(out).graph.node} == {""}
    images = torch.randn(4, 3, 16, 16)
    (logits,) = runtime.InferenceSession(out).run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), load_checkpoint(run).model(images), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_compiled_package(save_run, tmp_path):
    out = tmp_path / "model.pt2"
    assert main([str(save_run(moe=MOE)), "--format", "aoti", "--out", str(out)]) == 0
    assert torch._inductor.aoti_load_package(str(out))(torch.randn(5, 3, 16, 16)).shape == (5, 10)


@torch.no_grad()
def test_the_shipped_model_in_int8(tmp_path):
    """At most 0.45 of the float32 file, logits within 1e-2."""
    for name, more in (("float.safetensors", []), ("int8.safetensors", ["--quantize", "int8", "--dtype", "float16"])):
        assert main([str(SHIPPED), "--out", str(tmp_path / name), *more]) == 0
    whole, rounded = (tmp_path / name for name in ("float.safetensors", "int8.safetensors"))
    assert rounded.stat().st_size <= 0.45 * whole.stat().st_size
    model, images = load_checkpoint(rounded).model, torch.randn(16, 3, 32, 32)
    expected, found = load_checkpoint(whole).model(images), model(images)
    assert 0 < (found - expected).norm() / expected.norm() <= 1e-2


@pytest.mark.slow
@torch.no_grad()
def test_an_int8_file_as_an_onnx_program(save_run, tmp_path):
    rounded, images = tmp_path / "int8.safetensors", torch.randn(16, 3, 16, 16)
    assert main([str(save_run(moe=MOE)), "--out", str(rounded), "--quantize", "int8"]) == 0
    found = load_checkpoint(rounded).model(images)
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "int8.onnx"
    assert main([str(rounded), "--format", "onnx", "--quantize", "int8", "--out", str(out)]) == 0
    logits = programs.load_program(out, "onnx")(images)
    torch.testing.assert_close(logits, found, atol=1e-4, rtol=0)


@pytest.mark.parametrize("moe", [MOE, None])
def test_a_folder_for_timm(save_run, tmp_path, moe, capsys):
    run, out = save_run(moe=moe), tmp_path / "shared"
    (run / "summary.json").write_text(json.dumps({"metrics": {"test/top1": 0.5}}))
    (run / "metrics.csv").write_text("epoch,moe/blocks.1/load/0,moe/blocks.1/load/1\n0,0.5,1.5\n")
    for _ in range(2):  # written again, it is replaced
        assert main([str(run), "--format", "hub", "--out", str(out), "--license", "mit"]) == 0
    picture = {"routing.png"} if moe else set()
    assert {file.name for file in out.iterdir()} == {"README.md", "config.json", "model.safetensors"} | picture
    images = torch.randn(3, 3, 16, 16)
    expected = load_checkpoint(run).model(images)
    assert torch.equal(load_checkpoint(out).model(images), expected)
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert torch.equal(model(images), expected)
    model = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=3)
    assert model(images).shape == (3, 3)
    card = (out / "README.md").read_text()
    assert "50.00%" in card
    facts = ModelCard(card).data  # as the hub reads it
    (result,) = facts.eval_results
    written = [facts.to_dict()[key] for key in ("license", "pipeline_tag", "library_name")]
    assert written == ["mit", "image-classification", "timm"]
    assert (result.metric_value, result.dataset_split, result.metric_type) == (0.5, "test", "accuracy")
    assert ("](routing.png)" in card) == (moe is not None)
    assert ("3 experts" in card) == (moe is not None) and "| `blocks.1` | 0.50 | 1.50 |" in card


SOFT = {"router": "soft", "num_experts": 3, "layers": [1], "capacity_factor": 1.5, "eval_capacity_factor": 1.5}


@pytest.mark.parametrize("moe", [MOE, SOFT])
def test_timm_takes_a_folder_at_another_size_and_for_its_features(save_run, tmp_path, moe):
    run, out, images = save_run(moe=moe), tmp_path / "shared", torch.randn(2, 3, 32, 32)
    assert main([str(run), "--format", "hub", "--out", str(out)]) == 0
    expected = load_checkpoint(run).model
    expected.set_input_size(img_size=32)
    arguments = {"model_name": f"local-dir:{out}", "pretrained": True, "img_size": 32}
    taken = timm.create_model(**arguments).eval()
    torch.testing.assert_close(taken(images), expected(images))
    vmoe.save(taken, tmp_path / "again.safetensors", [*"abcdefghij"])  # its config tells the slots that it has
    for chosen, indices in (({"out_indices": (0, 2)}, (0, 2)), ({}, 3)):
        features = timm.create_model(**arguments, features_only=True, **chosen).eval()(images)
        theirs = expected.forward_intermediates(images, indices=indices, intermediates_only=True)
        assert len(features) == len(theirs) and all(map(torch.equal, features, theirs))


def test_what_others_add_to_a_folder_stays(save_run, tmp_path, capsys):
    run, out = save_run(moe=MOE), tmp_path / "shared"
    arguments = [str(run), "--format", "hub", "--out", str(out)]
    assert main(arguments) == 0
    assert main([*arguments, "--license", "mit"]) == 0  # nobody has touched the card
    card = out / "README.md"
    assert "license: mit" in card.read_text() and "for you to complete" in capsys.readouterr().out
    card.write_text(card.read_text().replace("## Limits", "## Limits\n\nIt was never shown a cat."))
    (out / "examples").mkdir()
    (out / "examples" / "cat.txt").write_text("a cat")
    (out / "config.json").unlink()
    assert main(arguments) == 0
    assert "It was never shown a cat." in card.read_text() and "license: mit" in card.read_text()
    assert "stays" in capsys.readouterr().out
    assert (out / "examples" / "cat.txt").read_text() == "a cat" and (out / "config.json").is_file()


def test_a_card_names_the_classes_of_a_nameless_set_and_whose_picture_it_shows(save_run):
    run = save_run("photos", MOE, {"name": "folder", "root": "/home/me/flowers"}, ("daisy", "rose", "tulip", "iris"))
    card = model_card(load_checkpoint(run), run, None)
    assert "\n# vit_tiny_patch16_224 for 4 classes: daisy, rose, tulip, ...\n" in card
    assert "| trained on | a folder of images, 1 epoch, 1 update, seed 0 |" in card and "/home/me" not in card
    assert "photograph by danielbuechele (Flickr)" in card and "vultilion" not in card


def test_a_folder_of_others_is_not_replaced(save_run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main([str(save_run(moe=MOE)), "--format", "hub", "--out", str(tmp_path / "mine")]) == 2
    assert "choose another place" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_folder_is_pushed(save_run, tmp_path, monkeypatch, capsys):
    """Against a stand-in for the hub's interface."""
    pytest.importorskip("huggingface_hub")
    calls = []

    class NoConnection(Exception):
        """As the library below the hub's has one, which is no OSError."""

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, name, exist_ok):
            if name == "no/body":
                raise OSError("401 Unauthorized")
            if name == "no/network":
                raise NoConnection("[Errno -2] Name or service not known")
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, {file.name for file in Path(folder_path).iterdir()}))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    arguments = [str(save_run(moe=MOE)), "--format", "hub", "--out", str(tmp_path / "shared"), "--push"]
    assert main([*arguments, "me/mine"]) == 0
    assert calls == [("me/mine", {"README.md", "config.json", "model.safetensors", "routing.png"})]
    for name, told in (("no/body", "401 Unauthorized"), ("no/network", "Name or service not known")):
        assert main([*arguments, name]) == 2
        error = capsys.readouterr().err
        assert told in error and f"hf upload {name}" in error and error.count("\n") == 1
    assert "model.safetensors" in {file.name for file in (tmp_path / "shared").iterdir()}


def test_nothing_is_left_of_what_differs_or_cannot_be_written(save_run, tmp_path, monkeypatch, capsys):
    run = save_run(moe=MOE)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "out" / "model.pt2", tmp_path / "file" / "model.pt2"):
        monkeypatch.setattr(programs, "TOLERANCE", -1.0 if out.parent.name == "out" else 1e-4)
        assert main([str(run), "--format", "torch-export", "--out", str(out)]) == 2
        *progress, error = capsys.readouterr().err.splitlines()  # a slow machine hears every 10 s what goes on
        assert "error:" in error and not any("error:" in line for line in progress)
    assert not (tmp_path / "out").exists()


def test_routing_that_depends_on_the_batch_is_refused(save_run, tmp_path, capsys):
    run = save_run(moe={**MOE, "eval_capacity_factor": 1.0})
    assert main([str(run), "--format", "torch-export", "--out", str(tmp_path / "model.pt2")]) == 2
    assert "other images of its batch" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["safetensors", "onnx", "torch-export"])
def test_a_dense_model_has_no_experts_to_round(save_run, tmp_path, capsys, format):
    out = tmp_path / {"safetensors": "x.safetensors", "onnx": "x.onnx", "torch-export": "x.pt2"}[format]
    assert main([str(save_run()), "--format", format, "--quantize", "int8", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "a dense model has no experts to round" in error and error.count("\n") == 1 and not out.exists()
