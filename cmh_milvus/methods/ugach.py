"""UGACH: Unsupervised Generative Adversarial Cross-Modal Hashing (Zhang, Peng & Yuan, AAAI 2018, arXiv 1712.00358).

A generator picks pairs that look related; a discriminator tells them from the neighbours on a graph of the features.
Both are two hash nets with relaxed codes h = sigmoid(activation) and distance d(q, o) = |h_q - h_o|^2.

    correlation graph   positives of a pair: its k nearest pairs by image and its k nearest by text          (1)
    generator           p(o | q) = softmax_o( -d_G(q, o) ) over the candidates that are not positives of q   (2)
    discriminator       L_D = mean max(0, beta + d_D(q, o+) - d_D(q, o-)),  o- ~ p(. | q)                    (3)
    reward              r(o | q) = sigmoid( max(0, beta + d_D(q, o+) - d_D(q, o)) )                          (4)
    policy gradient     L_G = - mean (r(o | q) - r_mean) log p(o | q),  o ~ p(. | q), r_mean of the batch    (5)

Queries of both modalities are used in each batch: q an image and o texts, then q a text and o images.

symbol    variable                    shape
graph     neighbours                  (n, 2 k)   row numbers, the pair itself among them
o         batch.index                 (m,)       candidates: the rows of the batch, m = b
d(q, o)   distances                   (b, m)
p         log_probability             (b, m)
h         sigmoid(head(features))     (b, K)     code bit 1 where h >= 0.5

Algorithm: `pretraining` epochs of the discriminator on random negatives, then rounds of one discriminator pass and
`generator_passes` generator passes. The discriminator's nets are the encoder.

Departures:
- Eq. 5 is as the paper has it, log p over all candidates. The authors' code takes the softmax over the two sampled
  items alone, and has no baseline r_mean although every reward is at least 0.5.
- Both retrieval directions train one model (the code trains one for each).
- Neighbours by cosine of the scaled features, where it is above 0, instead of Euclidean distance of raw ones; found
  block by block.
- Adam and batches instead of plain SGD on single queries: features need minutes, not days. The weight decay of 0.01
  on the squared norm, which batches of one needed, becomes `weight_decay`. ReLU and batch normalisation for
  the hidden tanh.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    nearest_rows,
    one_cycle,
)


@dataclass(frozen=True)
class UgachConfig:
    """Settings; in brackets the paper's where it differs.

    Attributes:
        margin: beta as a share of K [1/8].
        neighbours: k, nearest pairs by each modality, the pair itself included.
        negatives: Picks for a query.
        pretraining: Epochs of the discriminator on random negatives before the adversarial rounds [30,000].
        generator_passes: Generator passes of a round.
        hidden: Width of each net's hidden layer [8192].
        dropout: On the hidden layer [none].
        input_dropout: On the scaled features [none].
        learning_rate: Peak of the discriminator's one-cycle schedule [0.01, in rounds 0.001].
        generator_rate: Learning rate of the generator [0.01].
        weight_decay: On all weights [0.01].
        batch_size: Queries of each modality a batch, and candidates among which the generator picks [20, in rounds 1
            query; candidates n / 50 = 300].
        epochs: Pretraining and rounds together [30 rounds].
    """

    margin: float = 0.125
    neighbours: Count = 5
    negatives: Count = 2
    pretraining: int = 20
    generator_passes: int = 2
    hidden: Count = 1024
    dropout: Share = 0.5
    input_dropout: Share = 0.2
    learning_rate: Positive = 1e-3
    generator_rate: float = 1e-5
    weight_decay: float = 1e-5
    batch_size: Count = 256
    epochs: Count = 30


def correlated(features: Tensor, k: int) -> Tensor:
    """Eq. 1 in one modality; what has nothing in common with a row, as with a text without words, does not count.

    Args:
        features: Scaled, (n, d).
        k: Neighbours a row, the row itself among them unless k others equal it.

    Returns:
        Row numbers, int32 (n, k): neighbours by cosine, and the row itself where that is not above 0.
    """
    cosine, rows = nearest_rows(F.normalize(features, dim=1), k)
    itself = torch.arange(len(rows), dtype=rows.dtype, device=rows.device)[:, None]
    return torch.where(cosine > 0, rows, itself)


def squared_distances(h: Tensor, others: Tensor) -> Tensor:
    """D of all pairs: (b, K), (m, K) -> (b, m)."""
    return h.square().sum(dim=1)[:, None] - 2 * h @ others.T + others.square().sum(dim=1)[None, :]


def candidate_log_probability(distances: Tensor, is_positive: Tensor) -> Tensor:
    """Eq. 2: (b, m) distances and bool (b, m) -> (b, m); positives have probability 0, unless all are."""
    return F.log_softmax((-distances).masked_fill(is_positive, -1e9), dim=1)


def picked(log_probability: Tensor, picks: int) -> Tensor:
    """Candidates drawn from p with replacement: (b, m) -> numbers of candidates (b, picks)."""
    return log_probability.detach().exp().multinomial(picks, replacement=True)


def margin_loss(positive: Tensor, negative: Tensor, beta: float) -> Tensor:
    """The hinge of eq. 3 and 4: d(q, o+) (b, 1), d(q, o-) (b, s) -> (b, s)."""
    return F.relu(beta + positive - negative)


def policy_gradient(log_probability: Tensor, reward: Tensor) -> Tensor:
    """Eq. 5 for the picked candidates: (b, s) log p, (b, s) rewards -> scalar; r_mean is the batch's mean reward.

    A mean over the s = 2 picks of one query alone would halve the signal; the batch's mean leaves it unbiased.
    """
    return -((reward - reward.mean()).detach() * log_probability).mean()


def relaxed_pair(head: HashHead, features: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """H of two feature matrices of one modality, in one pass through the net."""
    relaxed = torch.sigmoid(head(torch.cat([features, others])))
    return relaxed[: len(features)], relaxed[len(features) :]


class HashNets(nn.Module):
    """An image and a text net; the generator is one such pair."""

    def __init__(self, image_head: HashHead, text_head: HashHead) -> None:
        super().__init__()
        self.image_head, self.text_head = image_head, text_head


class UGACH(Method):
    """See the module's docstring."""

    name = "ugach"
    supervision = "pairs"
    citation = Citation(
        authors="Jian Zhang, Yuxin Peng and Mingkuan Yuan",
        title="Unsupervised Generative Adversarial Cross-Modal Hashing",
        venue="AAAI",
        year=2018,
        url="https://arxiv.org/abs/1712.00358",
    )
    Config = UgachConfig
    config: UgachConfig

    neighbours: Tensor

    def __init__(self, train: TrainData, n_bits: int, config: UgachConfig) -> None:
        super().__init__(train, n_bits, config)
        self.train_data = train
        shape = (config.hidden,), config.dropout, config.input_dropout
        self.image_head = HashHead.fitted(train.image, n_bits, *shape)
        self.text_head = HashHead.fitted(train.text, n_bits, *shape)
        self.generator = HashNets(
            HashHead.fitted(train.image, n_bits, *shape), HashHead.fitted(train.text, n_bits, *shape)
        )
        nearest = [
            correlated(own.scaling(features), config.neighbours)
            for own, features in ((self.image_head, train.image_vectors), (self.text_head, train.text_vectors))
        ]
        self.register_buffer("neighbours", torch.cat(nearest, dim=1), persistent=False)

    def optimizers(self) -> Mapping[str, Optimizer]:
        """One for each player."""
        config = self.config
        discriminator = [*self.image_head.parameters(), *self.text_head.parameters()]
        return {
            "discriminator": Adam(discriminator, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True),
            "generator": Adam(
                self.generator.parameters(), lr=config.generator_rate, weight_decay=config.weight_decay, fused=True
            ),
        }

    def learning_rates(self, progress: float) -> Mapping[str, float]:
        """One cycle for the discriminator; the generator's rate is constant."""
        return {"discriminator": one_cycle(progress, self.config.learning_rate)}

    def phases(self, epoch: int) -> Iterable[str]:
        """Pretraining, then rounds."""
        if epoch < self.config.pretraining:
            return ("pretrain",)
        return ("discriminator", *["generator"] * self.config.generator_passes)

    def steps(self, batch: Batch, phase: str) -> Iterator[Step]:
        """One update of one player on queries of both modalities."""
        beta = self.config.margin * self.n_bits
        own = self.neighbours[batch.index]  # (b, 2 k)
        pick = torch.randint(own.shape[1], (len(batch), 1), device=own.device)
        positive = self.train_data.rows(own.gather(1, pick).squeeze(1))
        is_positive = (own[:, :, None] == batch.index).any(dim=1)  # (b, m)

        def distances(nets: HashNets | Method) -> dict[str, tuple[Tensor, Tensor]]:
            """For queries of each modality, a player's d(q, o+) (b, 1) and d(q, o) (b, m)."""
            image, image_positive = relaxed_pair(nets.image_head, batch.image, positive.image)
            text, text_positive = relaxed_pair(nets.text_head, batch.text, positive.text)
            return {
                "image_query": (
                    (image - text_positive).square().sum(dim=1, keepdim=True),
                    squared_distances(image, text),
                ),
                "text_query": (
                    (text - image_positive).square().sum(dim=1, keepdim=True),
                    squared_distances(text, image),
                ),
            }

        def at_rest(nets: HashNets | Method) -> dict[str, tuple[Tensor, Tensor]]:
            """Distances of the player that does not learn now: without dropout, batch statistics and gradient."""
            nets.eval()
            with torch.no_grad():
                found = distances(nets)
            nets.train()
            return found

        terms: dict[str, Tensor] = {}
        if phase == "generator":
            judged = at_rest(self)
            for side, (_, distance) in distances(self.generator).items():
                log_probability = candidate_log_probability(distance, is_positive)
                picks = picked(log_probability, self.config.negatives)
                near, far = judged[side]
                reward = torch.sigmoid(margin_loss(near, far.gather(1, picks), beta))
                terms[f"policy_{side}"] = policy_gradient(log_probability.gather(1, picks), reward)
            yield Step("generator", terms)
            return
        generated = at_rest(self.generator) if phase == "discriminator" else {}
        for side, (near, far) in distances(self).items():
            distance = generated[side][1] if generated else torch.zeros_like(far)  # random negatives: all alike
            picks = picked(candidate_log_probability(distance, is_positive), self.config.negatives)
            terms[f"margin_{side}"] = margin_loss(near, far.gather(1, picks), beta).mean()
        yield Step("discriminator", terms)
