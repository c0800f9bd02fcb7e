"""The notebooks run from top to bottom, and what they show is what they print."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks run by nbformat and nbclient")
nbclient = pytest.importorskip("nbclient", reason="notebooks run by nbformat and nbclient")

REPOSITORY = Path(__file__).parents[1]
NAMES = ("tutorial", "own_pictures", "experts")


def read(name):
    return nbformat.read(REPOSITORY / "docs" / f"{name}.ipynb", as_version=4)


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def pictures(notebook) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def accuracies(notebook) -> list[float]:
    return [float(each) for each in re.findall(r"test (?:accuracy|top-1) ([\d.]+)%", printed(notebook))]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_was_saved_after_one_whole_run(name):
    notebook = read(name)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert pictures(notebook) >= 1 and not re.search(r"/tmp|/home|/work|Warning", printed(notebook))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_and_shows_the_same(name, tmp_path):
    (tmp_path / "assets").symlink_to(REPOSITORY / "assets")
    notebook = read(name)
    shown, drawn = accuracies(notebook), pictures(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert pictures(notebook) == drawn
    # Sums differ a little from machine to machine
    assert accuracies(notebook) == pytest.approx(shown, abs=5 if name == "tutorial" else 10)
    if name == "tutorial":
        load = re.findall(r"load \[(.+)\]", printed(notebook))[-1]
        assert accuracies(notebook)[0] > 85 and all(float(share) > 0.05 for share in load.split())
