"""DCHMT: Differentiable Cross-Modal Hashing via Multimodal Transformers (Tu et al., ACM MM 2022). Supervised by labels.

A bit is chosen, not thresholded: each bit has two scores, their softmax is trained, the larger one is the bit. A code
is the 2 K probabilities, and codes are compared by Euclidean distance (numbers are this file's):

    c_i    = [ softmax(z_i1), ..., softmax(z_iK) ] in R^{2K}                                           (1)
    d_ij   = |c_i - c_j|,  at most sqrt(2 K)
    m      = sqrt(2 K theta)                                                                           (2)
    L(U,V) = mean_ij [ S_ij d_ij^2 ] + mean_ij [ (1 - S_ij) (m - min(d_ij, m))^2 ]                     (3)
    L      = L(F,G) + L(F,F) + L(G,G)                                                                  (4)

symbol    variable                       shape
z         activations                    (b, K)   z_k2 - z_k1: all that the softmax and its larger side depend on
F, G      image_code, text_code          (b, 2 K)
S         similarity                     (b, b)   1 where i and j share a label, else 0
theta     theta                          scalar

Departures (authors' code in brackets):
- The two scores of a bit are stored as their difference: softmax(z)_2 = sigmoid(z_2 - z_1), the second is the larger
  exactly where the difference is >= 0. So the select head is a linear layer, as every hash head's output is.
- Nets are MLPs with batch normalisation on backbone features, AdamW with one cycle [CLIP ViT-B/32 fine-tuned, select
  layer 512 -> 128 -> K x 2, BertAdam, 1e-5 for CLIP and 1e-3 for the new layers].
- d is taken as at least 10^-4, because the root has no gradient at 0 (an item and itself).
- theta, the width and the number of epochs are set for features [theta .75, .5 in the code's defaults; 100 epochs].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
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
    check_similarity,
    label_similarity,
    one_cycle,
)


@dataclass(frozen=True)
class DchmtConfig:
    """Settings; in brackets the paper's where it differs.

    Attributes:
        theta: Share of the largest squared distance that dissimilar codes keep apart, eq. 2 [.75].
        hidden: Width of each head's hidden layer [128, on CLIP].
        dropout: On the hidden layer.
        input_dropout: On the scaled features.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: Of AdamW [.2].
        similarity: Grading of S, a name of `methods.base.label_similarity`; the paper's is "any".
        batch_size: Pairs a batch.
        epochs: Passes over the train rows [100]; 0 for as many as show 180,000 pairs, at least 40 and at most 120.
    """

    theta: Share = 0.25
    hidden: Count = 1024
    dropout: Share = 0.5
    input_dropout: Share = 0.2
    learning_rate: Positive = 1e-2
    weight_decay: float = 0.01
    similarity: str = "any"
    batch_size: Count = 256
    epochs: int = 0

    def __post_init__(self) -> None:
        check_similarity(self.similarity)


def select(activations: Tensor) -> Tensor:
    """Eq. 1, second sides first: (b, K) -> (b, 2 K)."""
    return torch.cat([torch.sigmoid(activations), torch.sigmoid(-activations)], dim=1)


def margin(n_bits: int, theta: float) -> float:
    """Eq. 2."""
    return math.sqrt(2 * n_bits * theta)


def squared_distances(codes: Tensor, others: Tensor) -> Tensor:
    """d^2: (b, 2 K), (m, 2 K) -> (b, m)."""
    squares = codes.square().sum(dim=1)[:, None] + others.square().sum(dim=1)[None, :]
    return (squares - 2 * codes @ others.T).clamp(min=0)


def selection_loss(codes: Tensor, others: Tensor, similarity: Tensor, m: float) -> Tensor:
    """Eq. 3: (b, 2 K), (b, 2 K), (b, b) -> scalar."""
    squared = squared_distances(codes, others)
    distance = squared.clamp(min=1e-8).sqrt()  # an item and itself: the root has no gradient at 0
    return (similarity * squared).mean() + ((1 - similarity) * (m - distance.clamp(max=m)).square()).mean()


class DCHMT(Method):
    """See the module's docstring."""

    name = "dchmt"
    supervision = "labels"
    shown = (180_000, 40, 120)
    citation = Citation(
        authors="Junfeng Tu, Xueliang Liu, Zongxiang Lin, Richang Hong and Meng Wang",
        title="Differentiable Cross-modal Hashing via Multimodal Transformers",
        venue="ACM MM",
        year=2022,
        url="https://doi.org/10.1145/3503161.3548187",
    )
    Config = DchmtConfig
    config: DchmtConfig

    def __init__(self, train: TrainData, n_bits: int, config: DchmtConfig) -> None:
        super().__init__(train, n_bits, config)
        shape = (config.hidden,), config.dropout, config.input_dropout
        self.image_head = HashHead.fitted(train.image, n_bits, *shape)
        self.text_head = HashHead.fitted(train.text, n_bits, *shape)
        self.margin = margin(n_bits, config.theta)

    def optimizers(self) -> Mapping[str, Optimizer]:
        """One AdamW over both heads."""
        return {
            "heads": AdamW(
                self.parameters(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay, fused=True
            )
        }

    def learning_rates(self, progress: float) -> Mapping[str, float]:
        """One cycle."""
        return {"heads": one_cycle(progress, self.config.learning_rate)}

    def steps(self, batch: Batch, phase: str) -> Iterator[Step]:
        """One joint update on eq. 4."""
        image_code, text_code = select(self.image_head(batch.image)), select(self.text_head(batch.text))
        similarity = label_similarity(batch.labels, batch.labels, self.config.similarity)
        yield Step(
            "heads",
            {
                "between": selection_loss(image_code, text_code, similarity, self.margin),
                "images": selection_loss(image_code, image_code, similarity, self.margin),
                "texts": selection_loss(text_code, text_code, similarity, self.margin),
            },
        )
