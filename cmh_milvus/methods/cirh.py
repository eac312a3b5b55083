"""CIRH: Work Together, correlation-identity reconstruction hashing (Zhu et al., TKDE 2022). Learns from pairs.

    S1 = a1 cos_I + (1 - a1) cos_T, of each row the `kept` share of largest entries, the rest 0         (1)
    S2 = 2 / (1 + e^-S1) - 1 + I, made symmetric                                                          (2)
    S  = a2 S1 + (1 - a2) S2                                                                             (3)

Teacher, which sees both modalities of a pair, x being features smoothed by S (0.7 x + 0.2 x_nearest + 0.1 x_second):

    v_m = unit(ReLU(BN(x_m U_m)))              g_m = ReLU(BN(S v_m W_m)),  m in {I, T}
    g_J = ReLU of the sum of both halves of BN([[S, I], [I, S]] [v_I; v_T] W_J)
    H_m = BN([g_m, g_J] P_m)                   H_J = BN(g_J P_J)            H = tanh(BN([H_I, H_J, H_T] P))

    L1 = recon (|x_I - dec_I(H + tanh H_I)|^2 + |x_T - dec_T(H + tanh H_T)|^2)
         + |S - cos H_I|^2 + |S - cos H_T|^2 + |S - cos H|^2 + |H - sign H|^2                             (4)

Students, the hash functions, with B = sign H:

    L2 = |h_I - B|^2 + |h_T - B|^2 + |h_I - h_T|^2 + dw (|S - cos h_I|^2 + |S - cos h_T|^2 + |S - cos h_IT|^2)  (5)

Squares are means over entries; cos X is the matrix of cosines of X's rows, cos h_IT that of h_I's rows with h_T's.

symbol     variable               shape
S          similarity             (b, b)
B          code_buffer            (n, K)   as the last teacher pass left it
v_m, g_m   inside Teacher         (b, 512)
H_m, H     inside Teacher         (b, K)
h_I, h_T   image_code, text_code  (b, K)

Algorithm: an epoch is a pass on L1, which fills B by row number, and a pass on L2.

Departures:
- In the students' pass S is that of the batch's own rows: the authors' code takes rows in their stored order there
  while the batch is shuffled, so S and the codes belong to different items.
- "The K_s smallest entries of a row are 0" is done by one threshold a row, found block by block: nothing is n x n.
  The paper's K_s = 3,000 of 5,000 is `kept` = 0.4.
- Neighbours are the nearest and the second nearest row of the batch; the authors' code takes the second and the third.
- Batch normalisation in the students' hidden layer.
- Widths, rates and the number of epochs are set for features; AdamW and one cycle each for teacher and students.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
    binarized,
    cosines,
    one_cycle,
    rows_at_a_time,
)

SMOOTHING = (0.7, 0.2, 0.1)  # weights of an item, its nearest and its second nearest of the batch
ROUNDING = 1e-5  # an inner product of two rows depends a little on what else is multiplied beside them


@dataclass(frozen=True)
class CirhConfig:
    """Settings; in brackets the paper's for COCO where it differs.

    Attributes:
        a1: Share of images in S1 [0.1].
        a2: Share of S1 in S.
        kept: Share of a row's entries that S1 keeps.
        reconstruction: Weight of the decoders in L1.
        dw: Weight of similarities in L2.
        width: Of the teacher's layers.
        hidden: Width of the students' hidden layer [images 4096, texts d].
        dropout: On the hidden layer [images 0.3, texts 0].
        input_dropout: On the scaled features [none].
        teacher_rate: Peak of the teacher's one-cycle schedule [1e-3, constant].
        learning_rate: Peak of the students' [5e-4, constant].
        weight_decay: Of AdamW [0].
        batch_size: Pairs a batch.
        epochs: Passes on L1, and as many on L2 [100].
    """

    a1: Share = 0.3
    a2: Share = 0.3
    kept: Share = 0.4
    reconstruction: float = 10.0
    dw: float = 0.01
    width: Count = 512
    hidden: Count = 1024
    dropout: Share = 0.5
    input_dropout: Share = 0.2
    teacher_rate: float = 1e-3
    learning_rate: Positive = 1e-3
    weight_decay: float = 0.01
    batch_size: Count = 512
    epochs: Count = 20


def joint_features(image: Tensor, text: Tensor, a1: float) -> Tensor:
    """Unit rows whose inner products are the sum in eq. 1: (n, d_x), (n, d_y) -> (n, d_x + d_y)."""
    return torch.cat([a1**0.5 * F.normalize(image, dim=1), (1 - a1) ** 0.5 * F.normalize(text, dim=1)], dim=1)


def row_thresholds(unit: Tensor, kept: float, block: int = 1024) -> Tensor:
    """The smallest entry of each row that eq. 1 keeps: (n, d) -> (n,)."""
    n = len(unit)
    dropped = n - max(1, round(kept * n))
    blocks = torch.split(unit, rows_at_a_time(n, block))
    return torch.cat([(rows @ unit.T).kthvalue(dropped + 1, dim=1).values for rows in blocks])


def similarity_block(unit: Tensor, thresholds: Tensor, a2: float) -> Tensor:
    """Eq. 1 to 3 for a batch: joint features (b, d) and its rows' thresholds (b,) -> S (b, b)."""
    s1 = unit @ unit.T
    s1 = s1.masked_fill(s1 < thresholds[:, None] - ROUNDING, 0.0)
    s2 = 2 * torch.sigmoid(s1) - 1 + torch.eye(len(s1), device=s1.device)
    return a2 * s1 + (1 - a2) * (s2 + s2.T) / 2


def smoothed(features: Tensor, similarity: Tensor) -> Tensor:
    """Rows averaged with those of their neighbours: x (b, d), S (b, b) -> (b, d)."""
    nearest = similarity.topk(min(len(SMOOTHING), len(similarity)), dim=1).indices  # (b, 3), the row itself first
    return torch.stack([w * features[rows] for w, rows in zip(SMOOTHING, nearest.T, strict=False)]).sum(dim=0)


class GraphLayer(nn.Module):
    """BN(S v W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, graph: Tensor, nodes: Tensor) -> Tensor:
        """S (m, m), v (m, width) -> (m, width)."""
        passed: Tensor = self.norm(graph @ self.linear(nodes))
        return passed


def normed(d_in: int, d_out: int) -> list[nn.Module]:
    """A linear layer and batch normalisation."""
    return [nn.Linear(d_in, d_out), nn.BatchNorm1d(d_out)]


class Teacher(nn.Module):
    """H from both modalities of the pairs of a batch."""

    def __init__(self, image_dim: int, text_dim: int, width: int, n_bits: int) -> None:
        super().__init__()

        def decoder(dim: int) -> nn.Module:
            return nn.Sequential(*normed(n_bits, width), nn.ReLU(), *normed(width, dim))

        self.image_encoder = nn.Sequential(*normed(image_dim, width), nn.ReLU())
        self.text_encoder = nn.Sequential(*normed(text_dim, width), nn.ReLU())
        self.image_graph, self.text_graph, self.joint_graph = GraphLayer(width), GraphLayer(width), GraphLayer(width)
        self.image_code = nn.Sequential(*normed(2 * width, n_bits))
        self.text_code = nn.Sequential(*normed(2 * width, n_bits))
        self.joint_code = nn.Sequential(*normed(width, n_bits))
        self.code = nn.Sequential(*normed(3 * n_bits, n_bits), nn.Tanh())
        self.image_decoder, self.text_decoder = decoder(image_dim), decoder(text_dim)

    def forward(self, image: Tensor, text: Tensor, similarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Smoothed features x_m (b, d_m) and S (b, b) -> H_I, H_T and H, (b, K) each."""
        v_image, v_text = F.normalize(self.image_encoder(image), dim=1), F.normalize(self.text_encoder(text), dim=1)
        g_image, g_text = F.relu(self.image_graph(similarity, v_image)), F.relu(self.text_graph(similarity, v_text))
        itself = torch.eye(len(similarity), device=similarity.device)
        joint = torch.cat([torch.cat([similarity, itself], dim=1), torch.cat([itself, similarity], dim=1)])
        halves = self.joint_graph(joint, torch.cat([v_image, v_text])).tensor_split(2)
        g_joint = F.relu(halves[0] + halves[1])
        h_image = self.image_code(torch.cat([g_image, g_joint], dim=1))
        h_text = self.text_code(torch.cat([g_text, g_joint], dim=1))
        h: Tensor = self.code(torch.cat([h_image, self.joint_code(g_joint), h_text], dim=1))
        return h_image, h_text, h

    def loss(
        self, image: Tensor, text: Tensor, similarity: Tensor, reconstruction: float
    ) -> tuple[dict[str, Tensor], Tensor]:
        """L1 by its terms (eq. 4), and H: x_m (b, d_m), S (b, b) -> scalars, (b, K)."""
        h_image, h_text, h = self(image, text, similarity)
        image_again = self.image_decoder(h + torch.tanh(h_image))
        text_again = self.text_decoder(h + torch.tanh(h_text))
        terms = {
            "reconstruction": reconstruction * (F.mse_loss(image_again, image) + F.mse_loss(text_again, text)),
            "teacher_structure": torch.stack(
                [F.mse_loss(cosines(x, x), similarity) for x in (h_image, h_text, h)]
            ).sum(),
            "quantization": F.mse_loss(h, binarized(h)),
        }
        return terms, h


def student_loss(
    image_code: Tensor, text_code: Tensor, code: Tensor, similarity: Tensor, dw: float
) -> dict[str, Tensor]:
    """L2 by its terms (eq. 5): (b, K), (b, K), B (b, K), S (b, b) -> scalars."""
    across = [(image_code, image_code), (text_code, text_code), (image_code, text_code)]
    return {
        "code": F.mse_loss(image_code, code) + F.mse_loss(text_code, code),
        "consistency": F.mse_loss(image_code, text_code),
        "structure": dw * torch.stack([F.mse_loss(cosines(a, b), similarity) for a, b in across]).sum(),
    }


class CIRH(Method):
    """See the module's docstring."""

    name = "cirh"
    supervision = "pairs"
    citation = Citation(
        authors="Lei Zhu, Xize Wu, Jingjing Li, Zheng Zhang, Weili Guan and Heng Tao Shen",
        title="Work Together: Correlation-Identity Reconstruction Hashing for Unsupervised Cross-modal Retrieval",
        venue="TKDE",
        year=2022,
        url="https://doi.org/10.1109/TKDE.2022.3218656",
    )
    Config = CirhConfig
    config: CirhConfig

    thresholds: Tensor
    code_buffer: Tensor

    def __init__(self, train: TrainData, n_bits: int, config: CirhConfig) -> None:
        super().__init__(train, n_bits, config)
        shape = (config.hidden,), config.dropout, config.input_dropout
        self.image_head = HashHead.fitted(train.image, n_bits, *shape)
        self.text_head = HashHead.fitted(train.text, n_bits, *shape)
        self.teacher = Teacher(train.image_vectors.shape[1], train.text_vectors.shape[1], config.width, n_bits)
        unit = joint_features(train.image_vectors, train.text_vectors, config.a1)
        self.register_buffer("thresholds", row_thresholds(unit, config.kept), persistent=False)
        self.register_buffer("code_buffer", torch.ones(len(train), n_bits, device=train.image.device))

    def optimizers(self) -> Mapping[str, Optimizer]:
        """One for the teacher, one for both students."""
        students = [*self.image_head.parameters(), *self.text_head.parameters()]
        config = self.config
        return {
            "teacher": AdamW(
                self.teacher.parameters(), lr=config.teacher_rate, weight_decay=config.weight_decay, fused=True
            ),
            "students": AdamW(students, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True),
        }

    def learning_rates(self, progress: float) -> Mapping[str, float]:
        """One cycle each."""
        config = self.config
        return {
            "teacher": one_cycle(progress, config.teacher_rate),
            "students": one_cycle(progress, config.learning_rate),
        }

    def phases(self, epoch: int) -> Iterable[str]:
        """The teacher first."""
        return ("teacher", "students")

    def steps(self, batch: Batch, phase: str) -> Iterator[Step]:
        """One update of the teacher on L1, or of the students on L2."""
        config = self.config
        unit = joint_features(batch.image_vectors, batch.text_vectors, config.a1)
        similarity = similarity_block(unit, self.thresholds[batch.index], config.a2)
        if phase == "teacher":
            image = smoothed(self.image_head.scaling(batch.image_vectors), similarity)
            text = smoothed(self.text_head.scaling(batch.text_vectors), similarity)
            terms, h = self.teacher.loss(image, text, similarity, config.reconstruction)
            self.code_buffer[batch.index] = binarized(h)
            yield Step("teacher", terms)
            return
        image_code, text_code = torch.tanh(self.image_head(batch.image)), torch.tanh(self.text_head(batch.text))
        code = self.code_buffer[batch.index]
        yield Step("students", student_loss(image_code, text_code, code, similarity, config.dw))
