"""UCCH: Unsupervised Contrastive Cross-Modal Hashing (Hu et al., TPAMI 45(3), 2023). Learns from pairs.

h^x, h^y are the unit-length relaxed codes of an image and a text, v_i the remembered code of pair i.

    contrast    P(i | h) = exp( <h, sgn v_i> / (tau sqrt K) ) / sum_j exp( <h, sgn v_j> / (tau sqrt K) )     (1)
                over i itself and m random pairs j;  L_c = - mean log P(i | h^x_i) - mean log P(i | h^y_i)   (2)
    memory      v_i <- normalise( (1 - rho) v_i + rho normalise(h^x_i + h^y_i) )                             (3)
    ranking     M = h^x h^yT;  S_ij = M_ij where M_ii - M_ij <= margin, else M_ij - xi                       (4)
                L_r = mean_i( margin + log sum_j e^S_ij - S_ii ) over rows, and the same over columns        (5)

    L = beta L_c + (1 - beta) L_r                                                                            (6)

symbol     variable              shape
h^x, h^y   image_code, text_code (b, K)   normalise(tanh(activation))
v          memory                (n, K)   starts as random signs
sgn v_j    keys                  (b + m, K)
M          matching              (b, b)

Algorithm: `warm_up` epochs contrast within the batch, sgn v being sgn(h^x + h^y), and fill the memory (rho = 1); then
it is used.

Departures:
- The m negatives are drawn once for a batch instead of once for each of its rows: a matrix product replaces the gather
  of b x m x K numbers. The batch's own pairs stand among the negatives of the others; a pair that is drawn is none of
  its own.
- Narrower nets, for features, with batch normalisation. No early stopping by labels, which the authors' code has (it
  picks the epoch by the MAP of database rows).
- AdamW and one cycle instead of Adam at 1e-4 and a clipped gradient; a strong decay, so that pairs are not learned by
  heart: the loss tells every pair from all others, and label MAP of validation rows falls without it. It is set for the
  whole training, whose number of updates grows with the number of pairs; in a training of fewer than 100 updates each
  shrinks the weights as one of 100 does, because a stronger decay leaves a handful of codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
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
    binarized,
    one_cycle,
)

FEWEST = 100  # updates that the shrinkage is spread over


@dataclass(frozen=True)
class UcchConfig:
    """Settings; in brackets the paper's where it differs.

    Attributes:
        beta: Weight of contrast against ranking [0.9; 0.7 on MIRFLICKR].
        tau: Temperature of the contrast.
        negatives: m, remembered codes that a batch is contrasted with.
        rho: Share of the fresh codes in an update of the memory.
        margin: Of the ranking.
        penalty: xi, how far pairs beyond the margin are moved out of the sum [1; 0.1 on MIRFLICKR].
        warm_up: Epochs before the memory is used.
        hidden: Width of the hidden layers, two for images and one for texts [8192].
        learning_rate: Peak of the one-cycle schedule [1e-4, constant].
        shrinkage: Of all weights over a training of 100 updates or more: without gradients they would fall to
            e^-shrinkage [decay 1e-6].
        batch_size: Pairs a batch.
        epochs: Passes over the train rows [20].
    """

    beta: Share = 0.4
    tau: Positive = 0.9
    negatives: Count = 4096
    rho: Share = 0.6
    margin: float = 0.2
    penalty: float = 0.1
    warm_up: int = 1
    hidden: Count = 1024
    learning_rate: Positive = 3e-3
    shrinkage: float = 2.2
    batch_size: Count = 256
    epochs: Count = 16


def unit_code(activations: Tensor) -> Tensor:
    """h: (b, K) -> (b, K) of unit length, of the activations' signs."""
    return F.normalize(torch.tanh(activations), dim=1)


def contrast(code: Tensor, keys: Tensor, is_other: Tensor, tau: float) -> Tensor:
    """One half of eq. 2, with the positives first among the keys.

    Args:
        code: h, (b, K).
        keys: sgn v, (b + m, K); row i < b is the key of pair i.
        is_other: bool (b, b + m), False where a drawn key is pair i's own again.
        tau: Temperature.

    Returns:
        Scalar.
    """
    logits = code @ keys.T / (tau * code.shape[1] ** 0.5)  # (b, b + m)
    own = torch.arange(len(code), device=code.device)
    return F.cross_entropy(logits.masked_fill(~is_other, -1e9), own)


def remember(memory: Tensor, image_code: Tensor, text_code: Tensor, rho: float) -> Tensor:
    """Eq. 3 for the rows of a batch: v (b, K) -> (b, K)."""
    fresh = F.normalize(image_code + text_code, dim=1)
    return F.normalize((1 - rho) * memory + rho * fresh, dim=1)


def ranking(matching: Tensor, margin: float, penalty: float) -> Tensor:
    """Eq. 4 and 5: M (b, b) -> scalar."""
    own = matching.diagonal()

    def one_way(scores: Tensor) -> Tensor:
        beyond = own.detach()[:, None] - scores.detach() > margin
        shifted = scores - penalty * beyond.to(scores.dtype)
        return (margin + shifted.logsumexp(dim=1) - own).mean()

    return one_way(matching) + one_way(matching.T)


class UCCH(Method):
    """See the module's docstring."""

    name = "ucch"
    supervision = "pairs"
    citation = Citation(
        authors="Peng Hu, Hongyuan Zhu, Jie Lin, Dezhong Peng, Yin-Ping Zhao and Xi Peng",
        title="Unsupervised Contrastive Cross-Modal Hashing",
        venue="TPAMI",
        year=2023,
        url="https://doi.org/10.1109/TPAMI.2022.3177356",
    )
    Config = UcchConfig
    config: UcchConfig

    memory: Tensor

    def __init__(self, train: TrainData, n_bits: int, config: UcchConfig) -> None:
        super().__init__(train, n_bits, config)
        self.image_head = HashHead.fitted(train.image, n_bits, (config.hidden, config.hidden))
        self.text_head = HashHead.fitted(train.text, n_bits, (config.hidden,))
        signs = binarized(torch.randn(len(train), n_bits, device=train.image.device))
        self.register_buffer("memory", F.normalize(signs, dim=1))

    def optimizers(self) -> Mapping[str, Optimizer]:
        """One over both nets."""
        config = self.config
        steps = max(FEWEST, config.epochs * max(1, round(len(self.memory) / config.batch_size)))
        decay = config.shrinkage / (steps * config.learning_rate / 2)  # the mean rate of one cycle is half its peak
        return {"nets": AdamW(self.parameters(), lr=config.learning_rate, weight_decay=decay, fused=True)}

    def learning_rates(self, progress: float) -> Mapping[str, float]:
        """One cycle."""
        return {"nets": one_cycle(progress, self.config.learning_rate)}

    def phases(self, epoch: int) -> Iterable[str]:
        """In-batch keys first, then the memory's."""
        return ("warm_up",) if epoch < self.config.warm_up else ("memory",)

    def steps(self, batch: Batch, phase: str) -> Iterator[Step]:
        """One joint update on eq. 6, then eq. 3."""
        config = self.config
        image_code = unit_code(self.image_head(batch.image))
        text_code = unit_code(self.text_head(batch.text))
        if phase == "warm_up":
            drawn, rho = batch.index[:0], 1.0
            keys = binarized(image_code + text_code)
        else:
            drawn, rho = torch.randint(len(self.memory), (config.negatives,), device=batch.index.device), config.rho
            keys = binarized(self.memory[torch.cat([batch.index, drawn])])
        itself = torch.ones(len(batch), len(batch), dtype=torch.bool, device=batch.index.device)
        is_other = torch.cat([itself, batch.index[:, None] != drawn[None, :]], dim=1)
        yield Step(
            "nets",
            {
                "image_contrast": config.beta * contrast(image_code, keys, is_other, config.tau),
                "text_contrast": config.beta * contrast(text_code, keys, is_other, config.tau),
                "ranking": (1 - config.beta) * ranking(image_code @ text_code.T, config.margin, config.penalty),
            },
        )
        self.memory[batch.index] = remember(self.memory[batch.index], image_code.detach(), text_code.detach(), rho)
