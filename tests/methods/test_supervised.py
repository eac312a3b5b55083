"""What holds for every supervised method: order of items and bits, and 200 pairs can be learned by heart."""

import copy

import numpy as np
import pytest
import torch

from cmh_milvus import metrics
from cmh_milvus.codes import binarize, pack
from cmh_milvus.methods import get_method, make_config
from cmh_milvus.methods.base import TrainData
from cmh_milvus.ranking import distance_table
from cmh_milvus.training import relaxed_codes

SMALL = {"hidden": 256, "dropout": 0.0, "input_dropout": 0.0, "batch_size": 50}
QUICK = {
    "dcmh": SMALL | {"epochs": 25, "gamma": 1.0},
    "ssah": SMALL | {"epochs": 16, "label_passes": 6, "learning_rate": 2e-3, "delta": 1e-3},
    "mesdch": SMALL | {"epochs": 40, "learning_rate": 5e-3},
    "dsph": SMALL | {"epochs": 40},
    "dchmt": SMALL | {"epochs": 60},
    "mith": SMALL | {"epochs": 40, "contrast": 0.01},
    "scm": {"ridge": 0.1},
}
ITERATIVE = [name for name in QUICK if name != "scm"]


def few(data, n):
    return TrainData(data.image[:n], data.text[:n], data.labels[:n])


def made(name, data, n_bits, **settings):
    method = get_method(name)
    torch.manual_seed(0)
    return method(data, n_bits, make_config(method, settings))


def terms(method, batch):
    """All terms of all steps of the phases, in eval mode, so without dropout or batch statistics."""
    method.eval()
    found = {}
    for phase in method.phases(0):
        for step in method.steps(batch, phase):
            found |= {f"{phase} {name}": float(term.detach()) for name, term in step.terms.items()}
        method.end_phase(phase)
    return found


@pytest.mark.parametrize("name", ITERATIVE)
def test_order_of_the_batch_changes_nothing(name, small_train_data):
    data = few(small_train_data, 40)
    method = made(name, data, 16, hidden=16)
    index = torch.arange(3, 23)
    shuffled = index[torch.randperm(20, generator=torch.Generator().manual_seed(0))]
    one = terms(copy.deepcopy(method), data.rows(index))
    assert terms(method, data.rows(shuffled)) == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in ITERATIVE if name != "mith"])
def test_order_of_the_bits_changes_nothing(name, small_train_data):
    """Output layers, buffers and proxies with their bits in another order give the same terms."""
    data = few(small_train_data, 40)
    method = made(name, data, 16, hidden=24)
    permuted = copy.deepcopy(method)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    weights = [*permuted.named_parameters(), *permuted.named_buffers()]
    with torch.no_grad():
        for _, value in weights:
            if value.ndim == 2 and value.shape[0] in (40, 67) and value.shape[1] == 16:
                value.copy_(value[:, order])  # buffers of all rows, proxies
            elif value.shape[0:1] == (16,):
                value.copy_(value[order])  # output layers
    batch = data.rows(torch.arange(20))
    assert terms(permuted, batch) == pytest.approx(terms(method, batch), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["dcmh", "dchmt", "mith"])
def test_order_of_the_labels_changes_nothing(name, small_train_data):
    data = few(small_train_data, 40)
    permuted = TrainData(data.image, data.text, data.labels.flip(1))
    batch = torch.arange(20)
    one = terms(made(name, data, 16, hidden=16), data.rows(batch))
    assert terms(made(name, permuted, 16, hidden=16), permuted.rows(batch)) == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("name", QUICK)
def test_200_pairs_are_learned_by_heart(name, small_train_data):
    data = few(small_train_data, 200)
    method = made(name, data, 64, **QUICK[name])
    if method.closed_form:
        method.fit(data, torch.Generator().manual_seed(0))
    else:
        fit(method, data)
    labels = data.labels.numpy().astype(np.bool_)
    codes = {
        "image": pack(binarize(relaxed_codes(method.image_head, data.image.numpy()))),
        "text": pack(binarize(relaxed_codes(method.text_head, data.text.numpy()))),
    }
    for query, database in (("image", "text"), ("text", "image")):
        table = distance_table(codes[query], codes[database], labels, labels)
        assert metrics.mean_average_precision(table) > 0.95, (query, database)


def fit(method, data):
    """The loop of the contract's docstring."""
    optimizers, shuffle = method.optimizers(), torch.Generator().manual_seed(0)
    epochs = method.epochs(method.config, len(data))
    for epoch in range(epochs):
        for phase in method.phases(epoch):
            for index in torch.randperm(len(data), generator=shuffle).split(method.config.batch_size):
                for name, rate in method.learning_rates(epoch / epochs).items():
                    for group in optimizers[name].param_groups:
                        group["lr"] = rate
                for step in method.steps(data.rows(index), phase):
                    optimizers[step.optimizer].zero_grad()
                    torch.stack(list(step.terms.values())).sum().backward()
                    optimizers[step.optimizer].step()
            method.end_phase(phase)
        method.end_epoch(epoch)
