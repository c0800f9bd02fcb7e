"""`vmoe models` lists what opens by name."""

import json

import pytest
import timm

from vmoe.cli.main import main
from vmoe.models.cost import count_parameters
from vmoe.models.registry import NAMED
from vmoe.models.released import RELEASED


def test_it_lists_released_models_and_architectures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert main(["models", "--json", str(tmp_path / "models.json")]) == 0
    told, found = capsys.readouterr().out, json.loads((tmp_path / "models.json").read_text())
    assert all(name in told for name in (*RELEASED, *NAMED)) and "cifar100_tiny.safetensors: 1.6 MB" in told
    assert "capacity factor 1.5" in told and "85.6 %" in told and " here" not in told.replace("is it here", "")
    sizes = {row["name"]: row["parameters"] for row in found["architectures"]}
    name = "vmoe_small_patch32_last2_e8"
    assert sizes[name] == [*count_parameters(timm.create_model(name, device="meta"))]
    assert found["released"][0]["license"] == "apache-2.0" and found["released"][0]["file"] is None


def test_its_mistakes_are_one_line(tmp_path, capsys):
    assert main(["models", "--json", str(tmp_path)]) == 2
    line = capsys.readouterr().err
    assert "is a folder, and a file is to be written" in line and line.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_the_table_s_sizes_are_those_of_the_models(name):
    assert RELEASED[name].parameters == count_parameters(timm.create_model(name, device="meta"))
