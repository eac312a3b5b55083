"""Evaluation: figures against slow definitions, and through Milvus against brute force."""

import dataclasses
import json
from itertools import permutations

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


def test_codes_of_other_items_are_refused(small):
    data, codes = small
    vectors = {name: rows.astype(np.float32) for name, rows in codes.items()}
    for change in (lambda rows: rows[:5], lambda rows: np.concatenate([rows, rows])):
        for name in ("image", "text"):
            changed = codes | {name: change(codes[name])}
            said = rf"{len(change(codes[name]))} {name} rows for the 40 items of small"
            with pytest.raises(DataError, match=said):
                evaluate_codes("x", changed, data)
            with pytest.raises(DataError, match=said):
                evaluate_floats("x", vectors | {name: change(vectors[name])}, data)
            with pytest.raises(DataError, match=said):
                evaluate_through(BruteForceRanker(data.ids, codes), changed, data)
    with pytest.raises(DataError, match="0 text rows"):
        evaluate_codes("x", {"image": codes["image"]}, data)


@pytest.mark.parametrize("empty", ["query", "database"])
def test_a_split_without_queries_or_database_can_be_audited(small, empty):
    data, _ = small
    split = dataclasses.replace(data.split, **{empty: np.arange(0)})
    assert not any(finding.leak for finding in audit_split(dataclasses.replace(data, split=split), ["x"] * 40))


def test_equal_cosines_are_ties(rng):
    """Figures are means over all orders of the tied items, and the order of the file has no say in them."""
    labels = rng.random((9, 3)) < 0.4
    few = rng.standard_normal((2, 3, 70)).astype(np.float32)
    vectors = {"image": few[0][[0, 1, 2, 0, 1, 0, 1, 0, 0]], "text": few[1][[0, 1, 2, 2, 1, 2, 2, 0, 1]]}
    vectors["text"][4] *= 2  # another vector, the same direction
    none = np.arange(0)

    def evaluated(order):
        split = Split(np.arange(3), np.arange(3, 9), none, none)
        x = np.zeros((9, 2), dtype=np.float32)
        data = PairedFeatures("x", list("abcdefghi"), x, x, labels[order], tuple("abc"), split, "f")
        return data, evaluate_floats("x", {name: rows[order] for name, rows in vectors.items()}, data).directions

    data, found = evaluated(np.arange(9))
    wide = {name: x.astype(float) for name, x in vectors.items()}
    unit = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in wide.items()}
    for direction, (one, other) in DIRECTIONS.items():
        values = {"mean": [], "best": [], "worst": [], "ndcg": [], "top": [], "own": [], "rank": []}
        for row in data.split.query:
            every = (unit[other] @ unit[one][row]).round(9)
            shared = (labels[3:] & labels[row]).sum(axis=1) / np.maximum((labels[3:] | labels[row]).sum(axis=1), 1)
            discount = 1 / np.log2(np.arange(2, 8))
            ideal = np.sort(shared)[::-1] @ discount
            orders = [o for o in map(list, permutations(range(6))) if (np.diff(every[3:][o]) <= 0).all()]
            hits = [shared[o] > 0 for o in orders]
            aps = [(np.cumsum(h) / np.arange(1, 7))[h].mean() if h.any() else 0.0 for h in hits]
            values["mean"].append(np.mean(aps))
            values["best"].append(max(aps))
            values["worst"].append(min(aps))
            values["ndcg"].append(np.mean([shared[o] @ discount / ideal if ideal else 0.0 for o in orders]))
            values["top"].append([np.mean([h[:n].mean() for h in hits]) for n in (1, 2, 5)])
            closer, tied = (every > every[row]).sum(), (every == every[row]).sum()
            values["own"].append(1 / tied if closer == 0 else 0.0)
            values["rank"].append(closer + (tied + 1) / 2)
        measured = found[direction]
        assert measured.estimates["MAP@all"].mean == pytest.approx(np.mean(values["mean"]))
        assert (measured.map_best, measured.map_worst) == pytest.approx(
            (np.mean(values["best"]), np.mean(values["worst"]))
        )
        assert measured.estimates["NDCG@10"].mean == pytest.approx(np.mean(values["ndcg"]))
        assert measured.top_n_precision == pytest.approx(np.mean(values["top"], axis=0).tolist())
        if direction in CROSS_MODAL:
            assert measured.estimates["own R@1"].mean == pytest.approx(np.mean(values["own"]))
            assert measured.own_median_rank == np.median(values["rank"])
        for database in ([8, 7, 6, 5, 4, 3], [5, 3, 8, 4, 7, 6]):
            again = evaluated(np.array([0, 1, 2, *database]))[1][direction]
            for name, values_before in measured.per_query.items():
                assert again.per_query[name] == pytest.approx(values_before, nan_ok=True)


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


def test_finer_figures_equal_slow_definitions(small):
    """NDCG@10 by label overlap, own R@1, the median rank and the curves: an item's place within a tie is any of it."""
    data, codes = small
    split = data.split
    result = evaluate_codes("random", codes, data)
    assert result.distinct == len(set(codes["image"].tobytes())) / 40
    for direction, (one, other) in DIRECTIONS.items():
        q, d = unpack(codes[one]), unpack(codes[other])
        ndcg, first, ranks, top, within = [], [], [], [], []
        for row in split.query:
            own, theirs = data.labels[row], data.labels[split.database]
            gain = (own & theirs).sum(axis=1) / np.maximum((own | theirs).sum(axis=1), 1)
            far = (q[row] != d).sum(axis=1)
            closer, tied = (far < far[row]).sum(), (far == far[row]).sum()
            first.append(np.clip((1 - closer) / tied, 0, 1))
            ranks.append(closer + (tied + 1) / 2)
            far = far[split.database]
            order = np.argsort(far)
            at_rank = np.array([gain[far == x].mean() for x in far])[order]
            hit_at_rank = np.array([(gain[far == x] > 0).mean() for x in far])[order]
            discount = 1 / np.log2(np.arange(2, 12))
            ideal = np.sort(gain)[::-1][:10] @ discount
            ndcg.append(at_rank[:10] @ discount / ideal if ideal else 0.0)
            top.append([hit_at_rank[:n].mean() for n in (1, 2, 5, 10, 20)])
            inside = [gain[far <= radius] > 0 for radius in range(9)]
            within.append([[x.sum() / max(len(x), 1), x.sum() / max((gain > 0).sum(), 1), not len(x)] for x in inside])
        measured = result.directions[direction]
        assert measured.estimates["NDCG@10"].mean == pytest.approx(np.mean(ndcg))
        assert measured.top_n == [1, 2, 5, 10, 20]
        assert measured.top_n_precision == pytest.approx(np.mean(top, axis=0).tolist())
        curves = np.mean(within, axis=0).T.tolist()
        assert measured.radius_precision == pytest.approx(curves[0])
        assert measured.radius_recall == pytest.approx(curves[1])
        assert measured.radius_empty == pytest.approx(curves[2])
        if direction in CROSS_MODAL:
            assert measured.estimates["own R@1"].mean == pytest.approx(np.mean(first))
            assert measured.own_median_rank == np.median(ranks)


def test_own_partners_of_floats_are_ranked_among_all_items(small, rng):
    data, _ = small
    vectors = {name: rng.standard_normal((40, 5)).astype(np.float32) for name in ("image", "text")}
    vectors["image"][3] = vectors["image"][9]
    result = evaluate_floats("floats", vectors, data)
    unit = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in vectors.items()}
    for direction in CROSS_MODAL:
        one, other = DIRECTIONS[direction]
        scores = unit[one] @ unit[other].T  # queries and database are all 40 items
        ranks = np.array([1 + (scores[row] > scores[row, row]).sum() for row in data.split.query])
        measured = result.directions[direction]
        assert measured.own_median_rank == np.median(ranks)
        for k in (1, 10):
            assert measured.estimates[f"own R@{k}"].mean == pytest.approx((ranks <= k).mean())
    assert result.n_bits == 5 * 32
    assert result.distinct == 39 / 40


def test_differences_are_those_to_the_first_encoder(small):
    """A perfect encoder against a random one: what it gains is positive, in the row of the other as well."""
    data, codes = small
    ideal = {name: np.packbits(np.repeat(data.labels, 2, axis=1), axis=1) for name in codes}
    report = compare(
        data,
        [
            Candidate("random", codes),
            Candidate("constant", {k: c * 0 for k, c in codes.items()}),
            Candidate("ideal", ideal),
        ],
    )
    first, *_, last = report.results
    for direction, measured in last.directions.items():
        gained = measured.against_first["MAP@all"]
        expected = measured.estimates["MAP@all"].mean - first.directions[direction].estimates["MAP@all"].mean
        assert gained.mean == pytest.approx(expected)
        assert gained.mean > 0
    for row in report.rows():
        assert row["MAP@all low"] <= row["MAP@all"] <= row["MAP@all high"]
    wide = [row for row in report.rows() if row["encoder"] == "random"]
    assert all(row["MAP@all low"] < row["MAP@all high"] for row in wide)


def test_the_bootstrap_follows_its_seed(small):
    data, codes = small

    def ends(seed):
        return [
            (m.estimates["MAP@all"].low, m.estimates["MAP@all"].high)
            for m in evaluate_codes("x", codes, data, seed=seed).directions.values()
        ]

    assert ends(1) == ends(1) != ends(2)


def test_audit_of_texts_of_selection_and_of_what_is_merely_alike(small):
    data, _ = small

    def told(**changed):
        return audit_split(dataclasses.replace(data, **changed))

    chose = dataclasses.replace(data.split, validation=np.concatenate([data.split.query[:3], data.split.validation]))
    leaks = [finding.text for finding in told(split=chose) if finding.leak]
    assert "3 of 8 query rows chose the model" in leaks
    twins = data.text.copy()
    twins[0] = twins[10]
    found = told(text=twins)
    assert "1 of 8 queries have the very text of a database item" in [finding.text for finding in found if finding.leak]
    assert not any("near duplicate" in finding.text for finding in found), "the very text is not told twice"
    # 17 degrees apart are not near; nor are different features that are mostly one common offset
    apart = data.image.copy()
    apart[0] = apart[10] + np.random.default_rng(1).standard_normal(30) * np.linalg.norm(apart[10]) / 30**0.5 * 0.3
    for image in (apart, data.image + 100):
        assert not any("near duplicate" in finding.text for finding in told(image=image))


def test_brute_force_ranks_ties_by_key(small):
    _data, codes = small
    ids = [f"i{(7 * i) % 40:02}" for i in range(40)]
    for ranking in BruteForceRanker(ids, codes).rank(to_bytes(codes["image"][:3]), modality="text"):
        pairs = list(zip(ranking.distances.tolist(), ranking.pks, strict=True))
        assert pairs == sorted(pairs)


def test_the_ceiling_is_the_first_encoders_and_texts_are_audited(small, rng):
    data, codes = small
    relaxed = [{name: rng.standard_normal((40, 8)).astype(np.float32) for name in codes} for _ in range(2)]
    both = [Candidate(name, codes, relaxed=one) for name, one in zip("ab", relaxed, strict=True)]
    report = compare(data, both, texts=["the same"] * 40)
    assert [result.name for result in report.results] == ["a", "b", "a, not binarised"]
    expected = evaluate_floats("x", relaxed[0], data).directions
    for direction, measured in report.results[2].directions.items():
        assert measured.estimates == expected[direction].estimates
    assert "8 of 8 queries have the caption of a database item" in [
        finding.text for finding in report.audit if finding.leak
    ]


def test_queries_beyond_the_first_blocks_count(rng):
    labels = rng.random((640, 3)) < 0.4
    codes = {name: rng.integers(0, 256, (640, 1), dtype=np.uint8) for name in ("image", "text")}
    rows, none = np.arange(640), np.arange(0)
    x = np.zeros((640, 2), dtype=np.float32)

    def of(query):
        s = Split(query, rows[600:], none, none)
        return evaluate_codes("x", codes, PairedFeatures("x", list(map(str, rows)), x, x, labels, tuple("abc"), s, "f"))

    whole = of(rows[:600]).directions["image_to_text"]
    parts = [of(rows[start : start + 200]).directions["image_to_text"] for start in (0, 200, 400)]
    for name in ("MAP@all", "NDCG@10"):
        np.testing.assert_array_equal(whole.per_query[name], np.concatenate([part.per_query[name] for part in parts]))
