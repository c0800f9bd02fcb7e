"""Measurements as rows of a table, and tables as markdown."""

from typing import Any, NamedTuple

from vmoe.bench.cases import LayerCase
from vmoe.bench.layer import baseline_of
from vmoe.bench.timing import Measurement

Row = dict[str, Any]


class Column(NamedTuple):
    """A column of a table."""

    title: str  # the heading
    key: str  # the key of its values in a row
    form: str = ""  # the format of a number


LAYER_COLUMNS = (
    Column("", "job"),
    Column("ms", "ms", "#.4g"),
    Column("spread", "spread", ".1%"),
    Column("ratio", "ratio", ".2f"),
    Column("of peak", "of_peak", ".0%"),
    Column("MiB", "peak_mib", ",.0f"),
    Column("MiB ratio", "memory_ratio", ".2f"),
    Column("waits", "synchronizes"),
    Column("issue ms", "issue_ms", ".2f"),
)


def measurement_row(result: Measurement, base: Measurement | None) -> Row:
    """The columns of all tables. Ratios are to `base`, or None without it. A failed job has only `error`."""
    if result.error is not None:
        return {"error": result.error}
    base = base if base is not None and base.error is None else None
    memory = base is not None and result.peak_mib is not None and base.peak_mib
    return {
        "ms": result.median,
        "spread": result.spread,
        "ratio": None if base is None else result.median / base.median,
        "peak_mib": result.peak_mib,
        "memory_ratio": result.peak_mib / base.peak_mib if memory else None,
        "synchronizes": result.synchronizes,
        "issue_ms": result.issue_ms,
        "times_ms": result.times,
    }


def layer_rows(results: dict[str, Measurement], case: LayerCase, peak: float) -> list[Row]:
    """A row per job: its time, the ratio to its dense job, and the share of `peak` (FLOP/s) for its active FLOPs."""
    rows = []
    for name, result in results.items():
        row = {"job": name} | measurement_row(result, results.get(baseline_of(name)))
        if result.error is None:
            flops = case.forward_flops if name.endswith("inference") else case.flops
            row["of_peak"] = flops / (result.median / 1e3) / peak
        rows.append(row)
    return rows


def markdown_table(columns: tuple[Column, ...], rows: list[Row]) -> str:
    """The rows as a markdown table with aligned columns.

    Columns without values are left out. A last column has the `error` of rows, if there is one.
    """
    columns = [c for c in columns if c is columns[0] or any(row.get(c.key) is not None for row in rows)]
    if any(row.get("error") for row in rows):
        columns.append(Column("failed with", "error"))
    cells = [[column.title for column in columns], *([_cell(row, column) for column in columns] for row in rows)]
    widths = [
        len(column.title) if column.key == "error" else max(3, *(len(line[index]) for line in cells))
        for index, column in enumerate(columns)
    ]
    is_text = [index == 0 or column.key == "error" for index, column in enumerate(columns)]
    rule = ["-" * width if left else "-" * (width - 1) + ":" for left, width in zip(is_text, widths, strict=True)]
    lines = [
        [
            text.ljust(width) if left else text.rjust(width)
            for text, left, width in zip(line, is_text, widths, strict=True)
        ]
        for line in cells
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _cell(row: Row, column: Column) -> str:
    value = row.get(column.key)
    if value is None:
        return "" if row.get("error") or column.key == "error" else "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format(value, column.form) if column.form else str(value).replace("|", "/")
