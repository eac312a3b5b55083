"""Features that a user brings."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest

from cmh_milvus.datasets.features import load_features
from cmh_milvus.errors import DataError, UnsafeFile


def arrays(**changes):
    rng = np.random.default_rng(0)
    made = {
        "image": rng.normal(size=(10, 4)).astype(np.float16),
        "text": rng.integers(0, 2, (10, 3), dtype=np.uint8),
        "labels": rng.integers(0, 2, (10, 2), dtype=np.uint8),
        "label_names": np.array(["a", "b"]),
        "ids": np.array([f"item {i}" for i in range(10)]),
        "train": np.array([5, 3, 4], dtype=np.int32),
        "query": np.array([0, 1], dtype=np.int32),
        "database": np.arange(2, 10, dtype=np.int32),
    }
    made.update(changes)
    return {key: value for key, value in made.items() if value is not None}


def save(tmp_path, **changes):
    path = tmp_path / "features.npz"
    np.savez(path, **arrays(**changes))
    return path


def test_all_arrays(tmp_path):
    data = load_features(save(tmp_path))
    expected = arrays()
    assert data.name == "features"
    assert data.image.dtype == data.text.dtype == np.float32
    np.testing.assert_array_equal(data.image, expected["image"].astype(np.float32))
    np.testing.assert_array_equal(data.labels, expected["labels"] == 1)
    assert data.label_names == ("a", "b")
    assert data.ids[3] == "item 3"
    assert data.split.train.tolist() == [3, 4, 5]
    assert data.split.query.tolist() == [0, 1]
    assert data.split.validation.tolist() == []
    assert data.split.train.dtype == np.int64


def test_protocol(tmp_path):
    assert load_features(save(tmp_path)).protocol == ""
    assert load_features(save(tmp_path, protocol=np.array("mirflickr-20015"))).protocol == "mirflickr-20015"
    assert load_features(save(tmp_path, protocol=np.array(["coco-122218"]))).protocol == "coco-122218"
    for wrong in (np.array(["a", "b"]), np.array(3)):
        with pytest.raises(DataError, match="'protocol'"):
            load_features(save(tmp_path, protocol=wrong))


def test_least_and_other_names(tmp_path):
    path = save(
        tmp_path, query=None, database=None, train=None, labels=None, label_names=None, ids=None,
        query_idx=np.array([9]), db_idx=np.arange(9), validation=np.array([2]), text_minilm=np.ones((10, 7)),
    )  # fmt: skip
    data = load_features(path, text_key="text_minilm")
    assert data.text.shape == (10, 7)
    assert data.labels is None
    assert data.ids[:2] == ["0", "1"]
    assert data.split.train.tolist() == [0, 1, 3, 4, 5, 6, 7, 8]
    assert data.split.validation.tolist() == [2]


def test_fingerprint_follows_the_content(tmp_path):
    first = load_features(save(tmp_path)).fingerprint
    assert load_features(save(tmp_path, train=np.array([5]))).fingerprint == first
    changed = arrays()["image"].copy()
    changed[0, 0] += 1
    assert load_features(save(tmp_path, image=changed)).fingerprint != first
    assert load_features(save(tmp_path, ids=np.arange(10))).fingerprint != first


NAN = np.full((10, 4), np.nan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "no array 'image'; it has database, ids"),
        ({"image": np.ones(10)}, r"'image' .* shape \(n, dim\)"),
        ({"image": np.ones((10, 0))}, r"'image' .* shape"),
        ({"image": np.ones((10, 1, 4))}, r"'image' .* 2 tokens or more, got .*\(10, 1, 4\)"),
        ({"image": np.ones((10, 2, 2, 4))}, r"'image' .* shape"),
        (
            {"image": np.where(np.arange(80).reshape(10, 2, 4) == 25, np.nan, 1.0)},
            "'image' .* NaN or infinity in row 3",
        ),
        ({"image": np.array([["a"] * 4] * 10)}, "must be numbers"),
        ({"image": NAN}, "NaN or infinity in row 0"),
        ({"image": np.full((10, 4), 1e20)}, r"'image' .* 1.0e\+20: scale it"),
        ({"labels": np.zeros((10, 2))}, "'labels' .* no 1"),
        ({"ids": np.array(7)}, "10 different ids, got 1"),
        ({"text": np.ones((9, 4))}, "10 rows of 'image' but 9 of 'text'"),
        ({"labels": np.ones((9, 2))}, "'labels' .* shape"),
        ({"labels": np.full((10, 2), 2)}, "'labels' .* 0 or 1"),
        ({"label_names": np.array(["a"])}, "2 columns of labels but 1 names"),
        ({"ids": np.array(["a"] * 10)}, "10 different ids, got 1"),
        ({"query": None}, "no array 'query' or 'query_idx'"),
        ({"query": np.array([0.5])}, "'query' .* row numbers"),
        ({"query": np.array([10])}, "from 0 to 9"),
        ({"query": np.array([-1])}, "from 0 to 9"),
        ({"query": np.array([1, 1])}, "each once"),
        ({"query": np.array([2])}, "both query and database"),
        ({"train": np.array([1])}, "both query and train"),
        ({"validation": np.array([3])}, "both train and validation"),
    ],
)
def test_bad_arrays(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_features(save(tmp_path, **changes))


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "features.npz"
    np.savez(path, **{**arrays(), "ids": np.array([{}] * 10, dtype=object)})
    with pytest.raises(UnsafeFile, match=r"'ids' .* pickled objects"):
        load_features(path)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="no file"):
        load_features(tmp_path / "nothing.npz")
    path = tmp_path / "text.npz"
    path.write_text("hello")
    with pytest.raises(DataError, match=r"not an \.npz"):
        load_features(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("image", b"no array")
    with pytest.raises(DataError, match=r"'image' .* is no array"):
        load_features(path)
    for header in (b"{'descr': (", b"{'descr': '<f8', 'fortran_order': False, 'shape': (10, 4}"):
        with zipfile.ZipFile(path, "w") as archive:
            content = header.ljust(117) + b"\n"
            archive.writestr("image.npy", b"\x93NUMPY\x01\x00" + len(content).to_bytes(2, "little") + content)
        with pytest.raises(DataError, match=r"'image' .* is damaged"):
            load_features(path)
    good = save(tmp_path).read_bytes()
    path.write_bytes(good[:300] + b"\0" * 40 + good[340:])
    with pytest.raises(DataError, match="damaged"):
        load_features(path)


def test_damage_anywhere_is_said_in_words(tmp_path):
    path = tmp_path / "packed.npz"
    np.savez_compressed(path, **{key: value for key, value in arrays().items() if value is not None})
    good = path.read_bytes()
    refused = 0
    for place in range(0, len(good), 5):
        path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :])
        try:
            load_features(path)
        except (DataError, UnsafeFile) as error:
            refused += str(path.name) in str(error)
    assert refused > len(good) // 10


def test_tokens(tmp_path):
    matrices = np.random.default_rng(1).normal(size=(10, 3, 4))
    data = load_features(save(tmp_path, image=matrices))
    np.testing.assert_array_equal(data.image, matrices.astype(np.float32))
    assert data.text.shape == (10, 3)
