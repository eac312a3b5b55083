"""Settings compared without the queries: on rows held out from the train split.

    OMP_NUM_THREADS=1 python tests/benchmarks/training/held_out.py coco17_dev.npz emoji \
        --method duet:pair_weight=0.1 --method duet:pair_weight=0.1,partner_weight=0 -o held_out.jsonl

Sources, methods and the results file are those of `cmh-milvus benchmark`: an interrupted run goes on. A fold deals the
train rows at random: an eighth, at most 500, are queries; twice as many are in the database and not trained on; the
rest, or `--train` rows of it, is trained on and in the database too. The split's own queries are not used. No rows are
left that could choose an epoch, so a method trains to its end, and what it leaves open has to be given.

The table has means over folds and both directions; "score" is what validation goes by with labels (docs/design.md).
"""

import argparse
import dataclasses
from itertools import groupby, product
from pathlib import Path
from statistics import mean

import numpy as np

from cmh_milvus.benchmark import FIGURES, run_benchmark
from cmh_milvus.cli.sources import benchmark_sources
from cmh_milvus.datasets.base import Split, cut_split
from cmh_milvus.evaluation import CROSS_MODAL, DIRECTION_LABELS


def held_out(split, fold, most):
    """The train rows of `split`, dealt into queries, database and `most` train rows, or all where that is None."""
    rows = np.union1d(split.train, split.validation)
    n_query = min(500, len(rows) // 8)
    n_untrained = 2 * n_query if most is None else max(2 * n_query, len(rows) - n_query - most)
    cut = cut_split(len(rows), n_query=n_query, n_validation=n_untrained, seed=fold)
    none = np.zeros(0, dtype=np.int64)
    return Split(query=rows[cut.query], database=rows[cut.database], train=rows[cut.train], validation=none)


def both_directions(rows, figure):
    """Mean of a figure over rows and directions."""
    return mean(row[f"{figure} {DIRECTION_LABELS[direction]}"] for row in rows for direction in CROSS_MODAL)


def table(rows):
    """The lines to print, of rows in the order of their data sets and methods."""
    yield "| source | method | folds | MAP@all | NDCG@10 | own R@10 | score | distinct | s |"
    yield "|---|---|---|---|---|---|---|---|---|"

    def of(row):
        return row["data"].partition(", fold ")[0], row["method"]

    for (source, method), group in groupby(sorted(rows, key=of), key=of):
        folds = list(group)
        precision, gain, recall = (both_directions(folds, figure) for figure in FIGURES)
        yield (
            f"| {source} | {method} | {len(folds)} | {precision:.3f} | {gain:.3f} | {recall:.3f} | "
            f"{(2 * precision + gain + recall) / 4:.4f} | {mean(row['distinct'] for row in folds):.2f} | "
            f"{mean(row['seconds'] for row in folds):.0f} |"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--method", action="append", required=True)
    parser.add_argument("--bits", type=int, default=64)
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1], help="which to run, from 0")
    parser.add_argument("--train", type=int, help="train rows at most; the others are in the database only")
    parser.add_argument("-o", "--output", type=Path, default=Path("held_out.jsonl"))
    given = parser.parse_args()
    folds = {}
    for (name, data), fold in product(benchmark_sources(given.sources, "text").items(), given.folds):
        split = held_out(data.split, fold, given.train)
        folds[f"{name}, {len(split.train)} pairs, fold {fold}"] = dataclasses.replace(data, split=split)
    rows = run_benchmark(folds, given.method, [given.bits], 1, given.output, validation=0, device="cpu")
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
