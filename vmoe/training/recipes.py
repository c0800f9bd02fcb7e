"""The recipes in the package. A config is found by its path or, from any folder, by its recipe's name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmoe.data.config import DEFAULTS, DataConfig
from vmoe.errors import UserError

_PACKAGE = Path(__file__).parents[1]
# A wheel holds the recipes inside the package. A checkout and an editable install have them beside it.
FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def recipe_names() -> list[str]:
    """The names that `find_recipe` knows, such as "digits" and "studies/cifar100"."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def is_recipe(path: str) -> bool:
    """Whether a file is a packaged recipe."""
    return FOLDER.resolve() in Path(path).resolve().parents


def find_recipe(given: str) -> str:
    """The config file that a user names: the path as given or, if there is no such file, the recipe of that name.

    Args:
        given: A path, or a recipe as "digits", "digits.yaml" or "configs/digits.yaml".

    Returns:
        The path of the packaged recipe, or `given` itself if it is a file or no recipe has that name.
    """
    name = given.removeprefix("configs/").removesuffix(".yaml")
    return given if Path(given).is_file() or name not in recipe_names() else str(FOLDER / f"{name}.yaml")


def check_side_of_recipe(
    data: DataConfig, recipe: str, of_recipe: Mapping[str, Any], option: str, dashes: str = ""
) -> None:
    """Refuses a packaged recipe with another data set if the image size is not given.

    A recipe's image size and patches fit its own set: 224 pixels with patches of 4 would make 3,136 tokens.

    Args:
        data: The section `data` of the run.
        recipe: The recipe's file.
        of_recipe: The section `data` of that file.
        option: The option that named the set, for the message.
        dashes: The prefix of other options' names in the message.

    Raises:
        UserError: The image size is missing.
    """
    own, usual = of_recipe.get("name", data.name), DEFAULTS[data.name].image_size
    if own == data.name:
        return
    side = of_recipe.get("image_size") or DEFAULTS[own].image_size
    now = data.image_size or usual
    if now is not None and not now == side == usual:
        other = (
            ""
            if usual is None
            else f", or {usual} as {data.name} has it, with {dashes}model.kwargs.patch_size to match"
        )
        raise UserError(
            f"{option}: the recipe {Path(recipe).stem} is made for {own} at {side} pixels; give "
            f"{dashes}data.image_size too: {side} as the recipe{other}"
        )
