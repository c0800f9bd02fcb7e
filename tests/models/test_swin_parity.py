"""Checkpoints of Swin-MoE give the original's logits, routing and gradients, as it recorded them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support import swin_oracle
from timm.layers import DropPath
from torch.nn import functional as F

import vmoe

FOLDER = Path(__file__).parent.parent / "fixtures" / "swin_moe"
COSINE, SLICED, DENSE = "tiny_cosine_4expert_1rank", "tiny_linear_2expert_sliced_4rank", "tiny_dense"
RECORDED = {case: np.load(FOLDER / case / "expected.npz") for case in (COSINE, SLICED, DENSE)}
VARIANTS = [(COSINE, "eval"), (COSINE, "eval_nodrop"), (SLICED, "eval"), (SLICED, "eval_nodrop"), (DENSE, "eval")]
AUX_LOSS_WEIGHT = 0.01


def images(case: str) -> torch.Tensor:
    """(ranks, B, 3, 64, 64)."""
    return torch.from_numpy(RECORDED[case]["images_int8"]).float() / 32


def recorded(case: str, name: str) -> torch.Tensor:
    return torch.from_numpy(RECORDED[case][name])


@pytest.mark.parametrize(("case", "variant"), VARIANTS)
@torch.no_grad()
def test_recorded_logits(case, variant):
    config = {"CAPACITY_FACTOR": 0} if variant == "eval_nodrop" else {}
    model = vmoe.load_swin_moe_checkpoint(FOLDER / case, config=config)
    for rank, batch in enumerate(images(case)):
        expected = recorded(case, f"{variant}/logits")[rank]
        torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [COSINE, SLICED])
@torch.no_grad()
def test_recorded_routing(case):
    model = vmoe.load_swin_moe_checkpoint(FOLDER / case)
    for rank, batch in enumerate(images(case)):
        with vmoe.record_routing(model) as trace:
            model(batch)
        assert trace.layers.keys() == {"layers.2.blocks.1.mlp", "layers.3.blocks.1.mlp"}
        for name, layer in trace.layers.items():
            block = f"eval/{name.removesuffix('.mlp')}"
            expected = {part: recorded(case, f"{block}/{part}")[rank] for part in ("experts", "kept", "gates")}
            assert torch.equal(layer.chosen.flatten(0, 1), expected["experts"].long())
            assert torch.equal(~layer.dropped.flatten(0, 1), expected["kept"])
            gates = layer.gates.flatten(0, 1).gather(1, expected["experts"].long())
            torch.testing.assert_close(gates, expected["gates"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_slices_of_an_expert_raise_its_capacity():
    model = vmoe.load_swin_moe_checkpoint(FOLDER / SLICED, slices_per_expert=1)
    logits = torch.stack([model(batch) for batch in images(SLICED)])
    torch.testing.assert_close(logits, recorded(SLICED, "eval_alignment1/logits"), rtol=0, atol=1e-5)
    assert (logits - recorded(SLICED, "eval/logits")).abs().max() > 0.01


def released_loss(routing, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tutel's importance and load loss; it compares gates, not logits, with a noisy logit."""

    def squared_variation(values_E: torch.Tensor) -> torch.Tensor:
        return values_E.var() / (values_E.mean().square() + 1e-10)

    gates_TE, noisy_TE = routing.logits_GSE.flatten(0, 1).softmax(-1), routing.noisy_logits_GSE.flatten(0, 1)
    threshold_T1 = noisy_TE.gather(1, routing.chosen_GSK.flatten(0, 1)[:, -1:])
    load_E = torch.special.ndtr((gates_TE - threshold_T1) * num_experts).sum(0)
    return squared_variation(gates_TE.sum(0)), squared_variation(load_E)


@pytest.mark.parametrize("case", [COSINE, SLICED])
def test_recorded_gradients_of_training_with_noise(case):
    model = vmoe.load_swin_moe_checkpoint(FOLDER / case, config={"MOE_DROP": 0.0}).train()
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    total, ranks = torch.zeros(()), len(images(case))
    for rank, batch in enumerate(images(case)):
        routings = []
        for name, layer in vmoe.moe_layers(model):
            noise = recorded(case, f"grad_train/{name.removesuffix('.mlp')}/noise")[rank]
            layer.router.draw_noise = lambda like, noise=noise: noise.view_as(like)
            layer.recorders = (lambda routing, shape, routings=routings: routings.append(routing),)
        cross_entropy = F.cross_entropy(model(batch), recorded(case, "targets")[rank])
        losses = [released_loss(routing, routing.gates_GSE.shape[-1]) for routing in routings]
        auxiliary = AUX_LOSS_WEIGHT * sum((importance + load) / 2 for importance, load in losses)
        assert cross_entropy.item() == pytest.approx(recorded(case, "grad_train/cross_entropy")[rank].item(), abs=1e-5)
        assert auxiliary.item() == pytest.approx(recorded(case, "grad_train/l_aux")[rank].item(), abs=1e-5)
        for (_, layer), (importance, _) in zip(vmoe.moe_layers(model), losses, strict=True):
            own = layer.config.importance_loss_weight * layer.statistics.importance_loss
            torch.testing.assert_close(own, (AUX_LOSS_WEIGHT / 2 * importance).detach())
        total = total + (cross_entropy + auxiliary) / ranks
    total.backward()
    parameters = dict(model.named_parameters())
    names = [name for name in RECORDED[case].files if name.startswith("grad_train/grad/") and ".cpb_mlp." not in name]
    assert len(names) >= 8
    for name in names:
        ours, gradient = in_timm(name.removeprefix("grad_train/grad/"), parameters)
        torch.testing.assert_close(
            gradient, recorded(case, name), rtol=1e-5, atol=1e-5, msg=lambda m, n=ours: f"{n}: {m}"
        )


def in_timm(name: str, parameters: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """The gradient of a parameter of the original, by the chain rule where ours is another function of it."""
    name = name.replace("layers.2.downsample", "layers.3.downsample").replace("head.", "head.fc.")
    for theirs, ours in {
        "_moe_layer.experts.batched_fc1_bias": "experts.fc1.bias",
        "_moe_layer.gates.0.wg": "router.gate",
        "_moe_layer.gates.0.sim_matrix": "router.gate.weight",
        "_moe_layer.gates.0.cosine_projector.weight": "router.projection.weight",
        "_moe_layer.gates.0.cosine_projector.bias": "router.projection_bias",
        "_moe_layer.gates.0.temperature": "router.temperature",
    }.items():
        if theirs in name:
            is_turned = theirs.endswith("sim_matrix")
            name = name.replace(theirs, ours)
            gradient = parameters[name].grad
            if ours == "router.temperature":  # exp(-t) of theirs
                return name, (-gradient * parameters[name].detach()).reshape(1)
            return name, gradient.t() if is_turned else gradient
    return name, parameters[name].grad


@pytest.mark.parametrize(("img_size", "window_size"), [(64, 4), (128, 4), (64, 8), (96, 6)])
@torch.no_grad()
def test_other_images_and_windows_against_a_plain_pass(img_size, window_size):
    weights = torch.load(FOLDER / DENSE / f"{DENSE}.pth.global", weights_only=True)["model"]
    model = vmoe.load_swin_moe_checkpoint(FOLDER / DENSE, img_size=img_size, window_size=window_size)
    batch = F.interpolate(images(DENSE)[0], size=(img_size, img_size))
    expected = swin_oracle.logits(weights, batch, window_size, trained_windows=[4, 4, 4])
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=1e-5)
    if (img_size, window_size) == (64, 4):
        torch.testing.assert_close(expected, recorded(DENSE, "eval/logits")[0], rtol=0, atol=1e-5)
        for name, module in model.named_modules():
            if hasattr(module, "relative_position_index"):
                assert torch.equal(module.relative_position_index, weights[f"{name}.relative_position_index"])
