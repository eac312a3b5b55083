"""CCA-ITQ and random projections, against what they must find."""

import numpy as np
import pytest
import torch

from cmh_milvus.encoders.hash_head import FeatureScaling
from cmh_milvus.methods import cca_itq, get_method, make_config
from cmh_milvus.methods.base import TrainData
from cmh_milvus.methods.cca_itq import CcaItq, canonical_directions, cross_products, itq_rotation, projected
from cmh_milvus.methods.cmfh import CMFH
from cmh_milvus.methods.lcmh import LCMH
from cmh_milvus.methods.random_projection import RandomProjection, random_directions
from cmh_milvus.methods.scm import SCM


@pytest.fixture
def paired():
    """300 pairs whose image and text features share 8 hidden numbers, float64 and centred."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(300, 8, generator=generator, dtype=torch.float64)
    views = []
    for dim in (20, 15):
        noise = torch.randn(300, dim, generator=generator, dtype=torch.float64)
        mixing = torch.randn(8, dim, generator=generator, dtype=torch.float64)
        views.append(shared @ mixing + 0.5 * noise)
    return [view - view.mean(dim=0) for view in views]


def test_canonical_directions_have_the_canonical_correlations(paired):
    """Without ridge, CCA's correlations are those of numpy's QR route, and directions are uncorrelated."""
    image, text = paired
    w_image, w_text = canonical_directions(image, text, 6, ridge=1e-12)
    q_image, q_text = (np.linalg.qr(view.numpy())[0] for view in paired)
    expected = np.linalg.svd(q_image.T @ q_text, compute_uv=False)[:6]
    z_image, z_text = image @ w_image, text @ w_text
    found = [float(torch.corrcoef(torch.stack([z_image[:, i], z_text[:, i]]))[0, 1]) for i in range(6)]
    assert np.allclose(found, expected, atol=1e-6)
    covariance = z_image.T @ z_image / len(image)
    assert torch.allclose(covariance, torch.diag(torch.tensor(expected**2)), atol=1e-6), "scaled by correlation"


@pytest.mark.parametrize("ridge", [1e-3, 3.0])
def test_canonical_directions_of_more_columns_than_rows(ridge):
    """Against numpy's square roots of whole covariances; a direction's sign is free, and there are n at most."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(15, 4))
    image = shared @ rng.normal(size=(4, 40)) + rng.normal(size=(15, 40))
    text = shared @ rng.normal(size=(4, 9)) + rng.normal(size=(15, 9))
    image[7] = image[3]  # a rank below n
    views = [view - view.mean(axis=0) for view in (image, text)]
    roots = []
    for view in views:
        covariance = view.T @ view / 15
        values, axes = np.linalg.eigh(
            covariance + ridge * np.trace(covariance) / len(covariance) * np.eye(view.shape[1])
        )
        roots.append(axes / np.sqrt(values) @ axes.T)
    u, correlation, vt = np.linalg.svd(roots[0] @ views[0].T @ views[1] / 15 @ roots[1])
    expected = roots[0] @ u[:, :5] * correlation[:5], roots[1] @ vt[:5].T * correlation[:5]
    found = canonical_directions(torch.tensor(views[0]), torch.tensor(views[1]), 5, ridge)
    for w, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.abs(w.numpy()), np.abs(reference), rtol=1e-6, atol=1e-9)
    most = canonical_directions(torch.tensor(views[0]), torch.tensor(views[0]), 30, ridge)
    assert [w.shape for w in most] == 2 * [(40, 15)]


@pytest.mark.parametrize("name", ["cca_itq", "canon", "scm"])
def test_bags_of_many_words(name):
    """Covariances of 6,000 columns would take minutes."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    text = (torch.rand(50, 6000) > 0.99).float()
    data = TrainData(torch.randn(50, 20), text, (torch.rand(50, 3) > 0.5).float())
    method_class = get_method(name)
    method = method_class(data, 64, make_config(method_class, {"hidden": 8} if name == "canon" else {}))
    if method_class.closed_form:
        method.fit(data, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.isfinite(method.eval().text_head(text)).all()


def test_products_by_blocks_are_the_products_in_double_precision(paired, monkeypatch):
    monkeypatch.setattr(cca_itq, "BLOCK", 7)
    image, text = (view.float() for view in paired)
    directions = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(cross_products(image, text), image.double().T @ text.double())
    torch.testing.assert_close(projected(image, directions), image.double() @ directions)
    assert cross_products(image, text).dtype == projected(image, directions).dtype == torch.float64


@pytest.mark.parametrize("method_class", [CcaItq, CMFH, LCMH, SCM])
def test_blocks_do_not_change_the_codes(method_class, small_train_data, monkeypatch):
    """400 real pairs in blocks of 64 rows get the codes that one block of all rows gives."""
    codes = []
    for block in (64, 10_000):
        monkeypatch.setattr(cca_itq, "BLOCK", block)
        method = method_class(small_train_data, 32, method_class.Config())
        method.fit(small_train_data, torch.Generator().manual_seed(0))
        with torch.no_grad():
            codes += [(method.image_head(small_train_data.image) >= 0, method.text_head(small_train_data.text) >= 0)]
    for few, many in zip(*codes, strict=True):
        assert (few == many).float().mean() > 0.999


@pytest.mark.parametrize("unit", [1e-9, 1.0])
def test_unit_of_dense_features_does_not_matter(unit):
    features = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    features[:, 1] *= 1e-8  # the rounding of a column that is constant
    features[:, 2] = 0.3
    scaling = FeatureScaling(4)
    scaling.fit(features * unit)
    expected = (features - features.mean(dim=0)) / features.std(dim=0, unbiased=False)
    expected[:, [1, 2]] = 0
    torch.testing.assert_close(scaling(features * unit), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method_class", [CcaItq, CMFH, SCM])
def test_activations_are_centred_on_bags_of_words(method_class, small_train_data):
    """Scaling centres dense features but not sparse ones: there, the bias of the output layer has to."""
    words = torch.rand(400, 50, generator=torch.Generator().manual_seed(0)) < torch.linspace(0.02, 0.4, 50)
    train = TrainData(small_train_data.image, words.float(), small_train_data.labels)
    method = method_class(train, 16, method_class.Config())
    method.fit(train, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for head, features in ((method.image_head, train.image), (method.text_head, train.text)):
            activations = head(features)
            assert (activations.mean(dim=0).abs() < 1e-3 * activations.std(dim=0)).all()


def test_itq_rotation_is_orthogonal_and_quantizes_better_than_chance(paired):
    projections = paired[0][:, :8]

    def loss(rotation):
        rotated = projections @ rotation
        codes = torch.where(rotated >= 0, 1.0, -1.0).double()
        return float((codes - rotated).square().sum())

    losses = [loss(itq_rotation(projections, 8, i, torch.Generator().manual_seed(0))) for i in (0, 1, 5, 50)]
    assert losses == sorted(losses, reverse=True)
    rotation = itq_rotation(projections, 8, 50, torch.Generator().manual_seed(0))
    assert torch.allclose(rotation @ rotation.T, torch.eye(8, dtype=torch.float64), atol=1e-9)
    wide = itq_rotation(projections, 24, 5, torch.Generator().manual_seed(0))
    assert torch.allclose(wide @ wide.T, torch.eye(8, dtype=torch.float64), atol=1e-9)


def test_cca_itq_brings_pairs_together(paired):
    image, text = (view.float() for view in paired)
    data = TrainData(image, text, None)
    method = CcaItq(data, 32, CcaItq.Config())
    method.fit(data, torch.Generator().manual_seed(0))
    codes = [(head(x) >= 0).float() for head, x in ((method.image_head, image), (method.text_head, text))]
    distance = torch.cdist(codes[0], codes[1], p=1)
    assert distance.diagonal().mean() < 0.5 * distance.mean()


def test_random_directions_are_orthonormal_in_blocks():
    directions = random_directions(12, 32, torch.Generator().manual_seed(0))
    assert directions.shape == (32, 12)
    for start in (0, 12, 24):
        block = directions[start : start + 12]
        assert torch.allclose(block @ block.T, torch.eye(len(block)), atol=1e-5)


def test_random_projections_share_directions_where_dimensions_agree():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(500, 40, generator=generator) + 3
    data = TrainData(image, image - 7, None)
    method = RandomProjection(data, 64, RandomProjection.Config())
    method.fit(data, torch.Generator().manual_seed(1))
    codes = [(head(x) >= 0) for head, x in ((method.image_head, data.image), (method.text_head, data.text))]
    # Only rounding of activations near 0 tells the two apart: the text is the image, shifted.
    assert (codes[0] == codes[1]).float().mean() > 0.999
    assert ((codes[0].float().mean(dim=0) - 0.5).abs() < 0.1).all(), "centred, so bits are balanced"
    # The share of differing bits is the angle between items (Charikar 2002, section 3).
    centred = torch.nn.functional.normalize(image - image.mean(dim=0), dim=1)
    angle = torch.acos((centred @ centred.T).clamp(-1, 1)) / torch.pi
    differing = torch.cdist(codes[0].float(), codes[0].float(), p=1) / 64
    upper = torch.triu_indices(500, 500, 1)
    assert abs(float((differing - angle)[upper[0], upper[1]].mean())) < 0.01
