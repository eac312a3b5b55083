"""The counting kernel in numpy: xor, popcount and bincount over blocks of the database."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cmh_milvus.ranking.words import Task, grades_in_block

BLOCK = 1 << 15  # database items worked on at once: the temporaries of a block stay in the second-level cache


def count(task: Task) -> NDArray[np.uint32]:
    """Count a task: uint32 (n_query, n_bits + 1, n_grades)."""
    n_grades = len(task.grades.gains)
    n_cells = (task.n_bits + 1) * n_grades
    key_type = np.min_scalar_type(n_cells - 1)
    counts = np.zeros((len(task.query_codes), n_cells), dtype=np.uint32)
    for start in range(0, len(task.database_codes), BLOCK):
        rows = slice(start, start + BLOCK)
        codes = np.ascontiguousarray(task.database_codes[rows].T)  # (n_words, n_block)
        labels = np.ascontiguousarray(task.database_labels[rows].T)
        sizes = task.grades.database_sizes[rows]
        for i in range(len(counts)):
            key = np.bitwise_count(codes[0] ^ task.query_codes[i, 0]).astype(key_type)
            for word, query_word in zip(codes[1:], task.query_codes[i, 1:], strict=True):
                key += np.bitwise_count(word ^ query_word)
            key *= key_type.type(n_grades)
            key += grades_in_block(task, i, labels, sizes).astype(key_type, copy=False)
            counts[i] += np.bincount(key, minlength=n_cells).astype(np.uint32)
    return counts.reshape(len(counts), task.n_bits + 1, n_grades)
