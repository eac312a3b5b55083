"""How the command line speaks: results on stdout in the format asked for, all else on stderr."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

DEVIATION = " +-"  # ends the name of the column that holds another column's deviation
FORMATS = ("table", "json", "jsonl", "csv", "html")
UNBROKEN = 14  # a word of a table is not broken unless it is longer
BETWEEN = 3  # spaces between the columns of a table
LINE_EVERY = 5.0  # seconds between progress lines where there is no terminal

Row = Mapping[str, Any]


def say(text: str) -> None:
    """A line for people, on stderr."""
    click.echo(text, err=True)


def print_rows(
    rows: Sequence[Row], output_format: str | None, title: str = "", table_columns: Sequence[str] | None = None
) -> None:
    """Print results on stdout.

    Args:
        rows: Flat rows with equal keys.
        output_format: One of `FORMATS`, or "latex"; None means a table on a terminal, JSON lines otherwise.
        title: Of the table.
        table_columns: Those that a table shows, where all of them would be too wide; the other formats have all.
    """
    chosen = output_format or ("table" if sys.stdout.isatty() else "jsonl")
    if chosen == "table":
        _table(rows, title, table_columns)
        return
    writers = {"json": _json, "jsonl": _jsonl, "csv": _csv, "html": _html, "latex": _latex}
    writers[chosen](rows)


def _table(rows: Sequence[Row], title: str, wanted: Sequence[str] | None) -> None:
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = _for_people(rows)
    columns = [column for column in (rows[0] if rows else ()) if wanted is None or column in wanted]
    console = Console(file=sys.stdout)
    table = Table(title=title or None, box=box.SIMPLE_HEAD, pad_edge=False)
    cells = {column: [_cell(row[column]) for row in rows] for column in columns}
    numbers = [all(isinstance(row[column], (int, float, type(None))) for row in rows) for column in columns]
    headings = [name.replace(" ", "\n") if number else name for name, number in zip(columns, numbers, strict=True)]
    smallest, widths = [], []
    for heading, column in zip(headings, columns, strict=True):
        shown = [heading, *cells[column]]
        smallest.append(min(UNBROKEN, max((cell_len(word) for cell in shown for word in cell.split()), default=1)))
        widths.append(max(1, *(cell_len(line) for cell in shown for line in cell.split("\n"))))
    while sum(widths) + BETWEEN * len(widths) > console.width and widths != smallest:
        widest = max(range(len(widths)), key=lambda i: (widths[i] > smallest[i], widths[i]))
        widths[widest] -= 1
    for heading, number, width in zip(headings, numbers, widths, strict=True):
        table.add_column(Text(heading), justify="right" if number else "left", overflow="fold", width=width)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*map(Text, row))
    console.width = max(console.width, sum(widths) + BETWEEN * len(widths))
    console.print(table)


def _for_people(rows: Sequence[Row]) -> list[Row]:
    """Deviations joined to what they are of, and columns without any value left out."""
    shown = [key for key in (rows[0] if rows else ()) if any(row[key] is not None for row in rows)]

    def joined(row: Row, key: str) -> Any:
        deviation = row.get(key + DEVIATION, math.nan)
        return row[key] if math.isnan(deviation) else f"{_cell(row[key])} ± {_cell(deviation)}"

    return [{key: joined(row, key) for key in shown if not key.endswith(DEVIATION)} for row in rows]


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else _flat(value)


def _flat(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)


def _json(rows: Sequence[Row]) -> None:
    click.echo(json.dumps([_without_nan(row) for row in rows], ensure_ascii=False, indent=2))


def _jsonl(rows: Sequence[Row]) -> None:
    for row in rows:
        click.echo(json.dumps(_without_nan(row), ensure_ascii=False))


def _without_nan(row: Row) -> Row:
    """What is not known, as the deviation of one seed, is null: JSON has no NaN."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def _csv(rows: Sequence[Row]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _flat(value) for key, value in row.items()} for row in rows)
    click.echo(buffer.getvalue(), nl=False)


def _html(rows: Sequence[Row]) -> None:
    rows = _for_people(rows)
    head = "".join(f"<th>{html.escape(key)}</th>" for key in (rows[0] if rows else ()))
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in row.values()) + "</tr>" for row in rows
    )
    click.echo(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>")


def _latex(rows: Sequence[Row]) -> None:
    columns = list(rows[0]) if rows else []
    lines = [
        rf"\begin{{tabular}}{{{'l' * len(columns)}}}",
        r"\toprule",
        " & ".join(map(_latex_escape, columns)) + r" \\",
        r"\midrule",
        *(" & ".join(_latex_escape(_cell(row[column])) for column in columns) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    click.echo("\n".join(lines))


def _latex_escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, rf"\{c}" if c in "&%$#_{}" else c) for c in text)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """A bar on stderr where that is a terminal, a line every few seconds otherwise.

    Args:
        what: Is being done.

    Yields:
        A function of (done, total, note="").
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=None, note="")
            yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)
        return
    last = time.monotonic()

    def line(done: int, total: int | None, note: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY:
            last = time.monotonic()
            say(f"{what}: {done}{'' if total is None else f' of {total}'} {note}".rstrip())

    yield line


def write_failures(path: Path, failures: Sequence[tuple[str, str]]) -> None:
    """List what could not be used, one JSON object a line; no failures, no file.

    Args:
        path: Of the failures file.
        failures: (item id, reason).
    """
    if not failures:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"id": item, "reason": reason}, ensure_ascii=False) for item, reason in failures)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", errors="surrogateescape")
