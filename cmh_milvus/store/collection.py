"""A collection of hash codes, bound to the encoder that made them.

A row is one modality of one item. Its primary key is `<item_id>#<modality>` (`Row.pk`), so that one vector field (all
that Milvus 2.3 allows) serves every direction of retrieval through a filter. Scalars such as captions and labels are
dynamic fields: any name, no declaration, absent where an item has none; filter them by name
(``split == "database"``, ``json_contains(labels, "fruit")``).
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from pymilvus import DataType, MilvusClient

from cmh_milvus.codes import BINARIZE_RULE, BIT_ORDER, check_n_bits
from cmh_milvus.errors import DataError, EncoderMismatch, SettingsError, StoreError
from cmh_milvus.store.connection import TIMEOUT, Connection, lite_file
from cmh_milvus.store.filters import all_of, fill, literal

FORMAT_VERSION = 1
MODALITIES = ("image", "text")
UPSERT_ROWS = 1_000
MAX_ID_BYTES = 512
MAX_TEXT_BYTES = 16_000  # longer strings among the fields are cut
MAX_FIELDS_BYTES = 65_536  # Milvus's limit for the dynamic fields of a row together
MAX_HITS = 16_384  # Milvus's limit for one query
MAX_CALL_HITS = 500_000  # queries times hits of one call, which bounds the size of the answer
MAX_CALL_QUERIES = 1_000
MAX_CALL_ROWS = 1_000  # whose fields come with one answer: 64 MiB at most
TIE_SLACK = 64  # hits asked for beyond the limit, so that the last ring is often complete at once
IVF_NLIST, IVF_NPROBE = 256, 32

Index = Literal["BIN_FLAT", "BIN_IVF_FLAT"]
Consistency = Literal["Strong", "Session", "Bounded", "Eventually"]

_T = TypeVar("_T")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_OWN_FIELDS = ("pk", "item_id", "modality", "code")
_WORDS = (  # of Milvus's filters
    *("and", "or", "not", "in", "like", "exists", "is", "null", "true", "false", "array_length"),
    *(f"{of}_contains{what}" for of in ("array", "json") for what in ("", "_all", "_any")),
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NO_FIELDS: Mapping[str, Any] = MappingProxyType({})


class EncoderIdentity(Protocol):
    """What a collection needs to know of an encoder."""

    @property
    def fingerprint(self) -> str:
        """Equal for encoders that give equal codes."""

    @property
    def n_bits(self) -> int:
        """Code length."""


@dataclass(frozen=True)
class Row:
    """One modality of one item, as it is stored.

    Attributes:
        item_id: Unique among items; at most 512 bytes of UTF-8, no control characters.
        modality: `image` or `text`.
        code: Packed code, n_bits // 8 bytes.
        fields: Scalars and lists that JSON can hold. A string is cut to 16,000 bytes of UTF-8, between characters.
        content_hash: Of what the row was made from (`store.content_hash`). It goes to the ingest manifest, not to
            Milvus.
    """

    item_id: str
    modality: str
    code: bytes
    fields: Mapping[str, Any] = field(default_factory=dict)
    content_hash: str = ""

    @property
    def pk(self) -> str:
        """Primary key: `<item_id>#<modality>`, with %25 for a percent sign of the id and %27 for an apostrophe."""
        return _pk(self.item_id, self.modality)


@dataclass(frozen=True)
class Hit:
    """A row that a search found.

    Attributes:
        pk: Primary key, as `Row.pk`.
        item_id: Of the item.
        modality: `image` or `text`.
        distance: Hamming distance to the query, in bits.
        fields: Those asked for that the row has.
    """

    pk: str
    item_id: str
    modality: str
    distance: int
    fields: Mapping[str, Any]


class Hits(Sequence[Hit]):
    """The rows that one query found. A `Hit` is made when it is asked for, as thousands of them take their time.

    Attributes:
        pks: n primary keys.
        distances: uint16 (n,), in bits.
    """

    def __init__(
        self, pks: list[str], distances: NDArray[np.uint16], fields: Mapping[str, Mapping[str, Any]] = _NO_FIELDS
    ) -> None:
        self.pks = pks
        self.distances = distances
        self._fields = fields  # by primary key

    def __len__(self) -> int:
        return len(self.pks)

    def __iter__(self) -> Iterator[Hit]:
        return map(self._hit, self.pks, self.distances.tolist())

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> Hits: ...
    def __getitem__(self, index: int | slice) -> Hit | Hits:
        if isinstance(index, slice):
            return Hits(self.pks[index], self.distances[index], self._fields)
        return self._hit(self.pks[index], int(self.distances[index]))

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Hits | list) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # as for a list

    def __repr__(self) -> str:
        return repr(list(self))

    def _hit(self, pk: str, distance: int) -> Hit:
        key, _, modality = pk.rpartition("#")
        item_id = key.replace("%27", "'").replace("%25", "%")
        return Hit(pk, item_id, modality, distance, self._fields.get(pk, _NO_FIELDS))

    def _sorted(self) -> Hits:
        """By (distance, pk)."""
        pks, distances = self.pks, self.distances
        if (distances[1:] < distances[:-1]).any():  # made of several answers
            order = np.argsort(distances, kind="stable")
            pks, distances = [pks[i] for i in order.tolist()], distances[order]
        ends = [*(np.flatnonzero(distances[1:] != distances[:-1]) + 1).tolist(), len(pks)]
        ordered: list[str] = []
        for end in ends:
            ordered += sorted(pks[len(ordered) : end])
        return Hits(ordered, distances, self._fields)

    @staticmethod
    def _joined(parts: Sequence[Hits]) -> Hits:
        if len(parts) == 1:
            return parts[0]
        fields = {pk: of for part in parts for pk, of in part._fields.items()}
        distances = np.concatenate([part.distances for part in parts])
        return Hits([pk for part in parts for pk in part.pks], distances, fields)


@dataclass(frozen=True)
class Ranking:
    """Rows by distance; those of `HashCollection.rank` are sorted by (distance, pk).

    Attributes:
        pks: n primary keys.
        distances: uint16 (n,), in bits.
    """

    pks: list[str]
    distances: NDArray[np.uint16]


class HashCollection:
    """Hash codes of one encoder in Milvus. Made by `create`, `open` or `open_or_create`.

    Attributes:
        name: Of the collection.
        uri: Where it is.
        fingerprint: Of the encoder.
        n_bits: Code length.
        index: `BIN_FLAT` (exact) or `BIN_IVF_FLAT`.
        collection_id: Random; another one if the collection is dropped and made anew.

    Example:
        ::

            with HashCollection.open_or_create("./photos.db", "photos", encoder) as photos:
                photos.upsert([Row("cat.jpg", "image", code, {"caption": "a cat"})])
                hits = photos.search(encoder_codes, limit=10, modality="image")
    """

    def __init__(self, connection: Connection, name: str, description: Mapping[str, Any]) -> None:
        self._connection = connection
        self.name = name
        self.uri = connection.uri
        self.fingerprint: str = description["fingerprint"]
        self.n_bits: int = description["n_bits"]
        self.index: Index = description["index"]
        self.collection_id: str = description["collection_id"]

    # Creation and opening

    @classmethod
    def create(
        cls,
        uri: str | Path,
        name: str,
        encoder: EncoderIdentity,
        *,
        token: str | None = None,
        index: Index = "BIN_FLAT",
        timeout: float = TIMEOUT,
    ) -> Self:
        """Create a collection for the codes of one encoder.

        Args:
            uri: Path that ends in `.db` (Milvus Lite), or `http://host:19530`.
            name: Letters, digits and underscores, no digit first.
            encoder: Whose codes it will hold.
            token: Of the server.
            index: `BIN_FLAT` is exact. `BIN_IVF_FLAT` (servers only) is faster from millions of rows on, misses some
                neighbours, and cannot answer `lookup` and `rank`.
            timeout: Seconds, for each call.

        Raises:
            SettingsError: The code length, URI or index is impossible.
            StoreError: The collection exists, or Milvus cannot be reached.
        """
        check_n_bits(encoder.n_bits)
        _check_name(name)
        connection = Connection(uri, token, timeout)
        try:
            if connection.call("has_collection", name):
                raise StoreError(
                    f"the collection {name!r} at {connection.uri} exists already: open it, or give another name"
                )
            return cls._create(connection, name, encoder, index)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def open(
        cls,
        uri: str | Path,
        name: str,
        encoder: EncoderIdentity | None = None,
        *,
        token: str | None = None,
        timeout: float = TIMEOUT,
    ) -> Self:
        """Open a collection.

        Args:
            uri: Path that ends in `.db` (Milvus Lite), or `http://host:19530`.
            name: Of the collection.
            encoder: If given, it must be the one that the collection was made for.
            token: Of the server.
            timeout: Seconds, for each call.

        Raises:
            EncoderMismatch: The collection holds codes of another encoder.
            StoreError: There is no such collection, it is not one of cmh-milvus, or Milvus cannot be reached.
        """
        _check_name(name)
        if (file := lite_file(uri)) is not None and not file.exists():  # Lite would make it
            raise StoreError(f"there is no collection {name!r} at {file}, for there is no such file: ingest first")
        connection = Connection(uri, token, timeout)
        try:
            if not connection.call("has_collection", name):
                present = ", ".join(sorted(connection.call("list_collections"))) or "none"
                raise StoreError(
                    f"there is no collection {name!r} at {connection.uri} (present: {present}): ingest first"
                )
            return cls._open(connection, name, encoder)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def open_or_create(
        cls,
        uri: str | Path,
        name: str,
        encoder: EncoderIdentity,
        *,
        token: str | None = None,
        index: Index = "BIN_FLAT",
        timeout: float = TIMEOUT,
    ) -> Self:
        """`open` where the collection exists, else `create`.

        Raises:
            EncoderMismatch: The collection holds codes of another encoder.
            SettingsError: The code length, URI or index is impossible.
            StoreError: It is not a collection of cmh-milvus, or Milvus cannot be reached.
        """
        check_n_bits(encoder.n_bits)
        _check_name(name)
        connection = Connection(uri, token, timeout)
        try:
            if connection.call("has_collection", name):
                return cls._open(connection, name, encoder)
            return cls._create(connection, name, encoder, index)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def _create(cls, connection: Connection, name: str, encoder: EncoderIdentity, index: Index) -> Self:
        if index not in ("BIN_FLAT", "BIN_IVF_FLAT"):
            raise SettingsError(f"the index {index!r} is not possible: give BIN_FLAT or BIN_IVF_FLAT")
        if index != "BIN_FLAT" and connection.lite_file is not None:
            raise SettingsError(f"Milvus Lite has no {index}: give BIN_FLAT, or use a Milvus server")
        description = {
            "format_version": FORMAT_VERSION,
            "fingerprint": encoder.fingerprint,
            "n_bits": encoder.n_bits,
            "bit_order": BIT_ORDER,
            "binarize": BINARIZE_RULE,
            "index": index,
            "collection_id": uuid.uuid4().hex,
            "cmh_milvus_version": importlib.metadata.version("cmh-milvus"),
        }
        schema = MilvusClient.create_schema(
            auto_id=False, enable_dynamic_field=True, description=json.dumps({"cmh_milvus": description})
        )
        max_pk_bytes = MAX_ID_BYTES + 1 + max(map(len, MODALITIES))
        schema.add_field("pk", DataType.VARCHAR, is_primary=True, max_length=max_pk_bytes)
        schema.add_field("item_id", DataType.VARCHAR, max_length=MAX_ID_BYTES)
        schema.add_field("modality", DataType.VARCHAR, max_length=8)
        schema.add_field("code", DataType.BINARY_VECTOR, dim=encoder.n_bits)
        connection.call("create_collection", name, schema=schema, consistency_level="Session")
        return cls._open(connection, name, encoder)

    @classmethod
    def _open(cls, connection: Connection, name: str, encoder: EncoderIdentity | None) -> Self:
        description = _description(connection, name)
        collection = cls(connection, name, description)
        if encoder is not None:
            collection.check_encoder(encoder)
        if not connection.call("list_indexes", name):  # just created, or its creation was interrupted
            params = {"nlist": IVF_NLIST} if collection.index == "BIN_IVF_FLAT" else {}
            index_params = MilvusClient.prepare_index_params()
            index_params.add_index("code", index_type=collection.index, metric_type="HAMMING", params=params)
            connection.call("create_index", name, index_params)
        connection.call("load_collection", name)
        return collection

    def check_encoder(self, encoder: EncoderIdentity) -> None:
        """Check that this collection holds the codes of an encoder.

        Raises:
            EncoderMismatch: It holds those of another.
        """
        if (encoder.fingerprint, encoder.n_bits) != (self.fingerprint, self.n_bits):
            raise EncoderMismatch(
                f"the collection {self.name!r} at {self.uri} holds {self.n_bits}-bit codes of the encoder "
                f"{self.fingerprint[:12]}, not {encoder.n_bits}-bit codes of {encoder.fingerprint[:12]}: use the "
                "encoder folder that made it, or ingest into a new collection"
            )

    def close(self) -> None:
        """Close the connection; the rows stay."""
        self._connection.close()

    def drop(self) -> None:
        """Delete the collection with all its rows, and close the connection."""
        self._call("drop_collection")
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Writing

    def upsert(self, rows: Iterable[Row]) -> int:
        """Store rows; a row replaces the one with its item and modality.

        Args:
            rows: Sent 1,000 at a time. Of rows with one primary key the last counts.

        Returns:
            Number of rows sent.

        Raises:
            DataError: A row cannot be stored; rows of earlier batches are.
            StoreError: Milvus refused, or did not answer, or the collection was dropped and made anew since it was
                opened, maybe for another encoder.
        """
        sent = 0
        if _description(self._connection, self.name)["collection_id"] != self.collection_id:
            raise StoreError(
                f"the collection {self.name!r} at {self.uri} was dropped and made anew since it was opened: open it "
                "again"
            )
        for batch in _batches(rows, UPSERT_ROWS):
            # Of duplicates in a call, Lite would keep the last and servers the first.
            data = {stored["pk"]: stored for stored in map(self._data, batch)}
            self._call("upsert", list(data.values()))
            sent += len(data)
        return sent

    def check_row(self, row: Row) -> None:
        """Check that a row can be stored.

        Raises:
            DataError: It cannot.
        """
        self._data(row)

    def delete(self, item_ids: Iterable[str]) -> int:
        """Delete items, in both modalities.

        Args:
            item_ids: Those that the collection does not hold are passed over.

        Returns:
            Number of rows deleted.

        Raises:
            SettingsError: It is no list of ids.
            StoreError: Milvus refused, or did not answer.
        """
        wanted = list(item_ids)
        if isinstance(item_ids, str) or not all(isinstance(one, str) for one in wanted):
            raise SettingsError(f"item ids are a list of str, such as ['12']; got {item_ids!r:.80}")
        deleted = 0
        for batch in _batches((one for one in wanted if not _CONTROL.search(one)), UPSERT_ROWS // 2):
            expression = f"pk in {literal([_pk(item_id, modality) for item_id in batch for modality in MODALITIES])}"
            deleted += self._count(expression)
            self._call("delete", filter=expression)
        return deleted

    def _data(self, row: Row) -> dict[str, Any]:
        def bad(what: str) -> DataError:
            return DataError(f"the {row.modality} of the item {row.item_id!r} cannot be stored: {what}")

        if not isinstance(row.item_id, str) or not row.item_id or _CONTROL.search(row.item_id):
            raise bad("an item id is a non-empty str without control characters")
        if row.modality not in MODALITIES:
            raise bad(f"a modality is one of {', '.join(MODALITIES)}")
        # Milvus Lite takes codes of any length and type, and mixes up the rows.
        if not isinstance(row.code, bytes) or len(row.code) * 8 != self.n_bits:
            got = f"{len(row.code) * 8} bits" if isinstance(row.code, bytes) else f"a {type(row.code).__name__}"
            raise bad(f"its code is {got}, and the collection takes bytes of {self.n_bits} bits")
        if not isinstance(row.fields, Mapping):
            raise bad(f"its fields are a {type(row.fields).__name__}, not a mapping")
        for name in row.fields:
            if not isinstance(name, str) or name in _OWN_FIELDS or not _is_name(name):
                raise bad(
                    f"a field cannot be named {name!r}: give letters, digits and _, none of {_OWN_FIELDS}, and no word "
                    "of Milvus's filters"
                )
        try:
            if len(_pk(row.item_id, "").encode()) > MAX_ID_BYTES + 1:
                raise bad(f"its id is longer than {MAX_ID_BYTES} bytes (a percent sign or an apostrophe counts 3)")
            fields = {name: _cut(value) if isinstance(value, str) else value for name, value in row.fields.items()}
            size = len(json.dumps(fields, ensure_ascii=False, allow_nan=False).encode())
            fits = all(map(_fits, fields.values()))
        except UnicodeEncodeError:
            raise bad("its id or a field holds a broken character (an unpaired surrogate)") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise bad(f"its fields are not JSON ({error}): leave out bytes, durations, nan and infinity") from None
        if not fits:
            raise bad("a field holds an integer of more than 64 bits, or a dict whose keys are no str")
        if size > MAX_FIELDS_BYTES:
            raise bad(f"its fields take {size} bytes as JSON, and Milvus takes {MAX_FIELDS_BYTES}")
        return {"pk": row.pk, "item_id": row.item_id, "modality": row.modality, "code": row.code, **fields}

    # Reading

    def search(
        self,
        codes: Sequence[bytes],
        *,
        limit: int = 10,
        modality: str | None = None,
        filter: str | None = None,  # noqa: A002 (Milvus's own word)
        filter_params: Mapping[str, Any] | None = None,
        output_fields: Sequence[str] = (),
        consistency: Consistency = "Session",
    ) -> list[Hits]:
        """The nearest rows, sorted by (distance, pk).

        Ties are cut by pk too: where more rows lie at the last distance than fit, all of them are fetched first. (Not
        with BIN_IVF_FLAT, which does not find all rows.)

        Args:
            codes: m packed codes.
            limit: Hits for each code, up to 16,384.
            modality: Only rows of this one.
            filter: Milvus expression over the fields, with placeholders such as ``split == {split}``.
            filter_params: Value of each placeholder.
            output_fields: Names of fields to return; ``["*"]`` for all.
            consistency: `Session` sees what this process has written, and what others wrote a moment ago; `Strong`
                sees what any process has written, and costs a server some 200 ms.

        Returns:
            For each of the m codes at most `limit` hits.

        Raises:
            SettingsError: A code, the limit, the filter or a field name has an impossible form.
            StoreError: Milvus refused, or did not answer.
        """
        if not 1 <= limit <= MAX_HITS or limit != int(limit):
            raise SettingsError(f"a search gives 1 to {MAX_HITS} hits, not {limit}: use lookup or rank for all rows")
        codes, limit = self._checked(codes), int(limit)
        expression = _expression(modality, filter, filter_params)
        ask = {"output_fields": _output_fields(output_fields), "consistency_level": consistency}
        size = min(limit + TIE_SLACK, MAX_HITS)
        results = [found._sorted() for found in self._nearest(codes, expression, size, {}, ask)]

        rings: dict[int, list[int]] = {}  # distance -> queries whose ring at that distance may be incomplete
        for i, found in enumerate(results):
            if len(found) == size and found.distances[limit - 1] == found.distances[-1] and self.index == "BIN_FLAT":
                rings.setdefault(int(found.distances[-1]), []).append(i)
        for distance, queries in rings.items():
            radius = {"radius": distance + 1} | ({"range_filter": distance} if distance else {})
            complete = self._complete([codes[i] for i in queries], expression, radius, ask)
            for i, ring in zip(queries, complete, strict=True):
                n_closer = int(np.searchsorted(results[i].distances, distance))
                results[i] = Hits._joined([results[i][:n_closer], ring._sorted()])
        return [found[:limit] for found in results]

    def lookup(
        self,
        codes: Sequence[bytes],
        radius: int,
        *,
        modality: str | None = None,
        filter: str | None = None,  # noqa: A002
        filter_params: Mapping[str, Any] | None = None,
        output_fields: Sequence[str] = (),
    ) -> list[Hits]:
        """All rows within a Hamming radius, sorted by (distance, pk). Exact and complete, whatever their number.

        Args:
            codes: m packed codes.
            radius: Bits, 0 to n_bits; rows at this distance belong to it.
            modality: Only rows of this one.
            filter: Milvus expression over the fields, with placeholders.
            filter_params: Value of each placeholder.
            output_fields: Names of fields to return; ``["*"]`` for all.

        Returns:
            For each of the m codes its hits.

        Raises:
            SettingsError: A code, the radius, the filter or a field name has an impossible form.
            StoreError: The index is not exact, or Milvus refused, or did not answer.
        """
        if not 0 <= radius <= self.n_bits or radius != int(radius):
            raise SettingsError(f"a Hamming radius is an integer from 0 to {self.n_bits}, not {radius}")
        self._check_exact("lookup")
        codes = self._checked(codes)
        ask = {"output_fields": _output_fields(output_fields), "consistency_level": "Strong"}
        expression = _expression(modality, filter, filter_params)
        results = self._complete(codes, expression, {"radius": int(radius) + 1}, ask)  # Milvus excludes the outer bound
        return [found._sorted() for found in results]

    def rank(
        self,
        codes: Sequence[bytes],
        *,
        modality: str | None = None,
        filter: str | None = None,  # noqa: A002
        filter_params: Mapping[str, Any] | None = None,
    ) -> Iterator[Ranking]:
        """Rank all rows for each code: what evaluation needs of the collection that serves.

        Args:
            codes: m packed codes.
            modality: Only rows of this one.
            filter: Milvus expression over the fields, with placeholders.
            filter_params: Value of each placeholder.

        Yields:
            m rankings.

        Raises:
            SettingsError: A code or the filter has an impossible form.
            StoreError: The index is not exact, or Milvus refused, or did not answer.
        """
        self._check_exact("rank")
        for found in self._served(codes, _expression(modality, filter, filter_params)):
            ordered = found._sorted()
            yield Ranking(ordered.pks, ordered.distances)

    def served(
        self,
        codes: Sequence[bytes],
        *,
        modality: str | None = None,
        filter: str | None = None,  # noqa: A002
        filter_params: Mapping[str, Any] | None = None,
    ) -> Iterator[Ranking]:
        """As much as the index finds for each code, in any order: what evaluation measures.

        With BIN_FLAT these are all rows, as `rank` gives them sorted. With BIN_IVF_FLAT they are those that a search
        of the greatest limit, 16,384, returns: by no means all rows, not even of a small collection.

        Args:
            codes: m packed codes.
            modality: Only rows of this one.
            filter: Milvus expression over the fields, with placeholders.
            filter_params: Value of each placeholder.

        Yields:
            m rankings, unsorted.

        Raises:
            SettingsError: A code or the filter has an impossible form.
            StoreError: Milvus refused, or did not answer.
        """
        for found in self._served(codes, _expression(modality, filter, filter_params)):
            yield Ranking(found.pks, found.distances)

    def count(
        self,
        *,
        modality: str | None = None,
        filter: str | None = None,  # noqa: A002
        filter_params: Mapping[str, Any] | None = None,
    ) -> int:
        """Number of rows, of all that has been written (`Strong`).

        Args:
            modality: Only rows of this one.
            filter: Milvus expression over the fields, with placeholders.
            filter_params: Value of each placeholder.
        """
        return self._count(_expression(modality, filter, filter_params))

    def codes(
        self,
        *,
        modality: str | None = None,
        filter: str | None = None,  # noqa: A002
        filter_params: Mapping[str, Any] | None = None,
    ) -> Iterator[tuple[str, bytes]]:
        """All rows as (pk, packed code), sorted by pk.

        Args:
            modality: Only rows of this one.
            filter: Milvus expression over the fields, with placeholders.
            filter_params: Value of each placeholder.
        """
        expression = _expression(modality, filter, filter_params)
        # Paging by offset loses rows, and Lite cuts an unlimited query short without a word.
        ranges: list[_Range] = [_EVERYTHING]
        while ranges:
            part = ranges.pop()
            rows = self._call(
                "query",
                filter=all_of(expression, _within(part)) or 'pk != ""',
                limit=MAX_HITS,
                output_fields=["pk", "code"],
                consistency_level="Strong",
            )
            if len(rows) < MAX_HITS:
                yield from sorted((row["pk"], b"".join(row["code"])) for row in rows)
            else:
                lower, upper = _halves(part, [row["pk"] for row in rows])
                ranges += [upper, lower]

    def missing(self, pks: Iterable[str]) -> set[str]:
        """Which primary keys have no row, of all that has been written (`Strong`).

        Args:
            pks: As `Row.pk` gives them.

        Raises:
            StoreError: Milvus refused, or did not answer.
        """
        wanted = set(pks)
        return wanted - self._fields(wanted, {"output_fields": ["pk"], "consistency_level": "Strong"}).keys()

    # Under the hood

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self._connection.call(method, self.name, *args, **kwargs)

    def _count(self, expression: str) -> int:
        # Milvus Lite ends over the count of a collection that never had a row.
        if self._connection.lite_file is not None and not self._call(
            "query", filter='pk != ""', limit=1, output_fields=["pk"]
        ):
            return 0
        rows = self._call("query", filter=expression, output_fields=["count(*)"], consistency_level="Strong")
        return int(rows[0]["count(*)"])

    def _checked(self, codes: Iterable[bytes]) -> list[bytes]:
        checked = list(codes)
        for code in checked:
            if not isinstance(code, bytes) or len(code) * 8 != self.n_bits:
                got = f"{len(code) * 8} bits" if isinstance(code, bytes) else f"a {type(code).__name__}"
                raise SettingsError(f"a query code is {got}, and the collection takes bytes of {self.n_bits} bits")
        return checked

    def _check_exact(self, what: str) -> None:
        if self.index != "BIN_FLAT":
            raise StoreError(
                f"{what} needs all rows, and the index {self.index} of the collection {self.name!r} misses some: make "
                "a collection with BIN_FLAT, or search"
            )

    def _served(self, codes: Iterable[bytes], expression: str) -> Iterator[Hits]:
        codes = self._checked(codes)
        ask = {"output_fields": [], "consistency_level": "Strong"}
        rows = max(1, self._count(expression))
        for some in _batches(codes, max(1, MAX_CALL_HITS // rows)):
            if self.index == "BIN_FLAT":
                yield from self._complete(some, expression, {}, ask)
            else:
                yield from self._nearest(some, expression, MAX_HITS, {}, ask)

    def _nearest(
        self, codes: Sequence[bytes], expression: str, limit: int, bounds: Mapping[str, int], ask: Mapping[str, Any]
    ) -> list[Hits]:
        """One search, in calls of bounded size. `bounds` are Milvus's `radius` and `range_filter`."""
        params = dict(bounds) | ({"nprobe": IVF_NPROBE} if self.index == "BIN_IVF_FLAT" else {})
        if ask["output_fields"] and len(codes) * limit > MAX_CALL_ROWS:
            found = self._nearest(codes, expression, limit, bounds, {**ask, "output_fields": []})
            fields = self._fields({pk for hits in found for pk in hits.pks}, ask)
            return [Hits(hits.pks, hits.distances, fields) for hits in found]
        results: list[Hits] = []
        for some in _batches(codes, max(1, min(MAX_CALL_QUERIES, MAX_CALL_HITS // limit))):
            question = {
                "data": some,
                "anns_field": "code",
                "filter": expression,
                "limit": limit,
                "search_params": {"metric_type": "HAMMING", "params": params},
                **ask,
            }
            if not ask["output_fields"]:
                results += [Hits(*columns) for columns in self._connection.search_columns(self.name, **question)]
                continue
            for hits in self._call("search", **question):
                fields = {pk: hit["entity"] for pk, hit in zip(hits.ids, hits, strict=True)}
                results.append(Hits(list(hits.ids), np.array(hits.distances).astype(np.uint16), fields))
        return results

    def _fields(self, pks: Iterable[str], ask: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Fields by primary key, in calls whose answers are of bounded size."""
        fields = {}
        for some in _batches(pks, MAX_CALL_ROWS):
            for row in self._call("query", filter=f"pk in {literal(some)}", **ask):
                fields[row.pop("pk")] = row
        return fields

    def _complete(
        self, codes: Sequence[bytes], expression: str, bounds: Mapping[str, int], ask: Mapping[str, Any]
    ) -> list[Hits]:
        """All rows within `bounds`: where a query's answer is full, its range of keys is halved and asked again."""
        results: list[list[Hits]] = [[] for _ in codes]
        ranges: list[tuple[_Range, list[int]]] = [(_EVERYTHING, list(range(len(codes))))]
        while ranges:
            part, queries = ranges.pop()
            some = [codes[i] for i in queries]
            answers = self._nearest(some, all_of(expression, _within(part)), MAX_HITS, bounds, ask)
            full: list[int] = []
            for i, found in zip(queries, answers, strict=True):
                if len(found) < MAX_HITS:
                    results[i].append(found)
                else:
                    full.append(i)
            if full:
                first = answers[queries.index(full[0])]
                ranges += [(half, full) for half in _halves(part, first.pks)]
        return [Hits._joined(parts) for parts in results]


_Range = tuple[str | None, str | None]  # pk: above the first, up to the second
_EVERYTHING: _Range = (None, None)


def _within(part: _Range) -> str:
    above, up_to = part
    return all_of("" if above is None else f"pk > {literal(above)}", "" if up_to is None else f"pk <= {literal(up_to)}")


def _halves(part: _Range, pks: list[str]) -> tuple[_Range, _Range]:
    """Cut a range between its known keys (at least two)."""
    middle = sorted(pks)[(len(pks) - 1) // 2]  # the order of code points, which is Milvus's order of UTF-8 bytes
    return (part[0], middle), (middle, part[1])


def _expression(modality: str | None, template: str | None, params: Mapping[str, Any] | None) -> str:
    if modality is not None and modality not in MODALITIES:
        raise SettingsError(f"a modality is one of {', '.join(MODALITIES)}, not {modality!r}")
    own = "" if modality is None else f"modality == {literal(modality)}"
    return all_of(own, fill(template or "", params))


def _output_fields(names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise SettingsError(f"output fields are a list of names: give [{names!r}]")
    names = list(names)
    for name in names:
        # Milvus Lite ends, or retries for ever, over a name that is none, and gives some codes as None.
        if name != "*" and (name in _OWN_FIELDS or not _is_name(name)):
            raise SettingsError(f"{name!r} cannot be an output field: give names of fields (`codes` gives the codes)")
    return ["$meta"] if "*" in names else names


def _is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and name.lower() not in _WORDS


def _description(connection: Connection, name: str) -> dict[str, Any]:
    """What `create` wrote down of a collection.

    Raises:
        EncoderMismatch: It was not made by cmh-milvus.
        StoreError: It was, by a release with another format.
    """
    described = connection.call("describe_collection", name)
    try:
        description: dict[str, Any] = json.loads(described["description"])["cmh_milvus"]
        found = description["format_version"]
        if found != FORMAT_VERSION:
            raise StoreError(
                f"the collection {name!r} at {connection.uri} has the format version {found!r}, and this release reads "
                f"{FORMAT_VERSION}: use the release {description.get('cmh_milvus_version')} of cmh-milvus, which made "
                "it, or a newer one"
            )
        return {key: description[key] for key in ("fingerprint", "n_bits", "index", "collection_id")}
    except (ValueError, KeyError, TypeError):
        raise EncoderMismatch(
            f"the collection {name!r} at {connection.uri} was not made by cmh-milvus, so that nobody knows which "
            "encoder made its codes: give another name"
        ) from None


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise SettingsError(f"a collection cannot be named {name!r}: give letters, digits and _, no digit first")


def _pk(item_id: str, modality: str) -> str:
    # Milvus Lite pastes keys into SQL, where an apostrophe ends the string.
    key = item_id.replace("%", "%25").replace("'", "%27")
    return f"{key}#{modality}"


def _batches(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _fits(value: Any) -> bool:
    """Whether all integers in a field are within 64 bits, and all keys str; else Milvus refuses the whole batch."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_fits, value.values()))
    return all(map(_fits, value)) if isinstance(value, (list, tuple)) else True


def _cut(text: str) -> str:
    encoded = text.encode()
    return text if len(encoded) <= MAX_TEXT_BYTES else encoded[:MAX_TEXT_BYTES].decode(errors="ignore")
