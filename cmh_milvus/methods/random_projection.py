"""Random-projection signs: the floor below every learned code.

Each modality is centred on its train mean and projected onto K random orthonormal directions; a bit is the side of the
hyperplane (Charikar, STOC 2002, section 3). Where both modalities have one dimension, as CLIP features do, they share
the directions; otherwise the two projections are independent, and cross-modal ranking is at chance by construction.

Departures: orthonormal directions in place of independent Gaussian ones (fewer bits that repeat each other), in blocks
of the feature dimension where K exceeds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cmh_milvus.encoders.hash_head import HashHead, HashHeadConfig
from cmh_milvus.methods.base import Citation, Count, Method, TrainData


@dataclass(frozen=True)
class RandomProjectionConfig:
    """No settings; a closed form takes one pass."""

    batch_size: Count = 1
    epochs: Count = 1


def random_directions(dim: int, n_bits: int, generator: torch.Generator) -> Tensor:
    """Orthonormal directions in blocks of at most `dim`: float (n_bits, dim)."""
    blocks = []
    for start in range(0, n_bits, dim):
        gaussian = torch.randn(dim, min(dim, n_bits - start), generator=generator)
        blocks.append(torch.linalg.qr(gaussian).Q.T)
    return torch.cat(blocks)


class RandomProjection(Method):
    """See the module's docstring."""

    name = "random_projection"
    supervision = "pairs"
    closed_form = True
    citation = Citation(
        authors="Moses S. Charikar",
        title="Similarity Estimation Techniques from Rounding Algorithms",
        venue="STOC",
        year=2002,
        url="https://doi.org/10.1145/509907.509965",
    )
    Config = RandomProjectionConfig

    def __init__(self, train: TrainData, n_bits: int, config: RandomProjectionConfig) -> None:
        super().__init__(train, n_bits, config)
        self.image_head = HashHead(HashHeadConfig(train.image.shape[1], n_bits))
        self.text_head = HashHead(HashHeadConfig(train.text.shape[1], n_bits))

    @torch.no_grad()
    def fit(self, train: TrainData, generator: torch.Generator) -> None:
        """Draw the directions and centre."""
        directions = random_directions(train.image.shape[1], self.n_bits, generator)
        for head, features in ((self.image_head, train.image), (self.text_head, train.text)):
            if features.shape[1] != directions.shape[1]:
                directions = random_directions(features.shape[1], self.n_bits, generator)
            head.scaling.shift.copy_(features.mean(dim=0))
            head.output.weight.copy_(directions)
            head.output.bias.zero_()
