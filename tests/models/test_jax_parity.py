"""Checkpoints of the original code give its logits and routing: what it recorded, and a slow NumPy forward pass."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support import jax_oracle
from support.jax_writer import cut_to_bfloat16, write_checkpoint
from torch.nn import functional as F

import vmoe

FIXTURES = Path(__file__).parent.parent / "fixtures"
TOKEN = FIXTURES / "vmoe_jax_token" / "vmoe_tiny_token"
RECORDED = np.load(FIXTURES / "vmoe_jax_vit.npz")
TOLERANCE = 1e-4
VARIANTS = {
    "token_nodrop": {},
    "token_cf1.05": {"capacity_factor": 1.05},
    "token_cf0.5_bpr": {"capacity_factor": 0.5, "batch_priority": True},
}


def recorded_params(name: str) -> dict[str, np.ndarray]:
    prefix = f"params/{name}/"
    return {key.removeprefix(prefix): RECORDED[key] for key in RECORDED.files if key.startswith(prefix)}


def run(model, images: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def largest_error(model, images: np.ndarray, expected: np.ndarray) -> float:
    return float(abs(run(model, images) - expected).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_recorded_variants(variant):
    model = vmoe.load_jax_checkpoint(TOKEN, **VARIANTS[variant])
    with vmoe.record_routing(model) as trace:
        assert largest_error(model, RECORDED["images"], RECORDED[f"{variant}/logits"]) < TOLERANCE
    for block in (1, 3):
        layer = trace.layers[f"blocks.{block}.mlp"]
        mask = torch.zeros_like(layer.gates, dtype=torch.bool).scatter(2, layer.chosen, ~layer.dropped)
        expected = RECORDED[f"{variant}/dispatch_mask_GSE/encoderblock_{block}"]
        assert np.array_equal(mask.view(expected.shape).numpy(), expected)
        gates = RECORDED[f"{variant}/gates/encoderblock_{block}"]
        assert abs(layer.gates.view(gates.shape).numpy() - gates).max() < 1e-5


def test_recorded_dense_variant(tmp_path):
    own = recorded_params("dense_token")
    shared = {name: value for name, value in recorded_params("token").items() if "/Moe/" not in name}
    write_checkpoint(tmp_path / "dense", shared | own)
    model = vmoe.load_jax_checkpoint(tmp_path / "dense")
    assert not vmoe.moe_layers(model)
    assert largest_error(model, RECORDED["images"], RECORDED["dense_token/logits"]) < TOLERANCE


def test_recorded_loss_and_gradients(tmp_path):
    model = vmoe.load_jax_checkpoint(TOKEN, capacity_factor=1.05).train()
    for _, layer in vmoe.moe_layers(model):
        layer.router.noise_scale = 0.0  # recorded without noise
        layer.config = dataclasses.replace(layer.config, noise_std=0.0)
    logits = model(torch.from_numpy(RECORDED["images"]).permute(0, 3, 1, 2))
    main = F.cross_entropy(logits, torch.from_numpy(RECORDED["labels_onehot"]).argmax(1))
    extra = vmoe.auxiliary_loss(model)
    (main + extra).backward()
    prefix = "token_cf1.05/train"
    assert main.item() == pytest.approx(float(RECORDED[f"{prefix}/main_loss"]), abs=1e-5)
    assert extra.item() == pytest.approx(float(RECORDED[f"{prefix}/aux_loss_mean"]), abs=1e-6)
    # Read as a checkpoint the recorded gradients come in our layout
    names = {key.removeprefix(f"{prefix}/grad/"): RECORDED[key] for key in RECORDED.files if f"{prefix}/grad/" in key}
    write_checkpoint(tmp_path / "gradients", names)
    expected = dict(vmoe.load_jax_checkpoint(tmp_path / "gradients").named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].data, rtol=1e-4, atol=1e-5)


def test_a_recorded_ensemble(tmp_path):
    """E3, two members; 16 % of the choices are dropped."""
    recorded = np.load(FIXTURES / "vmoe_jax_e3_vit.npz")
    params = {key.removeprefix("params/"): recorded[key] for key in recorded.files if key.startswith("params/")}
    write_checkpoint(tmp_path / "eee", params)
    model = vmoe.load_jax_checkpoint(tmp_path / "eee", top_k=1, capacity_factor=1.05, group_images=4)
    of_members = torch.from_numpy(recorded["logits"]).unflatten(0, (-1, 2))
    with vmoe.record_routing(model) as trace:
        predicted = run(model, recorded["images"])
    assert abs(predicted - of_members.softmax(-1).mean(1).log().numpy()).max() < 1e-5
    for block in (1, 3):  # both members' choices are the image's
        layer = trace.layers[f"blocks.{block}.mlp"]
        mask = torch.zeros_like(layer.gates, dtype=torch.bool).scatter(2, layer.chosen, ~layer.dropped)
        expected = recorded[f"dispatch_mask_GSE/encoderblock_{block}"].reshape(8, 17, 2, 8).any(2)
        assert np.array_equal(mask.numpy(), expected)
    model.train()
    for _, layer in vmoe.moe_layers(model):
        layer.router.noise_scale = 0.0  # recorded without noise
        layer.config = dataclasses.replace(layer.config, noise_std=0.0)
    logits = model(torch.from_numpy(recorded["images"]).permute(0, 3, 1, 2)).detach().numpy()
    assert abs(logits - recorded["logits"]).max() < 1e-5  # in training each member has its own
    assert vmoe.auxiliary_loss(model).item() == pytest.approx(
        float(recorded["metrics/auxiliary_loss"].mean()), abs=1e-6
    )


# Depths of more than 10 blocks, where the order of leaves is not that of the blocks
ARCHITECTURES = {
    "deep": {"depth": 13, "moe": (1, 3, 11)},
    "gap": {"cls": False},
    "gap_pre_logits": {"cls": False, "pre_logits": 16},
    "pre_logits": {"pre_logits": 16},
    "narrow_pre_logits": {"pre_logits": 7},
    "all_moe": {"depth": 2, "moe": (0, 1)},
    "odd_widths": {"hidden": 29, "width": 12, "heads": 3, "patch": 3, "side": 4},
    "dense": {"moe": ()},
    "one_expert": {"experts": 1},
}
ROUTINGS = {
    # arguments of the import; places for an expert given N tokens an image
    "k1": ({"top_k": 1}, lambda tokens: None),
    "k3_capacity": (
        {"top_k": 3, "capacity_factor": 0.8, "group_images": 2},
        lambda tokens: 4 * math.ceil(math.ceil(2 * tokens * 3 * 0.8 / 4) / 4),
    ),
    "rounded": (
        {"capacity_factor": 0.77, "group_images": 1, "capacity_rounding": "round", "capacity_multiple_of": 1},
        lambda tokens: round(tokens * 2 * 0.77 / 4),
    ),
    "expert_choice": ({"router": "expert_choice", "capacity_factor": 1.3}, lambda tokens: round(tokens * 1.3 / 4)),
    "soft": ({"router": "soft"}, lambda tokens: None),
}


def images_for(params: dict[str, np.ndarray], rng) -> np.ndarray:
    tokens = params["Encoder/posembed_input/pos_embedding"].shape[1] - ("cls" in params)
    side = math.isqrt(tokens) * params["embedding/kernel"].shape[0]
    return rng.standard_normal((4, side, side, 3)).astype(np.float32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture, tmp_path):
    rng = np.random.default_rng(1)
    params = jax_oracle.random_params(rng, **ARCHITECTURES[architecture])
    write_checkpoint(tmp_path / "x", params)
    images, top_k = images_for(params, rng), 1 if architecture == "one_expert" else 2
    model = vmoe.load_jax_checkpoint(str(tmp_path / "x"), top_k=top_k)
    assert largest_error(model, images, jax_oracle.logits(params, images, top_k=top_k)) < TOLERANCE


@pytest.mark.parametrize("classifier", ["token", "gap"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing, classifier, tmp_path):
    rng = np.random.default_rng(2)
    arguments, capacity = ROUTINGS[routing]
    params = jax_oracle.random_params(rng, cls=classifier == "token", slots=3 if routing == "soft" else None)
    write_checkpoint(tmp_path / "x", params)
    images = images_for(params, rng)
    tokens = params["Encoder/posembed_input/pos_embedding"].shape[1]
    router = arguments.get("router", "token_choice")
    expected = jax_oracle.logits(
        params,
        images,
        router=router,
        top_k=arguments.get("top_k", 2),
        capacity=capacity(tokens),
        group=arguments.get("group_images", 8) if router == "token_choice" else 1,
    )
    assert largest_error(vmoe.load_jax_checkpoint(tmp_path / "x", **arguments), images, expected) < TOLERANCE


def test_soft_moe_is_known_by_its_parameters(tmp_path):
    write_checkpoint(tmp_path / "x", jax_oracle.random_params(np.random.default_rng(0), slots=2))
    model = vmoe.load_jax_checkpoint(tmp_path / "x")
    assert [(layer.config.router, layer.router.mu.shape[2]) for _, layer in vmoe.moe_layers(model)] == [("soft", 2)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_stored_types(dtype, tmp_path):
    params = jax_oracle.random_params(np.random.default_rng(3))
    write_checkpoint(tmp_path / "x", params, dtype=dtype)
    stored = {
        "bfloat16": cut_to_bfloat16,
        "float16": lambda value: value.astype(np.float16).astype(np.float32),
        "float64": lambda value: value,
    }[dtype]
    write_checkpoint(tmp_path / "y", {name: stored(value) for name, value in params.items()})
    x, y = (vmoe.load_jax_checkpoint(tmp_path / name).state_dict() for name in "xy")
    assert x.keys() == y.keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, y[name]) for name, value in x.items())


@pytest.mark.parametrize(
    "layout", [{"shards": 1}, {"shards": 7}, {"largest_array": 5}, {"largest_array": 1, "shards": 2}]
)
def test_layouts_of_the_files_do_not_matter(layout, tmp_path):
    params = jax_oracle.random_params(np.random.default_rng(4), depth=11, width=8, hidden=8, moe=(9, 10))
    write_checkpoint(tmp_path / "x", params, **layout)
    write_checkpoint(tmp_path / "y", params)
    x, y = (vmoe.load_jax_checkpoint(tmp_path / name).state_dict() for name in "xy")
    assert all(torch.equal(value, y[name]) for name, value in x.items())


def test_parameters_beside_an_optimiser_s_state(tmp_path):
    params = jax_oracle.random_params(np.random.default_rng(5), depth=11, width=8, moe=(10,))
    beside = {"opt_state/0/mu/head/kernel": params["head/kernel"] + 1, "step": np.int32(3), "rng": np.arange(2)}
    write_checkpoint(tmp_path / "x", params, beside=beside)
    write_checkpoint(tmp_path / "y", params)
    x, y = (vmoe.load_jax_checkpoint(tmp_path / name).state_dict() for name in "xy")
    assert all(torch.equal(value, y[name]) for name, value in x.items())


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("slots", [None, 2])
def test_another_image_size(cls, slots, tmp_path):
    rng = np.random.default_rng(6)
    params = jax_oracle.random_params(rng, cls=cls, slots=slots, side=3, patch=4)
    write_checkpoint(tmp_path / "x", params)
    model = vmoe.load_jax_checkpoint(tmp_path / "x", img_size=20)
    # Every second of 5 places is one of the 3: those stay as they were, the ones between are means
    resized, name = dict(params), "Encoder/posembed_input/pos_embedding"
    old = params[name][:, int(cls) :].reshape(3, 3, -1)
    new = np.zeros((5, 5, old.shape[-1]), np.float32)
    for row in range(5):
        for column in range(5):
            rows, columns = {row // 2, (row + 1) // 2}, {column // 2, (column + 1) // 2}
            new[row, column] = np.mean([old[r, c] for r in rows for c in columns], axis=0)
    resized[name] = np.concatenate([params[name][:, : int(cls)], new.reshape(1, 25, -1)], axis=1)
    images = rng.standard_normal((2, 20, 20, 3)).astype(np.float32)
    expected = jax_oracle.logits(resized, images, router="soft" if slots else "token_choice", group=1)
    assert largest_error(model, images, expected) < TOLERANCE


def test_an_oblong_image_size(tmp_path):
    params = jax_oracle.random_params(np.random.default_rng(7), side=3, patch=4)
    write_checkpoint(tmp_path / "x", params)
    model = vmoe.load_jax_checkpoint(tmp_path / "x", img_size=(8, 16))
    assert run(model, np.zeros((1, 8, 16, 3), np.float32)).shape == (1, 5)
    assert model.pos_embed.shape == (1, 1 + 2 * 4, 16)


def test_the_result_is_a_plain_timm_model(tmp_path):
    import timm

    model = vmoe.load_jax_checkpoint(TOKEN, capacity_factor=0.5)
    assert type(model) is timm.models.VisionTransformer and not model.training
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in model.parameters())
    config = timm.data.resolve_model_data_config(model)
    assert (config["input_size"], config["mean"], config["std"]) == ((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
    factors = [(layer.config.capacity_factor, layer.config.eval_capacity_factor) for _, layer in vmoe.moe_layers(model)]
    assert factors == [(0.5, 0.5)] * 2
    model.reset_classifier(3)
    assert run(model, RECORDED["images"]).shape == (16, 3)
