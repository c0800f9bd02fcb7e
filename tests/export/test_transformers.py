"""The folder of `vmoe export --format hub` in transformers."""

import json

import pytest
import torch
from PIL import Image
from support.saved_runs import DIGITS, save_run

import vmoe
from vmoe.export.hub import write_hub_folder

transformers = pytest.importorskip("transformers")
MOE = {"num_experts": 3, "top_k": 2, "layers": [1]}


@pytest.fixture
def folder(tmp_path):
    """Writes the folder of a small model; `moe` as keyword arguments or None."""

    def write(moe):
        write_hub_folder(tmp_path / "shared", save_run(tmp_path / "run", moe))
        return tmp_path / "shared"

    return write


@pytest.mark.parametrize("moe", [MOE, {"router": "soft", "num_experts": 3, "layers": [1]}, None])
@torch.no_grad()
def test_a_folder_opens_as_a_classifier_of_transformers(folder, moe):
    shared = folder(moe)
    theirs, ours = transformers.AutoModelForImageClassification.from_pretrained(shared), vmoe.load(shared)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(theirs(images).logits, ours(images))
    assert list(theirs.config.id2label.values()) == list(DIGITS)
    square = Image.new("RGB", (16, 16), "red")  # which neither resizes
    best = transformers.pipeline("image-classification", model=str(shared))(square)[0]
    (label,), probabilities = ours.predict(square)
    assert best == {"label": label, "score": pytest.approx(float(probabilities.max()), abs=1e-6)}


@pytest.mark.slow
def test_their_trainer_trains_it_with_its_auxiliary_losses(folder, tmp_path):
    pytest.importorskip("accelerate")
    shared = folder(MOE)
    config = transformers.AutoConfig.from_pretrained(shared)
    config.model_args["moe"]["inject_auxiliary_loss"] = True  # as docs/export.md has it
    model = transformers.AutoModelForImageClassification.from_pretrained(shared, config=config)
    before = {name: value.clone() for name, value in model.named_parameters()}
    images = torch.randn(8, 3, 16, 16)
    data = [{"pixel_values": image, "labels": index % 10} for index, image in enumerate(images)]
    arguments = transformers.TrainingArguments(
        tmp_path / "trainer", max_steps=1, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert not [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    (layer,) = (layer for _, layer in vmoe.moe_layers(model))
    assert layer.config.inject_auxiliary_loss and layer.last_auxiliary_loss > 0
    trainer.save_model(tmp_path / "tuned")
    tuned = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "tuned").eval()
    shown = json.loads((shared / "config.json").read_text())["pretrained_cfg"]
    kept = {"image_size": 16, "mean": shown["mean"], "std": shown["std"]}
    vmoe.save(tuned.timm_model, tmp_path / "tuned.safetensors", DIGITS, **kept)
    with torch.no_grad():
        expected = model.eval()(images).logits
        assert torch.equal(tuned(images).logits, expected)
        assert torch.equal(vmoe.load(tmp_path / "tuned.safetensors")(images), expected)
