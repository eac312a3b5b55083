"""Training backbones along with the heads on them ("full" training).

A method sees features, never pixels or word pieces. Of a batch's items it is given fresh features as leaves of the
graph; all updates that the batch causes leave their gradients there; then the backbones compute the items again, a few
at a time, and take these gradients further (gradient caching: Gao et al. 2021, arXiv 2101.06983). So any method works,
however many updates it makes a batch, and memory does not grow with the batch.

A backbone learns from the updates that move the head on it, and from no other (a discriminator's, a generator's). What
a method builds graphs or targets of (`Batch.image_vectors`, `text_vectors`) stays as the backbones gave it before
training, as in the papers, whose similarities come from fixed networks: targets that learn along would collapse.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from cmh_milvus.encoders.backbones import Backbone, Modality, NetworkBackbone
from cmh_milvus.encoders.tokens import item_vectors
from cmh_milvus.errors import SettingsError
from cmh_milvus.methods.base import Batch, Method, TrainData, one_cycle
from cmh_milvus.pictures import open_picture

OPTIMIZER = "backbones"
PREFIX = "fine_tuned_backbone."  # of their weights among those of a method
RATE = 1e-5  # what the papers that fine-tune CLIP take
WARM_UP = 0.1  # of the training; likewise
WEIGHT_DECAY = 0.01
MAX_GRADIENT = 1.0  # its norm


def check_tunable(method: type[Method]) -> None:
    """Backbones must be able to learn by a method.

    Raises:
        SettingsError: It has a closed form.
    """
    if method.closed_form:
        raise SettingsError(f"method {method.name} has a closed form, so no backbone learns by it: choose another")


@dataclass
class _Read:
    """Items whose fresh features a method has read."""

    inputs: list[Mapping[str, Tensor]]  # for the backbone, a few items each
    features: Tensor  # (b, ...), a leaf
    gradient: Tensor | None = None  # of the updates so far


class FineTuning:
    """Backbones that learn, and the items that they see.

    Backbones without a network, such as a bag of words, stay as they are.

    Args:
        image: Backbone of the pictures.
        text: Backbone of the texts.
        pictures: The files of all n items, train or not, in the order of the features.
        texts: Their texts.
        rate: Peak learning rate: one cycle of AdamW with a gradient of norm 1 at most.

    Raises:
        SettingsError: Neither backbone has a network, or the rate is not above 0.
    """

    def __init__(
        self, image: Backbone, text: Backbone, pictures: Sequence[Path], texts: Sequence[str], rate: float = RATE
    ) -> None:
        if not rate > 0:
            raise SettingsError(f"backbones learn at a rate above 0, got {rate}")
        both: Mapping[Modality, Backbone] = {"image": image, "text": text}
        self.original = {name: one for name, one in both.items() if isinstance(one, NetworkBackbone)}
        if not self.original:
            raise SettingsError(f"neither {image.name} nor {text.name} is a network: there is nothing to fine-tune")
        self.rate = rate
        self._pictures, self._texts = pictures, texts
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self.learning: dict[Modality, NetworkBackbone] = {}
        self._read: list[tuple[Modality, _Read]] = []

    def start(self) -> AdamW:
        """Begin a training: the weights are the original ones again."""
        self._read.clear()
        self.learning.clear()  # before the new copies are made
        self.learning |= {name: one.trainable() for name, one in self.original.items()}
        return AdamW(self._nets().parameters(), lr=self.rate, weight_decay=WEIGHT_DECAY, fused=True)

    def learning_rate(self, progress: float) -> float:
        """At `progress` in [0, 1] of the training."""
        return one_cycle(progress, self.rate, WARM_UP)

    def train_data(self, kept: TrainData, rows: NDArray[np.int64]) -> TrainData:
        """Train rows whose batches are fresh.

        Args:
            kept: The n train rows, with the features that the backbones gave before training.
            rows: int64 (n,), which of all items they are.
        """
        return _FreshData(kept, lambda modality, index: self._fresh(modality, rows[index.cpu().numpy()]))

    def _fresh(self, modality: Modality, rows: NDArray[np.int64]) -> Tensor | None:
        if modality not in self.learning:
            return None
        inputs = list(self._inputs(modality, rows))
        with torch.no_grad():
            features = torch.cat([self.learning[modality].features(one) for one in inputs])
        self._read.append((modality, _Read(inputs, features.requires_grad_())))
        return features

    def after_step(self, moved: Collection[Modality]) -> None:
        """Keep what an update has left at the items' features, where it moved the head on that backbone."""
        for modality, read in self._read:
            gradient, read.features.grad = read.features.grad, None
            if gradient is not None and modality in moved:
                read.gradient = gradient if read.gradient is None else read.gradient + gradient

    def after_batch(self, optimizer: Optimizer) -> None:
        """Take the kept gradients into the backbones, and update them."""
        read, self._read = self._read, []
        optimizer.zero_grad()
        for modality, one in read:
            if one.gradient is None:
                continue
            sizes = [len(next(iter(inputs.values()))) for inputs in one.inputs]
            for inputs, gradient in zip(one.inputs, torch.split(one.gradient, sizes), strict=True):
                self.learning[modality].features(inputs).backward(gradient)  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._nets().parameters(), MAX_GRADIENT)
        optimizer.step()

    def encode(self, modality: Modality, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Features of items as the weights are now; None of a backbone that does not learn."""
        if modality not in self.learning:
            return None
        with torch.inference_mode():
            blocks = [self.learning[modality].features(one).cpu().numpy() for one in self._inputs(modality, rows)]
        return np.concatenate(blocks)

    def _inputs(self, modality: Modality, rows: NDArray[np.int64]) -> Iterator[Mapping[str, Tensor]]:
        backbone = self.learning[modality]
        for some in np.split(rows, range(backbone.batch, len(rows), backbone.batch)):
            if modality == "text":
                yield backbone.inputs([self._texts[row] for row in some])
                continue
            one_by_one = list(self._threads.map(lambda row: backbone.inputs([open_picture(self._pictures[row])]), some))
            yield {key: torch.cat([inputs[key] for inputs in one_by_one]) for key in one_by_one[0]}

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of all backbones that learn; their names begin with `PREFIX`."""
        return self._nets().state_dict(prefix=PREFIX)

    def load_state_dict(self, weights: Mapping[str, Tensor]) -> None:
        """Take weights that `state_dict` gave; others among them are passed over."""
        self._nets().load_state_dict({k.removeprefix(PREFIX): v for k, v in weights.items() if k.startswith(PREFIX)})

    def tuned(self) -> Mapping[Modality, NetworkBackbone]:
        """The backbones that have learned, under their new name and revision."""
        for one in self.learning.values():
            one.mark_tuned()
            one.net.requires_grad_(False)
        return self.learning

    def _nets(self) -> nn.ModuleDict:
        return nn.ModuleDict({name: one.net for name, one in self.learning.items()})


Fresh = Callable[[Modality, Tensor], Tensor | None]


class _FreshData(TrainData):
    """Train rows as they were; the batches cut from them are fresh."""

    fresh: Fresh

    def __init__(self, kept: TrainData, fresh: Fresh) -> None:
        super().__init__(kept.image, kept.text, kept.label_matrix)
        vars(self)["fresh"] = fresh  # frozen

    def rows(self, index: Tensor) -> Batch:
        return _FreshBatch(super().rows(index), self.fresh)


class _FreshBatch(Batch):
    """A batch whose `image` and `text` are computed when they are first read."""

    kept: Batch
    fresh: Fresh

    def __init__(self, kept: Batch, fresh: Fresh) -> None:
        vars(self).update(kept=kept, fresh=fresh, label_matrix=kept.label_matrix, index=kept.index)  # frozen

    def __len__(self) -> int:
        return len(self.index)

    @cached_property
    def image(self) -> Tensor:
        features = self.fresh("image", self.index)
        return self.kept.image if features is None else features

    @cached_property
    def text(self) -> Tensor:
        features = self.fresh("text", self.index)
        return self.kept.text if features is None else features

    @property
    def image_vectors(self) -> Tensor:
        return item_vectors(self.kept.image)

    @property
    def text_vectors(self) -> Tensor:
        return item_vectors(self.kept.text)
