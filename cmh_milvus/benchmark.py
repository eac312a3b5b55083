"""Every method x code length x data set x seed in one resumable run; a line of JSON for each, and a table of means."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cmh_milvus.comparison import codes_of
from cmh_milvus.datasets.base import PairedFeatures, cut_validation
from cmh_milvus.errors import DataError
from cmh_milvus.evaluation import CROSS_MODAL, DIRECTION_LABELS, evaluate_codes
from cmh_milvus.methods import get_method
from cmh_milvus.training import TrainingSettings, train

FIGURES = ("MAP@all", "NDCG@10", "own R@10")


@dataclass(frozen=True)
class Cell:
    """One training run of the benchmark."""

    data: str
    method: str
    n_bits: int
    seed: int

    @property
    def key(self) -> str:
        """Identifies the run in the results file."""
        return f"{self.data}/{self.method}/{self.n_bits}/{self.seed}"


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
        methods: Of `list_methods()`; those that need labels are passed over where a data set has none.
        lengths: Code lengths in bits.
        seeds: Runs of each, seeds 0, 1, ...
        results: JSON lines file; a run that is in it (same data fingerprint, same settings) is not repeated.
        validation: Share of the train rows that chooses the epoch.
        device: Where to train.
        settings: Of every method, where it has them.
        done: Called after each run with (cell, runs done, runs in all).

    Returns:
        All rows of the asked-for runs.

    Raises:
        DataError: The results file is damaged.
    """
    cells = [Cell(*values) for values in product(data_sets, methods, lengths, range(seeds))]
    kept = {(row["key"], row["data_fingerprint"], row["settings"]): row for row in _read(results)}
    rows = []
    for number, cell in enumerate(cells, start=1):
        data = data_sets[cell.data]
        method = get_method(cell.method)
        if method.supervision == "labels" and data.labels is None:
            continue
        known = {key: value for key, value in (settings or {}).items() if hasattr(method.Config(), key)}
        identity = (cell.key, data.fingerprint, json.dumps(known, sort_keys=True))
        if identity not in kept:
            kept[identity] = _measured(cell, data, known, validation, device) | dict(
                zip(("key", "data_fingerprint", "settings"), identity, strict=True)
            )
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(kept[identity]) + "\n")
        rows.append(kept[identity])
        if done is not None:
            done(cell, number, len(cells))
    return rows


def summary(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Mean and deviation over seeds, a row for each data set, method and code length."""
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["data"], row["method"], row["n_bits"]), []).append(row)
    for (data, method, n_bits), group in groups.items():
        line: dict[str, Any] = {"data": data, "method": method, "n_bits": n_bits, "seeds": len(group)}
        both = [mean(row[f"MAP@all {DIRECTION_LABELS[d]}"] for d in CROSS_MODAL) for row in group]
        line["MAP@all"] = mean(both)
        line["+-"] = stdev(both) if len(both) > 1 else math.nan
        for figure, direction in product(FIGURES, CROSS_MODAL):
            name = f"{figure} {DIRECTION_LABELS[direction]}"
            line[name] = mean(row[name] for row in group)
        for name in ("distinct", "seconds"):
            line[name] = mean(row[name] for row in group)
        yield line


def _measured(
    cell: Cell, data: PairedFeatures, settings: Mapping[str, Any], validation: float, device: str
) -> dict[str, Any]:
    split = cut_validation(data.split, round(validation * len(data.split.train)), cell.seed)
    cut = PairedFeatures(**(vars(data) | {"split": split}))
    trained = train(cut, TrainingSettings(cell.method, cell.n_bits, settings, seed=cell.seed, device=device))
    result = evaluate_codes(cell.method, codes_of(trained, cut), cut)
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


def _read(results: Path) -> list[dict[str, Any]]:
    """The rows of a results file; a line that a killed run left unfinished is cut off."""
    if not results.exists():
        return []
    whole, _, torn = results.read_text(encoding="utf-8").rpartition("\n")
    if torn:
        results.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"line {number} of {results} is no JSON: remove the line, or give another file") from error
    return rows
