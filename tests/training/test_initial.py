"""`--init_from`: upcycling, going on, going back to dense, and what does not fit."""

import argparse
import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

import vmoe
from vmoe import MoeConfig
from vmoe.checkpoints import load_checkpoint
from vmoe.cli.train import main
from vmoe.cli.train_options import parse
from vmoe.errors import UserError
from vmoe.training.run.initial import initial_model

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


@pytest.mark.parametrize("moe", [None, SPARSE])
def test_the_classifier_is_taken_class_by_class_by_name(runs, moe):
    dense, sparse, config = runs
    run, order = (dense, DIGITS[::-1]) if moe is None else (sparse, ["7", "1", "3"])
    lines = []
    begun = initial_model(dataclasses.replace(config, init_from=str(run), moe=moe), order, 16, lines.append).eval()
    expected = load_checkpoint(run).model(images())[:, [int(name) for name in order]]
    torch.testing.assert_close(begun(images()), expected)
    assert lines[0].endswith(
        "in another order: the classifier is taken by name"
        if moe is None
        else "knows this run's 3 classes among its 10: their part of the classifier is taken"
    )


@pytest.fixture(scope="module")
def dense_weights(runs):
    return load_checkpoint(runs[0]).model.state_dict()


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("plain.pth", lambda weights: weights),
        ("last.pth.tar", lambda weights: {"state_dict": {name: 0 * value for name, value in weights.items()},
                                          "state_dict_ema": weights, "args": argparse.Namespace(lr=0.1), "epoch": 3}),
        ("wrapped.pt", lambda weights: {"model": {f"module._orig_mod.{name}": weights[name] for name in weights}}),
        ("hub.safetensors", None),
    ],
)  # fmt: skip
def test_files_of_timm_are_upcycled(runs, dense_weights, tmp_path, name, wrap):
    dense, _, config = runs
    file, lines = tmp_path / name, []
    save_file(dense_weights, file) if wrap is None else torch.save(wrap(dense_weights), file)
    config = dataclasses.replace(config, init_from=str(file), moe=SPARSE)
    upcycled = initial_model(config, DIGITS, 16, lines.append).eval()
    assert vmoe.moe_layers(upcycled)
    torch.testing.assert_close(upcycled(images()), load_checkpoint(dense).model(images()), rtol=1e-5, atol=1e-5)
    assert lines == [f"{file}: its 10 classes are taken by number, as it does not name them"]


def test_a_file_of_timm_for_other_classes_and_another_size(runs, dense_weights, tmp_path):
    _, _, config = runs
    torch.save(dense_weights, file := tmp_path / "plain.pth")
    lines, config = [], dataclasses.replace(config, init_from=str(file), moe=None)
    model = initial_model(config, ["odd", "even"], 32, lines.append)
    assert model.head.weight.shape == (2, 32) and lines[0].endswith("this run's starts fresh")
    expected = resample_abs_pos_embed(dense_weights["pos_embed"], (8, 8), num_prefix_tokens=1)
    torch.testing.assert_close(model.pos_embed, expected)
    assert torch.equal(model.blocks[1].mlp.fc1.weight, dense_weights["blocks.1.mlp.fc1.weight"])


def original_arrays(weights):
    """A ViT's weights by the names and shapes of the original's .npz files."""
    arrays = {
        "cls": weights["cls_token"],
        "embedding/kernel": weights["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": weights["pos_embed"],
        "Transformer/encoder_norm/scale": weights["norm.weight"],
        "Transformer/encoder_norm/bias": weights["norm.bias"],
        "head/kernel": weights["head.weight"].T,
        "head/bias": weights["head.bias"],
    }
    for block in range(2):
        part = {name.removeprefix(f"blocks.{block}."): value for name, value in weights.items()}
        ours = f"Transformer/encoderblock_{block}/"
        for theirs, norm in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            arrays |= {f"{ours}{theirs}/scale": part[f"{norm}.weight"], f"{ours}{theirs}/bias": part[f"{norm}.bias"]}
        attention = f"{ours}MultiHeadDotProductAttention_1/"
        kernels, biases = part["attn.qkv.weight"].chunk(3), part["attn.qkv.bias"].chunk(3)
        for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True):
            arrays |= {
                f"{attention}{name}/kernel": kernel.T.reshape(32, 2, 16),
                f"{attention}{name}/bias": bias.view(2, 16),
            }
        arrays[f"{attention}out/kernel"] = part["attn.proj.weight"].T.reshape(2, 16, 32)
        arrays[f"{attention}out/bias"] = part["attn.proj.bias"]
        for index in range(2):
            dense = f"{ours}MlpBlock_3/Dense_{index}/"
            arrays |= {
                f"{dense}kernel": part[f"mlp.fc{index + 1}.weight"].T,
                f"{dense}bias": part[f"mlp.fc{index + 1}.bias"],
            }
    return {name: value.numpy() for name, value in arrays.items()}


def test_an_npz_file_of_the_original_is_upcycled(runs, dense_weights, tmp_path):
    dense, _, config = runs
    np.savez(file := tmp_path / "augreg.npz", **original_arrays(dense_weights))
    lines, config = [], dataclasses.replace(config, init_from=str(file), moe=SPARSE)
    upcycled = initial_model(config, DIGITS, 16, lines.append).eval()
    assert vmoe.moe_layers(upcycled)
    torch.testing.assert_close(upcycled(images()), load_checkpoint(dense).model(images()), rtol=1e-5, atol=1e-5)
    other = initial_model(dataclasses.replace(config, moe=None), ["odd", "even"], 32, lines.append)
    expected = resample_abs_pos_embed(
        dense_weights["pos_embed"], (8, 8), num_prefix_tokens=1, interpolation="bilinear", antialias=False
    )
    torch.testing.assert_close(other.pos_embed, expected)
    assert "taken by number" in lines[0] and lines[1].endswith("this run's starts fresh")


def test_npz_files_that_do_not_fit_are_one_line(runs, dense_weights, tmp_path):
    _, _, config = runs
    arrays = original_arrays(dense_weights)
    np.savez(deeper := tmp_path / "deeper.npz", **arrays, **{"Transformer/encoderblock_2/x": np.zeros(1)})
    np.savez(images_of := tmp_path / "images.npz", train_x=np.zeros((2, 4, 4, 3)))
    (damaged := tmp_path / "damaged.npz").write_bytes(deeper.read_bytes()[:1000])
    swin = dataclasses.replace(config.model, name="test_efficientnet", kwargs={})
    for file, model, line in (
        (deeper, config.model, "has 3 blocks, and the model has 2"),
        (images_of, config.model, "holds no weights of a Vision Transformer"),
        (damaged, config.model, "is no .npz file"),
        (deeper, swin, "timm takes .npz files for Vision Transformers and MLP-Mixers, not for a"),
    ):
        with pytest.raises(UserError, match=f"^--init_from .*{line}"):
            start(dataclasses.replace(config, model=model), file)


def test_a_sparse_model_that_another_loop_saved_is_taken_as_it_is(runs, tmp_path):
    _, sparse, config = runs
    expected = load_checkpoint(sparse).model
    torch.save({"state_dict": expected.state_dict()}, file := tmp_path / "foreign.pth.tar")
    assert torch.equal(start(config, file, SPARSE)(images()), expected(images()))


@pytest.mark.parametrize("content", [{"state_dict": {"layer.weight": torch.ones(2)}}, {"weights": 3}])
def test_files_that_are_no_weights_of_the_model(runs, tmp_path, content):
    torch.save(content, file := tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: ") as error:
        start(runs[2], file, SPARSE)
    assert "\n" not in str(error.value)


def test_a_model_created_with_weights_is_upcycled(runs, dense_weights, tmp_path):
    save_file(dense_weights, file := tmp_path / "dense.safetensors")
    arguments = {"checkpoint_path": str(file), "num_classes": 10, "img_size": 16, **runs[2].model.kwargs}
    model = vmoe.create_model("vit_tiny_patch16_224", SPARSE, **arguments)
    weight = model.blocks[1].mlp.experts.fc1.weight
    assert torch.equal(weight, dense_weights["blocks.1.mlp.fc1.weight"].expand_as(weight))
    narrow = dataclasses.replace(SPARSE, expert_width=0.5)
    with pytest.warns(UserWarning, match="expert_width=0.5: the experts start at random"):
        vmoe.create_model("vit_tiny_patch16_224", narrow, **arguments)


def test_other_classes_get_a_fresh_classifier(runs):
    dense, _, config = runs
    model = start(config, dense, class_names=["odd", "even"])
    trained = load_checkpoint(dense).model
    assert model.head.weight.shape == (2, 32)
    assert torch.equal(model.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)


def test_classes_that_are_only_numbered_keep_the_classifier(runs, tmp_path, capsys):
    """An npz file without class_names gives numbers, whatever the checkpoint calls its classes."""
    dense, _, config = runs
    content = torch.load(dense / "checkpoints" / "best.ckpt", weights_only=True)
    content["vmoe"]["class_names"] = [f"digit {number}" for number in range(10)]
    torch.save(content, named := tmp_path / "named.ckpt")
    trained, said = load_checkpoint(dense).model, []
    assert torch.equal(start(config, named)(images()), trained(images()))
    config = dataclasses.replace(config, init_from=str(named), moe=None)
    for classes, is_kept, told in (
        (DIGITS, True, "taken by number"),
        (content["vmoe"]["class_names"], True, None),
        ([*DIGITS[:9], "ten"], False, "the classifier starts fresh"),
        (DIGITS[:9], False, "the classifier starts fresh"),
    ):
        said.clear()
        model = initial_model(config, classes, 16, said.append)
        assert torch.equal(model.head.weight[:9], trained.head.weight[:9]) == is_kept
        assert said == [] if told is None else told in said[0]


def test_transfer_to_other_classes_and_larger_images_keeps_the_experts(runs):
    _, sparse, config = runs
    trained = load_checkpoint(sparse).model
    model = start(config, sparse, SPARSE, class_names=["odd", "even"], image_size=32)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 2)
    expected = trained.state_dict()
    for name, value in model.state_dict().items():
        if name == "pos_embed":  # 4 x 4 patches became 8 x 8, as timm resamples them
            assert torch.equal(value, resample_abs_pos_embed(expected[name], [8, 8], num_prefix_tokens=1))
        elif not name.startswith("head."):
            assert torch.equal(value, expected[name]), name


def test_a_dense_checkpoint_is_upcycled_for_larger_images(runs):
    dense, _, config = runs
    upcycled, larger = start(config, dense, SPARSE, image_size=32), torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(upcycled(larger), start(config, dense, image_size=32)(larger), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("image_size", "window_size"), [(64, 4), (32, 2)])
def test_a_model_of_windows_transfers_to_other_images_and_windows(runs, tmp_path, image_size, window_size):
    name, kwargs = "swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2]}
    old = vmoe.create_model(name, SPARSE, img_size=32, num_classes=10, window_size=4, **kwargs).eval()
    own_kwargs = {**kwargs, "window_size": 4}
    vmoe.save(old, tmp_path / "old.ckpt", DIGITS, image_size=32, name=name, kwargs=own_kwargs)
    model_config = dataclasses.replace(runs[2].model, name=name, kwargs={**kwargs, "window_size": window_size})
    config = dataclasses.replace(runs[2], model=model_config)
    model = start(config, tmp_path / "old.ckpt", SPARSE, image_size=image_size)
    assert model(torch.randn(2, 3, image_size, image_size)).shape == (2, 10)
    expected = old.state_dict()
    for key, value in model.state_dict().items():
        if value.shape == expected[key].shape:
            assert torch.equal(value, expected[key]), key
        else:
            assert key.endswith(".relative_position_bias_table")


def test_a_run_transfers_to_other_images(runs, tmp_path):
    _, sparse, _ = runs
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    options = ["--init_from", str(sparse), "--moe.num_experts", "4", "--moe.renormalize", "true"]
    options += ["--data.image_size", "24"]
    assert main(["--config", str(recipe), "--output_dir", str(tmp_path / "run"), *options]) == 0
    assert load_checkpoint(tmp_path / "run").image_size == 24


def test_soft_moe_s_slots_are_kept_by_the_capacity_factor_that_is_told(runs, tmp_path):
    _, _, config = runs
    recipe, path = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(TINY)
    options = ["--moe.num_experts", "4", "--moe.router", "soft", "--moe.capacity_factor", "1"]
    assert main(["--config", str(recipe), "--output_dir", str(path), *options]) == 0
    moe = MoeConfig(num_experts=4, router="soft", capacity_factor=1.0)
    with pytest.raises(UserError, match=r"router\.mu is .* --moe\.capacity_factor 0\.25 keeps"):
        start(config, path, moe, image_size=32)
    model = start(config, path, dataclasses.replace(moe, capacity_factor=0.25), image_size=32)
    assert torch.equal(model.blocks[1].mlp.router.mu, load_checkpoint(path).model.blocks[1].mlp.router.mu)


@pytest.mark.parametrize(
    ("moe", "named"),
    [
        (dataclasses.replace(SPARSE, num_experts=8), "experts"),
        (dataclasses.replace(SPARSE, expert_width=0.5), "experts"),
    ],
)
def test_weights_that_do_not_fit_are_named(runs, moe, named):
    _, sparse, config = runs
    with pytest.raises(UserError, match=named):
        start(config, sparse, moe)


def test_narrow_experts_are_not_upcycled(runs):
    dense, _, config = runs
    with pytest.raises(UserError, match=r"moe\.expert_width=0\.5: must be 1"):
        start(config, dense, dataclasses.replace(SPARSE, expert_width=0.5))


def test_moe_layers_have_a_drop_path_of_their_own(runs):
    dense, _, config = runs
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe_drop_path=0.3))
    blocks = start(config, dense, SPARSE).blocks
    assert blocks[1].drop_path2.drop_prob == 0.3
    assert isinstance(blocks[1].drop_path1, torch.nn.Identity) and isinstance(blocks[0].drop_path2, torch.nn.Identity)
    convolutional = dataclasses.replace(config.model, name="convnext_atto", kwargs={"depths": [1, 1, 1, 1]})
    config = dataclasses.replace(config, model=convolutional, init_from=None, moe=SPARSE)
    with pytest.raises(UserError, match=r"model\.moe_drop_path=0\.3: ConvNeXtBlock has no drop path"):
        initial_model(config, DIGITS, 32)


def test_timms_pretrained_weights_are_upcycled(runs, tmp_path):
    """Timm loads its weights from a file here, in the place of the download."""
    dense, _, config = runs
    trained = load_checkpoint(dense).model
    file = tmp_path / "pretrained.safetensors"
    save_file(trained.state_dict(), file)
    overlay = {"file": str(file), "hf_hub_id": None, "num_classes": 10, "input_size": (3, 16, 16)}
    overlay["custom_load"] = False  # timm 1.0.26 takes a file of this model for an npz
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
