"""MESDCH's divergence against loops."""

import pytest
import torch

from cmh_milvus.methods import mesdch
from cmh_milvus.methods.base import TrainData, cosines
from tests.reference import methods_supervised as reference


@pytest.fixture
def case():
    draw = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64}
    labels = (torch.rand(7, 4, **draw) < 0.4).double()
    labels[1] = 0  # an item without labels
    return torch.randn(3, 8, **draw).requires_grad_(), torch.randn(7, 8, **draw), labels


def test_divergence_and_its_gradient_equal_the_loops(case):
    codes, buffer, labels = case
    ours = mesdch.divergence(codes, buffer, cosines(labels[:3], labels))
    slow = reference.mesdch_divergence(codes, buffer, labels[:3], labels)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(torch.autograd.grad(ours, codes), torch.autograd.grad(slow, codes))


def test_divergence_is_not_negative_and_nil_at_the_target():
    labels = torch.eye(4, dtype=torch.float64)
    cosine = cosines(labels, labels)
    assert mesdch.divergence(labels, labels, cosine) == pytest.approx(0, abs=1e-12)
    other = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert mesdch.divergence(other, labels, cosine) > 0


def test_each_pass_has_the_terms_of_its_equation(case):
    *_, labels = case
    data = TrainData(torch.randn(7, 5), torch.randn(7, 6), labels.float())
    method = mesdch.MESDCH(data, 8, mesdch.MesdchConfig(hidden=4, alpha=0.2, beta=0.5, gamma=0.7)).eval()
    batch = data.rows(torch.tensor([4, 1, 6]))
    for phase, codes in (
        ("label", torch.tanh(method.label_net(batch.labels))),
        ("image", torch.tanh(method.image_head(batch.image))),
        ("text", torch.tanh(method.text_head(batch.text))),
    ):
        (step,) = method.steps(batch, phase)
        buffers = {"label": method.label_buffer, "image": method.image_buffer, "text": method.text_buffer}
        weights = {"image": 1.0, "text": 0.2} if phase == "label" else {"label": 1.0}
        expected = {
            f"{phase}_{other}": weight * reference.mesdch_divergence(codes, buffers[other], batch.labels, data.labels)
            for other, weight in weights.items()
        }
        own = reference.mesdch_divergence(codes, buffers[phase], batch.labels, data.labels)
        expected[f"{phase}_own"] = 0.5 * own
        expected[f"{phase}_quantization"] = 0.7 * reference.square_sum(codes, method.code_buffer[batch.index]) / 24
        assert step.terms.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(step.terms[name], value.float(), rtol=1e-4, atol=1e-5, msg=name)
