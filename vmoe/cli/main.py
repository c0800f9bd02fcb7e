"""The `vmoe` command: the first argument names the job."""

import difflib
import importlib
import os
import sys

from vmoe.errors import UserError
from vmoe.extras import missing_extra, require_extras
from vmoe.text import readers_may_leave, replace_what_cannot_be_shown
from vmoe.version import __version__

# The jobs and their purpose, in the order of the help
GROUPS = {
    "Train and compare": {
        "train": "train a model from a config, or resume a run",
        "compare": "put runs side by side: accuracy against cost",
        "data": "see the images that a model is trained on",
        "tune": "search for good options: Optuna proposes, validation decides",
        "sweep": "train the arms and seeds of a study, several side by side",
    },
    "Use and measure": {
        "models": "list the models that open by name, with size and accuracy",
        "predict": "name what is in pictures, with a checkpoint or an exported model",
        "evaluate": "measure a checkpoint: accuracy, calibration, speed, dropped tokens",
        "calibrate": "make a checkpoint's probabilities fit how often it is right",
        "super-classes": "group classes by what a model confuses, to guide a router of images",
        "heatmap": "draw which expert each patch of an image goes to",
        "explore": "see, measure and test what the experts do, on one page",
        "serve": "answer over HTTP what is in pictures",
        "demo-page": "write a page that runs a V-MoE in the browser",
    },
    "Share and shrink": {
        "export": "write a checkpoint as a file or program to share: safetensors, ONNX, torch.export, for timm",
        "consolidate": "make one safetensors file of a run's weights, however many processes it had",
        "prune": "drop or merge experts, and report what that costs",
        "distill": "train a dense student of a V-MoE",
        "import-jax": "turn a checkpoint of the original JAX code into ours",
        "import-swin": "turn a checkpoint of Swin-MoE into ours",
        "make-shards": "write a folder of images as tar shards",
    },
    "Plan and time": {
        "plan": "predict memory and time of a config on many GPUs",
        "benchmark": "measure layers, whole models and the data pipeline on this machine",
    },
}
JOBS = {job: text for group in GROUPS.values() for job, text in group.items()}
# The extras that a job always needs. Some options of other jobs need one too, and check it themselves.
EXTRAS_OF_JOBS = {
    "train": ("train",),
    "evaluate": ("train",),
    "calibrate": ("train",),
    "super-classes": ("train", "cluster"),
    "heatmap": ("analysis",),
    "explore": ("train", "analysis"),
    "sweep": ("train", "analysis"),
    "tune": ("train", "tune"),
    "compare": ("train", "analysis"),
    "benchmark": ("train", "analysis"),
    "data": ("train", "analysis"),
    "plan": ("train", "analysis"),
    "serve": ("serve",),
    "demo-page": ("export",),
    "prune": ("train",),
    "distill": ("train",),
    "make-shards": ("webdataset",),
    "import-jax": ("jax",),
    "demo": ("train", "analysis"),  # `make demo` runs it
}


def main(argv: list[str] | None = None) -> int:
    """Runs one job and returns its exit code; 2 if there is no such job."""
    if "_ARGCOMPLETE" in os.environ:  # the Tab key was pressed in a shell
        return _complete_line()
    replace_what_cannot_be_shown()
    try:
        with readers_may_leave():
            return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"vmoe: error: {error}", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    job = argv[0] if argv else "--help"
    job = "import-jax" if job == "import_jax" else job  # its name in version 0.1.0
    if job in JOBS:
        return run_job(job, argv[1:])
    if job in ("-h", "--help"):
        print(_help())
        return 0
    if job == "--version":
        print(f"vmoe {__version__}")
        return 0
    near = difflib.get_close_matches(job, JOBS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the jobs are {', '.join(JOBS)}"
    print(f"vmoe: error: {job!r} is no job; {hint}", file=sys.stderr)
    return 2


def run_job(job: str, argv: list[str] | None = None) -> int:
    """Runs one of `JOBS`, or the demonstration; returns its exit code.

    The code is 2 if a needed extra is not installed. Without `argv` it takes the arguments of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not {"-h", "--help", "--help-all"} & set(argv):
            require_extras(*EXTRAS_OF_JOBS.get(job, ()))
        module = importlib.import_module(f"vmoe.cli.{job.replace('-', '_')}")
    except (UserError, ModuleNotFoundError) as error:
        line = missing_extra(error.name) if isinstance(error, ModuleNotFoundError) else error
        if line is None:
            raise
        print(f"vmoe {job}: error: {line}", file=sys.stderr)
        return 2
    return module.main(argv)


def _complete_line() -> int:
    try:
        from vmoe.cli.completion import complete  # here, since it needs argcomplete
    except ModuleNotFoundError:
        return 1  # nothing can be said on a line that is being typed
    complete()
    return 0


def _help() -> str:
    groups = "\n\n".join(
        f"{title}:\n" + "\n".join(f"  {job:13} {text}" for job, text in jobs.items()) for title, jobs in GROUPS.items()
    )
    return f"""\
usage: vmoe JOB ...

Sparse experts for image classification: trains them, measures them and shows what they do.

  vmoe train --config digits     # a V-MoE on handwritten digits, in minutes on a CPU
  vmoe evaluate runs/digits      # its accuracy, and the load of its experts

{groups}

`vmoe JOB --help` has a job's examples and its most used options."""
