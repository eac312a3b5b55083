"""The layer from backbone features to code activations, one for each modality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cmh_milvus.codes import check_n_bits
from cmh_milvus.errors import SettingsError


@dataclass(frozen=True)
class HashHeadConfig:
    """Shape of a hash head.

    Attributes:
        in_dim: Dimension of the backbone's features.
        n_bits: Code length K.
        hidden: Widths of the hidden layers; () makes the head linear.
        batch_norm: Batch normalisation after each hidden linear layer.
        dropout: After each hidden layer, while training.
        input_dropout: On the scaled features, while training.
        centroids: Where above 0, an item is described by its memberships of that many centroids in place of its
            scaled features.
    """

    in_dim: int
    n_bits: int
    hidden: tuple[int, ...] = ()
    batch_norm: bool = False
    dropout: float = 0.0
    input_dropout: float = 0.0
    centroids: int = 0

    def __post_init__(self) -> None:
        check_n_bits(self.n_bits)
        if self.in_dim < 1:
            raise SettingsError(f"features of dimension {self.in_dim} cannot be hashed")


class FeatureScaling(nn.Module):
    """Brings features of any backbone to a scale that one learning rate suits.

    Dense features are standardised by column. Sparse non-negative features (bag of words) are weighted by inverse
    document frequency when they are counts, brought to unit length, and scaled so that an entry has unit variance
    on average. The statistics are the train rows', stored as buffers, so the result depends on the item alone.
    """

    weight: Tensor
    unit_length: Tensor
    shift: Tensor
    gain: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(dim))
        self.register_buffer("unit_length", torch.tensor(False))
        self.register_buffer("shift", torch.zeros(dim))
        self.register_buffer("gain", torch.ones(dim))

    def fit(self, features: Tensor) -> None:
        """Take the statistics of train features, float (n, dim)."""
        n = len(features)
        sparse = bool((features >= 0).all()) and (features == 0).float().mean().item() > 0.5
        if sparse and bool((features == features.round()).all()):
            document_frequency = (features > 0).sum(dim=0)
            self.weight.copy_(torch.log((n + 1) / (document_frequency + 1)))
        self.unit_length.fill_(sparse)
        scaled = self._weigh(features)
        if sparse:
            self.gain.fill_(1 / scaled.std().clamp(min=1e-12).item())
        else:
            self.shift.copy_(scaled.mean(dim=0))
            deviation = scaled.std(dim=0, unbiased=False)
            self.gain.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0.0))

    def _weigh(self, features: Tensor) -> Tensor:
        weighted = features * self.weight
        return nn.functional.normalize(weighted, dim=1) if self.unit_length else weighted

    def forward(self, features: Tensor) -> Tensor:
        """Scaled features, float (n, dim)."""
        return (self._weigh(features) - self.shift) * self.gain


class CentroidMemberships(nn.Module):
    """Features (n, dim) -> memberships (n, n_centroids): inverse squared distances, summing to 1.

    The centroids are a buffer, zero until a method sets them.
    """

    centroids: Tensor

    def __init__(self, n_centroids: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.zeros(n_centroids, dim))

    def forward(self, features: Tensor) -> Tensor:
        """Memberships of features, float (n, dim)."""
        squared = torch.cdist(features, self.centroids).square()
        closeness = 1 / squared.clamp(min=1e-6)
        return closeness / closeness.sum(dim=1, keepdim=True)


class HashHead(nn.Module):
    """Features (n, in_dim) -> code activations (n, n_bits); bit 1 where an activation is >= 0.

    The relaxed code is the tanh of the activation, which has the same sign.
    """

    def __init__(self, config: HashHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.scaling = FeatureScaling(config.in_dim)
        layers: list[nn.Module] = [nn.Dropout(config.input_dropout)]
        width = config.in_dim
        if config.centroids:
            layers.append(CentroidMemberships(config.centroids, width))
            width = config.centroids
        for hidden in config.hidden:
            layers.append(nn.Linear(width, hidden))
            if config.batch_norm:
                layers.append(nn.BatchNorm1d(hidden))
            layers += [nn.ReLU(), nn.Dropout(config.dropout)]
            width = hidden
        self.output = nn.Linear(width, config.n_bits)
        self.layers = nn.Sequential(*layers)

    @classmethod
    def fitted(
        cls, features: Tensor, n_bits: int, hidden: tuple[int, ...], dropout: float, input_dropout: float
    ) -> HashHead:
        """A new head with batch-normalised hidden layers, its scaling taken from train features (n, in_dim)."""
        head = cls(
            HashHeadConfig(
                in_dim=features.shape[1],
                n_bits=n_bits,
                hidden=hidden,
                batch_norm=True,
                dropout=dropout,
                input_dropout=input_dropout,
            )
        )
        head.scaling.fit(features)
        return head

    def hidden(self, features: Tensor) -> Tensor:
        """What the output layer sees: features (n, in_dim) -> (n, width of the last hidden layer)."""
        last: Tensor = self.layers(self.scaling(features))
        return last

    def forward(self, features: Tensor) -> Tensor:
        """Code activations.

        Args:
            features: float32 (n, in_dim), as the backbone gives them.

        Returns:
            float32 (n, n_bits).
        """
        activations: Tensor = self.output(self.hidden(features))
        return activations


def relaxed_codes(head: HashHead, features: NDArray[np.float32], batch_size: int = 4096) -> NDArray[np.float32]:
    """Relaxed codes of features, in eval mode.

    Args:
        head: A hash head, on any device.
        features: float32 (n, in_dim).
        batch_size: Rows at a time.

    Returns:
        float32 (n, n_bits) in (-1, 1).
    """
    device = next(head.parameters()).device
    was_training = head.training
    head.eval()
    with torch.inference_mode():
        blocks = [
            torch.tanh(head(torch.from_numpy(features[start : start + batch_size]).to(device))).cpu().numpy()
            for start in range(0, len(features), batch_size)
        ]
    head.train(was_training)
    return np.concatenate(blocks) if blocks else np.empty((0, head.config.n_bits), dtype=np.float32)
