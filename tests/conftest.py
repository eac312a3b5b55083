"""Settings and real data shared by the tests."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import numpy as np
import pytest

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def emoji():
    """The emoji pairs."""
    from cmh_milvus.datasets.emoji import load_emoji

    return load_emoji()


@pytest.fixture(scope="session")
def backbones():
    """The quick start's backbones, loaded: image, text."""
    from cmh_milvus.feature_extraction import load_backbones

    return load_backbones("efficientnet-lite2", "all-minilm-l6-v2", "cpu")


@pytest.fixture(scope="session")
def emoji_features(emoji, backbones):
    """Shipped features of the emoji, with 200 validation rows cut."""
    from cmh_milvus.datasets.base import cut_validation
    from cmh_milvus.datasets.emoji import EMOJI_FEATURES
    from cmh_milvus.encoders.feature_cache import FeatureCache
    from cmh_milvus.feature_extraction import extract_pairs

    split = cut_validation(emoji.split, 200)
    extracted = extract_pairs(emoji, *backbones, split=split, cache=FeatureCache(EMOJI_FEATURES, read_only=True))
    assert extracted.failures == []
    return extracted.features


@pytest.fixture(scope="session")
def trained(emoji_features):
    """DUET heads of 64 bits after a few epochs: enough to find things."""
    from cmh_milvus.training import TrainingSettings, train

    settings = TrainingSettings(method_settings={"epochs": 8, "hidden": 256}, device="cpu", refit=False)
    return train(emoji_features, settings)


@pytest.fixture(scope="session")
def encoder_folder(trained, backbones, tmp_path_factory):
    """Folder of the encoder made of `trained`."""
    from cmh_milvus.encoders.encoder import CrossModalHashEncoder, Tower

    folder = tmp_path_factory.mktemp("encoder") / "emoji-64"
    towers = [
        Tower(backbone.config(), head)
        for backbone, head in zip(backbones, (trained.image_head, trained.text_head), strict=True)
    ]
    CrossModalHashEncoder(*towers, device="cpu").save_pretrained(folder, training=trained.record)
    return folder


@pytest.fixture(scope="session")
def encoder(encoder_folder, backbones):
    """The encoder, loaded from its folder."""
    from cmh_milvus.encoders.encoder import CrossModalHashEncoder

    loaded = CrossModalHashEncoder.from_pretrained(encoder_folder, device="cpu")
    for modality, backbone in zip(("image", "text"), backbones, strict=True):
        loaded.use_backbone(modality, backbone)
    return loaded


@pytest.fixture(scope="session")
def emoji_codes(encoder, emoji_features):
    """Packed codes of all emoji by modality."""
    from cmh_milvus.comparison import encode_pairs, packed

    return packed(encode_pairs(encoder, emoji_features))


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny CLIP model of random weights."""
    from tests.tiny_models import save_model

    return save_model(tmp_path_factory.mktemp("clip"), "clip")


@pytest.fixture
def rng():
    return np.random.default_rng(0)
