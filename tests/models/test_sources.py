"""Models that a folder or a hub describes, by timm's own names."""

import json

import pytest
from support import local_hub

from vmoe.errors import UserError
from vmoe.models.sources import architecture_of, with_source


def test_names_of_the_hub_s_timm():
    assert with_source("timm/vit_tiny_patch16_224.augreg_in21k") == "vit_tiny_patch16_224.augreg_in21k"
    assert with_source("timm/of_another_version") == "hf-hub:timm/of_another_version"
    assert with_source("vit_tiny_patch16_224") == "vit_tiny_patch16_224"
    assert architecture_of("timm/vit_tiny_patch16_224", {"depth": 2}) == ("vit_tiny_patch16_224", {"depth": 2})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architecture": "vit_tiny_patch16_224", "input_size": [3, 9, 9]}, ("vit_tiny_patch16_224", {"depth": 2})),
        (
            {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 3, "num_heads": 2, "img_size": 32}},
            ("vit_tiny_patch16_224", {"depth": 2, "num_heads": 2}),
        ),
        (
            {"architecture": "vmoe_on_backbone", "model_args": {"backbone": "vit_tiny_patch16_224", "moe": {}}},
            ("vit_tiny_patch16_224", {"depth": 2}),
        ),
    ],
)
def test_a_folder_s_architecture_and_arguments(tmp_path, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert architecture_of(f"local-dir:{tmp_path}", {"depth": 2}) == expected


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"architecture": "hf-hub:a/b"}', '{"architecture": 3}'])
def test_a_folder_without_a_model_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.name=local-dir:"):
        architecture_of(f"local-dir:{tmp_path}", {})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with the one model me/model."""
    content = {"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 3}, "pretrained_cfg": {}}
    with local_hub.serving({"me/model/config.json": json.dumps(content).encode()}, tmp_path, monkeypatch):
        yield


def test_a_model_of_the_hub_is_known_by_timm_s_own_name(hub):
    """So that its checkpoint needs no hub."""
    assert architecture_of("hf-hub:me/model", {"drop_rate": 0.1}) == (
        "vit_tiny_patch16_224",
        {"depth": 3, "drop_rate": 0.1},
    )
    with pytest.raises(UserError, match=r"model\.name=hf-hub:me/other: its config\.json cannot be fetched"):
        architecture_of("hf-hub:me/other", {})


def test_a_released_model_is_known_by_its_backbone():
    """So that a run's checkpoint opens by any version of the table."""
    name, kwargs = architecture_of("vmoe_s32_last2.ilsvrc2012", {"depth": 2})
    assert name == "vmoe_vit" and kwargs["depth"] == 2 and kwargs["pre_logits"] == 512
