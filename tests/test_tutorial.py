"""The tutorial notebook runs from top to bottom, and what it shows is what it prints."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the tutorial runs by nbformat and nbclient")
nbclient = pytest.importorskip("nbclient", reason="the tutorial runs by nbformat and nbclient")

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def notebook():
    return nbformat.read(REPOSITORY / "docs" / "tutorial.ipynb", as_version=4)


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def accuracy(notebook) -> float:
    return float(re.search(r"test accuracy ([\d.]+)%", printed(notebook))[1])


def test_notebook_was_saved_after_one_whole_run(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert "image/png" in str(notebook) and accuracy(notebook) > 85


@pytest.mark.slow
def test_notebook_runs_and_learns(notebook):
    shown = accuracy(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(REPOSITORY)}}).execute()
    assert accuracy(notebook) == pytest.approx(shown, abs=5)  # sums differ a little from machine to machine
    load = re.findall(r"load \[(.+)\]", printed(notebook))[-1]
    assert all(float(share) > 0.05 for share in load.split())
