"""Rules of the means and the bootstrap: empty queries, ties, p-values, unranked items, blocks."""

import numpy as np
import pytest

from cmh_milvus import metrics
from cmh_milvus.codes import check_n_bits
from cmh_milvus.datasets.base import PairedFeatures, Split
from cmh_milvus.evaluation import evaluate_codes
from cmh_milvus.metrics import DistanceTable

GAINS = np.array([0.0, 0.25, 1.0, 3.0])
N_BITS = 8


def table_of(*queries):
    counts = np.zeros((len(queries), N_BITS + 1, len(GAINS)), dtype=np.uint32)
    for i, items in enumerate(queries):
        for distance, grade in items:
            counts[i, distance, grade] += 1
    return DistanceTable(counts, GAINS)


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


def test_queries_beyond_the_first_blocks_count(rng):
    labels = rng.random((640, 3)) < 0.4
    codes = {name: rng.integers(0, 256, (640, 1), dtype=np.uint8) for name in ("image", "text")}
    rows, none = np.arange(640), np.arange(0)
    x = np.zeros((640, 2), dtype=np.float32)
    Split(rows[:600], rows[600:], none, none)

    def of(query):
        s = Split(query, rows[600:], none, none)
        return evaluate_codes("x", codes, PairedFeatures("x", list(map(str, rows)), x, x, labels, tuple("abc"), s, "f"))

    whole = of(rows[:600]).directions["image_to_text"]
    parts = [of(rows[start : start + 200]).directions["image_to_text"] for start in (0, 200, 400)]
    for name in ("MAP@all", "NDCG@10"):
        np.testing.assert_array_equal(whole.per_query[name], np.concatenate([part.per_query[name] for part in parts]))


def test_longest_code():
    assert check_n_bits(32_768) == 32_768
