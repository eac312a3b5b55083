"""What a collection promises, against brute force in numpy, on whichever back end the fixtures give."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymilvus import DataType, MilvusClient

from cmh_milvus.errors import DataError, EncoderMismatch, SettingsError, StoreError
from cmh_milvus.store import HashCollection, Row
from cmh_milvus.store import collection as module
from tests.store.conftest import N_ROWS, Encoder, expected

few = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
codes = st.binary(min_size=2, max_size=2)


def found(hits):
    return [(hit.distance, hit.pk) for hit in hits]


# Creation, opening, the encoder


def test_reopening_finds_what_creation_wrote(uri, filled):
    with HashCollection.open(uri, "filled", Encoder()) as again:
        assert (again.fingerprint, again.n_bits, again.index) == (Encoder().fingerprint, 16, "BIN_FLAT")
        assert again.collection_id == filled.collection_id
        assert again.count() == N_ROWS
    with HashCollection.open_or_create(uri, "filled", Encoder()) as again:
        assert again.collection_id == filled.collection_id
    assert filled.count() == N_ROWS  # the other one's close did not end a shared Milvus Lite


def test_the_description_is_complete(uri, filled):
    description = json.loads(filled._connection.call("describe_collection", "filled")["description"])
    assert (
        description["cmh_milvus"].items()
        >= {
            "format_version": 1,
            "fingerprint": Encoder().fingerprint,
            "n_bits": 16,
            "bit_order": "msb_first",
            "binarize": "h >= 0",
            "index": "BIN_FLAT",
        }.items()
    )


@pytest.mark.parametrize("other", [Encoder("b2" * 32), Encoder(n_bits=24)])
@pytest.mark.parametrize("opening", [HashCollection.open, HashCollection.open_or_create])
def test_another_encoder_is_refused(uri, filled, opening, other):
    with pytest.raises(EncoderMismatch, match=r"a1a1a1a1a1a1.*use the encoder folder that made it") as refusal:
        opening(uri, "filled", other)
    assert other.fingerprint[:12] in str(refusal.value)


def test_an_existing_collection_is_not_created_again(uri, filled):
    with pytest.raises(StoreError, match="exists already"):
        HashCollection.create(uri, "filled", Encoder())
    assert filled.count() == N_ROWS


def test_an_absent_collection_is_named_with_those_present(uri, filled):
    with pytest.raises(StoreError, match=r"no collection 'nope' .*filled.*ingest first"):
        HashCollection.open(uri, "nope")


@pytest.mark.parametrize(
    ("description", "error", "said"),
    [
        ("", EncoderMismatch, "not made by cmh-milvus"),
        ('{"other": 1}', EncoderMismatch, "not made by cmh-milvus"),
        ("[1]", EncoderMismatch, "not made by cmh-milvus"),
        ('{"cmh_milvus": {"format_version": 99, "cmh_milvus_version": "9.9"}}', StoreError, "release 9.9"),
    ],
)
def test_a_foreign_collection_is_refused(uri, filled, description, error, said):
    schema = MilvusClient.create_schema(description=description)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.BINARY_VECTOR, dim=16)
    filled._connection.call("create_collection", "foreign", schema=schema)
    try:
        with pytest.raises(error, match=said):
            HashCollection.open(uri, "foreign", Encoder())
    finally:
        filled._connection.call("drop_collection", "foreign")


def test_a_collection_made_anew_for_another_encoder_takes_no_codes_of_the_first(uri, empty):
    with HashCollection.open(uri, empty.name) as other:
        other.drop()
    with HashCollection.create(uri, empty.name, Encoder("b2" * 32)) as anew:
        with pytest.raises(StoreError, match="made anew"):
            empty.upsert([Row("a", "image", b"ab")])
        assert anew.count() == 0


def test_an_interrupted_creation_is_finished(uri, empty):
    empty._call("release_collection")
    empty._call("drop_index", "code")
    with HashCollection.open(uri, empty.name, Encoder()) as again:
        again.upsert([Row("a", "image", b"ab")])
        assert found(again.search([b"ab"])[0]) == [(0, "a#image")]


def test_impossible_code_length(uri):
    with pytest.raises(SettingsError, match="multiple of 8"):
        HashCollection.create(uri, "odd", Encoder(n_bits=12))


# Writing


def test_upsert_replaces_and_the_last_of_a_batch_counts(empty):
    assert empty.upsert([Row("a", "image", b"aa"), Row("a", "text", b"bb"), Row("a", "image", b"cc", {"n": 2})]) == 2
    assert dict(empty.codes()) == {"a#image": b"cc", "a#text": b"bb"}
    assert empty.upsert([Row("a", "image", b"dd")]) == 1
    assert empty.count() == 2
    [hit] = empty.search([b"dd"], limit=1, output_fields=["*"])[0]
    assert (hit.pk, hit.item_id, hit.modality, hit.distance, dict(hit.fields)) == ("a#image", "a", "image", 0, {})
    assert empty.upsert([]) == 0


def test_an_empty_collection_answers(empty):
    """Milvus Lite ends over a count of a collection that never had a row."""
    for _ in range(2):
        assert empty.count() == empty.count(modality="text", filter="n > 3") == 0
        assert empty.delete(["a"]) == 0
        assert empty.search([b"ab"]) == empty.lookup([b"ab"], 16) == [[]]
        assert [ranking.pks for ranking in empty.rank([b"ab"])] == [[]]
        assert list(empty.codes()) == []
        empty.upsert([Row("a", "image", b"ab")])
        assert empty.delete(["a"]) == 1


def test_upsert_takes_a_generator_of_several_batches(empty, monkeypatch):
    monkeypatch.setattr(module, "UPSERT_ROWS", 7)
    assert empty.upsert(Row(f"{i}", "text", bytes([i, i])) for i in range(20)) == 20
    assert dict(empty.codes()) == {f"{i}#text": bytes([i, i]) for i in range(20)}


def test_delete_takes_both_modalities_and_passes_over_the_absent(empty):
    empty.upsert(Row(f"{i}", modality, b"ab") for i in range(4) for modality in ("image", "text"))
    assert empty.delete(["1", "2", "absent", 'x" or pk != "']) == 4
    assert {pk for pk, _ in empty.codes()} == {"0#image", "0#text", "3#image", "3#text"}
    assert empty.delete([]) == empty.delete(["no\nsuch"]) == 0
    for one in ("23", [2, 3]):
        with pytest.raises(SettingsError, match="item ids are a list"):
            empty.delete(one)
    assert empty.count() == 4


def test_missing_keys_are_found_among_thousands(empty):
    assert empty.missing(["a#text"]) == {"a#text"}
    empty.upsert(Row(f"{i}", "text", b"ab") for i in range(2_500))
    empty.delete(["7", "2400"])
    assert empty.missing(Row(f"{i}", "text", b"").pk for i in range(2_501)) == {"7#text", "2400#text", "2500#text"}
    assert empty.missing([]) == set()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Row("a", "image", b"a"), "8 bits, and the collection takes bytes of 16"),
        (Row("a", "image", b"abc"), "24 bits"),
        (Row("a", "image", bytearray(b"ab")), "a bytearray"),
        (Row("a", "image", np.array([1, 2], dtype=np.uint8)), "a ndarray"),
        (Row("a", "image", None), "a NoneType"),
        (Row("a", "image", [1, 2]), "a list"),
        (Row("a", "picture", b"ab"), "modality is one of image, text"),
        (Row("", "image", b"ab"), "non-empty"),
        (Row("a\nb", "image", b"ab"), "control characters"),
        (Row("a\x00", "image", b"ab"), "control characters"),
        (Row("\ud800", "image", b"ab"), "broken character"),
        (Row("é" * 257, "image", b"ab"), "longer than 512 bytes"),
        (Row(7, "image", b"ab"), "an item id is a non-empty str"),
        (Row("a", "image", b"ab", {"code": 1}), "cannot be named 'code'"),
        (Row("a", "image", b"ab", {"$meta": 1}), "cannot be named"),
        (Row("a", "image", b"ab", {"a b": 1}), "cannot be named"),
        (Row("a", "image", b"ab", {"x": float("nan")}), "not JSON"),
        (Row("a", "image", b"ab", {"x": b"raw"}), "not JSON"),
        (Row("a", "image", b"ab", {"x": 2**63}), "more than 64 bits"),
        (Row("a", "image", b"ab", {"x": [1, {"y": -(2**63) - 1}]}), "more than 64 bits"),
        (Row("a", "image", b"ab", {"x": [{1: 2}]}), "keys are no str"),
        (Row("a", "image", b"ab", {"Like": 1}), "cannot be named 'Like'"),
        (Row("a", "image", b"ab", {5: 1}), "cannot be named 5"),
        (Row("a", "image", b"ab", None), "not a mapping"),
        (Row("a", "image", b"ab", {"x": "\ud800"}), "broken character"),
        (Row("a", "image", b"ab", {"x": ["y" * 70_000]}), "Milvus takes 65536"),
    ],
)
def test_what_cannot_be_stored_is_refused_here(filled, row, said):
    with pytest.raises(DataError, match=said):
        filled.upsert([row])
    assert filled.count() == N_ROWS


ODD = [
    "plain", "it's", 'say "hi"', "back\\slash", "\\", 'end\\"', "{x}", "a) or (1 == 1", '" or pk != "', "%", "a%b_",
    "é漢字🍎", "tab\there", "nul\x00", "bell\x07", "\\n", "\\u00e9", "\\x41", "\u2028", "e\u0301", "' or ''=='", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def odd(uri):
    collection = HashCollection.create(uri, "odd_values", Encoder())
    collection.upsert(
        Row(f"{i} {''.join(c for c in text if c >= ' ')}", "text", bytes([i, i]), {"note": text, "tags": [text, "all"]})
        for i, text in enumerate(ODD)
    )
    yield collection
    collection.drop()


def test_filter_values_are_never_code(odd):
    for i, text in enumerate(ODD):
        [by_value] = odd.search([b"ab"], filter="note == {x}", filter_params={"x": text}, output_fields=["note"])
        assert [hit.fields["note"] for hit in by_value] == [text]
        [by_tag] = odd.search([b"ab"], filter="json_contains(tags, {x})", filter_params={"x": text})
        assert [hit.item_id.split(" ")[0] for hit in by_tag] == [str(i)]
        [by_id] = odd.search([b"ab"], filter="pk in {x}", filter_params={"x": [by_tag[0].pk, "none"]})
        assert [hit.pk for hit in by_id] == [by_tag[0].pk]


@few
@given(st.lists(st.sampled_from(ODD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)).map("".join))
def test_any_filter_value_finds_just_its_rows(odd, text):
    text = text.replace("\n", "").replace("\r", "")
    assert odd.count(filter="note == {x}", filter_params={"x": text}) == (text in ODD)


def test_odd_ids_can_be_deleted(empty):
    """Milvus Lite pastes keys into SQL: an apostrophe, unguarded, is an error or worse."""
    ids = [f"{i}{text}" for i, text in enumerate(ODD) if text.isprintable()] + ["x') or ('1'='1", "%27", "100%", "a#b"]
    empty.upsert(Row(i, "text", b"ab") for i in ids)
    empty.upsert(Row(i, "text", b"ac") for i in ids)
    [hits] = empty.lookup([b"ac"], 0)
    assert sorted(hit.item_id for hit in hits) == sorted(ids)
    assert empty.missing([*hits.pks, "absent#text"]) == {"absent#text"}
    for i in ids[:8]:
        assert empty.delete([i]) == 1, i
    assert empty.delete(ids) == empty.count() + len(ids) - 8 == len(ids) - 8


def test_long_strings_are_cut_between_characters(empty):
    empty.upsert(
        [Row("a", "text", b"ab", {"caption": "漢" * 10_000, "labels": ["x"], "f": 0.5, "b": True, "no": None})]
    )
    [[hit]] = empty.search([b"ab"], output_fields=["*"])
    assert dict(hit.fields) == {"caption": "漢" * 5_333, "labels": ["x"], "f": 0.5, "b": True, "no": None}


# Search


@few
@given(codes, st.integers(1, 400), st.sampled_from([None, "image", "text"]))
def test_search_is_brute_force_with_ties_by_key(filled, rows, code, limit, modality):
    [hits] = filled.search([code], limit=limit, modality=modality)
    assert found(hits) == expected(rows, code, limit=limit, keep=lambda row: modality in (None, row.modality))


def test_many_queries_in_one_call(filled, rows, monkeypatch):
    monkeypatch.setattr(module, "MAX_CALL_QUERIES", 16)
    queries = [row.code for row in rows[::30]]
    answers = filled.search(queries, limit=5)
    assert [found(hits) for hits in answers] == [expected(rows, code, limit=5) for code in queries]
    assert filled.search([]) == []


def test_more_hits_asked_for_than_rows(filled, rows):
    [hits] = filled.search([b"\0\0"], limit=16_384)
    assert found(hits) == expected(rows, b"\0\0")


def test_a_collapsed_ring_is_cut_by_key(filled, rows):
    """300 rows share one code: which ten come back must not depend on Milvus's order."""
    for limit in (1, 10, 64, 65, 299, 300, 301):
        [hits] = filled.search([rows[0].code], limit=limit)
        assert found(hits) == expected(rows, rows[0].code, limit=limit)


@pytest.mark.parametrize(
    ("filter_", "params", "keep"),
    [
        ('split == "database"', None, lambda f: f["split"] == "database"),
        ("split == {s}", {"s": "query"}, lambda f: f["split"] == "query"),
        ("json_contains(labels, {l})", {"l": "fruit"}, lambda f: "fruit" in f["labels"]),
        ("n in {n} or n > {m}", {"n": [3, 5], "m": 1_100}, lambda f: f["n"] in (3, 5) or f["n"] > 1_100),
        ("split != {s} and n < 100.5", {"s": "query"}, lambda f: f["split"] != "query" and f["n"] < 100.5),
        ('caption like "caption 1%"', None, lambda f: f.get("caption", "").startswith("caption 1")),
        ("absent == 3", None, lambda f: False),
    ],
)
def test_filters(filled, rows, filter_, params, keep):
    [hits] = filled.search([b"ab"], limit=30, filter=filter_, filter_params=params)
    assert found(hits) == expected(rows, b"ab", limit=30, keep=lambda row: keep(row.fields))
    n = filled.count(modality="text", filter=filter_, filter_params=params)
    assert n == sum(keep(row.fields) and row.modality == "text" for row in rows)


def test_a_filter_cannot_escape_the_modality(filled):
    [hits] = filled.search([b"ab"], limit=500, modality="text", filter="n >= 0 or n < 0")
    assert {hit.modality for hit in hits} == {"text"}
    with pytest.raises(SettingsError, match="closes nothing"):
        filled.search([b"ab"], modality="text", filter="n >= 0) or (n < 0")


def test_fields_come_only_where_asked_and_present(filled, rows):
    by_pk = {row.pk: row for row in rows}
    [hits] = filled.search([b"ab"], limit=20)
    assert all(hit.fields == {} for hit in hits)
    [hits] = filled.search([b"ab"], limit=20, output_fields=["caption", "labels"])
    for hit in hits:
        wanted = {k: v for k, v in by_pk[hit.pk].fields.items() if k in ("caption", "labels")}
        assert dict(hit.fields) == wanted
    [hits] = filled.lookup([rows[0].code], 0, output_fields=["*"])
    assert all(dict(hit.fields) == by_pk[hit.pk].fields for hit in hits)


def test_fields_of_many_hits_are_asked_for_apart(filled, rows, monkeypatch):
    """An answer of any number of hits with long fields would exceed what Milvus sends at once."""
    queries = [rows[0].code, rows[700].code]
    asked = [{"output_fields": ["caption", "labels"]}, {"output_fields": ["*"], "limit": 300}]
    together = [filled.search(queries, **ask) for ask in asked]
    monkeypatch.setattr(module, "MAX_CALL_ROWS", 50)
    for ask, expected_hits in zip(asked, together, strict=True):
        for got, wanted in zip(filled.search(queries, **ask), expected_hits, strict=True):
            assert [(hit, dict(hit.fields)) for hit in got] == [(hit, dict(hit.fields)) for hit in wanted]
    by_pk = {row.pk: row.fields for row in rows}
    for hits in filled.lookup(queries, 3, output_fields=["*"]):
        assert all(dict(hit.fields) == by_pk[hit.pk] for hit in hits)


def test_codes_and_fields_may_be_generators(filled, rows):
    code = rows[0].code

    def stream():
        return (one for one in [code, code])

    assert filled.search(stream(), output_fields=(name for name in ["n"])) == filled.search(
        [code] * 2, output_fields=["n"]
    )
    assert filled.lookup(stream(), 2) == filled.lookup([code] * 2, 2)
    assert [r.pks for r in filled.rank(stream())] == [r.pks for r in filled.rank([code] * 2)]


@pytest.mark.parametrize("names", ["caption", ["code"], ["a b"], ["$meta"], ["pk"], ["like"], ["TRUE"]])
def test_impossible_output_fields(filled, names):
    with pytest.raises(SettingsError, match="output field"):
        filled.search([b"ab"], output_fields=names)


@pytest.mark.parametrize(
    "name",
    [
        "array_length",
        *("array_contains", "array_contains_all", "array_contains_any"),
        *("json_contains", "json_contains_all", "json_contains_any"),
    ],
)
def test_functions_of_filters_are_no_names_of_fields(filled, name):
    """Milvus Lite ends over them."""
    for spelt in (name, name.upper()):
        with pytest.raises(SettingsError, match="output field"):
            filled.search([b"ab"], output_fields=[spelt])
        with pytest.raises(DataError, match="no word of Milvus's filters"):
            filled.upsert([Row("a", "image", b"ab", {spelt: 1})])


def test_limits_of_numpy(filled):
    assert filled.search([b"ab"], limit=np.int64(3)) == filled.search([b"ab"], limit=3)


@pytest.mark.parametrize("limit", [0, -1, 16_385, 1.5])
def test_impossible_limits(filled, limit):
    with pytest.raises(SettingsError, match="1 to 16384"):
        filled.search([b"ab"], limit=limit)


@pytest.mark.parametrize("code", [b"a", b"abc", "ab", bytearray(b"ab"), np.zeros(2, dtype=np.uint8)])
def test_impossible_query_codes(filled, code):
    for ask in (filled.search, lambda codes: filled.lookup(codes, 1), lambda codes: list(filled.rank(codes))):
        with pytest.raises(SettingsError, match="query code"):
            ask([b"ab", code])


def test_impossible_modality(filled):
    with pytest.raises(SettingsError, match="image, text"):
        filled.search([b"ab"], modality="sound")


def test_milvus_refusals_become_store_errors(filled):
    with pytest.raises(StoreError, match=r"refused query"):
        filled.count(filter="pk == 3")
    assert filled.count() == N_ROWS


# Lookup, ranking, all codes


def test_lookup_at_every_radius(filled, rows):
    queries = [rows[0].code, rows[700].code, b"\x55\xaa"]
    for radius in range(17):
        answers = filled.lookup(queries, radius)
        assert [found(hits) for hits in answers] == [expected(rows, code, radius=radius) for code in queries]


@pytest.mark.parametrize("radius", [-1, 17, 2.5])
def test_impossible_radius(filled, radius):
    with pytest.raises(SettingsError, match="0 to 16"):
        filled.lookup([b"ab"], radius)


@pytest.mark.parametrize(("cap", "n"), [(2, 10), (50, 200), (300, 600)])
def test_more_rows_than_milvus_gives_at_once(filled, rows, monkeypatch, cap, n):
    """Ties of 300 rows at one distance, and answers of any size, through a window of `cap` hits."""
    monkeypatch.setattr(module, "MAX_HITS", cap)
    monkeypatch.setattr(module, "TIE_SLACK", 1)

    def keep(row):
        return row.fields["n"] < n

    some = {"filter": "n < {n}", "filter_params": {"n": n}}
    queries = [rows[0].code, rows[1_000].code]
    answers = filled.lookup(queries, 9, **some)
    assert [found(hits) for hits in answers] == [expected(rows, code, radius=9, keep=keep) for code in queries]
    [hits] = filled.search(queries[:1], limit=cap, **some)
    assert found(hits) == expected(rows, queries[0], limit=cap, keep=keep)
    assert list(filled.codes(**some)) == sorted((row.pk, row.code) for row in rows if keep(row))
    [ranking] = filled.rank(queries[:1], **some)
    assert list(zip(ranking.distances.tolist(), ranking.pks, strict=True)) == expected(rows, queries[0], keep=keep)


def test_rank_is_all_rows_of_the_modality(filled, rows):
    queries = [row.code for row in rows[:3]]
    rankings = list(filled.rank(queries, modality="text"))
    assert len(rankings) == 3
    for code, ranking in zip(queries, rankings, strict=True):
        assert ranking.distances.dtype == np.uint16
        pairs = list(zip(ranking.distances.tolist(), ranking.pks, strict=True))
        assert pairs == expected(rows, code, keep=lambda row: row.modality == "text")
    assert [len(r.pks) for r in filled.rank(queries, filter="absent == 1")] == [0, 0, 0]


def test_codes_gives_every_row_once(filled, rows):
    assert list(filled.codes()) == sorted((row.pk, row.code) for row in rows)
    assert dict(filled.codes(modality="image")) == {row.pk: row.code for row in rows if row.modality == "image"}


def test_threads_may_share_a_collection(filled, rows):
    queries = [row.code for row in rows[::100]]
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda code: filled.search([code], limit=7)[0], queries))
    assert [found(hits) for hits in answers] == [expected(rows, code, limit=7) for code in queries]


# Indexes


def test_an_inexact_index_searches_but_does_not_promise_all_rows(uri, on_server, rows):
    if not on_server:
        with pytest.raises(SettingsError, match="Milvus Lite has no BIN_IVF_FLAT"):
            HashCollection.create(uri, "ivf", Encoder(), index="BIN_IVF_FLAT")
        return
    collection = HashCollection.create(uri, "ivf", Encoder(), index="BIN_IVF_FLAT")
    collection.upsert(rows)
    by_pk = {row.pk: row.code for row in rows}
    [hits] = collection.search([b"ab"], limit=20)
    assert len(hits) == 20
    assert found(hits) == sorted(found(hits))
    assert all(np.bitwise_count(np.frombuffer(by_pk[h.pk], "u2") ^ np.frombuffer(b"ab", "u2"))[0] == h.distance
               for h in hits)  # fmt: skip
    [served] = collection.served([b"ab"])
    pairs = set(zip(served.distances.tolist(), served.pks, strict=True))
    assert len(served.pks) == len(pairs) >= 20
    assert pairs <= set(expected(rows, b"ab"))
    for ask in (lambda: collection.lookup([b"ab"], 3), lambda: list(collection.rank([b"ab"]))):
        with pytest.raises(StoreError, match="BIN_FLAT"):
            ask()
    collection.drop()


def test_unknown_index(uri):
    with pytest.raises(SettingsError, match="BIN_FLAT or BIN_IVF_FLAT"):
        HashCollection.create(uri, "hnsw", Encoder(), index="HNSW")
