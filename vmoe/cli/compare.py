"""`vmoe compare`: puts runs side by side."""

import argparse
import csv
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vmoe.cli.common import run
from vmoe.cli.options import new_parser

_DESCRIPTION = """\
Puts finished runs side by side, such as a V-MoE and its dense twin: test accuracy against FLOPs an image, active and
total parameters and training images/s, and how it rose. Runs that differ in their seed only are one row (mean, sd, n).

Writes comparison.csv, comparison.md and comparison.png.

  vmoe compare runs/digits runs/digits_dense --out comparison
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the job with `argv`; returns its exit code."""
    return run(_compare, argv)


def _compare(argv: list[str]) -> None:
    options = _parser().parse_args(argv)
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.analysis.comparison import differences, group_runs, read_run, table_rows, warnings_for
    from vmoe.analysis.comparison_figure import draw_comparison
    from vmoe.files import atomic_write

    folders = list({Path(path).resolve(): path for path in options.runs}.values())
    runs = [read_run(path) for path in folders]
    groups = group_runs(runs)
    rows, notes, warnings = table_rows(groups), differences(groups), warnings_for(runs)

    Console().print(_rich_table(rows))
    for note in notes:
        print(note)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    with (
        atomic_write(options.out / "comparison.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    with atomic_write(options.out / "comparison.md") as temporary:
        temporary.write_text(_markdown(rows, notes + warnings), encoding="utf-8")
    draw_comparison(groups, notes + warnings).save(options.out / "comparison.png")
    print(f"comparison.csv, comparison.md and comparison.png in {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("compare", _DESCRIPTION)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of finished runs")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the table and the plots go")
    return parser


_COLUMNS = ("run", "kind", "n", "top-1 (%)", "FLOPs", "active", "params", "images/s")
_KEY = (
    "test top-1 of the best checkpoint (± sd over seeds), FLOPs an image, active and total parameters, "
    "images/s in training"
)


def _cells(row: dict) -> list[str]:
    from vmoe.analysis.comparison_figure import short

    top1 = f"{100 * row['test_top1_mean']:.2f}"
    top1 += "" if row["test_top1_sd"] is None else f" ± {100 * row['test_top1_sd']:.2f}"
    costs = (
        row["flops_per_image"],
        row["active_parameters"],
        row["total_parameters"],
        row["train_images_per_second_mean"],
    )
    return [row["name"], row["kind"], str(row["n"]), top1, *map(short, costs)]


def _rich_table(rows: list[dict]) -> Table:
    table = Table(caption=_KEY, caption_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("run", "kind") else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, _cells(row)))
    return table


def _markdown(rows: list[dict], notes: list[str]) -> str:
    lines = [_COLUMNS, ["---"] * 2 + ["---:"] * (len(_COLUMNS) - 2), *map(_cells, rows)]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([*table, "", _KEY[0].upper() + _KEY[1:] + ".", *(f"- {note}" for note in notes), ""])
