"""MITH: Multi-granularity Interactive Transformer Hashing (Liu et al., ACM MM 2023). Supervised by labels.

Each item has a global code h^g and a local code h^l, each bit of which is read off a vector of its own, the bit's
concept t_k. They teach each other, and pairs are contrasted as wholes and concept by concept. With the likelihood
N(U, v) = mean_ij [ log(1 + e^s_ij) - S_ij s_ij ], s_ij = U_i . v_j / 2 (numbers are this file's):

    h^g = tanh(W z),  h^l_k = tanh(w_k . t_k),  code = sign(h^g + h^l)                                       (1)
    J1 = N(I^l, i^l) + N(T^l, t^l)                        local codes, within a modality                     (2)
    J2 = N(I^g, t^g) + N(T^g, i^g)                        global codes, between modalities                   (3)
    J3 = ( |(i^g + i^l)/2 - B|^2 + the same for texts ) / (b K)                                              (4)
    J4 = InfoNCE(z^I, z^T) + concept_weight mean_pairs InfoNCE(concepts of the image, of the text)           (5)
    J5 = ( |sg(h^g) - h^l|^2 + .1 |h^g - sg(h^l)|^2, both modalities ) / b,  sg = no gradient                (6)
    L  = local J1 + whole J2 + quantization J3 + contrast J4 + distillation J5                              (7)
    B  = sign( .99 (I^g + T^g) + .01 (I^l + T^l) )                                                           (8)

symbol        variable                                  shape
z, t          Parts.vector, Parts.concepts              (b, W), (b, K, c)
i^g, i^l      Parts.whole, Parts.local                  (b, K)   the batch's, with gradient
I^g, I^l ...  image_whole, image_local, text_whole ...  (n, K)   all train rows', as last computed, fixed
B             code_buffer                               (n, K)   -1, +1

Departures (authors' code in brackets):
- z is a hidden layer with batch normalisation on the vector of the whole item [two residual blocks shared by both
  modalities, on CLIP's class token].
- Where features are token matrices, the concepts are gathered as in the paper: a token goes to those of its 8 best
  concepts whose score is positive, a concept averages its tokens by the softmax of their scores, and two transformer
  layers over the K concepts with sinusoidal places follow (`encoders.tokens.ConceptGathering`). The scores are a linear
  layer's, learned [those of the global code's W, without gradient]; width 64 and four heads [512, eight]; tokens know
  their position by a learned vector [CLIP's know it].
- Where features are one vector an item, the K concepts t_k are the rest of that hidden layer: then the interaction of
  tokens is not reproduced; the losses, the two codes, distillation and contrast at both grains are.
- tanh is odd and rising, so sign(h^g + h^l) is the sign of the sum of the two activations: one hash head, whose output
  layer is W beside a block-diagonal part of the w_k.
- Weights, rate and widths are set for features: the paper's contrast of 50 drowns the labels there, and its
  quantisation and distillation freeze the codes early. AdamW, one cycle [1e-3, 2e-6 for CLIP, warm-up 5 %].
- s is not clamped to 64; softplus needs no clamp. B is renewed each epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW, Optimizer

from cmh_milvus.encoders.hash_head import HashHead
from cmh_milvus.errors import SettingsError
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
    one_cycle,
)
from cmh_milvus.methods.dcmh import COUNTED, negative_log_likelihood


@dataclass(frozen=True)
class MithConfig:
    """Settings; in brackets the paper's where it differs.

    Attributes:
        local: Weight of J1 [1].
        whole: Weight of J2.
        quantization: Weight of J3 [8].
        contrast: Weight of J4 [50].
        concept_weight: Weight of the concepts' contrast within J4.
        distillation: Weight of J5 [1].
        temperature: Of both contrasts.
        hidden: Width W of z [512].
        concept: Width c of a concept where both modalities have one vector an item.
        token_concept: Width c of a concept where one has tokens, a multiple of 16 [512].
        dropout: On the hidden layer.
        input_dropout: On the scaled features.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: Of AdamW.
        similarity: Grading of S, a name of `methods.base.label_similarity`; the paper's is "any".
        batch_size: Pairs a batch.
        epochs: Passes over the train rows; 0 for as many as show 135,000 pairs, at least 30 and at most 100.
    """

    local: float = 10.0
    whole: float = 10.0
    quantization: float = 0.5
    contrast: float = 1.0
    concept_weight: float = 0.01
    distillation: float = 0.01
    temperature: Positive = 0.07
    hidden: Count = 512
    concept: Count = 8
    token_concept: Count = 64
    dropout: Share = 0.5
    input_dropout: Share = 0.2
    learning_rate: Positive = 5e-3
    weight_decay: float = 0.01
    similarity: str = "any"
    batch_size: Count = 128
    epochs: int = 0

    def __post_init__(self) -> None:
        check_similarity(self.similarity)
        if self.token_concept < 16 or self.token_concept % 16:
            raise SettingsError(f"token_concept is a multiple of 16, got {self.token_concept}")


@dataclass(frozen=True)
class Parts:
    """What a head computes for the b items of a batch; see the table of symbols."""

    vector: Tensor
    concepts: Tensor
    whole: Tensor
    local: Tensor


def split_head(head: HashHead, features: Tensor, width: int) -> Parts:
    """Eq. 1: features -> the two codes and what they are read off.

    Args:
        head: What its output layer sees is z, of `width` units, beside the K concepts.
        features: float32 (b, in_dim) or (b, tokens, in_dim).
        width: W.
    """
    hidden = head.hidden(features)
    weight = head.output.weight  # (K, W + K c)
    vector, concepts = hidden[:, :width], hidden[:, width:]
    whole = torch.tanh(vector @ weight[:, :width].T)
    local = torch.tanh(concepts @ weight[:, width:].T)
    return Parts(vector, concepts.reshape(len(hidden), len(weight), -1), whole, local)


def concept_head(features: Tensor, n_bits: int, concept: int, config: MithConfig) -> HashHead:
    """A hash head for train features whose output layer sees z and then K concepts of width `concept`."""
    rest = 0 if features.ndim == 3 else n_bits * concept  # the concepts are part of the hidden layer, or gathered
    dropouts = config.dropout, config.input_dropout
    return HashHead.fitted(features, n_bits, (config.hidden + rest,), *dropouts, concept=concept)


def output_mask(n_bits: int, width: int, concept: int) -> Tensor:
    """Which weights of the output layer exist: bit k reads all of z and the concept t_k, (K, W + K c) of 0 and 1."""
    own = torch.eye(n_bits).repeat_interleave(concept, dim=1)
    return torch.cat([torch.ones(n_bits, width), own], dim=1)


def likelihood(buffer: Tensor, codes: Tensor, labels: Tensor, all_labels: Tensor, similarity: str = "any") -> Tensor:
    """N: (n, K) fixed, (b, K) with gradient, the labels of the batch and of all train rows, S's grading -> scalar.

    Its value is estimated from `COUNTED` of the train rows.
    """
    scale = 1 / (len(codes) * len(buffer))
    return scale * negative_log_likelihood(codes, buffer, labels, all_labels, similarity, COUNTED)


def quantization(parts: Parts, signs: Tensor) -> Tensor:
    """One half of eq. 4: (b, K) of -1 and +1 -> scalar."""
    return ((parts.whole + parts.local) / 2 - signs).square().mean()


def contrast(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """InfoNCE both ways: vectors (..., m, d), (..., m, d) of which equal places belong together -> scalar."""
    logits = F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).mT / temperature  # (..., m, m)
    forth = F.log_softmax(logits, dim=-1).diagonal(dim1=-2, dim2=-1)
    back = F.log_softmax(logits, dim=-2).diagonal(dim1=-2, dim2=-1)
    return -(forth + back).mean() / 2


def distillation(parts: Parts) -> Tensor:
    """One half of eq. 6."""
    to_local = (parts.whole.detach() - parts.local).square()
    to_whole = (parts.whole - parts.local.detach()).square()
    return (to_local + 0.1 * to_whole).sum(dim=1).mean()


class MITH(Method):
    """See the module's docstring."""

    name = "mith"
    supervision = "labels"
    shown = (135_000, 30, 100)
    citation = Citation(
        authors="Yishu Liu, Qingpeng Wu, Zheng Zhang, Jingyi Zhang and Guangming Lu",
        title="Multi-Granularity Interactive Transformer Hashing for Cross-modal Retrieval",
        venue="ACM MM",
        year=2023,
        url="https://doi.org/10.1145/3581783.3612411",
    )
    Config = MithConfig
    config: MithConfig

    image_whole: Tensor
    image_local: Tensor
    text_whole: Tensor
    text_local: Tensor
    code_buffer: Tensor
    train_labels: Tensor
    output_mask: Tensor

    def __init__(self, train: TrainData, n_bits: int, config: MithConfig) -> None:
        super().__init__(train, n_bits, config)
        device = train.image.device
        concept = config.token_concept if 3 in (train.image.ndim, train.text.ndim) else config.concept
        self.image_head = concept_head(train.image, n_bits, concept, config)
        self.text_head = concept_head(train.text, n_bits, concept, config)
        self.register_buffer("output_mask", output_mask(n_bits, config.hidden, concept).to(device), persistent=False)
        for head in (self.image_head, self.text_head):
            head.output.bias.requires_grad_(False).zero_()
            with torch.no_grad():
                head.output.weight.mul_(self.output_mask)
            head.output.weight.register_hook(lambda gradient: gradient * self.output_mask)  # type: ignore[no-untyped-call]
        self.register_buffer("train_labels", train.labels, persistent=False)
        for name in ("image_whole", "image_local", "text_whole", "text_local"):
            self.register_buffer(name, torch.tanh(torch.randn(len(train), n_bits, device=device)))
        self.register_buffer("code_buffer", torch.empty_like(self.image_whole))
        self.end_epoch(-1)

    def optimizers(self) -> Mapping[str, Optimizer]:
        """One AdamW over both heads."""
        return {
            "heads": AdamW(
                self.parameters(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay, fused=True
            )
        }

    def learning_rates(self, progress: float) -> Mapping[str, float]:
        """One cycle."""
        return {"heads": one_cycle(progress, self.config.learning_rate)}

    def steps(self, batch: Batch, phase: str) -> Iterator[Step]:
        """One joint update on eq. 7."""
        config = self.config
        image = split_head(self.image_head, batch.image, config.hidden)
        text = split_head(self.text_head, batch.text, config.hidden)
        for buffer, codes in (
            (self.image_whole, image.whole),
            (self.image_local, image.local),
            (self.text_whole, text.whole),
            (self.text_local, text.local),
        ):
            buffer[batch.index] = codes.detach()
        labels = batch.labels, self.train_labels, config.similarity
        signs = self.code_buffer[batch.index]
        local = likelihood(self.image_local, image.local, *labels) + likelihood(self.text_local, text.local, *labels)
        whole = likelihood(self.image_whole, text.whole, *labels) + likelihood(self.text_whole, image.whole, *labels)
        contrasted = contrast(image.vector, text.vector, config.temperature)
        concepts = contrast(image.concepts, text.concepts, config.temperature)
        yield Step(
            "heads",
            {
                "local": config.local * local,
                "whole": config.whole * whole,
                "quantization": config.quantization * (quantization(image, signs) + quantization(text, signs)),
                "contrast": config.contrast * (contrasted + config.concept_weight * concepts),
                "distillation": config.distillation * (distillation(image) + distillation(text)),
            },
        )

    def end_epoch(self, epoch: int) -> None:
        """Eq. 8."""
        whole, local = self.image_whole + self.text_whole, self.image_local + self.text_local
        self.code_buffer = binarized(0.99 * whole + 0.01 * local)
