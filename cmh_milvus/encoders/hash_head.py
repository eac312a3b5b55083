"""The layer from backbone features to code activations, one for each modality."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cmh_milvus.codes import check_n_bits
from cmh_milvus.encoders.tokens import ConceptGathering, TokenPooling, is_present, item_vectors
from cmh_milvus.errors import SettingsError

POOLED = 256  # width that the parts of an item are pooled to


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
        tokens: Rows of an item's token matrix that the head reads; 0 where it reads the vector of the whole item alone.
        pooled: Width of the vector that the parts of an item are pooled to, beside the vector of the whole item.
        concepts: Number of vectors that the parts are gathered to, beside the last hidden layer.
        concept: Width of each.
        components: Leading principal components of the scaled features, which stand beside them and beside the last
            hidden layer and are never dropped.
    """

    in_dim: int
    n_bits: int
    hidden: tuple[int, ...] = ()
    batch_norm: bool = False
    dropout: float = 0.0
    input_dropout: float = 0.0
    centroids: int = 0
    tokens: int = 0
    pooled: int = 0
    concepts: int = 0
    concept: int = 0
    components: int = 0

    def __post_init__(self) -> None:
        check_n_bits(self.n_bits)
        if self.in_dim < 1:
            raise SettingsError(f"features of dimension {self.in_dim} cannot be hashed")

    def describe(self) -> dict[str, Any]:
        """JSON description; what a head does not have is left out, as before there was any."""
        absent = [] if self.tokens else ["tokens", "pooled", "concepts", "concept"]
        if not self.components:
            absent.append("components")
        return {key: value for key, value in asdict(self).items() if key not in absent}

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether features of this shape can be hashed: (n, in_dim), or (n, tokens, in_dim)."""
        tokens = shape[1:-1]
        return len(shape) in (2, 3) and shape[-1] == self.in_dim and (not self.tokens or tokens == (self.tokens,))


def is_bag_of_words(features: Tensor) -> bool:
    """Whether features (n, dim) are non-negative and more than half of them zeros."""
    return bool((features >= 0).all()) and (features == 0).float().mean().item() > 0.5


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
        """Take the statistics of train features, float (n, dim); of none, it stays as it is."""
        if (n := len(features)) == 0:
            return
        sparse = is_bag_of_words(features)
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
            constant = 1e-6 * deviation.max().clamp(max=1.0)
            self.gain.copy_(torch.where(deviation > constant, 1 / deviation, 0.0))

    def _weigh(self, features: Tensor) -> Tensor:
        weighted = features * self.weight
        return nn.functional.normalize(weighted, dim=-1) if self.unit_length else weighted

    def forward(self, features: Tensor) -> Tensor:
        """Scaled features, float (..., dim)."""
        return (self._weigh(features) - self.shift) * self.gain


class PrincipalComponents(nn.Module):
    """Features (n, dim) -> their leading principal components (n, n_components), centred, of unit variance on average.

    The axes are a buffer, zero until they are fitted.
    """

    axes: Tensor
    offset: Tensor

    def __init__(self, n_components: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("axes", torch.zeros(dim, n_components))
        self.register_buffer("offset", torch.zeros(n_components))

    def fit(self, features: Tensor) -> None:
        """Take the axes of train features, float (n, dim), n and dim at least the number of components."""
        _, _, axes = torch.pca_lowrank(features, self.axes.shape[1])
        components = features @ axes
        axes = axes / components.std(dim=0, unbiased=False).square().mean().sqrt().clamp(min=1e-12)
        self.axes.copy_(axes)
        self.offset.copy_(features.mean(dim=0) @ axes)

    def forward(self, features: Tensor) -> Tensor:
        """Components of features, float (n, dim)."""
        return features @ self.axes - self.offset


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
        # By matrix products, the distance of a row that is a centroid would be rounding, another one in each batch.
        squared = torch.cdist(features, self.centroids, compute_mode="donot_use_mm_for_euclid_dist").square()
        closeness = 1 / squared.clamp(min=1e-6)
        return closeness / closeness.sum(dim=1, keepdim=True)


class Dropout(nn.Dropout):
    """`nn.Dropout` with the same masks; `rand` draws them in half the time that `bernoulli_` takes on the CPU."""

    def forward(self, features: Tensor) -> Tensor:
        """(n, ...) -> the same shape."""
        if not self.training or not 0 < self.p < 1 or features.device.type != "cpu":
            return super().forward(features)
        kept = torch.rand(features.shape, dtype=torch.float64, device=features.device) < 1 - self.p
        return features * kept.to(features.dtype).div_(1 - self.p)


class InputDropout(Dropout):
    """Dropout of all columns but the last `kept`."""

    def __init__(self, p: float, kept: int) -> None:
        super().__init__(p)
        self.kept = kept

    def forward(self, features: Tensor) -> Tensor:
        """(n, width) -> the same shape."""
        if not self.kept:
            return super().forward(features)
        dropped, kept = features[:, : -self.kept], features[:, -self.kept :]
        return torch.cat([super().forward(dropped), kept], dim=1)


def joined(parts: list[Tensor]) -> Tensor:
    """Parts (n, width) side by side; a single one is not copied."""
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class HashHead(nn.Module):
    """Features -> code activations (n, n_bits); bit 1 where an activation is >= 0.

    The relaxed code is the tanh of the activation, which has the same sign. Features are vectors (n, in_dim), or token
    matrices (n, tokens, in_dim); a head whose config has no tokens reads row 0 of those.
    """

    def __init__(self, config: HashHeadConfig) -> None:
        super().__init__()
        self.config = config
        self.scaling = FeatureScaling(config.in_dim)
        layers: list[nn.Module] = [InputDropout(config.input_dropout, kept=config.components)]
        width = config.in_dim
        if config.tokens:
            self.token_scaling = FeatureScaling(config.in_dim)
            self.token_dropout = Dropout(config.input_dropout)
        if config.pooled:
            self.pooling = TokenPooling(config.tokens - 1, config.in_dim, config.pooled)
            width += config.pooled
        if config.components:
            self.components = PrincipalComponents(config.components, config.in_dim)
            width += config.components
        if config.centroids:
            layers.append(CentroidMemberships(config.centroids, width))
            width = config.centroids
        for hidden in config.hidden:
            layers.append(nn.Linear(width, hidden))
            if config.batch_norm:
                layers.append(nn.BatchNorm1d(hidden))
            layers += [nn.ReLU(), Dropout(config.dropout)]
            width = hidden
        if config.concepts:
            self.gathering = ConceptGathering(config.tokens - 1, config.in_dim, config.concepts, config.concept)
            width += config.concepts * config.concept
        self.output = nn.Linear(width + config.components, config.n_bits)
        self.layers = nn.Sequential(*layers)

    @classmethod
    def fitted(
        cls,
        features: Tensor,
        n_bits: int,
        hidden: tuple[int, ...],
        dropout: float = 0.0,
        input_dropout: float = 0.0,
        concept: int = 0,
        components: int = 0,
    ) -> HashHead:
        """A new head with batch-normalised hidden layers, on the train features' device and with their scaling.

        Args:
            features: float32 (n, in_dim) or (n, tokens, in_dim).
            n_bits: K.
            hidden: Widths of the hidden layers.
            dropout: After each.
            input_dropout: On scaled features.
            concept: Where above 0, the parts of token matrices are gathered to K vectors of this width, not pooled.
            components: Principal components that stand beside bags of words, at most; dense features go without.
        """
        vectors = item_vectors(features)
        tokens = features.shape[1] if features.ndim == 3 else 0
        head = cls(
            HashHeadConfig(
                in_dim=features.shape[-1],
                n_bits=n_bits,
                hidden=hidden,
                batch_norm=True,
                dropout=dropout,
                input_dropout=input_dropout,
                tokens=tokens,
                pooled=POOLED if tokens and not concept else 0,
                concepts=n_bits if tokens and concept else 0,
                concept=concept if tokens else 0,
                components=min(components, *vectors.shape) if components and is_bag_of_words(vectors) else 0,
            )
        ).to(features.device)
        head.scaling.fit(vectors)
        if head.config.components:
            head.components.fit(head.scaling(vectors))
        if tokens:
            parts = features[:, 1:]
            head.token_scaling.fit(parts[is_present(parts)])
        return head

    def hidden(self, features: Tensor) -> Tensor:
        """What the output layer sees: features -> (n, width of the last hidden layer, and of what stands beside it)."""
        whole = self.scaling(item_vectors(features))
        seen, beside = [whole], []
        if self.config.tokens:
            parts, present = self._parts(features)
            if self.config.pooled:
                seen.append(self.pooling(parts, present))
        if self.config.components:
            beside.append(self.components(whole))
        last = self.layers(joined(seen + beside))
        if self.config.concepts:
            beside.append(self.gathering(parts, present))
        return joined([last, *beside])

    def _parts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled parts (n, tokens - 1, in_dim), and which of them are there (n, tokens - 1)."""
        parts = features[:, 1:]
        return self.token_dropout(self.token_scaling(parts)), is_present(parts)

    def forward(self, features: Tensor) -> Tensor:
        """Code activations.

        Args:
            features: float32 (n, in_dim) or (n, tokens, in_dim), as the backbone gives them.

        Returns:
            float32 (n, n_bits).
        """
        activations: Tensor = self.output(self.hidden(features))
        return activations


def relaxed_codes(head: HashHead, features: NDArray[np.float32], batch_size: int = 4096) -> NDArray[np.float32]:
    """Relaxed codes of features, in eval mode.

    Args:
        head: A hash head, on any device.
        features: float32 (n, in_dim) or (n, tokens, in_dim).
        batch_size: Vectors at a time.

    Returns:
        float32 (n, n_bits) in (-1, 1).
    """
    device = next(head.parameters()).device
    batch_size = max(1, batch_size // max(1, head.config.tokens))
    was_training = head.training
    head.eval()
    with torch.inference_mode():
        blocks = [
            torch.tanh(head(torch.from_numpy(features[start : start + batch_size]).to(device))).cpu().numpy()
            for start in range(0, len(features), batch_size)
        ]
    head.train(was_training)
    return np.concatenate(blocks) if blocks else np.empty((0, head.config.n_bits), dtype=np.float32)
