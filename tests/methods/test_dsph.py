"""DSPH's terms against loops, and its threshold against known codes."""

import pytest
import torch

from cmh_milvus.methods import dsph
from cmh_milvus.methods.base import TrainData
from tests.reference import methods_supervised as reference


@pytest.fixture
def case():
    draw = {"generator": torch.Generator().manual_seed(2), "dtype": torch.float64}
    labels = (torch.rand(6, 5, **draw) < 0.35).double()
    codes, others = (torch.randn(6, 8, **draw).requires_grad_() for _ in range(2))
    return codes, others, torch.randn(5, 8, **draw).requires_grad_(), labels


@pytest.mark.parametrize("t", [0.0, 0.25, -0.1])
def test_proxy_loss_and_its_gradients_equal_the_loops(case, t):
    codes, _, proxies, labels = case
    ours = dsph.proxy_loss(codes, proxies, labels, t)
    slow = reference.dsph_proxy_loss(codes, proxies, labels, t)
    torch.testing.assert_close(ours, slow)
    for got, expected in zip(
        torch.autograd.grad(ours, (codes, proxies)), torch.autograd.grad(slow, (codes, proxies)), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_irrelevant_loss_and_its_gradients_equal_the_loops(case):
    codes, others, _, labels = case
    labels[0], labels[1] = torch.tensor([1.0, 1, 0, 0, 0]), torch.tensor([0.0, 0, 1, 1, 0])  # a pair of that kind
    ours = dsph.irrelevant_loss(codes, others, dsph.irrelevant_pairs(labels), -0.2)
    slow = reference.dsph_irrelevant_loss(codes, others, labels, -0.2)
    assert slow.item() > 0
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(torch.autograd.grad(ours, (codes, others)), torch.autograd.grad(slow, (codes, others)))


def test_no_such_pair_costs_nothing(case):
    codes, others, _, _ = case
    assert dsph.irrelevant_loss(codes, others, dsph.irrelevant_pairs(torch.eye(6)[:, :5].double()), 0.0) == 0


def test_a_step_moves_heads_and_proxies_by_eq_4(case):
    *_, labels = case
    labels[0], labels[1] = torch.tensor([1.0, 1, 0, 0, 0]), torch.tensor([0.0, 0, 1, 1, 0])
    data = TrainData(torch.randn(6, 7), torch.randn(6, 9), labels.float())
    method = dsph.DSPH(data, 8, dsph.DsphConfig(hidden=4, alpha=0.6)).eval().double()
    method.threshold = -0.2
    batch = TrainData(data.image.double(), data.text.double(), labels).rows(torch.tensor([4, 0, 3, 1]))
    heads, proxies = method.steps(batch, "joint")
    image, text = torch.tanh(method.image_head(batch.image)), torch.tanh(method.text_head(batch.text))
    near = {
        f"{m}_proxy": (reference.dsph_proxy_loss, codes, method.proxies)
        for m, codes in (("image", image), ("text", text))
    }
    expected = {name: loss(codes, others, batch.labels, -0.2) for name, (loss, codes, others) in near.items()}
    sides = [(image, image), (text, text), (image, text)]
    expected["irrelevant"] = 0.6 * sum(reference.dsph_irrelevant_loss(u, v, batch.labels, -0.2) for u, v in sides)
    assert expected["irrelevant"] > 0
    assert heads.optimizer == "heads"
    assert heads.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(heads.terms[name], value, msg=name)
    assert proxies.optimizer == "proxies"
    (loss,) = proxies.terms.values()
    torch.testing.assert_close(loss, expected["image_proxy"] + expected["text_proxy"])
    loss.backward()
    assert method.proxies.grad.abs().sum() > 0
    assert method.image_head.output.weight.grad is None, "the proxies' step is theirs alone"


def test_labels_in_another_order_change_nothing(case):
    codes, _, proxies, labels = case
    order = [3, 0, 4, 1, 2]
    permuted = dsph.proxy_loss(codes, proxies[order], labels[:, order], 0.0)
    torch.testing.assert_close(permuted, dsph.proxy_loss(codes, proxies, labels, 0.0))


@pytest.mark.parametrize(
    ("n_bits", "n_labels", "best_known"),
    [(16, 24, 8), (32, 24, 16), (64, 24, 32), (128, 24, 64), (64, 80, 32), (64, 10, 33), (128, 10, 68), (16, 80, 6)],
)
def test_bound_is_the_distance_of_best_known_codes(n_bits, n_labels, best_known):
    assert dsph.distance_bound(n_bits, n_labels) == best_known


def test_one_label_is_possible():
    assert dsph.threshold(16, 1) == -1.0
