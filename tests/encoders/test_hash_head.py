"""Hash heads: scaling, layers, modes, fingerprints."""

import numpy as np
import pytest
import torch

from cmh_milvus.encoders.encoder import CrossModalHashEncoder, Tower
from cmh_milvus.encoders.hash_head import (
    FeatureScaling,
    HashHead,
    HashHeadConfig,
    PrincipalComponents,
    relaxed_codes,
)
from cmh_milvus.encoders.tokens import ConceptGathering


def fitted(features):
    scaling = FeatureScaling(features.shape[1])
    scaling.fit(features)
    return scaling


def test_scaling_of_sparse_features():
    """Counts are weighed by idf, other sparse numbers are not; an entry has unit variance on average."""
    generator = torch.Generator().manual_seed(0)
    words = (torch.rand(300, 20, generator=generator) < torch.linspace(0.05, 0.5, 20)).float()
    for features, weighs in ((words, True), (words * 0.5, False)):
        scaling = fitted(features)
        assert bool(scaling.unit_length)
        assert (scaling.weight != 1).any() == weighs
        assert scaling(features).std().item() == pytest.approx(1)
        lengths = scaling(features[features.any(dim=1)]).norm(dim=1)
        torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))


def test_some_zeros_do_not_make_features_sparse():
    """As after a ReLU: non-negative, a third zeros; they are standardised."""
    features = torch.relu(torch.randn(300, 6, generator=torch.Generator().manual_seed(0)) + 0.4)
    assert 0.2 < (features == 0).float().mean() < 0.5
    scaling = fitted(features)
    assert not scaling.unit_length
    torch.testing.assert_close(scaling(features).mean(dim=0), torch.zeros(6), atol=1e-5, rtol=0)


def test_encoding_leaves_the_head_in_its_mode():
    head = HashHead(HashHeadConfig(4, 8, hidden=(6,), batch_norm=True, dropout=0.5))
    x = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
    for training in (True, False):
        head.train(training)
        first = relaxed_codes(head, x)
        assert head.training == training
        np.testing.assert_array_equal(relaxed_codes(head, x), first)


def test_layers_of_a_fitted_head():
    head = HashHead.fitted(torch.randn(20, 4), 8, (6, 5), 0.5, 0.2)
    kinds = [type(layer).__name__ for layer in head.layers]
    assert kinds == ["InputDropout", *["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2]
    assert [layer.p for layer in head.layers if isinstance(layer, torch.nn.Dropout)] == [0.2, 0.5, 0.5]


def words(n, dim):
    """Counts, nine in ten of them 0."""
    generator = torch.Generator().manual_seed(0)
    return torch.poisson(torch.linspace(0.02, 0.3, dim).expand(n, dim), generator)


def test_principal_components_are_those_of_the_decomposition():
    """Against numpy's; a component's sign is free. They are centred and have unit variance on average."""
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 5, 3, 0.1, 0.1, 0.1])
    features += 2
    components = PrincipalComponents(3, 6)
    components.fit(features)
    found = components(features).numpy()
    centred = (features - features.mean(dim=0)).numpy()
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :3] * values[:3]
    expected /= np.sqrt((expected**2).mean())
    np.testing.assert_allclose(np.abs(found), np.abs(expected), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-5)
    assert (found**2).mean() == pytest.approx(1, rel=1e-4)


def test_bags_of_words_alone_have_components():
    dense, bags = torch.randn(30, 12), words(30, 12)
    for features, asked, given in ((dense, 5, 0), (bags, 5, 5), (bags, 100, 12), (bags[:4], 100, 4), (bags, 0, 0)):
        head = HashHead.fitted(features, 8, (6,), components=asked)
        assert head.config.components == given
        assert ("components" in head.config.describe()) == (given > 0)
        assert head.layers[1].in_features == 12 + given
        assert head.output.in_features == 6 + given


def test_components_stand_beside_the_features_and_the_hidden_layer_and_are_not_dropped():
    features = words(30, 12)
    head = HashHead.fitted(features, 8, (6,), 0.5, 0.5, components=5).train()
    seen = []
    head.layers[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    hidden = head.hidden(features)
    scaled = head.scaling(features)
    components = head.components(scaled)
    torch.testing.assert_close(components.mean(dim=0), torch.zeros(5), atol=1e-5, rtol=0)
    assert components.square().mean() == pytest.approx(1, rel=1e-3)  # of scaled features, as they are fitted
    torch.testing.assert_close(seen[0][:, 12:], components)
    torch.testing.assert_close(hidden[:, 6:], components)
    zeros = seen[0][:, :12] == 0
    assert 0.3 < zeros[scaled != 0].float().mean() < 0.7
    torch.testing.assert_close(seen[0][:, :12][~zeros], 2 * scaled[~zeros])


def test_a_head_with_components_is_saved_whole(tmp_path):
    features = words(30, 12)
    heads = [HashHead.fitted(features, 8, (6,), components=5) for _ in range(2)]
    encoder = CrossModalHashEncoder(*(Tower({"name": "x"}, head) for head in heads), device="cpu")
    encoder.save_pretrained(tmp_path / "encoder")
    again = CrossModalHashEncoder.from_pretrained(tmp_path / "encoder", device="cpu")
    assert again.fingerprint == encoder.fingerprint
    x = features.numpy()
    np.testing.assert_array_equal(relaxed_codes(again.towers["text"].head, x), relaxed_codes(heads[1], x))


def test_parts_are_dropped_as_features_are():
    torch.manual_seed(0)
    head = HashHead.fitted(torch.randn(50, 5, 4), 8, (6,), 0.0, 0.3).train()
    seen = []
    head.pooling.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    head(torch.randn(50, 5, 4))
    assert (seen[0] == 0).float().mean() == pytest.approx(0.3, abs=0.05)


def test_fingerprint_follows_the_backbone_that_the_codes_are_of():
    torch.manual_seed(0)
    heads = [HashHead(HashHeadConfig(4, 8)) for _ in range(2)]
    prints = {
        CrossModalHashEncoder(Tower({"revision": revision}, heads[0]), Tower({}, heads[1]), device="cpu").fingerprint
        for revision in "ab"
    }
    assert len(prints) == 2


def test_a_backbone_of_another_revision_is_refused():
    from types import SimpleNamespace

    from cmh_milvus.errors import SettingsError

    config = {"spec": "x", "revision": "1", "modality": "image", "preprocessing": {"size": 8}}
    towers = [Tower(config, HashHead(HashHeadConfig(4, 8))) for _ in range(2)]
    encoder = CrossModalHashEncoder(*towers, device="cpu")
    encoder.use_backbone("image", SimpleNamespace(config=lambda: dict(config)))
    for changed in ({"revision": "2"}, {"preprocessing": {"size": 9}}):
        with pytest.raises(SettingsError, match="another backbone or revision"):
            encoder.use_backbone("image", SimpleNamespace(config=lambda changed=changed: config | changed))


def test_others_may_read_a_saved_encoder(tmp_path):
    towers = [Tower({"name": "x"}, HashHead(HashHeadConfig(4, 8))) for _ in range(2)]
    CrossModalHashEncoder(*towers, device="cpu").save_pretrained(tmp_path / "enc")
    assert (tmp_path / "enc").stat().st_mode & 0o777 == 0o755
    for file in (tmp_path / "enc").iterdir():
        assert file.stat().st_mode & 0o444 == 0o444, file.name


def test_gathering_is_that_of_the_paper_by_default():
    """A part goes to 8 concepts at most, and two transformer layers follow (MITH, section 3.2)."""
    gathering = ConceptGathering(6, 5, 32, 64)
    assert gathering.best == 8
    assert len(gathering.transformer.layers) == 2
    assert [layer.self_attn.num_heads for layer in gathering.transformer.layers] == [4, 4]
    assert ConceptGathering(6, 5, 4, 16).best == 4
