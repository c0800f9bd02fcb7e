"""Where nobody watches a bar, a job that works says so in lines."""

import sys
import time

import pytest

from vmoe.cli import progress
from vmoe.cli.progress import Tracked, working
from vmoe.progress import shown


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.02)


def lines_of(capsys, count):
    """The first lines, as soon as they are there."""
    found, end = "", time.monotonic() + 5
    while found.count("\n") < count and time.monotonic() < end:
        time.sleep(0.01)
        found += capsys.readouterr().err
    return found.splitlines()


def test_a_long_step_says_how_far_the_job_is(capsys):
    steps = iter(Tracked(range(120), "causes"))
    for _ in range(3):
        next(steps)
    assert {line.partition(",")[0] for line in lines_of(capsys, 2)} == {"causes: 2 of 120"}
    steps.close()
    capsys.readouterr()
    time.sleep(0.06)
    assert capsys.readouterr().err == ""


def test_of_blocks_in_each_other_the_inner_one_speaks(capsys):
    with working("exploring"):
        assert lines_of(capsys, 1)[0] == "exploring, 0 s"
        with working("drawing\x1b"):
            capsys.readouterr()
            assert lines_of(capsys, 2)[1] == r"drawing\x1b, 0 s"
        capsys.readouterr()
        assert lines_of(capsys, 2)[1] == "exploring, 0 s"


def test_many_short_steps_say_something_together(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.2)
    started = time.monotonic()
    while time.monotonic() < started + 0.5:
        with working("a corruption"):
            time.sleep(0.02)
    assert 1 <= capsys.readouterr().err.count("a corruption, 0 s\n") <= 2


def test_what_is_short_says_nothing(capsys, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 10.0)
    assert list(Tracked([1, 2], "predicting")) == [1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_notebook", [False, True])
def test_the_library_s_bar_is_shown_where_somebody_watches(monkeypatch, capsys, is_notebook):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if is_notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert list(shown(range(3), "predicting", True)) == [0, 1, 2]
    assert ("predicting" in capsys.readouterr().err) == is_notebook
