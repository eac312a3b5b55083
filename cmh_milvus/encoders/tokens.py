"""Items as matrices of tokens: a vector of the whole item, and one for each of its parts.

An item's features are then a matrix (t, d): row 0 describes the item as a whole, the rest are its parts in order, the
words of a text or the places of a picture. A part whose row is all zero is not there (a short text has fewer words),
so the code of an item does not depend on how far its batch was padded. What needs one vector an item takes row 0.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 8  # of the pooling

AnyFeatures = TypeVar("AnyFeatures", Tensor, NDArray[np.float32])


def item_vectors(features: AnyFeatures) -> AnyFeatures:
    """One vector an item: features (n, d) as they are, row 0 of token matrices (n, t, d)."""
    return features[:, 0] if features.ndim == 3 else features


def picture_tokens(whole: Tensor, maps: Tensor, grid: int) -> Tensor:
    """Token matrices of pictures: (b, d) and feature maps (b, d, rows, columns) -> (b, 1 + grid^2, d)."""
    cells = F.adaptive_avg_pool2d(maps, grid).flatten(2).mT  # (b, grid^2, d)
    return torch.cat([whole[:, None], cells], dim=1)


def text_tokens(whole: Tensor, hidden: Tensor, is_word: Tensor, words: int) -> Tensor:
    """Token matrices of texts.

    Args:
        whole: Float (b, d).
        hidden: Float (b, tokens, d), of words, special tokens and padding.
        is_word: Bool (b, tokens).
        words: How many are kept.

    Returns:
        Float (b, 1 + words, d): the first words, l2-normalised, then zeros.
    """
    matrix = whole.new_zeros(len(whole), 1 + words, whole.shape[1])
    matrix[:, 0] = whole
    for row, (vectors, own) in enumerate(zip(hidden, is_word, strict=True)):
        kept = F.normalize(vectors[own][:words], dim=1)
        matrix[row, 1 : 1 + len(kept)] = kept
    return matrix


def is_present(parts: Tensor) -> Tensor:
    """Which parts are there: float (n, t, d) -> bool (n, t)."""
    return (parts != 0).any(dim=2)


def masked_softmax(scores: Tensor, allowed: Tensor) -> Tensor:
    """Weights over tokens: float (n, t, m), bool that broadcasts to it -> (n, t, m); all 0 where none is allowed."""
    return F.softmax(scores.masked_fill(~allowed, torch.finfo(scores.dtype).min), dim=1) * allowed


class TokenPooling(nn.Module):
    """Parts of an item to one vector, by learned attention: (n, t, d), (n, t) -> (n, width).

    A part is known by what it is and, through a learned vector a position, by where it is. Each of eight heads weighs
    the parts anew and averages its share of the width.

    Args:
        parts: t.
        dim: d.
        width: Of the result, a multiple of 8.
    """

    def __init__(self, parts: int, dim: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, width)
        self.position = nn.Parameter(0.1 * torch.randn(parts, width))
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, HEADS)

    def forward(self, parts: Tensor, present: Tensor) -> Tensor:
        """Pooled vectors of scaled parts; zeros where an item has no parts."""
        described = F.gelu(self.norm(self.project(parts) + self.position))  # (n, t, width)
        weights = masked_softmax(self.score(described), present[:, :, None])  # (n, t, heads)
        by_head = described.reshape(*described.shape[:2], HEADS, -1)  # (n, t, heads, width / heads)
        return torch.einsum("nth,nthc->nhc", weights, by_head).flatten(1)


class ConceptGathering(nn.Module):
    """Parts of an item to K concept vectors: (n, t, d), (n, t) -> (n, K * width), as MITH's local branch has it.

    A part is given to those of its `best` concepts whose score is positive; a concept averages its parts by the softmax
    of their scores; a transformer over the K concepts lets them know of each other.

    Args:
        parts: t.
        dim: d.
        concepts: K.
        width: Of a concept, a multiple of 16, which is the width of a head of the transformer.
        best: Most concepts of a part.
    """

    place: Tensor

    def __init__(self, parts: int, dim: int, concepts: int, width: int, best: int = 8) -> None:
        super().__init__()
        self.best = min(best, concepts)
        self.score = nn.Linear(dim, concepts)
        self.value = nn.Linear(dim, width)
        self.position = nn.Parameter(0.1 * torch.randn(parts, width))
        self.register_buffer("place", sinusoids(concepts, width) / width**0.5, persistent=False)
        # Without dropout: attention then needs no (n, heads, K, K) of its own, and a step takes half the time.
        layer = nn.TransformerEncoderLayer(width, width // 16, 4 * width, dropout=0.0, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, parts: Tensor, present: Tensor) -> Tensor:
        """Concept vectors of scaled parts, one after another."""
        scores = torch.tanh(self.score(parts))  # (n, t, K)
        least = scores.topk(self.best, dim=2).values[:, :, -1:]
        allowed = (scores >= least) & (scores > 0) & present[:, :, None]
        values = self.value(parts) + self.position  # (n, t, width)
        concepts = masked_softmax(scores, allowed).mT @ values  # (n, K, width)
        interacting: Tensor = self.transformer(concepts + self.place)
        return interacting.flatten(1)


def sinusoids(n: int, width: int) -> Tensor:
    """Sines and cosines of n places (Vaswani et al. 2017, arXiv 1706.03762, section 3.5): (n, width), width even."""
    angles = torch.arange(n)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)  # (n, width / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
