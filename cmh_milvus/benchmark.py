"""Every method x code length x data set x seed in one resumable run; a line of JSON for each, and a table of means."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cmh_milvus.comparison import codes_of
from cmh_milvus.datasets.base import PairedFeatures, cut_validation
from cmh_milvus.errors import DataError, SettingsError
from cmh_milvus.evaluation import CROSS_MODAL, DIRECTION_LABELS, chance_level, evaluate_codes
from cmh_milvus.methods import get_method, make_config
from cmh_milvus.methods.base import Method
from cmh_milvus.published import published_map
from cmh_milvus.training import MIN_VALIDATION, TrainingSettings, train

FIGURES = ("MAP@all", "NDCG@10", "own R@10")
TABLE_COLUMNS = (
    *("data", "method", "n_bits"),
    *(f"{name} {DIRECTION_LABELS[d]}" for name in ("MAP@all", "own R@10", "paper") for d in CROSS_MODAL),
)
BEGINNING = '{"data": '  # of each line of the results file
IDENTITY = ("key", "data_fingerprint", "split_fingerprint", "settings")  # of a run in the results file


@dataclass(frozen=True)
class Cell:
    """One training run of the benchmark.

    Attributes:
        data: Name of the data set.
        method: As it was asked for, settings included: "duet" or "duet:pair_weight=0.1".
        n_bits: Code length.
        seed: Of the run.
    """

    data: str
    method: str
    n_bits: int
    seed: int

    @property
    def key(self) -> str:
        """Identifies the run in the results file."""
        return f"{self.data}/{self.method}/{self.n_bits}/{self.seed}"


def parse_method(text: str) -> tuple[str, dict[str, str]]:
    """Name and settings of "NAME" or "NAME:SETTING=VALUE,SETTING=VALUE".

    Raises:
        SettingsError: A setting has no name or no value.
    """
    name, _, rest = text.partition(":")
    settings = {}
    for pair in rest.split(",") if rest else ():
        setting, equals, value = pair.partition("=")
        if not (setting and equals and value):
            raise SettingsError(f"a method is NAME or NAME:SETTING=VALUE,SETTING=VALUE; got {text!r}")
        settings[setting] = value
    return name, settings


def run_benchmark(
    data_sets: Mapping[str, PairedFeatures],
    methods: Sequence[str],
    lengths: Sequence[int],
    seeds: int,
    results: Path,
    *,
    validation: float = 0.1,
    device: str = "auto",
    settings: Mapping[str, Any] | None = None,
    done: Callable[[Cell, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Train and measure what `results` does not have yet.

    Validation rows are cut from the train split by the seed; the query split is only measured on.

    Args:
        data_sets: Features by name.
        methods: Of `list_methods()`, maybe with settings, as "duet:pair_weight=0.1".
        lengths: Code lengths in bits.
        seeds: Runs of each, seeds 0, 1, ...
        results: JSON lines file; a run that is in it (same data and split, same value of every setting) is not
            repeated.
        validation: Share of the train rows that chooses the epoch.
        device: Where to train.
        settings: Of every method, where it has them and is not given them itself.
        done: Called after each run with (cell, runs done, runs in all).

    Returns:
        All rows of the asked-for runs, with MAP@all of chance and, for default settings, of the paper.

    Raises:
        DataError: A data set has no labels, or the results file is damaged, or another kind of file.
        SettingsError: There is no such method or setting.
    """
    given = {text: _given(text, settings or {}) for text in methods}  # each once
    chance = {name: chance_level(data) for name, data in data_sets.items()}
    splits = {
        (name, seed): cut_validation(data.split, round(validation * len(data.split.train)), seed)
        for (name, data), seed in product(data_sets.items(), range(seeds))
    }
    fingerprints = {which: split.fingerprint() for which, split in splits.items()}
    cells = [Cell(*values) for values in product(data_sets, given, dict.fromkeys(lengths), range(seeds))]
    kept = {tuple(row.get(name) for name in IDENTITY): row for row in _read(results)}
    rows = []
    for number, cell in enumerate(cells, start=1):
        which = cell.data, cell.seed
        data = replace(data_sets[cell.data], split=splits[which])
        name, own = parse_method(cell.method)
        config = _config(get_method(name), given[cell.method], data)
        identity = (cell.key, data.fingerprint, fingerprints[which], json.dumps(config, sort_keys=True))
        if identity not in kept:
            measured = _measured(cell, data, given[cell.method], device)
            kept[identity] = measured | dict(zip(IDENTITY, identity, strict=True))
            _append(results, kept[identity])
        row = kept[identity] | {"chance": chance[cell.data]}
        for direction in CROSS_MODAL:
            paper = None if own or settings else published_map(data, name, cell.n_bits, direction)
            row[f"paper {DIRECTION_LABELS[direction]}"] = None if paper is None else paper.value
        rows.append(row)
        if done is not None:
            done(cell, number, len(cells))
    return rows


def summary(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Mean and deviation over seeds, a row for each data set, method and code length.

    "MAP@all" is the mean of both directions; columns of one direction end in its label. "... +-" is the sample
    deviation over seeds, NaN for one seed. "paper" is None where there is no figure to compare with.
    """
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["method"], row["n_bits"]), []).append(row)
    for (data, method, n_bits), group in groups.items():
        line: dict[str, Any] = {"data": data, "method": method, "n_bits": n_bits, "seeds": len(group)}
        both = [mean(row[f"MAP@all {DIRECTION_LABELS[d]}"] for d in CROSS_MODAL) for row in group]
        line["MAP@all"], line["MAP@all +-"] = mean(both), _deviation(both)
        for figure, direction in product(FIGURES, CROSS_MODAL):
            name = f"{figure} {DIRECTION_LABELS[direction]}"
            values = [row[name] for row in group]
            line[name], line[f"{name} +-"] = mean(values), _deviation(values)
        for name in ("distinct", "seconds"):
            line[name] = mean(row[name] for row in group)
        line["device"] = ", ".join(sorted({row["device"] for row in group}))
        for name in ("chance", *(f"paper {DIRECTION_LABELS[d]}" for d in CROSS_MODAL)):
            line[name] = group[0][name]
        yield line


def _deviation(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else math.nan


def _given(text: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a method is given: its own, as for `parse_method`, and those of `settings` that it has."""
    name, own = parse_method(text)
    method = get_method(name)
    given = {key: value for key, value in settings.items() if hasattr(method.Config(), key)} | own
    make_config(method, given)  # a wrong one is an error before anything runs
    return given


def _config(method: type[Method], given: Mapping[str, Any], data: PairedFeatures) -> dict[str, Any]:
    """All settings of a run; where the validation rows choose, the values among which they do."""
    left_open = method.left_open(data.labels is not None) if len(data.split.validation) >= MIN_VALIDATION else {}
    return asdict(make_config(method, given)) | {name: v for name, v in left_open.items() if name not in given}


def _measured(cell: Cell, data: PairedFeatures, settings: Mapping[str, Any], device: str) -> dict[str, Any]:
    name, _ = parse_method(cell.method)
    trained = train(data, TrainingSettings(name, cell.n_bits, settings, seed=cell.seed, device=device))
    result = evaluate_codes(cell.method, codes_of(trained, data), data)
    row: dict[str, Any] = {
        "data": cell.data,
        "method": cell.method,
        "n_bits": cell.n_bits,
        "seed": cell.seed,
        "distinct": result.distinct,
        "seconds": trained.record["seconds"],
        "device": trained.record["device"],
        "versions": trained.record["versions"],
    }
    for figure, direction in product(FIGURES, CROSS_MODAL):
        estimate = result.directions[direction].estimates[figure]
        row[f"{figure} {DIRECTION_LABELS[direction]}"] = estimate.mean
    return row


def _append(results: Path, row: Mapping[str, Any]) -> None:
    """Add a line; it begins one of its own where another run was killed within its line."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a+b") as file:
        file.seek(max(0, file.seek(0, 2) - 1))
        begin = b"" if file.read() in (b"", b"\n") else b"\n"
        file.write(begin + json.dumps(row).encode() + b"\n")


def _read(results: Path) -> list[dict[str, Any]]:
    """The rows of a results file; a line that a killed run left unfinished is passed over, at the end cut off."""
    if not results.exists():
        return []
    try:
        whole, _, torn = results.read_text(encoding="utf-8").rpartition("\n")
    except ValueError as error:
        raise DataError(f"{results} is no results file of a benchmark: give another name") from error
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if line.startswith(BEGINNING):
                continue
            raise DataError(f"line {number} of {results} is no JSON: remove the line, or give another file") from error
        if not isinstance(row, dict) or "key" not in row or not all(isinstance(row.get(k, ""), str) for k in IDENTITY):
            raise DataError(f"line {number} of {results} is no result of a benchmark: give another file")
        rows.append(row)
    if torn:
        if not BEGINNING.startswith(torn[: len(BEGINNING)]):
            raise DataError(f"{results} is no results file of a benchmark: give another name")
        results.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
    return rows
