"""Backbone features kept by content hash, so that a new hash head never touches a picture again.

A cache is a folder with one sub-folder a backbone; in it, Parquet files of two columns: `content` (SHA-256 of
a picture file's bytes, or of a text's UTF-8 in NFC) and `vector` (of tokens, one after another). Files are only ever
added, whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cmh_milvus.encoders.backbones import Backbone, backbone_key, feature_shape
from cmh_milvus.errors import DataError, PictureError, SettingsError
from cmh_milvus.pictures import open_picture, read_picture_bytes

Source = Path | bytes | str
Progress = Callable[[int, int], None]

_log = logging.getLogger(__name__)
_FORMAT_VERSION = 1
_ROWS_A_FILE = 1024  # what a killed job loses at most
_ITEMS_AT_ONCE = 128
_PIXELS_AT_ONCE = 100_000_000


class FeatureCache:
    """Features on disk, by backbone and content hash.

    Args:
        folder: Made when the first features are added.
        dtype: Precision that features are stored in; they are always returned as float32.
        read_only: `add` then does nothing.
    """

    def __init__(
        self, folder: Path, *, dtype: Literal["float32", "float16"] = "float32", read_only: bool = False
    ) -> None:
        if dtype not in ("float32", "float16"):
            raise SettingsError(f"features are kept as float32 or float16, not as {dtype!r}")
        self.folder = Path(folder)
        self.dtype = dtype
        self.read_only = read_only

    def get(self, backbone: Backbone, contents: Sequence[bytes]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Features of items by content hash. A damaged file is logged and passed over.

        Args:
            backbone: What made the features.
            contents: n SHA-256 digests of 32 bytes.

        Returns:
            float32 (n, dim) or (n, tokens, dim), zeros where nothing is kept; and bool (n,), whether there is.
        """
        features = np.zeros((len(contents), *feature_shape(backbone)), dtype=np.float32)
        found = np.zeros(len(contents), dtype=np.bool_)
        wanted: dict[bytes, list[int]] = {}
        for row, content in enumerate(contents):
            wanted.setdefault(content, []).append(row)
        for path in sorted(self._folder(backbone).glob("*.parquet")):
            if not wanted:
                break
            try:
                kept, vectors = _read(path, backbone)
            except (OSError, ValueError, pa.ArrowException) as error:
                _log.warning("the feature cache file %s is passed over: %s", path, error)
                continue
            for i, content in enumerate(kept):
                if (rows := wanted.pop(content, None)) is not None:
                    features[rows] = vectors[i]
                    found[rows] = True
        return features, found

    def add(self, backbone: Backbone, contents: Sequence[bytes], features: NDArray[np.floating[Any]]) -> None:
        """Keep the features of items; the file appears whole or not at all.

        Args:
            backbone: What made the features.
            contents: n SHA-256 digests of 32 bytes.
            features: Float (n, dim) or (n, tokens, dim).

        Raises:
            DataError: The folder cannot be written.
        """
        if self.read_only or not len(contents):
            return
        flat = pa.array(np.asarray(features, dtype=self.dtype).reshape(-1))
        metadata = {"cmh_milvus": json.dumps({"format_version": _FORMAT_VERSION, "backbone": backbone_key(backbone)})}
        table = pa.table(
            {
                "content": pa.array(contents, pa.binary(32)),
                "vector": pa.FixedSizeListArray.from_arrays(flat, math.prod(feature_shape(backbone))),
            },
        ).replace_schema_metadata(metadata)
        name = hashlib.sha256(b"".join(contents)).hexdigest()[:24]
        path = self._folder(backbone) / f"{name}.parquet"
        temporary = path.with_name(f".{name}.{uuid.uuid4().hex}.tmp")  # other processes and threads may add the same
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(
                table,
                temporary,
                compression="zstd",
                compression_level=9,
                use_dictionary=False,
                use_byte_stream_split=["vector.list.element"],
            )
            temporary.replace(path)
        except OSError as error:
            raise DataError(
                f"the feature cache {str(self.folder)!r} cannot be written ({error.strerror or error}): "
                "give another folder, or none"
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _folder(self, backbone: Backbone) -> Path:
        key = backbone_key(backbone)
        short = re.sub(r"[^A-Za-z0-9.-]+", "-", backbone.name)[:60]
        return self.folder / f"{short}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _read(path: Path, backbone: Backbone) -> tuple[list[bytes], NDArray[np.float32]]:
    table = pq.read_table(path, columns=["content", "vector"])
    metadata = json.loads((table.schema.metadata or {}).get(b"cmh_milvus", b"{}"))
    if metadata != {"format_version": _FORMAT_VERSION, "backbone": backbone_key(backbone)}:
        raise ValueError(f"it describes itself as {metadata}")
    vectors = table.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    shape = (len(table), *feature_shape(backbone))
    return table.column("content").to_pylist(), vectors.reshape(shape).astype(np.float32)


class Extracted(NamedTuple):
    """Features of the items that could be read.

    Attributes:
        features: float32 (n_kept, dim) or (n_kept, tokens, dim).
        rows: int64 (n_kept,), ascending: which sources they belong to.
        contents: n_kept digests of 32 bytes, as `content_digest` makes them.
        failures: (row, reason) of every other source.
    """

    features: NDArray[np.float32]
    rows: NDArray[np.int64]
    contents: list[bytes]
    failures: list[tuple[int, str]]


def extract_features(
    backbone: Backbone,
    sources: Sequence[Source],
    cache: FeatureCache | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Features of many items; a bad one is listed and never ends the job.

    What the cache holds is not encoded again, equal items are encoded once, and new features are added to the
    cache as the job goes, also when it is interrupted.

    Args:
        backbone: Of pictures or of texts.
        sources: n picture paths or picture file bytes, or n texts (taken in Unicode form NFC).
        cache: Where features are looked up and kept.
        progress: Called with (items done, n).

    Raises:
        SettingsError: A text was given to a picture backbone, or the other way round.
        DataError: The cache cannot be written.
    """
    failures: dict[int, str] = {}
    rows: list[int] = []
    contents: list[bytes] = []
    for row, source in enumerate(sources):
        try:
            contents.append(content_digest(backbone, source))
            rows.append(row)
        except (PictureError, DataError) as error:
            failures[row] = str(error)

    if cache is None:
        features = np.zeros((len(rows), *feature_shape(backbone)), dtype=np.float32)
        found = np.zeros(len(rows), dtype=np.bool_)
    else:
        features, found = cache.get(backbone, contents)

    same: dict[bytes, list[int]] = {}  # content -> positions in `rows` that wait for it
    for position in np.flatnonzero(~found):
        same.setdefault(contents[position], []).append(int(position))
    done = len(sources) - sum(map(len, same.values()))
    if progress is not None:
        progress(done, len(sources))

    unsaved: dict[bytes, NDArray[np.float32]] = {}

    def save() -> None:
        if cache is not None and unsaved:
            cache.add(backbone, list(unsaved), np.stack(list(unsaved.values())))
        unsaved.clear()

    try:
        for batch in _opened(backbone, {content: sources[rows[waiting[0]]] for content, waiting in same.items()}):
            good = [content for content, item in batch.items() if not isinstance(item, PictureError)]
            vectors = dict(zip(good, backbone.encode([batch[content] for content in good]), strict=True))
            for content, item in batch.items():
                waiting = same[content]
                done += len(waiting)
                if content in vectors and np.isfinite(vectors[content]).all():
                    unsaved[content] = vectors[content]
                    features[waiting] = vectors[content]
                    found[waiting] = True
                    continue
                reason = str(item) if content not in vectors else f"{backbone.name} gives numbers that are not finite"
                failures.update((rows[position], reason) for position in waiting)
            if len(unsaved) >= _ROWS_A_FILE:
                save()
            if progress is not None:
                progress(done, len(sources))
    finally:
        save()
    kept = np.flatnonzero(found)
    numbers = np.array(rows, dtype=np.int64)[kept]
    return Extracted(features[kept], numbers, [contents[position] for position in kept], sorted(failures.items()))


def content_digest(backbone: Backbone, source: Source) -> bytes:
    """What an item is kept under: SHA-256 of a picture file's bytes, or of a text in UTF-8 and form NFC.

    Raises:
        SettingsError: The item is of the other modality.
        PictureError: The picture file cannot be read.
        DataError: The text is empty or not Unicode.
    """
    if isinstance(source, str) != (backbone.modality == "text"):
        raise SettingsError(f"{backbone.name} encodes {backbone.modality}s, got a {type(source).__name__}")
    if isinstance(source, str):
        data = _text(source)
        if not data.strip():
            raise DataError("the text is empty")
        try:
            return hashlib.sha256(data.encode("utf-8")).digest()
        except UnicodeEncodeError:
            raise DataError("the text holds half a character (a lone surrogate)") from None
    return hashlib.sha256(source if isinstance(source, bytes) else read_picture_bytes(source)).digest()


def _text(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _opened(backbone: Backbone, sources: dict[bytes, Source]) -> Iterator[dict[bytes, Any]]:
    """Batches of texts, pictures, or the `PictureError` that stands for one; each fits in memory."""
    batch: dict[bytes, Any] = {}
    pixels = 0
    for content, source in sources.items():
        if isinstance(source, str):
            batch[content] = _text(source)
        else:
            try:
                picture = open_picture(source)
                pixels += picture.width * picture.height
                batch[content] = picture
            except PictureError as error:
                batch[content] = error
        if len(batch) == _ITEMS_AT_ONCE or pixels >= _PIXELS_AT_ONCE:
            yield batch
            batch, pixels = {}, 0
    if batch:
        yield batch
