"""The wheel, as somebody without the repository gets it, and the oldest versions that it promises to work with."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
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
    tested = ("train", "analysis", "jax", "export", "serve", "webdataset", "data")
    lines = [*project["dependencies"], *(line for extra in tested for line in extras[extra]), *extras["loggers"][:1]]
    promised = {(requirement := Requirement(line)).name: requirement for line in lines}
    lowest_lines = (REPOSITORY / "tests" / "lowest.txt").read_text().splitlines()
    lowest = dict(line.split("==") for line in lowest_lines if not line.startswith("#"))
    assert lowest.keys() == promised.keys()
    for name, requirement in promised.items():
        (bound,) = (each for each in requirement.specifier if each.operator == ">=")
        least, installed = Version(bound.version).release, Version(lowest[name]).release
        assert installed[: len(least)] == least and not any(installed[len(least) : 3]), name
