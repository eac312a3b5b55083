"""CIRH: Work Together, correlation-identity reconstruction hashing (Zhu et al., TKDE 2022). Learns from pairs.

    S1 = a1 cos_I + (1 - a1) cos_T, of each row the `kept` share of largest entries, the rest 0         (1)
    S2 = 2 / (1 + e^-S1) - 1 + I, made symmetric                                                          (2)
    S  = a2 S1 + (1 - a2) S2                                                                             (3)

Teacher, which sees both modalities of a pair: features smoothed with two neighbours
(0.7 x + 0.2 x_nearest + 0.1 x_second), v_m = unit(ReLU(BN(linear))) of width 512, graph layers
H_m = ReLU(BN(S v_m W_m)), a joint one over [v_I; v_T] with [[S, I], [I, S]], and H = tanh(BN(linear [H_I, H_T, H_J])).

    L1 = recon (|x_I - dec_I(H)|^2 + |x_T - dec_T(H)|^2)
         + |S - cos H_I|^2 + |S - cos H_T|^2 + |S - cos H|^2 + |H - sign H|^2                             (4)

Students, the hash functions, with B = sign H:

    L2 = |h_I - B|^2 + |h_T - B|^2 + |h_I - h_T|^2 + dw (|S - cos h_I|^2 + |S - cos h_T|^2 + |S - cos h_IT|^2)  (5)

Squares are means over entries; cos X is the matrix of cosines of X's rows, cos h_IT that of h_I's rows with h_T's.

symbol     variable               shape
S          similarity             (b, b)
B          code_buffer            (n, K)   as the last teacher pass left it
v_m, H_m   inside Teacher         (b, 512)
h_I, h_T   image_code, text_code  (b, K)

Algorithm: `teacher_epochs` passes on L1, the last of which fills B by row number, then passes on L2.

Departures:
- S is made from the batch's own rows: the authors' second stage takes rows in their stored order while the batch is
  shuffled, so S and the codes belong to different items there.
- "The K_s smallest entries of a row are 0" is done by one threshold a row, found block by block: nothing is n x n.
  The paper's K_s = 3,000 of 5,000 is `kept` = 0.4.
- How H_J joins (the mean of its image and text half) and whose neighbours smooth (those of S1) is our reading.
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
from cmh_milvus.methods.base import Batch, Citation, Method, Step, TrainData, nearest_rows, one_cycle, rows_at_a_time

SMOOTHING = (0.7, 0.2, 0.1)  # weights of an item, its nearest and its second nearest


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
        teacher_epochs: Passes on L1 [100].
        epochs: Passes on L1 and L2 together [200].
    """

    a1: float = 0.3
    a2: float = 0.3
    kept: float = 0.4
    reconstruction: float = 10.0
    dw: float = 0.01
    width: int = 512
    hidden: int = 1024
    dropout: float = 0.5
    input_dropout: float = 0.2
    teacher_rate: float = 1e-3
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    batch_size: int = 512
    teacher_epochs: int = 10
    epochs: int = 25


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
    s1 = s1.masked_fill(s1 < thresholds[:, None], 0.0)
    s2 = 2 * torch.sigmoid(s1) - 1 + torch.eye(len(s1), device=s1.device)
    return a2 * s1 + (1 - a2) * (s2 + s2.T) / 2


def cosines(rows: Tensor, others: Tensor) -> Tensor:
    """(b, K), (m, K) -> (b, m)."""
    return F.normalize(rows, dim=1) @ F.normalize(others, dim=1).T


def signs(relaxed: Tensor) -> Tensor:
    """B, without gradient."""
    return torch.where(relaxed.detach() >= 0, 1.0, -1.0)


class GraphLayer(nn.Module):
    """ReLU(BN(S v W))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, graph: Tensor, nodes: Tensor) -> Tensor:
        """S (m, m), v (m, width) -> (m, width)."""
        return F.relu(self.norm(graph @ self.linear(nodes)))


class Teacher(nn.Module):
    """H from both modalities of the pairs of a batch."""

    def __init__(self, image_dim: int, text_dim: int, width: int, n_bits: int) -> None:
        super().__init__()

        def encoder(dim: int) -> nn.Module:
            return nn.Sequential(nn.Linear(dim, width), nn.BatchNorm1d(width), nn.ReLU())

        def decoder(dim: int) -> nn.Module:
            return nn.Sequential(nn.Linear(n_bits, width), nn.ReLU(), nn.Linear(width, dim))

        self.image_encoder, self.text_encoder = encoder(image_dim), encoder(text_dim)
        self.image_graph, self.text_graph, self.joint_graph = GraphLayer(width), GraphLayer(width), GraphLayer(width)
        self.code = nn.Sequential(nn.Linear(3 * width, n_bits), nn.BatchNorm1d(n_bits), nn.Tanh())
        self.image_decoder, self.text_decoder = decoder(image_dim), decoder(text_dim)

    def forward(self, image: Tensor, text: Tensor, similarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Smoothed features and S of a batch -> H_I, H_T (b, width) and H (b, K)."""
        v_image = F.normalize(self.image_encoder(image), dim=1)
        v_text = F.normalize(self.text_encoder(text), dim=1)
        h_image, h_text = self.image_graph(similarity, v_image), self.text_graph(similarity, v_text)
        itself = torch.eye(len(similarity), device=similarity.device)
        joint = torch.cat([torch.cat([similarity, itself], dim=1), torch.cat([itself, similarity], dim=1)])
        halves = self.joint_graph(joint, torch.cat([v_image, v_text])).tensor_split(2)
        h: Tensor = self.code(torch.cat([h_image, h_text, (halves[0] + halves[1]) / 2], dim=1))
        return h_image, h_text, h


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

    neighbours: Tensor
    thresholds: Tensor
    code_buffer: Tensor

    def __init__(self, train: TrainData, n_bits: int, config: CirhConfig) -> None:
        super().__init__(train, n_bits, config)
        self.train_data = train
        shape = (config.hidden,), config.dropout, config.input_dropout
        self.image_head = HashHead.fitted(train.image, n_bits, *shape)
        self.text_head = HashHead.fitted(train.text, n_bits, *shape)
        self.teacher = Teacher(train.image_vectors.shape[1], train.text_vectors.shape[1], config.width, n_bits)
        unit = joint_features(train.image_vectors, train.text_vectors, config.a1)
        self.register_buffer("neighbours", nearest_rows(unit, len(SMOOTHING))[1], persistent=False)
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
        config, border = self.config, self.config.teacher_epochs / self.config.epochs
        if progress < border:
            return {"teacher": one_cycle(progress / border, config.teacher_rate)}
        return {"students": one_cycle((progress - border) / max(1 - border, 1e-9), config.learning_rate)}

    def phases(self, epoch: int) -> Iterable[str]:
        """The teacher first."""
        return ("teacher",) if epoch < self.config.teacher_epochs else ("students",)

    def steps(self, batch: Batch, phase: str) -> Iterator[Step]:
        """One update of the teacher on L1, or of the students on L2."""
        config = self.config
        unit = joint_features(batch.image_vectors, batch.text_vectors, config.a1)
        similarity = similarity_block(unit, self.thresholds[batch.index], config.a2)
        if phase == "students":
            image_code, text_code = torch.tanh(self.image_head(batch.image)), torch.tanh(self.text_head(batch.text))
            code = self.code_buffer[batch.index]
            yield Step("students", student_loss(image_code, text_code, code, similarity, config.dw))
            return
        image, text = self.image_head.scaling(batch.image_vectors), self.text_head.scaling(batch.text_vectors)
        h_image, h_text, h = self.teacher(*self.smoothed(batch), similarity)
        self.code_buffer[batch.index] = signs(h)
        recon = F.mse_loss(self.teacher.image_decoder(h), image) + F.mse_loss(self.teacher.text_decoder(h), text)
        structure = torch.stack([F.mse_loss(cosines(x, x), similarity) for x in (h_image, h_text, h)]).sum()
        terms = {"reconstruction": config.reconstruction * recon, "teacher_structure": structure}
        yield Step("teacher", terms | {"quantization": F.mse_loss(h, signs(h))})

    def smoothed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's scaled features, averaged with their neighbours': (b, d_x), (b, d_y)."""
        rows = self.neighbours[batch.index]  # (b, 3), the item itself first unless it has a twin
        data = self.train_data
        sides = ((self.image_head.scaling, data.image_vectors), (self.text_head.scaling, data.text_vectors))
        image, text = (
            torch.stack(
                [w * scaling(x[rows[:, j]]) for j, w in zip(range(rows.shape[1]), SMOOTHING, strict=False)]
            ).sum(dim=0)
            for scaling, x in sides
        )
        return image, text
