"""SCM's directions against the definition with all pairs."""

import pytest
import torch

from cmh_milvus.methods import scm
from cmh_milvus.methods.base import TrainData
from cmh_milvus.methods.cca_itq import inverse_root
from tests.reference import methods_supervised as reference


@pytest.fixture
def case():
    draw = {"generator": torch.Generator().manual_seed(8), "dtype": torch.float64}
    labels = (torch.rand(30, 4, **draw) < 0.4).double()
    return torch.randn(30, 6, **draw), torch.randn(30, 5, **draw), labels


def test_inverse_root(case):
    features = case[0]
    root = inverse_root(features, 0.5)
    covariance = features.T @ features / 30
    ridge = 0.5 * covariance.trace() / 6
    torch.testing.assert_close(root @ (covariance + ridge * torch.eye(6)) @ root, torch.eye(6, dtype=torch.float64))


def test_bits_maximise_what_the_earlier_ones_left(case):
    """Against C_k made of all pairs and a full SVD."""
    image, text, labels = case
    image_maps, text_maps = scm.sequential_directions(image, text, labels, 8)
    left = 8 * reference.scm_first_objective(image, text, labels)
    for k in range(8):
        w_x, w_y = image_maps[:, k], text_maps[:, k]
        assert float(w_x @ left @ w_y) == pytest.approx(float(torch.linalg.svdvals(left)[0]), rel=1e-8)
        assert float(w_x.norm()) == pytest.approx(1)
        bits = [[1.0 if value >= 0 else -1.0 for value in features @ w] for features, w in ((image, w_x), (text, w_y))]
        for i, j in reference.pairs(image, text):
            left = left - bits[0][i] * bits[1][j] * torch.outer(image[i], text[j])


def test_labels_and_items_in_another_order_change_nothing(case):
    image, text, labels = (part.float() for part in case)

    def codes(rows, columns):
        data = TrainData(image[rows], text[rows], labels[rows][:, columns])
        torch.manual_seed(0)
        method = scm.SCM(data, 8, scm.ScmConfig())
        method.fit(data, torch.Generator())
        return method.image_head(image) >= 0

    expected = codes(torch.arange(30), [0, 1, 2, 3])
    got = codes(torch.randperm(30, generator=torch.Generator().manual_seed(1)), [2, 0, 3, 1])
    same = (got == expected).all(dim=0) | (got != expected).all(dim=0)  # a direction's sign is free
    assert same.all()
