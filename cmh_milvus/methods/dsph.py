"""DSPH: Deep Semantic-aware Proxy Hashing (Huo, Qin et al., TCSVT 2024). Supervised by labels.

Each label c has a learned proxy p_c in R^K. Codes are drawn to the proxies of their labels and pushed from the others;
pairs of multi-label items without a common label are pushed apart as well (numbers are this file's):

    L_proxy(H) = mean_{(i,c): L_ic = 1} [ 1 - cos(h_i, p_c) ]                                          (1)
               + mean_{(i,c): L_ic = 0} [ cos(h_i, p_c) - t ]_+                                        (2)
    L_irr(U,V) = mean_{(i,j): no shared label, both with several labels} [ cos(u_i, v_j) - t ]_+       (3)
    L          = L_proxy(F) + L_proxy(G) + alpha ( L_irr(F,F) + L_irr(G,G) + L_irr(F,G) )              (4)
    t          = 1 - 2 d / K,  d the largest minimum distance for which a binary code of K bits with 2^q words is known,
                 q = ceil(log2 of the number of labels)                                                (5)

symbol    variable                 shape
F, G      image_code, text_code    (b, K)         relaxed codes, tanh of the activations
P         proxies                  (n_labels, K)
L         batch.labels             (b, n_labels)

The cost of a step is b n_labels K: nothing depends on the number of train rows.

Departures (authors' code in brackets):
- Nets are MLPs with batch normalisation on backbone features, AdamW with one cycle [CLIP ViT-B/32 fine-tuned, BertAdam,
  10 % warm-up then cosine, 1e-5 for CLIP and 1e-3 for the new layers].
- d is the Griesmer bound's, which holds for any K and number of labels [a spreadsheet of best known codes]. They agree
  for 21, 24 and 80 labels at 64 and 128 bits; for 80 or 255 labels on few bits t is up to .125 lower here.
- Proxies learn with their own SGD as in the authors' code [rate .02, momentum .9, weight decay 5e-4]; `proxy_rate`.
- The width and the number of epochs are set for features [100 epochs].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from cmh_milvus.encoders.hash_head import HashHead
from cmh_milvus.methods.base import Batch, Citation, Count, Method, Positive, Share, Step, TrainData, cosines, one_cycle


@dataclass(frozen=True)
class DsphConfig:
    """Settings; in brackets the paper's where it differs.

    Attributes:
        alpha: Weight of the irrelevant pairs, eq. 3.
        hidden: Width of each head's hidden layer [none, on CLIP].
        dropout: On the hidden layer.
        input_dropout: On the scaled features.
        learning_rate: Of the heads, peak of the one-cycle schedule.
        weight_decay: Of the heads [.2].
        proxy_rate: Learning rate of the proxies.
        batch_size: Pairs a batch.
        epochs: Passes over the train rows [100]; 0 for as many as show 108,000 pairs, at least 24 and at most 72.
    """

    alpha: float = 0.8
    hidden: Count = 1024
    dropout: Share = 0.5
    input_dropout: Share = 0.2
    learning_rate: Positive = 1e-3
    weight_decay: float = 0.01
    proxy_rate: float = 0.02
    batch_size: Count = 128
    epochs: int = 0


def distance_bound(n_bits: int, n_labels: int) -> int:
    """Largest d with sum_{i < q} ceil(d / 2^i) <= K (Griesmer 1960), q = ceil(log2 n_labels)."""
    q = max(1, math.ceil(math.log2(n_labels)))
    return max(d for d in range(n_bits + 1) if sum(-(-d // 2**i) for i in range(q)) <= n_bits)


def threshold(n_bits: int, n_labels: int) -> float:
    """Eq. 5: the cosine below which two codes are far enough apart."""
    return 1 - 2 * distance_bound(n_bits, n_labels) / n_bits


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the values where a mask is set; 0 where it is empty."""
    return (values * where).sum() / where.sum().clamp(min=1)


def proxy_loss(codes: Tensor, proxies: Tensor, labels: Tensor, t: float) -> Tensor:
    """Eq. 1 and 2: (b, K), (n_labels, K), (b, n_labels) of 0 and 1 -> scalar."""
    similarity = cosines(codes, proxies)  # (b, n_labels)
    return mean_where(1 - similarity, labels) + mean_where(F.relu(similarity - t), 1 - labels)


def irrelevant_pairs(labels: Tensor) -> Tensor:
    """Pairs of eq. 3: (b, n_labels) -> (b, b), 1.0 where both have several labels and share none."""
    several = (labels.sum(dim=1) > 1).to(labels.dtype)
    return (labels @ labels.T == 0) * several[:, None] * several[None, :]


def irrelevant_loss(codes: Tensor, others: Tensor, pairs: Tensor, t: float) -> Tensor:
    """Eq. 3: (b, K), (b, K), (b, b) -> scalar."""
    return mean_where(F.relu(cosines(codes, others) - t), pairs)


class DSPH(Method):
    """See the module's docstring."""

    name = "dsph"
    supervision = "labels"
    shown = (108_000, 24, 72)
    citation = Citation(
        authors="Yadong Huo, Qibing Qin, Jiangyan Dai, Lei Wang, Wenfeng Zhang, Lei Huang and Chengduan Wang",
        title="Deep Semantic-Aware Proxy Hashing for Multi-Label Cross-Modal Retrieval",
        venue="TCSVT",
        year=2024,
        url="https://doi.org/10.1109/TCSVT.2023.3285266",
    )
    Config = DsphConfig
    config: DsphConfig

    def __init__(self, train: TrainData, n_bits: int, config: DsphConfig) -> None:
        super().__init__(train, n_bits, config)
        n_labels = train.labels.shape[1]
        shape = (config.hidden,), config.dropout, config.input_dropout
        self.image_head = HashHead.fitted(train.image, n_bits, *shape)
        self.text_head = HashHead.fitted(train.text, n_bits, *shape)
        self.proxies = nn.Parameter(torch.empty(n_labels, n_bits, device=train.image.device))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")
        self.threshold = threshold(n_bits, n_labels)

    def optimizers(self) -> Mapping[str, Optimizer]:
        """AdamW for the heads, SGD for the proxies."""
        config = self.config
        heads = [*self.image_head.parameters(), *self.text_head.parameters()]
        return {
            "heads": AdamW(heads, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True),
            "proxies": SGD([self.proxies], lr=config.proxy_rate, momentum=0.9, weight_decay=5e-4),
        }

    def learning_rates(self, progress: float) -> Mapping[str, float]:
        """One cycle for the heads; the proxies' rate stays."""
        return {"heads": one_cycle(progress, self.config.learning_rate)}

    def steps(self, batch: Batch, phase: str) -> Iterator[Step]:
        """Eq. 4 for the heads, and for the proxies with the same codes: one simultaneous update."""
        image_code = torch.tanh(self.image_head(batch.image))
        text_code = torch.tanh(self.text_head(batch.text))
        pairs = irrelevant_pairs(batch.labels)
        sides = [(image_code, image_code), (text_code, text_code), (image_code, text_code)]
        irrelevant = torch.stack([irrelevant_loss(u, v, pairs, self.threshold) for u, v in sides]).sum()
        yield Step(
            "heads",
            {
                "image_proxy": proxy_loss(image_code, self.proxies, batch.labels, self.threshold),
                "text_proxy": proxy_loss(text_code, self.proxies, batch.labels, self.threshold),
                "irrelevant": self.config.alpha * irrelevant,
            },
        )
        yield Step(
            "proxies",
            {
                "proxy": proxy_loss(image_code.detach(), self.proxies, batch.labels, self.threshold)
                + proxy_loss(text_code.detach(), self.proxies, batch.labels, self.threshold)
            },
        )
