"""From paired items to the features that methods train on and evaluations rank: backbones run over data sets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmh_milvus.datasets.base import PairedDataset, PairedFeatures, Split
from cmh_milvus.device import resolve_device
from cmh_milvus.encoders.backbones import Backbone, BagOfWords, backbone_key, load_backbone
from cmh_milvus.encoders.feature_cache import FeatureCache, extract_features
from cmh_milvus.errors import DataError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Extracted:
    """Features of a data set, and what had to be left out.

    Attributes:
        features: Of the pairs whose picture could be read, with the split renumbered to them.
        failures: (item id, reason) of every other pair.
    """

    features: PairedFeatures
    failures: list[tuple[str, str]]


def extract_pairs(
    dataset: PairedDataset,
    image_backbone: Backbone,
    text_backbone: Backbone,
    *,
    split: Split,
    cache: FeatureCache | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Backbone features of a data set's pairs.

    Args:
        dataset: Pairs; each item has a picture and a text.
        image_backbone: For the pictures.
        text_backbone: For the texts.
        split: Over the data set's rows.
        cache: Where features are looked up and kept by content.
        progress: Called with (pictures done, pictures in all).

    Raises:
        DataError: No pair could be read.
    """
    pictures = [item.image for item in dataset.items if item.image is not None]
    texts = [item.text for item in dataset.items if item.text is not None]
    assert len(pictures) == len(texts) == len(dataset), "a PairedDataset holds pairs"
    images = extract_features(image_backbone, pictures, cache, progress)
    described = extract_features(text_backbone, texts, cache, None)
    failed = dict(described.failures) | dict(images.failures)
    failures = [(dataset.items[row].id, reason) for row, reason in sorted(failed.items())]
    kept, image_rows, text_rows = np.intersect1d(images.rows, described.rows, return_indices=True)
    if len(kept) == 0:
        reason = f"the first: {failures[0][1]}" if failures else "there is none"
        raise DataError(f"not one pair of {dataset.name} could be read; {reason}")
    place = np.full(len(dataset), -1, dtype=np.int64)
    place[kept] = np.arange(len(kept))
    renumbered = (place[rows] for rows in (split.query, split.database, split.train, split.validation))
    keys = "".join(backbone_key(backbone) for backbone in (image_backbone, text_backbone))
    seen = b"".join(images.contents[row] for row in image_rows)
    made_of = (dataset.fingerprint() + keys).encode() + kept.tobytes() + seen
    features = PairedFeatures(
        name=dataset.name,
        ids=[dataset.items[row].id for row in kept],
        image=images.features[image_rows],
        text=described.features[text_rows],
        labels=dataset.labels()[kept] if dataset.label_names else None,
        label_names=dataset.label_names,
        split=Split(*(rows[rows >= 0] for rows in renumbered)),
        fingerprint=hashlib.sha256(made_of).hexdigest(),
    )
    return Extracted(features, failures)


def load_backbones(
    image: str | Mapping[str, Any], text: str | Mapping[str, Any], device: str, train_texts: Iterable[str] = ()
) -> tuple[Backbone, Backbone]:
    """Both backbones, by name or description.

    Args:
        image: As `load_backbone` takes it.
        text: Likewise; a bag of words without a vocabulary takes that of `train_texts`.
        device: Where to compute: "auto", "cpu", "cuda", ...
        train_texts: Texts of the train rows.
    """
    chosen = str(resolve_device(device))
    image_backbone, text_backbone = load_backbone(image, "image", chosen), load_backbone(text, "text", chosen)
    if isinstance(text_backbone, BagOfWords) and not text_backbone.dim:
        text_backbone.fit(train_texts)
    return image_backbone, text_backbone
