"""Which items are encoded and stored again; whose codes are refused."""

import dataclasses
import datetime as dt
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cmh_milvus.datasets.base import Item
from cmh_milvus.datasets.files import read_items
from cmh_milvus.encoders.backbones import BagOfWords, load_backbone
from cmh_milvus.encoders.encoder import CrossModalHashEncoder, Tower
from cmh_milvus.encoders.hash_head import HashHead, HashHeadConfig
from cmh_milvus.errors import EncoderMismatch
from cmh_milvus.ingestion import ingest_items
from cmh_milvus.store import HashCollection


@pytest.fixture
def words_encoder():
    """Random heads; texts are bags of four words."""
    torch.manual_seed(0)
    bag = BagOfWords(("red", "green", "blue", "big"))
    towers = (
        Tower.of(load_backbone("precomputed:4", "image"), HashHead(HashHeadConfig(4, 8))),
        Tower.of(bag, HashHead(HashHeadConfig(4, 8))),
    )
    return CrossModalHashEncoder(*towers, device="cpu")


ITEM = Item("1", text="big red", labels=("a",), fields={"n": 1, "note": "x"})


@pytest.mark.parametrize(
    ("changed", "sent"),
    [
        ({}, 0),
        ({"labels": ("b",)}, 1),
        ({"fields": {"n": 2}}, 1),
        ({"fields": {"n": 1, "note": "y"}}, 0),
        ({"text": "big blue"}, 1),
    ],
)
def test_a_row_whose_stored_fields_changed_is_sent_again(words_encoder, tmp_path, changed, sent):
    with HashCollection.create(str(tmp_path / "a.db"), "a", words_encoder) as collection:
        for item, expected in ((ITEM, 1), (dataclasses.replace(ITEM, **changed), sent)):
            report = ingest_items(collection, [item], words_encoder, manifest=tmp_path / "m.jsonl", fields=["n"])
            assert (report.sent, report.skipped, report.failures) == (expected, 1 - expected, [])
        [[hit]] = collection.search([b"a"], output_fields=["*"])
    assert dict(hit.fields) == {"n": item.fields["n"], "caption": item.text, "labels": list(item.labels)}


def test_of_equal_ids_the_last_counts_however_often_it_runs(words_encoder, tmp_path):
    items = [ITEM, dataclasses.replace(ITEM, text="blue")]
    with HashCollection.create(str(tmp_path / "a.db"), "a", words_encoder) as collection:
        for sent in (1, 0, 0):
            report = ingest_items(collection, items, words_encoder, manifest=tmp_path / "m.jsonl")
            assert (report.sent, report.skipped) == (sent, 1 - sent)
            [[hit]] = collection.search([b"a"], output_fields=["caption"])
            assert hit.fields["caption"] == "blue"


def test_columns_of_parquet_as_they_are_stored(words_encoder, tmp_path):
    """What JSON has no form for is text or a number; a second run finds nothing new."""
    day = dt.date(2024, 5, 1)
    noon = dt.datetime(2024, 5, 1, 12, 30, tzinfo=dt.UTC)
    columns = {
        "day": [day, None],
        "at": [noon, noon],
        "clock": [dt.time(12, 30), None],
        "price": [Decimal("19.50"), Decimal("7.25")],
        "days": [[day], []],
        "size": [{"h": Decimal("1.5")}, None],
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": ["1", "2"], "text": ["red", "blue"], **columns}), path)
    with HashCollection.create(str(tmp_path / "a.db"), "a", words_encoder) as collection:
        for sent in (2, 0):
            report = ingest_items(
                collection, read_items(path), words_encoder, manifest=tmp_path / "m.jsonl", fields=list(columns)
            )
            assert (report.sent, report.failures) == (sent, [])
        [[hit]] = collection.search([b"a"], filter='price > 8 and day >= "2024-05-01"', output_fields=["*"])
    assert dict(hit.fields) == {
        "caption": "red", "day": "2024-05-01", "at": "2024-05-01T12:30:00+00:00", "clock": "12:30:00", "price": 19.5,
        "days": ["2024-05-01"], "size": {"h": 1.5},
    }  # fmt: skip


@pytest.mark.parametrize("value", [b"x", dt.timedelta(1), float("nan")])
def test_fields_that_cannot_be_stored(words_encoder, tmp_path, value):
    with HashCollection.create(str(tmp_path / "a.db"), "a", words_encoder) as collection:
        report = ingest_items(collection, [dataclasses.replace(ITEM, fields={"n": value})], words_encoder, fields=["n"])
    [(item, reason)] = report.failures
    assert item == "1"
    assert "leave out bytes, durations, nan and infinity" in reason


def test_an_item_fails_once_however_many_rows_it_has(words_encoder, tmp_path):
    items = [Item("1", tmp_path / "absent.png", "red", fields={"n": 10**24}), Item("2", text="blue")]
    with HashCollection.create(str(tmp_path / "a.db"), "a", words_encoder) as collection:
        report = ingest_items(collection, items, words_encoder, fields=["n"])
    assert report.sent == 1
    assert [item for item, _ in report.failures] == ["1"]


def test_a_bad_item_is_a_failure_and_the_job_goes_on(words_encoder, tmp_path):
    deep = []
    for _ in range(500):
        deep = [deep]
    fields = {"mixed": {1: 2, "a": 3}, "nan": float("nan"), "set": {1, 2}, "deep": deep, "like": "a word of filters"}
    bad = [Item(name, text="red", fields={name: value}) for name, value in fields.items()]
    bad += [Item(7, text="red"), Item("number", text=5), Item("str", image="cat.jpg"), Item("b", image=tmp_path / "b")]
    items = [ITEM, *bad, dataclasses.replace(ITEM, id="2")]
    with HashCollection.create(str(tmp_path / "a.db"), "a", words_encoder) as collection:
        for sent in (2, 0):
            report = ingest_items(collection, items, words_encoder, manifest=tmp_path / "m.jsonl", fields=list(fields))
            assert (report.sent, report.skipped) == (sent, 2 - sent)
            assert {item_id for item_id, _ in report.failures} == {item.id for item in bad}
            assert len(report.failures) == len(bad)
        assert sorted(pk for pk, _ in collection.codes()) == ["1#text", "2#text"]
    said = dict(report.failures)
    assert "an item id is a non-empty str" in said[7]
    assert said["number"] == "its text is a int: give a str"
    assert said["str"] == "its image is a str: give a Path"
    assert "keys are no str" in said["mixed"]


def test_codes_of_another_encoder_are_refused_before_anything_is_read(words_encoder, tmp_path):
    with HashCollection.create(str(tmp_path / "a.db"), "a", words_encoder) as collection:
        other = CrossModalHashEncoder(
            words_encoder.towers["image"],
            Tower(words_encoder.towers["text"].backbone_config, HashHead(HashHeadConfig(4, 8))),
            device="cpu",
        )
        with pytest.raises(EncoderMismatch):
            ingest_items(collection, iter(lambda: pytest.fail("an item was read"), None), other)


def test_backbones_learn_by_one_cycle_of_their_own(words_encoder):
    from cmh_milvus.fine_tuning import FineTuning

    tuning = FineTuning.__new__(FineTuning)
    tuning.rate = 1e-3
    assert [tuning.learning_rate(p) for p in (0.0, 0.1, 1.0)] == pytest.approx([4e-5, 1e-3, 4e-9])
    assert tuning.learning_rate(0.05) < 1e-3 > tuning.learning_rate(0.2) > tuning.learning_rate(0.5)
