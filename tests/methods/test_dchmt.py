"""DCHMT's loss against loops over bits and pairs."""

import pytest
import torch

from cmh_milvus.methods import dchmt
from cmh_milvus.methods.base import TrainData
from cmh_milvus.methods.dcmh import label_similarity
from tests.reference import methods_supervised as reference


@pytest.mark.parametrize("theta", [0.25, 0.75])
def test_loss_and_its_gradients_equal_the_loops(theta):
    draw = {"generator": torch.Generator().manual_seed(4), "dtype": torch.float64}
    image, text = (torch.randn(5, 8, **draw).requires_grad_() for _ in range(2))
    labels = (torch.rand(5, 4, **draw) < 0.4).double()
    ours = dchmt.selection_loss(
        dchmt.select(image), dchmt.select(text), label_similarity(labels, labels), dchmt.margin(8, theta)
    )
    slow = reference.dchmt_loss(image, text, labels, theta)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(torch.autograd.grad(ours, (image, text)), torch.autograd.grad(slow, (image, text)))


def test_a_step_adds_both_modalities_and_what_is_between():
    draw = {"generator": torch.Generator().manual_seed(4)}
    labels = (torch.rand(9, 4, **draw) < 0.4).float()
    data = TrainData(torch.randn(9, 7, **draw), torch.randn(9, 5, **draw), labels)
    method = dchmt.DCHMT(data, 8, dchmt.DchmtConfig(hidden=4, theta=0.6)).eval()
    batch = data.rows(torch.tensor([5, 0, 2, 8]))
    (step,) = method.steps(batch, "joint")
    image, text = method.image_head(batch.image), method.text_head(batch.text)
    assert step.terms.keys() == {"between", "images", "texts"}
    for name, sides in (("between", (image, text)), ("images", (image, image)), ("texts", (text, text))):
        slow = reference.dchmt_loss(*sides, batch.labels, 0.6)
        torch.testing.assert_close(step.terms[name], slow, rtol=1e-4, atol=1e-5, msg=name)


def test_sure_codes_are_apart_by_twice_the_hamming_distance():
    activations = 100 * torch.tensor([[1.0, 1, -1, -1], [1, -1, 1, -1], [1, 1, -1, 1]])
    codes = dchmt.select(activations)
    assert torch.equal(dchmt.squared_distances(codes, codes), 2 * torch.tensor([[0.0, 2, 1], [2, 0, 3], [1, 3, 0]]))


def test_the_larger_score_is_the_bit():
    scores = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    activations = scores[:, 1] - scores[:, 0]
    second = dchmt.select(activations[:, None])[:, 0]
    torch.testing.assert_close(second, torch.softmax(scores, dim=1)[:, 1])
    assert torch.equal(activations >= 0, scores.argmax(dim=1) == 1)


def test_an_item_and_itself_have_a_finite_gradient():
    activations = torch.zeros(3, 4, requires_grad=True)
    codes = dchmt.select(activations)
    dchmt.selection_loss(codes, codes, torch.zeros(3, 3), 2.0).backward()
    assert torch.isfinite(activations.grad).all()
