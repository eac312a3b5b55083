"""DCMH: Deep Cross-Modal Hashing (Jiang & Li, CVPR 2017, arXiv 1602.02255). Supervised by labels.

Objective (paper eq. 1), with Theta_ij = F_i . G_j / 2 and S_ij = 1 where i and j share a label, else 0:

    J = sum_ij ( log(1 + e^Theta_ij) - S_ij Theta_ij )      likelihood
        + gamma ( |B - F|^2 + |B - G|^2 )                    quantisation
        + eta ( |F^T 1|^2 + |G^T 1|^2 )                      bit balance
    B = sign(gamma (F + G))                                  (eq. 8)

symbol    variable                shape
F         image_buffer            (n, K)   the image net's outputs for all train rows, as last computed
G         text_buffer             (n, K)   the text net's
B         code_buffer             (n, K)   -1, +1
f, g      activations             (b, K)   the batch's rows of F or G, with gradient
Theta     theta                   (b, n)
S         similarity              (b, n)   made from the labels block by block; nothing is n x n

Algorithm (paper, Algorithm 1): an epoch is a pass over images with G fixed, a pass over texts with F fixed, then B.
A batch writes its fresh rows into the buffer and steps on its share of J, divided by (b n) as the authors' code does.

Departures (paper's values in brackets):
- The paper trains CNN-F from pixels. Here each net is an MLP on backbone features, with one hidden layer [text: 8192]
  and, because features are overfitted within a few epochs, batch normalisation and dropout.
- gamma is 10 and eta 1e-3 [both 1]. The balance term sees F through a buffer that is up to an epoch old; at eta = 1,
  nets that learn in few epochs chase it back and forth (validation MAP on the emoji pairs .18 to .45, by learning rate,
  against .84). At gamma = 10 the codes come near to what the likelihood asks for: one code a label combination.
- Adam, 3e-3 falling linearly to a thirtieth, 60 epochs [plain SGD, 10^-1.5 falling to 10^-6 over 500 epochs].
- Order and start as in the authors' TensorFlow code (images first, F, G ~ N(0, 1)); their MATLAB code starts at zero.
  An epoch visits each row once; the authors draw each batch from a fresh permutation.
- The likelihood that is shown is estimated from `COUNTED` of the n columns of Theta; its gradient is that of all.
- softplus in place of log(1 + exp), which overflows; sign(0) = +1; the epoch is chosen on validation rows, where
  widely used ports choose it on the test queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, Optimizer

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
    check_similarity,
    label_similarity,
)

BLOCK = 2048  # train rows at a time in the likelihood
COUNTED = 256  # train rows, or up to twice as many, from which the likelihood that is shown is estimated


@dataclass(frozen=True)
class DcmhConfig:
    """Settings; in brackets the paper's where it differs.

    Attributes:
        gamma: Weight of the quantisation term [1].
        eta: Weight of the bit balance term [1].
        hidden: Width of each net's hidden layer [text 8192, image CNN-F].
        dropout: On the hidden layer [0].
        input_dropout: On the scaled features [0].
        learning_rate: At the start; it falls linearly to a thirtieth [10^-1.5 to 10^-6].
        similarity: Grading of S, a name of `methods.base.label_similarity`; the paper's is "any".
        batch_size: Pairs a batch.
        epochs: Image and text passes [500].
    """

    gamma: float = 10.0
    eta: float = 1e-3
    hidden: Count = 1024
    dropout: Share = 0.5
    input_dropout: Share = 0.2
    learning_rate: Positive = 3e-3
    similarity: str = "any"
    batch_size: Count = 128
    epochs: Count = 60

    def __post_init__(self) -> None:
        check_similarity(self.similarity)


class NegativeLogLikelihood(torch.autograd.Function):
    """`negative_log_likelihood` with the paper's gradient.

    dJ/df_i = 1/2 sum_j (sigmoid(Theta_ij) - S_ij) G_j (eq. 3), summed block by block over the train rows, so that what
    is made stays in the processor's cache and nothing is b x n.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activations: Tensor,
        buffer: Tensor,
        labels: Tensor,
        all_labels: Tensor,
        grading: str,
        every: int,
    ) -> Tensor:
        """sum_ij ( log(1 + e^Theta_ij) - S_ij Theta_ij ), estimated from one of `every` train rows j."""
        value, direction, half = activations.new_zeros(()), torch.zeros_like(activations), 0.5 * activations
        for G, rows in zip(torch.split(buffer, BLOCK), torch.split(all_labels, BLOCK), strict=True):
            theta = half @ G.T  # (b, BLOCK)
            similarity = label_similarity(labels, rows, grading)
            shown = theta[:, ::every].contiguous()  # softplus is ten times slower on strides
            value += (F.softplus(shown) - similarity[:, ::every] * shown).sum() * (len(G) / shown.shape[1])
            direction.addmm_(theta.sigmoid_().sub_(similarity), G)
        ctx.save_for_backward(direction)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Eq. 3, times the gradient that comes in."""
        (direction,) = ctx.saved_tensors
        return 0.5 * gradients[0] * direction, None, None, None, None, None


def negative_log_likelihood(
    activations: Tensor,
    buffer: Tensor,
    labels: Tensor,
    all_labels: Tensor,
    grading: str = "any",
    counted: int | None = None,
) -> Tensor:
    """Likelihood term of J.

    Args:
        activations: (b, K), with gradient.
        buffer: (n, K), fixed.
        labels: (b, n_labels) of 0 and 1, of the batch.
        all_labels: (n, n_labels), of all train rows.
        grading: Of S, as `label_similarity` takes it; a graded S_ij is the chance that i and j are alike.
        counted: The value is estimated from at least that many of the train rows, evenly spread; by default from all.
            A value that is only shown need not cost the softplus of all pairs. The gradient is that of all in any case.

    Returns:
        Scalar sum over b n pairs.
    """
    every = 1 if counted is None else max(1, len(buffer) // counted)
    value: Tensor = NegativeLogLikelihood.apply(  # type: ignore[no-untyped-call]
        activations, buffer, labels, all_labels, grading, every
    )
    return value


def quantization(activations: Tensor, codes: Tensor) -> Tensor:
    """|B - F|^2 of the batch rows: (b, K), (b, K) -> scalar sum."""
    return (codes - activations).square().sum()


def bit_balance(activations: Tensor, rest: Tensor) -> Tensor:
    """|F^T 1|^2 with the batch's rows fresh and the sum of all other rows, `rest` (K,), fixed -> scalar."""
    return (activations.sum(dim=0) + rest).square().sum()


class DCMH(Method):
    """See the module's docstring."""

    name = "dcmh"
    supervision = "labels"
    citation = Citation(
        authors="Qing-Yuan Jiang and Wu-Jun Li",
        title="Deep Cross-Modal Hashing",
        venue="CVPR",
        year=2017,
        url="https://arxiv.org/abs/1602.02255",
    )
    Config = DcmhConfig
    config: DcmhConfig

    image_buffer: Tensor
    text_buffer: Tensor
    code_buffer: Tensor
    train_labels: Tensor

    def __init__(self, train: TrainData, n_bits: int, config: DcmhConfig) -> None:
        super().__init__(train, n_bits, config)
        shape = (config.hidden,), config.dropout, config.input_dropout
        self.image_head = HashHead.fitted(train.image, n_bits, *shape)
        self.text_head = HashHead.fitted(train.text, n_bits, *shape)
        size, device = (len(train), n_bits), train.image.device
        self.register_buffer("image_buffer", torch.randn(size, device=device))
        self.register_buffer("text_buffer", torch.randn(size, device=device))
        self.register_buffer("code_buffer", torch.empty(size, device=device))
        self.register_buffer("train_labels", train.labels, persistent=False)
        self.end_epoch(-1)

    def optimizers(self) -> Mapping[str, Optimizer]:
        """One for each net."""
        return {
            "image": Adam(self.image_head.parameters(), lr=self.config.learning_rate, fused=True),
            "text": Adam(self.text_head.parameters(), lr=self.config.learning_rate, fused=True),
        }

    def learning_rates(self, progress: float) -> Mapping[str, float]:
        """Linear decay."""
        rate = self.config.learning_rate * (1 - progress * 29 / 30)
        return {"image": rate, "text": rate}

    def phases(self, epoch: int) -> Iterable[str]:
        """The image pass, then the text pass."""
        return ("image", "text")

    def steps(self, batch: Batch, phase: str) -> Iterator[Step]:
        """One update of the net of `phase`, the other modality's buffer fixed."""
        head, features, own, other = (
            (self.image_head, batch.image, self.image_buffer, self.text_buffer)
            if phase == "image"
            else (self.text_head, batch.text, self.text_buffer, self.image_buffer)
        )
        activations = head(features)
        own[batch.index] = activations.detach()
        rest = own.sum(dim=0) - activations.detach().sum(dim=0)
        scale = 1 / (len(batch) * len(own))
        likelihood = negative_log_likelihood(
            activations, other, batch.labels, self.train_labels, self.config.similarity, COUNTED
        )
        quantised = quantization(activations, self.code_buffer[batch.index])
        balanced = bit_balance(activations, rest)
        yield Step(
            phase,
            {
                "likelihood": scale * likelihood,
                "quantization": scale * self.config.gamma * quantised,
                "balance": scale * self.config.eta * balanced,
            },
        )

    def end_epoch(self, epoch: int) -> None:
        """Eq. 8; gamma > 0 does not move the sign."""
        self.code_buffer = binarized(self.image_buffer + self.text_buffer)
