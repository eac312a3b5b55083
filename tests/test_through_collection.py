"""What is lost between the codes and the hits: rankings that serve, against brute force."""

import dataclasses

import numpy as np
import pytest

from cmh_milvus.codes import unpack
from cmh_milvus.datasets.base import PairedFeatures, Split
from cmh_milvus.errors import DataError
from cmh_milvus.evaluation import DIRECTIONS, BruteForceRanker, evaluate_codes, evaluate_through
from cmh_milvus.store import Row

N, N_QUERY = 60, 10


@pytest.fixture
def data_and_codes(rng):
    """Pairs whose codes, of 8 bits, follow their labels in part."""
    labels = rng.random((N, 3)) < 0.4
    codes = {}
    for name in ("image", "text"):
        bits = np.concatenate([np.repeat(labels, 2, axis=1), rng.random((N, 2)) < 0.5], axis=1) ^ (
            rng.random((N, 8)) < 0.2
        )
        codes[name] = np.packbits(bits, axis=1)
    rows = np.arange(N)
    split = Split(query=rows[:N_QUERY], database=rows[N_QUERY:], train=rows[N_QUERY:], validation=rows[:0])
    x = rng.standard_normal((N, 3)).astype(np.float32)
    return PairedFeatures("pairs", [f"i{i}" for i in rows], x, x, labels, tuple("abc"), split, "f"), codes


class Lossy(BruteForceRanker):
    """Forgets rows by a rule of query number and key, as an inverted file forgets the lists that it does not probe."""

    def __init__(self, ids, codes, forgets):
        super().__init__(ids, codes)
        object.__setattr__(self, "forgets", forgets)

    def rank(self, codes, *, modality=None):
        for number, ranking in enumerate(super().rank(codes, modality=modality)):
            keep = np.array([not self.forgets(number, pk) for pk in ranking.pks])
            pks = [pk for pk, kept in zip(ranking.pks, keep, strict=True) if kept]
            yield dataclasses.replace(ranking, pks=pks, distances=ranking.distances[keep])


def slow(data, codes, forgets):
    """Recall by distance, exact MAP and served MAP by their definitions, the ties in expectation by simulation."""
    rng = np.random.default_rng(0)
    bits = {name: unpack(code) for name, code in codes.items()}
    rows, returned = np.zeros(9), np.zeros(9)
    maps = {}
    for direction, (one, other) in DIRECTIONS.items():
        exact, served = [], []
        for number, query in enumerate(data.split.query):
            items = []
            for item in data.split.database:
                distance = int((bits[one][query] != bits[other][item]).sum())
                kept = not forgets(number, Row(data.ids[item], other, b"").pk)
                rows[distance] += 1
                returned[distance] += kept
                items.append((distance, bool((data.labels[query] & data.labels[item]).any()), kept))
            for values, ranked in ((exact, items), (served, [item for item in items if item[2]])):
                n_relevant = sum(item[1] for item in items)
                values.append(np.mean([average_precision(ranked, n_relevant, rng) for _ in range(200)]))
        maps[direction] = np.mean(exact), np.mean(served)
    return rows, returned, maps


def average_precision(items, n_relevant, rng):
    order = np.lexsort((rng.random(len(items)), [item[0] for item in items]))
    hits = np.array([items[i][1] for i in order])
    ranks = np.flatnonzero(hits) + 1
    return (np.arange(1, len(ranks) + 1) / ranks).sum() / n_relevant if n_relevant else 0.0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_losses_and_recall_equal_their_definitions(data_and_codes, share):
    data, codes = data_and_codes

    def forgets(number, pk):
        return np.random.default_rng([number, *pk.encode()]).random() < share

    through = evaluate_through(Lossy(data.ids, codes, forgets), codes, data)
    rows, returned, maps = slow(data, codes, forgets)
    for distance, recall in enumerate(through.recall_by_distance):
        assert recall == (returned[distance] / rows[distance] if rows[distance] else None)
    assert len(through.recall_by_distance) == 9
    assert through.missing == rows.sum() - returned.sum()
    for direction, (exact, served) in maps.items():
        assert through.model_loss[direction] == pytest.approx(1 - exact, abs=0.01)
        assert through.index_loss[direction] == pytest.approx(exact - served, abs=0.01)
        estimate = evaluate_codes("x", codes, data).directions[direction].estimates["MAP@all"].mean
        assert through.model_loss[direction] == pytest.approx(1 - estimate)
        if share == 0:
            assert through.index_loss[direction] == 0
        if share == 1:
            assert through.model_loss[direction] + through.index_loss[direction] == pytest.approx(1)
    assert through.difference == max(map(abs, through.index_loss.values()))
    assert (through.wrong == 0) == (share == 0)


def test_a_row_at_the_wrong_distance_is_not_recalled(data_and_codes):
    data, codes = data_and_codes
    broken = {name: code.copy() for name, code in codes.items()}
    for code in broken.values():
        code[N_QUERY:] ^= 1  # every distance is off by one
    through = evaluate_through(BruteForceRanker(data.ids, broken), codes, data)
    assert through.missing == 0
    assert through.wrong > 0
    assert set(through.recall_by_distance) <= {0.0, None}


def test_a_row_given_twice_is_an_error(data_and_codes):
    data, codes = data_and_codes
    twice = BruteForceRanker([*data.ids, data.ids[-1]], {k: np.concatenate([c, c[-1:]]) for k, c in codes.items()})
    with pytest.raises(DataError, match="'i0' has a row twice"):
        evaluate_through(twice, codes, data)


def test_codes_of_another_length_are_an_error(data_and_codes):
    data, codes = data_and_codes

    class Longer(BruteForceRanker):
        def rank(self, query, *, modality=None):
            for ranking in super().rank(query, modality=modality):
                yield dataclasses.replace(ranking, distances=ranking.distances + 9)

    with pytest.raises(DataError, match="beyond 8 bits"):
        evaluate_through(Longer(data.ids, codes), codes, data)
