"""Ingest that can be killed at any moment and run again.

Encoding is the cost, so the manifest answers, before anything is encoded, which rows are stored already. It is a file
of JSON lines: a header that names the collection, then one line a batch, ``{"<pk>": "<content hash>", ...}``, written
and synced after Milvus has acknowledged the batch. What was sent but not acknowledged is sent again; `upsert` makes
that harmless.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from cmh_milvus.errors import StoreError
from cmh_milvus.store.collection import HashCollection, Row
from cmh_milvus.store.connection import lite_file

FORMAT_VERSION = 1


def content_hash(*parts: bytes | str) -> str:
    """Hash of what a row is made from: the picture's bytes or the text, and its fields.

    Args:
        parts: In a fixed order; ("ab", "c") and ("a", "bc") differ.

    Returns:
        The first 32 hexadecimal digits of a SHA-256.

    Example:
        >>> content_hash("a cat", b"{}") == content_hash("a cat{}")
        False
    """
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def manifest_path(uri: str | Path, name: str) -> Path:
    """Where the manifest of a collection lies: beside a Milvus Lite file, else in the current folder.

    Example:
        >>> manifest_path("http://localhost:19530", "photos")
        PosixPath('photos.manifest.jsonl')
    """
    file = lite_file(uri)
    return Path(f"{name}.manifest.jsonl") if file is None else file.with_name(f"{file.stem}.{name}.manifest.jsonl")


class Manifest:
    """Which rows a collection has acknowledged, made from what.

    A manifest of another collection, or of one that was dropped and made anew, counts for nothing and is begun anew.
    Only entries whose row is there count: all keys are asked for when the manifest is opened, a second for 100,000 of
    them in Milvus Lite. What the rows hold is not looked at: a row that was overwritten without this manifest still
    counts as stored.

    Args:
        path: Of the file, which need not exist.
        collection: Whose rows it lists.

    Raises:
        StoreError: The file cannot be read or written.
    """

    def __init__(self, path: Path, collection: HashCollection) -> None:
        self.path = path
        self._collection_id = collection.collection_id
        try:
            self._acked, sound = self._read()
            if missing := collection.missing(self._acked):
                self._acked = {pk: of for pk, of in self._acked.items() if pk not in missing}
            if missing or not sound:
                self._rewrite()
            self._file = path.open("ab")
        except OSError as error:
            raise self._unusable(error) from error

    def __len__(self) -> int:
        return len(self._acked)

    def done(self, pk: str, content_hash: str) -> bool:
        """Whether the row is stored, made from this content: then it need not be encoded."""
        return self._acked.get(pk) == content_hash

    def acknowledge(self, rows: Iterable[Row]) -> None:
        """Write down rows that Milvus has acknowledged.

        Raises:
            StoreError: The file cannot be written.
        """
        acked = {row.pk: _hash(row) for row in rows}
        if not acked:
            return
        try:
            self._file.write(_line(acked))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unusable(error) from error
        self._acked.update(acked)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _header(self) -> dict[str, str]:
        return {"manifest": str(FORMAT_VERSION), "collection_id": self._collection_id}

    def _read(self) -> tuple[dict[str, str], bool]:
        """The entries up to the first damaged line, and whether the file may be appended to as it is."""
        acked: dict[str, str] = {}
        if not self.path.exists():
            return acked, False
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines):
                try:
                    entries = json.loads(line)
                except ValueError:
                    return acked, False
                if not line.endswith(b"\n") or not isinstance(entries, dict):
                    return acked, False
                if number == 0:
                    if entries != self._header:
                        return {}, False
                else:
                    acked.update(entries)
        return acked, True

    def _rewrite(self) -> None:
        new = self.path.with_name(f"{self.path.name}.new")
        with new.open("wb") as file:
            file.write(_line(self._header))
            if self._acked:
                file.write(_line(self._acked))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path)

    def _unusable(self, error: OSError) -> StoreError:
        return StoreError(
            f"the ingest manifest {self.path} cannot be used ({error.strerror}): give a path in a folder that you may "
            "write to"
        )


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did.

    Attributes:
        upserted: Rows sent and acknowledged.
        skipped: Rows that the manifest had already.
        total: Rows of the collection afterwards, of all that was ever written (`Strong`).
    """

    upserted: int
    skipped: int
    total: int


def ingest(
    collection: HashCollection, batches: Iterable[Sequence[Row]], manifest: Manifest | None = None
) -> IngestReport:
    """Store rows batch by batch: upsert, acknowledgement, manifest entry, next.

    Args:
        collection: Open.
        batches: Best made lazily, so that each is encoded when its turn comes. 1,000 rows or more each are fast.
        manifest: Of the collection. Its rows are skipped; ask `Manifest.done` before encoding to save that as well.

    Raises:
        DataError: A row cannot be stored.
        StoreError: Milvus refused or did not answer, or rows of these batches are missing afterwards. Run again to go
            on.
    """
    upserted = skipped = 0
    seen: set[str] = set()
    for rows in batches:
        by_key: dict[str, Row] = {}  # the last of equal keys counts
        for row in rows:
            collection.check_row(row)
            by_key[row.pk] = row
        batch = list(by_key.values())
        todo = [row for row in batch if manifest is None or not manifest.done(row.pk, _hash(row))]
        skipped += len(batch) - len(todo)
        upserted += collection.upsert(todo)
        seen.update(by_key)
        if manifest is not None:
            manifest.acknowledge(todo)
    if missing := collection.missing(seen):
        raise StoreError(
            f"{len(missing)} of {len(seen)} rows are missing from the collection {collection.name!r} at "
            f"{collection.uri} after they were acknowledged: something else deletes from it, or the disk failed; run "
            "the ingest again"
        )
    return IngestReport(upserted, skipped, collection.count())


def _hash(row: Row) -> str:
    if row.content_hash:
        return row.content_hash
    return content_hash(row.code, json.dumps(dict(row.fields), sort_keys=True, default=repr))


def _line(entries: dict[str, str]) -> bytes:
    return json.dumps(entries).encode() + b"\n"
