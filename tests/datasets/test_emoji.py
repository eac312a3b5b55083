"""The quick start's data, as shipped."""

from __future__ import annotations

import numpy as np
import pytest

from cmh_milvus.datasets import emoji
from cmh_milvus.encoders.backbones import load_backbone
from cmh_milvus.encoders.feature_cache import FeatureCache, extract_features
from cmh_milvus.errors import DataError
from cmh_milvus.pictures import open_picture

SIDES = [("efficientnet-lite2", "image"), ("all-minilm-l6-v2", "text")]


@pytest.fixture(scope="module")
def data():
    return emoji.load_emoji()


def test_sizes_and_split(data):
    assert len(data) == len(set(data.ids)) == 1852
    assert len(data.label_names) == 67
    labels = data.labels()
    assert labels.any(axis=1).all()
    assert 2.9 < labels.sum() / len(data) < 3.1
    split = data.split
    assert len(split.query) == 200
    np.testing.assert_array_equal(split.train, split.database)
    np.testing.assert_array_equal(np.sort(np.concatenate([split.query, split.database])), np.arange(1852))
    assert len(split.validation) == 0


def test_labels_follow_their_rule(data):
    """A label is the emoji's group, or a keyword."""
    groups = {item.fields["group"].lower().replace(" & ", "_") for item in data.items}
    assert len(groups) == 9
    assert groups < set(data.label_names)
    assert all(groups.intersection(item.labels) for item in data.items)


def test_every_picture_opens(data):
    for item in data.items[::37]:
        assert open_picture(item.image).size == (256, 256)
    assert {item.image.name for item in data.items} == {p.name for p in (emoji.EMOJI_FOLDER / "images").iterdir()}


@pytest.mark.parametrize(("name", "modality"), SIDES)
def test_shipped_features_are_complete_and_agree_with_live_ones(data, name, modality):
    backbone = load_backbone(name, modality, "cpu")
    sources = [item.image if modality == "image" else item.text for item in data.items]
    live = extract_features(backbone, sources[::463])
    backbone.encode = None  # nothing may be left to encode
    extracted = extract_features(backbone, sources, FeatureCache(emoji.EMOJI_FEATURES, read_only=True))
    assert extracted.failures == []
    assert len(extracted.rows) == 1852
    kept = extracted.features[::463]
    cosine = (kept * live.features).sum(1) / np.linalg.norm(kept, axis=1) / np.linalg.norm(live.features, axis=1)
    assert cosine.min() > 0.9999


def test_size_of_what_is_shipped():
    def size(folder):
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(emoji.EMOJI_FEATURES) < 6_000_000
    assert size(emoji.EMOJI_FOLDER) < 12_000_000


def test_licences_are_beside_the_data():
    for name in ("fluent-emoji", "unicode-emoji-json", "emojilib"):
        text = (emoji.EMOJI_FOLDER / f"LICENSE-{name}").read_text()
        assert "Permission is hereby granted, free of charge" in text
        assert "Copyright (c)" in text


def test_damaged_installation(monkeypatch, tmp_path):
    monkeypatch.setattr(emoji, "EMOJI_FOLDER", tmp_path)
    with pytest.raises(DataError, match="install cmh-milvus again"):
        emoji.load_emoji()
