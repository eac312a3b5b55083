"""The counting kernel compiled by numba (extra ``fast``): popcount in vector registers, histograms in parts.

A block of the database is worked on in two passes. The first writes the cell of each item, without a branch or a
store that depends on data, so LLVM turns popcount and label test into vector instructions. The second counts the
cells into several histograms in turn, so that an increment seldom waits for the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from cmh_milvus.ranking.words import Task, Words

BLOCK = 2048  # database items; block, cells and histograms stay in the first-level caches
PARTS = 4  # histograms taken in turn
FEW_CELLS = 1024  # above it, clearing and adding up the parts costs more than they save
QUERIES = 32  # of one piece of work for a thread
HALF, LOW = np.uint64(32), np.uint64(0xFFFF_FFFF)  # two counters in one word


def _compile(function: Callable[..., Any]) -> Any:
    """Compiled without the interpreter lock, and kept on disk where some folder is writable."""
    try:
        return njit(nogil=True, cache=True, fastmath={"reassoc"})(function)
    except RuntimeError:  # no folder to keep it in
        return njit(nogil=True, fastmath={"reassoc"})(function)


def _popcount_type(_context: Any, _word: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


_popcount: Any = intrinsic(_popcount_type)  # LLVM's own

# In what follows a query is its words (n_words,), the database words (n_words, n_database), and `key`, uint32
# (n_block,), the cell of each item from row `start` on: distance * n_grades + grade.


@_compile
def _write_distances(query: Any, database: Any, start: int, n_grades: Any, key: Any) -> None:
    word, column = query[0], database[0, start : start + key.size]
    for j in range(key.size):
        key[j] = _popcount(word ^ column[j]) * n_grades
    for w in range(1, query.size):
        word, column = query[w], database[w, start : start + key.size]
        for j in range(key.size):
            key[j] += np.uint32(_popcount(word ^ column[j]) * n_grades)


@_compile
def _add_binary(query: Any, database: Any, start: int, common: Any, key: Any) -> None:
    one = np.uint64(1)
    word, column = query[0], database[0, start : start + key.size]
    if query.size == 1:
        for j in range(key.size):
            key[j] += np.uint32(min(word & column[j], one))
        return
    for j in range(key.size):
        common[j] = word & column[j]
    for w in range(1, query.size):
        word, column = query[w], database[w, start : start + key.size]
        for j in range(key.size):
            common[j] |= word & column[j]
    for j in range(key.size):
        key[j] += np.uint32(min(common[j], one))


@_compile
def _add_shared(query: Any, database: Any, start: int, key: Any) -> None:
    for w in range(query.size):
        word, column = query[w], database[w, start : start + key.size]
        for j in range(key.size):
            key[j] += np.uint32(_popcount(word & column[j]))


@_compile
def _add_looked_up(query: Any, database: Any, start: int, lookup: Any, sizes: Any, shared: Any, key: Any) -> None:
    """As `_add_shared`, through lookup[shared, size]; `lookup` begins at the query's own size."""
    shared[: key.size] = 0
    _add_shared(query, database, start, shared[: key.size])
    for j in range(key.size):
        key[j] += lookup[shared[j], sizes[start + j]]


@_compile
def _add_histogram(key: Any, parts: Any, counts: Any) -> None:
    """Count `key` into counts (n_cells,); parts (PARTS, n_cells) are zero before and after."""
    one = np.uint32(1)
    if counts.size > FEW_CELLS:
        for cell in key:
            counts[cell] += one
        return
    whole = key.size - key.size % PARTS
    for j in range(0, whole, PARTS):
        for part in range(PARTS):
            parts[part, key[j + part]] += one
    for j in range(whole, key.size):
        parts[0, key[j]] += one
    for part in range(PARTS):
        for cell in range(counts.size):
            counts[cell] += parts[part, cell]
            parts[part, cell] = 0


@_compile
def _count(
    query_codes: Any,
    codes: Any,
    query_labels: Any,
    labels: Any,
    kind: int,
    n_grades: Any,
    lookup: Any,
    query_sizes: Any,
    sizes: Any,
    counts: Any,
) -> None:
    """Add the whole database to counts (n_query, n_cells)."""
    n = codes.shape[1]
    keys = np.empty(BLOCK, dtype=np.uint32)
    shared = np.empty(BLOCK, dtype=np.uint32)
    common = np.empty(BLOCK, dtype=np.uint64)
    parts = np.zeros((PARTS, min(FEW_CELLS, counts.shape[1])), dtype=np.uint32)
    for start in range(0, n, BLOCK):
        key = keys[: min(BLOCK, n - start)]
        for i in range(query_codes.shape[0]):
            _write_distances(query_codes[i], codes, start, n_grades, key)
            if kind == 0:
                _add_binary(query_labels[i], labels, start, common, key)
            elif kind == 1:
                _add_shared(query_labels[i], labels, start, key)
            else:
                _add_looked_up(query_labels[i], labels, start, lookup[:, query_sizes[i] :], sizes, shared, key)
            _add_histogram(key, parts, counts[i])


@_compile
def _sum_of_ratios(packed: Any) -> float:
    """Sum of high half / low half."""
    total = 0.0
    for word in packed:
        total += np.float64(word >> HALF) / np.float64(word & LOW)
    return total


@_compile
def _stable_sums(
    query_codes: Any, codes: Any, query_labels: Any, labels: Any, n_bits: int, sums: Any, found: Any
) -> None:
    """Of each query's stable ranking: the sum of (rank among relevant) / rank, and the number of relevant items.

    Counting sort without the sort: a first pass counts distances, which gives the rank at which each distance
    begins; a second gives each item the next rank of its distance, in database order. The database is cut into
    PARTS runs with counters of their own, taken in turn, so that a counter seldom waits for itself. A counter holds
    items in its low half and relevant ones in its high half, and each item, relevant or not, is written to
    `waiting`, where the next one overwrites an irrelevant one: nothing branches on data.
    """
    one = np.uint64(1)
    n = codes.shape[1]
    length = -(-n // PARTS)  # of a run
    key = np.full((PARTS, length), 2 * (n_bits + 1), dtype=np.uint32)  # beyond the last row: a distance too far
    block_key = np.empty(BLOCK, dtype=np.uint32)
    common = np.empty(BLOCK, dtype=np.uint64)
    counts = np.empty((PARTS, 2 * (n_bits + 2)), dtype=np.uint32)
    counters = np.empty((PARTS, n_bits + 2), dtype=np.uint64)
    waiting = np.empty(BLOCK + PARTS, dtype=np.uint64)
    for i in range(query_codes.shape[0]):
        for part in range(PARTS):
            for start in range(part * length, min(n, (part + 1) * length), BLOCK):
                block = block_key[: min(BLOCK, n - start, (part + 1) * length - start)]
                _write_distances(query_codes[i], codes, start, np.uint64(2), block)
                _add_binary(query_labels[i], labels, start, common, block)
                at = start - part * length
                key[part, at : at + block.size] = block
        counts[:] = 0
        for j in range(length):
            for part in range(PARTS):
                counts[part, key[part, j]] += np.uint32(1)
        before = np.uint64(0)
        for distance in range(n_bits + 2):
            for part in range(PARTS):
                counters[part, distance] = before
                irrelevant, relevant = counts[part, 2 * distance], counts[part, 2 * distance + 1]
                before += np.uint64(irrelevant + relevant) + (np.uint64(relevant) << HALF)
        total, k = 0.0, np.uint64(0)
        for start in range(0, length, BLOCK // PARTS):
            for j in range(start, min(length, start + BLOCK // PARTS)):
                for part in range(PARTS):
                    cell = np.uint64(key[part, j])
                    relevant = cell & one
                    counter = counters[part, cell >> one] + one + (relevant << HALF)
                    counters[part, cell >> one] = counter
                    waiting[k] = counter
                    k += relevant
            total += _sum_of_ratios(waiting[:k])
            k = np.uint64(0)
        sums[i], found[i] = total, before >> HALF


def _columns(words: Words) -> NDArray[np.uint64]:
    return np.ascontiguousarray(words.T, dtype=np.uint64)


def _in_threads(work: Callable[[slice], None], n_query: int, threads: int) -> None:
    pieces = [slice(start, start + QUERIES) for start in range(0, n_query, QUERIES)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, pieces))


def count(task: Task, threads: int) -> NDArray[np.uint32]:
    """Count a task: uint32 (n_query, n_bits + 1, n_grades)."""
    grades = task.grades
    n_grades = len(grades.gains)
    counts = np.zeros((len(task.query_codes), (task.n_bits + 1) * n_grades), dtype=np.uint32)
    query_codes, query_labels = task.query_codes.astype(np.uint64), task.query_labels.astype(np.uint64)
    codes, labels = _columns(task.database_codes), _columns(task.database_labels)
    kind = ("binary", "shared", "jaccard").index(grades.kind)
    lookup = grades.lookup.astype(np.uint32)

    def work(rows: slice) -> None:
        _count(
            query_codes[rows],
            codes,
            query_labels[rows],
            labels,
            kind,
            np.uint64(n_grades),
            lookup,
            grades.query_sizes[rows],
            grades.database_sizes,
            counts[rows],
        )

    _in_threads(work, len(counts), threads)
    return counts.reshape(len(counts), task.n_bits + 1, n_grades)


def stable_sums(task: Task, threads: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each query's stable ranking: sum of (rank among relevant) / rank, and the number of relevant items."""
    n_query = len(task.query_codes)
    sums, found = np.zeros(n_query), np.zeros(n_query, dtype=np.int64)
    query_codes, query_labels = task.query_codes.astype(np.uint64), task.query_labels.astype(np.uint64)
    codes, labels = _columns(task.database_codes), _columns(task.database_labels)

    def work(rows: slice) -> None:
        _stable_sums(query_codes[rows], codes, query_labels[rows], labels, task.n_bits, sums[rows], found[rows])

    _in_threads(work, n_query, threads)
    return sums, found
