"""Configurations drawn at random: a run is made ready, or one line says why not; never a traceback."""

import contextlib
import datetime
import io
import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmoe.cli.train import main
from vmoe.training.config import TrainConfig
from vmoe.training.options import option_names
from vmoe.training.run import train as run

# Not drawn: what would fetch data or weights, and sizes that only need memory.
LEFT_OUT = {"output_dir", "resume", "init_from", "data.name", "model.name", "parallel.strategy"}
OPTIONS = [name for name in option_names(TrainConfig) if name not in LEFT_OUT]
KWARGS = ["depth", "embed_dim", "num_heads", "patch_size", "mlp_ratio", "drop_path_rate", "act_layer", "norm_layer"]
OPTIONS += [f"model.kwargs.{name}" for name in KWARGS]
CHOICES = {
    "data.name": ["digits", "folder", "npz", "webdataset", "digitz", "", 3, None],
    "model.name": ["vit_tiny_patch16_224", "resnet18", "swin_tiny_patch4_window7_224", "", "../x", "a b", 7, None],
    "parallel.strategy": ["none", "auto", "ddp", "fsdp", "expert", "", None],
}
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 16, 10**20, -(10**20), 0.0, 0.1, 0.5, 1.0, 1.5, 1e-30, 1e30])
WORDS = st.sampled_from(
    ["", " ", "null", "none", "auto", "every-2", "last-1", "image", "batch", "token_choice", "soft", "expert_choice",
     "sigmoid", "hash", "round", "strong", "light", "muon", "fp16", "bf16", "nan", "inf", "-inf", "true", "[", "{", ":",
     "!!python/object:os.system", "../../x", "\x00", "\x1b[31m", "é\n", "a: b", "${x}", "--x"]
)  # fmt: skip
SCALARS = NUMBERS | WORDS | st.none() | st.booleans() | st.just(datetime.date(2026, 1, 1))
SCALARS |= st.sampled_from([float("nan"), float("inf"), -float("inf")])
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(WORDS, SCALARS, max_size=2)
PAIRS = st.one_of(
    st.tuples(st.sampled_from(OPTIONS), VALUES),
    *(st.tuples(st.just(name), st.sampled_from(choices)) for name, choices in CHOICES.items()),
    st.tuples(st.sampled_from(["data", "moe", "optim", "moe.expert", "lr", "", "data.augment.x"]), VALUES),
)
BASE = {
    "data": {"name": "digits", "batch_size": 40, "subset": {"per_class": 4}},
    "model": {
        "name": "vit_tiny_patch16_224",
        "kwargs": {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2},
    },
    "moe": {"num_experts": 4},
    "trainer": {"epochs": 1, "device": "cpu"},
}


class Ready(Exception):
    """All that comes before the first step is done."""


def _file(pairs: list[tuple]) -> str:
    """The base's YAML with each value at its dotted name."""
    content = json.loads(json.dumps(BASE))
    for name, value in pairs:
        *sections, last = name.split(".")
        place = content
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}
            place = place[section]
        place[last] = value
    return yaml.safe_dump(content)


def _text(value) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _check(folder, in_file: list[tuple], as_options: list[tuple]) -> None:
    (folder / "drawn.yaml").write_text(_file(in_file), encoding="utf-8")
    arguments = ["--config", str(folder / "drawn.yaml"), "--output_dir", str(folder / "run" / "deep")]
    for name, value in as_options:
        arguments += [f"--{name}", _text(value)]
    with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except Ready:
            (folder / "run" / "deep" / "config.yaml").unlink()
            return
    assert code == 2 and told.getvalue().count("\n") == 1, told.getvalue()
    assert told.getvalue().startswith("vmoe train: error: ")
    assert not (folder / "run").exists() or not list((folder / "run" / "deep").iterdir()), "something was written"


def _fuzz(folder, draws: int, monkeypatch) -> None:
    def stop(*_):
        raise Ready

    monkeypatch.setattr(run, "new_trainer", stop)

    @settings(max_examples=draws, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(st.lists(PAIRS, max_size=3), st.lists(PAIRS, max_size=3))
    def draw(in_file, as_options):
        _check(folder, in_file, as_options)

    draw()


def test_no_draw_of_20_ends_in_a_traceback(tmp_path, monkeypatch):
    _fuzz(tmp_path, 20, monkeypatch)


@pytest.mark.long
def test_no_draw_of_2000_ends_in_a_traceback(tmp_path, monkeypatch):
    _fuzz(tmp_path, 2000, monkeypatch)
