"""Small data for the tests of methods: real emoji features, and random ones for formulas."""

import dataclasses

import numpy as np
import pytest
import torch

from cmh_milvus.datasets.base import Split
from cmh_milvus.methods import get_method
from cmh_milvus.methods.base import TrainData
from cmh_milvus.training import TrainingSettings

N_TRAIN, N_QUERY = 400, 60

SMALL = {
    "hidden": 64,
    "width": 64,
    "epochs": 15,
    "batch_size": 50,
    "negatives": 64,
    "clusters": 60,
    "pretraining": 12,
}
"""Settings that make any method quick; those that a method does not have are left out."""


def small_settings(method):
    """Settings for a small data set, and the paper-sized ones left out."""
    fields = {field.name: field.default for field in dataclasses.fields(method.Config)}
    settings = {name: value for name, value in SMALL.items() if name in fields}
    if "negatives" in settings:
        settings["negatives"] = min(settings["negatives"], fields["negatives"])
    return settings


def device_settings(name, device):
    """A short training of a method on `device`: an epoch, or one of each of its two kinds."""
    method = get_method(name)
    settings = small_settings(method)
    if not method.closed_form:
        first = {field.name for field in dataclasses.fields(method.Config)} & {"pretraining", "warm_up"}
        settings |= {"epochs": 1 + len(first)} | dict.fromkeys(first, 1)
    return TrainingSettings(name, 16, settings, device=device)


@pytest.fixture(scope="session")
def small_emoji(emoji_features):
    """Emoji pairs of the commonest labels: 400 to train on, 60 queries."""
    rows = np.random.default_rng(0).permutation(len(emoji_features.ids))[: N_TRAIN + N_QUERY]
    train, query = np.sort(rows[:N_TRAIN]), np.sort(rows[N_TRAIN:])
    split = Split(query=query, database=train, train=train, validation=np.zeros(0, dtype=np.int64))
    return dataclasses.replace(emoji_features, split=split)


@pytest.fixture
def small_train_data(small_emoji):
    """The train rows of `small_emoji`, with labels."""
    rows = small_emoji.split.train
    return TrainData(
        torch.from_numpy(small_emoji.image[rows]),
        torch.from_numpy(small_emoji.text[rows]),
        torch.from_numpy(small_emoji.labels[rows].astype(np.float32)),
    )


@pytest.fixture(scope="session")
def small_tokens(small_emoji):
    """`small_emoji` with made-up parts after each whole item: four, two or none, of some of its features each."""
    rng = np.random.default_rng(0)

    def tokens(features):
        matrices = np.zeros((len(features), 5, features.shape[1]), dtype=np.float32)
        matrices[:, 0] = features
        for place in range(1, 5):
            rows = np.arange(len(features)) % 3 > (0 if place < 3 else 1)
            matrices[rows, place] = features[rows] * (rng.random(features.shape[1]) < 0.3)
        return matrices

    return dataclasses.replace(small_emoji, image=tokens(small_emoji.image), text=tokens(small_emoji.text))
