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
S         similarity              (b, n)   made from labels batch by batch; nothing is n x n

Algorithm (paper, Algorithm 1): an epoch is a pass over images with G fixed, a pass over texts with F fixed, then B.
A batch writes its fresh rows into the buffer and steps on its share of J, divided by (b n) as the authors' code does.

Departures:
- The paper trains CNN-F from pixels. Here the image net is an MLP on backbone features (one hidden layer, as the text
  net has); its width, the learning rate and the number of epochs are set for features. The paper's text width is
  8192, its rate falls from 10^-1.5 over 500 epochs.
- Adam in place of plain SGD: with the summed balance term plain SGD at the paper's rate stalls at chance on features,
  as users of the authors' code report for data sets other than MIRFLICKR.
- Order and start as in the authors' TensorFlow code (images first, F, G ~ N(0, 1)); their MATLAB code starts at zero.
- softplus in place of log(1 + exp), and sign(0) = +1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, Optimizer

from cmh_milvus.encoders.hash_head import HashHead, HashHeadConfig
from cmh_milvus.methods.base import Batch, Citation, Method, Step, TrainData


@dataclass(frozen=True)
class Config:
    """Settings; in brackets the paper's where it differs.

    Attributes:
        gamma: Weight of the quantisation term.
        eta: Weight of the bit balance term.
        hidden: Width of each net's hidden layer [text 8192, image CNN-F].
        learning_rate: At the start; it falls linearly to a thirtieth [10^-1.5 to 10^-6].
        batch_size: Pairs a batch.
        epochs: Image and text passes [500].
    """

    gamma: float = 1.0
    eta: float = 1.0
    hidden: int = 1024
    learning_rate: float = 3e-4
    batch_size: int = 128
    epochs: int = 60


def label_similarity(labels: Tensor, others: Tensor) -> Tensor:
    """S: 1.0 where two rows share a label, else 0.0; (b, n_labels), (n, n_labels) -> (b, n)."""
    return (labels @ others.T > 0).to(labels.dtype)


def negative_log_likelihood(activations: Tensor, buffer: Tensor, similarity: Tensor) -> Tensor:
    """Likelihood term of J for the batch rows: (b, K), (n, K), (b, n) -> scalar sum."""
    theta = 0.5 * activations @ buffer.T  # (b, n)
    return (F.softplus(theta) - similarity * theta).sum()


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
    Config = Config
    config: Config

    image_buffer: Tensor
    text_buffer: Tensor
    code_buffer: Tensor
    train_labels: Tensor

    def __init__(self, train: TrainData, n_bits: int, config: Config) -> None:
        super().__init__(train, n_bits, config)
        self.image_head = HashHead(HashHeadConfig(train.image.shape[1], n_bits, (config.hidden,)))
        self.text_head = HashHead(HashHeadConfig(train.text.shape[1], n_bits, (config.hidden,)))
        self.image_head.scaling.fit(train.image)
        self.text_head.scaling.fit(train.text)
        shape, device = (len(train), n_bits), train.image.device
        self.register_buffer("image_buffer", torch.randn(shape, device=device))
        self.register_buffer("text_buffer", torch.randn(shape, device=device))
        self.register_buffer("code_buffer", torch.empty(shape, device=device))
        self.register_buffer("train_labels", train.labels, persistent=False)
        self.end_epoch(-1)

    def optimizers(self) -> Mapping[str, Optimizer]:
        """One for each net."""
        return {
            "image": Adam(self.image_head.parameters(), lr=self.config.learning_rate),
            "text": Adam(self.text_head.parameters(), lr=self.config.learning_rate),
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
        similarity = label_similarity(batch.labels, self.train_labels)
        scale = 1 / (len(batch) * len(own))
        yield Step(
            phase,
            {
                "likelihood": scale * negative_log_likelihood(activations, other, similarity),
                "quantization": scale * self.config.gamma * quantization(activations, self.code_buffer[batch.index]),
                "balance": scale * self.config.eta * bit_balance(activations, rest),
            },
        )

    def end_epoch(self, epoch: int) -> None:
        """Eq. 8; gamma > 0 does not move the sign."""
        self.code_buffer = torch.where(self.image_buffer + self.text_buffer >= 0, 1.0, -1.0)
