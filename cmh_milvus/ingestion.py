"""From items to stored codes: reads, encodes and stores, resumably; one bad item never ends the job."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from cmh_milvus.codes import to_bytes
from cmh_milvus.datasets.base import Item
from cmh_milvus.encoders.encoder import CrossModalHashEncoder, Modality
from cmh_milvus.encoders.feature_cache import FeatureCache, extract_features
from cmh_milvus.errors import DataError, PictureError, SettingsError
from cmh_milvus.pictures import read_picture_bytes
from cmh_milvus.store import HashCollection, Manifest, Row, content_hash, ingest

OWN_FIELDS = ("caption", "uri", "labels")  # made of an item's text, picture and labels
ITEMS_AT_ONCE = 128  # encoded, sent and acknowledged together; what a killed job does again at most


@dataclass
class ItemsReport:
    """What an ingest of items did.

    Attributes:
        sent: Rows encoded and stored.
        skipped: Rows that were stored already, made from the same content.
        failures: (item id, reason), each item once, though it has a row of its picture and one of its text.
    """

    sent: int = 0
    skipped: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Pending:
    """A row that is still to be encoded."""

    item_id: str
    source: bytes | str
    fields: Mapping[str, Any]
    content_hash: str


def ingest_items(
    collection: HashCollection,
    items: Iterable[Item],
    encoder: CrossModalHashEncoder,
    *,
    manifest: Path | None = None,
    cache: FeatureCache | None = None,
    fields: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> ItemsReport:
    """Encode items and store their codes: a row for each picture and each text.

    With a manifest the job can be killed at any moment and run again: what is stored already is not encoded again.

    Args:
        collection: Open, of this encoder.
        items: Read lazily.
        encoder: Makes the codes.
        manifest: File that keeps what has been stored (`store.manifest_path` gives its usual place).
        cache: Where backbone features are looked up and kept.
        fields: Names of the items' further fields to store, beside `caption`, `uri` and `labels`. Dates and times are
            stored as ISO 8601 text, decimals as floats; an item with a value that JSON cannot hold is a failure.
        progress: Called with the number of items that are done.

    Raises:
        SettingsError: A field is called like one of `OWN_FIELDS`.
        EncoderMismatch: The collection holds codes of another encoder.
        StoreError: Milvus refused, or did not answer.
    """
    check_fields(fields)
    collection.check_encoder(encoder)
    report = ItemsReport()
    with nullcontext() if manifest is None else Manifest(manifest, collection) as written:

        def batches() -> Iterator[list[Row]]:
            done = 0
            for some in _chunks(items):
                rows: list[Row] = []
                once = list({item.id: item for item in some}.values())  # the last of equal ids counts
                for modality in ("image", "text"):
                    pending = _pending(once, modality, fields, collection, written, report)
                    rows += _encoded(pending, modality, encoder, cache, report)
                yield rows
                done += len(some)
                if progress is not None:
                    progress(done)

        report.sent = ingest(collection, batches(), written).upserted
    first: dict[str, str] = {}
    for item_id, reason in report.failures:
        first.setdefault(item_id, reason)
    report.failures = list(first.items())
    return report


def check_fields(names: Sequence[str]) -> None:
    """Check that further fields do not take the place of those that every item has.

    Raises:
        SettingsError: A name is among `OWN_FIELDS`.
    """
    for name in names:
        if name in OWN_FIELDS:
            raise SettingsError(
                f"a further field cannot be called {name!r}: an item's text, picture and labels are stored as "
                f"{', '.join(OWN_FIELDS)}; rename the column"
            )


def _chunks(items: Iterable[Item]) -> Iterator[list[Item]]:
    some: list[Item] = []
    for item in items:
        some.append(item)
        if len(some) == ITEMS_AT_ONCE:
            yield some
            some = []
    if some:
        yield some


def _pending(
    items: Sequence[Item],
    modality: Modality,
    names: Sequence[str],
    collection: HashCollection,
    manifest: Manifest | None,
    report: ItemsReport,
) -> list[_Pending]:
    """The rows of a modality that can be stored and that the manifest does not have."""
    pending = []
    for item in items:
        if (item.image if modality == "image" else item.text) is None:
            continue
        try:
            row = Row(item.id, modality, bytes(collection.n_bits // 8), _fields(item, names))  # the code comes later
            collection.check_row(row)
            source = _source(item, modality)
        except (DataError, PictureError) as error:
            report.failures.append((item.id, str(error)))
            continue
        made_of = content_hash(source, json.dumps(row.fields, sort_keys=True, default=str))
        if manifest is not None and manifest.done(row.pk, made_of):
            report.skipped += 1
        else:
            pending.append(_Pending(item.id, source, row.fields, made_of))
    return pending


def _source(item: Item, modality: Modality) -> bytes | str:
    part, kind = (item.image, Path) if modality == "image" else (item.text, str)
    if not isinstance(part, kind):
        raise DataError(f"its {modality} is a {type(part).__name__}: give a {kind.__name__}")
    return read_picture_bytes(part) if isinstance(part, Path) else part


def _fields(item: Item, names: Sequence[str]) -> dict[str, Any]:
    try:
        fields = {name: _plain(item.fields[name]) for name in names if item.fields.get(name) is not None}
    except RecursionError:
        raise DataError("its fields are lists or dicts within each other to no end: store less of them") from None
    if item.text is not None:
        fields["caption"] = item.text
    if item.image is not None:
        fields["uri"] = str(item.image)
    if item.labels:
        fields["labels"] = list(item.labels)
    return fields


def _plain(value: Any) -> Any:
    """Dates and times as ISO 8601 text, decimals as floats: what JSON can hold, and filters can compare."""
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, dict) else value


def _encoded(
    pending: Sequence[_Pending],
    modality: Modality,
    encoder: CrossModalHashEncoder,
    cache: FeatureCache | None,
    report: ItemsReport,
) -> list[Row]:
    """Rows of what could be encoded; the rest goes to the report."""
    if not pending:
        return []
    extracted = extract_features(encoder.backbone(modality), [one.source for one in pending], cache)
    report.failures += [(pending[row].item_id, reason) for row, reason in extracted.failures]
    codes = to_bytes(encoder.packed_codes(modality, extracted.features))
    rows = []
    for number, code in zip(extracted.rows, codes, strict=True):
        one = pending[number]
        rows.append(Row(one.item_id, modality, code, one.fields, one.content_hash))
    return rows
