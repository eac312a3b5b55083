"""Counting kernels: how many database items lie at each Hamming distance with each grade of relevance.

`distance_table` gives the sufficient statistic of every metric in `cmh_milvus.metrics`. Gradings by name:

- ``binary``: grade 1 where query and item share a label;
- ``shared``: the grade is the number of shared labels, and so is the gain;
- ``jaccard``: the gain is shared labels / labels of either, a grade for each value that can occur; 0 without labels.

The backends give the same integers. Beside it stand explicit orders (`rank_stable`) and the ranks of own pairs.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cmh_milvus.codes import hamming_distances
from cmh_milvus.errors import DataError, SettingsError
from cmh_milvus.metrics import DistanceTable
from cmh_milvus.ranking import numpy_backend
from cmh_milvus.ranking.words import Task, grades_of, to_words

Grading = Literal["binary", "shared", "jaccard"]
Backend = Literal["auto", "numpy"]
Codes = NDArray[np.uint8]
Labels = NDArray[Any]

__all__ = [
    "Backend",
    "Grading",
    "distance_table",
    "own_pair_ranks",
    "rank_stable",
]


def distance_table(
    query_codes: Codes,
    database_codes: Codes,
    query_labels: Labels,
    database_labels: Labels,
    *,
    grading: Grading = "shared",
    backend: Backend = "auto",
) -> DistanceTable:
    """Count the database by distance and grade, for each query.

    Args:
        query_codes: Packed, uint8 (n_query, n_bits // 8).
        database_codes: Packed, uint8 (n_database, n_bits // 8).
        query_labels: bool, or 0 and 1, (n_query, n_labels).
        database_labels: Likewise (n_database, n_labels).
        grading: ``binary``, ``shared`` or ``jaccard``, as the module says. ``jaccard`` may need many grades.
        backend: ``numpy``, or ``auto`` for the fastest that is installed.

    Returns:
        Counts uint32 (n_query, n_bits + 1, n_grades) and the gains of the grades.

    Raises:
        SettingsError: Shapes do not fit, or a name is unknown.
        DataError: A label is neither 0 nor 1, or the database is empty.

    Example:
        >>> codes = np.array([[0b0000_0000], [0b0000_0011]], dtype=np.uint8)
        >>> labels = np.array([[1, 0], [1, 1]])
        >>> distance_table(codes[:1], codes, labels[:1], labels).counts[0, :3].tolist()
        [[0, 1], [0, 0], [0, 1]]
    """
    if grading not in get_args(Grading):
        raise SettingsError(f"grading {grading!r} is unknown: give one of {', '.join(get_args(Grading))}")
    if backend not in get_args(Backend):
        raise SettingsError(f"backend {backend!r} is unknown: give one of {', '.join(get_args(Backend))}")
    _check_codes(query_codes, database_codes)
    query_labels = _check_labels(query_labels, len(query_codes), "query")
    database_labels = _check_labels(database_labels, len(database_codes), "database")
    if query_labels.shape[1] != database_labels.shape[1]:
        raise SettingsError(
            f"queries have {query_labels.shape[1]} label columns and the database {database_labels.shape[1]}: "
            "give both the same columns"
        )
    grades = grades_of(query_labels, database_labels, grading)
    task = Task(
        query_codes=to_words(query_codes),
        database_codes=to_words(database_codes),
        query_labels=to_words(np.packbits(query_labels, axis=1)),
        database_labels=to_words(np.packbits(database_labels, axis=1)),
        n_bits=query_codes.shape[1] * 8,
        grades=grades,
    )
    return DistanceTable(numpy_backend.count(task), grades.gains)


def _check_codes(query_codes: Codes, database_codes: Codes) -> None:
    for name, codes in (("query", query_codes), ("database", database_codes)):
        if codes.ndim != 2 or codes.dtype != np.uint8 or codes.shape[1] == 0:
            raise SettingsError(
                f"{name} codes are packed, uint8 (n, n_bits // 8); got {codes.dtype} {codes.shape}: use codes.pack"
            )
    if query_codes.shape[1] != database_codes.shape[1]:
        raise SettingsError(
            f"codes of {query_codes.shape[1] * 8} and {database_codes.shape[1] * 8} bits cannot be compared: "
            "encode both sides with one encoder"
        )
    if not len(database_codes):
        raise DataError("the database is empty: nothing can be ranked")


def _check_labels(labels: Labels, n: int, name: str) -> NDArray[np.bool_]:
    labels = np.asarray(labels)
    if labels.ndim != 2 or len(labels) != n:
        raise SettingsError(f"{name} labels have shape ({n}, n_labels), one row a code; got {labels.shape}")
    if labels.dtype == np.bool_:
        return labels
    if not np.isin(labels, (0, 1)).all():
        raise DataError(f"{name} labels hold values other than 0 and 1: give a multi-hot matrix")
    return labels.astype(np.bool_)


def rank_stable(query_code: Codes, database_codes: Codes) -> NDArray[np.int64]:
    """Database rows by distance from one query, ties in database order.

    Args:
        query_code: Packed, uint8 (n_bits // 8,).
        database_codes: Packed, uint8 (n_database, n_bits // 8).

    Returns:
        int64 (n_database,), row numbers from the nearest on.
    """
    _check_codes(query_code[None], database_codes)
    return np.argsort(hamming_distances(query_code[None], database_codes)[0], kind="stable").astype(np.int64)


def own_pair_ranks(
    query_codes: Codes, database_codes: Codes, own: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many database items are closer to each query than its own pair, and how many as close.

    Args:
        query_codes: Packed, uint8 (n_query, n_bits // 8).
        database_codes: Packed, uint8 (n_database, n_bits // 8).
        own: Integers (n_query,), the database row of each query's own pair.

    Returns:
        `closer` and `tied`, int64 (n_query,) each; the pair itself counts in `tied`. `metrics.own_pair_rank` and
        `metrics.own_pair_recall_at_k` take them.

    Raises:
        SettingsError: Shapes do not fit, or a row lies outside the database.
    """
    _check_codes(query_codes, database_codes)
    own = np.asarray(own)
    if own.shape != (len(query_codes),) or (len(own) and not 0 <= own.min() <= own.max() < len(database_codes)):
        raise SettingsError(
            f"`own` names one database row (0 to {len(database_codes) - 1}) for each of {len(query_codes)} queries, "
            f"got shape {own.shape}"
        )
    closer = np.zeros(len(own), dtype=np.int64)
    tied = np.zeros(len(own), dtype=np.int64)
    step = max(1, (1 << 22) // len(database_codes))
    for start in range(0, len(own), step):
        rows = slice(start, start + step)
        distances = hamming_distances(query_codes[rows], database_codes)  # (n_block, n_database)
        pair = np.take_along_axis(distances, own[rows, None], axis=1)
        closer[rows] = (distances < pair).sum(axis=1)
        tied[rows] = (distances == pair).sum(axis=1)
    return closer, tied
