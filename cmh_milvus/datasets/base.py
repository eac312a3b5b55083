"""Paired image-text data, and the query / database / train / validation split over it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmh_milvus.errors import DataError, SettingsError

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Item:
    """One picture, one text, or a pair of them.

    Attributes:
        id: Unique within its source; stable over runs.
        image: Path of the picture, or None.
        text: The text, or None.
        labels: Names of its labels, maybe none.
        fields: Any other column of the source, by name.
    """

    id: str
    image: Path | None = None
    text: str | None = None
    labels: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """Row numbers of the literature's four sets; int64, sorted, each row once.

    `train` lies inside `database` by the field's custom; `validation` rows are cut from `train`. `query` and
    `database` are disjoint.
    """

    query: Rows
    database: Rows
    train: Rows
    validation: Rows

    def fingerprint(self) -> str:
        """SHA-256 over the four sets, hexadecimal: equal splits have equal fingerprints."""
        digest = hashlib.sha256()
        for rows in (self.query, self.database, self.train, self.validation):
            digest.update(len(rows).to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(rows, dtype="<i8").tobytes())
        return digest.hexdigest()


def cut_split(n: int, *, n_query: int, n_validation: int, seed: int = 0) -> Split:
    """Cut a random split: queries first, the rest is the database; train is the database less validation.

    Args:
        n: Number of pairs.
        n_query: Number of held-out queries.
        n_validation: Rows of the database kept from training, for model selection.
        seed: Of the permutation.

    Raises:
        SettingsError: The sizes leave no row to train on.
    """
    if n_query < 0 or n_validation < 0 or n_query + n_validation >= n:
        raise SettingsError(
            f"{n} pairs cannot be cut into {n_query} queries, {n_validation} validation rows and at least one "
            "train row: ask for fewer, or give more data"
        )
    order = np.random.default_rng(seed).permutation(n)
    query, database = order[:n_query], order[n_query:]
    validation, train = database[:n_validation], database[n_validation:]
    return Split(*(np.sort(rows).astype(np.int64) for rows in (query, database, train, validation)))


def cut_validation(split: Split, n_validation: int, seed: int = 0) -> Split:
    """The split with `n_validation` random rows moved from `train` to `validation`.

    Args:
        split: A split; its `validation` rows are kept and added to.
        n_validation: Rows to move.
        seed: Of the choice.

    Raises:
        SettingsError: There are not more than `n_validation` train rows.
    """
    if not 0 <= n_validation < len(split.train):
        raise SettingsError(f"{n_validation} validation rows cannot be cut from {len(split.train)} train rows")
    order = np.random.default_rng(seed).permutation(split.train)
    moved, kept = order[:n_validation], order[n_validation:]
    return replace(split, train=np.sort(kept), validation=np.sort(np.concatenate([split.validation, moved])))


def multi_hot(labels: Sequence[Iterable[str]], names: Sequence[str]) -> NDArray[np.bool_]:
    """Label matrix of label names.

    Args:
        labels: For each of n items, its label names.
        names: The n_labels columns.

    Returns:
        bool (n, n_labels).

    Raises:
        DataError: A label is not among `names`.
    """
    column = {name: j for j, name in enumerate(names)}
    matrix = np.zeros((len(labels), len(names)), dtype=np.bool_)
    for i, item_labels in enumerate(labels):
        for label in item_labels:
            if label not in column:
                raise DataError(f"item {i} has the label {label!r}, which is not among the {len(names)} known ones")
            matrix[i, column[label]] = True
    return matrix


@dataclass(frozen=True)
class PairedDataset:
    """Items that each have a picture and a text, with labels where there are any.

    Attributes:
        name: Of the data set, for reports.
        items: n pairs.
        label_names: Columns of `labels()`; empty without labels.
        split: The sets, or None where the caller cuts them (`cut_split`).
    """

    name: str
    items: tuple[Item, ...]
    label_names: tuple[str, ...] = ()
    split: Split | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def ids(self) -> list[str]:
        """The items' ids, in order."""
        return [item.id for item in self.items]

    def labels(self) -> NDArray[np.bool_]:
        """Label matrix: bool (n, n_labels)."""
        return multi_hot([item.labels for item in self.items], self.label_names)

    def fingerprint(self) -> str:
        """SHA-256 over ids, texts and labels, hexadecimal; what the pictures show is not in it."""
        digest = hashlib.sha256()
        for item in self.items:
            row = json.dumps([item.id, item.text, sorted(item.labels)], ensure_ascii=False)
            digest.update(row.encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()


@dataclass(frozen=True)
class PairedFeatures:
    """Backbone features of pairs: what a method trains a hash head on.

    Attributes:
        name: Of the data set, for reports.
        ids: n ids.
        image: float32 (n, image_dim), or (n, tokens, image_dim).
        text: float32 (n, text_dim), or (n, tokens, text_dim).
        labels: bool (n, n_labels), or None.
        label_names: Columns of `labels`.
        split: The sets.
        fingerprint: SHA-256 of what the features were made from.
        protocol: Name of the literature's protocol that data and split follow, such as "mirflickr-20015", or "".

    Raises:
        DataError: Features or labels are not arrays of n rows, or the split holds other row numbers than 0 to n - 1.
    """

    name: str
    ids: list[str]
    image: NDArray[np.float32]
    text: NDArray[np.float32]
    labels: NDArray[np.bool_] | None
    label_names: tuple[str, ...]
    split: Split
    fingerprint: str
    protocol: str = ""

    def __post_init__(self) -> None:
        n = len(self.ids)
        arrays: dict[str, NDArray[Any]] = {"image features": self.image, "text features": self.text}
        if self.labels is not None:
            arrays["labels"] = self.labels
        for what, rows in arrays.items():
            dims = (2,) if what == "labels" else (2, 3)
            if not isinstance(rows, np.ndarray) or rows.ndim not in dims or len(rows) != n:
                raise DataError(
                    f"the {what} of {self.name} have the shape {np.shape(rows)}, and it has {n} ids: give a numpy "
                    f"array of {' or '.join(map(str, dims))} dimensions, a row for each id"
                )
        for name in ("query", "database", "train", "validation"):
            rows = np.asarray(getattr(self.split, name))
            if len(rows) and not 0 <= rows.min() <= rows.max() < n:
                raise DataError(
                    f"the {name} rows of {self.name} go from {rows.min()} to {rows.max()}: give row numbers "
                    f"from 0 to {n - 1}, as it has {n} rows"
                )
