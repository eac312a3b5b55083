"""Consistency, timeouts and closing of connections, as they are asked of Milvus."""

import pytest

from cmh_milvus.store import HashCollection, Row
from tests.store.conftest import Encoder


@pytest.fixture
def few(tmp_path):
    with HashCollection.create(str(tmp_path / "few.db"), "few", Encoder()) as collection:
        collection.upsert(Row(str(i), "image", bytes([i, i])) for i in range(5))
        yield collection


def test_what_promises_all_rows_reads_strongly(few, monkeypatch):
    """A server answers from a moment ago otherwise; Milvus Lite knows no difference."""
    asked, call, columns = [], few._connection.call, few._connection.search_columns
    monkeypatch.setattr(
        few._connection, "call", lambda method, *a, **k: asked.append((method, k)) or call(method, *a, **k)
    )
    monkeypatch.setattr(
        few._connection, "search_columns", lambda *a, **k: asked.append(("search", k)) or columns(*a, **k)
    )
    few.count(), list(few.codes()), few.lookup([b"ab"], 3), list(few.rank([b"ab"])), few.delete(["0"])
    read = [k for method, k in asked if method in ("query", "search") and k.get("limit") != 1]
    assert len(read) >= 5
    assert {k["consistency_level"] for k in read} == {"Strong"}
    for level in ("Session", "Eventually"):
        asked.clear()
        few.search([b"ab"], **({} if level == "Session" else {"consistency": level}))
        assert {k["consistency_level"] for _, k in asked} == {level}


def test_calls_have_the_timeout_that_was_asked_for(tmp_path, monkeypatch):
    with HashCollection.create(str(tmp_path / "few.db"), "few", Encoder(), timeout=7.0) as few:
        seen = []
        for name in ("query", "search", "upsert"):
            real = getattr(few._connection._client, name)
            monkeypatch.setattr(
                few._connection._client, name, lambda *a, real=real, **k: seen.append(k["timeout"]) or real(*a, **k)
            )
        few.upsert([Row("a", "image", b"ab")])
        few.count(), few.search([b"ab"]), few.search([b"ab"], output_fields=["*"])
    assert len(seen) >= 4
    assert set(seen) == {7.0}


def test_an_encoder_of_another_length_is_refused_whatever_its_name(few):
    from cmh_milvus.errors import EncoderMismatch

    with pytest.raises(EncoderMismatch):
        few.check_encoder(Encoder(n_bits=24))


@pytest.mark.parametrize("opening", [HashCollection.open, HashCollection.open_or_create])
def test_a_refused_opening_leaves_no_connection(tmp_path, monkeypatch, opening):
    from cmh_milvus.errors import EncoderMismatch
    from cmh_milvus.store.connection import Connection

    uri = str(tmp_path / "few.db")
    HashCollection.create(uri, "few", Encoder()).close()
    closed, close = [], Connection.close
    monkeypatch.setattr(Connection, "close", lambda self: closed.append(self) or close(self))
    with pytest.raises(EncoderMismatch):
        opening(uri, "few", Encoder("b2" * 32))
    assert len(closed) == 1
    assert not (tmp_path / ".few.db.lock").exists()


def test_connections_that_wait_on_an_encoder_are_kept_and_acknowledged_rows_are_synced(tmp_path, monkeypatch):
    import os

    from cmh_milvus.store import Manifest, connection, ingest

    made, client = [], connection.MilvusClient
    monkeypatch.setattr(connection, "MilvusClient", lambda *a, **k: made.append(k) or client(*a, **k))
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(number) or fsync(number))
    with (
        HashCollection.create(str(tmp_path / "few.db"), "few", Encoder()) as few,
        Manifest(tmp_path / "m", few) as manifest,
    ):
        before = len(synced)
        ingest(few, [[Row("a", "image", b"ab")], [Row("b", "image", b"ab")]], manifest)
        assert len(synced) - before == 2
    assert all(k["grpc_options"]["grpc.keepalive_time_ms"] >= 300_000 and k["dedicated"] for k in made)
