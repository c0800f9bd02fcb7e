"""Settings of the data room: what is refused, and that the command line can teach them."""

import pytest
from jsonargparse import auto_cli, auto_parser

from vmoe.config_values import from_plain
from vmoe.data import AugmentConfig, DataConfig, MixConfig, SubsetConfig
from vmoe.data.config import DEFAULTS, TableConfig, nearest
from vmoe.errors import UserError


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (DataConfig, {"batch_size": 0}, "batch_size=0: must be from 1 to"),
        (DataConfig, {"eval_batch_size": 0}, "eval_batch_size=0: must be from 1 to"),
        (DataConfig, {"workers": -1}, "workers=-1: must be from 0 to 256"),
        (DataConfig, {"val_fraction": 1.0}, "val_fraction=1.0: must be from 0 to under 1"),
        (DataConfig, {"val_fraction": -0.1}, "val_fraction=-0.1"),
        (DataConfig, {"val_fraction": float("nan")}, "val_fraction=nan"),
        (DataConfig, {"image_size": 0}, "image_size=0"),
        (DataConfig, {"split_seed": -1}, "split_seed=-1"),
        (DataConfig, {"mean": (0.5, 0.5)}, "mean=.*three numbers"),
        (DataConfig, {"std": (0.5, 0.5, 0.0)}, "std=.*over 0"),
        (DataConfig, {"name": "cifar"}, "name='cifar': must be one of digits, .*did you mean 'cifar10'"),
        (DataConfig, {"sampler": "balanced"}, "sampler='balanced': .*did you mean 'class_balanced'"),
        (DataConfig, {"sampler": "class_balanced", "name": "fractals"}, "sampler=class_balanced: .*take shuffle"),
        (DataConfig, {"sampler": "class_balanced", "name": "webdataset"}, "sampler=class_balanced: .*shard by shard"),
        (
            DataConfig,
            {"sampler": "class_balanced", "mix": MixConfig(mixup_alpha=1, until=0.5)},
            "sampler=class_balanced: .*leave mix.until at 1",
        ),
        (TableConfig, {"separator": " "}, "separator=' ': must be a mark"),
        (TableConfig, {"columns": "other"}, "columns='other': must be a list of columns, or others"),
        (TableConfig, {"columns": ["a", "a"]}, "columns=.* names a column twice"),
        (TableConfig, {"columns": ["a"], "label": "b"}, "label=b: cannot be combined with columns"),
        (SubsetConfig, {"imbalance": 0.01}, "imbalance=0.01: must be from 1"),
        (SubsetConfig, {"imbalance": 10, "fraction": 0.5}, "imbalance=10: cannot be combined with fraction=0.5"),
        (AugmentConfig, {"preset": "strnog"}, "preset='strnog'.*did you mean 'strong'"),
        (AugmentConfig, {"flip": 1.5}, "flip=1.5: must be from 0 to 1"),
        (AugmentConfig, {"flip": float("nan")}, "flip=nan"),
        (AugmentConfig, {"crop_scale": (0.9, 0.5)}, "crop_scale=.*smallest <= largest"),
        (AugmentConfig, {"crop_scale": (0.5, 1.0), "crop_padding": 4}, "crop_padding=4: cannot be combined"),
        (AugmentConfig, {"randaugment_magnitude": 31}, "randaugment_magnitude=31: must be a whole number from 0 to 30"),
        (AugmentConfig, {"randaugment_magnitude": (9, 8)}, r"randaugment_magnitude=\(9, 8\): .* \[lowest, highest\]"),
        (AugmentConfig, {"randaugment_magnitude": (0, 31)}, r"randaugment_magnitude=\(0, 31\): .* from 0 to 30"),
        (AugmentConfig, {"randaugment_magnitude": (-1, 9)}, r"randaugment_magnitude=\(-1, 9\)"),
        (AugmentConfig, {"randaugment_magnitude": (1, 2, 3)}, r"randaugment_magnitude=\(1, 2, 3\)"),
        (AugmentConfig, {"randaugment_magnitude": (0.5, 9)}, r"randaugment_magnitude=\(0.5, 9\): .* whole number"),
        (AugmentConfig, {"color_jitter": -0.1}, "color_jitter=-0.1"),
        (AugmentConfig, {"erasing": 2}, "erasing=2"),
        (
            DataConfig,
            {"pipeline": "devices"},
            "pipeline='devices': must be one of workers, device; did you mean 'device'",
        ),
        (MixConfig, {"mixup_alpha": -1}, "mixup_alpha=-1: must be from 0 to 100"),
        (MixConfig, {"cutmix_alpha": float("nan")}, "cutmix_alpha=nan"),
        (MixConfig, {"prob": 1.5}, "prob=1.5: must be from 0 to 1"),
        (MixConfig, {"switch_prob": -0.5}, "switch_prob=-0.5"),
        (MixConfig, {"until": 2}, "until=2: must be from 0 to 1"),
        (SubsetConfig, {"fraction": 0.0}, "fraction=0.0: must be over 0 and at most 1"),
        (SubsetConfig, {"per_class": 0}, "per_class=0: must be at least 1"),
        (SubsetConfig, {"fraction": 0.5, "per_class": 3}, "per_class=3: cannot be combined with fraction=0.5"),
        (SubsetConfig, {"classes": []}, "must name at least one class"),
    ],
)
def test_bad_values_are_refused_by_name_and_value(make, value, message):
    with pytest.raises(ValueError, match=message):
        make(**value)


def take(data: DataConfig) -> DataConfig:
    return data


@pytest.mark.parametrize("file", ["", r"runs\1/best.ckpt: "])
def test_each_option_of_a_line_has_its_section(file):
    with pytest.raises(UserError) as error:
        from_plain(DataConfig, {"name": "folder", "channels": 4, "pipeline": "device"}, f"{file}data.")
    line = "data.channels=4: data.pipeline=device holds RGB of 8 bits; take data.pipeline=workers"
    assert str(error.value) == f"{file}{line}"


def test_command_line_reads_every_setting_and_its_help():
    arguments = ["--data.name=cifar10", "--data.subset.classes=[cat, 3]", "--data.augment.crop_scale=[0.3, 1.0]"]
    assert auto_cli(take, args=arguments) == DataConfig(
        name="cifar10", subset=SubsetConfig(classes=["cat", 3]), augment=AugmentConfig(crop_scale=(0.3, 1.0))
    )
    help_text = " ".join(auto_parser(take).format_help().split())
    for sentence in ("images per step in validation and test", "strength of RandAugment", "labels are renumbered"):
        assert sentence in help_text


def test_default_values_of_every_set_are_valid():
    for name, defaults in DEFAULTS.items():
        config = DataConfig(name=name, image_size=defaults.image_size, mean=defaults.mean, std=defaults.std)
        assert AugmentConfig(flip=defaults.flip).flip == (0.0 if config.name in ("digits", "fractals") else 0.5)


def test_nearest_names_ignore_case():
    assert nearest("Cats", ["cat", "dog"]) == "did you mean 'cat'?"
    assert nearest("zebra", ["cat", "dog"]) == ""
