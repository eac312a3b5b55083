"""Hash codes in Milvus: the only package that imports pymilvus (which takes a second, so import this one late)."""

import os

# pymilvus takes MILVUS_URI for a server's address when it is imported, and fails at the file that it may be here.
_uri = os.environ.get("MILVUS_URI", "")
if _uri.endswith(".db"):
    del os.environ["MILVUS_URI"]
    import pymilvus as _pymilvus  # noqa: F401

    os.environ["MILVUS_URI"] = _uri

from cmh_milvus.store.collection import EncoderIdentity, HashCollection, Hit, Hits, Ranking, Row  # noqa: E402
from cmh_milvus.store.ingest import IngestReport, Manifest, content_hash, ingest, manifest_path  # noqa: E402

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
