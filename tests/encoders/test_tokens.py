"""Token matrices and what heads make of them, against loops over items, parts and concepts."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from cmh_milvus.encoders.encoder import CrossModalHashEncoder, Tower
from cmh_milvus.encoders.hash_head import HashHead, HashHeadConfig, relaxed_codes
from cmh_milvus.encoders.tokens import (
    ConceptGathering,
    TokenPooling,
    is_present,
    item_vectors,
    masked_softmax,
    picture_tokens,
    sinusoids,
    text_tokens,
)
from cmh_milvus.errors import SettingsError

N, PARTS, DIM = 40, 6, 5


@pytest.fixture
def features():
    """Token matrices; item i has i % 6 + 1 parts, but item 4, which has none."""
    matrix = torch.randn(N, 1 + PARTS, DIM, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for i in range(N):
        matrix[i, 2 + i % PARTS :] = 0
    matrix[4, 1:] = 0
    return matrix


def fitted(features, n_bits=8, **settings):
    torch.manual_seed(1)
    head = HashHead.fitted(features, n_bits, (16,), 0.5, 0.2, **settings)
    head(features)  # statistics of the batch normalisation
    return head.eval()


def test_one_vector_an_item(features):
    assert torch.equal(item_vectors(features), features[:, 0])
    vectors = np.ones((3, 4), dtype=np.float32)
    assert item_vectors(vectors) is vectors


@pytest.mark.parametrize(("side", "cells"), [(9, [(0, 3), (3, 6), (6, 9)]), (7, [(0, 3), (2, 5), (4, 7)])])
def test_places_of_a_picture(side, cells):
    """Row by row; where the map does not divide, cells overlap."""
    maps, whole = torch.randn(2, 4, side, side), torch.randn(2, 4)
    tokens = picture_tokens(whole, maps, 3)
    assert torch.equal(tokens[:, 0], whole)
    place = 1
    for top, bottom in cells:
        for left, right in cells:
            expected = maps[:, :, top:bottom, left:right].mean(dim=(2, 3))
            torch.testing.assert_close(tokens[:, place], expected)
            place += 1
    assert tokens.shape[1] == place


def test_words_of_a_text():
    hidden, whole = torch.randn(3, 5, 4), torch.randn(3, 4)
    is_word = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    tokens = text_tokens(whole, hidden, is_word, 2)
    assert torch.equal(tokens[:, 0], whole)
    torch.testing.assert_close(tokens[0, 1], hidden[0, 1] / hidden[0, 1].norm())
    torch.testing.assert_close(tokens[0, 2], hidden[0, 2] / hidden[0, 2].norm())
    torch.testing.assert_close(tokens[1, 1], hidden[1, 1] / hidden[1, 1].norm())
    assert not tokens[1, 2:].any()
    assert not tokens[2, 1:].any()


def test_weights_of_what_is_there():
    scores, allowed = torch.randn(2, 3, 2), torch.tensor([[[1, 0], [1, 1], [0, 0]], [[0, 1], [0, 1], [0, 0]]]).bool()
    weights = masked_softmax(scores, allowed)
    for i in range(2):
        for m in range(2):
            kept = [t for t in range(3) if allowed[i, t, m]]
            total = sum(math.exp(scores[i, t, m]) for t in kept)
            for t in range(3):
                expected = math.exp(scores[i, t, m]) / total if t in kept else 0.0
                assert weights[i, t, m].item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_pooling_equals_the_loop_over_the_parts_that_are_there(features):
    parts = features[:, 1:]
    pooling = TokenPooling(PARTS, DIM, 16)
    pooled = pooling(parts, is_present(parts))
    for i in range(N):
        there = [] if i == 4 else range(1 + i % PARTS)
        described = [
            torch.nn.functional.gelu(pooling.norm(pooling.project(parts[i, t]) + pooling.position[t])) for t in there
        ]
        for h in range(8):
            scores = [math.exp(pooling.score(x)[h]) for x in described]
            for c in (0, 1):
                mean = sum(s * x[2 * h + c] for s, x in zip(scores, described, strict=True)) / sum(scores or [1.0])
                torch.testing.assert_close(pooled[i, 2 * h + c], torch.as_tensor(mean, dtype=torch.float32))


@torch.no_grad()
def test_gathering_equals_the_loop(features):
    """Before the transformer; two best concepts of four."""
    parts = features[:, 1:]
    gathering = ConceptGathering(PARTS, DIM, 4, 16, best=2)
    gathering.transformer = torch.nn.Identity()
    concepts = gathering(parts, is_present(parts)).reshape(N, 4, 16)
    for i in range(N):
        there = [] if i == 4 else range(1 + i % PARTS)
        members = {k: [] for k in range(4)}
        for t in there:
            scores = torch.tanh(gathering.score(parts[i, t]))
            for k in sorted(range(4), key=lambda k: -scores[k])[:2]:
                if scores[k] > 0:
                    members[k].append((math.exp(scores[k]), gathering.value(parts[i, t]) + gathering.position[t]))
        for k in range(4):
            expected = gathering.place[k]
            if members[k]:
                expected = expected + sum(w * v for w, v in members[k]) / sum(w for w, _ in members[k])
            torch.testing.assert_close(concepts[i, k], expected, rtol=1e-4, atol=1e-5)


def test_sinusoids():
    table = sinusoids(5, 6)
    for place in range(5):
        for j in range(3):
            angle = place / 10_000 ** (2 * j / 6)
            assert table[place, 2 * j].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[place, 2 * j + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


@pytest.mark.parametrize("concept", [0, 16], ids=["pooled", "gathered"])
class TestHead:
    def test_code_depends_on_the_item_alone(self, features, concept):
        head = fitted(features, concept=concept)
        together = relaxed_codes(head, features.numpy())
        alone = np.concatenate([relaxed_codes(head, features[i : i + 1].numpy()) for i in range(N)])
        np.testing.assert_allclose(together, alone, atol=1e-5)
        assert together.shape == (N, 8)
        assert np.isfinite(together).all()

    def test_order_and_presence_of_parts_count(self, features, concept):
        head = fitted(features, concept=concept)
        full = features[5:6]  # six parts
        swapped = full[:, [0, 2, 1, 3, 4, 5, 6]]
        shorter = full.clone()
        shorter[:, 6] = 0
        for other in (swapped, shorter):
            assert (head(other) - head(full)).abs().max() > 1e-4

    def test_gradients_reach_every_weight(self, features, concept):
        head = fitted(features, concept=concept).train()
        head(features).square().sum().backward()
        for name, weight in head.named_parameters():
            assert weight.grad is not None, name
            assert torch.isfinite(weight.grad).all(), name

    def test_scaling_is_that_of_the_whole_and_of_present_parts(self, features, concept):
        head = fitted(features, concept=concept)
        torch.testing.assert_close(head.scaling.shift, features[:, 0].mean(dim=0))
        rows = torch.stack([row for item in features for row in item[1:] if row.any()])
        torch.testing.assert_close(head.token_scaling.shift, rows.mean(dim=0))
        torch.testing.assert_close(head.token_scaling.gain, 1 / rows.std(dim=0, unbiased=False))

    def test_folder_and_truncation(self, features, concept, tmp_path):
        config = {"spec": f"precomputed:{1 + PARTS}x{DIM}", "name": "precomputed", "revision": "given"}
        heads = [fitted(features, 16, concept=concept), fitted(features[:, 0], 16)]
        towers = [Tower(config, heads[0]), Tower({**config, "spec": f"precomputed:{DIM}"}, heads[1])]
        encoder = CrossModalHashEncoder(*towers, device="cpu")
        encoder.save_pretrained(tmp_path / "encoder")
        loaded = CrossModalHashEncoder.from_pretrained(tmp_path / "encoder", device="cpu")
        codes = encoder.encode_features("image", features.numpy())
        np.testing.assert_array_equal(loaded.encode_features("image", features.numpy()), codes)
        assert loaded.fingerprint == encoder.fingerprint
        assert loaded.backbone("image").tokens == 1 + PARTS
        short = loaded.truncated(8).encode_features("image", features.numpy())
        np.testing.assert_allclose(short, codes[:, :8], atol=1e-6)
        for wrong in (features[:, 0], features[:, :-1], features[:, :, :-1]):
            with pytest.raises(SettingsError, match=r"image tower takes features of shape \(n, 7, 5\)"):
                encoder.encode_features("image", wrong.numpy())
        with pytest.raises(SettingsError, match=r"text tower takes features of shape \(n, 5\)"):
            encoder.encode_features("text", features[:, 0, :4].numpy())


def test_items_without_any_parts():
    """As where no text of the train rows has a word."""
    features = torch.zeros(9, 3, 4)
    features[:, 0] = torch.randn(9, 4)
    for concept in (0, 16):
        assert torch.isfinite(fitted(features, concept=concept)(features)).all()


def test_head_without_tokens_reads_the_whole_item(features):
    head = fitted(features[:, 0])
    assert torch.equal(head(features), head(features[:, 0]))


def test_description_of_a_head_without_tokens_is_that_of_older_folders():
    """Else their fingerprints would change, and collections refuse them."""
    old = {
        "in_dim": 4, "n_bits": 8, "hidden": (3,), "batch_norm": True, "dropout": 0.5, "input_dropout": 0.2,
        "centroids": 0,
    }  # fmt: skip
    assert HashHeadConfig(**old).describe() == old
    new = HashHeadConfig(**old, tokens=3, pooled=8)
    assert HashHeadConfig(**json.loads(json.dumps(new.describe()))) == dataclasses.replace(new, hidden=[3])
