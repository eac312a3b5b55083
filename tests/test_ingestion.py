"""Which items are encoded and stored again; whose codes are refused."""

import dataclasses

import pytest
import torch

from cmh_milvus.datasets.base import Item
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
