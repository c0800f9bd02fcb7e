"""\
Puts finished runs side by side, such as a V-MoE and its dense twin: test accuracy (mAP of several classes per image)
against active FLOPs per image, total parameters and training images/s, and how it rose. Runs that differ in their seed
only are one arm (mean, sd, n), named by what tells its recipe from the others. Each arm's difference is taken over the
seeds it shares with its baseline, with a paired 95 % confidence interval: against --baseline, or else its dense twin,
or else the first arm.

With --against, runs of several values of one option, such as the part of the data, are also drawn over it, each V-MoE
beside the dense model of the same value.

With --against moe.num_experts, the test loss is drawn over the number of experts, with a power law through it.

With --gains, each V-MoE is also drawn against its dense twin of the same recipe, over how much more often that twin
errs on test images than on its training images; and a rule that tells where experts gain is fitted on half of the
twins and tested on the other half.

Writes comparison.csv (one row per arm), runs.csv (one row per run), comparison.md, comparison.json and comparison.png;
with --against also against.csv and against.png, with --gains also gains.csv and gains.png.
A comparison.json keeps all that is needed to compare its runs again, beside others.

  vmoe compare runs/digits runs/digits_dense --out comparison
  vmoe compare runs/study/*_s* --baseline dense --by-folder --out study
  vmoe compare study/comparison.json runs/mine --out beside
  vmoe compare runs/data/*_s* --against data.subset.fraction --out data
  vmoe compare assets/results/pays_experts.json --against moe.num_experts --out experts
  vmoe compare assets/results/*.json --gains --out gains
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vmoe.cli.common import job
from vmoe.cli.options import new_parser
from vmoe.errors import UserError
from vmoe.text import printable

if TYPE_CHECKING:
    from vmoe.evaluation.compare.runs import Run


@job()
def main(argv: list[str]) -> None:
    """Runs the job."""
    options = _compare_parser().parse_args(argv)
    # Imported here, so that --help and a mistyped option answer at once.
    from vmoe.evaluation.compare.against import against, against_rows, draw_against, power_laws
    from vmoe.evaluation.compare.figure import draw_comparison
    from vmoe.evaluation.compare.gains import draw_gains, gain_rows, gains
    from vmoe.evaluation.compare.intervals import differences, find_arm, sentence, table_rows
    from vmoe.evaluation.compare.rule import fit_rule
    from vmoe.evaluation.compare.runs import as_plain, group_runs, read_comparison, read_run, warnings_for
    from vmoe.files import write_csv, write_json, write_text

    runs = []
    for path in {Path(path).resolve(): path for path in options.runs}.values():
        runs += read_comparison(path) if Path(path).suffix == ".json" else [read_run(path)]
    arms = group_runs(runs, options.by_folder)
    series = against(runs, options.against) if options.against else []
    pairs = gains(runs) if options.gains else []
    if options.gains and not pairs:
        raise UserError(
            "--gains: no V-MoE here has a dense twin of its recipe with accuracy on training images; add its run"
        )
    baseline = None if options.baseline is None else find_arm(arms, options.baseline)
    found = differences(arms, baseline)
    rows, notes, warnings = table_rows(arms, found), [sentence(part) for part in found], warnings_for(runs)

    Console().print(_rich_table(rows, runs[0]))
    for note in notes:
        print(printable(note))
    laws = power_laws(series) if options.against == "moe.num_experts" else []
    rule = fit_rule(pairs)
    for line in (*laws, *([] if rule is None else [rule])):
        print(printable(str(line)))
    for warning in warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    each = [{"arm": arm.name, **_run_entry(run)} for arm in arms for run in arm.runs]
    write_csv(options.out / "comparison.csv", rows)
    write_csv(options.out / "runs.csv", each)
    write_text(options.out / "comparison.md", _markdown(rows, notes + warnings, runs[0]))
    kept = [{"arm": arm.name, "seed": run.seed, **as_plain(run)} for arm in arms for run in arm.runs]
    write_json(options.out / "comparison.json", {"arms": rows, "runs": kept, "notes": notes, "warnings": warnings})
    draw_comparison(arms, found, notes + warnings).save(options.out / "comparison.png")
    if series:
        write_csv(options.out / "against.csv", against_rows(series, options.against))
        draw_against(series, options.against, laws).save(options.out / "against.png")
    if pairs:
        write_csv(options.out / "gains.csv", gain_rows(pairs))
        draw_gains(pairs).save(options.out / "gains.png")
    more = ("against.csv, against.png, " if series else "") + ("gains.csv, gains.png, " if pairs else "")
    print(f"{more}comparison.csv, runs.csv, comparison.md, comparison.json and comparison.png in {options.out}")


def _compare_parser() -> argparse.ArgumentParser:
    parser = new_parser("compare", __doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of finished runs, or a comparison.json")
    parser.add_argument(
        "--baseline", metavar="ARM", help="what all arms are compared with: its name, or a run's folder name"
    )
    parser.add_argument(
        "--by-folder", action="store_true", help="name arms by their folders without _sSEED, as a sweep made them"
    )
    parser.add_argument("--against", metavar="OPTION", help="an option of the recipe with numbers, by dotted name")
    parser.add_argument(
        "--gains", action="store_true", help="draw where experts pay: every V-MoE against its dense twin"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the table and the plots go")
    return parser


_COLUMNS = ("arm", "n", "test {} (%)", "train {} (%)", "difference", "FLOPs", "active", "params", "images/s")
_KEY = (
    "{} of the best checkpoint on the test set (± sd over seeds) and on training images as they are, difference to "
    "the baseline in points with its paired 95 % interval, FLOPs per image, active and total parameters, images/s in "
    "training"
)


def _run_entry(run: "Run") -> dict:
    return {
        "run": run.name,
        "seed": run.seed,
        f"test_{run.metric}": run.score,
        f"train_clean_{run.metric}": run.train_score,
        f"val_{run.metric}": run.summary["metrics"].get(f"val/{run.metric}"),
        "train_images_per_second": run.images_per_second,
        "train_seconds": run.summary.get("train_seconds"),
        "peak_memory_mib": run.summary.get("peak_memory_mib"),
        "total_parameters": run.total_parameters,
        "active_parameters": run.active_parameters,
        "flops_per_image": run.flops,
        "device": run.device,
        **run.summary.get("versions", {}),
        "command": run.summary.get("command"),
    }


def _table_cells(row: dict, metric: str) -> list[str]:
    from vmoe.evaluation.compare.figure import short

    costs = (
        row["flops_per_image"],
        row["active_parameters"],
        row["total_parameters"],
        row["train_images_per_second_mean"],
    )
    tested = _mean_and_sd(row[f"test_{metric}_mean"], row[f"test_{metric}_sd"])
    return [
        row["name"],
        str(row["n"]),
        tested,
        _mean_and_sd(row[f"train_clean_{metric}_mean"]),
        _difference(row),
        *map(short, costs),
    ]


def _mean_and_sd(mean: float | None, sd: float | None = None) -> str:
    if mean is None:
        return "-"
    return f"{100 * mean:.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}")


def _difference(row: dict) -> str:
    if row["difference"] is None:
        return "-"
    points = f"{100 * row['difference']:+.2f}"
    if row["difference_low"] is None:
        return f"{points} (n={row['paired_seeds']})" if row["paired_seeds"] else f"{points} (unpaired)"
    return f"{points} [{100 * row['difference_low']:+.2f}, {100 * row['difference_high']:+.2f}]"


def _rich_table(rows: list[dict], run: "Run") -> Table:
    table = Table(caption=_KEY.format(run.metric_title), caption_justify="left")
    for column in _COLUMNS:
        table.add_column(
            column.format(run.metric_title), justify="left" if column == "arm" else "right", overflow="fold"
        )
    for row in rows:
        table.add_row(*(escape(printable(cell)) for cell in _table_cells(row, run.metric)))
    return table


def _markdown(rows: list[dict], notes: list[str], run: "Run") -> str:
    titles, key = [column.format(run.metric_title) for column in _COLUMNS], _KEY.format(run.metric_title)
    cells = [_table_cells(row, run.metric) for row in rows]
    lines = [titles, ["---"] + ["---:"] * (len(_COLUMNS) - 1), *cells]
    table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([*table, "", key[0].upper() + key[1:] + ".", *(f"- {note}" for note in notes), ""])
