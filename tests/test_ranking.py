"""Counting kernels, explicit orders and own pairs against loops."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmh_milvus import metrics
from cmh_milvus.errors import DataError, MissingExtra, SettingsError
from cmh_milvus.ranking import (
    compiled_backend,
    distance_table,
    numpy_backend,
    own_pair_ranks,
    rank_stable,
    returned_table,
    stable_average_precision,
    stable_table,
    torch_backend,
)
from tests.reference import ranking as reference

GRADINGS = ["binary", "shared", "jaccard"]
BACKENDS = ["numpy", "compiled", "torch"]


@st.composite
def problems(draw, max_query=3, max_database=12):
    """Codes and labels of random shapes: (query codes, database codes, query labels, database labels)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_bytes = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17, 64]))
    n_labels = draw(st.sampled_from([0, 1, 5, 8, 9, 21, 24, 64, 65, 80, 255, 512]))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    m, n = draw(st.integers(0, max_query)), draw(st.integers(1, max_database))
    query = rng.integers(0, 256, (m, n_bytes), dtype=np.uint8)
    database = rng.integers(0, 256, (n, n_bytes), dtype=np.uint8)
    database[: min(m, n)] = query[: min(m, n)]  # distance 0 occurs
    return query, database, rng.random((m, n_labels)) < density, rng.random((n, n_labels)) < density


def slow_counts(problem, grading, gains):
    query, database, query_labels, database_labels = problem
    counts = np.zeros((len(query), query.shape[1] * 8 + 1, len(gains)), dtype=np.uint32)
    for i in range(len(query)):
        pairs = reference.distances_and_gains(query[i], database, query_labels[i], database_labels, grading)
        for distance, gain in zip(*pairs, strict=True):
            counts[i, distance, gains.tolist().index(float(gain))] += 1
    return counts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grading", GRADINGS)
@given(problem=problems())
def test_table_equals_loop(problem, grading, backend):
    table = distance_table(*problem, grading=grading, backend=backend)
    assert table.counts.dtype == np.uint32
    np.testing.assert_array_equal(table.counts, slow_counts(problem, grading, table.gains))


@pytest.mark.parametrize("grading", GRADINGS)
@given(problem=problems(max_query=40, max_database=3000))
def test_backends_agree(problem, grading):
    first, *others = (distance_table(*problem, grading=grading, backend=backend, threads=2) for backend in BACKENDS)
    assert (first.total().sum(axis=1) == len(problem[1])).all()
    for other in others:
        np.testing.assert_array_equal(other.counts, first.counts)


def test_blocks_add_up(monkeypatch):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (1000, 8), dtype=np.uint8)
    labels = rng.random((1000, 70)) < 0.05
    monkeypatch.setattr(numpy_backend, "BLOCK", 64)
    monkeypatch.setitem(torch_backend.PAIRS, "cpu", 128)
    for grading in GRADINGS:
        tables = [distance_table(codes[:9], codes, labels[:9], labels, grading=grading, backend=b) for b in BACKENDS]
        for table in tables:
            np.testing.assert_array_equal(table.counts, tables[0].counts)
            assert (table.total().sum(axis=1) == 1000).all()


def test_compiles_where_no_folder_keeps_the_result():
    names = {}
    exec("def twice(x): return 2 * x", names)  # of no file: numba finds no folder for it
    assert compiled_backend._compile(names["twice"])(21) == 42


@pytest.mark.parametrize("backend", ["numpy", "compiled"])
def test_memory_above_the_inputs_is_small(backend):
    """At NUS-WIDE's size: a matrix of distances would take 155 MB for these 100 queries alone."""
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 256, (193_749, 8), dtype=np.uint8), rng.random((193_749, 21)) < 0.1
    tracemalloc.start()
    try:
        metrics.mean_average_precision(distance_table(codes[:100], codes, labels[:100], labels, backend=backend))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("grading", GRADINGS)
def test_cuda_agrees(grading):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (3000, 64), dtype=np.uint8)
    labels = rng.random((3000, 512)) < 0.01
    tables = [
        distance_table(codes[:50], codes, labels[:50], labels, grading=grading, backend=backend, device=device)
        for backend, device in (("numpy", "cpu"), ("torch", "cuda"))
    ]
    np.testing.assert_array_equal(tables[0].counts, tables[1].counts)


def test_auto_is_the_fastest_installed(monkeypatch):
    codes, labels = np.zeros((3, 8), dtype=np.uint8), np.ones((3, 2), dtype=bool)
    chosen = []
    for module in (numpy_backend, compiled_backend):
        real = module.count
        monkeypatch.setattr(
            module, "count", lambda *a, name=module.__name__, real=real: (chosen.append(name), real(*a))[1]
        )
    distance_table(codes, codes, labels, labels)
    monkeypatch.setattr("cmh_milvus.ranking.find_spec", lambda name: None)
    distance_table(codes, codes, labels, labels)
    assert [name.rpartition(".")[2] for name in chosen] == ["compiled_backend", "numpy_backend"]
    with pytest.raises(MissingExtra, match=r"pip install 'cmh-milvus\[fast\]'"):
        distance_table(codes, codes, labels, labels, backend="compiled")


@pytest.mark.parametrize("grading", GRADINGS)
@given(problem=problems(), seed=st.integers(0, 1000))
def test_table_is_invariant(problem, seed, grading):
    """Under permutation of the database, permutation of all bits, and XOR of all codes."""
    query, database, query_labels, database_labels = problem
    rng = np.random.default_rng(seed)
    table = distance_table(*problem, grading=grading)
    order = rng.permutation(len(database))
    shuffled = distance_table(query, database[order], query_labels, database_labels[order], grading=grading)
    np.testing.assert_array_equal(shuffled.counts, table.counts)
    mask = rng.integers(0, 256, query.shape[1], dtype=np.uint8)
    bits = rng.permutation(query.shape[1] * 8)

    def turned(codes):
        return np.packbits(np.unpackbits(codes ^ mask, axis=1)[:, bits], axis=1)

    again = distance_table(turned(query), turned(database), query_labels, database_labels, grading=grading)
    np.testing.assert_array_equal(again.counts, table.counts)


@given(problem=problems())
def test_gradings_agree_on_what_is_relevant(problem):
    tables = [distance_table(*problem, grading=g) for g in GRADINGS]
    for table in tables:
        np.testing.assert_array_equal(table.binary().counts, tables[0].counts)


def test_jaccard_gains_are_fractions():
    labels = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]])
    codes = np.zeros((5, 1), dtype=np.uint8)
    table = distance_table(codes[:1], codes, labels[:1], labels, grading="jaccard")
    occurring = table.gains[table.counts[0, 0] > 0]
    np.testing.assert_allclose(occurring, [0, 1 / 2, 2 / 3, 1])
    assert metrics.ndcg_at_k(table, 5, "best") == pytest.approx([1.0])


@given(problem=problems())
def test_rank_stable_sorts_by_distance_then_row(problem):
    query, database, *_ = problem
    for code in query:
        expected = sorted(range(len(database)), key=lambda j: (reference.hamming(code, database[j]), j))
        assert rank_stable(code, database).tolist() == expected


@pytest.mark.parametrize("backend", ["numpy", "compiled"])
@given(problem=problems(max_query=40, max_database=30))
def test_stable_average_precision_equals_loop(problem, backend):
    query, database, query_labels, database_labels = problem
    got = stable_average_precision(*problem, backend=backend, threads=2)
    for i in range(len(query)):
        pairs = zip(
            *reference.distances_and_gains(query[i], database, query_labels[i], database_labels, "binary"), strict=True
        )
        ordered = [gain for _, gain in sorted(pairs, key=lambda pair: pair[0])]  # Python's sort is stable
        if any(ordered):
            assert got[i] == pytest.approx(reference.average_precision(ordered), abs=1e-12)
        else:
            assert np.isnan(got[i])


def test_stable_backends_agree_on_many_items():
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 256, (9001, 2), dtype=np.uint8), rng.random((9001, 80)) < 0.02
    arguments = codes[:40], codes, labels[:40], labels
    first = stable_average_precision(*arguments, backend="numpy")
    np.testing.assert_allclose(stable_average_precision(*arguments, backend="compiled"), first, atol=1e-12)
    table = distance_table(*arguments)
    assert (metrics.average_precision(table, "worst") <= first + 1e-12)[~np.isnan(first)].all()
    assert (metrics.average_precision(table, "best") >= first - 1e-12)[~np.isnan(first)].all()


@pytest.mark.parametrize("grading", GRADINGS)
@given(problem=problems())
def test_stable_table_gives_stable_metrics(problem, grading):
    table = stable_table(*problem, grading=grading)
    assert (table.total() == 1).all()
    np.testing.assert_allclose(metrics.average_precision(table), stable_average_precision(*problem), atol=1e-12)
    query, database, query_labels, database_labels = problem
    for i in range(len(query)):
        order = rank_stable(query[i], database)
        gains = [float(reference.gain(query_labels[i], database_labels[row], grading)) for row in order]
        if any(gains):
            assert metrics.ndcg_at_k(table, 5)[i] == pytest.approx(reference.ndcg(gains, 5))


@pytest.mark.parametrize("grading", GRADINGS)
@given(problem=problems(), seed=st.integers(0, 1000))
def test_returned_table(problem, grading, seed):
    """Of complete results it is the exact table; what a search left out is unranked."""
    query, database, query_labels, database_labels = problem
    rng = np.random.default_rng(seed)
    n, n_bits = len(database), query.shape[1] * 8
    exact = distance_table(*problem, grading=grading)
    rows = [rng.permutation(n) for _ in query]
    distances = [
        np.array([reference.hamming(code, database[row]) for row in r]) for code, r in zip(query, rows, strict=True)
    ]

    def returned(keep):
        return returned_table(
            [r[:keep] for r in rows],
            [d[:keep] for d in distances],
            query_labels,
            database_labels,
            n_bits=n_bits,
            grading=grading,
        )

    whole = returned(n)
    np.testing.assert_array_equal(whole.counts, exact.counts)
    assert not whole.unranked.any()
    part = returned(n // 2)
    np.testing.assert_array_equal(part.grade_totals(), exact.grade_totals())
    assert (part.total().sum(axis=1) == n // 2).all()


def test_returned_table_refuses():
    labels = np.ones((3, 2), dtype=bool)
    for rows, distances, words in [
        ([0, 0], [1, 1], "rows twice"),
        ([0, 3], [1, 1], "outside the 3"),
        ([0], [1, 1], "rows twice"),
        ([0, 1], [1, 9], "outside 0 to 8"),
    ]:
        with pytest.raises(DataError, match=words):
            returned_table([np.array(rows)], [np.array(distances)], labels[:1], labels, n_bits=8)
    with pytest.raises(SettingsError, match="as many results"):
        returned_table([], [], labels[:1], labels, n_bits=8)


@given(problem=problems(max_query=8))
def test_own_pair_ranks_equal_loop(problem):
    query, database, *_ = problem
    own = np.arange(len(query)) % len(database)
    closer, tied = own_pair_ranks(query, database, own)
    for i, row in enumerate(own):
        distances = [reference.hamming(query[i], code) for code in database]
        assert closer[i] == sum(d < distances[row] for d in distances)
        assert tied[i] == sum(d == distances[row] for d in distances)


def test_collapsed_encoder_on_a_label_sorted_database_scores_chance():
    labels = np.repeat(np.eye(4, dtype=bool), 25, axis=0)
    codes = np.zeros((100, 8), dtype=np.uint8)
    table = distance_table(codes[:1], codes, labels[:1], labels)
    stable = [bool((labels[0] & labels[row]).any()) for row in rank_stable(codes[0], codes)]
    assert reference.average_precision(stable) == 1.0
    assert metrics.mean_average_precision(table) == pytest.approx(
        metrics.mean_average_precision(table.collapsed()), abs=1e-12
    )
    assert metrics.mean_average_precision(table) < 0.3


def test_impossible_arguments():
    codes, labels = np.zeros((3, 8), dtype=np.uint8), np.ones((3, 2), dtype=bool)
    for call, words in [
        (lambda: distance_table(codes, codes, labels, labels, grading="label"), "binary, shared, jaccard"),
        (lambda: distance_table(codes, codes, labels, labels, backend="gpu"), "auto, numpy, compiled, torch"),
        (lambda: distance_table(codes, codes, labels, labels, threads=0), "at least one thread"),
        (lambda: stable_average_precision(codes, codes, labels, labels, backend="torch"), "no stable order"),
        (lambda: distance_table(codes.astype(int), codes, labels, labels), "use codes.pack"),
        (lambda: distance_table(codes, codes[:, :4], labels, labels), "64 and 32 bits"),
        (lambda: distance_table(codes, codes, labels[:2], labels), "query labels have shape"),
        (lambda: distance_table(codes, codes, labels[:, :1], labels), "1 label columns"),
        (lambda: rank_stable(codes[0, :4], codes), "32 and 64 bits"),
        (lambda: own_pair_ranks(codes, codes, np.array([0, 1, 3])), "0 to 2"),
        (lambda: own_pair_ranks(codes, codes, np.array([0])), "3 queries"),
    ]:
        with pytest.raises(SettingsError, match=words):
            call()
    with pytest.raises(DataError, match="other than 0 and 1"):
        distance_table(codes, codes, labels * 2, labels)
    with pytest.raises(DataError, match="database is empty"):
        distance_table(codes, codes[:0], labels, labels[:0])
