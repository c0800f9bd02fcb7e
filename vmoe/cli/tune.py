"""\
Searches for good options of a recipe: Optuna proposes them, each trial is a `vmoe train` in its own process and folder
OUT/trial_NNN, and its validation metric decides. The same command resumes a stopped search, also in the middle of a
run; with more --trials it adds some. Options after -- go to each run.

  vmoe tune digits --out runs/tune --trials 8 --search optim.lr=1e-4:1e-2:log moe.top_k=1,2 -- --trainer.epochs 3
  vmoe tune search.yaml --out runs/tune --jobs 4
  vmoe tune --out runs/tune --search optim.lr=1e-5:1e-3:log -- photos/ --init_from pretrained
  vmoe compare runs/tune/trial_*

A range is LOW:HIGH, LOW:HIGH:log (even over magnitudes) or A,B,C (one of these). SEARCH may be a YAML file instead:

  config: digits
  search:
    optim.lr: {low: 1e-4, high: 1e-2, log: true}
    moe.top_k: [1, 2]

OUT gets study.journal (Optuna's), trials.csv, history.png, options.png and importances.png.
"""

import argparse
import shlex
from pathlib import Path
from typing import Any

import yaml

from vmoe.cli.common import job
from vmoe.cli.options import count, new_parser, split_options
from vmoe.cli.progress import working
from vmoe.cli.sweep import visible_gpus
from vmoe.cli.train_options import parse
from vmoe.errors import UserError
from vmoe.text import counted
from vmoe.training.recipes import find_recipe


@job(options={"search": "--search", "metric": "--metric", "output_dir": "--out"})
def main(argv: list[str]) -> int:
    """Runs the job."""
    own, common = split_options(argv)
    options = _parser().parse_args(own)
    config, search = _search(options)
    # Imported here, so that --help and a mistyped option answer at once
    from vmoe.training.tuning import (
        SearchPlan,
        folder_of,
        read_space,
        require_metric,
        run_search,
        samples_of,
        words_of,
    )

    space = read_space(search)
    images = 1 if common and not common[0].startswith("-") else 0  # the word that names the images, before all options
    words = [*common[:images], *config, *common[images:]]
    # Finds a range that no run accepts before the first run
    configs = [parse([*words, *words_of(values)]) for values in samples_of(space)]
    plan = SearchPlan(options.trials, options.jobs, options.metric, options.seed, visible_gpus())
    require_metric(options.metric, configs)
    print(f"searching over {', '.join(space)} in {counted(plan.trials, 'run')}", flush=True)
    with working("searching"):
        study = run_search(space, words, options.out, plan, lambda line: print(line, flush=True))
    best = study.best_trial
    print(f"best {plan.metric} {study.best_value:.4f}: {shlex.join(words_of(best.params))}")
    print(f"its run is in {folder_of(options.out, best)}; all trials are in {options.out / 'trials.csv'}")
    return 0


def _search(options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The words that choose the config, and the ranges.

    Raises:
        UserError: There are no ranges, or they cannot be read.
    """
    search: dict[str, Any] = {}
    config: list[str] = []
    if options.config is not None:
        path = Path(find_recipe(options.config))
        content = _read(path)
        config = ["--config", str(path)]
        if "search" in content:
            if set(content) != {"config", "search"} or not isinstance(content["search"], dict):
                raise UserError(f"{path}: must hold config and search, and nothing else")
            beside = path.parent / str(content["config"])
            config = ["--config", str(beside) if beside.is_file() else find_recipe(str(content["config"]))]
            search = dict(content["search"])
    for text in options.search:
        name, equals, values = text.partition("=")
        if not (equals and name and values):
            raise UserError(f"--search {text}: must be OPTION=RANGE, such as optim.lr=1e-4:1e-2:log")
        search[name] = _range(text, values)
    if not search:
        raise UserError("--search: is missing; give options and their ranges, such as optim.lr=1e-4:1e-2:log")
    return config, search


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: no recipe's name, and no readable YAML file ({reason})") from error
    return content if isinstance(content, dict) else {}


def _range(text: str, values: str) -> Any:
    """Reads the values after the = of `--search`."""
    parts = values.split(":")
    if len(parts) > 1 and "[" not in values:
        low, high, *log = parts
        if log not in ([], ["log"]):
            raise UserError(f"--search {text}: must be LOW:HIGH or LOW:HIGH:log, or A,B,C")
        return {"low": _number(low), "high": _number(high), "log": bool(log)}
    return yaml.safe_load(f"[{values}]")


def _number(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("tune", __doc__)
    parser.add_argument("config", nargs="?", metavar="SEARCH", help="a recipe, a config file, or a file as above")
    parser.add_argument("--search", nargs="+", default=[], metavar="OPTION=RANGE", help="what to search over")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the runs and the study go")
    parser.add_argument("--trials", type=count, default=20, metavar="N", help="runs in all (default: 20)")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="runs at once, on all GPUs together")
    parser.add_argument("--metric", default="val/top1", metavar="NAME", help="val/top1 (default), val/loss, ...")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the proposals, not of the runs")
    return parser
