"""SCM: Semantic Correlation Maximization, sequential (Zhang & Li, AAAI 2014). Supervised by labels, closed form.

Bits are learned one after another; each is the pair of directions that best explains what the earlier bits left of the
label similarity (numbers are this file's):

    S      = 2 Lhat Lhat^T - 1 1^T,  Lhat = label vectors at unit length: cosine, brought to [-1, 1]        (1)
    C_1    = X^T (K S) Y = K ( 2 (X^T Lhat)(Y^T Lhat)^T - (X^T 1)(Y^T 1)^T )                                (2)
    max_w  w_x^T C_k w_y   so that  w_x^T Cxx w_x = w_y^T Cyy w_y = n                                       (3)
    C_k+1  = C_k - (X^T sign(X w_x)) (Y^T sign(Y w_y))^T                                                    (4)

symbol      variable                shape
X, Y        image, text             (n, d)       centred; white in the code: X Cxx^-1/2, which turns (3) into an SVD
w_x, w_y    image_map, text_map     (d, K)
C_k         left @ right.T          (d_x, d_y)   kept as two thin factors of rank at most n_labels + 1 + K

Nothing is n x n: S enters through X^T Lhat alone.

Departures:
- The ridge is relative to the mean variance of a column and larger than published code's 10^-6, with which directions
  of noise win on a thousand columns.
- All K bits are learned; published code stops when an eigenvalue rises.
- Every row is centred by the train rows' mean (a published port leaves the database as it is). sign(0) = +1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cmh_milvus.encoders.hash_head import HashHead, HashHeadConfig
from cmh_milvus.methods.base import Citation, Count, Method, Positive, TrainData, binarized
from cmh_milvus.methods.cca_itq import inverse_root


@dataclass(frozen=True)
class ScmConfig:
    """Settings.

    Attributes:
        ridge: Added to the covariances' diagonals, relative to the mean variance of a column [10^-6, absolute].
    """

    ridge: Positive = 1.0
    batch_size: Count = 1
    epochs: Count = 1


def similarity_factors(features: Tensor, labels: Tensor) -> Tensor:
    """Factors of eq. 2 without K and signs: (n, d), (n, n_labels) -> (d, n_labels + 1)."""
    unit = F.normalize(labels, dim=1)
    return torch.cat([features.T @ unit, features.sum(dim=0)[:, None]], dim=1)


def top_pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """First singular vectors of left @ right.T: (d_x, r), (d_y, r) -> (d_x,), (d_y,)."""
    left_axes, left_small = torch.linalg.qr(left)
    right_axes, right_small = torch.linalg.qr(right)
    u, _, vt = torch.linalg.svd(left_small @ right_small.T)
    return left_axes @ u[:, 0], right_axes @ vt[0]


def sequential_directions(image: Tensor, text: Tensor, labels: Tensor, n_bits: int) -> tuple[Tensor, Tensor]:
    """Eq. 2 to 4 for white features: (n, d_x), (n, d_y), (n, n_labels) -> float64 (d_x, K), (d_y, K)."""
    weight = torch.full((labels.shape[1] + 1,), 2.0 * n_bits, dtype=torch.float64, device=image.device)
    weight[-1] = -n_bits
    left = similarity_factors(image, labels).double() * weight
    right = similarity_factors(text, labels).double()
    image_maps, text_maps = [], []
    for _ in range(n_bits):
        w_x, w_y = top_pair(left, right)
        image_maps.append(w_x)
        text_maps.append(w_y)
        image_bit = binarized(image @ w_x.to(image.dtype))
        text_bit = binarized(text @ w_y.to(text.dtype))
        left = torch.cat([left, -(image.T @ image_bit).double()[:, None]], dim=1)
        right = torch.cat([right, (text.T @ text_bit).double()[:, None]], dim=1)
    return torch.stack(image_maps, dim=1), torch.stack(text_maps, dim=1)


class SCM(Method):
    """See the module's docstring."""

    name = "scm"
    supervision = "labels"
    closed_form = True
    citation = Citation(
        authors="Dongqing Zhang and Wu-Jun Li",
        title="Large-Scale Supervised Multimodal Hashing with Semantic Correlation Maximization",
        venue="AAAI",
        year=2014,
        url="https://doi.org/10.1609/aaai.v28i1.8995",
    )
    Config = ScmConfig
    config: ScmConfig

    def __init__(self, train: TrainData, n_bits: int, config: ScmConfig) -> None:
        super().__init__(train, n_bits, config)
        self.image_head = HashHead(HashHeadConfig(train.image.shape[1], n_bits))
        self.text_head = HashHead(HashHeadConfig(train.text.shape[1], n_bits))

    @torch.no_grad()
    def fit(self, train: TrainData, generator: torch.Generator) -> None:
        """Centre, whiten, learn the bits; covariances and maps in float64."""
        heads = (self.image_head, self.text_head)
        white, means, roots = [], [], []
        for head, features in zip(heads, (train.image, train.text), strict=True):
            head.scaling.fit(features)
            scaled = head.scaling(features)
            means.append(scaled.mean(dim=0))
            scaled -= means[-1]
            roots.append(inverse_root(scaled, self.config.ridge))
            white.append(scaled @ roots[-1].to(scaled.dtype))
        maps = sequential_directions(white[0], white[1], train.labels, self.n_bits)
        for head, mean, root, w in zip(heads, means, roots, maps, strict=True):
            weight = (root @ w).T
            head.output.weight.copy_(weight)
            head.output.bias.copy_(-(weight @ mean.double()))
