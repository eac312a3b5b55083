"""Settings and scaling of the closed forms."""

import pytest
import torch

from cmh_milvus.methods import cmfh
from cmh_milvus.methods.base import TrainData
from cmh_milvus.methods.cca_itq import CcaItq
from cmh_milvus.methods.cmfh import CMFH, CmfhConfig
from cmh_milvus.methods.lcmh import LCMH, LcmhConfig
from cmh_milvus.methods.scm import SCM


def draw(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def pairs(n=200):
    image = draw(n, 9, 0)
    return TrainData(image, image[:, :7] + 0.5 * draw(n, 7, 1), (image[:, :4] > 0).float())


def bits(method, data):
    method.fit(data, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.stack([method.image_head(data.image) >= 0, method.text_head(data.text) >= 0])


@pytest.mark.parametrize("method_class", [CcaItq, CMFH, LCMH, SCM])
def test_units_of_the_columns_do_not_matter(method_class):
    data, units = pairs(), 2.0 ** torch.arange(-4, 5)
    other = TrainData(data.image * units, data.text * units[:7].flip(0), data.labels)
    one, two = (bits(method_class(d, 8, method_class.Config()), d) for d in (data, other))
    assert torch.equal(one, two)


def test_cmfh_weighs_the_sides():
    """With all of the weight on pictures, their codes do not depend on the texts; the other way round likewise."""
    data = pairs()
    others = {
        "image": TrainData(draw(200, 9, 5), data.text, None),
        "text": TrainData(data.image, draw(200, 7, 6), None),
    }
    for weight, side, ignored in ((1.0, 0, "text"), (0.0, 1, "image")):
        config = CmfhConfig(image_weight=weight)
        one, two = (bits(CMFH(d, 8, config), d)[side] for d in (data, others[ignored]))
        assert torch.equal(one, two)


def test_cmfh_regularises_per_pair_and_turns_the_latent_rows(monkeypatch):
    data, seen = pairs(), []
    update = cmfh.update_basis
    monkeypatch.setattr(cmfh, "update_basis", lambda y, x, gamma: seen.append(gamma) or update(y, x, gamma))
    codes = []
    for order in (torch.arange(8), torch.arange(8).flip(0)):
        turn = torch.eye(8, dtype=torch.float64)[:, order]
        monkeypatch.setattr(cmfh, "itq_rotation", lambda latent, k, iterations, generator, turn=turn: turn)
        codes.append(bits(CMFH(data, 8, CmfhConfig(gamma=0.02)), data))
    assert set(seen) == {0.02 * 200}
    assert torch.equal(codes[0], codes[1].flip(2))


def test_cmfh_ridge_is_relative_to_the_columns(monkeypatch):
    seen, factorize = [], cmfh.factorize
    monkeypatch.setattr(cmfh, "factorize", lambda x, ridge: seen.append((x, ridge)) or factorize(x, ridge))
    bits(CMFH(pairs(), 8, CmfhConfig(ridge=0.5)), pairs())
    for x, ridge in seen:
        assert ridge == pytest.approx(0.5 * x.square().sum(dim=0).mean().item())


def test_lcmh_has_more_clusters_than_bits():
    data = pairs()
    for clusters, expected in ((3, 9), (20, 20), (5000, 200)):
        method = LCMH(data, 8, LcmhConfig(clusters=clusters))
        assert method.image_head.config.centroids == method.text_head.config.centroids == expected


def test_k_means_keeps_the_centroid_of_a_cluster_that_empties():
    from cmh_milvus.methods.lcmh import k_means

    x = torch.tensor([[5.0, 5.0], [9.0, 9.0]]).repeat_interleave(10, dim=0)
    found = k_means(x, 4, 5, torch.Generator().manual_seed(0))
    assert set(map(tuple, found.tolist())) == {(5.0, 5.0), (9.0, 9.0)}
