"""DUET: agreement of labels and agreement of pairs, learned on one code (cmh-milvus's default method).

A loss on labels alone makes MAP high and the ranking useless: every item of a label combination falls onto the same
code. A loss on pairs alone ranks finely and ignores the labels. DUET contrasts both on the very bits that are stored.

With image and text codes A, B in {-1, +1}^{b x K} of a batch (straight-through signs) and s(u, v) = u.v / sqrt(K),
which has unit variance for random codes of any length, so that one temperature fits all K:

    label    L_lab(U, V) = mean_i sum_j W_ij [ log sum_k exp( s(u_i, v_k) / tau_label )
                                               - min( s(u_i, v_j), r_ij ) / tau_label ] / sum_j W_ij           (1)
             W_ij = (Jaccard overlap of the label sets of i and j) ^ overlap_power; the mean is over (A, B), (B, A),
             (A, A), (B, B), and an item is not its own positive in the last two (supervised contrast: Khosla et al.
             2020, eq. 2, arXiv 2004.11362). Its attraction ends at r_ij = sqrt(K) (reach + (1 - reach) W_ij): items
             of a label come close, the closer the more labels they share; short of equal label sets they stay apart,
             and eq. 2 orders them
    pairs    L_pair = cross entropy of softmax_j( s(a_i, b_j) / tau_pair ) against j = i, both ways             (2)
             (InfoNCE: van den Oord et al. 2018, arXiv 1807.03748)
    soft     L_soft = the same softmax against P, the mean of softmax_j( cos(x_i, x_j) / tau_soft ) and of
             softmax_j( cos(y_i, y_j) / tau_soft ), x and y the scaled pictures and texts                        (3)

    predict  L_pred = mean binary cross entropy of a linear layer on each head's hidden layer against the labels  (4)
    partner  L_part = mean_i [ 1 - cos( M_A(h_i), q_i ) ] + mean_i [ 1 - cos( M_B(g_i), p_i ) ], M_A and M_B linear
             layers on the hidden layers h of pictures and g of texts                                            (5)

    L = L_lab + predict_weight L_pred + partner_weight L_part + pair_weight (L_pair + soft_weight L_soft)       (6)

While training, each pair is blended with a random other one, x_i <- u x_i + (1 - u) x_j, with u ~ U(1 - blend, 1) and j
the same in both modalities; the targets stay those of i (mixup's input half: Zhang et al. 2018, arXiv 1710.09412).

Dropout takes whole words from a bag of words, and two bags about one thing may share none. So a head whose features are
bags of words sees their leading principal components too (latent semantic analysis: Deerwester et al. 1990), beside the
features and beside the hidden layer, where no dropout touches them.

symbol    variable              shape
A, B      image_code, text_code (b, K)
W, P      overlap, alike        (b, b)
h, g      image_hidden, text_hidden (b, hidden)
x, y      scaled image, text    (b, image_dim), (b, text_dim)   as the heads see them, before any blend
p, q      image_gist, text_gist (b, partner_dim)   leading principal components of x and y over the train rows

With `nested`, eq. 1 to 3 are the means over the codes' first 16, 32, 64, ... and K bits, so that a prefix of a code is
itself a good code (as Kusupati et al. 2022, arXiv 2205.13147, do for floats).

`pair_weight` is the one knob: near 0 the code ranks by labels, at 1 and more by pairs. Where it is not given, the
validation rows choose it among `PAIR_WEIGHTS`: how much agreement of pairs costs in agreement of labels differs from
data set to data set. Without labels only eq. 2, 3 and 5 are left.

Departures: none from a paper; the method is this project's own, eq. 1 to 3 of the published losses named there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

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
    cosines,
    label_similarity,
    one_cycle,
    straight_through_sign,
)

PAIR_WEIGHTS = (0.02, 0.1)  # among which the validation rows choose


@dataclass(frozen=True)
class DuetConfig:
    """Settings; the defaults were chosen on validation rows of several data sets (docs/methods/duet.md).

    Attributes:
        pair_weight: Weight of pair agreement against label agreement; this one if no validation rows choose it.
        soft_weight: Weight of the soft targets against the pairs; it keeps what the backbones know about items that
            are unlike the train rows', such as a person's question.
        predict_weight: Weight of the label prediction.
        partner_weight: Weight of the prediction of the other half of the pair.
        partner_dim: Principal components of the other half that are predicted.
        components: Principal components of a bag of words that the head sees beside it; 0 for none.
        overlap_power: Above 1 the label contrast favours items that share most labels, and NDCG over MAP.
        reach: Cosine of two codes at which the attraction of items with hardly any overlap of labels ends; that of
            items with the same labels does not end.
        nested: Train prefixes of 16, 32, 64, ... bits as codes of their own (`CrossModalHashEncoder.truncated`).
        blend: Largest share of another pair that is mixed into the features.
        tau_label: Temperature of the label contrast.
        tau_pair: Temperature of the pair contrast.
        tau_soft: Temperature of the soft targets.
        hidden: Width of each head's hidden layer.
        dropout: On the hidden layer.
        input_dropout: On the scaled features.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: Of AdamW.
        batch_size: Pairs a batch.
        epochs: Passes over the train rows; 0 for as many as show 300,000 pairs, at least 20 and at most 240.
    """

    pair_weight: float = 0.06
    soft_weight: float = 2.5
    predict_weight: float = 3.0
    partner_weight: float = 2.0
    partner_dim: Count = 128
    components: int = 128
    overlap_power: Positive = 1.0
    reach: Share = 0.5
    nested: bool = False
    blend: Share = 0.3
    tau_label: Positive = 1.6
    tau_pair: Positive = 0.8
    tau_soft: Positive = 0.1
    hidden: Count = 4096
    dropout: Share = 0.5
    input_dropout: Share = 0.2
    learning_rate: Positive = 3e-3
    weight_decay: float = 0.01
    batch_size: Count = 256
    epochs: int = 0


def label_contrast(codes: Tensor, others: Tensor, overlap: Tensor, tau: float, reach: Tensor) -> Tensor:
    """Eq. 1 for one pair of code matrices; items without a positive are left out.

    Args:
        codes: (b, K) of -1 and +1.
        others: (b, K); where it is `codes` itself, an item is neither its own positive nor its own negative.
        overlap: (b, b), weights W.
        tau: Temperature.
        reach: (b, b), the cosine of two codes at which their attraction ends; at that very cosine half of its gradient
            passes, as `torch.minimum` has it.

    Returns:
        Scalar.
    """
    scale = codes.shape[1] ** 0.5 / tau
    logits = codes @ others.T / codes.shape[1] * scale  # (b, b)
    attraction = torch.minimum(logits, reach * scale)
    if others is codes:
        itself = torch.eye(len(codes), dtype=torch.bool, device=codes.device)
        logits = logits.masked_fill(itself, torch.finfo(logits.dtype).min)
        overlap = overlap.masked_fill(itself, 0.0)
    total = overlap.sum(dim=1)
    contrast = (overlap * (logits.logsumexp(dim=1, keepdim=True) - attraction)).sum(dim=1) / total.clamp(min=1e-12)
    has_positive = total > 0
    mean: Tensor = (contrast * has_positive).sum() / has_positive.sum().clamp(min=1)
    return mean


def pair_contrast(image_code: Tensor, text_code: Tensor, target: Tensor, tau: float) -> Tensor:
    """Eq. 2 and 3: cross entropy of both directions' softmax against `target`.

    Args:
        image_code: (b, K).
        text_code: (b, K).
        target: (b, b), rows sum to 1; the identity gives eq. 2.
        tau: Temperature.

    Returns:
        Scalar.
    """
    logits = image_code @ text_code.T / (image_code.shape[1] ** 0.5 * tau)  # (b, b)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def soft_targets(image: Tensor, text: Tensor, tau: float) -> Tensor:
    """P of eq. 3: features (b, image_dim) and (b, text_dim) -> (b, b), rows sum to 1."""
    return (F.softmax(cosines(image, image) / tau, dim=1) + F.softmax(cosines(text, text) / tau, dim=1)) / 2


def gist(features: Tensor, dim: int) -> Tensor:
    """The leading principal components, p and q of eq. 5.

    Args:
        features: (n, d), scaled.
        dim: Components at most.

    Returns:
        (n, min(n, d, dim)).
    """
    left, values, _ = torch.pca_lowrank(features, min(dim, *features.shape))
    return left * values


def partner_distance(predicted: Tensor, partner: Tensor) -> Tensor:
    """Eq. 5 for one direction: (b, p) and (b, p) -> scalar."""
    return 1 - F.cosine_similarity(predicted, partner).mean()


def prefix_lengths(n_bits: int) -> list[int]:
    """16, 32, 64, ... below K, and K."""
    return [n for n in (16 << i for i in range(12)) if n < n_bits] + [n_bits]


def blended(image: Tensor, text: Tensor, blend: float) -> tuple[Tensor, Tensor]:
    """Each pair mixed with a random other one: (b, image_dim), (b, text_dim) -> the same shapes."""
    other = torch.randperm(len(image), device=image.device)
    share = blend * torch.rand(len(image), 1, device=image.device)  # (b, 1)

    def mixed(features: Tensor) -> Tensor:
        return features.lerp(features[other], share if features.ndim == 2 else share[:, :, None])

    return mixed(image), mixed(text)


class Duet(Method):
    """See the module's docstring."""

    name = "duet"
    supervision = "labels"
    labels_optional = True
    shown = (300_000, 20, 240)
    citation = Citation(
        authors="the cmh-milvus authors",
        title="DUET: label and pair agreement on one code",
        venue="cmh-milvus",
        year=2026,
        url="https://github.com/cmh-milvus/cmh-milvus",
    )
    Config = DuetConfig
    config: DuetConfig

    image_gist: Tensor
    text_gist: Tensor

    def __init__(self, train: TrainData, n_bits: int, config: DuetConfig) -> None:
        super().__init__(train, n_bits, config)

        def head(features: Tensor) -> HashHead:
            dropouts = config.dropout, config.input_dropout
            return HashHead.fitted(features, n_bits, (config.hidden,), *dropouts, components=config.components)

        self.image_head, self.text_head = head(train.image), head(train.text)
        widths = [head.output.in_features for head in (self.image_head, self.text_head)]
        if train.label_matrix is not None:
            n_labels = train.label_matrix.shape[1]
            self.image_labels, self.text_labels = (nn.Linear(w, n_labels) for w in widths)
        image, text = self.image_head.scaling(train.image_vectors), self.text_head.scaling(train.text_vectors)
        self.register_buffer("image_gist", gist(image, config.partner_dim), persistent=False)
        self.register_buffer("text_gist", gist(text, config.partner_dim), persistent=False)
        self.partner_text = nn.Linear(widths[0], self.text_gist.shape[1])  # of a picture
        self.partner_image = nn.Linear(widths[1], self.image_gist.shape[1])  # of a text

    @classmethod
    def left_open(cls, has_labels: bool) -> Mapping[str, Sequence[float]]:
        """The knob; without labels there is nothing to weigh pairs against."""
        return {"pair_weight": PAIR_WEIGHTS} if has_labels else {}

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
        """One joint update on eq. 6."""
        config = self.config
        image, text = blended(batch.image, batch.text, config.blend)
        image_hidden, text_hidden = self.image_head.hidden(image), self.text_head.hidden(text)
        image_code = straight_through_sign(self.image_head.output(image_hidden))
        text_code = straight_through_sign(self.text_head.output(text_hidden))
        lengths = prefix_lengths(self.n_bits) if config.nested else [self.n_bits]
        prefixes = [(image_code[:, :n], text_code[:, :n]) for n in lengths]
        terms: dict[str, Tensor] = {}
        if batch.label_matrix is not None:
            overlap = label_similarity(batch.label_matrix, batch.label_matrix, "jaccard") ** config.overlap_power
            reach = config.reach + (1 - config.reach) * overlap
            contrasts = [
                label_contrast(a, b, overlap, config.tau_label, reach)
                for image_bits, text_bits in prefixes
                for a, b in (
                    (image_bits, text_bits),
                    (text_bits, image_bits),
                    (image_bits, image_bits),
                    (text_bits, text_bits),
                )
            ]
            terms["label"] = torch.stack(contrasts).mean()
            predictions = torch.stack([self.image_labels(image_hidden), self.text_labels(text_hidden)])
            truth = batch.label_matrix.expand_as(predictions)
            terms["predict"] = config.predict_weight * F.binary_cross_entropy_with_logits(predictions, truth)
        partners = partner_distance(self.partner_text(image_hidden), self.text_gist[batch.index])
        partners = partners + partner_distance(self.partner_image(text_hidden), self.image_gist[batch.index])
        terms["partner"] = config.partner_weight * partners
        weight = 1.0 if batch.label_matrix is None else config.pair_weight
        if weight > 0:
            own = torch.eye(len(batch), device=image_code.device)
            image, text = self.image_head.scaling(batch.image_vectors), self.text_head.scaling(batch.text_vectors)
            alike = soft_targets(image, text, config.tau_soft)
            for name, target, share in (("pair", own, 1.0), ("soft", alike, config.soft_weight)):
                contrast = torch.stack([pair_contrast(*bits, target, config.tau_pair) for bits in prefixes]).mean()
                terms[name] = weight * share * contrast
        yield Step("heads", terms)
