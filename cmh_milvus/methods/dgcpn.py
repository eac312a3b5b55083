"""DGCPN: Deep Graph-neighbor Coherence Preserving Network (Yu et al., AAAI 2021, arXiv 2012.13538). Learns from pairs.

    pairwise      C = a1 F_T F_T^T + (1 - a1) F_I F_I^T                              cosines of the features       (1)
    graph         P_ij ~ max(C_ij, 0) for the k nearest j of i, itself left out, rows sum to 1                    (2)
    coherence     D = P P^T                        how likely two random steps meet at one neighbour              (3)
    target        S = 2 ((1 - a2) C + a2 scale D) - 1                                                             (4)

With the cosines U_IT, U_II, U_TT of relaxed codes F and G (tanh of activations):

    L = mean_i (U_IT,ii - pull)^2                                                    own pairs                    (5)
        + dw ( |U_II - S|^2 + |U_TT - S|^2 + |U_IT - S|^2 )                          off the diagonal             (6)
        + cw ( |U_IT - U_II|^2 + |U_IT - U_TT|^2 + |U_II - U_TT|^2 + |U_IT - U_IT^T|^2 )                          (7)

symbol     variable                       shape
P          neighbours, weights            (n, k + 1)   sparse rows; the item itself has weight 0
P_b        transition                     (b, n)   the batch's rows of P, dense
S          target                         (b, b)
F, G       image_code, text_code          (b, K)

Algorithm: three updates a batch (half real, half binary): L(F, G) for both nets, L(F, sign G) for the image net,
L(sign F, G) for the text net. The squares are means over b^2 entries.

Departures:
- D is made batch by batch from sparse rows, P_b P_b^T. The paper's 5,000^2 matrix does not scale; the authors' k is
  2,000 of n = 5,000 (their option knn_number is 5,000 - k), here a share of n, at most `max_neighbours`.
- scale is given as a multiple of k + 1: P's entries are near 1 / k and so are D's. The paper's 4,000 is 2 k.
- A negative C_ij gives no step from i to j; features that are never negative have none.
- The nets have batch normalisation.
- pull = 1.5, as the code has it; no cosine reaches it, so it is a constant pull.
- a1, the optimizer, batch and number of epochs are set for features (AdamW and one cycle in place of SGD with
  momentum). C is of the features as the backbone gives them; scaled ones gave no better MAP on validation rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW, Optimizer

from cmh_milvus.encoders.hash_head import HashHead
from cmh_milvus.methods.base import (
    Batch,
    Citation,
    Count,
    Method,
    Positive,
    Share,
    Step,
    TrainData,
    binarized,
    nearest_rows,
    one_cycle,
)


@dataclass(frozen=True)
class DgcpnConfig:
    """Settings; in brackets the paper's where it differs.

    Attributes:
        a1: Share of the texts in C [0.01].
        a2: Share of the coherence in S.
        neighbours: k as a share of n [0.4].
        max_neighbours: Upper bound of k.
        scale: Of D, in multiples of k + 1.
        pull: Target of own pairs' cosine.
        dw: Weight of eq. 6.
        cw: Weight of eq. 7.
        hidden: Width of each net's hidden layer [4096].
        dropout: On the hidden layer.
        input_dropout: On the scaled features [none].
        learning_rate: Peak of the one-cycle schedule [SGD 0.005, constant].
        weight_decay: Of AdamW [5e-4].
        batch_size: Pairs a batch [32].
        epochs: Passes over the train rows [100].
    """

    a1: Share = 0.5
    a2: Share = 0.3
    neighbours: Share = 0.4
    max_neighbours: Count = 1000
    scale: float = 2.0
    pull: float = 1.5
    dw: float = 1.0
    cw: float = 1.0
    hidden: Count = 1024
    dropout: Share = 0.5
    input_dropout: Share = 0.2
    learning_rate: Positive = 1e-3
    weight_decay: float = 5.0
    batch_size: Count = 128
    epochs: Count = 10


def joint_features(image: Tensor, text: Tensor, a1: float) -> Tensor:
    """Unit rows whose inner products are C (eq. 1): (n, d_x), (n, d_y) -> (n, d_x + d_y)."""
    return torch.cat([(1 - a1) ** 0.5 * F.normalize(image, dim=1), a1**0.5 * F.normalize(text, dim=1)], dim=1)


def transition(neighbours: Tensor, weights: Tensor, n: int) -> Tensor:
    """Dense rows of P (eq. 2): row numbers (b, k) and C's entries there (b, k) -> (b, n), rows sum to 1."""
    chances = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.zeros(len(chances), n, device=chances.device).scatter_(1, neighbours.long(), chances)


def target_similarity(pairwise: Tensor, coherence: Tensor, a2: float, scale: float) -> Tensor:
    """S (eq. 4): C (b, b), D (b, b) -> (b, b)."""
    return 2 * ((1 - a2) * pairwise + a2 * scale * coherence) - 1


def coherence_loss(
    image_code: Tensor, text_code: Tensor, target: Tensor, pull: float, dw: float, cw: float
) -> dict[str, Tensor]:
    """L by its terms: (b, K), (b, K), (b, b) -> scalars of eq. 5, 6, 7."""
    image, text = F.normalize(image_code, dim=1), F.normalize(text_code, dim=1)
    across, images, texts = image @ text.T, image @ image.T, text @ text.T
    off_diagonal = 1 - torch.eye(len(target), device=target.device)
    structure = [((u - target) * off_diagonal).square().mean() for u in (images, texts, across)]
    return {
        "pairs": (across.diagonal() - pull).square().mean(),
        "structure": dw * torch.stack(structure).sum(),
        "consistency": cw
        * (
            F.mse_loss(across, images)
            + F.mse_loss(across, texts)
            + F.mse_loss(images, texts)
            + F.mse_loss(across, across.T)
        ),
    }


class DGCPN(Method):
    """See the module's docstring."""

    name = "dgcpn"
    supervision = "pairs"
    citation = Citation(
        authors="Jun Yu, Hao Zhou, Yibing Zhan and Dacheng Tao",
        title="Deep Graph-neighbor Coherence Preserving Network for Unsupervised Cross-modal Hashing",
        venue="AAAI",
        year=2021,
        url="https://arxiv.org/abs/2012.13538",
    )
    Config = DgcpnConfig
    config: DgcpnConfig

    neighbours: Tensor
    weights: Tensor

    def __init__(self, train: TrainData, n_bits: int, config: DgcpnConfig) -> None:
        super().__init__(train, n_bits, config)
        shape = (config.hidden,), config.dropout, config.input_dropout
        self.image_head = HashHead.fitted(train.image, n_bits, *shape)
        self.text_head = HashHead.fitted(train.text, n_bits, *shape)
        k = max(1, min(round(config.neighbours * len(train)), config.max_neighbours, len(train) - 1))
        weights, neighbours = nearest_rows(joint_features(train.image_vectors, train.text_vectors, config.a1), k + 1)
        itself = neighbours == torch.arange(len(train), device=neighbours.device)[:, None]
        self.register_buffer("neighbours", neighbours, persistent=False)
        self.register_buffer("weights", weights.clamp_(min=0).masked_fill_(itself, 0.0), persistent=False)

    def optimizers(self) -> Mapping[str, Optimizer]:
        """One over both nets; a net without gradient stays as it is."""
        return {
            "nets": AdamW(
                self.parameters(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay, fused=True
            )
        }

    def learning_rates(self, progress: float) -> Mapping[str, float]:
        """One cycle."""
        return {"nets": one_cycle(progress, self.config.learning_rate)}

    def target(self, batch: Batch) -> Tensor:
        """S of the batch."""
        config = self.config
        features = joint_features(batch.image_vectors, batch.text_vectors, config.a1)
        rows = transition(self.neighbours[batch.index], self.weights[batch.index], len(self.weights))
        scale = config.scale * self.neighbours.shape[1]
        return target_similarity(features @ features.T, rows @ rows.T, config.a2, scale)

    def steps(self, batch: Batch, phase: str) -> Iterator[Step]:
        """Real against real, then each net against the other's signs."""
        target = self.target(batch)
        for real in ({"image", "text"}, {"image"}, {"text"}):
            image_code, text_code = (
                torch.tanh(head(features)) if side in real else binarized(head(features))
                for side, head, features in (
                    ("image", self.image_head, batch.image),
                    ("text", self.text_head, batch.text),
                )
            )
            config = self.config
            yield Step("nets", coherence_loss(image_code, text_code, target, config.pull, config.dw, config.cw))
