"""LCMH: Linear Cross-Modal Hashing (Zhu, Huang, Shen & Zhao, ACM MM 2013). Learns from pairs.

No code of the authors is public. This module follows the paper's abstract; what is marked (*) is our reading of it.

1. k-means in each modality; a pair's item is described by its closeness to the k centroids m_l, in O(n k):
       z_l = |x - m_l|^2,   p_l = (1 / z_l) / sum_l (1 / z_l)                                            (*)  (1)
2. The descriptions of both modalities are brought into one space in which a pair's two codes agree:
       max tr(W_1^T P_1^T P_2 W_2)  subject to  W_m^T (P_m^T P_m + r I) W_m = I                          (*)  (2)
   with P_m centred, that is canonical correlation analysis on k dimensions.
3. A bit is the side of the median of its direction on the train rows, those that are alike counted once:
       b = [ p W_m >= median ]                                                                           (*)  (3)

symbol    variable                   shape
x         scaled features            (n, d)
m_l       centroids                  (k, d)
p         memberships                (n, k)
W_m       image_map, text_map        (k, K)

Departures: none that can be named, since (*) stands in for unread detail; the ridge r is ours, because rows of P sum
to 1 and the covariance is singular. A query goes through its own modality's centroids and map, as the paper says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmh_milvus.encoders.hash_head import CentroidMemberships, HashHead, HashHeadConfig
from cmh_milvus.errors import DataError
from cmh_milvus.methods.base import Citation, Count, Method, Positive, TrainData
from cmh_milvus.methods.cca_itq import canonical_directions


@dataclass(frozen=True)
class LcmhConfig:
    """Settings.

    Attributes:
        clusters: k in each modality; more than K, since k centred memberships span k - 1 directions, and no more than
            there are pairs.
        ridge: r, relative to the mean variance of a membership.
        iterations: Of k-means.
    """

    clusters: Count = 300
    ridge: Positive = 0.1
    iterations: Count = 20
    batch_size: Count = 1
    epochs: Count = 1


def nearest_centroids(features: Tensor, centroids: Tensor, block: int = 8192) -> Tensor:
    """Row number of the nearest centroid: (n, d), (k, d) -> int64 (n,)."""
    return torch.cat([torch.cdist(rows, centroids).argmin(dim=1) for rows in torch.split(features, block)])


def k_means(features: Tensor, k: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm from k random rows: (n, d) -> (k, d); a cluster that empties keeps its centroid."""
    start = torch.randperm(len(features), generator=generator)[:k]
    centroids = features[start.to(features.device)]
    for _ in range(iterations):
        own = nearest_centroids(features, centroids)
        counts = torch.bincount(own, minlength=k).to(features.dtype)[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, own, features)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids


def threshold(values: Tensor) -> Tensor:
    """Eq. 3's median, between two rows: on one of them, rounding would choose that row's bit.

    Args:
        values: Of rows that differ, (n, K), n at least 1.

    Returns:
        (K,), the mean of row number n / 2 in order, rounded up, and the next.
    """
    below = (len(values) - 1) // 2
    return values.sort(dim=0).values[below : below + 2].mean(dim=0)


class LCMH(Method):
    """See the module's docstring."""

    name = "lcmh"
    supervision = "pairs"
    closed_form = True
    citation = Citation(
        authors="Xiaofeng Zhu, Zi Huang, Heng Tao Shen and Xin Zhao",
        title="Linear Cross-Modal Hashing for Efficient Multimedia Search",
        venue="ACM Multimedia",
        year=2013,
        url="https://doi.org/10.1145/2502081.2502107",
    )
    Config = LcmhConfig
    config: LcmhConfig

    def __init__(self, train: TrainData, n_bits: int, config: LcmhConfig) -> None:
        super().__init__(train, n_bits, config)
        clusters = min(max(config.clusters, n_bits + 1), len(train))
        if clusters <= n_bits:
            raise DataError(
                f"lcmh makes {n_bits} bits of {n_bits + 1} clusters or more, and there are {len(train)} train pairs: "
                "give more pairs or fewer bits"
            )
        self.image_head = HashHead(HashHeadConfig(train.image.shape[1], n_bits, centroids=clusters))
        self.text_head = HashHead(HashHeadConfig(train.text.shape[1], n_bits, centroids=clusters))

    @torch.no_grad()
    def fit(self, train: TrainData, generator: torch.Generator) -> None:
        """Eq. 1 to 3; the eigenproblem in float64."""
        heads = (self.image_head, self.text_head)
        memberships = []
        for head, features in zip(heads, (train.image, train.text), strict=True):
            head.scaling.fit(features)
            scaled = head.scaling(features)
            description = next(layer for layer in head.layers if isinstance(layer, CentroidMemberships))
            description.centroids.copy_(k_means(scaled, head.config.centroids, self.config.iterations, generator))
            memberships.append(torch.cat([description(rows) for rows in torch.split(scaled, 8192)]).double())
        centred = [p - p.mean(dim=0) for p in memberships]
        maps = canonical_directions(centred[0], centred[1], self.n_bits, self.config.ridge)
        for head, p, w in zip(heads, memberships, maps, strict=True):
            # Memberships are small numbers: directions of unit variance keep float32 codes exact.
            direction = w / (p @ w).std(dim=0).clamp(min=1e-12)
            head.output.weight.copy_(direction.T)
            head.output.bias.copy_(-threshold(torch.unique(p, dim=0) @ direction))
