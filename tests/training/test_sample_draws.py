"""Noise and dropout by image: what they draw, and that the batch around an image does not matter."""

import pytest
import torch
from timm.layers import DropPath, PatchDropout
from torch import nn

import vmoe
from vmoe.errors import UserError
from vmoe.moe import MoeConfig
from vmoe.training.parallel.sample_draws import SampleDraws, SampleDropout

KEYS = torch.stack([torch.full((6,), 3), torch.arange(6)], dim=1)


def _model(**moe) -> nn.Module:
    torch.manual_seed(0)
    kwargs = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_path_rate": 0.5, "pos_drop_rate": 0.5}
    moe = MoeConfig(num_experts=4, group=2, noise_std=4.0, **moe)
    return vmoe.create_model("vit_tiny_patch16_224", moe, img_size=16, num_classes=10, **kwargs).train()


def test_what_an_image_draws_does_not_depend_on_the_batch():
    model, draws = _model(), SampleDraws(seed=7)
    draws.install(model)
    images = torch.randn(6, 3, 16, 16)
    draws.keys = KEYS
    whole = model(images)
    draws.keys = KEYS[2:4]
    torch.testing.assert_close(model(images[2:4]), whole[2:4])
    draws.keys = KEYS + 1
    assert not torch.allclose(model(images), whole)


def test_torch_s_generator_is_left_alone():
    model, draws = _model(), SampleDraws(seed=7)
    draws.install(model)
    draws.keys = KEYS
    before = torch.get_rng_state()
    model(torch.zeros(6, 3, 16, 16))
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_normal_and_layers_draw_apart():
    model, draws = _model(layers=[0, 1]), SampleDraws(seed=1)
    draws.install(model)
    draws.keys = torch.stack([torch.zeros(1000, dtype=torch.int64), torch.arange(1000)], dim=1)
    first, second = (layer.router.draw_noise(torch.zeros(5000, 4)) for _, layer in vmoe.moe_layers(model))
    assert abs(first.mean()) < 0.03 and abs(first.std() - 1) < 0.03
    assert abs((first.abs() < 1).float().mean() - 0.6827) < 0.02
    assert abs((first * second).mean()) < 0.03


def test_dropout_keeps_the_mean_and_drops_its_share():
    draws = SampleDraws(seed=1)
    model = nn.Sequential(nn.Dropout(0.25), DropPath(0.5))
    draws.install(model)
    draws.keys = torch.stack([torch.zeros(2000, dtype=torch.int64), torch.arange(2000)], dim=1)
    dropped = model[0](torch.ones(2000, 10))
    assert isinstance(model[0], SampleDropout)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs((dropped == 0).float().mean() - 0.25) < 0.02
    paths = model[1](torch.ones(2000, 3, 2)).flatten(1)
    assert set(paths.unique().tolist()) == {0.0, 2.0} and bool((paths == paths[:, :1]).all())
    assert abs(paths.mean() - 1) < 0.06
    assert torch.equal(model.eval()(torch.ones(2000, 10)), torch.ones(2000, 10))


def test_what_draws_within_a_kernel_is_refused():
    with pytest.raises(UserError, match=r"parallel.draws=sample: blocks.1.mlp draws in its experts"):
        SampleDraws(0).install(_model(expert_dropout=0.1))


@pytest.mark.parametrize("module", [PatchDropout(0.25), nn.Dropout2d(0.1)])
def test_what_draws_in_a_way_of_its_own_is_refused(module):
    told = rf"parallel.draws=sample: 1 \({type(module).__name__}\) draws"
    with pytest.raises(UserError, match=told):
        SampleDraws(0).install(nn.Sequential(nn.Dropout(0.1), module))
    SampleDraws(0).install(nn.Sequential(type(module)(0.0)))
