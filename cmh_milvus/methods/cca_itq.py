"""CCA-ITQ: canonical correlations, then iterative quantisation (Gong et al., TPAMI 2013). Learns from pairs.

1. CCA with ridge (Hotelling 1936): the singular value decomposition U diag(rho) V^T of
   (C_xx + r I)^-1/2 C_xy (C_yy + r I)^-1/2 gives the K directions of largest correlation rho in each modality.
2. Directions are scaled by their correlations (Gong et al., section 5.1, as Foster et al. do).
3. ITQ (eq. 2 there): the rotation R that minimises |B - Z R|^2 over the stacked projections Z of both modalities,
   alternating B = sign(Z R) and R = the orthogonal Procrustes solution, 50 times.

symbol    variable              shape
x, y      image, text           (n, d), standardised by column (bag of words: idf and unit length)
W         image_map, text_map   (d, k)   k = min(K, d_x, d_y)
Z         projections           (2 n, k)
R         rotation              (k, K)

Departures: `ridge` is relative to the mean variance of a column, and much larger than the usual 1e-4 (absolute), which
keeps directions that a few train pairs have in common by chance: with it the ranking gets worse with more bits. Where K
exceeds the number of directions, R has K columns and orthonormal rows, so that K bits come of k < K directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmh_milvus.encoders.hash_head import HashHead, HashHeadConfig
from cmh_milvus.methods.base import Citation, Count, Method, Positive, TrainData, binarized

BLOCK = 8192  # rows at a time in float64


@dataclass(frozen=True)
class CcaItqConfig:
    """Settings.

    Attributes:
        ridge: Added to the covariances' diagonals, relative to the mean variance of a column.
        iterations: Of ITQ.
    """

    ridge: Positive = 3.0
    iterations: Count = 50
    batch_size: Count = 1
    epochs: Count = 1


def cross_products(rows: Tensor, others: Tensor) -> Tensor:
    """X^T Y: float (n, d_x), (n, d_y) -> (d_x, d_y), summed in float64 block by block; the rows stay as they are."""
    total = torch.zeros(rows.shape[1], others.shape[1], dtype=torch.float64, device=rows.device)
    for x, y in zip(torch.split(rows, BLOCK), torch.split(others, BLOCK), strict=True):
        total.addmm_(x.double().T, y.double())
    return total


def projected(rows: Tensor, directions: Tensor) -> Tensor:
    """X W block by block: float (n, d), float64 (d, k) -> float64 (n, k)."""
    result = torch.empty(len(rows), directions.shape[1], dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), BLOCK):
        result[start : start + BLOCK] = rows[start : start + BLOCK].double() @ directions
    return result


def inverse_root(rows: Tensor, ridge: float) -> Tensor:
    """A root of (C + r I)^-1, C the covariance of centred rows, on the space that they span.

    Args:
        rows: (n, d), centred.
        ridge: r, relative to the mean variance of a column.

    Returns:
        float64 (d, min(n, d)): R with R R^T that inverse; symmetric where n >= d. Where n < d it is found from the
        (n, n) products of rows, as d^3 is much for many columns.
    """
    n, d = rows.shape
    if n >= d:
        variance, axes = torch.linalg.eigh(cross_products(rows, rows) / n)
        root: Tensor = axes * (variance.clamp(min=0) + ridge * variance.mean()).rsqrt() @ axes.T
    else:
        variance, left = torch.linalg.eigh(cross_products(rows.T, rows.T) / n)
        axes = projected(rows.T, left / (n * variance).clamp(min=1e-12 * n * variance[-1]).sqrt())
        root = axes * (variance.clamp(min=0) + ridge * variance.sum() / d).rsqrt()
    return root


def canonical_directions(
    image: Tensor, text: Tensor, k: int, ridge: float, power: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Step 1 and 2: centred (n, d_x), (n, d_y) -> float64 (d_x, k), (d_y, k), scaled by correlation^power.

    There are min(n, d_x, d_y) directions at most.
    """
    image_root, text_root = inverse_root(image, ridge), inverse_root(text, ridge)
    u, correlation, vt = torch.linalg.svd(
        image_root.T @ (cross_products(image, text) / len(image)) @ text_root, full_matrices=False
    )
    scale = correlation[:k] ** power
    return image_root @ u[:, :k] * scale, text_root @ vt[:k].T * scale


def itq_rotation(projections: Tensor, n_bits: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Step 3: (m, k) -> (k, n_bits) with orthonormal rows."""
    k = projections.shape[1]
    start = torch.randn(n_bits, k, generator=generator, dtype=torch.float64).to(projections.device)
    rotation: Tensor = torch.linalg.qr(start).Q.T  # (k, n_bits)
    for _ in range(iterations):
        codes = binarized(projections @ rotation)
        u, _, vt = torch.linalg.svd(projections.T @ codes, full_matrices=False)
        rotation = u @ vt
    return rotation


class CcaItq(Method):
    """See the module's docstring."""

    name = "cca_itq"
    supervision = "pairs"
    closed_form = True
    citation = Citation(
        authors="Yunchao Gong, Svetlana Lazebnik, Albert Gordo and Florent Perronnin",
        title="Iterative Quantization: A Procrustean Approach to Learning Binary Codes for Large-Scale Image Retrieval",
        venue="TPAMI",
        year=2013,
        url="https://doi.org/10.1109/TPAMI.2012.193",
    )
    Config = CcaItqConfig
    config: CcaItqConfig

    def __init__(self, train: TrainData, n_bits: int, config: CcaItqConfig) -> None:
        super().__init__(train, n_bits, config)
        self.image_head = HashHead(HashHeadConfig(train.image.shape[1], n_bits))
        self.text_head = HashHead(HashHeadConfig(train.text.shape[1], n_bits))

    @torch.no_grad()
    def fit(self, train: TrainData, generator: torch.Generator) -> None:
        """Steps 1 to 3; all but the features in float64."""
        heads = (self.image_head, self.text_head)
        centred, means = [], []
        for head, features in zip(heads, (train.image, train.text), strict=True):
            head.scaling.fit(features)
            scaled = head.scaling(features)
            means.append(scaled.mean(dim=0))
            centred.append(scaled.sub_(means[-1]))
        k = min(self.n_bits, centred[0].shape[1], centred[1].shape[1])
        maps = canonical_directions(centred[0], centred[1], k, self.config.ridge)
        projections = torch.cat([projected(features, w) for features, w in zip(centred, maps, strict=True)])
        rotation = itq_rotation(projections, self.n_bits, self.config.iterations, generator)
        for head, mean, w in zip(heads, means, maps, strict=True):
            weight = (w @ rotation).T
            head.output.weight.copy_(weight)
            head.output.bias.copy_(-(weight @ mean.double()))
