"""Features kept by content hash."""

from __future__ import annotations

import io
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmh_milvus.encoders import feature_cache
from cmh_milvus.encoders.feature_cache import FeatureCache, extract_features
from cmh_milvus.errors import DataError, SettingsError


class CountingBackbone:
    """Features that can be checked by hand; remembers what it was asked to encode."""

    dim = 3
    tokens = 0

    def __init__(self, modality="text", revision="1", preprocessing=None):
        self.modality, self.revision = modality, revision
        self.name = f"counting-{modality}"
        self.preprocessing = preprocessing or {}
        self.seen = []

    def encode(self, items):
        self.seen.extend(items)
        if self.modality == "text":
            rows = [[len(t), t.count("a"), 0.25] for t in items]
        else:
            rows = [[i.width, i.height, np.asarray(i).mean()] for i in items]
        return np.array(rows, dtype=np.float32).reshape(-1, self.dim)

    def config(self):
        return {"preprocessing": self.preprocessing}


def png(width=4, height=3, grey=9):
    buffer = io.BytesIO()
    Image.new("L", (width, height), grey).save(buffer, "PNG")
    return buffer.getvalue()


def test_second_run_encodes_nothing(tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    texts = ["banana", "kiwi", "banana"]
    first = CountingBackbone()
    fresh = extract_features(first, texts, cache)
    assert first.seen == ["banana", "kiwi"]  # equal items once
    assert fresh.features.tolist() == [[6, 3, 0.25], [4, 0, 0.25], [6, 3, 0.25]]
    assert fresh.rows.tolist() == [0, 1, 2]
    again = CountingBackbone()
    kept = extract_features(again, [*texts, "fig"], cache)
    assert again.seen == ["fig"]
    np.testing.assert_array_equal(kept.features[:3], fresh.features)


@pytest.mark.parametrize(
    "other",
    [CountingBackbone(revision="2"), CountingBackbone(preprocessing={"size": 8})],
    ids=["revision", "preprocessing"],
)
def test_another_backbone_shares_nothing(tmp_path, other):
    cache = FeatureCache(tmp_path)
    extract_features(CountingBackbone(), ["a"], cache)
    extract_features(other, ["a"], cache)
    assert other.seen == ["a"]


def test_unicode_forms_of_one_text_are_one_item():
    backbone = CountingBackbone()
    extracted = extract_features(backbone, ["caf\u00e9", "cafe\u0301"])
    assert backbone.seen == ["caf\u00e9"]
    assert extracted.features[0].tolist() == extracted.features[1].tolist()


def test_bad_pictures_are_listed_and_the_job_goes_on(tmp_path):
    good, bad, note = tmp_path / "good.png", tmp_path / "cut.png", tmp_path / "note.jpg"
    good.write_bytes(png())
    bad.write_bytes(png(64, 64)[:60])
    note.write_text("no picture")
    sources = [tmp_path / "missing.png", good, bad, png(5, 6), note, bad, tmp_path]
    extracted = extract_features(CountingBackbone("image"), sources, FeatureCache(tmp_path / "cache"))
    assert extracted.rows.tolist() == [1, 3]
    assert extracted.features.tolist() == [[4, 3, 9], [5, 6, 9]]
    reasons = dict(extracted.failures)
    assert list(reasons) == [0, 2, 4, 5, 6]
    assert "does not exist" in reasons[0]
    assert "cut" in reasons[2]
    assert "not a picture" in reasons[4]
    assert reasons[5] == reasons[2]
    assert "directory" in reasons[6]


def test_bad_texts_are_listed():
    extracted = extract_features(CountingBackbone(), ["", " \n", "ok", "\ud800"])
    assert extracted.rows.tolist() == [2]
    assert [row for row, _ in extracted.failures] == [0, 1, 3]


def test_features_that_are_not_finite_are_failures(tmp_path):
    backbone = CountingBackbone()
    backbone.encode = lambda items: np.array([[np.nan, 1, 1] if t == "bad" else [1, 1, 1] for t in items])
    extracted = extract_features(backbone, ["ok", "bad"], FeatureCache(tmp_path))
    assert extracted.rows.tolist() == [0]
    assert "not finite" in extracted.failures[0][1]


def test_nothing_to_do():
    extracted = extract_features(CountingBackbone(), [])
    assert extracted.features.shape == (0, 3)
    assert extracted.rows.dtype == np.int64
    assert extracted.failures == []


@pytest.mark.parametrize(("modality", "source"), [("image", "a text"), ("text", b"bytes")])
def test_wrong_modality(modality, source):
    with pytest.raises(SettingsError, match=f"encodes {modality}s"):
        extract_features(CountingBackbone(modality), [source])


def test_progress_reaches_the_total_and_never_falls(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_ITEMS_AT_ONCE", 2)
    calls = []
    texts = ["a", "b", "", "a", "c", "d", "e"]
    extract_features(CountingBackbone(), texts, None, lambda done, total: calls.append((done, total)))
    done = [d for d, _ in calls]
    assert done[0] == 1  # the empty text
    assert done[-1] == 7
    assert done == sorted(done)
    assert {total for _, total in calls} == {7}


def test_interrupted_run_keeps_what_it_did(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_ITEMS_AT_ONCE", 2)
    monkeypatch.setattr(feature_cache, "_ROWS_A_FILE", 4)
    texts = [f"text {i}" for i in range(12)]
    first = CountingBackbone()

    def interrupt(done, _total):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_features(first, texts, FeatureCache(tmp_path), interrupt)
    assert len(list(tmp_path.glob("*/*.parquet"))) == 3
    second = CountingBackbone()
    assert len(extract_features(second, texts, FeatureCache(tmp_path)).rows) == 12
    assert second.seen == texts[10:]


def test_pictures_are_held_in_memory_by_pixels(monkeypatch):
    monkeypatch.setattr(feature_cache, "_PIXELS_AT_ONCE", 100)
    backbone = CountingBackbone("image")
    sizes = []
    encode = backbone.encode
    backbone.encode = lambda items: sizes.append(len(items)) or encode(items)
    extract_features(backbone, [png(10, 10, grey) for grey in range(5)])
    assert sizes == [1] * 5


@pytest.mark.parametrize("damage", ["truncate", "empty", "text", "foreign"])
def test_damaged_file_is_passed_over_with_a_warning(tmp_path, caplog, damage):
    cache = FeatureCache(tmp_path)
    extract_features(CountingBackbone(), ["one"], cache)
    (path,) = tmp_path.glob("*/*.parquet")
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "foreign":
        other = CountingBackbone(revision="2")
        extract_features(other, ["one"], FeatureCache(tmp_path / "other"))
        (foreign,) = (tmp_path / "other").glob("*/*.parquet")
        path.write_bytes(foreign.read_bytes())
    else:
        path.write_bytes(b"" if damage == "empty" else b"hello, I am no parquet")
    backbone = CountingBackbone()
    with caplog.at_level(logging.WARNING):
        extracted = extract_features(backbone, ["one"], cache)
    assert backbone.seen == ["one"]
    assert extracted.features.tolist() == [[3, 0, 0.25]]
    assert "passed over" in caplog.text


def test_no_temporary_files_stay(tmp_path):
    extract_features(CountingBackbone(), ["one"], FeatureCache(tmp_path))
    assert [p.suffix for p in tmp_path.rglob("*") if p.is_file()] == [".parquet"]


def test_threads_may_add_equal_features(tmp_path):
    cache, backbone = FeatureCache(tmp_path), CountingBackbone()
    contents = [bytes([i]) * 32 for i in range(100)]
    features = np.arange(300, dtype=np.float32).reshape(100, 3)
    together = threading.Barrier(4)

    def add(_):
        together.wait()
        cache.add(backbone, contents, features)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(200)))  # raises what a thread raised
    np.testing.assert_array_equal(cache.get(backbone, contents)[0], features)
    assert [p.suffix for p in tmp_path.rglob("*") if p.is_file()] == [".parquet"]


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file stands where the folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        extract_features(CountingBackbone(), ["one"], FeatureCache(tmp_path / "cache"))


def test_read_only_cache_is_left_alone(tmp_path):
    extract_features(CountingBackbone(), ["one"], FeatureCache(tmp_path))
    backbone = CountingBackbone()
    extracted = extract_features(backbone, ["one", "two"], FeatureCache(tmp_path, read_only=True))
    assert backbone.seen == ["two"]
    assert len(extracted.rows) == 2
    assert len(list(tmp_path.glob("*/*.parquet"))) == 1


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.tuples(st.binary(min_size=32, max_size=32), st.floats(-1000, 1000, width=16)), max_size=8),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_round_trip(tmp_path_factory, values, dtype):
    values = dict(values)
    cache = FeatureCache(tmp_path_factory.mktemp("cache"), dtype=dtype)
    backbone = CountingBackbone()
    contents = list(values)
    features = np.outer(list(values.values()), [1, 0, 0]).astype(np.float32).reshape(-1, 3)
    cache.add(backbone, contents, features)
    back, found = cache.get(backbone, [*contents, *contents])
    assert found.all()
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, np.concatenate([features, features]))


class TokenBackbone(CountingBackbone):
    tokens = 2

    def encode(self, items):
        self.seen.extend(items)
        return np.array([[[len(t), 1, 2], [t.count("a"), 0, 0]] for t in items], dtype=np.float32).reshape(-1, 2, 3)


def test_tokens_keep_their_shape(tmp_path):
    cache = FeatureCache(tmp_path)
    expected = [[[6, 1, 2], [3, 0, 0]], [[4, 1, 2], [0, 0, 0]]]
    assert extract_features(TokenBackbone(), ["banana", "kiwi"], cache).features.tolist() == expected
    again = TokenBackbone()
    kept = extract_features(again, ["kiwi", "banana", "fig"], cache)
    assert again.seen == ["fig"]
    assert kept.features.tolist() == [expected[1], expected[0], [[3, 1, 2], [0, 0, 0]]]
    assert extract_features(TokenBackbone(), [], cache).features.shape == (0, 2, 3)
