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
`closed_form` and overrides `fit`. One that can do without the labels it prefers sets `labels_optional`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cmh_milvus.encoders.hash_head import HashHead
from cmh_milvus.errors import SettingsError


@dataclass(frozen=True)
class Citation:
    """Where a method was published."""

    authors: str
    title: str
    venue: str
    year: int
    url: str


class MethodConfig(Protocol):
    """What every method's frozen `Config` dataclass has."""

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
        image: float32 (n, image_dim) backbone features.
        text: float32 (n, text_dim).
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
        config: An instance of the class's `Config`.

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

    image_head: HashHead
    text_head: HashHead

    def __init__(self, train: TrainData, n_bits: int, config: Any) -> None:
        super().__init__()
        self.n_bits = n_bits
        self.config = config

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


def straight_through_sign(activations: Tensor) -> Tensor:
    """Codes of -1 and +1 whose gradient is that of tanh (Bengio, Leonard & Courville 2013, arXiv 1308.3432).

    Args:
        activations: float, any shape.

    Returns:
        +1 where an activation is >= 0, else -1, same shape and dtype.
    """
    relaxed = torch.tanh(activations)
    code = torch.where(activations >= 0, 1.0, -1.0).to(activations.dtype)
    return relaxed + (code - relaxed).detach()


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
