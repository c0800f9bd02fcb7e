"""\
Writes the images of class folders or of a table as tar shards in a new folder: few large files instead of millions of
small ones. The images' bytes do not change. Splits are read, or cut off for the test, as `vmoe train` does it.
This job needs `pip install 'vmoe[webdataset]'`; training on shards does not.

  vmoe make-shards imagenet --out imagenet-shards
  vmoe make-shards cells.csv --columns separator="|" --out cells-shards
  vmoe train --config configs/imagenet_vmoe_s16.yaml --data.name webdataset --data.root imagenet-shards
"""

import sys
from pathlib import Path

from tqdm import tqdm

from vmoe.cli.common import job, renamed
from vmoe.cli.inputs import DATA_OPTIONS, add_columns_option, table_columns
from vmoe.cli.options import count, new_parser
from vmoe.cli.progress import working
from vmoe.text import counted, printable

_TABLE_OPTIONS = {key: option for key, option in DATA_OPTIONS.items() if option.startswith("--columns")}


@job(_TABLE_OPTIONS | {"data.root": "FOLDER"})
def main(argv: list[str]) -> int:
    """Runs the job."""
    parser = new_parser("make-shards", __doc__)
    parser.add_argument("source", type=Path, metavar="FOLDER", help="or a table, as `vmoe train` takes them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--images", type=count, default=10_000, metavar="N", help="most of a shard (default: %(default)s)"
    )
    line = "most of a shard (default: %(default)s)"
    parser.add_argument("--megabytes", type=count, default=1000, metavar="N", help=line)
    add_columns_option(parser, "the columns of a table that have other names")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the images (default: %(default)s)")
    options = parser.parse_args(argv)
    table = None if options.columns is None else table_columns(options.columns)
    from vmoe.data.shard_writing import write_shards  # here, so that --help and a mistyped option answer at once

    bars = {}
    said = "making shards"

    def show(split: str, done: int, total: int) -> None:
        nonlocal said
        said = f"{split}: {done:,} of {total:,} images"
        if split not in bars:
            bars[split] = tqdm(total=total, desc=split, disable=None)  # None: unless in a terminal
        bars[split].update(done - bars[split].n)

    limits = (options.images, options.megabytes)
    with working(lambda: said):
        shards = write_shards(options.source, options.out, *limits, options.seed, show, _log, table)
    for bar in bars.values():
        bar.close()
    written = ", ".join(f"{counted(number, 'shard')} of {split}" for split, number in shards.items())
    print(f"{written} in {options.out}")
    return 0


def _log(line: str) -> None:
    print(printable(renamed(line, _TABLE_OPTIONS)), file=sys.stderr)
