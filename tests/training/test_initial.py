"""`--init_from`: upcycling, going on, going back to dense, and what does not fit."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from vmoe import MoeConfig
from vmoe.checkpoints import load_checkpoint
from vmoe.cli.train import main, parse
from vmoe.errors import UserError
from vmoe.training.initial import initial_model

TINY = """
data: {name: digits, batch_size: 40, subset: {per_class: 20}, augment: {preset: none}}
model: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}}
optim: {warmup_epochs: 0}
trainer: {epochs: 1, device: cpu}
"""
DIGITS = [str(digit) for digit in range(10)]
SPARSE = MoeConfig(num_experts=4, top_k=2, renormalize=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a dense run and of one that was upcycled from it, and the dense run's config."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = folder / "tiny.yaml"
    recipe.write_text(TINY)
    dense, sparse = folder / "dense", folder / "sparse"
    assert main(["--config", str(recipe), "--output_dir", str(dense)]) == 0
    options = ["--init_from", str(dense), "--moe.num_experts", "4", "--moe.renormalize", "true"]
    assert main(["--config", str(recipe), "--output_dir", str(sparse), *options]) == 0
    return dense, sparse, parse(["--config", str(recipe), "--output_dir", str(dense)])


def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def start(config, run, moe=None, class_names=DIGITS, image_size=16):
    return initial_model(dataclasses.replace(config, init_from=str(run), moe=moe), class_names, image_size).eval()


def test_a_dense_checkpoint_is_upcycled(runs):
    dense, _, config = runs
    trained = load_checkpoint(dense).model
    upcycled = start(config, dense, SPARSE)
    torch.testing.assert_close(upcycled(images()), trained(images()), rtol=1e-5, atol=1e-5)
    weight = upcycled.blocks[1].mlp.experts.fc1.weight
    assert torch.equal(weight, trained.blocks[1].mlp.fc1.weight.expand_as(weight))


def test_going_on_starts_with_the_same_function(runs):
    dense, sparse, config = runs
    for run, moe in ((dense, None), (sparse, SPARSE)):
        assert torch.equal(start(config, run, moe)(images()), load_checkpoint(run).model(images()))


def test_a_sparse_checkpoint_becomes_dense_by_averaging_experts(runs):
    _, sparse, config = runs
    model = start(config, sparse)
    mean = load_checkpoint(sparse).model.blocks[1].mlp.experts.fc2.weight.mean(0)
    torch.testing.assert_close(model.blocks[1].mlp.fc2.weight, mean)


def test_other_classes_get_a_fresh_classifier(runs):
    dense, _, config = runs
    model = start(config, dense, class_names=["odd", "even"])
    trained = load_checkpoint(dense).model
    assert model.head.weight.shape == (2, 32)
    assert torch.equal(model.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"image_size": 32}, "pos_embed"), ({"moe": dataclasses.replace(SPARSE, num_experts=8)}, "num_experts|experts")],
)
def test_weights_that_do_not_fit_are_named(runs, change, named):
    _, sparse, config = runs
    with pytest.raises(UserError, match=named):
        start(config, sparse, **{"moe": SPARSE, **change})


def test_timms_pretrained_weights_are_upcycled(runs, tmp_path):
    """Timm loads its weights from a file here, in the place of the download."""
    dense, _, config = runs
    trained = load_checkpoint(dense).model
    file = tmp_path / "pretrained.safetensors"
    save_file(trained.state_dict(), file)
    overlay = {"file": str(file), "hf_hub_id": None, "num_classes": 10, "input_size": (3, 16, 16)}
    model_config = dataclasses.replace(config.model, kwargs={**config.model.kwargs, "pretrained_cfg_overlay": overlay})
    upcycled = start(dataclasses.replace(config, model=model_config), "pretrained", SPARSE)
    torch.testing.assert_close(upcycled(images()), trained(images()), rtol=1e-5, atol=1e-5)


def test_a_missing_checkpoint_is_one_line(runs, capsys, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    code = main(["--config", str(recipe), "--output_dir", str(tmp_path / "run"), "--init_from", "nowhere"])
    assert code == 2
    assert "nowhere: no such file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
