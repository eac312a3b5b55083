"""What the pages take from the code when they are built, so that it cannot go stale.

`[[method NAME]]` in a page becomes the docstring of the method's module and its settings; `[[errors]]` the tree of
errors. `[[figures NAME]]` is a method's part of the benchmark's rows in figures/methods.csv, and
`[[benchmark runs]]`, `[[benchmark means]]`, `[[benchmark tables]]`, `[[benchmark bits]]`, `[[benchmark recall]]`,
`[[benchmark seconds]]` are what was run, its tables and its plots. Equations become MathML, which browsers draw
themselves.
"""

from __future__ import annotations

import dataclasses
import html as entities
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

from cmh_milvus import errors
from cmh_milvus.methods import get_method
from cmh_milvus.report.benchmark import benchmark_table, plotted_length, read_rows
from cmh_milvus.report.plots import base_method, bits_plot, recall_plot, seconds_plot

FIGURES = Path(__file__).parent / "figures" / "methods.csv"  # printed by the command on methods/comparison.md
_MARK = re.compile(r"^\[\[(method|errors|figures|benchmark) ?(\w*)\]\]$", re.MULTILINE)
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)  # as pymdownx.arithmatex writes them
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def expand(markdown: str) -> str:
    """A page's text with its marks replaced."""
    return _MARK.sub(lambda mark: _content(mark[1], mark[2]), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for each page."""
    return expand(markdown)


def on_page_content(html: str, **_: Any) -> str:
    """MkDocs calls this for each page; mends what mkdocs-click makes of a missing default and of examples."""
    html = html.replace("<code>Sentinel.UNSET</code>", "")
    html = re.sub(r"<p>(Examples?:)\n(.*?)</p>", r"<p>\1</p><pre><code>\2</code></pre>", html, flags=re.DOTALL)
    html = _INLINE.sub(lambda found: mathml(entities.unescape(found[1])), html)
    return _BLOCK.sub(lambda found: _equation(entities.unescape(found[1]).strip()), html)


def mathml(latex: str, display: str = "inline") -> str:
    """MathML of a formula; what the converter would pass on unread is an error."""
    made: str = convert(latex, display=display)
    if re.search(r"\\|&(?!#?\w+;)", made):
        raise ValueError(f"no MathML for {latex!r}: {made}")
    return made


def _equation(latex: str) -> str:
    r"""A formula on a line of its own, with the number of its \tag."""
    tag = re.search(r"\s*\\tag\{(.*?)\}$", latex)
    number = f'<span class="number">({entities.escape(tag[1])})</span>' if tag else ""
    formula = mathml(latex[: tag.start()] if tag else latex, "block")
    return f'<div class="equation">{formula}{number}</div>'


def _content(kind: str, name: str) -> str:
    if kind == "errors":
        return _fence(_tree())
    return {"method": _method, "figures": _figures, "benchmark": _benchmark}[kind](name)


def _figures(name: str) -> str:
    """A method's rows, over all data sets and code lengths."""
    get_method(name)  # so that a name that does not exist is an error
    rows = [row for row in _rows() if base_method(row["method"]) == name]
    if not rows:
        return "Not measured yet."
    lead = ("data", "method", "n_bits") if len({row["method"] for row in rows}) > 1 else ("data", "n_bits")
    table = benchmark_table(sorted(rows, key=lambda row: (row["data"], row["method"], row["n_bits"])), lead)
    return f"[Methods side by side](comparison.md) says what was run and how to read it.\n\n{table}"


def _benchmark(part: str) -> str:
    """Tables and plots of all methods."""
    rows = _rows()
    if not rows:
        return "Not measured yet."
    n_bits = plotted_length(rows)
    if part == "runs":
        return _runs(rows)
    default = [row for row in rows if ":" not in row["method"]]
    if part == "means":
        return _means(default)
    if part == "tables":
        chosen = [row for row in rows if row["n_bits"] == n_bits]
        return "\n\n".join(
            f"### {data}, {n_bits} bits\n\nChance reaches a MAP@all of {chance:.3f}.\n\n"
            + benchmark_table([row for row in chosen if row["data"] == data], ("method",))
            for data, chance in {row["data"]: row["chance"] for row in chosen}.items()
        )
    plots = {
        "bits": lambda: bits_plot(default),
        "recall": lambda: recall_plot(rows, n_bits),
        "seconds": lambda: seconds_plot(default, n_bits),
    }
    return f'<figure class="plot" data-search-exclude>\n{plots[part]()}</figure>'


def _means(rows: list[dict[str, Any]]) -> str:
    """Mean MAP@all of both directions: a line a method, a column a data set and length."""
    found = {(row["method"], row["data"], row["n_bits"]): row for row in rows}
    lengths: dict[str, list[int]] = {}
    for data, n_bits in dict.fromkeys((data, n_bits) for _, data, n_bits in sorted(found, key=lambda key: key[2])):
        lengths.setdefault(data, []).append(n_bits)
    columns = [(data, n_bits) for data, of_data in lengths.items() for n_bits in of_data]
    chance = {row["data"]: f"{row['chance']:.3f}" for row in rows}

    def figure(method: str, data: str, n_bits: int) -> str:
        row = found.get((method, data, n_bits))
        return f"{row['MAP@all']:.3f} <small>± {row['MAP@all +-']:.3f}</small>" if row else ""

    def line(*cells: str) -> str:
        return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"

    learns_from = {name: get_method(name).supervision for name, _, _ in found}
    over = [f'<th colspan="{len(of_data)}">{data}</th>' for data, of_data in lengths.items()]
    lines = [
        f'<tr><th rowspan="2">method</th><th rowspan="2">learns from</th>{"".join(over)}</tr>',
        f"<tr>{''.join(f'<th>{n_bits} bits</th>' for _, n_bits in columns)}</tr>",
        *(
            line(f"<code>{name}</code>", kind, *(figure(name, *column) for column in columns))
            for name, kind in sorted(learns_from.items(), key=lambda item: (item[1], item[0]))
        ),
        line("chance", "", *(chance[data] for data, _ in columns)),
    ]
    return '<div class="scroll"><table class="dense">\n' + "\n".join(lines) + "\n</table></div>"


def _runs(rows: list[dict[str, Any]]) -> str:
    """What the file holds, as a list."""

    def listed(key: str) -> str:
        values = dict.fromkeys(
            value for row in rows for value in row[key].split(", ")
        )  # a mean over two devices has both
        return ", ".join(f"`{value}`" for value in values)

    lengths = ", ".join(map(str, sorted({row["n_bits"] for row in rows})))
    seeds = " to ".join(map(str, sorted({min(row["seeds"] for row in rows), max(row["seeds"] for row in rows)})))
    return (
        f"- Data sets: {listed('data')}.\n- Methods: {listed('method')}.\n"
        f"- Code lengths: {lengths} bits. Seeds: {seeds} of each. Device: {listed('device')}.\n"
        f"- The file: [{FIGURES.name}](../figures/{FIGURES.name})."
    )


def _rows() -> list[dict[str, Any]]:
    """The benchmark's rows; none where the file is not there."""
    return read_rows(FIGURES) if FIGURES.exists() else []


def _method(name: str) -> str:
    method = get_method(name)
    cited = method.citation
    config = inspect.getdoc(method.Config) or ""
    defaults = "\n".join(
        f"| `{field.name}` | `{field.default!r}` | {_meaning(config, field.name)} |"
        for field in dataclasses.fields(method.Config)
    )
    source = f"[{cited.title}]({cited.url}), {cited.venue} {cited.year}"
    return (
        f"{cited.authors}: {source}. Learns from {method.supervision}.\n\n"
        f"{_fence(inspect.getdoc(sys.modules[method.__module__]) or '')}\n\n"
        f"| setting (`--set NAME=VALUE`) | default | meaning |\n|---|---|---|\n{defaults}"
    )


def _meaning(docstring: str, field: str) -> str:
    """A field's line of the `Attributes:` section."""
    found = re.search(rf"^ {{4}}{field}: (.*(?:\n {{8}}.*)*)", docstring, re.MULTILINE)
    return " ".join(found[1].split()).replace("|", "\\|") if found else ""


def _tree() -> str:
    tree = inspect.getdoc(errors) or ""
    return inspect.cleandoc(tree.split("::", 1)[1].split("\n\nEach message", 1)[0])


def _fence(text: str) -> str:
    return f"```text\n{text.strip()}\n```"
