"""Evaluation: figures against slow definitions, and through Milvus against brute force."""

import dataclasses
import json

import numpy as np
import pytest

from cmh_milvus.codes import to_bytes, unpack
from cmh_milvus.comparison import Candidate, compare
from cmh_milvus.datasets.base import PairedFeatures, Split
from cmh_milvus.errors import DataError
from cmh_milvus.evaluation import (
    CROSS_MODAL,
    DIRECTIONS,
    BruteForceRanker,
    audit_split,
    chance_level,
    evaluate_codes,
    evaluate_floats,
    evaluate_through,
)


def expected_average_precision(distances, relevant, orders=400):
    """Mean AP over random orders of the ties: the definition, by simulation."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(orders):
        order = np.lexsort((rng.random(len(distances)), distances))
        hits = relevant[order]
        ranks = np.flatnonzero(hits) + 1
        values.append(np.mean(np.arange(1, len(ranks) + 1) / ranks) if len(ranks) else 0.0)
    return np.mean(values)


@pytest.fixture
def small(rng):
    """40 pairs with random codes of 8 bits: many ties."""
    labels = rng.random((40, 4)) < 0.3
    codes = {name: rng.integers(0, 256, (40, 1), dtype=np.uint8) for name in ("image", "text")}
    rows = np.arange(40)
    split = Split(query=rows[:8], database=rows[8:], train=rows[8:30], validation=rows[30:35])
    features = rng.standard_normal((40, 30)).astype(np.float32)
    data = PairedFeatures("small", [f"item's {i}" for i in rows], features, features, labels, tuple("abcd"), split, "f")
    return data, codes


def test_figures_equal_slow_definitions(small):
    data, codes = small
    result = evaluate_codes("random", codes, data)
    split = data.split
    for direction, (one, other) in DIRECTIONS.items():
        q, d = unpack(codes[one]).astype(int), unpack(codes[other]).astype(int)
        aps, own = [], []
        for row in split.query:
            distances = np.array([np.sum(q[row] != d[j]) for j in split.database])
            relevant = np.array([(data.labels[row] & data.labels[j]).any() for j in split.database])
            aps.append(expected_average_precision(distances, relevant))
            everything = np.array([np.sum(q[row] != d[j]) for j in range(40)])
            mine = everything[row]
            closer, tied = np.sum(everything < mine), np.sum(everything == mine)
            own.append(np.clip((10 - closer) / tied, 0, 1))
        measured = result.directions[direction]
        assert measured.estimates["MAP@all"].mean == pytest.approx(np.mean(aps), abs=0.01)
        assert (measured.own_median_rank is None) == (direction in ("image_to_image", "text_to_text"))
        assert measured.map_worst <= measured.estimates["MAP@all"].mean <= measured.map_best
        if direction in CROSS_MODAL:
            assert measured.estimates["own R@10"].mean == pytest.approx(np.mean(own))
        assert measured.radius_recall[-1] == pytest.approx(
            np.mean([(data.labels[row] & data.labels[split.database]).any() for row in split.query])
        )
        assert len(measured.radius_precision) == 9
    assert result.n_bits == 8


def test_float_ranking_equals_a_slow_one(small, rng):
    """Cosine order, no ties: AP of the one ranking; codes as floats give the figures of the codes but for ties."""
    data, _ = small
    vectors = {name: rng.standard_normal((40, 5)).astype(np.float32) for name in ("image", "text")}
    result = evaluate_floats("floats", vectors, data)
    unit = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in vectors.items()}
    for direction, (one, other) in DIRECTIONS.items():
        aps = []
        for row in data.split.query:
            scores = unit[other][data.split.database] @ unit[one][row]
            relevant = (data.labels[data.split.database] & data.labels[row]).any(axis=1)
            aps.append(expected_average_precision(-scores, relevant, orders=1))
        measured = result.directions[direction]
        assert measured.estimates["MAP@all"].mean == pytest.approx(np.mean(aps))
        assert measured.map_best == measured.map_worst
        assert measured.radius_recall == []


def test_chance_is_the_share_of_relevant_items(small):
    data, _ = small
    shares = [
        np.mean([(data.labels[row] & data.labels[j]).any() for j in data.split.database]) for row in data.split.query
    ]
    assert chance_level(data) == pytest.approx(np.mean(shares), abs=0.1)


def test_through_brute_force_nothing_differs(small):
    data, codes = small
    through = evaluate_through(BruteForceRanker(data.ids, codes), codes, data)
    assert (through.difference, through.missing, through.wrong) == (0.0, 0, 0)


def test_missing_and_wrong_rows_are_told_apart(small):
    data, codes = small

    class Forgetful(BruteForceRanker):
        def rank(self, query, *, modality=None):
            for ranking in super().rank(query, modality=modality):
                keep = [i for i, pk in enumerate(ranking.pks) if not pk.split("#")[0].endswith(" 20")]
                yield dataclasses.replace(
                    ranking, pks=[ranking.pks[i] for i in keep], distances=ranking.distances[keep]
                )

    forgetful = evaluate_through(Forgetful(data.ids, codes), codes, data)
    assert forgetful.missing == len(DIRECTIONS) * len(data.split.query)

    broken = {name: code.copy() for name, code in codes.items()}
    for name in broken:
        broken[name][20] ^= 0xFF
    wrong = evaluate_through(BruteForceRanker(data.ids, broken), codes, data)
    assert wrong.missing == 0
    assert wrong.wrong > 0


def test_map_through_milvus_lite_equals_numpy(emoji_features, emoji_codes, encoder, tmp_path):
    """The database split from the very collection that serves, query items among its rows."""
    from cmh_milvus.store import HashCollection, Row

    with HashCollection.create(str(tmp_path / "e.db"), "emoji", encoder) as collection:
        for modality in ("image", "text"):
            codes = to_bytes(emoji_codes[modality])
            rows = [Row(item, modality, code) for item, code in zip(emoji_features.ids, codes, strict=True)]
            collection.upsert(rows)
        through = evaluate_through(collection, emoji_codes, emoji_features)
    assert through.difference <= 1e-9
    assert (through.missing, through.wrong) == (0, 0)


def test_report_names_what_a_reader_needs(emoji_features, emoji_codes):
    report = compare(emoji_features, [Candidate("ours", emoji_codes, "f" * 64, 1.5)])
    content = json.loads(json.dumps(report.to_json()))
    assert content["data"]["n_query"] == 200
    assert content["data"]["n_database"] == 1652
    assert content["data"]["split_fingerprint"] == emoji_features.split.fingerprint()
    assert set(content["rules"]) == {"relevant", "graded", "ties", "no_relevant", "cut_off"}
    ours = content["results"][0]["directions"]["text_to_image"]["estimates"]["MAP@all"]
    assert ours["low"] < ours["mean"] < ours["high"]
    assert ours["mean"] > 2 * content["chance"], "eight epochs learn something"
    rows = report.rows()
    assert [row["direction"] for row in rows] == list(DIRECTIONS)


def test_audit_finds_leaks(small):
    data, _ = small
    clean = audit_split(data)
    assert not any(finding.leak for finding in clean)
    assert "27 of 32 database rows were trained" in clean[0].text
    assert "No query row" in clean[1].text

    leaky = dataclasses.replace(data.split, database=np.arange(40), train=np.arange(40))
    findings = audit_split(dataclasses.replace(data, split=leaky))
    leaks = [finding.text for finding in findings if finding.leak]
    assert "8 of 8 query rows are in the database" in leaks
    assert "8 of 8 query rows were trained on" in leaks

    twins = data.image.copy()
    twins[0] = twins[10]
    findings = audit_split(dataclasses.replace(data, image=twins), ["same "] * 2 + ["x"] * 6 + ["Same"] * 32)
    leaks = [finding.text for finding in findings if finding.leak]
    assert "1 of 8 queries have the very picture of a database item" in leaks
    assert "2 of 8 queries have the caption of a database item" in leaks

    nearly = data.image.copy()
    nearly[0] = nearly[10] * 1.0001
    (near,) = [finding for finding in audit_split(dataclasses.replace(data, image=nearly)) if "near" in finding.text]
    assert near.text.startswith("1 of 8 queries have a near duplicate of their picture")
    assert not near.leak


def test_what_cannot_be_evaluated(small):
    data, codes = small
    with pytest.raises(DataError, match="no labels"):
        evaluate_codes("x", codes, dataclasses.replace(data, labels=None))
    empty = dataclasses.replace(data.split, query=np.array([], dtype=np.int64))
    with pytest.raises(DataError, match="0 query"):
        evaluate_codes("x", codes, dataclasses.replace(data, split=empty))
