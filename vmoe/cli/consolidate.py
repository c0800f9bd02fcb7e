"""\
Writes the trained weights of a run (their average, EMA, if it keeps one) to one safetensors file, for a run of any
number of processes. It is the file of `vmoe export`, in the weights' own type.

  vmoe consolidate runs/large --out large.safetensors
"""

import argparse
from pathlib import Path

from vmoe.cli.common import job
from vmoe.cli.options import new_parser
from vmoe.cli.progress import working
from vmoe.errors import UserError


@job()
def main(argv: list[str]) -> None:
    """Runs the job."""
    options = _consolidate_parser().parse_args(argv)
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out {options.out}: must end in .safetensors")
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.checkpoints import write_safetensors

    with working("consolidating"):
        write_safetensors(options.out, options.run)
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.2f} MiB of weights")


def _consolidate_parser() -> argparse.ArgumentParser:
    parser = new_parser("consolidate", __doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder (its best checkpoint), or a checkpoint of any kind")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what to write, a .safetensors file")
    return parser
