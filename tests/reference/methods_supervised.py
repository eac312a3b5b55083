"""Slow references for the supervised methods' losses: loops over pairs, labels and bits, written from the formulas.

Arguments are float64 tensors, one row an item; autograd through the loops gives the reference gradients.
"""

import math

import torch


def dot(u, v):
    return sum(u[k] * v[k] for k in range(len(u)))


def cosine(u, v):
    length = (dot(u, u) * dot(v, v)) ** 0.5
    return dot(u, v) / length if length.item() > 0 else torch.tensor(0.0, dtype=torch.float64)


def shares_label(a, b):
    return any(float(x) == 1 and float(y) == 1 for x, y in zip(a, b, strict=True))


def label_similarity(a, b, grading="any"):
    """S of two label vectors by the names of `methods.base.label_similarity`, from Python's sets."""
    one, other = ({c for c in range(len(v)) if float(v[c]) == 1} for v in (a, b))
    shared = len(one & other)
    if shared == 0:
        return 0.0
    return {
        "any": 1.0,
        "jaccard": shared / len(one | other),
        "cosine": shared / math.sqrt(len(one) * len(other)),
        "count": shared / min(len(one), len(other)),
    }[grading]


def pairs(u, v):
    return [(i, j) for i in range(len(u)) for j in range(len(v))]


def likelihood_sum(codes, buffer, labels, all_labels, grading="any"):
    """sum_ij log(1 + e^Theta_ij) - S_ij Theta_ij."""
    total = 0.0
    for i, j in pairs(codes, buffer):
        theta = dot(codes[i], buffer[j]) / 2
        total = total + torch.log(1 + torch.exp(theta)) - label_similarity(labels[i], all_labels[j], grading) * theta
    return total


def square_sum(u, v):
    return sum((u[i][k] - v[i][k]) ** 2 for i in range(len(u)) for k in range(len(u[i])))


def bit_balance(codes, rest_rows):
    total = 0.0
    for k in range(codes.shape[1]):
        column = sum(codes[i][k] for i in range(len(codes))) + sum(rest_rows[i][k] for i in range(len(rest_rows)))
        total = total + column**2
    return total


def cross_entropy(logits, target):
    """Mean binary cross entropy of logits (b, 1) against one target, from the definition."""
    total = 0.0
    for (logit,) in logits:
        p = 1 / (1 + torch.exp(-logit))
        total = total - (target * torch.log(p) + (1 - target) * torch.log(1 - p))
    return total / len(logits)


def label_prediction(logits, labels):
    total = 0.0
    for i in range(len(labels)):
        for c in range(labels.shape[1]):
            total = total + (1 / (1 + torch.exp(-logits[i][c])) - labels[i][c]) ** 2
    return total / labels.numel()


def mesdch_divergence(codes, buffer, labels, all_labels):
    total = 0.0
    for i, j in pairs(codes, buffer):
        a = cosine(labels[i], all_labels[j])
        c = cosine(codes[i], buffer[j])
        p = c if c.item() > 0 else 0.0 * c
        total = total + (a - p) * torch.log((a + 1e-5) / (p + 1e-5))
    return total / (len(codes) * len(buffer))


def dsph_proxy_loss(codes, proxies, labels, t):
    near, far = [], []
    for i in range(len(codes)):
        for c in range(len(proxies)):
            s = cosine(codes[i], proxies[c])
            if float(labels[i][c]) == 1:
                near.append(1 - s)
            else:
                far.append(s - t if s.item() > t else 0.0 * s)
    return sum(near) / max(1, len(near)) + sum(far) / max(1, len(far))


def dsph_irrelevant_loss(codes, others, labels, t):
    values = []
    for i, j in pairs(codes, others):
        several = float(labels[i].sum()) > 1 and float(labels[j].sum()) > 1
        if several and not shares_label(labels[i], labels[j]):
            s = cosine(codes[i], others[j])
            values.append(s - t if s.item() > t else 0.0 * s)
    return sum(values) / len(values) if values else torch.tensor(0.0, dtype=torch.float64)


def dchmt_loss(image_scores, text_scores, labels, theta, grading="any"):
    """Eq. 1 to 3 from scores (b, K): a bit's two scores are 0 and the activation."""

    def code(activations):
        probabilities = []
        for z in activations:
            one = torch.exp(z) / (1 + torch.exp(z))
            probabilities += [1 - one, one]
        return probabilities

    m = math.sqrt(2 * image_scores.shape[1] * theta)
    total = 0.0
    for i, j in pairs(image_scores, text_scores):
        u, v = code(image_scores[i]), code(text_scores[j])
        squared = sum((a - b) ** 2 for a, b in zip(u, v, strict=True))
        similarity = label_similarity(labels[i], labels[j], grading)
        distance = squared**0.5
        total = total + similarity * squared
        total = total + (1 - similarity) * ((m - distance) ** 2 if distance.item() < m else 0.0)
    return total / (len(image_scores) * len(text_scores))


def info_nce(one, other, temperature):
    """Both ways, from the definition."""
    m, total = len(one), 0.0
    for a, b in ((one, other), (other, one)):
        for i in range(m):
            scores = [torch.exp(cosine(a[i], b[j]) / temperature) for j in range(m)]
            total = total - torch.log(scores[i] / sum(scores))
    return total / (2 * m)


def mith_distillation(whole, local):
    """0.1 and 1 times the same square, each with one side held fixed."""
    total = 0.0
    for i in range(len(whole)):
        for k in range(whole.shape[1]):
            total = total + (whole[i][k].detach() - local[i][k]) ** 2
            total = total + 0.1 * (whole[i][k] - local[i][k].detach()) ** 2
    return total / len(whole)


def scm_first_objective(image, text, labels):
    """x' S y matrix of eq. 2 without the factor K, by summing over all pairs of items."""
    total = torch.zeros(image.shape[1], text.shape[1], dtype=torch.float64)
    for i, j in pairs(image, text):
        similarity = 2 * cosine(labels[i], labels[j]) - 1
        total += similarity * torch.outer(image[i], text[j])
    return total
