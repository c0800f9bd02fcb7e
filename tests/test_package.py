"""The wheel, as somebody without the repository gets it, and the oldest versions that it promises to work with."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from vmoe.version import __version__

slow = pytest.mark.slow  # builds the wheel or runs it in a process of its own
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Runs `vmoe ...` of the unpacked wheel in an empty folder."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    job = "import sys; from vmoe.cli.main import main; sys.exit(main())"

    def vmoe(*arguments):
        return subprocess.run(
            [sys.executable, "-c", job, *arguments],
            cwd=tmp_path_factory.mktemp("empty"),
            env=os.environ | {"PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
        )

    return vmoe


@slow
def test_wheel_holds_what_is_not_code(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    recipes = {f"vmoe/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "configs").rglob("*.yaml")}
    folders = [REPOSITORY / name for name in ("vmoe/explain/page/assets", "vmoe/serve/page", "vmoe/data/samples")]
    page = {str(path.relative_to(REPOSITORY)) for folder in folders for path in folder.iterdir() if path.is_file()}
    assert recipes and page
    assert {"vmoe/py.typed", *recipes, *page} <= names
    assert not [name for name in names if not name.startswith(("vmoe/", f"vmoe-{__version__}.dist-info/"))]


@slow
def test_the_package_index_would_take_both_archives(tmp_path):
    pytest.importorskip("twine")
    for command in (["build", "--no-isolation", "--outdir", tmp_path, REPOSITORY], ["twine", "check", "--strict"]):
        files = sorted(tmp_path.iterdir())  # none for the first
        done = subprocess.run([sys.executable, "-m", *command, *files], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert [file.suffix for file in files] == [".whl", ".gz"] and done.stdout.count("PASSED") == 2


def test_the_citation_names_the_version_and_the_licence():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__ and citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0" and citation["title"] and citation["authors"] and citation["message"]


@slow
def test_the_steps_of_the_image_for_cpus(tmp_path):
    """Without its base image, and with the packages that are installed here: no network is needed."""
    site = venv_of(tmp_path / "venv")
    places = {place: str(tmp_path / place[1:]) for place in ("/src", "/wheels", "/work")}
    environment = os.environ | {
        "PATH": f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # as pip reads it: no isolation
        "PIP_NO_INDEX": "1",
    }
    for stage in ("wheel", "cpu"):
        here = tmp_path
        for word, rest in steps_of_image(stage):
            for place, other in places.items():
                rest = re.sub(rf"(?<![\w/]){place}(?![\w])", other, rest)
            if word == "WORKDIR":
                here = Path(rest)
                here.mkdir(parents=True, exist_ok=True)
            elif word == "COPY" and not rest.startswith("--from"):
                *sources, target = rest.split()
                for source in sources:
                    copy = shutil.copytree if (REPOSITORY / source).is_dir() else shutil.copy
                    copy(REPOSITORY / source, here / target / (source if target == "./" else ""))
            elif word == "RUN" and not rest.startswith("chown"):
                done = subprocess.run(rest, shell=True, cwd=here, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
            elif word == "ENTRYPOINT":
                entry = yaml.safe_load(rest)
    assert here == tmp_path / "work" and (site / "vmoe" / "configs" / "digits.yaml").is_file()
    picture = REPOSITORY / "vmoe" / "data" / "samples" / "china.jpg"
    model = REPOSITORY / "assets" / "models" / "cifar100_tiny.safetensors"
    done = subprocess.run(
        [*entry, "predict", model, picture], cwd=here, env=environment, capture_output=True, text=True
    )
    assert "china.jpg: " in done.stdout, done.stderr


def venv_of(folder):
    """Makes an environment that sees the packages installed here; returns its own site-packages."""
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    here = next(path for path in sys.path if (Path(path) / "torch").is_dir())
    (site / "those_here.pth").write_text(here)
    return site


def steps_of_image(stage):
    """(instruction, rest) of one stage of tools/docker/Dockerfile."""
    text = (REPOSITORY / "tools" / "docker" / "Dockerfile").read_text(encoding="utf-8")
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    (body,) = (each for each in stages if each.splitlines()[0].endswith(f" AS {stage}"))
    lines = [line for line in body.splitlines()[1:] if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


@slow
def test_installed_wheel_tells_its_version(installed):
    assert installed("--version").stdout == f"vmoe {__version__}\n"


@slow
def test_installed_wheel_trains_a_recipe_by_name(installed):
    size = ["--trainer.epochs", "1", "--data.subset.fraction", "0.1", "--output_dir", "run"]
    done = installed("train", "--config", "digits", *size)
    assert done.returncode == 0, done.stderr
    assert "all in run" in done.stdout


def test_lowest_versions_are_those_that_are_promised():
    """`make test-lowest` installs them: each is the lower bound of pyproject.toml."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    tested = ("train", "analysis", "tune", "cluster", "jax", "export", "serve", "webdataset", "data", "completion")
    lines = [*project["dependencies"], *(line for extra in tested for line in extras[extra]), *extras["loggers"][:1]]
    promised = {(requirement := Requirement(line)).name: requirement for line in lines}
    lowest_lines = (REPOSITORY / "tests" / "lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lowest_lines if not line.startswith("#"))
    assert lowest.keys() == promised.keys()
    for name, requirement in promised.items():
        (bound,) = (each for each in requirement.specifier if each.operator == ">=")
        least, installed = Version(bound.version).release, Version(lowest[name]).release
        assert installed[: len(least)] == least and not any(installed[len(least) : 3]), name
