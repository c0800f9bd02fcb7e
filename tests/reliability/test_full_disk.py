"""A disk that is full ends every writer in one line, with exit code 2, and leaves nothing under the result's name."""

import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import saved_runs

from vmoe.cli.common import run
from vmoe.cli.main import main
from vmoe.errors import UserError

MOE = {"num_experts": 3, "layers": [1, 3]}
JAX = Path(__file__).parents[1] / "fixtures" / "vmoe_jax_token" / "vmoe_tiny_token"
SWIN = Path(__file__).parents[1] / "fixtures" / "swin_moe" / "tiny_dense"
ROOM = 40_000  # bytes, by which files can grow: less than any of the weights and shards


@contextmanager
def small_files():
    """No file of this process grows larger: Python ignores the signal, so writes fail as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    saved_runs.save_run(folder / "run", MOE)
    noise = np.random.default_rng(0)
    for place in ("train/a", "train/b", "val/a"):
        (folder / "tree" / place).mkdir(parents=True)
        Image.fromarray(noise.integers(0, 256, (150, 150, 3), dtype=np.uint8)).save(folder / "tree" / place / "1.png")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        "export {run} --out {new}.safetensors",
        "export {run} --out {new} --format hub",
        "export {run} --out {new}.pt2 --format torch-export",
        pytest.param("export {run} --out {new}.onnx --format onnx", marks=pytest.mark.slow),
        "consolidate {run} --out {new}.safetensors",
        "prune {run} --keep 2 --images 64 --out {new}",
        "distill {run} --out {new} -- --trainer.epochs 1",
        "make-shards {tree} --out {new}",
        "import-jax {jax} --out {new}.ckpt",
        "import-jax {jax} --out {new}.safetensors",
        "import-swin {swin} --out {new}.safetensors",
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(sources, tmp_path, capsys, arguments):
    if "onnx" in arguments:
        pytest.importorskip("onnxscript")
    new = tmp_path / "inner" / "new"
    places = {"run": sources / "run", "tree": sources / "tree", "new": new, "jax": JAX, "swin": SWIN}
    words = arguments.format(**places).split()
    with small_files():
        assert main(words) == 2
    # a slow export also prints every 10 s that it is under way
    (error,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("exporting to"))
    result = next(word for word in words if word.startswith(str(new)))
    assert error.startswith(f"vmoe {words[0]}: error: {result}") and "cannot be written (File too large)" in error
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(("words", "who"), [(["models"], "vmoe models"), (["--help"], "vmoe")])
def test_output_to_a_full_disk_is_one_line(monkeypatch, capsys, words, who):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"{who}: error: the output cannot be written (No space left on device)")


def _fails_after_printing(error: BaseException):
    def job(_: list[str]) -> int:
        print("begins")
        raise error

    return job


@pytest.mark.parametrize("error", [KeyError("a bug"), UserError("a mistake"), KeyboardInterrupt()])
def test_a_full_disk_hides_no_other_error(monkeypatch, capsys, error):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        if isinstance(error, KeyError):
            with pytest.raises(KeyError):
                run(_fails_after_printing(error), [])
        else:
            assert run(_fails_after_printing(error), []) == (2 if isinstance(error, UserError) else 130)
            line = "error: a mistake" if isinstance(error, UserError) else "interrupted"
            assert capsys.readouterr().err.strip().endswith(line)
