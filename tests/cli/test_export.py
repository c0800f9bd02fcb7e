"""`vmoe export`."""

import json

import pytest

from vmoe.cli.evaluate import main as evaluate
from vmoe.cli.export import main


def test_a_shared_file_is_evaluated_as_its_checkpoint(save_run, tmp_path, capsys):
    run = save_run(moe={"num_experts": 2, "top_k": 1, "layers": [1]})
    shared = tmp_path / "shared.safetensors"
    assert main([str(run), "--out", str(shared)]) == 0
    assert "shared.safetensors: " in capsys.readouterr().out
    for source, out in ((run, "a.json"), (shared, "b.json")):
        assert evaluate([str(source), "--json", str(tmp_path / out)]) == 0
    found, expected = (json.loads((tmp_path / name).read_text()) for name in ("b.json", "a.json"))
    assert found["results"][0]["top1"] == expected["results"][0]["top1"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "--out", "x.safetensors"], "nowhere: no such file"),
        (["nowhere", "--out", "x.bin"], "--out x.bin: must end in .safetensors"),
        (["nowhere", "--out", "x.safetensors", "--dtype", "int8"], "--dtype"),
    ],
)
def test_mistakes_are_one_line(arguments, told, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
