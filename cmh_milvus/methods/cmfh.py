"""CMFH: Collective Matrix Factorization Hashing (Ding, Guo & Zhou, CVPR 2014). Learns from pairs; linear.

Both modalities of a pair share one latent row, which each modality's features predict:

    J = sum_t a_t ( |X_t - Y U_t|^2 + mu |Y - X_t W_t|^2 + gamma (|U_t|^2 + |W_t|^2 + |Y|^2) )                    (1)

and the closed-form minima of J in one unknown, taken in turn:

    U_t = (Y^T Y + gamma I)^-1 Y^T X_t                                                                            (2)
    W_t = (X_t^T X_t + gamma / mu I)^-1 X_t^T Y                                                                   (3)
    Y = sum_t a_t X_t (U_t^T + mu W_t) [ sum_t a_t (U_t U_t^T + (mu + gamma) I) ]^-1                              (4)

The code of an item is sign(x W_t).

symbol    variable      shape
X_t       image, text   (n, d_t)   scaled and centred
Y         latent        (n, K)
U_t       basis         (K, d_t)
W_t       projection    (d_t, K)

Departures:
- gamma of |U_t|^2 and |W_t|^2 is relative to n, or to the mean squared length of a column of X_t, so that it means the
  same for any number of pairs; that of |Y|^2, which has a row a pair, is as it stands. It is larger in eq. 3 (`ridge`):
  the paper's 0.01 leaves the projections of a thousand word counts unregularised.
- Features are divided by the square root of their dimension, so that a_t weighs modalities and not numbers of columns.
- Codes are of centred features, and Y is rotated by ITQ (Gong et al. 2013, section 3.2) before the last eq. 3: J does
  not change under a rotation of Y, and the signs lose less. `iterations` of both are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmh_milvus.encoders.hash_head import HashHead, HashHeadConfig
from cmh_milvus.methods.base import Citation, Count, Method, Positive, Share, TrainData
from cmh_milvus.methods.cca_itq import cross_products, itq_rotation, projected


@dataclass(frozen=True)
class CmfhConfig:
    """Settings; in brackets the paper's where it differs.

    Attributes:
        image_weight: a of images; that of texts is 1 - a.
        mu: Weight of the prediction.
        gamma: Weight of the regularisation, in eq. 2 relative to n [0.01, absolute].
        ridge: gamma / mu of eq. 3, relative to the mean squared length of a column [0.0001, absolute].
        iterations: Rounds of eq. 2 to 4 [25].
    """

    image_weight: Share = 0.5
    mu: Positive = 100.0
    gamma: float = 1e-4
    ridge: Positive = 1.0
    iterations: Count = 15
    batch_size: Count = 1
    epochs: Count = 1


def update_basis(latent: Tensor, features: Tensor, gamma: float) -> Tensor:
    """Eq. 2: Y (n, K), X (n, d) -> U (K, d)."""
    gram = latent.T @ latent
    gram.diagonal().add_(gamma)
    basis: Tensor = torch.linalg.solve(gram, cross_products(latent, features))
    return basis


def factorize(features: Tensor, ridge: float) -> Tensor:
    """Cholesky factor of the matrix that eq. 3 inverts, ridge = gamma / mu: X (n, d) -> (d, d)."""
    gram = cross_products(features, features)
    gram.diagonal().add_(ridge)
    factor: Tensor = torch.linalg.cholesky(gram)
    return factor


def update_projection(features: Tensor, latent: Tensor, factor: Tensor) -> Tensor:
    """Eq. 3: X (n, d), Y (n, K), factor (d, d) -> W (d, K)."""
    return torch.cholesky_solve(cross_products(features, latent), factor)


def update_latent(
    features: list[Tensor],
    bases: list[Tensor],
    projections: list[Tensor],
    weights: list[float],
    mu: float,
    gamma: float,
) -> Tensor:
    """Eq. 4: X_t, U_t, W_t, a_t -> Y (n, K)."""
    views = list(zip(features, bases, projections, weights, strict=True))
    zero = torch.zeros((), dtype=torch.float64)
    left = sum((a * projected(x, u.T + mu * w) for x, u, w, a in views), start=zero)
    right = sum((a * (u @ u.T) for _, u, _, a in views), start=zero)
    right.diagonal().add_(sum(weights) * (mu + gamma))
    latent: Tensor = torch.linalg.solve(right, left, left=False)
    return latent


class CMFH(Method):
    """See the module's docstring."""

    name = "cmfh"
    supervision = "pairs"
    closed_form = True
    citation = Citation(
        authors="Guiguang Ding, Yuchen Guo and Jile Zhou",
        title="Collective Matrix Factorization Hashing for Multimodal Data",
        venue="CVPR",
        year=2014,
        url="https://doi.org/10.1109/CVPR.2014.267",
    )
    Config = CmfhConfig
    config: CmfhConfig

    def __init__(self, train: TrainData, n_bits: int, config: CmfhConfig) -> None:
        super().__init__(train, n_bits, config)
        self.image_head = HashHead(HashHeadConfig(train.image.shape[1], n_bits))
        self.text_head = HashHead(HashHeadConfig(train.text.shape[1], n_bits))

    @torch.no_grad()
    def fit(self, train: TrainData, generator: torch.Generator) -> None:
        """Eq. 2 to 4 in turn; all but the features in float64."""
        config, n = self.config, len(train)
        heads = (self.image_head, self.text_head)
        views, means = [], []
        for head, features in zip(heads, (train.image, train.text), strict=True):
            head.scaling.fit(features)
            scaled = head.scaling(features).div_(features.shape[1] ** 0.5)
            means.append(scaled.mean(dim=0))
            views.append(scaled.sub_(means[-1]))
        weights = [config.image_weight, 1 - config.image_weight]
        gamma = config.gamma * n
        latent = torch.randn(n, self.n_bits, generator=generator, dtype=torch.float64).to(train.image.device)
        factors = [factorize(x, config.ridge * x.square().sum().item() / x.shape[1]) for x in views]
        for _ in range(config.iterations):
            bases = [update_basis(latent, x, gamma) for x in views]
            projections = [update_projection(x, latent, factor) for x, factor in zip(views, factors, strict=True)]
            latent = update_latent(views, bases, projections, weights, config.mu, config.gamma)
        latent = latent @ itq_rotation(latent, self.n_bits, config.iterations, generator)
        for head, x, mean, factor in zip(heads, views, means, factors, strict=True):
            projection = update_projection(x, latent, factor)
            head.output.weight.copy_(projection.T / x.shape[1] ** 0.5)
            head.output.bias.copy_(-(mean.double() @ projection))
