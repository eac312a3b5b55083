"""Splits, labels and fingerprints."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmh_milvus.datasets.base import Item, PairedDataset, PairedFeatures, Split, cut_split, cut_validation, multi_hot
from cmh_milvus.errors import DataError, SettingsError


@given(n=st.integers(3, 60), data=st.data())
def test_cut_split_is_a_partition(n, data):
    n_query = data.draw(st.integers(0, n - 1))
    n_validation = data.draw(st.integers(0, n - 1 - n_query))
    seed = data.draw(st.integers(0, 3))
    split = cut_split(n, n_query=n_query, n_validation=n_validation, seed=seed)
    assert (len(split.query), len(split.validation)) == (n_query, n_validation)
    assert sorted([*split.query, *split.database]) == list(range(n))
    assert sorted([*split.train, *split.validation]) == split.database.tolist()
    again = cut_split(n, n_query=n_query, n_validation=n_validation, seed=seed)
    assert again.fingerprint() == split.fingerprint()
    moved = cut_validation(split, len(split.train) - 1, seed)
    assert len(moved.train) == 1
    assert sorted([*moved.train, *moved.validation]) == split.database.tolist()
    assert (moved.fingerprint() == split.fingerprint()) == (len(split.train) == 1)


def test_fingerprint_tells_the_sets_apart():
    a, b = np.array([1, 2]), np.array([3])
    empty = np.array([], dtype=np.int64)
    assert Split(a, b, b, empty).fingerprint() != Split(b, a, b, empty).fingerprint()
    assert Split(a, b, b, empty).fingerprint() != Split(np.array([1]), np.array([2, 3]), b, empty).fingerprint()


@pytest.mark.parametrize("sizes", [(5, 5), (10, 0), (-1, 2), (2, -1)])
def test_sizes_that_leave_nothing_to_train_on(sizes):
    with pytest.raises(SettingsError, match="10 pairs cannot be cut"):
        cut_split(10, n_query=sizes[0], n_validation=sizes[1])


def test_too_many_validation_rows():
    split = cut_split(10, n_query=2, n_validation=0)
    with pytest.raises(SettingsError, match="8 validation rows cannot be cut from 8"):
        cut_validation(split, 8)


def test_multi_hot():
    assert multi_hot([("b",), ()], ("a", "b")).tolist() == [[False, True], [False, False]]
    with pytest.raises(DataError, match="item 1 has the label 'c'"):
        multi_hot([("b",), ("c",)], ("a", "b"))


def test_dataset_fingerprint_follows_ids_texts_and_labels():
    item = Item("1", text="a", labels=("x", "y"))
    dataset = PairedDataset("d", (item,), ("x", "y"))
    assert dataset.ids == ["1"]
    assert len(dataset) == 1
    same = replace(dataset, name="e", items=(replace(item, labels=("y", "x")),))
    assert same.fingerprint() == dataset.fingerprint()
    for change in ({"id": "2"}, {"text": "b"}, {"labels": ("x",)}, {"text": "half \ud83d"}):
        assert replace(dataset, items=(replace(item, **change),)).fingerprint() != dataset.fingerprint()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": np.ones((5, 2), dtype=bool)}, r"labels of x have the shape \(5, 2\), and it has 9 ids"),
        ({"labels": np.ones(9, dtype=bool)}, r"labels of x have the shape \(9,\).* 2 dimensions"),
        ({"labels": [[True]] * 9}, "give a numpy array"),
        ({"image": np.ones((10, 3), dtype=np.float32)}, r"image features of x have the shape \(10, 3\)"),
        ({"text": np.ones(9, dtype=np.float32)}, r"text features of x have the shape \(9,\).* 2 or 3 dimensions"),
        ({"ids": ["a"]}, "it has 1 ids"),
        ({"split": Split(*np.arange(8).reshape(4, 2) + 2)}, "validation rows of x go from 8 to 9: .* from 0 to 8"),
        ({"split": Split(*np.arange(8).reshape(4, 2) - 1)}, "query rows of x go from -1 to 0"),
    ],
)
def test_features_that_do_not_fit_together_are_refused(change, said):
    split = Split(*np.arange(8).reshape(4, 2))
    image, text, labels = np.ones((9, 3)), np.ones((9, 5, 2)), np.ones((9, 2), dtype=bool)
    data = PairedFeatures("x", list("abcdefghi"), image, text, labels, ("a", "b"), split, "f")
    assert replace(data, labels=None).labels is None
    with pytest.raises(DataError, match=said):
        replace(data, **change)
