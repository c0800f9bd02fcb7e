"""Recipes by name: which file `--config` means."""

import pytest

from vmoe.cli.train_options import parse
from vmoe.errors import UserError
from vmoe.training.recipes import FOLDER, find_recipe, recipe_names


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_are_those_of_the_files():
    assert {"digits", "cifar10_small", "studies/cifar100"} <= set(recipe_names())


@pytest.mark.parametrize("given", ["digits", "digits.yaml", "configs/digits.yaml"])
def test_a_name_means_the_packaged_recipe(elsewhere, given):
    assert find_recipe(given) == str(FOLDER / "digits.yaml")


def test_a_file_comes_before_a_recipe(elsewhere):
    (elsewhere / "digits.yaml").write_text("seed: 3\n")
    assert find_recipe("digits.yaml") == "digits.yaml"


def test_a_folder_does_not(elsewhere):
    (elsewhere / "digits").mkdir()
    assert find_recipe("digits") == str(FOLDER / "digits.yaml")


@pytest.mark.parametrize("given", ["../configs/digits", "nothing", "x/digits.yaml"])
def test_other_paths_stay_as_they_are(elsewhere, given):
    assert find_recipe(given) == given


@pytest.mark.parametrize("argv", [["--config", "digits"], ["--config=digits"]])
def test_a_run_is_named_after_its_recipe(elsewhere, argv):
    assert parse(argv).output_dir == "runs/digits"


def test_an_unknown_name_is_told_what_may_be_given(elsewhere):
    with pytest.raises(UserError, match=r"--config digist: cannot be read .*a recipe's name, such as digits"):
        parse(["--config", "digist"])
