"""\
Trains all arms and seeds of a study's file, several side by side, since one small model would leave a GPU idle. Each is
a `vmoe train` in its own process and its own folder OUT/ARM_sSEED. The same command can be given again: it skips
finished runs and resumes stopped ones. Several GPUs get equal numbers of runs. Options after -- go to each run.

  vmoe sweep configs/studies/cifar100.yaml --out runs/study --jobs 7
  vmoe sweep configs/studies/cifar100.yaml --out runs/study --arms dense soft_10 --seeds 3 4 -- --data.root ~/data
  vmoe compare runs/study/*_s* --baseline dense --out study
"""

import argparse
import os
from pathlib import Path

from vmoe.cli.common import job
from vmoe.cli.options import count, new_parser, split_options
from vmoe.cli.progress import working
from vmoe.errors import UserError
from vmoe.text import counted
from vmoe.training.recipes import find_recipe


@job()
def main(argv: list[str]) -> int:
    """Runs the job. The exit code is 1 if a run failed."""
    own, common = split_options(argv)
    options = _sweep_parser().parse_args(own)
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.training.sweep import Sweep, read_study

    runs = read_study(Path(find_recipe(options.study)), options.out, options.arms, options.seeds, common)
    if options.list:
        for training in runs:
            print(training.command + ("  # done" if training.is_done else ""))
        return 0
    try:
        (options.out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {options.out}: cannot be written ({reason}); choose another place") from error
    print(f"{counted(len(runs), 'run')}, {sum(training.is_done for training in runs)} of them done", flush=True)
    sweep = Sweep(runs, options.jobs, visible_gpus(), lambda line: print(line, flush=True))
    with working(lambda: f"{sweep.progress()}; {sum(run.is_done for run in runs)} of {len(runs)} done"):
        failed = sweep.run()
    if failed:
        print(f"{len(failed)} of {counted(len(runs), 'run')} failed: {', '.join(training.name for training in failed)}")
    return 1 if failed else 0


def visible_gpus() -> list[str]:
    """The visible GPUs, by their names in CUDA_VISIBLE_DEVICES."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(torch.cuda.device_count())] if given is None else given.split(",")


def _sweep_parser() -> argparse.ArgumentParser:
    parser = new_parser("sweep", __doc__)
    parser.add_argument("study", metavar="STUDY", help="a YAML file with config, seeds and arms, or studies/NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the runs go")
    parser.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="in place of the file's")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="runs at once, on all GPUs together")
    parser.add_argument("--list", action="store_true", help="only print the command of each run")
    return parser
