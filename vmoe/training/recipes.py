"""The recipes that come with the package: a config is found by its file or, from any folder, by its name."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# A wheel holds them inside the package; a checkout and an editable install have them beside it.
FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def recipe_names() -> list[str]:
    """The names that `find_recipe` knows, such as "digits" and "studies/cifar100"."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def is_recipe(path: str) -> bool:
    """Whether a file is one of them."""
    return FOLDER.resolve() in Path(path).resolve().parents


def find_recipe(given: str) -> str:
    """The file that a user means: the path as given or, where there is no such file, the recipe of that name.

    Args:
        given: A path, or a recipe as "digits", "digits.yaml" or "configs/digits.yaml".

    Returns:
        The path of the packaged recipe; `given` itself if it is a file, or no recipe has that name.
    """
    name = given.removeprefix("configs/").removesuffix(".yaml")
    return given if Path(given).is_file() or name not in recipe_names() else str(FOLDER / f"{name}.yaml")
