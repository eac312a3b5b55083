"""Items from a user's own files: a folder of pictures, CSV or TSV, JSON Lines, Parquet, or standard input.

A row that cannot be used is handed to `on_failure` with its reason and the rest goes on. That holds for a path that
leads out of the data's folder too: such a picture is never opened.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from cmh_milvus.datasets.base import Item, PairedDataset
from cmh_milvus.errors import DataError, SettingsError
from cmh_milvus.pictures import PICTURE_SUFFIXES

Format: TypeAlias = Literal["folder", "csv", "tsv", "jsonl", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
_SUFFIXES: dict[str, Format] = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".pq": "parquet",
}  # fmt: skip
_NAMES = {
    "id": ("id",),
    "image": ("image", "picture", "file", "file_name", "path"),
    "text": ("text", "caption", "title"),
    "label": ("labels", "label", "tags"),
}
_ROWS_PEEKED = 100
_WHOLE = re.compile(r"-?(0|[1-9][0-9]*)")  # 007 and 1_000 are no numbers
_NUMBER = re.compile(r"-?((0|[1-9][0-9]*)(\.[0-9]+)?|\.[0-9]+)([eE][+-]?[0-9]+)?")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ItemFailure:
    """An item that was left out.

    Attributes:
        id: Its id, or "row N" where it has none (the first row below a header is row 1).
        reason: What is wrong with it.
    """

    id: str
    reason: str


OnFailure = Callable[[ItemFailure], None]


class _BadItem(Exception):
    """What is wrong with one row; never leaves this module."""


@dataclass(frozen=True)
class _Columns:
    """The user's column names, by part; None where they are guessed."""

    given: Mapping[str, str | None]
    separator: str

    def find(self, part: str, existing: Sequence[str]) -> str | None:
        """The column of a part of an item; None if there is none."""
        if (name := self.given[part]) is not None:
            return name if name in existing else None
        known = {name.strip().casefold(): name for name in reversed(existing)}
        return next((known[name] for name in _NAMES[part] if name in known), None)

    def check(self, existing: Sequence[str], source: str) -> None:
        """Raise SettingsError if a named column is not there, or neither picture nor text can be found."""
        shown = ", ".join(map(repr, existing)) or "none"
        for part, name in self.given.items():
            if name is not None and name not in existing:
                raise SettingsError(f"{source} has no column {name!r} for the {part}; its columns are {shown}")
        if self.find("image", existing) is None and self.find("text", existing) is None:
            raise SettingsError(
                f"{source} has no column that is known to hold pictures ({', '.join(_NAMES['image'])}) or texts "
                f"({', '.join(_NAMES['text'])}); say which it is; its columns are {shown}"
            )


def read_items(
    source: Path | str,
    *,
    format: Format | None = None,  # noqa: A002
    id_column: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    label_separator: str = ",",
    number_columns: Sequence[str] = (),
    on_failure: OnFailure | None = None,
) -> Iterator[Item]:
    r"""Items of a source, one by one, in its order.

    A folder is searched for pictures, sub-folders included, hidden files and linked folders not; the text of
    `a.jpg` is `a.txt` beside it. In the other forms a row is an item, and paths of pictures are relative to the
    file's folder (for standard input: the working folder). JSON null, or a column that a row lacks, stands for
    a missing picture or text; an empty text is a failure.

    Args:
        source: A folder, a file, or "-" for JSON Lines on standard input.
        format: "folder", "csv", "tsv", "jsonl" or "parquet"; by default the file's suffix says.
        id_column: By default "id"; without one, ids are relative paths (folder) or row numbers from 1.
        image_column: By default the first of image, picture, file, file_name, path.
        text_column: By default the first of text, caption, title.
        label_column: By default the first of labels, label, tags. Its values are lists, or text to be split.
        label_separator: Between labels where they are one text.
        number_columns: Further columns of a CSV or TSV that become int or float if every cell is a plain number or
            empty; an empty cell is then None. Whole numbers beyond 64 bits are none. The file is read once more.
        on_failure: Called with each item that is left out; by default they are logged.

    Raises:
        SettingsError: A column or format is unknown; the text lists the columns that exist.
        DataError: The source is missing, unreadable, or holds no usable item (raised at the end).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.csv")
        ...     _ = path.write_text("id,text,labels\n7,a cat,\"pet,animal\"\n")
        ...     [(item.id, item.text, item.labels) for item in read_items(path)]
        [('7', 'a cat', ('pet', 'animal'))]
    """
    columns = _Columns(
        {"id": id_column, "image": image_column, "text": text_column, "label": label_column}, label_separator
    )
    if not label_separator:
        raise SettingsError("the label separator is empty: give a character such as ',' or '|'")
    path, kind = _kind(source, format)
    if kind == "folder":
        named = [name for name in columns.given.values() if name is not None]
        if named:
            raise SettingsError(f"a folder of pictures has no columns, so {named[0]!r} cannot be one of them")
        candidates = _folder_items(cast(Path, path))
    else:
        candidates = _row_items(path, kind, columns, number_columns)
    return _usable(candidates, _shown(source), on_failure or _log_failure)


def load_paired(
    source: Path | str,
    *,
    name: str | None = None,
    format: Format | None = None,  # noqa: A002
    id_column: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    label_separator: str = ",",
) -> tuple[PairedDataset, list[ItemFailure]]:
    """The items of a source that have both a picture and a text, and those that were left out.

    Args:
        source: As for `read_items`, like the other arguments.
        name: Of the data set; by default the source's own.
        format: See `read_items`.
        id_column: See `read_items`.
        image_column: See `read_items`.
        text_column: See `read_items`.
        label_column: See `read_items`.
        label_separator: See `read_items`.

    Raises:
        SettingsError: As `read_items`.
        DataError: As `read_items`, or no item has both.
    """
    failures: list[ItemFailure] = []
    pairs = []
    for item in read_items(
        source,
        format=format,
        id_column=id_column,
        image_column=image_column,
        text_column=text_column,
        label_column=label_column,
        label_separator=label_separator,
        on_failure=failures.append,
    ):
        if item.image is None or item.text is None:
            missing = "picture" if item.image is None else "text"
            failures.append(ItemFailure(item.id, f"it has no {missing}, and pairs are needed"))
        else:
            pairs.append(item)
    if not pairs:
        raise DataError(f"no item of {_shown(source)} has both a picture and a text; {_first(failures)}")
    label_names = tuple(sorted({label for item in pairs for label in item.labels}))
    return PairedDataset(name or Path(source).stem or str(source), tuple(pairs), label_names), failures


def _log_failure(failure: ItemFailure) -> None:
    _log.warning("%s is left out: %s", failure.id, failure.reason)


def _shown(source: Path | str) -> str:
    return "standard input" if str(source) == "-" else repr(str(source))


def _first(failures: Sequence[ItemFailure]) -> str:
    if not failures:
        return "there are no items at all"
    return f"all {len(failures)} were left out, the first ({failures[0].id}) because: {failures[0].reason}"


def _kind(source: Path | str, given: Format | None) -> tuple[Path | None, Format]:
    """Path (None for standard input) and form of a source that exists."""
    if given is not None and given not in FORMATS:
        raise SettingsError(f"unknown data format {given!r}; choose one of {', '.join(FORMATS)}")
    if str(source) == "-":
        if given not in (None, "jsonl"):
            raise SettingsError(f"standard input is read as jsonl, not as {given}: put the data into a file")
        return None, "jsonl"
    path = Path(source)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:
        raise DataError(f"{_shown(source)} cannot be read: {error}") from error
    if is_folder or given == "folder":
        if not is_folder:
            raise DataError(f"there is no folder {_shown(source)}")
        if given not in (None, "folder"):
            raise SettingsError(f"{_shown(source)} is a folder and cannot be read as {given}: name the file in it")
        return path, "folder"
    if not is_file:
        raise DataError(
            f"{_shown(source)} is not a regular file" if path.exists() else f"there is no file {_shown(source)}"
        )
    kind = given or _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise SettingsError(
            f"the suffix of {_shown(source)} does not tell its format: name it {', '.join(_SUFFIXES)}, "
            f"or give `format` in Python ({', '.join(FORMATS)})"
        )
    return path, kind


def _usable(candidates: Iterator[tuple[str, Item | _BadItem]], source: str, on_failure: OnFailure) -> Iterator[Item]:
    """The good items, each id once; the others go to `on_failure`."""
    seen: set[str] = set()
    failures: list[ItemFailure] = []  # the first is told if nothing is usable

    def fail(item_id: str, reason: str) -> None:
        failure = ItemFailure(item_id, reason)
        if not seen:
            failures.append(failure)
        on_failure(failure)

    for item_id, item in candidates:
        if isinstance(item, _BadItem):
            fail(item_id, str(item))
        elif item.id in seen:
            fail(item.id, "its id occurs earlier in the source; the first item was kept")
        else:
            seen.add(item.id)
            yield item
    if not seen:
        raise DataError(f"{source} holds no usable item; {_first(failures)}")


def _folder_items(folder: Path) -> Iterator[tuple[str, Item | _BadItem]]:
    root = folder.resolve()
    for path in _pictures_below(folder):
        name = path.relative_to(folder).as_posix()
        try:
            item_id = _checked_id(name)
            image = _inside(path, root)
            sidecar = path.with_suffix(".txt")
            text = None
            if sidecar.is_file():
                try:
                    text = _checked_text(_inside(sidecar, root).read_text(encoding="utf-8-sig").strip())
                except (OSError, UnicodeDecodeError) as error:
                    raise _BadItem(f"its text file {sidecar.name!r} cannot be read: {error}") from None
            yield item_id, Item(item_id, image, text)
        except _BadItem as error:
            yield ascii(name)[1:-1], error


def _pictures_below(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"the folder {_shown(folder)} cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _pictures_below(path)
        elif path.suffix.lower() in PICTURE_SUFFIXES:
            yield path


def _row_items(
    path: Path | None, kind: Format, columns: _Columns, number_columns: Sequence[str]
) -> Iterator[tuple[str, Item | _BadItem]]:
    root = (path.parent if path is not None else Path()).resolve()
    if path is None or kind == "jsonl":
        rows = _checked_columns(_jsonl_rows(path), columns, _shown(path or "-"))
    elif kind == "parquet":
        rows = _parquet_rows(path, columns)
    else:
        delimiter = "," if kind == "csv" else "\t"
        rows = _with_numbers(partial(_csv_rows, path, columns, delimiter), columns, number_columns)
    for number, row in enumerate(rows, start=1):
        name = f"row {number}"
        if isinstance(row, _BadItem):
            yield name, row
            continue
        try:
            column = columns.find("id", list(row))
            item_id = str(number) if column is None else _checked_id(row[column])
            name = item_id
            yield name, _item(item_id, row, columns, root)
        except _BadItem as error:
            yield name, error


def _item(item_id: str, row: Mapping[str, Any], columns: _Columns, root: Path) -> Item:
    found = {part: columns.find(part, list(row)) for part in _NAMES}
    value = {part: row[column] if column is not None else None for part, column in found.items()}
    if value["image"] in (None, "") and value["text"] is None:
        raise _BadItem(f"it has neither a picture nor a text (its columns: {', '.join(map(repr, row)) or 'none'})")
    image = None
    if value["image"] not in (None, ""):
        if not isinstance(value["image"], str):
            raise _BadItem(f"its picture must be the path of a file, got a {type(value['image']).__name__}")
        image = _inside(root / value["image"], root)
    return Item(
        id=item_id,
        image=image,
        text=None if value["text"] is None else _checked_text(value["text"]),
        labels=_labels(value["label"], columns.separator),
        fields={key: row[key] for key in row if key not in found.values()},
    )


def _csv_rows(path: Path, columns: _Columns, delimiter: str) -> Iterator[dict[str, Any] | _BadItem]:
    # Bytes that are not UTF-8 become lone surrogates, which fail the rows that hold them and no others.
    with _open_text(path) as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise DataError(f"the first line of {_shown(path)} cannot be read: {error}") from error
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise DataError(f"{_shown(path)} has more than one column {twice!r}: rename one of them")
        if not header:
            raise DataError(f"{_shown(path)} is empty: it needs a first line with the names of its columns")
        columns.check(header, _shown(path))
        while True:
            first = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield _BadItem(_torn_row(first, reader.line_num, error))
                continue
            if not row:
                continue  # an empty line
            if len(row) != len(header):
                lines = f" (lines {first} to {reader.line_num})" if reader.line_num > first else ""
                yield _BadItem(f"it has {len(row)} fields where the first line names {len(header)}{lines}")
            else:
                yield dict(zip(header, row, strict=True))


def _torn_row(first: int, last: int, error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        lines = f"lines {first} to {last}" if last > first else f"line {first}"
        return f"{lines}: a quote opened on line {first} is not closed"
    if last > first:
        return f"lines {first} to {last} cannot be read as one row: {error}; look for a quote that is not closed"
    return f"line {first} cannot be read: {error}"


def _with_numbers(
    read: Callable[[], Iterator[dict[str, Any] | _BadItem]], columns: _Columns, names: Sequence[str]
) -> Iterator[dict[str, Any] | _BadItem]:
    """The rows, with int or float in those of the named columns that hold nothing else; reads them all to find out."""
    kinds: dict[str, type[int] | type[float] | None] = {}  # None: some cell is no number
    further: list[str] | None = None  # those of the names that are columns, and no part of an item
    for row in read() if names else ():
        if isinstance(row, _BadItem):
            continue
        if further is None:
            parts = {columns.find(part, list(row)) for part in _NAMES}
            further = [name for name in names if name in row and name not in parts]
        for name in further:
            if row[name] and kinds.get(name, int) is not None:
                kind = _number_kind(row[name])
                kinds[name] = float if kind is int and kinds.get(name) is float else kind
    for row in read():
        if isinstance(row, dict):
            numbers = {name: kind(row[name]) if row[name] else None for name, kind in kinds.items() if kind is not None}
            row = row | numbers
        yield row


def _number_kind(cell: str) -> type[int] | type[float] | None:
    if _WHOLE.fullmatch(cell):
        return int if len(cell) <= 20 and -(2**63) <= int(cell) < 2**63 else None
    return float if _NUMBER.fullmatch(cell) and math.isfinite(float(cell)) else None


def _open_text(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(f"{_shown(path)} is UTF-16: save it as UTF-8")
        return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")
    except OSError as error:
        raise DataError(f"{_shown(path)} cannot be read: {error.strerror}") from error


def _jsonl_rows(path: Path | None) -> Iterator[dict[str, Any] | _BadItem]:
    try:
        with nullcontext(sys.stdin.buffer) if path is None else path.open("rb") as file:
            for number, line in enumerate(file):
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
                if not content.strip():
                    continue
                try:
                    row = json.loads(content.decode("utf-8"))
                except (ValueError, RecursionError) as error:
                    yield _BadItem(f"line {number + 1} is not JSON: {error}")
                    continue
                if isinstance(row, dict):
                    yield row
                else:
                    yield _BadItem(f"line {number + 1} is a JSON {type(row).__name__}, not an object")
    except OSError as error:
        raise DataError(f"{_shown(path or '-')} cannot be read: {error.strerror or error}") from error


def _checked_columns(
    rows: Iterator[dict[str, Any] | _BadItem], columns: _Columns, source: str
) -> Iterator[dict[str, Any] | _BadItem]:
    """The rows; first looks for the named columns in some of them, since each may lack what is missing in it."""
    if any(name is not None for name in columns.given.values()):
        peeked = [row for _, row in zip(range(_ROWS_PEEKED), rows, strict=False)]
        existing = list(dict.fromkeys(key for row in peeked if isinstance(row, dict) for key in row))
        if existing:
            columns.check(existing, source)
        yield from peeked
    yield from rows


def _parquet_rows(path: Path, columns: _Columns) -> Iterator[dict[str, Any] | _BadItem]:
    try:
        with pq.ParquetFile(path) as file:
            columns.check(file.schema_arrow.names, _shown(path))
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except SettingsError:  # of `check`; a ValueError too
        raise
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:  # such as a time beyond Python's
        raise DataError(f"{_shown(path)} cannot be read as Parquet: {error}") from error


def _checked_id(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _BadItem(f"its id must be text or a whole number, got {value!r:.80}")
    item_id = str(value)
    if not item_id.strip():
        raise _BadItem("its id is empty")
    _check_characters(item_id, "id")
    if any(unicodedata.category(character) == "Cc" for character in item_id):
        raise _BadItem("its id holds a control character, such as a line end")
    return item_id


def _checked_text(value: Any) -> str:
    if not isinstance(value, str):
        raise _BadItem(f"its text must be text, got a {type(value).__name__}")
    if not value.strip():
        raise _BadItem("its text is empty")
    _check_characters(value, "text")
    return value


def _check_characters(value: str, what: str) -> None:
    if "\0" in value:
        raise _BadItem(f"its {what} holds a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadItem(f"its {what} is not valid UTF-8") from None


def _inside(path: Path, root: Path) -> Path:
    """The file that a path leads to, links followed, if it lies under `root`."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL
        raise _BadItem(f"its path {str(path)!r} leads nowhere: {error}") from None
    if not resolved.is_relative_to(root):
        raise _BadItem(f"its path {str(path)!r} leads out of the data's folder, so it is not opened")
    return resolved


def _labels(value: Any, separator: str) -> tuple[str, ...]:
    if value is None:
        return ()
    parts = value.split(separator) if isinstance(value, str) else value
    if isinstance(parts, int) and not isinstance(parts, bool):
        parts = [parts]
    if not isinstance(parts, list) or any(isinstance(p, bool) or not isinstance(p, str | int) for p in parts):
        raise _BadItem(f"its labels must be a text or a list of texts, got {value!r:.80}")
    labels = tuple(dict.fromkeys(name for part in parts if (name := str(part).strip())))
    for label in labels:
        _check_characters(label, "label")
    return labels
