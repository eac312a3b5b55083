"""Replies read as columns, and through pymilvus where this may not be: the same, on whichever back end."""

import re

import numpy as np
import pytest
from pymilvus import MilvusClient

from cmh_milvus.errors import StoreError
from cmh_milvus.store import HashCollection, Hit, Hits, raw_search
from tests.store.conftest import Encoder, expected


@pytest.fixture(scope="module")
def through_pymilvus(filled, uri):
    """The same collection by a client of a pymilvus that is not known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_search, "KNOWN_PYMILVUS", re.compile("none"))
        collection = HashCollection.open(uri, "filled", Encoder())
    yield collection
    collection.close()


def decoded_by_pymilvus(collection):
    """How many hits pymilvus makes of a reply while its replies are read as columns."""
    replies = []
    token = raw_search._replies.set(replies)
    try:
        [hits] = collection._connection.call("search", "filled", data=[b"ab"], limit=5, anns_field="code") or [[]]
    finally:
        raw_search._replies.reset(token)
    return len(hits), len(replies)


def test_the_installed_pymilvus_is_known(filled, through_pymilvus):
    assert decoded_by_pymilvus(filled) == (0, 1)
    assert decoded_by_pymilvus(through_pymilvus) == (5, 0)


def test_a_client_without_the_insides_is_left_alone():
    assert not raw_search.tap(object())


def test_replies_are_those_of_milvus_client(filled, rows, uri):
    """Ties in Milvus's own order, which a server may change between calls: compare them sorted."""
    client = filled._connection._client
    questions = [row.code for row in rows[:40:5]]
    for limit, expression in ((1, ""), (700, ""), (2_000, 'modality == "text"'), (5, "n < 0")):
        ask = {"data": questions, "limit": limit, "filter": expression, "anns_field": "code", "timeout": 10}
        ours = raw_search.search(client, "filled", **ask)
        theirs = client.search("filled", **ask)
        assert len(ours) == len(theirs) == len(questions)
        for (pks, distances), hits in zip(ours, theirs, strict=True):
            assert isinstance(pks, list)
            assert distances.dtype == np.uint16
            assert distances.tolist() == [hit["distance"] for hit in hits]
            n_safe = int(np.searchsorted(distances, distances[-1])) if len(distances) else 0
            expected_ids = list(zip(hits.distances[:n_safe], hits.ids[:n_safe], strict=True))
            assert sorted(zip(distances[:n_safe].tolist(), pks[:n_safe], strict=True)) == sorted(expected_ids)


def test_both_ways_give_equal_answers(filled, through_pymilvus, rows):
    questions = [rows[0].code, rows[700].code, b"\x55\xaa"]
    for ask in (
        lambda c: c.search(questions, limit=250),
        lambda c: c.search(questions, limit=7, modality="image", filter="n > {n}", filter_params={"n": 300}),
        lambda c: c.search(questions, limit=7, filter="absent == 1"),
        lambda c: c.search(questions, limit=7, output_fields=["*"]),
        lambda c: c.lookup(questions, 6),
        lambda c: c.lookup(questions, 6, output_fields=["caption"]),
    ):
        assert ask(filled) == ask(through_pymilvus)
    for way in (filled, through_pymilvus):
        for code, ranking in zip(questions, way.rank(questions), strict=True):
            assert ranking.distances.dtype == np.uint16
            assert list(zip(ranking.distances.tolist(), ranking.pks, strict=True)) == expected(rows, code)


def test_errors_are_equal(filled, through_pymilvus):
    said = []
    for way in (filled, through_pymilvus):
        with pytest.raises(StoreError, match="refused search") as refusal:
            way.search([b"ab"], filter="pk == 3")
        said.append(str(refusal.value))
    assert said[0] == said[1]


def test_served_is_all_that_an_exact_index_has(filled, rows):
    questions = [row.code for row in rows[:3]]
    for code, ranking in zip(questions, filled.served(questions, modality="text"), strict=True):
        pairs = zip(ranking.distances.tolist(), ranking.pks, strict=True)
        assert sorted(pairs) == expected(rows, code, keep=lambda row: row.modality == "text")


def test_a_client_of_ones_own_is_not_touched(uri, filled):
    """`search` reads the replies of whatever client it is given."""
    client = MilvusClient(uri, timeout=10)
    [(pks, distances)] = raw_search.search(client, "filled", data=[b"ab"], limit=3, anns_field="code", timeout=10)
    assert len(pks) == len(distances) == 3
    client.close()


def test_hits_are_a_sequence_of_hits():
    hits = Hits(["b%2527#text", "a#image"], np.array([3, 5], dtype=np.uint16), {"a#image": {"n": 1}})
    first, second = Hit("b%2527#text", "b%27", "text", 3, {}), Hit("a#image", "a", "image", 5, {"n": 1})
    assert list(hits) == [first, second] == [hits[0], hits[-1]]
    assert hits == [first, second]
    assert hits[1:] == [second]
    assert hits[:0] == []
    assert hits != [second]
    assert hits != 3
    assert (len(hits), second in hits, hits.index(second)) == (2, True, 1)
    assert type(hits[0].distance) is int
    assert repr(hits) == repr(list(hits))
    with pytest.raises(IndexError):
        hits[2]
