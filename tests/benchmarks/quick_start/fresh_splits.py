"""The quick start's table on other queries: do its figures hold on emoji that nobody looked at?

    OMP_NUM_THREADS=1 python tests/benchmarks/quick_start/fresh_splits.py -o fresh_splits.jsonl

The 1,652 emoji that are not among the quick start's 200 queries are dealt at random into eight folds of some 206. Each
fold is the query set once; all other emoji, the quick start's queries among them, are database and train rows, and 200
of them choose the epoch and what a method leaves open. Methods, lengths and settings are those of `cmh-milvus demo`. A
line of JSON for each fold and method goes to the results file; a fold that is in it is not run again. The table has
the mean over folds, the extremes, the folds on which the 95 % interval lies above that of CCA-ITQ as a whole, and the
interval over the queries of all folds together.
"""

import argparse
import dataclasses
import json
from itertools import product
from pathlib import Path

import numpy as np

from cmh_milvus.benchmark import FIGURES
from cmh_milvus.cli.sources import benchmark_sources
from cmh_milvus.comparison import BASELINES, train_candidate
from cmh_milvus.datasets.base import Split, cut_validation
from cmh_milvus.demo import N_BITS, N_VALIDATION
from cmh_milvus.evaluation import CROSS_MODAL, DIRECTION_LABELS, evaluate_codes
from cmh_milvus.metrics import bootstrap_interval

FOLDS = 8
METHODS = ("duet", "dcmh", *BASELINES)


def fold_splits(split):
    """`FOLDS` splits whose query sets are disjoint, and hold none of `split`'s queries."""
    everything = np.union1d(split.query, split.database)
    for rows in np.array_split(np.random.default_rng(0).permutation(split.database), FOLDS):
        query = np.sort(rows)
        database = np.setdiff1d(everything, query)
        none = np.zeros(0, dtype=np.int64)
        yield cut_validation(Split(query=query, database=database, train=database, validation=none), N_VALIDATION)


def measured(fold, method, data):
    """Train, and measure on the fold."""
    candidate = train_candidate(data, method, N_BITS)
    result = evaluate_codes(method, candidate.codes, data)
    row = {"fold": fold, "method": method, "distinct": result.distinct, "seconds": candidate.seconds}
    for direction, figure in product(CROSS_MODAL, FIGURES):
        estimate = result.directions[direction].estimates[figure]
        name = f"{figure} {DIRECTION_LABELS[direction]}"
        row[name] = [estimate.mean, estimate.low, estimate.high]
        row[f"{name} per query"] = result.directions[direction].per_query[figure].round(6).tolist()
    return row


def table(rows):
    """The lines to print."""
    baseline = {row["fold"]: row for row in rows if row["method"] == "cca_itq"}
    yield "| method | figure | mean of folds | least | most | folds above CCA-ITQ | all queries |"
    yield "|---|---|---|---|---|---|---|"
    for method, figure, direction in product(METHODS, FIGURES, CROSS_MODAL):
        name = f"{figure} {DIRECTION_LABELS[direction]}"
        mine = [row for row in rows if row["method"] == method]
        if not mine:
            continue
        means = [row[name][0] for row in mine]
        above = [row[name][1] > baseline[row["fold"]][name][2] for row in mine if row["fold"] in baseline]
        pooled = bootstrap_interval(np.concatenate([row[f"{name} per query"] for row in mine]), seed=0)
        yield (
            f"| {method} | {name} | {np.mean(means):.3f} | {min(means):.3f} | {max(means):.3f} | "
            f"{sum(above)} of {len(above)} | [{pooled.low:.3f}, {pooled.high:.3f}] |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("fresh_splits.jsonl"))
    parser.add_argument("--folds", type=int, nargs="+", default=range(FOLDS), help="which to run, from 0")
    given = parser.parse_args()
    data = benchmark_sources(["emoji"], "text")["emoji"]
    rows = [json.loads(line) for line in given.output.read_text().splitlines()] if given.output.exists() else []
    done = {(row["fold"], row["method"]) for row in rows}
    for fold, split in enumerate(fold_splits(data.split)):
        for method in METHODS:
            if fold in given.folds and (fold, method) not in done:
                rows.append(measured(fold, method, dataclasses.replace(data, split=split)))
                with given.output.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
