"""MESDCH: Multi-label Enhancement based Self-supervised Deep Cross-modal Hashing (Zou et al., 2022).

Neurocomputing 467, 138-162. Supervised by labels. A net on the label vectors is a third modality; the cosines of the
codes of all three follow the cosines of the label vectors, so similarity is graded (numbers are this file's):

    A_ij    = cos(L_i, L_j)                       label similarity, in [0, 1]                              (1)
    P_ij    = [ cos(u_i, v_j) ]_+                 code similarity                                          (2)
    D(U,V)  = mean_ij (A_ij - P_ij) log( (A_ij + e) / (P_ij + e) ),  e = 10^-5,  >= 0                      (3)
    Q(U)    = |U - B|^2 / (b K)                                                                            (4)
    L_label = beta D(h,H) + D(h,F) + alpha D(h,G) + gamma Q(h)                                             (5)
    L_image = beta D(f,F) + D(f,H) + gamma Q(f)                                                            (6)
    L_text  = beta D(g,G) + D(g,H) + gamma Q(g)                                                            (7)
    B       = sign(F + G + H)                                                                              (8)

symbol     variable                        shape
H, F, G    label_, image_, text_buffer     (n, K)   relaxed codes of all train rows, as last computed, fixed
h, f, g    codes                           (b, K)   the batch's, in (-1, 1), with gradient
A          label_cosine                    (b, n)
B          code_buffer                     (n, K)   -1, +1

Algorithm: an epoch is a pass of the label net, one of the image and one of the text net, then B.

Departures (authors' code in brackets):
- Nets are MLPs with batch normalisation [AlexNet; for text and labels a pooling pyramid over the vector, which makes
  neighbouring columns alike, so that codes depend on the order of labels and words]; without that pyramid the paper's
  attention over its scales has nothing to act on.
- Adam, and rate, width and epochs set for features [SGD, 10^-1.5 falling to 10^-6 over 500 epochs]. Eq. 2 has no
  gradient where a cosine is negative: a rate that throws related codes that far apart loses them for good. On
  validation rows with bags of words 2e-3 gave a fifth less MAP than 5e-4; 1e-3 did as well as that, with more epochs.
- The paper itself could not be read, only its abstract and the code, so its weights for data sets other than MIRFLICKR
  are unknown.
- An item without labels has cosine 0 with all [division by zero]. All rows are encoded, in eval mode [the last partial
  batch keeps code 0, batch normalisation and dropout stay on]. sign(0) = +1.
- The epoch is chosen on validation rows [on the test queries].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from cmh_milvus.encoders.hash_head import HashHead
from cmh_milvus.methods.base import Batch, Citation, Count, Method, Positive, Share, Step, TrainData, binarized, cosines

EPSILON = 1e-5


@dataclass(frozen=True)
class MesdchConfig:
    """Settings; in brackets the authors' where they differ.

    Attributes:
        alpha: Weight of the label net's divergence from texts, eq. 5.
        beta: Weight of the divergence within a modality.
        gamma: Weight of the quantisation.
        hidden: Width of each net's hidden layer [4096, then 512].
        dropout: On the hidden layer of image and text [.5, image].
        input_dropout: On the scaled features [.5, image].
        learning_rate: At the start; falls linearly to a thirtieth [10^-1.5 to 10^-6].
        batch_size: Pairs a batch.
        epochs: Passes of each net [500].
    """

    alpha: float = 0.3
    beta: float = 1.9
    gamma: float = 0.9
    hidden: Count = 1024
    dropout: Share = 0.5
    input_dropout: Share = 0.2
    learning_rate: Positive = 1e-3
    batch_size: Count = 128
    epochs: Count = 40


def divergence(codes: Tensor, buffer: Tensor, label_cosine: Tensor) -> Tensor:
    """Eq. 3: (b, K) with gradient, (n, K) fixed, (b, n) -> scalar."""
    similarity = F.relu(cosines(codes, buffer))  # (b, n), eq. 1 and 2
    ratio = torch.log(label_cosine + EPSILON) - torch.log(similarity + EPSILON)
    return ((label_cosine - similarity) * ratio).mean()


def quantization(codes: Tensor, signs: Tensor) -> Tensor:
    """Eq. 4: (b, K), (b, K) -> scalar."""
    return (codes - signs).square().mean()


def label_net(n_labels: int, width: int, n_bits: int) -> nn.Sequential:
    """Label vectors (b, n_labels) -> activations (b, K)."""
    return nn.Sequential(nn.Linear(n_labels, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, n_bits))


class MESDCH(Method):
    """See the module's docstring."""

    name = "mesdch"
    supervision = "labels"
    citation = Citation(
        authors="Xitao Zou, Song Wu, Erwin M. Bakker and Xinzhi Wang",
        title="Multi-label enhancement based self-supervised deep cross-modal hashing",
        venue="Neurocomputing",
        year=2022,
        url="https://doi.org/10.1016/j.neucom.2021.09.053",
    )
    Config = MesdchConfig
    config: MesdchConfig

    label_buffer: Tensor
    image_buffer: Tensor
    text_buffer: Tensor
    code_buffer: Tensor
    train_labels: Tensor

    def __init__(self, train: TrainData, n_bits: int, config: MesdchConfig) -> None:
        super().__init__(train, n_bits, config)
        shape = (config.hidden,), config.dropout, config.input_dropout
        self.image_head = HashHead.fitted(train.image, n_bits, *shape)
        self.text_head = HashHead.fitted(train.text, n_bits, *shape)
        self.label_net = label_net(train.labels.shape[1], config.hidden, n_bits)
        self.register_buffer("train_labels", train.labels, persistent=False)
        for name in ("label_buffer", "image_buffer", "text_buffer"):
            self.register_buffer(name, torch.tanh(torch.randn(len(train), n_bits, device=train.image.device)))
        self.register_buffer("code_buffer", torch.empty_like(self.label_buffer))
        self.end_epoch(-1)

    def optimizers(self) -> Mapping[str, Optimizer]:
        """One for each net."""
        nets = {"label": self.label_net, "image": self.image_head, "text": self.text_head}
        return {name: Adam(net.parameters(), lr=self.config.learning_rate, fused=True) for name, net in nets.items()}

    def learning_rates(self, progress: float) -> Mapping[str, float]:
        """Linear decay."""
        return dict.fromkeys(("label", "image", "text"), self.config.learning_rate * (1 - progress * 29 / 30))

    def phases(self, epoch: int) -> Iterable[str]:
        """Labels, images, texts."""
        return ("label", "image", "text")

    def steps(self, batch: Batch, phase: str) -> Iterator[Step]:
        """One update of the net of `phase`, eq. 5, 6 or 7."""
        config = self.config
        if phase == "label":
            codes, own = torch.tanh(self.label_net(batch.labels)), self.label_buffer
            others = {"image": (1.0, self.image_buffer), "text": (config.alpha, self.text_buffer)}
        elif phase == "image":
            codes, own = torch.tanh(self.image_head(batch.image)), self.image_buffer
            others = {"label": (1.0, self.label_buffer)}
        else:
            codes, own = torch.tanh(self.text_head(batch.text)), self.text_buffer
            others = {"label": (1.0, self.label_buffer)}
        own[batch.index] = codes.detach()
        label_cosine = cosines(batch.labels, self.train_labels)
        terms = {
            f"{phase}_{other}": weight * divergence(codes, buffer, label_cosine)
            for other, (weight, buffer) in others.items()
        }
        terms[f"{phase}_own"] = config.beta * divergence(codes, own, label_cosine)
        terms[f"{phase}_quantization"] = config.gamma * quantization(codes, self.code_buffer[batch.index])
        yield Step(phase, terms)

    def end_epoch(self, epoch: int) -> None:
        """Eq. 8."""
        self.code_buffer = binarized(self.image_buffer + self.text_buffer + self.label_buffer)
