"""MITH's terms against loops, and that one hash head gives the code of both branches."""

import pytest
import torch

from cmh_milvus.errors import SettingsError
from cmh_milvus.methods import mith
from cmh_milvus.methods.base import TrainData
from tests.reference import methods_supervised as reference


@pytest.fixture
def draw():
    return {"generator": torch.Generator().manual_seed(6), "dtype": torch.float64}


@pytest.fixture
def method(draw):
    labels = (torch.rand(10, 3, **draw) < 0.5).float()
    data = TrainData(torch.randn(10, 7), torch.randn(10, 6), labels)
    return data, mith.MITH(data, 8, mith.MithConfig(hidden=5, concept=3))


def parts(draw):
    whole, local = (torch.tanh(torch.randn(4, 8, **draw)).requires_grad_() for _ in range(2))
    return mith.Parts(torch.zeros(4, 5), torch.zeros(4, 8, 3), whole, local)


def check(ours, slow, *arguments):
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(torch.autograd.grad(ours, arguments), torch.autograd.grad(slow, arguments))


def test_likelihood(draw):
    codes, buffer = torch.randn(3, 8, **draw).requires_grad_(), torch.randn(6, 8, **draw)
    labels = (torch.rand(6, 3, **draw) < 0.5).double()
    ours = mith.likelihood(buffer, codes, labels[:3], labels)
    check(ours, reference.likelihood_sum(codes, buffer, labels[:3], labels) / 18, codes)


def test_quantization_and_distillation(draw):
    both = parts(draw)
    signs = torch.where(torch.randn(4, 8, **draw) >= 0, 1.0, -1.0).double()
    mean = (both.whole + both.local) / 2
    check(mith.quantization(both, signs), reference.square_sum(mean, signs) / 32, both.whole, both.local)
    check(mith.distillation(both), reference.mith_distillation(both.whole, both.local), both.whole, both.local)


def test_contrast_of_pairs_and_of_concepts(draw):
    one, other = (torch.randn(4, 5, **draw).requires_grad_() for _ in range(2))
    check(mith.contrast(one, other, 0.2), reference.info_nce(one, other, 0.2), one, other)
    first, second = (torch.randn(3, 4, 5, **draw).requires_grad_() for _ in range(2))
    slow = sum(reference.info_nce(first[i], second[i], 0.2) for i in range(3)) / 3
    check(mith.contrast(first, second, 0.2), slow, first, second)


def test_a_step_is_eq_7_with_the_whole_sets_codes(draw):
    labels = (torch.rand(10, 3, **draw) < 0.5).float()
    data = TrainData(torch.randn(10, 7), torch.randn(10, 6), labels)
    weights = {"local": 0.3, "whole": 0.7, "quantization": 1.3, "contrast": 0.4, "distillation": 0.6}
    config = mith.MithConfig(hidden=5, concept=3, temperature=0.3, concept_weight=0.2, **weights)
    method = mith.MITH(data, 8, config).eval()
    batch = data.rows(torch.tensor([7, 0, 3]))
    (step,) = method.steps(batch, "joint")
    image, text = mith.split_head(method.image_head, batch.image, 5), mith.split_head(method.text_head, batch.text, 5)
    for buffer, codes in ((method.image_local, image.local), (method.text_whole, text.whole)):
        assert torch.equal(buffer[batch.index], codes), "the batch's fresh codes are in before they are compared"

    def likelihood(buffer, codes):
        return reference.likelihood_sum(codes, buffer, batch.labels, labels) / 30

    def quantization(parts):
        return reference.square_sum((parts.whole + parts.local) / 2, method.code_buffer[batch.index]) / 24

    concepts = sum(reference.info_nce(image.concepts[i], text.concepts[i], 0.3) for i in range(3)) / 3
    expected = {
        "local": likelihood(method.image_local, image.local) + likelihood(method.text_local, text.local),
        "whole": likelihood(method.image_whole, text.whole) + likelihood(method.text_whole, image.whole),
        "quantization": quantization(image) + quantization(text),
        "contrast": reference.info_nce(image.vector, text.vector, 0.3) + 0.2 * concepts,
        "distillation": sum(reference.mith_distillation(parts.whole, parts.local) for parts in (image, text)),
    }
    assert step.terms.keys() == expected.keys()
    for name, value in expected.items():
        expected_term = (weights[name] * value).float()
        torch.testing.assert_close(step.terms[name], expected_term, rtol=1e-4, atol=1e-5, msg=name)


def test_the_hash_head_gives_the_sign_of_both_codes(method):
    data, trained = method
    trained.eval()
    both = mith.split_head(trained.image_head, data.image, 5)
    assert torch.equal(trained.image_head(data.image) >= 0, both.whole + both.local >= 0)


def test_a_bit_reads_its_own_concept_only(method):
    """Also after updates."""
    data, trained = method
    optimizers = trained.optimizers()
    for _ in range(3):
        for step in trained.steps(data.rows(torch.arange(10)), "joint"):
            optimizers[step.optimizer].zero_grad()
            torch.stack(list(step.terms.values())).sum().backward()
            optimizers[step.optimizer].step()
    for head in (trained.image_head, trained.text_head):
        for k in range(8):
            for place in range(24):
                weight = head.output.weight[k, 5 + place].item()
                assert (weight != 0) == (place // 3 == k)
        assert (head.output.bias == 0).all()


@pytest.fixture(params=[(True, True), (True, False), (False, True)], ids=["both", "pictures", "texts"])
def token_method(draw, request):
    """With tokens in both modalities or in one: 10 items of 4 parts, some of which are not there."""
    labels = (torch.rand(10, 3, **draw) < 0.5).float()
    matrices = [torch.randn(10, 5, width) for width in (7, 6)]
    for x in matrices:
        x[::3, 3:] = 0
    features = [x if tokens else x[:, 0] for x, tokens in zip(matrices, request.param, strict=True)]
    data = TrainData(*features, labels)
    return data, mith.MITH(data, 8, mith.MithConfig(hidden=5, concept=3, token_concept=16))


def test_with_tokens_each_bit_has_a_concept_of_one_width(token_method):
    data, trained = token_method
    trained.train()
    (step,) = trained.steps(data.rows(torch.arange(10)), "joint")
    torch.stack(list(step.terms.values())).sum().backward()
    for head, features in ((trained.image_head, data.image), (trained.text_head, data.text)):
        both = mith.split_head(head, features, 5)
        assert both.concepts.shape == (10, 8, 16)
        assert both.vector.shape == (10, 5)
        assert hasattr(head, "gathering") == (features.ndim == 3)
        for name, weight in head.named_parameters():
            assert not weight.requires_grad or torch.isfinite(weight.grad).all(), name
    if data.image.ndim == 3:
        assert trained.image_head.gathering.value.weight.grad.abs().sum() > 0
        assert trained.image_head.gathering.score.weight.grad.abs().sum() > 0


def test_with_tokens_the_hash_head_gives_the_sign_of_both_codes(token_method):
    data, trained = token_method
    trained.eval()
    for head, features in ((trained.image_head, data.image), (trained.text_head, data.text)):
        both = mith.split_head(head, features, 5)
        assert torch.equal(head(features) >= 0, both.whole + both.local >= 0)
        moved = features.clone()
        if features.ndim == 3:  # parts move the local code alone, the whole item the global one
            moved[:, 1] += 1
            other = mith.split_head(head, moved, 5)
            assert torch.equal(other.whole, both.whole)
            assert (other.local - both.local).abs().max() > 1e-3


def test_a_width_that_has_no_heads_is_refused():
    with pytest.raises(SettingsError, match="multiple of 16, got 24"):
        mith.MithConfig(token_concept=24)


def test_codes_weigh_the_global_ones(method):
    _, trained = method
    for buffer in (trained.image_local, trained.text_local):
        buffer[:] = 1.0
    trained.image_whole[:], trained.text_whole[:] = -0.5, 0.45
    trained.end_epoch(0)
    assert (trained.code_buffer == -1).all()
