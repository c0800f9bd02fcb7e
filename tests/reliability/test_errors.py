"""Every mistake of the table is one line and exit code 2, writes nothing, and is in docs/errors.md as it is printed."""

from pathlib import Path

import pytest
from reliability.errors_page import answer, line_of, row
from reliability.mistakes import MISTAKES
from reliability.spoilt import spoil

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| mistake |")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("spoilt")
    spoil(path)
    return path


def _state(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("job", "mistake"),
    [
        pytest.param(job, mistake, id=f"{job}: {mistake.what}")
        for job, mistakes in MISTAKES.items()
        for mistake in mistakes
    ],
)
def test_a_mistake_is_the_documented_line(folder, monkeypatch, job, mistake):
    monkeypatch.chdir(folder)
    before = _state(folder)
    code, error = answer(job, mistake)
    assert code == 2, error
    assert error.startswith(f"vmoe {job}: error: " if job else "vmoe: error: ") and error.count("\n") == 1
    assert _state(folder) == before, "something was written"
    found = row(mistake, line_of(error, mistake))
    assert found in ROWS, f"now {found}; to renew the page: python tests/reliability/errors_page.py > docs/errors.md"


def test_the_page_tells_of_nothing_else():
    assert len(ROWS) == sum(map(len, MISTAKES.values())) >= 80
