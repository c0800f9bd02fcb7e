"""The short help of jobs with many options: `vmoe JOB --help` prints the most used ones, `--help-all` all of them."""

import argparse
from typing import Any, NamedTuple

from vmoe.cli.main import JOBS

WIDTH, COLUMN = 118, 34  # characters per line, and the column of explanations


class Short(NamedTuple):
    """The most used options of a job, and its examples."""

    options: tuple[str, ...]
    examples: tuple[str, str]


SHORT = {
    "evaluate": Short(
        ("data", "root", "split", "capacity_factor", "json"),
        ("vmoe evaluate runs/digits", "vmoe evaluate runs/digits --capacity-factor 0.5 1 inf --out capacity"),
    ),
    "explore": Short(
        ("out", "images", "data", "root", "sample"),
        ("vmoe explore runs/digits --out explorer", "vmoe explore runs/digits --images photos/ --out explorer"),
    ),
    "tune": Short(
        ("search", "out", "trials", "jobs", "metric"),
        (
            "vmoe tune digits --out runs/tune --trials 8 --search optim.lr=1e-4:1e-2:log moe.top_k=1,2",
            "vmoe compare runs/tune/trial_* --out comparison",
        ),
    ),
    "plan": Short(
        ("config", "gpus", "gpu", "network", "out"),
        ("vmoe plan --config imagenet_vmoe_s16 --gpus 64 --gpu h100-80g --network ib-400", "vmoe plan --measure"),
    ),
    "predict": Short(
        ("top", "threshold", "csv", "json", "device"),
        ("vmoe predict runs/digits photo.jpg", "vmoe predict runs/digits photos/ --threshold 0.5 --csv answers.csv"),
    ),
    "serve": Short(
        ("port", "host", "max_batch", "cors", "device"),
        ("vmoe serve runs/digits", "curl -F image=@photo.jpg http://127.0.0.1:8000/predict"),
    ),
    "export": Short(
        ("out", "format", "dtype", "quantize", "push"),
        (
            "vmoe export runs/digits --out digits.safetensors",
            "vmoe export runs/digits --format onnx --out digits.onnx",
        ),
    ),
    "prune": Short(
        ("keep", "out", "merge", "finetune", "data"),
        (
            "vmoe prune runs/digits --keep 4 --out runs/digits_of4",
            "vmoe prune runs/digits --keep 4 --merge --finetune 5 --out runs/digits_merged",
        ),
    ),
    "import-jax": Short(
        ("out", "top_k", "capacity_factor", "img_size", "class_names"),
        (
            "vmoe import-jax vmoe_s32_last2_ilsvrc2012_randaug_light1 --out s32.ckpt",
            "vmoe evaluate s32.ckpt --data imagenet --root imagenet",
        ),
    ),
}


def help_of_job(job: str, parser: argparse.ArgumentParser) -> str:
    """The help page of a job in `SHORT`."""
    actions = {action.dest: action for action in parser._actions if action.help is not argparse.SUPPRESS}
    words = [action for action in actions.values() if not action.option_strings]
    all_options = [action for action in actions.values() if action.option_strings]
    required = [action for action in all_options if action.required]
    formatter = wide(f"{parser.prog} [OPTIONS]")
    formatter.add_usage(None, [*words, *required], [], "usage: ")
    formatter.add_text(f"{JOBS[job][0].upper()}{JOBS[job][1:]}.")
    formatter.add_text("\n".join(f"  {line}" for line in SHORT[job].examples))
    if any("runs/digits" in line for line in SHORT[job].examples):
        formatter.add_text("`vmoe train --config digits` makes runs/digits; your own runs and checkpoints do as well.")
    for title, shown in {"": words, "most used": [actions[name] for name in SHORT[job].options]}.items():
        formatter.start_section(title or None)
        formatter.add_arguments(shown)
        formatter.end_section()
    formatter.add_text(f"`{parser.prog} --help-all` explains all {len(all_options)} options, and what is written.")
    return formatter.format_help()


def wide(prog: str) -> argparse.HelpFormatter:
    """A help formatter with the line length of the descriptions."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=COLUMN, width=WIDTH)


class HelpAll(argparse.Action):
    """The action of --help-all: prints the whole help and exits."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Prints it."""
        print(parser.format_all(), end="")
        parser.exit()
