"""Metrics against loops over every order of the ties, golden values and properties."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmh_milvus import metrics
from cmh_milvus.errors import DataError, SettingsError
from cmh_milvus.metrics import DistanceTable
from tests.reference import ranking as reference

TIES = ["expected", "best", "worst"]
GAINS = np.array([0.0, 0.25, 1.0, 3.0])
N_BITS = 8

# Up to eight items, few distances: groups of ties small enough to go through all their orders.
small = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8)


def table_of(*queries):
    """A table of queries, each a list of (distance, grade)."""
    counts = np.zeros((len(queries), N_BITS + 1, len(GAINS)), dtype=np.uint32)
    for i, items in enumerate(queries):
        for distance, grade in items:
            counts[i, distance, grade] += 1
    return DistanceTable(counts, GAINS)


def has_relevant(items):
    return any(grade for _, grade in items)


def check(metric, slow, items, ties):
    """One metric against its definition, over all orders."""
    (got,) = metric(table_of(items), ties=ties)
    if not has_relevant(items):
        assert math.isnan(got)
        return
    distances, gains = [d for d, _ in items], [GAINS[g] for _, g in items]
    assert got == pytest.approx(reference.over_orders(slow, distances, gains, ties), abs=1e-12)


@pytest.mark.parametrize("ties", TIES)
@given(items=small)
def test_average_precision_over_all_orders(items, ties):
    check(metrics.average_precision, reference.average_precision, items, ties)
    check(metrics.weighted_average_precision, reference.weighted_average_precision, items, ties)
    check(metrics.r_precision, reference.r_precision, items, ties)


@pytest.mark.parametrize("ties", TIES)
@given(items=small, k=st.integers(1, 9))
def test_cut_offs_over_all_orders(items, k, ties):
    pairs = [
        (metrics.average_precision_at_k_cut, reference.average_precision_at_k_cut),
        (metrics.average_precision_first_k_relevant, reference.average_precision_first_k_relevant),
        (metrics.weighted_average_precision_at_k_cut, reference.weighted_average_precision),
        (metrics.acg_at_k, reference.acg),
        (metrics.ndcg_at_k, reference.ndcg),
    ]
    for metric, slow in pairs:
        check(
            lambda table, ties, metric=metric: metric(table, k, ties=ties),
            lambda gains, slow=slow: slow(gains, k),
            items,
            ties,
        )
    check(
        lambda table, ties: metrics.ndcg_at_k(table, k, ties=ties, gain="exponential"),
        lambda gains: reference.ndcg(gains, k, exponential=True),
        items,
        ties,
    )
    cuts = range(1, len(items) + 1)
    check(
        lambda table, ties: [metrics.topn_precision(table, cuts, ties=ties)[0, min(k, len(items)) - 1]],
        lambda gains: reference.precision(gains, min(k, len(items))),
        items,
        ties,
    )


@given(items=small)
def test_lookup_equals_loop(items):
    curve = metrics.precision_recall_by_radius(table_of(items))
    if not has_relevant(items):
        assert np.isnan(curve.recall).all()
        return
    distances, gains = [d for d, _ in items], [GAINS[g] for _, g in items]
    for radius in range(N_BITS + 1):
        expected = reference.lookup(distances, gains, radius)
        got = (curve.precision, curve.recall, curve.f1, curve.empty)
        assert [a[0, radius] for a in got] == pytest.approx(expected)
    assert curve.recall[0, -1] == 1
    assert curve.precision[0, -1] == pytest.approx(np.mean([g > 0 for g in gains]))


# Tables of any size, in which the groups are too large for enumeration.
def random_table(seed):
    rng = np.random.default_rng(seed)
    chances = rng.dirichlet(np.full((N_BITS + 1) * len(GAINS), rng.uniform(0.05, 2)), 5)
    counts = rng.multinomial(int(rng.integers(1, 700)), chances).reshape(5, N_BITS + 1, len(GAINS))
    return DistanceTable(counts.astype(np.uint32), GAINS)


tables = st.integers(0, 2**32 - 1).map(random_table)


@given(table=tables, k=st.integers(1, 400))
def test_worst_expected_best_are_ordered_and_bounded(table, k):
    def three(metric):
        worst, expected, best = (metric(ties) for ties in ("worst", "expected", "best"))
        relevant = ~np.isnan(expected)
        assert (worst <= expected + 1e-12)[relevant].all()
        assert (expected <= best + 1e-12)[relevant].all()
        return worst[relevant], best[relevant]

    for metric in (
        lambda ties: metrics.average_precision(table, ties),
        lambda ties: metrics.average_precision_at_k_cut(table, k, ties),
        lambda ties: metrics.average_precision_first_k_relevant(table, k, ties),
        lambda ties: metrics.ndcg_at_k(table, k, ties),
        lambda ties: metrics.r_precision(table, ties),
    ):
        worst, best = three(metric)
        assert worst.min(initial=0) >= 0
        assert best.max(initial=0) <= 1 + 1e-12
    three(lambda ties: metrics.weighted_average_precision_at_k_cut(table, k, ties))
    three(lambda ties: metrics.acg_at_k(table, k, ties))


@given(table=tables)
def test_cut_offs_beyond_the_ranking_are_none(table):
    for ties in TIES:
        n = int(table.counts[0].sum()) + 1000
        whole = metrics.average_precision(table, ties)
        np.testing.assert_allclose(metrics.average_precision_at_k_cut(table, n, ties), whole, atol=1e-12)
        np.testing.assert_allclose(metrics.average_precision_first_k_relevant(table, n, ties), whole, atol=1e-12)
        np.testing.assert_allclose(
            metrics.weighted_average_precision_at_k_cut(table, n, ties),
            metrics.weighted_average_precision(table, ties),
            atol=1e-12,
        )


@given(seed=st.integers(0, 2**32 - 1), ties=st.sampled_from(TIES), k=st.integers(1, 60))
def test_expected_cut_offs_of_large_groups_agree_with_sampled_orders(seed, ties, k):
    """Groups of some twenty: the mean over 400 random orders lies within five standard errors, inside the bounds."""
    rng = np.random.default_rng(seed)
    distances, grades = rng.integers(0, 3, 60), rng.integers(0, 4, 60) * (rng.random(60) < 0.4)
    grades[0] = 1
    table = table_of(list(zip(distances, grades, strict=True)))
    pairs = [
        (metrics.average_precision_at_k_cut, reference.average_precision_at_k_cut),
        (metrics.average_precision_first_k_relevant, reference.average_precision_first_k_relevant),
        (metrics.weighted_average_precision_at_k_cut, reference.weighted_average_precision),
    ]
    sampled = [[] for _ in pairs]
    for _ in range(400 if ties == "expected" else 20):
        gains = GAINS[grades[np.lexsort((rng.random(60), distances))]].tolist()
        for values, (_, slow) in zip(sampled, pairs, strict=True):
            values.append(slow(gains, k))
    for values, (metric, _) in zip(sampled, pairs, strict=True):
        (got,) = metric(table, k, ties)
        if ties == "expected":
            assert abs(got - np.mean(values)) <= 5 * np.std(values) / math.sqrt(len(values)) + 1e-12
        else:
            assert got >= max(values) - 1e-12 if ties == "best" else got <= min(values) + 1e-12


def test_golden_average_precision():
    # McSherry's case by hand: relevant at 0, then one relevant and two irrelevant tied at 1.
    table = table_of([(0, 1), (1, 0), (1, 0), (1, 1)])
    assert metrics.average_precision(table) == pytest.approx([(1 + (2 / 2 + 2 / 3 + 2 / 4) / 3) / 2])
    assert metrics.average_precision(table, "best") == pytest.approx([1.0])
    assert metrics.average_precision(table, "worst") == pytest.approx([(1 + 2 / 4) / 2])


def test_two_meanings_of_map_at_k_differ():
    table = table_of([(0, 1), (1, 0), (2, 0), (3, 1)])
    assert metrics.map_at_k_cut(table, 2) == 1.0
    assert metrics.map_first_k_relevant(table, 2) == pytest.approx((1 + 2 / 4) / 2)


def test_all_relevant_first_scores_one():
    table = table_of([(0, 1), (0, 2), (1, 3), (2, 0), (3, 0)])
    assert metrics.average_precision(table) == 1.0
    assert metrics.r_precision(table) == 1.0


def test_collapsed_encoder_scores_chance():
    """All codes equal on a label-sorted database: a stable sort would score 1."""
    items = [(0, 1)] * 30 + [(0, 0)] * 70
    assert reference.average_precision([1] * 30 + [0] * 70) == 1.0
    expected = metrics.average_precision(table_of(items))
    rng = np.random.default_rng(0)
    sampled = [reference.average_precision(rng.permutation([1] * 30 + [0] * 70).tolist()) for _ in range(2000)]
    assert expected == pytest.approx(np.mean(sampled), abs=4e-3)
    assert expected[0] == pytest.approx(0.325, abs=0.01)


def test_collapsed_table_is_the_chance_line():
    table = table_of([(0, 1), (1, 0), (2, 1), (5, 0)])
    assert metrics.average_precision(table.collapsed()) == pytest.approx(
        metrics.average_precision(table_of([(0, 1), (0, 0), (0, 1), (0, 0)]))
    )


def test_counts_of_narrow_integers_do_not_overflow():
    counts = np.array([[[100, 0, 0], [0, 200, 100]], [[200, 0, 0], [0, 100, 100]]])
    gains = np.array([0.0, 1.0, 2.0])
    wide, narrow = (metrics.DistanceTable(counts.astype(kind), gains) for kind in (np.uint32, np.uint8))
    for metric in (metrics.average_precision, lambda table: metrics.average_precision(table.collapsed())):
        np.testing.assert_array_equal(metric(narrow), metric(wide))


@given(items=small)
def test_ranked_table_gives_the_value_of_one_order(items):
    grades = np.array([[grade for _, grade in sorted(items, key=lambda item: item[0])]])
    table = metrics.ranked_table(grades, GAINS)
    gains = GAINS[grades[0]].tolist()
    if not has_relevant(items):
        assert np.isnan(metrics.average_precision(table)).all()
        return
    for ties in TIES:
        assert metrics.average_precision(table, ties) == pytest.approx([reference.average_precision(gains)])
        assert metrics.ndcg_at_k(table, 3, ties) == pytest.approx([reference.ndcg(gains, 3)])
        assert metrics.weighted_average_precision_at_k_cut(table, 3, ties) == pytest.approx(
            [reference.weighted_average_precision(gains, 3)]
        )


def test_unranked_items_count_as_relevant_but_never_found():
    whole = table_of([(0, 1), (1, 0), (2, 1)])
    counts = whole.counts.copy()
    counts[0, 2, 1] = 0
    table = DistanceTable(counts, GAINS, np.array([[0, 1, 0, 0]], dtype=np.uint32))
    assert (table.n_query, table.n_bits, table.n_database) == (1, N_BITS, 3)
    assert metrics.average_precision(table) == pytest.approx([0.5])
    assert metrics.precision_recall_by_radius(table).recall[0, -1] == 0.5
    assert metrics.ndcg_at_k(table, 3)[0] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert metrics.average_precision(table.binary()) == pytest.approx([0.5])


@given(table=tables)
def test_blocks_of_queries_change_nothing(table):
    many = DistanceTable(np.tile(table.counts, (1200, 1, 1)), GAINS)  # more than one block
    assert len(list(many.query_blocks())) > 1
    np.testing.assert_array_equal(metrics.average_precision(many)[-5:], metrics.average_precision(table))


# Own pairs


@given(closer=st.integers(0, 20), tied=st.integers(1, 20), k=st.integers(1, 30))
def test_own_pair_over_all_places(closer, tied, k):
    places = [closer + place for place in range(1, tied + 1)]
    a, b = np.array([closer]), np.array([tied])
    assert metrics.own_pair_rank(a, b) == pytest.approx([np.mean(places)])
    assert metrics.own_pair_rank(a, b, "best") == [min(places)]
    assert metrics.own_pair_rank(a, b, "worst") == [max(places)]
    assert metrics.own_pair_recall_at_k(a, b, k) == pytest.approx([np.mean([p <= k for p in places])])
    assert metrics.own_pair_recall_at_k(a, b, k, "best") == [min(places) <= k]
    assert metrics.own_pair_recall_at_k(a, b, k, "worst") == [max(places) <= k]


def test_distinct_share():
    assert metrics.distinct_share(np.array([[1], [1], [2], [3]], dtype=np.uint8)) == 0.75
    with pytest.raises(DataError, match="at least one code"):
        metrics.distinct_share(np.zeros((0, 8), dtype=np.uint8))


# Over queries


def test_rules_for_queries_without_a_relevant_item():
    table = table_of([(0, 1), (1, 0)], [(0, 0), (1, 0)])
    assert metrics.mean_average_precision(table) == 0.5
    assert metrics.mean_average_precision(table, no_relevant="skip") == 1.0
    with pytest.raises(DataError, match="1 of 2 queries have no relevant item"):
        metrics.mean_average_precision(table, no_relevant="error")
    with pytest.raises(DataError, match="no query is left"):
        metrics.mean_average_precision(table_of([(0, 0)]), no_relevant="skip")
    with pytest.raises(DataError, match="no query is left"):
        metrics.mean_average_precision(metrics.DistanceTable(np.zeros((0, 9, 2), np.uint32), np.array([0.0, 1.0])))
    curve = metrics.mean_over_queries(metrics.topn_precision(table, [1, 2]), "zero")
    assert curve.tolist() == [0.5, 0.25]


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        interval = metrics.bootstrap_interval(rng.beta(2, 5, 150), seed=trial, n_resamples=300)
        assert interval.low <= interval.mean <= interval.high
        hits += interval.low <= 2 / 7 <= interval.high
    assert 0.89 <= hits / 200 <= 0.99


def test_bootstrap_is_reproducible_and_narrows():
    values = np.random.default_rng(1).random(100)
    first = metrics.bootstrap_interval(values, seed=3)
    assert first == metrics.bootstrap_interval(values, seed=3)
    assert first != metrics.bootstrap_interval(values, seed=4)
    wide = metrics.bootstrap_interval(values, seed=3, level=0.99)
    assert wide.high - wide.low > first.high - first.low
    # The normal approximation of the standard error.
    assert first.high - first.low == pytest.approx(2 * 1.96 * values.std() / 10, rel=0.15)


def test_paired_bootstrap():
    rng = np.random.default_rng(2)
    base = rng.random(300)
    better = metrics.paired_bootstrap(base + 0.02 + 0.05 * rng.standard_normal(300), base, seed=0)
    assert better.low > 0
    assert better.p_value < 0.01
    same = metrics.paired_bootstrap(base + 0.05 * rng.standard_normal(300), base, seed=0)
    assert same.low < 0 < same.high
    assert same.p_value > 0.01
    assert metrics.paired_bootstrap(base, base, seed=0).p_value == 1.0
    assert metrics.paired_bootstrap(base, base - 1e-15, seed=0).p_value == 1.0
    nan = np.where(np.arange(300) == 5, np.nan, base)
    assert metrics.paired_bootstrap(nan, nan, seed=0, no_relevant="skip").mean == 0
    with pytest.raises(DataError, match="same queries"):
        metrics.paired_bootstrap(nan, base, seed=0)


def test_impossible_arguments():
    table = table_of([(0, 1)])
    for call, words in [
        (lambda: metrics.average_precision(table, "stable"), "ranked_table"),
        (lambda: metrics.average_precision(table, "mean"), "expected, best, worst"),
        (lambda: metrics.ndcg_at_k(table, 0), "at least 1"),
        (lambda: metrics.ndcg_at_k(table, 1, gain="cubic"), "linear, exponential"),
        (lambda: metrics.topn_precision(table, [2]), "top 2 cannot be taken of 1"),
        (lambda: metrics.mean_average_precision(table, no_relevant="drop"), "zero, skip, error"),
        (lambda: metrics.bootstrap_interval(np.ones(3), seed=0, level=95), "between 0 and 1"),
        (lambda: DistanceTable(table.counts, GAINS[:2]), "gains"),
        (lambda: DistanceTable(table.counts, GAINS[::-1]), "ascend from 0"),
        (lambda: DistanceTable(table.counts, GAINS, table.counts[0]), "unranked"),
        (lambda: table_of([(0, 1)], [(0, 1), (1, 1)]), "same database, got 1 to 2 items"),
    ]:
        with pytest.raises(SettingsError, match=words):
            call()


def test_no_queries():
    empty = DistanceTable(np.zeros((0, 9, 4), dtype=np.uint32), GAINS)
    assert metrics.average_precision(empty).shape == (0,)
    assert metrics.topn_precision(empty, [5]).shape == (0, 1)


def test_defaults_count_a_query_without_a_relevant_item_as_nothing():
    table = table_of([(0, 1), (1, 0)], [(0, 0), (1, 0)])
    nan = np.array([np.nan, 1.0] * 50)
    assert metrics.map_at_k_cut(table, 1) == metrics.map_first_k_relevant(table, 1) == 0.5
    assert (
        metrics.map_at_k_cut(table, 1, no_relevant="skip")
        == metrics.map_first_k_relevant(table, 1, no_relevant="skip")
        == 1.0
    )
    assert metrics.bootstrap_interval(nan, seed=0).mean == 0.5
    assert metrics.bootstrap_interval(nan, seed=0, no_relevant="skip").mean == 1.0
    assert metrics.paired_bootstrap(nan, nan - 1, seed=0).mean == 0.5
    assert metrics.paired_bootstrap(nan, nan - 1, seed=0, no_relevant="skip").mean == 1.0


def test_means_take_the_rule_for_ties():
    table = table_of([(0, 1), (0, 0), (1, 1)])
    for mean, per_query in (
        (metrics.map_at_k_cut, metrics.average_precision_at_k_cut),
        (metrics.map_first_k_relevant, metrics.average_precision_first_k_relevant),
    ):
        values = [mean(table, 2, ties) for ties in ("worst", "expected", "best")]
        assert values == [per_query(table, 2, ties)[0] for ties in ("worst", "expected", "best")]
        assert len(set(values)) == 3


@pytest.mark.parametrize("n", [300, 3000])
def test_p_value_is_two_sided_whatever_the_number_of_queries(n):
    """A difference that is nil on average; then one at the edge of one-sided significance (of 2.3 %)."""
    differences = np.tile([0.1, -0.1], n // 2)
    assert metrics.paired_bootstrap(differences, np.zeros(n), seed=0).p_value > 0.9
    shifted = differences + 2 * 0.1 / n**0.5
    assert metrics.paired_bootstrap(shifted, np.zeros(n), seed=0).p_value == pytest.approx(0.0455, abs=0.015)
    assert metrics.paired_bootstrap(shifted, np.zeros(n), seed=0) != metrics.paired_bootstrap(
        shifted, np.zeros(n), seed=1
    )


def test_unranked_items_go_with_their_query_and_with_the_collapsed_table():
    counts = np.zeros((2000, N_BITS + 1, 2), dtype=np.uint32)
    unranked = np.zeros((2000, 2), dtype=np.uint32)
    counts[:, 0, 1] = 1
    counts[:1999, 1, 1] = 1
    unranked[1999, 1] = 1  # the last query's second relevant item was not returned
    table = DistanceTable(counts, np.array([0.0, 1.0]), unranked)
    assert len(list(table.query_blocks())) > 1
    assert metrics.average_precision(table)[[0, -1]].tolist() == [1.0, 0.5]
    assert table.collapsed().n_database == table.n_database == 2
