"""Ingest that is killed and run again, on whichever back end the fixtures give."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmh_milvus.errors import DataError, StoreError
from cmh_milvus.store import HashCollection, IngestReport, Manifest, Row, content_hash, ingest, manifest_path
from tests.store.conftest import Encoder


def make_rows(ids, version="1"):
    return [Row(str(i), "image", i.to_bytes(2, "big"), {"n": i}, content_hash(str(i), version)) for i in ids]


def batches(rows, size=10):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def test_a_second_run_does_nothing(empty, tmp_path):
    rows = make_rows(range(35))
    with Manifest(tmp_path / "m.jsonl", empty) as manifest:
        assert ingest(empty, batches(rows), manifest) == IngestReport(upserted=35, skipped=0, total=35)
    with Manifest(tmp_path / "m.jsonl", empty) as manifest:
        assert len(manifest) == 35
        assert all(manifest.done(row.pk, row.content_hash) for row in rows)
        assert not manifest.done(rows[0].pk, content_hash("0", "2"))
        assert not manifest.done("absent#image", rows[0].content_hash)
        assert ingest(empty, batches(rows), manifest) == IngestReport(upserted=0, skipped=35, total=35)


def test_changed_and_new_rows_are_sent(empty, tmp_path):
    with Manifest(tmp_path / "m.jsonl", empty) as manifest:
        ingest(empty, batches(make_rows(range(20))), manifest)
        report = ingest(empty, batches(make_rows(range(15)) + make_rows(range(15, 30), "2")), manifest)
    assert report == IngestReport(upserted=15, skipped=15, total=30)


def test_rows_without_a_content_hash_are_known_by_what_they_hold(empty, tmp_path):
    with Manifest(tmp_path / "m.jsonl", empty) as manifest:
        ingest(empty, [[Row("a", "text", b"ab", {"x": 1})]], manifest)
        assert ingest(empty, [[Row("a", "text", b"ab", {"x": 1})]], manifest).skipped == 1
        assert ingest(empty, [[Row("a", "text", b"ab", {"x": 2})]], manifest).upserted == 1
        assert ingest(empty, [[Row("a", "text", b"ac", {"x": 2})]], manifest).upserted == 1
    assert dict(empty.codes()) == {"a#text": b"ac"}


def test_of_equal_keys_in_a_batch_the_last_counts_however_often_it_runs(empty, tmp_path):
    batch = [Row("a", "text", b"ab"), Row("b", "text", b"ad"), Row("a", "text", b"ac")]
    for sent in (2, 0, 0):
        with Manifest(tmp_path / "m.jsonl", empty) as manifest:
            assert ingest(empty, [batch], manifest) == IngestReport(upserted=sent, skipped=2 - sent, total=2)
        assert dict(empty.codes()) == {"a#text": b"ac", "b#text": b"ad"}


def test_without_a_manifest(empty):
    assert ingest(empty, batches(make_rows(range(25)))) == IngestReport(25, 0, 25)
    assert ingest(empty, []) == IngestReport(0, 0, 25)


def test_a_bad_row_stops_the_ingest_and_what_came_before_counts(empty, tmp_path):
    with Manifest(tmp_path / "m.jsonl", empty) as manifest:
        with pytest.raises(DataError):
            ingest(empty, [make_rows(range(5)), [Row("x", "image", b"wrong length")]], manifest)
        assert len(manifest) == 5


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize(
    "bad", [Row(5, "image", b"ab"), Row("a", "image", b"ab", {"x": {1: 2, "a": 3}}), Row("a", "image", None)]
)
def test_bad_rows_of_any_form_are_told(empty, tmp_path, bad, with_manifest):
    with Manifest(tmp_path / "m.jsonl", empty) as manifest, pytest.raises(DataError, match="cannot be stored"):
        ingest(empty, [[bad]], manifest if with_manifest else None)


def test_a_torn_line_costs_only_itself(empty, tmp_path):
    tails = [b'{"5#image": "12', b"\0" * 40, b'{"5#image": "123"}', b"\xff\xfe\n", b"[1]\n"]
    for number, tail in enumerate(tails):
        path = tmp_path / f"{number}.jsonl"
        with Manifest(path, empty) as manifest:
            ingest(empty, batches(make_rows(range(5))), manifest)
        with path.open("ab") as file:
            file.write(tail)
        with Manifest(path, empty) as manifest:
            assert len(manifest) == 5, tail
            assert ingest(empty, batches(make_rows(range(10))), manifest).skipped == 5
        with Manifest(path, empty) as manifest:
            assert len(manifest) == 10, tail


def test_a_collection_made_anew_makes_the_manifest_void(uri, empty, tmp_path):
    path = tmp_path / "m.jsonl"
    with Manifest(path, empty) as manifest:
        ingest(empty, batches(make_rows(range(5))), manifest)
    empty._call("drop_collection")
    with HashCollection.create(uri, empty.name, Encoder()) as again, Manifest(path, again) as manifest:
        assert len(manifest) == 0
        assert ingest(again, batches(make_rows(range(5))), manifest) == IngestReport(5, 0, 5)


def test_deleted_rows_are_no_longer_done(empty, tmp_path):
    path = tmp_path / "m.jsonl"
    rows = make_rows(range(12))
    with Manifest(path, empty) as manifest:
        ingest(empty, batches(rows), manifest)
    empty.delete(["3", "4"])
    with Manifest(path, empty) as manifest:
        assert [row.item_id for row in rows if not manifest.done(row.pk, row.content_hash)] == ["3", "4"]
        assert ingest(empty, batches(rows), manifest) == IngestReport(2, 10, 12)


def test_deleted_rows_are_no_longer_done_whatever_else_the_collection_holds(empty, tmp_path):
    rows, others = make_rows(range(12)), make_rows(range(100, 2_100))
    with Manifest(tmp_path / "m.jsonl", empty) as manifest:
        ingest(empty, batches(rows), manifest)
    ingest(empty, batches(others, 1_000))
    empty.delete(["3", "4"])
    for sent in (2, 0):
        with Manifest(tmp_path / "m.jsonl", empty) as manifest:
            assert ingest(empty, batches(rows), manifest) == IngestReport(sent, 12 - sent, 2_012)
    assert {"3#image", "4#image"} <= dict(empty.codes()).keys()


@pytest.mark.parametrize("with_manifest", [True, False])
def test_rows_that_vanish_meanwhile_are_noticed(empty, tmp_path, with_manifest):
    ingest(empty, [make_rows(range(100, 110))])

    def source():
        yield make_rows(range(10))
        empty.delete(["0"])
        yield make_rows(range(10, 20))

    manifest = Manifest(tmp_path / "m.jsonl", empty) if with_manifest else None
    with nullcontext() if manifest is None else manifest, pytest.raises(StoreError, match="1 of 20 rows are missing"):
        ingest(empty, source(), manifest)


def test_a_manifest_that_cannot_be_written(empty, tmp_path):
    with pytest.raises(StoreError, match="cannot be used"):
        Manifest(tmp_path / "absent" / "m.jsonl", empty)
    with pytest.raises(StoreError, match="cannot be used"):
        Manifest(tmp_path, empty)


KILLED = """
import sys, time
from pathlib import Path
from cmh_milvus.store import HashCollection, Manifest, ingest
from tests.store.conftest import Encoder
from tests.store.test_ingest import make_rows

def source():
    for start in range(0, 20_000, 50):
        rows = [row for row in make_rows(range(start, start + 50)) if not manifest.done(row.pk, row.content_hash)]
        print(start, flush=True)  # the batch before is acknowledged
        yield rows

with HashCollection.open_or_create(sys.argv[1], "killed", Encoder()) as collection:
    with Manifest(Path(sys.argv[2]), collection) as manifest:
        ingest(collection, source(), manifest)
"""


def test_an_ingest_that_is_killed_goes_on_where_it_was(uri, on_server, tmp_path):
    """kill -9 at any moment: nothing acknowledged is lost or sent again."""
    where = uri if on_server else str(tmp_path / "killed.db")
    path = tmp_path / "m.jsonl"
    acked = 0
    for after in (400, 900):
        command = [sys.executable, "-c", KILLED, where, str(path)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", *sys.path])}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            for line in process.stdout:
                if int(line) >= after:
                    acked = int(line)
                    time.sleep(0.003)
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL
    with HashCollection.open(where, "killed", Encoder()) as collection:
        rows = make_rows(range(1_500))
        with Manifest(path, collection) as manifest:
            done = {row.pk for row in rows if manifest.done(row.pk, row.content_hash)}
            assert done >= {row.pk for row in rows[:acked]}
            assert dict(collection.codes()).keys() >= done
            assert ingest(collection, batches(rows, 100), manifest).skipped == len(done)
        assert dict(collection.codes()) | {row.pk: row.code for row in rows} == dict(collection.codes())
        collection.drop()


def test_the_manifest_is_plain_json_lines(empty, tmp_path):
    path = tmp_path / "m.jsonl"
    rows = make_rows(range(3))
    with Manifest(path, empty) as manifest:
        ingest(empty, batches(rows, 2), manifest)
    header, *lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert header == {"manifest": "1", "collection_id": empty.collection_id}
    assert lines == [{row.pk: row.content_hash for row in some} for some in (rows[:2], rows[2:])]


def test_where_the_manifest_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert manifest_path("a.db", "photos") == tmp_path.resolve() / "a.photos.manifest.jsonl"
    assert str(manifest_path("http://host:19530", "photos")) == "photos.manifest.jsonl"


@given(st.lists(st.text(max_size=3) | st.binary(max_size=3)), st.lists(st.text(max_size=3) | st.binary(max_size=3)))
def test_content_hashes_differ_where_the_parts_do(a, b):
    def plain(parts):
        return [part if isinstance(part, bytes) else part.encode() for part in parts]

    assert (content_hash(*a) == content_hash(*b)) == (plain(a) == plain(b))
