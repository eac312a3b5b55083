"""The contract of a method: how codes are learned, without loops, devices or files.

A method owns one hash head for each modality, whatever auxiliary nets and whole-set buffers it needs, and named
optimizers. The trainer (`cmh_milvus.training`) runs::

    for epoch:
        for phase in method.phases(epoch):
            for batch in shuffled train rows:
                for step in method.steps(batch, phase):
                    one update of the optimizer that `step` names, on the sum of its loss terms
            method.end_phase(phase)
        method.end_epoch(epoch)

`steps` is a generator, so a later step of a batch sees the weights that the earlier one moved. `phases` may be a
generator as well: it is read lazily, so a method can end an inner loop early. A closed-form method sets
`closed_form` and overrides `fit`; it is given one vector an item. One that can do without the labels it prefers sets
`labels_optional`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from cmh_milvus.encoders.hash_head import HashHead
from cmh_milvus.encoders.tokens import item_vectors
from cmh_milvus.errors import SettingsError

SIMILARITIES = ("any", "jaccard", "cosine", "count")  # gradings of `label_similarity`


@dataclass(frozen=True)
class Citation:
    """Where a method was published."""

    authors: str
    title: str
    venue: str
    year: int
    url: str


@dataclass(frozen=True)
class Bounds:
    """Values that a setting may have: finite, from `low` (or above it, where that is `excluded`) to `high`."""

    low: float = 0.0
    high: float = math.inf
    excluded: bool = False

    def allow(self, value: float) -> bool:
        """Whether `value` is within."""
        return math.isfinite(value) and self.low <= value <= self.high and not (self.excluded and value == self.low)

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"between {self.low:g} and {self.high:g}"
        return f"{'above' if self.excluded else 'at least'} {self.low:g}"


Count = Annotated[int, Bounds(1)]
Share = Annotated[float, Bounds(0, 1)]
Positive = Annotated[float, Bounds(0, excluded=True)]


class MethodConfig(Protocol):
    """What every method's frozen `Config` dataclass has. A number is at least 0 where its type does not say more."""

    @property
    def epochs(self) -> int:
        """Passes over the train rows."""

    @property
    def batch_size(self) -> int:
        """Pairs a batch."""


@dataclass(frozen=True)
class TrainData:
    """The train rows, on the training device.

    Attributes:
        image: float32 (n, image_dim) backbone features, or token matrices (n, tokens, image_dim).
        text: float32 (n, text_dim), or (n, tokens, text_dim).
        label_matrix: float32 (n, n_labels) of 0 and 1, or None where the method may not see labels.
    """

    image: Tensor
    text: Tensor
    label_matrix: Tensor | None

    def __len__(self) -> int:
        return len(self.image)

    @property
    def labels(self) -> Tensor:
        """float32 (n, n_labels).

        Raises:
            SettingsError: There are no labels, or the method is unsupervised and may not see them.
        """
        if self.label_matrix is None:
            raise SettingsError("labels were asked for, but the data have none or the method learns from pairs alone")
        return self.label_matrix

    @property
    def image_vectors(self) -> Tensor:
        """float32 (n, image_dim): one vector a picture, also where `image` holds tokens.

        For graphs and targets: without a gradient, also where the backbones learn and that of `image` moves them.
        """
        return item_vectors(self.image)

    @property
    def text_vectors(self) -> Tensor:
        """float32 (n, text_dim): one vector a text, likewise."""
        return item_vectors(self.text)

    def rows(self, index: Tensor) -> Batch:
        """The batch of the train rows `index`, int64 (b,)."""
        labels = None if self.label_matrix is None else self.label_matrix[index]
        return Batch(self.image[index], self.text[index], labels, index)


@dataclass(frozen=True)
class Batch(TrainData):
    """Some train rows; `index` int64 (b,) are their numbers among the n train rows."""

    index: Tensor


@dataclass(frozen=True)
class Step:
    """One update: which optimizer, on the sum of which named loss terms (scalars)."""

    optimizer: str
    terms: Mapping[str, Tensor]


class Method(nn.Module):
    """Base of every method; see the module's docstring for how it is called.

    Args:
        train: The train rows.
        n_bits: Code length K.
        config: An instance of the class's `Config`; its `epochs` is what this very training takes, be it a trial of
            settings or the refit of the epoch that was chosen.

    Attributes:
        image_head: Hash head of pictures.
        text_head: Hash head of texts.
    """

    name: ClassVar[str]
    supervision: ClassVar[Literal["labels", "pairs"]]
    citation: ClassVar[Citation]
    Config: ClassVar[type[Any]]
    closed_form: ClassVar[bool] = False
    labels_optional: ClassVar[bool] = False
    shown: ClassVar[tuple[int, int, int]] = (0, 1, 1)  # see `epochs`

    image_head: HashHead
    text_head: HashHead

    def __init__(self, train: TrainData, n_bits: int, config: Any) -> None:
        super().__init__()
        self.n_bits = n_bits
        self.config = config

    @classmethod
    def epochs(cls, config: Any, n: int) -> int:
        """Passes over n train rows at most; the validation rows may choose fewer.

        Where the config has 0: until `shown` pairs were seen, but at least and at most so often.
        """
        shown, fewest, most = cls.shown
        return int(config.epochs) or min(max(shown // n, fewest), most)

    @classmethod
    def left_open(cls, has_labels: bool) -> Mapping[str, Sequence[Any]]:
        """Settings that the validation rows choose where the user gives none: by name, the values that are tried.

        Each, or the value that the user gives, is tried in a third of the epochs; that of the highest score is trained
        in full.
        """
        return {}

    def optimizers(self) -> Mapping[str, Optimizer]:
        """The optimizers by the names that steps use."""
        raise NotImplementedError

    def learning_rates(self, progress: float) -> Mapping[str, float]:
        """Learning rates at `progress` in [0, 1] of the training, by optimizer; those left out stay as they are."""
        return {}

    def phases(self, epoch: int) -> Iterable[str]:
        """The passes over the data that make up an epoch."""
        return ("joint",)

    def steps(self, batch: Batch, phase: str) -> Iterator[Step]:
        """The updates that a batch causes in a phase."""
        raise NotImplementedError

    def end_phase(self, phase: str) -> None:
        """Called after the last batch of a phase."""

    def end_epoch(self, epoch: int) -> None:
        """Called after the last phase of an epoch."""

    def fit(self, train: TrainData, generator: torch.Generator) -> None:
        """Learn at once; called in place of the loop where `closed_form` is set."""
        raise NotImplementedError


def binarized(activations: Tensor) -> Tensor:
    """Hash codes of activations or relaxed codes, without gradient.

    Args:
        activations: float, any shape.

    Returns:
        +1 where an activation is >= 0, else -1, same shape and dtype.
    """
    return torch.where(activations.detach() >= 0, 1.0, -1.0).to(activations.dtype)


def straight_through_sign(activations: Tensor) -> Tensor:
    """Codes of -1 and +1 whose gradient is that of tanh (Bengio, Leonard & Courville 2013, arXiv 1308.3432).

    Args:
        activations: float, any shape.

    Returns:
        +1 where an activation is >= 0, else -1, same shape and dtype.
    """
    relaxed = torch.tanh(activations)
    return relaxed + (binarized(activations) - relaxed).detach()


def cosines(rows: Tensor, others: Tensor) -> Tensor:
    """Cosines of rows with rows, 0 for a row of zeros: (b, d), (m, d) -> (b, m)."""
    return F.normalize(rows, dim=1) @ F.normalize(others, dim=1).T


def one_cycle(progress: float, peak: float, warm_up: float = 0.3) -> float:
    """Learning rate that rises to `peak` and falls to nothing along cosines (Smith & Topin 2019, arXiv 1708.07120).

    Args:
        progress: Share of the training that is done, in [0, 1].
        peak: Largest learning rate.
        warm_up: Share of the training until the peak.
    """
    start, end = peak / 25, peak / 250_000
    if progress < warm_up:
        low, high, position = start, peak, 1 - progress / warm_up
    else:
        low, high, position = end, peak, (progress - warm_up) / (1 - warm_up)
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(position, 1.0)))


def check_similarity(grading: str) -> None:
    """A `label_similarity` of this name must exist.

    Raises:
        SettingsError: There is none.
    """
    if grading not in SIMILARITIES:
        raise SettingsError(f"there is no similarity {grading!r} of labels; choose one of {', '.join(SIMILARITIES)}")


def label_similarity(labels: Tensor, others: Tensor, grading: str = "any") -> Tensor:
    """S: how alike two label sets are, in [0, 1]; 0 where one of them is empty.

    Args:
        labels: Float (b, n_labels) of 0 and 1.
        others: Float (n, n_labels) of 0 and 1.
        grading: "any": 1 where the sets share a label, else 0, the rule of most papers. "jaccard": shared labels over
            those of either. "cosine": over the root of the product of both numbers of labels. "count": over the
            smaller number of labels, which is the most that the two could share.

    Returns:
        Float (b, n).

    Raises:
        SettingsError: There is no such grading.
    """
    check_similarity(grading)
    shared = labels @ others.T  # (b, n)
    if grading == "any":
        return shared.clamp_(max=1)
    one, other = labels.sum(dim=1)[:, None], others.sum(dim=1)[None, :]
    if grading == "jaccard":
        possible = one + other - shared
    elif grading == "cosine":
        possible = (one * other).sqrt()
    else:
        possible = torch.minimum(one, other)
    return shared.div_(possible.clamp_(min=1))


def rows_at_a_time(n: int, block: int) -> int:
    """Rows of an n x n matrix to make at a time: `block`, or as many fewer as make 2^26 entries."""
    return max(1, min(block, 2**26 // n))


def nearest_rows(unit: Tensor, k: int, block: int = 1024) -> tuple[Tensor, Tensor]:
    """The k rows of largest inner product with each row, block by block: nothing is n x n.

    Args:
        unit: float (n, d), rows of one length, so that a row is among its own nearest.
        k: Neighbours a row, the row itself among them; at most n are given.
        block: Rows at a time, at most; see `rows_at_a_time`.

    Returns:
        Inner products (n, k), falling along a row, and the row numbers, int32 (n, k): half the memory of int64.
    """
    n, k = len(unit), min(k, len(unit))
    values = unit.new_empty(n, k)
    rows = torch.empty(n, k, dtype=torch.int32, device=unit.device)
    block = rows_at_a_time(n, block)
    for start in range(0, n, block):
        end = start + block
        values[start:end], found = (unit[start:end] @ unit.T).topk(k, dim=1)
        rows[start:end] = found
    return values, rows
