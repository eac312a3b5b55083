"""What a benchmark trains and measures in each run."""

import dataclasses

import numpy as np
import pytest

from cmh_milvus import benchmark
from cmh_milvus.benchmark import run_benchmark
from cmh_milvus.comparison import codes_of
from cmh_milvus.datasets.base import PairedFeatures, Split
from cmh_milvus.evaluation import chance_level, evaluate_codes
from cmh_milvus.ranking import own_pair_ranks
from cmh_milvus.training import TrainingSettings, train


@pytest.fixture
def random_data(rng):
    labels = rng.random((120, 5)) < 0.3
    rows = np.arange(120)
    split = Split(rows[:20], rows[20:], rows[20:], rows[:0])
    x, y = (rng.standard_normal((120, d)).astype(np.float32) for d in (6, 7))
    return PairedFeatures("random", [str(i) for i in rows], x, y, labels, tuple("abcde"), split, "f")


def test_a_seed_is_that_of_the_validation_rows_and_of_the_training(random_data, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        benchmark, "train", lambda data, settings: seen.append((data, settings)) or train(data, settings)
    )
    run_benchmark({"a": random_data}, ["scm"], [8], 2, tmp_path / "r.jsonl", device="cpu")
    assert [(settings.seed, settings.device) for _, settings in seen] == [(0, "cpu"), (1, "cpu")]
    cut = [data.split.validation.tolist() for data, _ in seen]
    assert [len(rows) for rows in cut] == [10, 10]
    assert cut[0] != cut[1]


def test_a_row_has_the_figures_of_both_directions(random_data, tmp_path):
    (row,) = run_benchmark({"a": random_data}, ["random_projection"], [8], 1, tmp_path / "r.jsonl", device="cpu")
    trained = train(random_data, TrainingSettings("random_projection", 8, device="cpu"))
    measured = evaluate_codes("x", codes_of(trained, random_data), random_data).directions
    for label, direction in (("I→T", "image_to_text"), ("T→I", "text_to_image")):
        for figure in ("MAP@all", "NDCG@10", "own R@10"):
            assert row[f"{figure} {label}"] == measured[direction].estimates[figure].mean
    assert row["MAP@all I→T"] != row["MAP@all T→I"]
    assert row["chance"] == chance_level(random_data)


def test_other_features_under_the_same_name_are_another_run(random_data, tmp_path):
    other = dataclasses.replace(random_data, fingerprint="g")
    run_benchmark({"a": random_data}, ["scm"], [8], 1, tmp_path / "r.jsonl", device="cpu")
    run_benchmark({"a": other}, ["scm"], [8], 1, tmp_path / "r.jsonl", device="cpu")
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2, "other features under the same name"


def test_own_pairs_of_many_queries_in_blocks(rng):
    queries, database = (rng.integers(0, 256, (n, 1), dtype=np.uint8) for n in (5000, 1000))
    own = rng.integers(0, 1000, 5000)
    whole = own_pair_ranks(queries, database, own)
    last = own_pair_ranks(queries[-50:], database, own[-50:])
    for all_of_them, some in zip(whole, last, strict=True):
        assert np.array_equal(all_of_them[-50:], some)
