"""Slow references for metrics and counting kernels: Python loops written from the definitions."""

import itertools
import math
from fractions import Fraction


def average_precision(gains):
    return weighted_average_precision([1 if g > 0 else 0 for g in gains])


def weighted_average_precision(gains, k=None):
    """Over the first k ranks, divided by the relevant items among them."""
    values, cumulative = [], 0
    for rank, gain in enumerate(gains[:k], start=1):
        cumulative += gain
        if gain > 0:
            values.append(cumulative / rank)
    return sum(values) / len(values) if values else 0.0


def average_precision_at_k_cut(gains, k):
    return weighted_average_precision([1 if g > 0 else 0 for g in gains], k)


def average_precision_first_k_relevant(gains, k):
    ranks = [rank for rank, gain in enumerate(gains, start=1) if gain > 0][:k]
    return sum(found / rank for found, rank in enumerate(ranks, start=1)) / len(ranks) if ranks else 0.0


def ndcg(gains, k, exponential=False):
    if exponential:
        gains = [2**g - 1 for g in gains]

    def dcg(ordered):
        return sum(g / math.log2(1 + rank) for rank, g in enumerate(ordered[:k], start=1))

    ideal = dcg(sorted(gains, reverse=True))
    return dcg(gains) / ideal if ideal else 0.0


def acg(gains, k):
    return sum(gains[:k]) / len(gains[:k])


def precision(gains, n):
    return sum(g > 0 for g in gains[:n]) / n


def r_precision(gains):
    n_relevant = sum(g > 0 for g in gains)
    return precision(gains, n_relevant) if n_relevant else 0.0


def orders(distances, gains):
    """Every order of the gains that sorts the distances; equally likely (repeats of equal gains are dropped)."""
    groups = [
        sorted(set(itertools.permutations(g for d, g in zip(distances, gains, strict=True) if d == distance)))
        for distance in sorted(set(distances))
    ]
    for chosen in itertools.product(*groups):
        yield list(itertools.chain.from_iterable(chosen))


def over_orders(metric, distances, gains, ties):
    values = [metric(order) for order in orders(distances, gains)]
    return {"expected": sum(values) / len(values), "best": max(values), "worst": min(values)}[ties]


def hamming(a, b):
    return sum(bin(x ^ y).count("1") for x, y in zip(a.tolist(), b.tolist(), strict=True))


def gain(a, b, grading):
    shared = sum(x and y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    either = sum(x or y for x, y in zip(a.tolist(), b.tolist(), strict=True))
    if grading == "binary":
        return Fraction(shared > 0)
    return Fraction(shared) if grading == "shared" else Fraction(shared, either or 1)


def distances_and_gains(query_code, database_codes, query_labels, database_labels, grading):
    distances = [hamming(query_code, code) for code in database_codes]
    return distances, [gain(query_labels, labels, grading) for labels in database_labels]


def lookup(distances, gains, radius):
    """Precision, recall and F1 of all items within a radius, and whether there are none."""
    inside = [g > 0 for d, g in zip(distances, gains, strict=True) if d <= radius]
    n_relevant = sum(g > 0 for g in gains)
    p = sum(inside) / len(inside) if inside else 0.0
    r = sum(inside) / n_relevant
    return p, r, 2 * p * r / (p + r) if p + r else 0.0, not inside
