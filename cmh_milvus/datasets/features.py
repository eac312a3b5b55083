"""Backbone features that a user, or a benchmark, brings as an `.npz` file."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmh_milvus.datasets.base import PairedFeatures, Rows, Split
from cmh_milvus.errors import CmhError, DataError, UnsafeFile

LARGEST = 1e15  # of features: sums of their squares must fit into float32


def load_features(path: Path, *, image_key: str = "image", text_key: str = "text") -> PairedFeatures:
    """Paired features and their split from one `.npz` file; nothing in it is ever unpickled.

    An array `protocol`, one text, names the literature's protocol that data and split follow.

    Its arrays: `image` (n, image_dim) and `text` (n, text_dim), numbers; `query` and `database`, row numbers, also
    under the names `query_idx` and `db_idx`; and if wanted `train` (by default the database less validation),
    `validation` (by default none), `labels` (n, n_labels) of 0 and 1, `label_names`, `ids`. Features may also be token
    matrices (n, tokens, dim): the first row of a matrix is the item as a whole, rows of zeros are not there.

    Args:
        path: The file.
        image_key: Which array to take as picture features.
        text_key: Which array to take as text features.

    Raises:
        DataError: The file or one of its arrays is missing or not of that form.
        UnsafeFile: An array holds pickled objects.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}")
    if not zipfile.is_zipfile(path):
        raise DataError(f"{str(path)!r} is not an .npz file: make it with numpy.savez_compressed")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            reader = _Reader(path, arrays)
            image = reader.features(image_key)
            text = reader.features(text_key)
            n = len(image)
            if len(text) != n:
                raise DataError(f"{reader.name} has {n} rows of {image_key!r} but {len(text)} of {text_key!r}")
            labels, label_names = reader.labels(n)
            ids = reader.ids(n)
            split = reader.split(n)
            protocol = reader.protocol()
    except CmhError:
        raise
    except Exception as error:  # zipfile and numpy raise nearly any type on damaged bytes
        raise DataError(f"{str(path)!r} is damaged: {error}") from error
    digest = hashlib.sha256()
    for array in (image, text, np.zeros(0) if labels is None else labels):
        digest.update(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    digest.update("\n".join(ids).encode("utf-8", "surrogatepass"))
    return PairedFeatures(path.stem, ids, image, text, labels, label_names, split, digest.hexdigest(), protocol)


class _Reader:
    """Arrays of one file, checked."""

    def __init__(self, path: Path, arrays: Any) -> None:
        self.name = repr(str(path))
        self.arrays = arrays

    def get(self, *keys: str) -> NDArray[Any] | None:
        """The first of these arrays that exists."""
        key = next((key for key in keys if key in self.arrays), None)
        if key is None:
            return None
        try:
            array: NDArray[Any] = self.arrays[key]
        except ValueError as error:
            if "allow_pickle" in str(error):
                raise UnsafeFile(
                    f"the array {key!r} of {self.name} holds pickled objects, which can run code: save it as "
                    "numbers or text"
                ) from error
            raise DataError(f"the array {key!r} of {self.name} is damaged: {error}") from error
        except (SyntaxError, TokenError) as error:
            raise DataError(f"the array {key!r} of {self.name} is damaged: its header cannot be read") from error
        if not isinstance(array, np.ndarray):
            raise DataError(f"{key!r} of {self.name} is no array: make the file with numpy.savez_compressed")
        return array

    def need(self, *keys: str) -> NDArray[Any]:
        """The first of these arrays that exists; DataError if none does."""
        if (array := self.get(*keys)) is None:
            raise DataError(
                f"{self.name} has no array {' or '.join(map(repr, keys))}; it has {', '.join(sorted(self.arrays))}"
            )
        return array

    def features(self, key: str) -> NDArray[np.float32]:
        """Finite float32 (n, dim) or (n, tokens, dim)."""
        array = self.need(key)
        known = array.ndim == 2 or (array.ndim == 3 and array.shape[1] > 1)
        if not known or array.dtype.kind not in "fiub" or 0 in array.shape:
            raise DataError(
                f"the array {key!r} of {self.name} must be numbers of shape (n, dim), or (n, tokens, dim) with 2 "
                f"tokens or more, got {array.dtype} {array.shape}"
            )
        features = array.astype(np.float32)
        if not np.isfinite(features).all():
            row = int(np.argwhere(~np.isfinite(features))[0, 0])
            raise DataError(f"the array {key!r} of {self.name} holds NaN or infinity in row {row}")
        if (largest := float(max(features.max(), -features.min()))) > LARGEST:
            raise DataError(f"the array {key!r} of {self.name} holds {largest:.1e}: scale it to {LARGEST:.0e} at most")
        return features

    def labels(self, n: int) -> tuple[NDArray[np.bool_] | None, tuple[str, ...]]:
        """Multi-hot labels and their names."""
        labels = self.get("labels")
        if labels is None:
            return None, ()
        if labels.ndim != 2 or len(labels) != n or not np.isin(labels, (0, 1)).all():
            raise DataError(
                f"the array 'labels' of {self.name} must be 0 or 1 of shape ({n}, n_labels), got {labels.dtype} "
                f"{labels.shape}"
            )
        if not labels.any():
            raise DataError(
                f"the array 'labels' of {self.name} holds no 1: no item has a label; leave the array out to learn "
                "from pairs"
            )
        names = self.get("label_names")
        label_names = tuple(map(str, range(labels.shape[1]) if names is None else names.tolist()))
        if len(label_names) != labels.shape[1]:
            raise DataError(f"{self.name} has {labels.shape[1]} columns of labels but {len(label_names)} names")
        return labels.astype(np.bool_), label_names

    def ids(self, n: int) -> list[str]:
        """The items' ids, by default their row numbers."""
        array = self.get("ids")
        ids = [str(value) for value in (range(n) if array is None else array.ravel().tolist())]
        if len(ids) != n or len(set(ids)) != n:
            raise DataError(f"the array 'ids' of {self.name} must hold {n} different ids, got {len(set(ids))}")
        return ids

    def protocol(self) -> str:
        """Name of the protocol, or ""."""
        array = self.get("protocol")
        if array is None:
            return ""
        if array.size != 1 or array.dtype.kind != "U":
            raise DataError(f"the array 'protocol' of {self.name} must be one text, got {array.dtype} {array.shape}")
        return str(array.item())

    def rows(self, array: NDArray[Any], key: str, n: int) -> Rows:
        """Sorted row numbers in range, each once."""
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise DataError(f"the array {key!r} of {self.name} must be row numbers, got {array.dtype} {array.shape}")
        rows = np.sort(array.astype(np.int64))
        if len(rows) and (rows[0] < 0 or rows[-1] >= n or (np.diff(rows) == 0).any()):
            raise DataError(f"the array {key!r} of {self.name} must hold row numbers from 0 to {n - 1}, each once")
        return rows

    def split(self, n: int) -> Split:
        """The four sets."""
        query = self.rows(self.need("query", "query_idx"), "query", n)
        database = self.rows(self.need("database", "db_idx"), "database", n)
        if np.intersect1d(query, database).size:
            raise DataError(f"in {self.name} some rows are both query and database: those sets must be disjoint")
        empty = np.zeros(0, dtype=np.int64)
        given = self.get("validation")
        validation = empty if given is None else self.rows(given, "validation", n)
        given = self.get("train")
        train = np.setdiff1d(database, validation) if given is None else self.rows(given, "train", n)
        for key, rows in (("train", train), ("validation", validation)):
            if np.intersect1d(rows, query).size:
                raise DataError(f"in {self.name} some rows are both query and {key}: queries must be held out")
        if np.intersect1d(train, validation).size:
            raise DataError(f"in {self.name} some rows are both train and validation")
        return Split(query, database, train, validation)
