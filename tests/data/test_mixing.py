"""Mixup and CutMix: torchvision's formulas at equal parameters, and what shares and partners depend on."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import v2

from vmoe.data import MixConfig
from vmoe.data.mixing import Mixer, make_mixer, mix

CPU = torch.device("cpu")
FOREVER = float("inf")


def mixer(seed=0, classes=10, **config):
    return Mixer(MixConfig(**config), classes, seed, CPU)


def keys_of(count, epoch=0):
    return torch.stack([torch.full((count,), epoch), torch.randperm(count, generator=torch.Generator())], dim=1)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 3, 12, 16, generator=generator)
    return images, torch.randint(10, (24,), generator=generator), keys_of(24)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_cutmix_of_a_group_is_torchvisions(batch, alpha, seed):
    images, labels = batch[0][:8], batch[1][:8]
    theirs = v2.CutMix(alpha=alpha, num_classes=10)
    torch.manual_seed(seed)
    share = theirs._dist.sample(())
    x, y = torch.randint(16, ()), torch.randint(12, ())
    torch.manual_seed(seed)
    expected = theirs(images, labels)
    centres = torch.stack([(x + 0.5) / 16, (y + 0.5) / 12])[:, None].expand(2, 8)
    found = mix(images, labels, share.expand(8), torch.ones(8, dtype=torch.bool), centres, 10)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_mixup_of_a_group_is_torchvisions(batch, share, monkeypatch):
    images, labels = batch[0][:8], batch[1][:8]
    theirs = v2.MixUp(num_classes=10)
    monkeypatch.setattr(theirs._dist, "sample", lambda *_: torch.tensor(share))
    expected = theirs(images, labels)
    found = mix(images, labels, torch.full((8,), share), torch.zeros(8, dtype=torch.bool), torch.rand(2, 8), 10)
    torch.testing.assert_close(found, expected)


def test_every_image_has_its_own_share(batch):
    images, labels, _ = batch
    shares = torch.linspace(0, 1, 24)
    found, targets = mix(images, labels, shares, torch.zeros(24, dtype=torch.bool), torch.rand(2, 24), 10)
    for place in range(24):
        group = place // 8 * 8
        partner = group + (place - group - 1) % 8
        share = shares[place]
        torch.testing.assert_close(found[place], share * images[place] + (1 - share) * images[partner])
        target = torch.zeros(10)
        target[labels[place]] += share
        target[labels[partner]] += 1 - share
        torch.testing.assert_close(targets[place], target)


@pytest.mark.parametrize("config", [{"mixup_alpha": 0.8}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 1, "cutmix_alpha": 1}])
def test_groups_know_nothing_of_each_other(batch, config):
    """So that a process which holds some of the groups gets what one process gets."""
    images, labels, keys = batch
    found, targets = mixer(**config)(images, labels, keys, FOREVER)
    for start, end in ((0, 8), (8, 24), (16, 24)):
        part = mixer(**config)(images[start:end], labels[start:end], keys[start:end], FOREVER)
        assert torch.equal(part[0], found[start:end]) and torch.equal(part[1], targets[start:end])
    assert not torch.equal(found, images)
    torch.testing.assert_close(targets.sum(1), torch.ones(24))
    assert not torch.equal(mixer(seed=1, **config)(images, labels, keys, FOREVER)[0], found)
    later = torch.stack([keys[:, 0] + 1, keys[:, 1]], 1)
    assert not torch.equal(mixer(**config)(images, labels, later, FOREVER)[0], found)


def test_an_incomplete_group_is_a_smaller_circle(batch):
    images, labels, keys = (part[:11] for part in batch)
    found, targets = mixer(mixup_alpha=1)(images, labels, keys, FOREVER)
    alone = mixer(mixup_alpha=1)(images[8:], labels[8:], keys[8:], FOREVER)
    assert torch.equal(alone[0], found[8:]) and torch.equal(alone[1], targets[8:])
    single, target = mixer(mixup_alpha=1)(images[:1], labels[:1], keys[:1], FOREVER)
    torch.testing.assert_close(single, images[:1])
    torch.testing.assert_close(target[0, labels[0]], torch.tensor(1.0))


def shares_of(count=4000, **config):
    """Shares that images keep: odd images are white and have label 1, even ones are black."""
    parity = torch.arange(count) % 2
    images = parity[:, None, None, None].float().expand(-1, 3, 32, 32).contiguous()
    mixed, targets = mixer(classes=2, **config)(images, parity, keys_of(count), FOREVER)
    shares = targets.gather(1, parity[:, None])[:, 0]
    kept = (mixed - images).abs().mean((1, 2, 3))
    torch.testing.assert_close(kept, 1 - shares, atol=1e-4, rtol=0)  # targets tell what images hold
    is_cut = ((mixed == 0) | (mixed == 1)).flatten(1).all(1)
    return shares.numpy(), is_cut.numpy()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_shares_are_beta_distributed(alpha):
    shares, _ = shares_of(mixup_alpha=alpha)
    inside = shares[(shares > 1e-3) & (shares < 1 - 1e-3)]
    low, high = stats.beta(alpha, alpha).cdf([1e-3, 1 - 1e-3])
    assert stats.kstest((stats.beta(alpha, alpha).cdf(inside) - low) / (high - low), "uniform").pvalue > 1e-3
    assert abs(len(inside) / len(shares) - (high - low)) < 0.03


def test_cutmix_shares_and_probabilities():
    shares, is_cut = shares_of(cutmix_alpha=1.0)
    assert is_cut.all() and shares.min() >= 0 and 0.6 < shares.mean() < 0.75  # rectangles lose what is outside
    shares, is_cut = shares_of(mixup_alpha=1.0, cutmix_alpha=1.0, switch_prob=0.25)
    assert abs(is_cut.mean() - 0.25) < 0.03
    shares, _ = shares_of(mixup_alpha=1.0, prob=0.3)
    assert abs((shares < 1).mean() - 0.3) < 0.03
    assert (shares_of(mixup_alpha=1.0, prob=0.0)[0] == 1).all()


def test_nothing_is_mixed_from_an_epoch_on(batch):
    images, labels, _ = batch
    for epoch, is_mixed in ((0, True), (7, True), (8, False), (9, False)):
        found, targets = mixer(mixup_alpha=1.0)(images, labels, keys_of(24, epoch), 7.5)
        assert torch.equal(found, images) != is_mixed
        assert torch.equal(targets, torch.eye(10)[labels]) != is_mixed


def test_an_epoch_can_be_part_mixed_and_part_not(batch):
    images, labels, keys = batch
    keys[12:, 0] = 5
    found, _ = mixer(mixup_alpha=1.0)(images, labels, keys, 5)
    assert torch.equal(found[12:], images[12:]) and not np.any(torch.eq(found[:12], images[:12]).numpy().all((1, 2, 3)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"until": 0.5}, "data.mix has no effect: mixup_alpha and cutmix_alpha are both 0"),
        ({"cutmix_alpha": 1.0, "switch_prob": 0.9}, "data.mix.switch_prob=0.9 has no effect: only one"),
    ],
)
def test_a_setting_without_effect_is_warned_about(config, message):
    with pytest.warns(UserWarning, match=message):
        made = make_mixer(MixConfig(**config), 10, 0, CPU)
    assert (made is None) == ("until" in config)


def test_nothing_to_mix_needs_no_mixer(recwarn):
    assert make_mixer(MixConfig(), 10, 0, CPU) is None
    assert make_mixer(MixConfig(mixup_alpha=0.2, cutmix_alpha=1, switch_prob=0.9), 10, 0, CPU) is not None
    assert not recwarn
