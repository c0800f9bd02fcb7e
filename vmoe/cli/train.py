"""`vmoe train`: a config file and dotted options become a checked `TrainConfig`, which is trained."""

import difflib
import itertools
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jsonargparse
from rich.console import Console

from vmoe.cli.common import run
from vmoe.cli.config_files import as_written, as_yaml, newer_version, read_config
from vmoe.cli.recipes import find_recipe, is_recipe, recipe_names
from vmoe.cli.threads import choose_threads
from vmoe.cli.train_help import short_help
from vmoe.data.config import DEFAULTS, EMBEDDED_SETS, NAMED_SETS, DataConfig
from vmoe.errors import UserError
from vmoe.memory import is_out_of_memory, memory_line
from vmoe.moe import MoeConfig
from vmoe.training.config import TrainConfig, is_config_of_run
from vmoe.training.place import Place
from vmoe.training.plain import choices, describe, from_plain, section_type
from vmoe.training.progress import Progress
from vmoe.training.stopping import Interrupted, stopped_at_once
from vmoe.version import __version__

DESCRIPTION = """
Trains a timm model, dense or with sparse MoE layers, on images, and tests its best checkpoint.

Every value of a config can be given here by its dotted name: --optim.lr 1e-3, --moe.num_experts 16, --moe.layers [3,5],
--model.kwargs.drop_path_rate 0.1; --moe null trains the dense twin. --print_config shows what comes out.
"""
OUTSIDE_CONFIG = ("config", "print_config", "help", "help-all", "moe.help")


class _Parser(jsonargparse.ArgumentParser):
    """Its help is short; `format_all` also has the options of `moe`, which jsonargparse hides, being optional."""

    def format_help(self) -> str:
        return short_help([*self._actions, *self._moe()._actions])

    def format_all(self) -> str:
        _, heading, options = self._moe().format_help().partition("What an MoE layer computes")
        return f"{super().format_help()}\n{heading}{options}"

    def _moe(self) -> jsonargparse.ArgumentParser:
        moe = jsonargparse.ArgumentParser(prog=self.prog)
        moe.add_class_arguments(MoeConfig, "moe")
        return moe


def main(argv: list[str] | None = None) -> int:
    """Trains; see `vmoe train --help`. Returns the exit code."""
    return run(train_job, argv)


def train_job(argv: list[str]) -> int:
    """Parses, trains and prints the result.

    Raises:
        UserError: a mistake in the options, the config or the data.
    """
    return trained(lambda: parse(argv), ["vmoe", "train", *argv])


def trained(make_config: Callable[[], TrainConfig], command: list[str]) -> int:
    """Trains the run that `make_config` gives, and prints the result; the job's exit code.

    Args:
        make_config: Gives the run, or raises a UserError that is the same in all processes.
        command: The command line, for summary.json.

    Raises:
        UserError: a mistake in the options, the config or the data.
    """
    place = Place.of_this()
    try:
        return _train(make_config, command, place)
    except UserError as error:
        if place.is_first:
            raise
        if error.everywhere:  # the first process tells it
            return 2
        raise UserError(f"rank {place.rank} of {place.count}: {error}") from error


def _train(make_config: Callable[[], TrainConfig], command: list[str], place: Place) -> int:
    try:
        config = make_config()
    except UserError as error:
        raise UserError(str(error), everywhere=True) from error
    console = Console(quiet=not place.is_first)
    if config.parallel.strategy == "auto":
        config = _resolved(config, place, console)
    try:
        with stopped_at_once():
            from vmoe.training.run import train  # here, since a mistake in an option need not wait for Lightning
        busy = config.data.workers if config.data.pipeline == "workers" else 0  # else they only read, at the start
        Progress(console).say(f"threads: {choose_threads(busy, place.local_count)}")
        result = train(config, shlex.join(command), console)
    except Interrupted as stop:
        from vmoe.checkpoints import RunFolder
        from vmoe.training.resumption import resuming_command

        folder = RunFolder(Path(config.output_dir))
        if place.is_first:
            then = (
                f"; the run is saved, go on with: {resuming_command(folder)}"
                if folder.config.exists()
                else " before the run began"
            )
            print(f"vmoe train: {stop}{then}", file=sys.stderr)
        return 128 + stop.signum
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(memory_line(error, _smaller(config))) from error
    if place.is_first:
        Progress(console).say(_result_line(result, config.output_dir))
    return 0


def _smaller(config: TrainConfig) -> str:
    """How a run takes less memory."""
    batch, accumulate = config.data.batch_size, config.trainer.accumulate
    ways = [
        f"lower data.batch_size={batch} and raise trainer.accumulate={accumulate} as much, which changes no update",
        *(["set moe.recompute_activation"] if config.moe is not None and not config.moe.recompute_activation else []),
        *(["take trainer.precision=bf16"] if config.trainer.precision == "32" else []),
        "or take several GPUs (parallel.strategy)",
    ]
    return ", ".join(ways)


def _resolved(config: TrainConfig, place: Place, console: Console) -> TrainConfig:
    """The config with the planner's strategy in the place of auto; says why it is that one."""
    from vmoe.bench.plan.choice import resolved  # here, since it brings much along

    try:
        config, why = resolved(config, place)
    except UserError as error:
        raise UserError(str(error), everywhere=True) from error
    if why is not None:
        Progress(console).say(why)
    return config


def _result_line(result: dict[str, Any], folder: str) -> str:
    metrics = result["metrics"]
    validation = f"val top-1 {metrics['val/top1']:.2%}" if "val/top1" in metrics else "no validation"
    # Of five classes it would always be 100 %; how many there are, a run's older summary does not tell.
    five = f", top-5 {metrics['test/top5']:.2%}" if result.get("classes", 6) > 5 else ""
    return (
        f"test top-1 {metrics['test/top1']:.2%}{five}, loss {metrics['test/loss']:.4f}, "
        f"by the checkpoint of epoch {result['best_epoch']} ({validation}, unaugmented training images "
        f"{metrics['train_clean/top1']:.2%}); "
        f"{result['train_seconds']:.0f} s, {result['images_per_second']:,.0f} img/s; all in {folder}"
    )


def parse(argv: list[str]) -> TrainConfig:
    """The checked config of a command line.

    Raises:
        UserError: an option or key is unknown (with the nearest valid ones), of the wrong type, or out of range.
        SystemExit: after --help, --help-all or --print_config.
    """
    argv = _with_run(_with_recipes(argv))
    try:
        return _parsed(argv)
    except UserError as error:
        for path in _config_files(argv):
            if (version := newer_version(path)) is not None:
                update = f"written by vmoe {version}, and this is {__version__}: update it"
                raise UserError(f"{path}: {update} ({error})") from error
        raise


def _parsed(argv: list[str]) -> TrainConfig:
    parser = _Parser(prog="vmoe train", description=DESCRIPTION, exit_on_error=False, formatter_class=_KeepLines)
    recipes = ", ".join(name for name in recipe_names() if "/" not in name)
    parser.add_argument("--config", action="config", help=f"YAML file, or a recipe that comes with vmoe: {recipes}.")
    parser.add_class_arguments(TrainConfig, skip={"resume"})
    parser.set_defaults({"data.name": None})  # the images must be chosen
    line = "Go on with the run in output_dir, by its own config; auto begins a run where there is none."
    parser.add_argument("--resume", nargs="?", const=True, default=False, type=bool | Literal["auto"], help=line)
    if "--help-all" in argv:
        print(parser.format_all())
        raise SystemExit(0)
    names = option_names(TrainConfig)
    files = _config_files(argv)
    for path in files:
        _check_keys(read_config(path), TrainConfig, names, path)
    _check_options(argv, names)
    try:
        parsed = parser.parse_args(_as_written(argv)).as_dict()
    except jsonargparse.ArgumentError as error:
        raise UserError(_explain(str(error), argv)) from error
    del parsed["config"]
    if parsed["output_dir"] is None:
        parsed["output_dir"] = f"runs/{Path(files[-1]).stem if files else 'default'}"
    config = _with_chosen_data(parsed)
    _check_image_size(config, files, argv)
    return config


def _with_chosen_data(parsed: dict[str, Any]) -> TrainConfig:
    """The config of what was parsed. The user must have chosen the images.

    Raises:
        UserError: they were not, or an option is not allowed.
    """
    data = parsed["data"]
    is_chosen = not isinstance(data, dict) or data.get("name") is not None
    config = from_plain(TrainConfig, parsed if is_chosen else {**parsed, "data": {**data, "name": DataConfig.name}})
    root, default_root = config.data.root, DataConfig.root
    if not is_chosen:
        folders = "--data.name folder (class folders), webdataset (tar shards) or npz"
        if root != default_root:
            raise UserError(f"--data.root {root}: must be given with what it holds: {folders}")
        raise UserError(
            f"--data.name: must be given, as the images to train on: {folders}, each with --data.root, or one of "
            f"{', '.join(NAMED_SETS)}; or give a recipe, such as --config digits"
        )
    if config.data.name in EMBEDDED_SETS and root != default_root:
        raise UserError(
            f"--data.root {root}: is not read by data.name={config.data.name}: its images come with vmoe; give "
            "--data.name folder, webdataset or npz too, or leave it out"
        )
    return config


def _check_image_size(config: TrainConfig, files: list[str], argv: list[str]) -> None:
    """Refuses a recipe of ours with another data set where nobody has said the side of its images.

    The side and the patches of a recipe go with its set: 224 pixels and patches of 4 make 3,136 tokens.

    Raises:
        UserError: it is so.
    """
    sections = [read_config(file).get("data") or {} for file in files]
    name, usual = config.data.name, DEFAULTS[config.data.name].image_size
    for number, (file, data) in enumerate(zip(files, sections, strict=True)):
        own = data.get("name", name)
        is_said = any("image_size" in later for later in sections[number + 1 :])
        is_said |= any(argument.partition("=")[0] == "--data.image_size" for argument in argv)
        if is_said or own == name or not is_recipe(file):
            continue
        side = data.get("image_size") or DEFAULTS[own].image_size
        now = config.data.image_size or usual
        if now is not None and not now == side == usual:
            other = "" if usual is None else f", or {usual} as {name} has it, with --model.kwargs.patch_size to match"
            raise UserError(
                f"--data.name {name}: the recipe {Path(file).stem} is made for {own} at {side} pixels; give "
                f"--data.image_size too: {side} as the recipe{other}"
            )


def option_names(kind: type, prefix: str = "") -> list[str]:
    """The dotted names of all options of a config dataclass, sections included."""
    return list(option_types(kind, prefix))


def option_types(kind: type, prefix: str = "") -> dict[str, Any]:
    """The types of all options of a config dataclass, sections included, by dotted name."""
    found = {}
    for name, hint in get_type_hints(kind).items():
        found[prefix + name] = hint
        if section := section_type(hint):
            found |= option_types(section, f"{prefix}{name}.")
    return found


def _with_run(argv: list[str]) -> list[str]:
    """Lets a run's own config mean that run: `--resume` takes it, and where it lies is the run's folder.

    Raises:
        UserError: a run is to be resumed, and there is none.
    """
    folder, files = _last_value(argv, "--output_dir"), _config_files(argv)
    resume = _last_value(argv, "--resume", without="true") or "false"
    if not files and resume != "false":
        if folder is None:
            raise UserError("--resume: give the run's folder as --output_dir, or its config.yaml as --config")
        if is_config_of_run(Path(folder) / "config.yaml"):
            return ["--config", str(Path(folder) / "config.yaml"), *argv]
        if resume == "true":
            raise UserError(f"--resume: there is no run in {folder}; give a run's folder as --output_dir")
    if folder is None and files and is_config_of_run(Path(files[-1])):
        return [*argv, "--output_dir", str(Path(files[-1]).parent)]
    return argv


def _last_value(argv: list[str], option: str, without: str | None = None) -> str | None:
    """What an option was given last, or `without` where it was given without a value; None where it was not given."""
    found = None
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        if argument.startswith(f"{option}="):
            found = argument.removeprefix(f"{option}=")
        elif argument == option:
            found = without if without is not None and following.startswith("--") else following
    return found


def _with_recipes(argv: list[str]) -> list[str]:
    """Puts the files of recipes in the place of their names after --config."""
    result: list[str] = []
    for argument in argv:
        if argument.startswith("--config="):
            result.append(f"--config={find_recipe(argument.removeprefix('--config='))}")
        else:
            result.append(find_recipe(argument) if result[-1:] == ["--config"] else argument)
    return result


def _config_files(argv: list[str]) -> list[str]:
    """The config files, in their order."""
    return [value for name, value in _pairs(argv) if name == "config" and value is not None]


def _as_written(argv: list[str]) -> list[str]:
    """The command line with the files' content in the place of their names, and with texts in quotes within lists."""
    hints = option_types(TrainConfig)
    result = []
    for name, value in _pairs(argv):
        if name is None:
            result.append(value)
        elif name == "config" and value is not None:
            result.append(f"--config={as_yaml(read_config(value))}")
        elif value is None or name == "resume":
            result += [f"--{name}"] if value is None else [f"--{name}={value}"]
        else:
            hint = hints.get(name.removesuffix("+"), Any)
            if name.endswith("+"):  # one more item of a list
                hint = next((get_args(kind)[0] for kind in choices(hint) if get_origin(kind) is list), Any)
            result.append(f"--{name}={as_written(value, hint)}")
    return result


def _pairs(argv: list[str]) -> list[tuple[str | None, str | None]]:
    """Options with their values, None for one that has none; None and what it is for a stray word."""
    pairs: list[tuple[str | None, str | None]] = []
    for argument in argv:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            pairs.append((name, value if equals else None))
        elif pairs and pairs[-1][0] is not None and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], argument)
        else:
            pairs.append((None, argument))
    return pairs


def _check_keys(plain: dict[str, Any], kind: type, names: list[str], path: str, prefix: str = "") -> None:
    hints = get_type_hints(kind)
    for key, value in plain.items():
        dotted = f"{prefix}{key}"
        if key not in hints:
            raise UserError(f"{path}: unknown key {dotted}; {_nearest(dotted, names)}")
        section = section_type(hints[key])
        if section is not None and isinstance(value, dict):
            _check_keys(value, section, names, path, f"{dotted}.")


def _check_options(argv: list[str], names: list[str]) -> None:
    for option, word in _pairs(argv):
        if option is None and word is not None and word != "-h":
            raise UserError(f"{word}: belongs to no option; give options as --NAME VALUE")
    for argument in argv:
        if not argument.startswith("--"):
            continue
        name = argument[2:].partition("=")[0].removesuffix("+")
        if name not in names and name not in OUTSIDE_CONFIG and not name.startswith("model.kwargs."):
            raise UserError(f"--{name}: no such option; {_nearest(name, [*names, 'config', 'print_config'])}")


def _nearest(name: str, names: list[str]) -> str:
    """The names that `name` may have meant: with the same or nearly the same last part, or alike as a whole."""
    last = name.rpartition(".")[2]
    close = [known for known in names if difflib.get_close_matches(last, [known.rpartition(".")[2]], cutoff=0.75)]
    close = difflib.get_close_matches(name, close or names, n=3, cutoff=0 if close else 0.75)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"the sections are {', '.join(known for known in names if '.' not in known)}; see --help-all"


def _explain(message: str, argv: list[str]) -> str:
    """One line for what jsonargparse refuses: the option, its value, and what is allowed by the option's type.

    Jsonargparse's own words depend on its version; of its message, only the option's name is taken.
    """
    keys = re.findall(r'Parser key "([^"]+)"', message)  # a section's, then its option's
    hints = option_types(TrainConfig)
    name = ".".join(keys) if ".".join(keys) in hints else "".join(keys[:1])
    if name not in hints:
        return " ".join(message.split())
    values = _given(name, argv)
    given = [value for value in values if str(value) in message] or values  # of several, the one that was refused
    line = f"--{name}{f' {given[0]}' if given else ''}: must be {describe(hints[name])}"
    if section_type(hints[name]) is None:
        return line
    return f"{line}; give one of its options by name, such as --{name}.NAME VALUE"


def _given(name: str, argv: list[str]) -> list[Any]:
    """The values that an option has on the command line and in the config files."""
    values: list[Any] = [value for option, value in _pairs(argv) if option == name and value is not None]
    for path in _config_files(argv):
        value: Any = read_config(path)
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        values.append(value)
    return [value for value in values if value is not None]


class _KeepLines(jsonargparse.DefaultHelpFormatter):
    """Keeps the description's lines as they are written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text.strip()
