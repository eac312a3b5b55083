"""Hash codes in Milvus: the only package that imports pymilvus (which takes a second, so import this one late)."""

from cmh_milvus.store.collection import EncoderIdentity, HashCollection, Hit, Hits, Ranking, Row
from cmh_milvus.store.ingest import IngestReport, Manifest, content_hash, ingest, manifest_path

__all__ = [
    "EncoderIdentity",
    "HashCollection",
    "Hit",
    "Hits",
    "IngestReport",
    "Manifest",
    "Ranking",
    "Row",
    "content_hash",
    "ingest",
    "manifest_path",
]
