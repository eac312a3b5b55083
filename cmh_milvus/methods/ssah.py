"""SSAH: Self-Supervised Adversarial Hashing (Li et al., CVPR 2018, arXiv 1804.01223). Supervised by labels.

A net on the label vectors learns codes and semantic features first; the image and the text net follow it, pair by
pair, in both spaces, while a discriminator for each modality tries to tell their semantic features from the label
net's. With m one of L (label net), I, T and S_ij = 1 where i and j share a label, else 0 (numbers are this file's):

    Delta_ij = F^L_i . F^m_j / 2        Gamma_ij = H^L_i . H^m_j / 2
    L_m  = alpha sum_ij ( log(1 + e^Delta_ij) - S_ij Delta_ij )       features keep the similarity       (1)
         + gamma sum_ij ( log(1 + e^Gamma_ij) - S_ij Gamma_ij )       codes keep it                      (2)
         + beta |H^m - B|^2                                           quantisation                       (3)
         + eta |Lhat^m - L|^2                                         labels can be read off             (4)
    L_D  = BCE(D^m(F^L), 1) + BCE(D^m(F^m), 0),  m in {I, T}          discriminators                     (5)
    L_G  = delta BCE(D^m(F^m), 1)                                     added to L_m, m in {I, T}          (6)
    B    = sign(H^L + H^I + H^T)                                                                         (7)

symbol      variable                              shape
F^L, H^L    label_features, label_codes           (n, W), (n, K)  the label net's, for all train rows
H^I, H^T    image_codes, text_codes               (n, K)          in (-1, 1), as last computed
B           code_buffer                           (n, K)          -1, +1
F^m, H^m    features, codes                       (b, W), (b, K)  the batch's, with gradient
Lhat^m      sigmoid of a linear layer on F^m      (b, n_labels)
D^m         image_discriminator, ...              (b, W) -> (b, 1) logits

Algorithm (authors' code): an epoch is up to `label_passes` of the label net, then the discriminators, then up to
`modality_passes` of the image and of the text net, each of these inner loops ended as soon as its loss rises; then B.

Departures (authors' code in brackets):
- The likelihoods (1) and (2) are the paper's [half the square of S Theta - log(1 + e^Theta)].
- The adversarial gradient (6) reaches the image and the text net, and discriminators and generators have optimizers of
  their own [features enter as placeholders, so nothing reaches the nets, and that step moves the discriminator].
- Sums are means: over pairs in (1) and (2), over entries in (3) and (4); so the weights do not depend on n and b.
- Nets on backbone features, with batch normalisation and dropout, whose hidden layer is F^m [CNN-F; a pooling pyramid
  over the bag of words, which takes neighbouring words of the vocabulary for related ones]. The label net has no LRN.
- alpha, delta, the passes, the rates and the epochs are set for features [all weights 1; rates fall by sqrt 10 an
  epoch, so that about five epochs train; up to 15 passes].
- The discriminators are shown the label net's features under a dropout like that of F^m, which alone would betray it.
- S is 1, not 0.999; sign(0) = +1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
)
from cmh_milvus.methods.dcmh import negative_log_likelihood


@dataclass(frozen=True)
class SsahConfig:
    """Settings; in brackets the paper's where it differs.

    Attributes:
        alpha: Weight of the features' likelihood, eq. 1 [1].
        gamma: Weight of the codes' likelihood, eq. 2.
        beta: Weight of the quantisation, eq. 3.
        eta: Weight of the label prediction, eq. 4.
        delta: Weight of the adversarial term, eq. 6 [1].
        hidden: Width W of the semantic features [512].
        dropout: On the semantic features of image and text [0].
        input_dropout: On the scaled backbone features [0].
        label_passes: Most passes of the label net an epoch [10, then 5].
        modality_passes: Most passes of the image and the text net an epoch [15, then 7, then 5].
        learning_rate: Of every optimizer at the start; falls linearly to a thirtieth.
        similarity: Grading of S, a name of `methods.base.label_similarity`; the paper's is "any".
        batch_size: Pairs a batch.
        epochs: Rounds of all nets [500 at most].
    """

    alpha: float = 1e-3
    gamma: float = 1.0
    beta: float = 1.0
    eta: float = 1.0
    delta: float = 0.01
    hidden: Count = 1024
    dropout: Share = 0.5
    input_dropout: Share = 0.2
    label_passes: Count = 2
    modality_passes: Count = 3
    learning_rate: Positive = 3e-3
    similarity: str = "any"
    batch_size: Count = 128
    epochs: Count = 10

    def __post_init__(self) -> None:
        check_similarity(self.similarity)


def pairwise_likelihood(
    batch: Tensor, label_net: Tensor, labels: Tensor, all_labels: Tensor, similarity: str = "any"
) -> Tensor:
    """Eq. 1 or 2 as a mean over pairs: (b, d) with gradient, (n, d) fixed, both's labels, S's grading -> scalar."""
    return negative_log_likelihood(batch, label_net, labels, all_labels, similarity) / (len(batch) * len(label_net))


def quantization(codes: Tensor, signs: Tensor) -> Tensor:
    """Eq. 3 as a mean: (b, K), (b, K) -> scalar."""
    return (codes - signs).square().mean()


def label_prediction(logits: Tensor, labels: Tensor) -> Tensor:
    """Eq. 4 as a mean: (b, n_labels), (b, n_labels) -> scalar."""
    return (torch.sigmoid(logits) - labels).square().mean()


def discrimination(label_logits: Tensor, modality_logits: Tensor) -> Tensor:
    """Eq. 5 for one modality: logits (b, 1) of the label net's and of the modality's features -> scalar."""
    real = F.binary_cross_entropy_with_logits(label_logits, torch.ones_like(label_logits))
    fake = F.binary_cross_entropy_with_logits(modality_logits, torch.zeros_like(modality_logits))
    return real + fake


def deception(modality_logits: Tensor) -> Tensor:
    """Eq. 6 without its weight: logits (b, 1) -> scalar."""
    return F.binary_cross_entropy_with_logits(modality_logits, torch.ones_like(modality_logits))


class LabelNet(nn.Module):
    """Label vectors (b, n_labels) -> semantic features (b, W); `output` and `labels` read codes and labels off them."""

    def __init__(self, n_labels: int, width: int, n_bits: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(n_labels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.output = nn.Linear(width, n_bits)
        self.labels = nn.Linear(width, n_labels)

    def forward(self, labels: Tensor) -> Tensor:
        """Semantic features."""
        features: Tensor = self.layers(labels)
        return features


def discriminator(width: int) -> nn.Sequential:
    """D: semantic features (b, W) -> logits (b, 1) of coming from the label net."""
    return nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 1))


class SSAH(Method):
    """See the module's docstring."""

    name = "ssah"
    supervision = "labels"
    citation = Citation(
        authors="Chao Li, Cheng Deng, Ning Li, Wei Liu, Xinbo Gao and Dacheng Tao",
        title="Self-Supervised Adversarial Hashing Networks for Cross-Modal Retrieval",
        venue="CVPR",
        year=2018,
        url="https://arxiv.org/abs/1804.01223",
    )
    Config = SsahConfig
    config: SsahConfig

    label_features: Tensor
    label_codes: Tensor
    image_codes: Tensor
    text_codes: Tensor
    code_buffer: Tensor
    train_labels: Tensor

    def __init__(self, train: TrainData, n_bits: int, config: SsahConfig) -> None:
        super().__init__(train, n_bits, config)
        n, n_labels, width, device = len(train), train.labels.shape[1], config.hidden, train.image.device
        shape = (width,), config.dropout, config.input_dropout
        self.image_head = HashHead.fitted(train.image, n_bits, *shape)
        self.text_head = HashHead.fitted(train.text, n_bits, *shape)
        self.image_labels, self.text_labels = nn.Linear(width, n_labels), nn.Linear(width, n_labels)
        self.label_net = LabelNet(n_labels, width, n_bits).to(device)
        self.image_discriminator, self.text_discriminator = discriminator(width), discriminator(width)
        self.register_buffer("train_labels", train.labels, persistent=False)
        with torch.no_grad():
            features = self.label_net(train.labels)
            self.register_buffer("label_features", features)
            self.register_buffer("label_codes", torch.tanh(self.label_net.output(features)))
        for name in ("image_codes", "text_codes", "code_buffer"):
            self.register_buffer(name, torch.zeros(n, n_bits, device=device))
        self.end_epoch(-1)
        self.losses: list[float] = []
        self.pass_loss = math.inf

    def optimizers(self) -> Mapping[str, Optimizer]:
        """The generators' (label, image, text) apart from the discriminators'."""
        parts: dict[str, list[nn.Module]] = {
            "label": [self.label_net],
            "image": [self.image_head, self.image_labels],
            "text": [self.text_head, self.text_labels],
            "discriminator": [self.image_discriminator, self.text_discriminator],
        }
        return {
            name: Adam(nn.ModuleList(nets).parameters(), lr=self.config.learning_rate, fused=True)
            for name, nets in parts.items()
        }

    def learning_rates(self, progress: float) -> Mapping[str, float]:
        """Linear decay."""
        rate = self.config.learning_rate * (1 - progress * 29 / 30)
        return dict.fromkeys(("label", "image", "text", "discriminator"), rate)

    def phases(self, epoch: int) -> Iterator[str]:
        """Label net, discriminators, image net, text net; an inner loop ends when its loss rises."""
        yield from self._while_falling("label", self.config.label_passes)
        yield "discriminator"
        yield from self._while_falling("image", self.config.modality_passes)
        yield from self._while_falling("text", self.config.modality_passes)

    def _while_falling(self, phase: str, passes: int) -> Iterator[str]:
        before = math.inf
        for _ in range(passes):
            yield phase
            if self.pass_loss > before:
                return
            before = self.pass_loss

    def steps(self, batch: Batch, phase: str) -> Iterator[Step]:
        """One update of the nets of `phase`."""
        if phase == "discriminator":
            yield self._discriminator_step(batch)
            return
        if phase == "label":
            net, features, stored = self.label_net, self.label_net(batch.labels), self.label_codes
            codes, logits = torch.tanh(net.output(features)), net.labels(features)
            self.label_features[batch.index] = features.detach()
            terms = {}
        else:
            head, reader, judge, source, stored = (
                (self.image_head, self.image_labels, self.image_discriminator, batch.image, self.image_codes)
                if phase == "image"
                else (self.text_head, self.text_labels, self.text_discriminator, batch.text, self.text_codes)
            )
            features = head.hidden(source)
            codes, logits = torch.tanh(head.output(features)), reader(features)
            terms = {"deception": self.config.delta * deception(judge(features))}
        stored[batch.index] = codes.detach()
        pairs = batch.labels, self.train_labels, self.config.similarity
        terms |= {
            "features": self.config.alpha * pairwise_likelihood(features, self.label_features, *pairs),
            "codes": self.config.gamma * pairwise_likelihood(codes, self.label_codes, *pairs),
            "quantization": self.config.beta * quantization(codes, self.code_buffer[batch.index]),
            "labels": self.config.eta * label_prediction(logits, batch.labels),
        }
        self.losses.append(sum(float(term.detach()) for term in terms.values()))
        yield Step(phase, terms)

    def _discriminator_step(self, batch: Batch) -> Step:
        terms = {}
        for name, head, judge, source in (
            ("image", self.image_head, self.image_discriminator, batch.image),
            ("text", self.text_head, self.text_discriminator, batch.text),
        ):
            with torch.no_grad():
                fake = head.hidden(source)
            real = F.dropout(self.label_features[batch.index], self.config.dropout, self.training)
            terms[f"{name}_discrimination"] = discrimination(judge(real), judge(fake))
        return Step("discriminator", terms)

    def end_phase(self, phase: str) -> None:
        """Mean loss of the pass, for the early end of inner loops."""
        self.pass_loss = math.fsum(self.losses) / max(1, len(self.losses))
        self.losses.clear()

    def end_epoch(self, epoch: int) -> None:
        """Eq. 7."""
        self.code_buffer = binarized(self.label_codes + self.image_codes + self.text_codes)
