"""\
Writes the images of class folders, FOLDER/train/CLASS/IMAGE and the same in val or test, as tar shards in a new folder:
few large files instead of millions of small ones. The images' bytes stay as they are. Needs `pip install
'vmoe[webdataset]'`; training on shards does not.

  vmoe make-shards imagenet --out imagenet-shards
  vmoe train --config configs/imagenet_vmoe_s16.yaml --data.name webdataset --data.root imagenet-shards
"""

import contextlib
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vmoe.cli.common import run
from vmoe.cli.options import count, new_parser
from vmoe.cli.progress import working
from vmoe.text import counted, printable


def main(argv: list[str] | None = None) -> int:
    """Runs the job with `argv`; returns its exit code."""
    return run(_make_shards, argv)


def _make_shards(argv: list[str]) -> int:
    parser = new_parser("make-shards", __doc__)
    parser.add_argument("folder", type=Path, help="with train, and val or test")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--images", type=count, default=10_000, metavar="N", help="most of a shard (default: %(default)s)"
    )
    line = "most of a shard (default: %(default)s)"
    parser.add_argument("--megabytes", type=count, default=1000, metavar="N", help=line)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the images (default: %(default)s)")
    options = parser.parse_args(argv)
    from vmoe.data.shard_writing import write_shards  # here, so that --help and a mistyped option answer at once

    columns = (TextColumn("{task.description:5}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console)
    with bar if console.is_terminal else contextlib.nullcontext():
        tasks = {}
        said = "making shards"

        def show(split: str, done: int, total: int) -> None:
            nonlocal said
            said = f"{split}: {done:,} of {total:,} images"
            if split not in tasks:
                tasks[split] = bar.add_task(split, total=total)
            bar.update(tasks[split], completed=done)

        limits = (options.images, options.megabytes)
        with working(lambda: said):
            shards = write_shards(options.folder, options.out, *limits, options.seed, show, _say)
    written = ", ".join(f"{counted(number, 'shard')} of {split}" for split, number in shards.items())
    print(f"{written} in {options.out}")
    return 0


def _say(line: str) -> None:
    print(printable(line), file=sys.stderr)
