"""Counting kernels: how many database items lie at each Hamming distance with each grade of relevance.

`distance_table` gives the sufficient statistic of every metric in `cmh_milvus.metrics`. Gradings by name:

- ``binary``: grade 1 where query and item share a label;
- ``shared``: the grade is the number of shared labels, and so is the gain;
- ``jaccard``: the gain is shared labels / labels of either, a grade for each value that can occur; 0 without labels.

The backends give the same integers: ``numpy``; ``compiled`` by numba (extra ``fast``), in threads; ``torch``, for a
GPU. Beside the table stand explicit orders (`rank_stable`, `stable_table`, `stable_average_precision`), tables of
what a search returned (`returned_table`) and the ranks of own pairs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cmh_milvus.codes import check_packed, hamming_distances
from cmh_milvus.errors import DataError, MissingExtra, SettingsError
from cmh_milvus.metrics import DistanceTable, ranked_table
from cmh_milvus.ranking import numpy_backend
from cmh_milvus.ranking.words import Task, grades_in_block, grades_of, to_words

Grading = Literal["binary", "shared", "jaccard"]
Backend = Literal["auto", "numpy", "compiled", "torch"]
Codes = NDArray[np.uint8]
Labels = NDArray[Any]

__all__ = [
    "Backend",
    "Grading",
    "distance_table",
    "own_pair_ranks",
    "rank_stable",
    "returned_table",
    "stable_average_precision",
    "stable_table",
]


def distance_table(
    query_codes: Codes,
    database_codes: Codes,
    query_labels: Labels,
    database_labels: Labels,
    *,
    grading: Grading = "shared",
    backend: Backend = "auto",
    device: str = "cpu",
    threads: int | None = None,
) -> DistanceTable:
    """Count the database by distance and grade, for each query.

    Args:
        query_codes: Packed, uint8 (n_query, n_bits // 8).
        database_codes: Packed, uint8 (n_database, n_bits // 8).
        query_labels: bool, or 0 and 1, (n_query, n_labels).
        database_labels: Likewise (n_database, n_labels).
        grading: ``binary``, ``shared`` or ``jaccard``, as the module says. ``jaccard`` may need many grades.
        backend: ``numpy``, ``compiled``, ``torch``, or ``auto``: compiled where numba is installed, else numpy.
        device: Of the torch backend.
        threads: Of the compiled backend; None for one a core that this process may use.

    Returns:
        Counts uint32 (n_query, n_bits + 1, n_grades) and the gains of the grades.

    Raises:
        SettingsError: Shapes do not fit, or a name is unknown.
        DataError: A label is neither 0 nor 1, or the database is empty.
        MissingExtra: The compiled backend is asked for, and numba is not installed.

    Example:
        >>> codes = np.array([[0b0000_0000], [0b0000_0011]], dtype=np.uint8)
        >>> labels = np.array([[1, 0], [1, 1]])
        >>> distance_table(codes[:1], codes, labels[:1], labels).counts[0, :3].tolist()
        [[0, 1], [0, 0], [0, 1]]
    """
    task = _task(query_codes, database_codes, query_labels, database_labels, grading)
    chosen = _choose(backend)
    if chosen == "compiled":
        from cmh_milvus.ranking import compiled_backend

        counts = compiled_backend.count(task, _threads(threads))
    elif chosen == "torch":
        from cmh_milvus.ranking import torch_backend

        counts = torch_backend.count(task, device)
    else:
        counts = numpy_backend.count(task)
    return DistanceTable(counts, task.grades.gains)


def _task(
    query_codes: Codes, database_codes: Codes, query_labels: Labels, database_labels: Labels, grading: str
) -> Task:
    if grading not in get_args(Grading):
        raise SettingsError(f"grading {grading!r} is unknown: give one of {', '.join(get_args(Grading))}")
    _check_codes(query_codes, database_codes)
    query_labels = _check_labels(query_labels, len(query_codes), "query")
    database_labels = _check_labels(database_labels, len(database_codes), "database")
    if query_labels.shape[1] != database_labels.shape[1]:
        raise SettingsError(
            f"queries have {query_labels.shape[1]} label columns and the database {database_labels.shape[1]}: "
            "give both the same columns"
        )
    return Task(
        query_codes=to_words(query_codes),
        database_codes=to_words(database_codes),
        query_labels=to_words(np.packbits(query_labels, axis=1)),
        database_labels=to_words(np.packbits(database_labels, axis=1)),
        n_bits=query_codes.shape[1] * 8,
        grades=grades_of(query_labels, database_labels, grading),
    )


def _choose(backend: str) -> str:
    if backend not in get_args(Backend):
        raise SettingsError(f"backend {backend!r} is unknown: give one of {', '.join(get_args(Backend))}")
    compiled = find_spec("numba") is not None
    if backend == "compiled" and not compiled:
        raise MissingExtra("the compiled backend needs numba: pip install 'cmh-milvus[fast]', or take backend='numpy'")
    return ("compiled" if compiled else "numpy") if backend == "auto" else backend


def _threads(threads: int | None) -> int:
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads < 1:
        raise SettingsError(f"at least one thread is needed, got {threads}")
    return threads


def _check_codes(query_codes: Codes, database_codes: Codes) -> None:
    check_packed(query_codes, database_codes)
    if not len(database_codes):
        raise DataError("the database is empty: nothing can be ranked")


def _check_labels(labels: Labels, n: int, name: str) -> NDArray[np.bool_]:
    labels = np.asarray(labels)
    if labels.ndim != 2 or len(labels) != n:
        raise SettingsError(f"{name} labels have shape ({n}, n_labels), one row a code; got {labels.shape}")
    if labels.dtype == np.bool_:
        return labels
    if not ((labels == 0) | (labels == 1)).all():
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
    return np.argsort(hamming_distances(query_code[None], database_codes)[0], kind="stable")


def stable_average_precision(
    query_codes: Codes,
    database_codes: Codes,
    query_labels: Labels,
    database_labels: Labels,
    *,
    backend: Backend = "auto",
    threads: int | None = None,
) -> NDArray[np.float64]:
    """AP over the whole database of one ranking, ties in database order: to compare with the literature.

    It moves with the order of the database; `metrics.average_precision` does not.

    Args:
        query_codes: Packed, uint8 (n_query, n_bits // 8).
        database_codes: Packed, uint8 (n_database, n_bits // 8).
        query_labels: bool, or 0 and 1, (n_query, n_labels).
        database_labels: Likewise (n_database, n_labels).
        backend: ``numpy``, ``compiled`` or ``auto``.
        threads: Of the compiled backend; None for one a core that this process may use.

    Returns:
        float64 (n_query,), NaN without a relevant item.

    Raises:
        SettingsError: Shapes do not fit, or the backend has no such kernel.
    """
    task = _task(query_codes, database_codes, query_labels, database_labels, "binary")
    chosen = _choose(backend)
    if chosen == "torch":
        raise SettingsError("there is no stable order in the torch backend: give backend='compiled' or 'numpy'")
    if chosen == "compiled":
        from cmh_milvus.ranking import compiled_backend

        sums, found = compiled_backend.stable_sums(task, _threads(threads))
    else:
        sums, found = np.zeros(len(query_codes)), np.zeros(len(query_codes), dtype=np.int64)
        for i, grades in enumerate(_stable_grades(task, query_codes, database_codes)):
            ranks = np.flatnonzero(grades) + 1
            found[i] = len(ranks)
            sums[i] = (np.arange(1, len(ranks) + 1) / ranks).sum()
    return np.where(found > 0, sums / np.maximum(found, 1), np.nan)


def stable_table(
    query_codes: Codes,
    database_codes: Codes,
    query_labels: Labels,
    database_labels: Labels,
    *,
    grading: Grading = "shared",
) -> DistanceTable:
    """The table of one ranking, ties in database order: any metric of it is the stable one.

    Rank takes the place of distance, so it needs n_query * n_database * n_grades * 4 bytes: call it on few queries
    at a time.

    Args:
        query_codes: Packed, uint8 (n_query, n_bits // 8).
        database_codes: Packed, uint8 (n_database, n_bits // 8).
        query_labels: bool, or 0 and 1, (n_query, n_labels).
        database_labels: Likewise (n_database, n_labels).
        grading: As for `distance_table`.
    """
    task = _task(query_codes, database_codes, query_labels, database_labels, grading)
    grades = np.zeros((len(query_codes), len(database_codes)), dtype=np.uint16)
    for i, row in enumerate(_stable_grades(task, query_codes, database_codes)):
        grades[i] = row
    return ranked_table(grades, task.grades.gains)


def _stable_grades(task: Task, query_codes: Codes, database_codes: Codes) -> Iterator[NDArray[Any]]:
    """Of each query, the grade at each rank."""
    labels = np.ascontiguousarray(task.database_labels.T)
    for i, code in enumerate(query_codes):
        order = rank_stable(code, database_codes)
        yield grades_in_block(task, i, labels, task.grades.database_sizes)[order]


def returned_table(
    rows: Sequence[NDArray[np.integer[Any]]],
    distances: Sequence[NDArray[np.integer[Any]]],
    query_labels: Labels,
    database_labels: Labels,
    *,
    n_bits: int,
    grading: Grading = "shared",
) -> DistanceTable:
    """The table of what a search returned, such as a Milvus collection: rows it left out are `unranked`.

    Args:
        rows: For each query, the database rows returned, each once, in any order.
        distances: For each query, their distances, integers 0..n_bits.
        query_labels: bool, or 0 and 1, (n_query, n_labels).
        database_labels: Likewise (n_database, n_labels).
        n_bits: Code length.
        grading: As for `distance_table`.

    Raises:
        SettingsError: Shapes do not fit.
        DataError: A row is returned twice or does not exist, or a distance lies outside 0..n_bits.
    """
    n_query, n_database = len(query_labels), len(database_labels)
    blank = np.zeros((max(n_query, n_database), 1), dtype=np.uint8)
    task = _task(blank[:n_query], blank[:n_database], query_labels, database_labels, grading)
    if not len(rows) == len(distances) == n_query:
        raise SettingsError(f"{n_query} queries need as many results, got {len(rows)} and {len(distances)}")
    labels = np.ascontiguousarray(task.database_labels.T)
    n_grades = len(task.grades.gains)
    counts = np.zeros((n_query, (n_bits + 1) * n_grades), dtype=np.uint32)
    unranked = np.zeros((n_query, n_grades), dtype=np.uint32)
    for i in range(n_query):
        found, far = np.asarray(rows[i], dtype=np.int64), np.asarray(distances[i], dtype=np.int64)
        if found.shape != far.shape or ((found < 0) | (found >= n_database)).any() or len(set(found)) < len(found):
            raise DataError(f"query {i} was given rows twice, or rows outside the {n_database} of the database")
        if ((far < 0) | (far > n_bits)).any():
            raise DataError(f"query {i} was given a distance outside 0 to {n_bits}: is that the code length?")
        grades = grades_in_block(task, i, labels, task.grades.database_sizes)
        counts[i] = np.bincount(far * n_grades + grades[found], minlength=counts.shape[1])
        unranked[i] = np.bincount(grades, minlength=n_grades) - np.bincount(grades[found], minlength=n_grades)
    return DistanceTable(counts.reshape(n_query, n_bits + 1, n_grades), task.grades.gains, unranked)


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
