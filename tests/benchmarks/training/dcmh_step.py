"""One training step of DCMH, ours and the published kind, side by side.

Run it as `python tests/benchmarks/training/dcmh_step.py`.

Published kind: labels of the batch against all train rows, the likelihood as log(1 + exp), autograd, and a fresh
permutation and the batch's complement for the balance term in each step. Ours: `DCMH.steps` as the trainer runs it.
Both move the same linear net on the same 512-d features by plain SGD; times are CPU seconds of one thread, the best of
several alternating repeats. The gradients are compared first; the program fails where they differ by more than 1e-6 of
their length. Ours estimates the likelihood's value, which is only shown, from some 256 rows. The published loop also
computes the loss over all n x n pairs once an epoch, which ours does not need: `epoch_ratio` compares a whole
epoch (image and text steps, and that loss), `step_ratio` the step alone.
"""

import json
import sys
import time

import numpy as np
import torch
from torch import nn

from cmh_milvus.encoders.hash_head import HashHead, HashHeadConfig
from cmh_milvus.methods.base import TrainData
from cmh_milvus.methods.dcmh import DCMH, DcmhConfig

N, DIM, N_LABELS, BATCH, STEPS, REPEATS = 10_000, 512, 24, 128, 5, 25


def published_loss(net, features, labels, index, buffer, other, codes, gamma, eta):
    """J of a batch over (b n), as published code writes it; the buffer takes the fresh rows."""
    n = len(features)
    activations = net(features[index])
    similarity = (labels[index] @ labels.T > 0).float()
    buffer[index] = activations.detach()
    rest = np.setdiff1d(range(n), index)
    theta = 0.5 * activations @ other.T
    likelihood = -torch.sum(similarity * theta - torch.log(1.0 + torch.exp(theta)))
    quantization = torch.sum(torch.pow(codes[index] - activations, 2))
    balance = torch.sum(torch.pow(activations.sum(dim=0) + buffer[rest].sum(dim=0), 2))
    return (likelihood + gamma * quantization + eta * balance) / (len(index) * n)


def published_epoch_loss(labels, F, G, codes, gamma, eta):
    """J over all pairs, as the published loop reports it each epoch."""
    similarity = (labels @ labels.T > 0).float()
    theta = torch.matmul(F, G.T) / 2
    likelihood = torch.sum(torch.log(1 + torch.exp(theta)) - similarity * theta)
    quantization = torch.sum(torch.pow(codes - F, 2) + torch.pow(codes - G, 2))
    balance = torch.sum(torch.pow(F.sum(dim=0), 2) + torch.pow(G.sum(dim=0), 2))
    return likelihood + gamma * quantization + eta * balance


def ours_loss(method, data, index):
    """The same J through the method."""
    (step,) = method.steps(data.rows(index), "image")
    return torch.stack(list(step.terms.values())).sum()


def measure(n_bits):
    """Relative gradient difference, best milliseconds of a step of both kinds, seconds of the loss over all pairs."""
    torch.manual_seed(0)
    data = TrainData(torch.randn(N, DIM), torch.randn(N, 8), (torch.rand(N, N_LABELS) < 0.1).float())
    config = DcmhConfig(hidden=8, gamma=1.0, eta=1.0)
    method = DCMH(data, n_bits, config)
    method.image_head = HashHead(HashHeadConfig(DIM, n_bits))
    net = nn.Linear(DIM, n_bits)
    net.load_state_dict(method.image_head.output.state_dict())
    buffer, other, codes = method.image_buffer.clone(), method.text_buffer, method.code_buffer

    index = torch.randperm(N)[:BATCH]
    slow = published_loss(net, data.image, data.labels, index, buffer, other, codes, config.gamma, config.eta)
    (expected,) = torch.autograd.grad(slow, net.weight)
    (got,) = torch.autograd.grad(ours_loss(method, data, index), method.image_head.output.weight)
    difference = float((got - expected).norm() / expected.norm())

    published_optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    ours_optimizer = torch.optim.SGD(method.image_head.parameters(), lr=1e-3)
    best = {"published": float("inf"), "ours": float("inf")}
    for _ in range(REPEATS):
        started = time.process_time()
        for _ in range(STEPS):
            index = np.random.default_rng().permutation(N)[:BATCH]
            published_optimizer.zero_grad()
            published_loss(net, data.image, data.labels, index, buffer, other, codes, 1.0, 1.0).backward()
            published_optimizer.step()
        best["published"] = min(best["published"], time.process_time() - started)
        started = time.process_time()
        for index in torch.randperm(N)[: STEPS * BATCH].split(BATCH):
            ours_optimizer.zero_grad()
            ours_loss(method, data, index).backward()
            ours_optimizer.step()
        best["ours"] = min(best["ours"], time.process_time() - started)
    started = time.process_time()
    published_epoch_loss(data.labels, buffer, other, codes, config.gamma, config.eta)
    return difference, {name: 1000 * seconds / STEPS for name, seconds in best.items()}, time.process_time() - started


def main():
    torch.set_num_threads(1)
    failed = False
    for n_bits in (16, 64, 128):
        difference, milliseconds, all_pairs = measure(n_bits)
        published, ours = milliseconds["published"], milliseconds["ours"]
        steps = 2 * (N // BATCH)
        row = {
            "n": N,
            "n_bits": n_bits,
            "batch": BATCH,
            "published_ms": round(published, 2),
            "ours_ms": round(ours, 2),
            "step_ratio": round(published / ours, 2),
            "epoch_ratio": round((steps * published + 1000 * all_pairs) / (steps * ours), 2),
            "gradient_difference": difference,
        }
        print(json.dumps(row))
        failed |= difference > 1e-6
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
