"""What the backends work on: codes and labels as machine words, and the grade of a pair of label sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Grades:
    """From label sets to grades.

    Attributes:
        gains: float64 (n_grades,), ascending from 0.
        kind: ``binary``, ``shared`` or ``jaccard``.
        lookup: uint16 (max_shared + 1, max_sizes + 1), the grade of a pair with so many shared labels and so many
            labels in sum (with repetition); for ``jaccard`` alone.
        query_sizes: uint16 (n_query,), labels of each query; for ``jaccard`` alone.
        database_sizes: uint16 (n_database,); for ``jaccard`` alone.
    """

    gains: NDArray[np.float64]
    kind: str
    lookup: NDArray[np.uint16]
    query_sizes: NDArray[np.uint16]
    database_sizes: NDArray[np.uint16]


@dataclass(frozen=True)
class Task:
    """One table to be counted; codes and labels as words (n, n_words)."""

    query_codes: Words
    database_codes: Words
    query_labels: Words
    database_labels: Words
    n_bits: int
    grades: Grades


def grades_in_block(task: Task, i: int, labels: Words, sizes: NDArray[np.uint16]) -> NDArray[np.unsignedinteger[Any]]:
    """Grade of query i with each item of a block.

    Args:
        task: The task.
        i: Row of the query.
        labels: Label words of the block, (n_words, n_block).
        sizes: uint16 (n_block,), labels of each item.

    Returns:
        Unsigned (n_block,).
    """
    query = task.query_labels[i]
    if task.grades.kind == "binary":
        common = labels[0] & query[0]
        for word, query_word in zip(labels[1:], query[1:], strict=True):
            common |= word & query_word
        return np.asarray(common != 0).astype(np.uint8)
    shared: NDArray[np.unsignedinteger[Any]] = np.bitwise_count(labels[0] & query[0])
    if len(labels) > 1:
        shared = shared.astype(np.uint16)  # 256 and more labels are possible
    for word, query_word in zip(labels[1:], query[1:], strict=True):
        shared += np.bitwise_count(word & query_word)
    if task.grades.kind == "shared":
        return shared
    return np.asarray(task.grades.lookup[shared, sizes + task.grades.query_sizes[i]])


def to_words(packed: NDArray[np.uint8]) -> Words:
    """Bytes as the narrowest unsigned words that hold a row, or as several of 64 bits; padded with zero bits.

    Args:
        packed: uint8 (n, n_bytes).

    Returns:
        Unsigned (n, n_words), C-contiguous.
    """
    n, n_bytes = packed.shape
    width = next((w for w in (1, 2, 4, 8) if n_bytes <= w), 8)
    padded = np.zeros((n, max(width, -(-n_bytes // width) * width)), dtype=np.uint8)
    padded[:, :n_bytes] = packed
    return padded.view(f"u{width}")


def grades_of(query_labels: NDArray[np.bool_], database_labels: NDArray[np.bool_], kind: str) -> Grades:
    """The grades that pairs of these label sets can have.

    Args:
        query_labels: bool (n_query, n_labels).
        database_labels: bool (n_database, n_labels).
        kind: Name of the grading.
    """
    query_sizes = query_labels.sum(axis=1, dtype=np.uint16)
    database_sizes = database_labels.sum(axis=1, dtype=np.uint16)
    most_shared = int(min(query_sizes.max(initial=0), database_sizes.max(initial=0)))
    lookup = np.zeros((1, 1), dtype=np.uint16)
    if kind == "binary":
        gains = np.array([0.0, 1.0])
    elif kind == "shared":
        gains = np.arange(most_shared + 1, dtype=np.float64)
    else:
        sums = np.unique(np.unique(query_sizes).astype(int)[:, None] + np.unique(database_sizes).astype(int))
        shared = np.arange(most_shared + 1)[:, None]
        either = np.arange(int(sums.max(initial=0)) + 1) - shared  # (most_shared + 1, max_sizes + 1)
        jaccard = np.where(either >= shared, shared / np.maximum(either, 1), 0.0)
        gains = np.unique(np.append(jaccard[:, sums], 0.0))
        lookup = np.searchsorted(gains, jaccard).astype(np.uint16)
    return Grades(gains, kind, lookup, query_sizes, database_sizes)
