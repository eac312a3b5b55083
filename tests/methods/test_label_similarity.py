"""Graded similarity of label sets, and the methods that learn from it."""

import dataclasses

import pytest
import torch

from cmh_milvus.errors import SettingsError
from cmh_milvus.methods import dchmt, dcmh, get_method, list_methods, make_config, mith, ssah
from cmh_milvus.methods.base import SIMILARITIES, label_similarity
from tests.methods.conftest import small_settings
from tests.reference import methods_supervised as reference

GRADED = [
    name for name in list_methods() if "similarity" in {f.name for f in dataclasses.fields(get_method(name).Config)}
]


@pytest.fixture
def case():
    draw = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64}
    labels = (torch.rand(11, 6, **draw) < 0.4).double()
    labels[2], labels[7] = 0, 0  # no labels: like nothing, not even like each other
    return torch.randn(4, 8, **draw).requires_grad_(), torch.randn(11, 8, **draw), labels[:4], labels


def check(ours, slow, *arguments):
    torch.testing.assert_close(ours, slow)
    torch.testing.assert_close(torch.autograd.grad(ours, arguments), torch.autograd.grad(slow, arguments))


@pytest.mark.parametrize("grading", SIMILARITIES)
def test_equals_the_sets(case, grading):
    *_, labels, all_labels = case
    ours = label_similarity(labels, all_labels, grading)
    expected = [[reference.label_similarity(a, b, grading) for b in all_labels] for a in labels]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))
    assert ours.min() == 0 < ours.max() <= 1
    assert (grading == "any") == (set(ours.unique().tolist()) == {0, 1})


def test_by_hand():
    """Labels {a, b, c, d} and {d}: one shared of four of either."""
    one, other = torch.tensor([[1.0, 1, 1, 1]]), torch.tensor([[0.0, 0, 0, 1]])
    assert [label_similarity(one, other, grading).item() for grading in SIMILARITIES] == [1, 0.25, 0.5, 1]
    assert SIMILARITIES == ("any", "jaccard", "cosine", "count")


@pytest.mark.parametrize("grading", SIMILARITIES)
def test_likelihoods_and_their_gradients_equal_the_loops(case, grading):
    codes, buffer, *labels = case
    slow = reference.likelihood_sum(codes, buffer, *labels, grading)
    check(dcmh.negative_log_likelihood(codes, buffer, *labels, grading), slow, codes)
    slow = reference.likelihood_sum(codes, buffer, *labels, grading) / 44
    check(ssah.pairwise_likelihood(codes, buffer, *labels, grading), slow, codes)
    slow = reference.likelihood_sum(codes, buffer, *labels, grading) / 44
    check(mith.likelihood(buffer, codes, *labels, grading), slow, codes)


@pytest.mark.parametrize("grading", SIMILARITIES)
def test_likelihood_by_blocks_is_the_whole(case, grading, monkeypatch):
    """Also where the last block is a short one."""
    codes, buffer, *labels = case
    whole = dcmh.negative_log_likelihood(codes, buffer, *labels, grading)
    (gradient,) = torch.autograd.grad(whole, codes)
    monkeypatch.setattr(dcmh, "BLOCK", 3)
    blocks = dcmh.negative_log_likelihood(codes, buffer, *labels, grading)
    torch.testing.assert_close(blocks, whole)
    torch.testing.assert_close(torch.autograd.grad(blocks, codes)[0], gradient)


@pytest.mark.parametrize("grading", SIMILARITIES)
def test_dchmt_selection_equals_the_loops(case, grading):
    codes, _, labels, _ = case
    text = codes.detach().flip(1).requires_grad_()
    similarity = label_similarity(labels, labels, grading)
    ours = dchmt.selection_loss(dchmt.select(codes), dchmt.select(text), similarity, dchmt.margin(8, 0.3))
    check(ours, reference.dchmt_loss(codes, text, labels, 0.3, grading), codes, text)


def test_who_has_the_setting():
    papers = {"dcmh", "ssah", "mith", "dchmt"}
    assert papers <= set(GRADED)
    assert {get_method(name).Config().similarity for name in papers} == {"any"}


@pytest.mark.parametrize("name", GRADED)
def test_the_setting_reaches_the_loss(name, small_train_data):
    """The same weights have other terms under another grading."""

    def terms(grading):
        torch.manual_seed(0)
        method_class = get_method(name)
        settings = small_settings(method_class) | {"similarity": grading}
        method = method_class(small_train_data, 16, make_config(method_class, settings)).eval()
        found = {}
        for phase in method.phases(0):
            torch.manual_seed(1)
            for step in method.steps(small_train_data.rows(torch.arange(50)), phase):
                found |= {f"{phase} {term}": value.item() for term, value in step.terms.items()}
            method.end_phase(phase)
        return found

    assert terms("cosine") != terms("any")


@pytest.mark.parametrize("name", GRADED)
def test_an_unknown_grading_is_refused_with_the_known_names(name):
    with pytest.raises(SettingsError, match=r"no similarity 'cosinus' .*any, jaccard, cosine, count"):
        make_config(get_method(name), {"similarity": "cosinus"})
    with pytest.raises(SettingsError, match="no similarity"):
        label_similarity(torch.ones(1, 1), torch.ones(1, 1), "shared")
