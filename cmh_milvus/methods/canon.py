"""CANON: canonical codes, distilled (this project's own). Learns from pairs.

What picture and text of a pair have in common is what a retrieval across them can be judged by, and regularised
canonical correlation finds it in closed form. A teacher that sees both sides of each pair makes codes of it; the two
hash heads, which see one side each, learn to predict them.

    z_x, z_y   unit rows of x W_x rho^2 and y W_y rho^2: the K' canonical directions of largest correlation rho    (1)
               of the ridge-regularised features (Hotelling 1936; see cca_itq.py)
    z          unit row of (1 - text_share) z_x + text_share z_y, centred                                          (2)
    B          sign(z R), R by iterative quantisation (Gong et al. 2013, eq. 2)                                    (3)
    L          mean over entries of log(1 + e^(-B h_x)) + log(1 + e^(-B h_y))                                      (4)

symbol     variable              shape
W_x, W_y   inside teacher_codes  (d, K')
z          shared                (n, K')
B          target_codes          (n, K)   -1, +1
h_x, h_y   activations           (b, K)

A large ridge and the square of rho keep what both sides agree on and drop what either says alone; the weights were
chosen on validation rows. K bits of K' < K directions come of a rotation with K columns; where K < K', only the K
strongest columns of z are turned. Heads see principal components beside bags of words, as DUET's do (see duet.py).

Departures: none from a paper; the method is made of the published parts named above.
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
    one_cycle,
)
from cmh_milvus.methods.cca_itq import canonical_directions, itq_rotation, projected


@dataclass(frozen=True)
class CanonConfig:
    """Settings, chosen on validation rows.

    Attributes:
        directions: K', canonical directions of the teacher.
        ridge: Added to the covariances' diagonals, relative to the mean variance of a column.
        power: Of the correlations that scale the directions.
        text_share: Weight of the text in the teacher's mean.
        iterations: Of ITQ.
        components: Principal components of a bag of words that the head sees beside it; 0 for none.
        hidden: Width of each head's hidden layer.
        dropout: On the hidden layer.
        input_dropout: On the scaled features.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: Of AdamW.
        batch_size: Pairs a batch.
        epochs: Passes over the train rows; 0 for as many as show 180,000 pairs, at least 12 and at most 40.
    """

    directions: Count = 32
    ridge: Positive = 3.0
    power: float = 2.0
    text_share: Share = 0.6
    iterations: Count = 30
    components: int = 128
    hidden: Count = 2048
    dropout: Share = 0.5
    input_dropout: Share = 0.2
    learning_rate: Positive = 1e-3
    weight_decay: float = 0.01
    batch_size: Count = 256
    epochs: int = 0


def shared_rows(image: Tensor, text: Tensor, config: CanonConfig) -> Tensor:
    """Eq. 1 and 2: scaled features (n, d_x), (n, d_y), float -> float64 (n, K')."""
    image, text = image - image.mean(dim=0), text - text.mean(dim=0)
    k = min(config.directions, image.shape[1], text.shape[1])
    maps = canonical_directions(image, text, k, config.ridge, config.power)
    z_image, z_text = (F.normalize(projected(x, w), dim=1) for x, w in zip((image, text), maps, strict=True))
    shared = F.normalize((1 - config.text_share) * z_image + config.text_share * z_text, dim=1)
    return shared - shared.mean(dim=0)


def teacher_codes(shared: Tensor, n_bits: int, iterations: int) -> Tensor:
    """Eq. 3: (n, K') -> float32 (n, K) of -1 and +1; the rotation starts from the global random state."""
    start = torch.Generator().manual_seed(int(torch.randint(2**31, (1,))))
    rotation = itq_rotation(shared[:, : min(shared.shape[1], n_bits)], n_bits, iterations, start)
    return binarized(shared[:, : len(rotation)] @ rotation).float()


def code_loss(activations: Tensor, codes: Tensor) -> Tensor:
    """One half of eq. 4: (b, K), (b, K) -> scalar."""
    return F.softplus(-codes * activations).mean()


class Canon(Method):
    """See the module's docstring."""

    name = "canon"
    supervision = "pairs"
    shown = (180_000, 12, 40)
    citation = Citation(
        authors="the cmh-milvus authors",
        title="CANON: canonical codes, distilled",
        venue="cmh-milvus",
        year=2026,
        url="https://github.com/cmh-milvus/cmh-milvus",
    )
    Config = CanonConfig
    config: CanonConfig

    target_codes: Tensor

    def __init__(self, train: TrainData, n_bits: int, config: CanonConfig) -> None:
        super().__init__(train, n_bits, config)

        def head(features: Tensor) -> HashHead:
            dropouts = config.dropout, config.input_dropout
            return HashHead.fitted(features, n_bits, (config.hidden,), *dropouts, components=config.components)

        self.image_head, self.text_head = head(train.image), head(train.text)
        shared = shared_rows(
            self.image_head.scaling(train.image_vectors), self.text_head.scaling(train.text_vectors), config
        )
        codes = teacher_codes(shared, n_bits, config.iterations)
        self.register_buffer("target_codes", codes)

    def optimizers(self) -> Mapping[str, Optimizer]:
        """One AdamW over both heads."""
        config = self.config
        return {
            "heads": AdamW(self.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        }

    def learning_rates(self, progress: float) -> Mapping[str, float]:
        """One cycle."""
        return {"heads": one_cycle(progress, self.config.learning_rate)}

    def steps(self, batch: Batch, phase: str) -> Iterator[Step]:
        """One update on eq. 4."""
        codes = self.target_codes[batch.index]
        yield Step(
            "heads",
            {
                "image": code_loss(self.image_head(batch.image), codes),
                "text": code_loss(self.text_head(batch.text), codes),
            },
        )
