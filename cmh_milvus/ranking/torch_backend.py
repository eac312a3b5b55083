"""The counting kernel in PyTorch: products of +-1 matrices and bincount, for a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cmh_milvus.device import resolve_device
from cmh_milvus.ranking.words import Task, Words

PAIRS = {"cpu": 1 << 20, "cuda": 1 << 26}  # worked on at once, some 24 bytes each: 24 MB, or 1.5 GB of a GPU


def _bits(words: Words, device: torch.device, kind: torch.dtype) -> torch.Tensor:
    """Words as a matrix of 0 and 1, (n, 8 * bytes of a row)."""
    rows = torch.from_numpy(np.ascontiguousarray(words).view(np.uint8)).to(device)
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    return (rows[:, :, None] >> shifts & 1).flatten(1).to(kind)


def count(task: Task, device: str) -> NDArray[np.uint32]:
    """Count a task on a device: uint32 (n_query, n_bits + 1, n_grades).

    Raises:
        SettingsError: There is no such device.
    """
    where = resolve_device(device)
    # Products of +-1 are whole numbers up to n_bits, exact in half precision up to 2,048; a CPU is faster in single.
    widest = 64 * max(task.query_codes.shape[1], task.query_labels.shape[1])
    kind = torch.float16 if where.type == "cuda" and widest <= 2048 else torch.float32
    grades = task.grades
    n_grades, n_cells = len(grades.gains), (task.n_bits + 1) * len(grades.gains)
    n_query = len(task.query_codes)
    lookup = torch.from_numpy(grades.lookup.astype(np.int32)).to(where)
    query_sizes = torch.from_numpy(grades.query_sizes.astype(np.int64)).to(where)
    sizes = torch.from_numpy(grades.database_sizes.astype(np.int64)).to(where)
    query_codes = _bits(task.query_codes, where, kind).mul_(2).sub_(1)
    query_labels = _bits(task.query_labels, where, kind)
    counts = torch.zeros((n_query, n_cells), dtype=torch.int64, device=where)
    pairs = PAIRS.get(where.type, PAIRS["cpu"])
    n_block = min(len(task.database_codes), max(1, pairs // 64))
    m_block = max(1, pairs // n_block)
    for start in range(0, len(task.database_codes), n_block):
        rows = slice(start, start + n_block)
        codes = _bits(task.database_codes[rows], where, kind).mul_(2).sub_(1)
        labels = _bits(task.database_labels[rows], where, kind)
        for first in range(0, n_query, m_block):
            block = slice(first, first + m_block)
            products = query_codes[block] @ codes.T  # (m_block, n_block)
            key = products.neg_().add_(codes.shape[1]).mul_(0.5).to(torch.int32).mul_(n_grades)
            shared = query_labels[block] @ labels.T
            if grades.kind == "binary":
                key += shared > 0
            elif grades.kind == "shared":
                key += shared.to(torch.int32)
            else:
                key += lookup[shared.to(torch.int64), query_sizes[block, None] + sizes[rows]]
            key += n_cells * torch.arange(len(key), dtype=torch.int32, device=where)[:, None]
            found = torch.bincount(key.flatten(), minlength=len(key) * n_cells)
            counts[block] += found.view(len(key), n_cells)
    table: NDArray[Any] = counts.cpu().numpy().astype(np.uint32)
    return table.reshape(n_query, task.n_bits + 1, n_grades)
