"""The command line of `vmoe train`: config files and dotted options become a checked `TrainConfig`."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import jsonargparse
import yaml

from vmoe.checkpoints.run_folder import RunFolder, is_config_of_run, newer_version
from vmoe.cli.train_help import short_help
from vmoe.config_values import choices, describe_type, from_plain, section_type
from vmoe.data.config import EMBEDDED_SETS, NAMED_SETS, DataConfig, SetName, set_and_root
from vmoe.errors import UserError
from vmoe.moe import MoeConfig
from vmoe.training.config import TrainConfig
from vmoe.training.config_files import as_written, as_yaml, read_config
from vmoe.training.options import (
    LIGHTNING_NAMES,
    check_keys,
    nearest_option,
    option_names,
    option_types,
    with_our_names,
)
from vmoe.training.recipes import check_side_of_recipe, find_recipe, is_recipe, recipe_names
from vmoe.version import __version__

DESCRIPTION = """
Trains a timm model, dense or with sparse MoE layers, on images, and tests its best checkpoint. The first word may say
which images: vmoe train photos/ --moe.layers last-2

Every value of a config can be given here by its dotted name: --optim.lr 1e-3, --moe.num_experts 16, --moe.layers [3,5],
--model.kwargs.drop_path_rate 0.1; --moe null trains the dense twin. --print_config shows what comes out.
"""
OUTSIDE_CONFIG = ("config", "print_config", "help", "help-all", "moe.help")


class _Parser(jsonargparse.ArgumentParser):
    """A parser with a short help. `format_all` adds the options of `moe`, which jsonargparse hides as optional."""

    def format_help(self) -> str:
        return short_help([*self._actions, *self._moe()._actions])

    def format_all(self) -> str:
        _, heading, options = self._moe().format_help().partition("What an MoE layer computes")
        return f"{super().format_help()}\n{heading}{options}"

    def _moe(self) -> jsonargparse.ArgumentParser:
        moe = jsonargparse.ArgumentParser(prog=self.prog)
        moe.add_class_arguments(MoeConfig, "moe")
        return moe


def parse(argv: list[str]) -> TrainConfig:
    """The checked config of a command line.

    Raises:
        UserError: An option or key is unknown (with the nearest valid ones), of the wrong type, or out of range.
        SystemExit: After --help, --help-all or --print_config.
    """
    given = _read(argv)
    try:
        return _parsed(given)
    except UserError as error:
        for path, _ in _files(given):
            if (version := newer_version(path)) is not None:
                update = f"written by vmoe {version}, and this is {__version__}: update it"
                raise UserError(f"{path}: {update} ({error})") from error
        raise


class _Given(NamedTuple):
    """An option of the command line, split into name and value."""

    name: str  # without its dashes
    value: str | None = None  # as written; None if there is none; the file of a config
    content: dict[str, Any] | None = None  # the content of a config

    @property
    def written(self) -> str:
        """The option in jsonargparse's form: with a file's content, and with quoted texts within lists."""
        if self.content is not None:
            return f"--config={as_yaml(self.content)}"
        if self.value is None or self.name == "resume":
            return f"--{self.name}" if self.value is None else f"--{self.name}={self.value}"
        hint = option_types(TrainConfig).get(self.name.removesuffix("+"), Any)
        if self.name.endswith("+"):  # one more item of a list
            hint = next((get_args(kind)[0] for kind in choices(hint) if get_origin(kind) is list), Any)
        return f"--{self.name}={as_written(self.value, hint)}"


def _read(argv: list[str]) -> list[_Given]:
    """The options of a command line, with the content of its config files. A resumed run's config comes first.

    Raises:
        UserError: A word belongs to no option, a file cannot be read, or there is no run to resume.
    """
    images, options = _first_word(argv)
    pairs: list[tuple[str, str | None]] = []
    for argument in options:
        if argument.startswith("--") or argument == "-h":
            name, equals, value = argument.removeprefix("--").partition("=")
            pairs.append(("help" if argument == "-h" else name, value if equals else None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], argument)
        else:
            raise UserError(
                f"{argument}: belongs to no option; give the images as the first word, and options as --NAME VALUE"
            )
    pairs += images
    last = dict(pairs)
    for theirs, ours in LIGHTNING_NAMES.items():
        if theirs in last and ours in last and last[theirs] != last[ours]:
            raise UserError(f"--{theirs} {last[theirs]} and --{ours} {last[ours]} mean the same; give one of them")
    given: list[_Given] = []
    for name, value in pairs:
        if name == "config" and value is not None:
            path = find_recipe(value)
            content = with_our_names(read_config(path), path)
            given.append(_config(path, content, has_folder="output_dir" in last))
        else:
            own = LIGHTNING_NAMES.get(name, name)
            given.append(_Given(own, _as_bool(value) if name == "resume" and value is not None else value))
    given.sort(key=lambda each: each.name == "resume")  # last, so that no config overrides it
    if "resume" in last and given[-1].value != "false" and not _files(given):
        given[:0] = _config_of_run(last.get("output_dir"), begins=given[-1].value == "auto")
    return given


def _first_word(argv: list[str]) -> tuple[list[tuple[str, str | None]], list[str]]:
    """The options for a first word without a dash (the images to train on), and the words after it.

    Raises:
        UserError: There are no such images, or an option gives them too.
    """
    if not argv or argv[0].startswith("-"):
        return [], argv
    word, *options = argv
    if not word:
        raise UserError("the first word is empty; give the images to train on, or leave it out")
    name, root = set_and_root(word)
    if root is None and name not in get_args(SetName):
        if word in recipe_names() or word.endswith((".yaml", ".yml")):
            raise UserError(f"{word}: is a recipe; give it as --config {word}")
        raise UserError(
            f"{word}: is no folder, table (.csv, .tsv, .parquet), .npz file or name of a set; give options as --NAME "
            "VALUE"
        )
    ours = ["--data.name"] if root is None else ["--data.name", "--data.root"]  # a set's name does not give its folder
    named = [option for option in ours if any(_is_option(each, option) for each in options)]
    if named:
        raise UserError(f"{word}: says which images to train on, and so does {named[0]}; leave one of them out")
    return [("data.name", name)] + ([] if root is None else [("data.root", str(root))]), options


def _is_option(word: str, option: str) -> bool:
    return word == option or word.startswith(f"{option}=")


def _as_bool(value: str) -> str:
    """The value of an option that is true, false or a word, with one spelling of true and false."""
    try:
        content = yaml.safe_load(value)
    except yaml.YAMLError:
        return value  # jsonargparse refuses it with a message
    return str(content).lower() if isinstance(content, bool) else value


def _config(path: str, content: dict[str, Any], has_folder: bool) -> _Given:
    """A config file as an option. A run's own file refers to the run in its current folder, even if that was moved."""
    if is_config_of_run(Path(path)):
        content = {key: value for key, value in content.items() if key not in ("output_dir", "resume")}
        content |= {} if has_folder else {"output_dir": str(Path(path).parent)}
    return _Given("config", path, content)


def _config_of_run(folder: str | None, begins: bool) -> list[_Given]:
    """The config of a run that is resumed without a config: its config.yaml, or else its last checkpoint's.

    Args:
        folder: The run's folder, or None if not given.
        begins: Whether a new run starts if there is none.

    Raises:
        UserError: There is no run.
    """
    if folder is None:
        raise UserError("--resume: give the run's folder as --output_dir, or its config.yaml as --config")
    path = RunFolder(Path(folder)).config
    if is_config_of_run(path):
        return [_config(str(path), read_config(str(path)), has_folder=True)]
    from vmoe.training.run.resumption import last_config  # here, since it brings torch along

    content = last_config(Path(folder))
    if content is not None:
        return [_Given("config", str(path), content)]
    if begins:
        return []
    raise UserError(
        f"--resume: there is no run in {folder}, which has neither a config.yaml nor a last checkpoint; give a run's "
        "folder as --output_dir"
    )


def _files(given: list[_Given]) -> list[tuple[str, dict[str, Any]]]:
    """The config files and their content, in order."""
    return [(each.value, each.content) for each in given if each.value is not None and each.content is not None]


def _parsed(given: list[_Given]) -> TrainConfig:
    parser = _Parser(prog="vmoe train", description=DESCRIPTION, exit_on_error=False, formatter_class=_KeepLines)
    recipes = ", ".join(name for name in recipe_names() if "/" not in name)
    parser.add_argument("--config", action="config", help=f"YAML file, or a recipe that comes with vmoe: {recipes}.")
    parser.add_class_arguments(TrainConfig, skip={"resume"})
    parser.set_defaults({"data.name": None})  # the user must choose the images
    line = "Go on with the run in output_dir, by its own config; auto begins a run where there is none."
    parser.add_argument("--resume", nargs="?", const=True, default=False, type=bool | Literal["auto"], help=line)
    if any(each.name == "help-all" for each in given):
        print(parser.format_all())
        raise SystemExit(0)
    names = option_names(TrainConfig)
    for path, content in _files(given):
        check_keys(content, TrainConfig, path, names)
    _check_names(given, names)
    try:
        parsed = parser.parse_args([each.written for each in given]).as_dict()
    except jsonargparse.ArgumentError as error:
        raise UserError(_explain(str(error), given)) from error
    del parsed["config"]
    config = _with_chosen_data(parsed)
    _check_image_size(config, given)
    if config.output_dir is None:
        files = _files(given)
        return replace(config, output_dir=f"runs/{Path(files[-1][0]).stem if files else config.data.title}")
    return config


def _with_chosen_data(parsed: dict[str, Any]) -> TrainConfig:
    """The config of the parsed options. The user must have chosen the images.

    Raises:
        UserError: The user has not (perhaps --resume was forgotten), or an option is not allowed.
    """
    data = parsed["data"]
    is_chosen = not isinstance(data, dict) or data.get("name") is not None
    config = from_plain(TrainConfig, parsed if is_chosen else {**parsed, "data": {**data, "name": DataConfig.name}})
    root, default_root = config.data.root, DataConfig.root
    if not is_chosen:
        if config.output_dir is not None:
            from vmoe.training.run.resumption import refuse_run  # here, since it brings torch along

            refuse_run(Path(config.output_dir))
        folders = (
            "--data.name folder (class folders), table (CSV or Parquet), huggingface, webdataset (tar shards) or npz"
        )
        if root != default_root:
            raise UserError(f"--data.root {root}: must be given with what it holds: {folders}")
        raise UserError(
            f"--data.name: must be given, as the images to train on: {folders}, each with --data.root, or one of "
            f"{', '.join(NAMED_SETS)}; or give a recipe, such as --config digits"
        )
    if config.data.name in EMBEDDED_SETS and root != default_root:
        raise UserError(
            f"--data.root {root}: is not read by data.name={config.data.name}: its images come with vmoe; give "
            "--data.name folder, table, huggingface, webdataset or npz too, or leave it out"
        )
    return config


def _check_image_size(config: TrainConfig, given: list[_Given]) -> None:
    """Refuses a packaged recipe with another data set if the image size is not given.

    Raises:
        UserError: The image size is missing.
    """
    files = [file for file, _ in _files(given)]
    sections = [content.get("data") or {} for _, content in _files(given)]
    for number, (file, data) in enumerate(zip(files, sections, strict=True)):
        is_said = any("image_size" in later for later in sections[number + 1 :])
        is_said |= any(each.name == "data.image_size" for each in given)
        if is_recipe(file) and not is_said:
            check_side_of_recipe(config.data, file, data, f"--data.name {config.data.name}", "--")


def _check_names(given: list[_Given], names: list[str]) -> None:
    for each in given:
        name = each.name.removesuffix("+")
        if name not in names and name not in OUTSIDE_CONFIG and not name.startswith(("model.kwargs.", "optim.kwargs.")):
            raise UserError(f"--{name}: no such option; {nearest_option(name, [*names, 'config', 'print_config'])}")


def _explain(message: str, given: list[_Given]) -> str:
    """A line for an error of jsonargparse: the option, its value, and the allowed values by the option's type.

    Jsonargparse's wording depends on its version, so only the option's name is taken from its message.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)  # the section's name, then the option's
    hints = option_types(TrainConfig)
    name = ".".join(keys) if ".".join(keys) in hints else "".join(keys[:1])
    if name not in hints:
        return " ".join(message.split())
    values = _values(name, given)
    refused = [value for value in values if str(value) in message] or values  # of several values, the refused one
    allowed = describe_type(hints[name])
    if refused and not str(refused[0]).startswith(("[", "{")):
        allowed = re.sub(r"^a list(?= or |$)", f"a list, such as [{refused[0]}],", allowed).removesuffix(",")
    line = f"--{name}{f' {refused[0]}' if refused else ''}: must be {allowed}"
    if section_type(hints[name]) is None:
        return line
    return f"{line}; give one of its options by name, such as --{name}.NAME VALUE"


def _values(name: str, given: list[_Given]) -> list[Any]:
    """The values that an option has on the command line and in the config files."""
    values: list[Any] = [each.value for each in given if each.name == name]
    for _, content in _files(given):
        value: Any = content
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        values.append(value)
    return [value for value in values if value is not None]


class _KeepLines(jsonargparse.DefaultHelpFormatter):
    """A help formatter that keeps the line breaks of descriptions."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text.strip()
