"""DCMH's terms and gradients against loops, and its algorithm."""

import pytest
import torch

from cmh_milvus.methods import dcmh
from cmh_milvus.methods.base import TrainData
from cmh_milvus.methods.dcmh import (
    DCMH,
    DcmhConfig,
    bit_balance,
    label_similarity,
    negative_log_likelihood,
    quantization,
)
from tests.reference import methods_supervised as reference


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(3)
    draw = {"generator": generator, "dtype": torch.float64}
    labels = (torch.rand(9, 4, **draw) < 0.4).double()
    codes = torch.randn(4, 8, **draw).requires_grad_()
    return codes, torch.randn(9, 8, **draw), labels[:4], labels


def gradient(value, *arguments):
    return torch.autograd.grad(value, arguments)


def test_similarity_is_a_shared_label(case):
    _, _, labels, all_labels = case
    expected = [[float(reference.shares_label(a, b)) for b in all_labels] for a in labels]
    assert label_similarity(labels, all_labels).tolist() == expected


def test_estimated_likelihood_is_unbiased_and_its_gradient_exact(monkeypatch):
    """Every third train row is counted: the mean over the three choices of those rows is the sum over all pairs."""
    monkeypatch.setattr(dcmh, "BLOCK", 96)  # three blocks and a short one
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(48, 16, generator=generator).requires_grad_()
    buffer, labels = torch.randn(300, 16, generator=generator), (torch.rand(300, 5, generator=generator) < 0.3).float()
    whole = negative_log_likelihood(codes, buffer, labels[:48], labels)
    estimates = [
        negative_log_likelihood(codes, buffer.roll(-shift, 0), labels[:48], labels.roll(-shift, 0), counted=100)
        for shift in range(3)
    ]
    assert len({value.item() for value in estimates}) == 3
    torch.testing.assert_close(torch.stack(estimates).mean(), whole)
    (expected,) = gradient(whole, codes)
    for value in estimates:
        torch.testing.assert_close(gradient(value, codes)[0], expected)


def test_estimated_likelihood_of_equal_train_rows_is_exact(monkeypatch):
    """Also where the counted rows are no whole share of a block."""
    monkeypatch.setattr(dcmh, "BLOCK", 95)
    codes, buffer = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)), torch.ones(250, 16)
    labels = torch.ones(250, 2)
    whole = negative_log_likelihood(codes, buffer, labels[:8], labels)
    torch.testing.assert_close(negative_log_likelihood(codes, buffer, labels[:8], labels, counted=30), whole)


def test_likelihood_and_its_gradient_equal_the_loops(case):
    codes, buffer, labels, all_labels = case
    ours = negative_log_likelihood(codes, buffer, labels, all_labels)
    slow = reference.likelihood_sum(codes, buffer, labels, all_labels)
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(gradient(3 * ours, codes), gradient(3 * slow, codes))


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_analytic_gradient_equals_autograd_in_single_precision(scale):
    """To 10^-6 of its length, also where log(1 + exp) overflows."""
    generator = torch.Generator().manual_seed(0)
    codes = (scale * torch.randn(32, 64, generator=generator)).requires_grad_()
    buffer = torch.randn(2500, 64, generator=generator)  # more than two blocks
    labels = (torch.rand(2500, 20, generator=generator) < 0.1).float()
    similarity = label_similarity(labels[:32], labels)
    theta = 0.5 * codes @ buffer.T
    value = (torch.nn.functional.softplus(theta) - similarity * theta).sum()
    ours = negative_log_likelihood(codes, buffer, labels[:32], labels)
    torch.testing.assert_close(ours, value, rtol=1e-5, atol=0)
    (expected,), (got,) = gradient(value, codes), gradient(ours, codes)
    assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_quantization_and_balance_equal_the_loops(case):
    codes, buffer, *_ = case
    signs = torch.where(buffer[:4] >= 0, 1.0, -1.0).double()
    for ours, slow in (
        (quantization(codes, signs), reference.square_sum(codes, signs)),
        (bit_balance(codes, buffer[4:].sum(dim=0)), reference.bit_balance(codes, buffer[4:])),
    ):
        torch.testing.assert_close(ours, slow)
        torch.testing.assert_close(gradient(ours, codes), gradient(slow, codes))


def test_a_step_is_the_batch_share_of_the_objective(case):
    """The terms of `steps` are J of the batch's rows, with the other modality's buffer, over b n."""
    *_, labels = case
    data = TrainData(torch.randn(9, 5), torch.randn(9, 6), labels.float())
    config = DcmhConfig(hidden=4, gamma=0.7, eta=0.3, dropout=0.0, input_dropout=0.0)
    method = DCMH(data, 8, config).eval()
    batch = data.rows(torch.tensor([5, 0, 2]))
    (step,) = method.steps(batch, "text")
    codes = method.text_head(batch.text)
    assert torch.equal(method.text_buffer[batch.index], codes)
    rest = method.text_buffer[[1, 3, 4, 6, 7, 8]]
    expected = {
        "likelihood": reference.likelihood_sum(codes, method.image_buffer, batch.labels, data.labels) / 27,
        "quantization": 0.7 * reference.square_sum(codes, method.code_buffer[batch.index]) / 27,
        "balance": 0.3 * reference.bit_balance(codes, rest) / 27,
    }
    assert step.optimizer == "text"
    assert step.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(step.terms[name], value, msg=name)


def test_codes_are_the_sign_of_both_buffers(case):
    data = TrainData(torch.randn(9, 5), torch.randn(9, 6), case[3].float())
    method = DCMH(data, 8, DcmhConfig(hidden=4))
    method.image_buffer[0], method.text_buffer[0] = 1.0, -1.0
    method.end_epoch(0)
    assert (method.code_buffer[0] == 1).all(), "sign(0) is +1"
    for i in range(1, 9):
        for k in range(8):
            f, g = float(method.image_buffer[i, k]), float(method.text_buffer[i, k])
            assert method.code_buffer[i, k] == (1.0 if f + g >= 0 else -1.0)
