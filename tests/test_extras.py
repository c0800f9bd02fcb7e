"""What works with the core alone, and the one line that names the extra where it does not."""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image
from support.core_only import CORE

import vmoe
from vmoe.cli.main import EXTRAS_OF_JOBS, JOBS
from vmoe.extras import EXTRAS, MissingExtraError, missing_extra, require_extras, require_module

REPOSITORY = Path(__file__).parents[1]
MODEL = REPOSITORY / "assets" / "models" / "cifar100_tiny.safetensors"
USED = """
import json
import sys

import numpy as np
import torch
import vmoe

layer = vmoe.MoeMlp(8, 16, moe=vmoe.MoeConfig(num_experts=2, top_k=1))
assert layer(torch.zeros(2, 3, 8)).shape == (2, 3, 8)
model = vmoe.create_model("vmoe_tiny_patch4_32", num_classes=3)
with vmoe.record_routing(model) as trace:
    (model(torch.zeros(1, 3, 32, 32)).sum() + vmoe.auxiliary_loss(model)).backward()
assert trace.layers
model = vmoe.load(sys.argv[1])
"""
PREDICTED = """
picture = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
probabilities = model.predict([picture]).probabilities.tolist()
"""
# In one process, which takes seconds to begin: the jobs and names that need an extra, then `vmoe predict`
REFUSED = """
import contextlib
import io

import vmoe.data
from vmoe.cli.main import JOBS, main, run_job

lines = {}
for job in [*JOBS, "demo"]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert run_job(job, ["x"]) == 2
    lines[job] = said.getvalue()
for module, name in ((vmoe, "evaluate"), (vmoe, "load_jax_checkpoint"), (vmoe.data, "ImageDataModule")):
    try:
        getattr(module, name)
    except ImportError as error:
        lines[f"vmoe.{name}"] = f"{error}\\n"
with contextlib.redirect_stdout(io.StringIO()) as said:
    assert main(["predict", sys.argv[1], sys.argv[2], "--routing"]) == 0
print(json.dumps({"probabilities": probabilities, "lines": lines, "predicted": said.getvalue()}))
"""


def with_distributions(names, program, *arguments):
    """What a program prints where only the core and these distributions can be imported."""
    command = [sys.executable, "tests/support/core_only.py", names, program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def in_core(tmp_path_factory):
    """What the programs above print where only what `pip install vmoe` brings can be imported."""
    picture = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.new("RGB", (50, 40), "red").save(picture)
    return json.loads(with_distributions("", USED + PREDICTED + REFUSED, MODEL, picture))


def test_layers_models_and_prediction_need_the_core_alone(in_core):
    """And without OpenCV the numbers are the same."""
    with_all: dict = {"model": vmoe.load(MODEL), "np": np}
    exec(PREDICTED, with_all)
    assert in_core["probabilities"] == with_all["probabilities"]
    assert "red.png: " in in_core["predicted"] and "expert" in in_core["predicted"]


def test_what_needs_an_extra_says_so_in_a_line(in_core):
    told = in_core["lines"]
    assert all(line.count("\n") == 1 for line in told.values())
    for job, extras in EXTRAS_OF_JOBS.items():
        assert told[job].startswith(f"vmoe {job}: error: this needs ")
        assert told[job].endswith(f"not installed: pip install 'vmoe[{','.join(sorted(extras))}]'\n")
    assert told["vmoe.load_jax_checkpoint"] == "this needs msgpack, which is not installed: pip install 'vmoe[jax]'\n"
    for name in ("vmoe.evaluate", "vmoe.ImageDataModule"):
        assert told[name].endswith("pip install 'vmoe[train]'\n")


def test_a_package_is_looked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"needs scipy, which is not .*: pip install 'vmoe\[analysis\]'"):
        require_extras("analysis")
    with pytest.raises(ImportError, match=r"scipy and onnx, which are not .*: pip install 'vmoe\[export,train\]'"):
        require_extras("train", "export")
    with pytest.raises(ImportError, match=r"vmoe\[export\]"):
        require_module("onnx")
    require_module("onnxruntime")
    assert missing_extra("nonsense") is None and missing_extra(None) is None


def test_jobs_need_extras_that_there_are():
    assert EXTRAS_OF_JOBS.keys() <= {*JOBS, "demo"}
    assert {extra for extras in EXTRAS_OF_JOBS.values() for extra in extras} <= EXTRAS.keys()


def test_every_import_is_of_the_core_or_of_a_known_extra():
    owners = importlib.metadata.packages_distributions()
    core = {module for module, names in owners.items() if {name.lower() for name in names} & {*CORE}}
    known = core | {module for modules in EXTRAS.values() for module in modules}
    known |= {"anyio", "fastapi", "starlette"}  # litserve's
    known |= {"huggingface_hub"}  # timm's
    known |= {"triton", "filelock"}  # torch's, the first on Linux
    known |= {"psutil"}  # on Windows, where the extra `train` brings it
    known |= {"transformers"}  # which the benchmark of peers measures where it is installed
    for path in (REPOSITORY / "vmoe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"vmoe"}:
                assert name in known, f"{path} imports {name}, which no extra brings"


def test_pyproject_has_what_the_extras_import():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert {Requirement(line).name for line in project["dependencies"]} == {*CORE}
    owners = importlib.metadata.packages_distributions()
    for extra, modules in EXTRAS.items():
        brought = {Requirement(line).name for line in project["optional-dependencies"][extra]}
        for module in modules:
            assert module not in owners or brought & {*owners[module]}, f"{extra} does not bring {module}"


def brought_by(extra):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return " ".join(Requirement(line).name for line in project["optional-dependencies"][extra])


@pytest.mark.long
def test_each_extra_is_enough_for_its_jobs(tmp_path):
    program = "import sys; from vmoe.cli.main import main; raise SystemExit(main(sys.argv[1:]))"
    maps = REPOSITORY / "vmoe" / "data" / "samples" / "china.jpg", "--out", tmp_path / "maps"
    drawn = with_distributions(brought_by("analysis"), program, "heatmap", MODEL, *maps)
    assert "index.html, 1 figure" in drawn
    size = ["--trainer.epochs", "1", "--data.subset.fraction", "0.1", "--output_dir", tmp_path / "run"]
    train = brought_by("train") + " docstring-parser typeshed-client"  # of jsonargparse[signatures]
    trained = with_distributions(train, program, "train", "--config", "digits", *size)
    assert "TensorBoard's events are not written: this needs tensorboard" in trained
    evaluated = with_distributions(train, program, "evaluate", tmp_path / "run")
    assert "the confusion matrix is not drawn: this needs matplotlib" in evaluated


@pytest.mark.long  # downloads torch
def test_the_core_installed_into_an_environment_of_its_own(tmp_path):
    venv.create(tmp_path / "core", with_pip=True)
    python = tmp_path / "core" / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", str(REPOSITORY)], capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"pip cannot install here: {installed.stderr.splitlines()[-1]}")
    run = {"capture_output": True, "text": True, "cwd": tmp_path}
    used = subprocess.run([python, "-c", USED + PREDICTED, str(MODEL)], **run)
    assert used.returncode == 0, used.stderr
    refused = subprocess.run([tmp_path / "core" / "bin" / "vmoe", "train", "--config", "digits"], **run)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "'vmoe[train]'" in refused.stderr
