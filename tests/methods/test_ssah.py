"""SSAH's terms against loops, its inner loops, and who moves whom."""

import math

import pytest
import torch

from cmh_milvus.methods import ssah
from cmh_milvus.methods.base import TrainData
from tests.reference import methods_supervised as reference


@pytest.fixture
def draw():
    return {"generator": torch.Generator().manual_seed(5), "dtype": torch.float64}


@pytest.fixture
def data(draw):
    labels = (torch.rand(12, 3, **draw) < 0.5).float()
    return TrainData(torch.randn(12, 7), torch.randn(12, 6), labels)


def check(ours, slow, argument):
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(torch.autograd.grad(ours, argument), torch.autograd.grad(slow, argument))


def test_likelihood_is_the_mean_over_pairs(draw):
    codes, stored = torch.randn(3, 4, **draw).requires_grad_(), torch.randn(5, 4, **draw)
    labels = (torch.rand(5, 3, **draw) < 0.5).double()
    ours = ssah.pairwise_likelihood(codes, stored, labels[:3], labels)
    check(ours, reference.likelihood_sum(codes, stored, labels[:3], labels) / 15, codes)


def test_quantization_and_label_prediction(draw):
    codes, signs = torch.randn(3, 4, **draw).requires_grad_(), torch.where(torch.randn(3, 4, **draw) >= 0, 1.0, -1.0)
    check(ssah.quantization(codes, signs.double()), reference.square_sum(codes, signs) / 12, codes)
    labels = (torch.rand(3, 4, **draw) < 0.5).double()
    check(ssah.label_prediction(codes, labels), reference.label_prediction(codes, labels), codes)


def test_adversarial_terms(draw):
    real, fake = (torch.randn(4, 1, **draw).requires_grad_() for _ in range(2))
    slow = reference.cross_entropy(real, 1.0) + reference.cross_entropy(fake, 0.0)
    check(ssah.discrimination(real, fake), slow, real)
    slow = reference.cross_entropy(real, 1.0) + reference.cross_entropy(fake, 0.0)
    check(ssah.discrimination(real, fake), slow, fake)
    check(ssah.deception(fake), reference.cross_entropy(fake, 1.0), fake)


def test_the_adversarial_gradient_reaches_the_generator(data):
    """The released code's does not."""
    method = ssah.SSAH(data, 8, ssah.SsahConfig(hidden=6, delta=1.0))
    (step,) = method.steps(data.rows(torch.arange(12)), "image")
    first = method.image_head.layers[1].weight
    (gradient,) = torch.autograd.grad(step.terms["deception"], first)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("phase", ["label", "image", "text", "discriminator"])
def test_a_step_has_the_terms_of_the_equations(data, phase):
    settings = {"alpha": 0.3, "beta": 0.7, "gamma": 1.3, "eta": 0.4, "delta": 0.6, "dropout": 0.0, "input_dropout": 0.0}
    method = ssah.SSAH(data, 8, ssah.SsahConfig(hidden=6, **settings)).eval()
    batch = data.rows(torch.tensor([5, 0, 11]))
    (step,) = method.steps(batch, phase)
    assert step.optimizer == phase
    hidden = {
        "label": method.label_net(batch.labels),
        "image": method.image_head.hidden(batch.image),
        "text": method.text_head.hidden(batch.text),
    }
    judges = {"image": method.image_discriminator, "text": method.text_discriminator}
    if phase == "discriminator":
        real = method.label_features[batch.index]
        expected = {
            f"{m}_discrimination": reference.cross_entropy(judge(real), 1.0)
            + reference.cross_entropy(judge(hidden[m]), 0.0)
            for m, judge in judges.items()
        }
    else:
        output, reader = {
            "label": (method.label_net.output, method.label_net.labels),
            "image": (method.image_head.output, method.image_labels),
            "text": (method.text_head.output, method.text_labels),
        }[phase]
        features, codes = hidden[phase], torch.tanh(output(hidden[phase]))
        labels = batch.labels, data.labels
        expected = {
            "features": 0.3 * reference.likelihood_sum(features, method.label_features, *labels) / 36,
            "codes": 1.3 * reference.likelihood_sum(codes, method.label_codes, *labels) / 36,
            "quantization": 0.7 * reference.square_sum(codes, method.code_buffer[batch.index]) / 24,
            "labels": 0.4 * reference.label_prediction(reader(features), batch.labels),
        }
        if phase != "label":
            expected["deception"] = 0.6 * reference.cross_entropy(judges[phase](features), 1.0)
        stored = {"label": method.label_codes, "image": method.image_codes, "text": method.text_codes}[phase]
        assert torch.equal(stored[batch.index], codes)
    assert step.terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(step.terms[name], value, msg=name)


def test_dropout_does_not_tell_the_discriminator_who_is_who(data):
    """Its two inputs drop the same share of entries, and scale the others alike."""
    method = ssah.SSAH(data, 8, ssah.SsahConfig(hidden=400, dropout=0.3, input_dropout=0.0))
    method.label_features.fill_(1.0)
    seen = []
    method.image_discriminator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    list(method.steps(data.rows(torch.arange(12)), "discriminator"))
    real, fake = seen
    assert real.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (real == 0).float().mean() == pytest.approx(0.3, abs=0.03)
    method.image_head.layers[-1].p = 0.0
    list(method.steps(data.rows(torch.arange(12)), "discriminator"))
    undropped = seen[-1] > 0
    assert (fake == 0)[undropped].float().mean() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("phase", "moved"),
    [
        ("label", {"label_net"}),
        ("image", {"image_head", "image_labels"}),
        ("text", {"text_head", "text_labels"}),
        ("discriminator", {"image_discriminator", "text_discriminator"}),
    ],
)
def test_a_phase_moves_its_own_nets_only(data, phase, moved):
    method = ssah.SSAH(data, 8, ssah.SsahConfig(hidden=6))
    before = {name: value.detach().clone() for name, value in method.named_parameters()}
    optimizers = method.optimizers()
    for step in method.steps(data.rows(torch.arange(12)), phase):
        optimizers[step.optimizer].zero_grad()
        torch.stack(list(step.terms.values())).sum().backward()
        optimizers[step.optimizer].step()
    changed = {name.split(".")[0] for name, value in method.named_parameters() if not torch.equal(value, before[name])}
    assert changed == moved


def test_an_inner_loop_ends_when_its_loss_rises(data):
    method = ssah.SSAH(data, 8, ssah.SsahConfig(hidden=6, label_passes=4, modality_passes=4))
    losses = iter([3.0, 2.0, 2.5, 0.0, 4.0, 3.0, 2.0, 1.0, 1.0, 2.0])
    seen = []
    for phase in method.phases(0):
        seen.append(phase)
        method.losses = [next(losses)]
        method.end_phase(phase)
    assert seen == ["label"] * 3 + ["discriminator"] + ["image"] * 4 + ["text"] * 2
    assert next(losses, math.inf) == math.inf


def test_codes_follow_all_three_nets(data):
    method = ssah.SSAH(data, 8, ssah.SsahConfig(hidden=6))
    method.label_codes[:], method.image_codes[:], method.text_codes[:] = 0.5, -0.7, 0.2
    method.end_epoch(0)
    assert (method.code_buffer == 1).all()
    method.text_codes[:] = 0.1
    method.end_epoch(1)
    assert (method.code_buffer == -1).all()
