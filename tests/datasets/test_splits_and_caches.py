"""Seeds and fingerprints of splits and features files; what a feature cache keeps apart."""

import logging
from dataclasses import replace

import numpy as np
import pytest

from cmh_milvus.datasets.base import Split, cut_split, cut_validation
from cmh_milvus.datasets.features import load_features
from cmh_milvus.encoders.feature_cache import FeatureCache, extract_features
from cmh_milvus.errors import DataError
from tests.datasets.test_features import arrays, save
from tests.encoders.test_feature_cache import CountingBackbone


def test_splits_are_random_and_follow_their_seed():
    whole = [cut_split(200, n_query=50, n_validation=40, seed=seed) for seed in range(3)]
    moved = [cut_validation(whole[0], 30, seed=seed) for seed in range(3)]
    assert len({split.fingerprint() for split in whole}) == len({split.fingerprint() for split in moved}) == 3
    for rows, n in ((whole[0].query, 200), (whole[0].validation, 200), (moved[0].train, 200)):
        assert abs(rows.mean() - n / 2) < 25, "not the first rows, nor the last"


def test_fingerprint_sees_all_four_sets():
    a, b, c, d, e = (np.array([i]) for i in range(5))
    split = Split(a, b, c, d)
    changed = [replace(split, **{name: e}) for name in ("query", "database", "train", "validation")]
    assert len({one.fingerprint() for one in (split, *changed)}) == 5


def test_fingerprint_follows_texts_and_labels_too(tmp_path):
    made = arrays()
    found = [load_features(save(tmp_path)).fingerprint]
    for key in ("text", "labels"):
        changed = made[key].copy()
        changed[0, 0] = 1 - changed[0, 0]
        found.append(load_features(save(tmp_path, **{key: changed})).fingerprint)
    assert len(set(found)) == 3


def test_picture_features_of_another_name(tmp_path):
    assert load_features(save(tmp_path, image_vgg=np.ones((10, 7))), image_key="image_vgg").image.shape == (10, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": np.array([1]), "train": np.array([4])}, "both query and validation"),
        ({"image": np.full((10, 4), -1e20)}, r"1.0e\+20: scale it"),
    ],
)
def test_more_bad_arrays(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        load_features(save(tmp_path, **changes))


def test_revisions_of_a_backbone_do_not_push_each_other_out(tmp_path, caplog):
    cache = FeatureCache(tmp_path)
    with caplog.at_level(logging.WARNING):
        for revision in ("1", "2", "1", "2"):
            backbone = CountingBackbone(revision=revision)
            extract_features(backbone, ["a"], cache)
        assert backbone.seen == []
    assert caplog.text == ""


def test_features_are_kept_to_the_bit(tmp_path):
    cache, backbone = FeatureCache(tmp_path), CountingBackbone()
    features = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)
    cache.add(backbone, [b"a" * 32, b"b" * 32], features)
    cache.add(backbone, [b"a" * 32, b"c" * 32], features)
    found = cache.get(backbone, [b"a" * 32, b"b" * 32, b"c" * 32])
    assert found[1].all()
    assert np.array_equal(found[0], features[[0, 1, 1]])


def test_texts_that_only_look_alike_are_two_items():
    backbone = CountingBackbone()
    extract_features(backbone, ["\ufb01sh", "fish", "x\u00b2", "x2"])
    assert backbone.seen == ["\ufb01sh", "fish", "x\u00b2", "x2"]
