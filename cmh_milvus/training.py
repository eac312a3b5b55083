"""One trainer for every method: seeds, device, validation, early stopping, checkpoints, resume.

The codes of the validation rows choose the epoch, and the settings that a method leaves open: each of these, or the one
that is given, is tried in a third of the epochs, and the chosen one trained in full. The query rows are never looked
at. The validation database is partly untrained (half of the validation rows join it), because a database that was all
trained on rewards memorising.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import platform
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cmh_milvus import metrics
from cmh_milvus.codes import binarize, check_n_bits, pack
from cmh_milvus.datasets.base import PairedFeatures
from cmh_milvus.device import resolve_device
from cmh_milvus.encoders.backbones import Modality, NetworkBackbone
from cmh_milvus.encoders.hash_head import HashHead, relaxed_codes
from cmh_milvus.encoders.tokens import item_vectors
from cmh_milvus.errors import ArtefactError, DataError, SettingsError
from cmh_milvus.fine_tuning import OPTIMIZER, PREFIX, FineTuning, check_tunable
from cmh_milvus.methods import DEFAULT_METHODS, get_method, make_config
from cmh_milvus.methods.base import Method, TrainData
from cmh_milvus.ranking import distance_table, own_pair_ranks

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 6
CHECKPOINT_SECONDS = 15.0  # between two checkpoints, beside those at the looks at the validation rows
MIN_VALIDATION = 4  # fewer validation rows choose nothing
SCORE_NOISE = 0.01  # scores of epochs this close are equal, with a few hundred validation rows; the later epoch wins
TRIAL_SHARE = 1 / 3  # of the epochs; each of several settings is tried that long
COLLAPSED_SHARE = 0.5  # fewer distinct codes than this share of distinct feature rows are reported
COLLAPSE_ROWS = 2_000  # of the rows learned from, at most, whose codes are looked at for that

Progress = Callable[[int, int, str], None]
"""Called after each epoch with (epochs done, epochs in all, a line on the state)."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train, beside what the method's own config says.

    Attributes:
        method: One of `cmh_milvus.methods.list_methods()`; by default the one of `DEFAULT_METHODS` that suits the data,
            which have labels or not.
        n_bits: Code length, a multiple of 8.
        method_settings: Values of the method's config that differ from its defaults.
        seed: Of everything random.
        device: "auto", "cpu", "cuda", ...
        validate_every: Epochs between two looks at the validation rows.
        patience: Looks without gain after which training stops; 0 never stops early.
        refit: After the epoch is chosen, train afresh on train and validation rows together up to there.
    """

    method: str | None = None
    n_bits: int = 64
    method_settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    device: str = "auto"
    validate_every: int = 10
    patience: int = 0
    refit: bool = True

    def __post_init__(self) -> None:
        for name in ("n_bits", "seed", "validate_every", "patience"):
            if not isinstance(value := getattr(self, name), int):
                raise SettingsError(f"{name} is an int, got {value!r}: give a plain Python int")
        check_n_bits(self.n_bits)
        if self.validate_every < 1 or self.patience < 0:
            raise SettingsError("validate_every is at least 1 and patience at least 0")
        if not 0 <= self.seed < 2**63:
            raise SettingsError(f"a seed is an integer from 0 to 2^63 - 1, got {self.seed}")


@dataclass(frozen=True)
class Trained:
    """What training leaves.

    Attributes:
        image_head: On the CPU, in eval mode.
        text_head: Likewise.
        record: How they came about, `training.json` of the encoder folder.
        backbones: Those that were fine-tuned.
    """

    image_head: HashHead
    text_head: HashHead
    record: dict[str, Any]
    backbones: Mapping[Modality, NetworkBackbone] = field(default_factory=dict)


def train(
    data: PairedFeatures,
    settings: TrainingSettings,
    *,
    tuning: FineTuning | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a method's hash heads on backbone features, and the backbones too where `tuning` is given.

    Args:
        data: Features, labels and split. Without validation rows the last epoch is kept.
        settings: Method, code length, seed, device, early stopping.
        tuning: The backbones that gave the features, and the items of all rows of `data`.
        checkpoint: File that keeps the state of the run; a run that finds one of its own goes on from it. It stays, so
            that nothing is lost before the heads are saved: remove it after that.
        progress: Called after each epoch.

    Returns:
        The heads, the training record, and the fine-tuned backbones.

    Raises:
        SettingsError: Unknown method, unknown or impossible setting or code length, weights that grew beyond all
            bounds, a checkpoint of another run, or backbones to tune for a method that has a closed form.
        DataError: Too few train rows, no labels where the method needs them, or features that are not float32, not
            finite, or the same in all rows.
        ArtefactError: The checkpoint cannot be written.
    """
    method_class = get_method(settings.method or DEFAULT_METHODS[data.labels is not None])
    config = make_config(method_class, settings.method_settings)
    _check(data, method_class)
    if tuning is not None:
        check_tunable(method_class)
    run = _Run(data, settings, method_class, config, tuning, checkpoint, progress)
    heads = run.fit_closed_form() if method_class.closed_form else run.fit_epochs()
    distinct = run.distinct(*heads)
    for modality, share in distinct.items():
        if share < COLLAPSED_SHARE:
            logger.warning(
                "the codes have collapsed: there are %.2g distinct codes for 100 different %s",
                100 * share,
                {"image": "pictures", "text": "texts"}[modality],
            )
    for head in heads:
        head.to("cpu").eval()
    return Trained(*heads, run.record() | {"distinct": distinct}, {} if tuning is None else tuning.tuned())


def _check(data: PairedFeatures, method_class: type[Method]) -> None:
    if len(data.split.train) < 2:
        raise DataError(f"{data.name} has {len(data.split.train)} train rows: at least 2 are needed")
    if method_class.supervision == "labels" and data.labels is None and not method_class.labels_optional:
        raise DataError(f"method {method_class.name} learns from labels, and {data.name} has none: choose another one")
    for modality, features in (("image", data.image), ("text", data.text)):
        if features.dtype != np.float32:
            raise DataError(f"the {modality} features of {data.name} are {features.dtype}: give float32")
        if not np.isfinite(features).all():
            raise DataError(f"the {modality} features of {data.name} hold NaN or infinity: clean them first")
        first = features[data.split.train[0]]
        if all(np.array_equal(features[row], first) for row in data.split.train):  # ends at the first that differs
            raise DataError(f"the {modality} features of {data.name} are alike in all train rows: nothing to learn")


class _Run:
    """One training run; the loop that `methods.base` describes."""

    def __init__(
        self,
        data: PairedFeatures,
        settings: TrainingSettings,
        method_class: type[Method],
        config: Any,
        tuning: FineTuning | None,
        checkpoint: Path | None,
        progress: Progress | None,
    ) -> None:
        self.tuning = tuning
        self.data, self.settings, self.method_class, self.config = data, settings, method_class, config
        self.checkpoint, self.progress = checkpoint, progress
        self.device = resolve_device(settings.device)
        self.epochs = method_class.epochs(config, len(data.split.train))
        self.ended: list[_Selected] = []
        self.tried: list[dict[str, Any]] = []
        self.chosen_epoch = 0
        self.history: list[dict[str, float]] = []
        self.identity = self._identity()
        self.left = self._checkpoint()  # by an interrupted run, until it is resumed
        self.started = time.monotonic()
        self.seconds_before = 0.0 if self.left is None else self.left["seconds"]

    def _identity(self) -> str:
        what = {
            "settings": dataclasses.asdict(self.settings) | {"device": ""},
            "config": dataclasses.asdict(self.config),
            "data": self.data.fingerprint,
            "split": self.data.split.fingerprint(),
            "backbone_rate": self.tuning and self.tuning.rate,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()

    def _train_data(self, rows: NDArray[np.int64]) -> TrainData:
        labels = None
        if self._has_labels:
            assert self.data.labels is not None
            labels = torch.from_numpy(self.data.labels[rows].astype(np.float32)).to(self.device)
        image, text = self.data.image, self.data.text
        if self.method_class.closed_form:
            image, text = item_vectors(image), item_vectors(text)
        return TrainData(
            torch.from_numpy(image[rows]).to(self.device), torch.from_numpy(text[rows]).to(self.device), labels
        )

    def _make(self, rows: NDArray[np.int64], epochs: int) -> tuple[Method, TrainData]:
        """The method as it is before it learns from `rows` for `epochs`."""
        torch.manual_seed(self.settings.seed)
        train_data = self._train_data(rows)
        if self.tuning is not None:
            train_data = self.tuning.train_data(train_data, rows)
        config = dataclasses.replace(self.config, epochs=epochs)
        return self.method_class(train_data, self.settings.n_bits, config).to(self.device), train_data

    def _alternatives(self) -> list[Any]:
        """The configs among which the validation rows choose: one for each value of what is left open, or just one."""
        left_open = self._left_open()
        return [
            dataclasses.replace(self.config, **dict(zip(left_open, values, strict=True)))
            for values in itertools.product(*left_open.values())
        ]

    def _left_open(self) -> dict[str, Sequence[Any]]:
        """Settings that the method leaves to the validation rows, and the user too."""
        if len(self.data.split.validation) < MIN_VALIDATION:
            return {}
        given = self.settings.method_settings
        return {name: v for name, v in self.method_class.left_open(self._has_labels).items() if name not in given}

    @property
    def _has_labels(self) -> bool:
        """The method sees labels."""
        return self.method_class.supervision == "labels" and self.data.labels is not None

    def fit_closed_form(self) -> tuple[HashHead, HashHead]:
        rows = np.sort(np.concatenate([self.data.split.train, self.data.split.validation]))
        with torch.random.fork_rng():
            method, train_data = self._make(rows, self.epochs)
            method.fit(train_data, torch.Generator().manual_seed(self.settings.seed))
        return method.image_head, method.text_head

    def fit_epochs(self) -> tuple[HashHead, HashHead]:
        split, alternatives = self.data.split, self._alternatives()
        refit = self.settings.refit and len(split.validation) > 0
        # a value that is given for what the method leaves open is tried like one that is chosen
        short = len(alternatives) > 1 or (refit and bool(self.method_class.left_open(self._has_labels)))
        epochs = max(1, round(TRIAL_SHARE * self.epochs)) if short else self.epochs
        with torch.random.fork_rng():
            chosen = self._best_of(alternatives, epochs)
            if short and not refit:
                chosen = self._select(len(alternatives), "select", self.epochs)
            self.chosen_epoch, self.history = chosen.epoch, chosen.history
            if refit:
                self.chosen_epoch = round(chosen.epoch * self.epochs / epochs)
                rows = np.sort(np.concatenate([split.train, split.validation]))
                method, _ = self._epochs(len(alternatives), "refit", rows, self.chosen_epoch, validate=False)
            else:
                method, _ = self._make(split.train, self.epochs)
                if self.tuning is not None:
                    self.tuning.start()
                self._load_weights(method, chosen.weights)
        return method.image_head, method.text_head

    def _best_of(self, alternatives: Sequence[Any], epochs: int) -> _Selected:
        """Train with each config for `epochs`; take the one that is best on the validation rows, or the only one."""
        if self.left is not None:
            self.ended = [_Selected(**selected) for selected in self.left["ended"]]
        for stage, self.config in enumerate(alternatives):
            if stage >= len(self.ended):  # else a checkpoint has it
                note = "select" if len(alternatives) == 1 else f"try {stage + 1}/{len(alternatives)}"
                self.ended.append(self._select(stage, note, epochs))
        best = max(range(len(self.ended)), key=lambda stage: self.ended[stage].score)
        self.config = alternatives[best]
        self.tried = [
            {name: getattr(config, name) for name in self._left_open()} | {"score": one.score}
            for config, one in zip(alternatives, self.ended, strict=True)
        ]
        return self.ended[best]

    def _select(self, stage: int, note: str, epochs: int) -> _Selected:
        """Train on the train rows; the epoch that is best on the validation rows."""
        split = self.data.split
        method, state = self._epochs(stage, note, split.train, epochs, validate=len(split.validation) >= MIN_VALIDATION)
        return _Selected(state.best_score, state.best_epoch or state.epoch, self._copied(method), state.history)

    def _weights(self, method: Method) -> dict[str, torch.Tensor]:
        """Of the method, and of the backbones that learn."""
        return method.state_dict() | ({} if self.tuning is None else self.tuning.state_dict())

    def _copied(self, method: Method) -> dict[str, torch.Tensor]:
        return {key: value.detach().cpu().clone() for key, value in self._weights(method).items()}

    def _load_weights(self, method: Method, weights: Mapping[str, torch.Tensor]) -> None:
        if self.tuning is not None:
            self.tuning.load_state_dict(weights)
        method.load_state_dict({key: value for key, value in weights.items() if not key.startswith(PREFIX)})

    def _epochs(
        self, stage: int, note: str, rows: NDArray[np.int64], epochs: int, *, validate: bool
    ) -> tuple[Method, _StageState]:
        """Train on `rows` for `epochs` at most; the weights of the best epoch on the validation rows, or the last.

        Best is the last epoch whose score comes within `SCORE_NOISE` of the highest so far.
        """
        method, train_data = self._make(rows, epochs)
        optimizers = dict(method.optimizers())
        if self.tuning is not None:
            optimizers[OPTIMIZER] = self.tuning.start()
        shuffle = torch.Generator().manual_seed(self.settings.seed)
        state = _StageState()
        self._resume(stage, method, optimizers, shuffle, state)
        saved = time.monotonic()
        patience = self.settings.patience or math.inf
        for epoch in range(state.epoch, epochs):
            if state.looks_without_gain >= patience:
                break
            terms = self._epoch(method, train_data, optimizers, shuffle, epoch, epochs)
            if not all(weight.isfinite().all() for weight in self._weights(method).values()):
                raise SettingsError(
                    f"training diverged: after epoch {epoch + 1} weights are infinite or no numbers; give a smaller "
                    "learning rate"
                )
            state.epoch = epoch + 1
            entry: dict[str, float] = {"epoch": epoch + 1, **terms}
            if validate and ((epoch + 1) % self.settings.validate_every == 0 or epoch + 1 == epochs):
                entry |= self._validate(method)
                state.looks_without_gain = 0 if entry["score"] > state.best_score else state.looks_without_gain + 1
                state.best_score = max(state.best_score, entry["score"])
                if entry["score"] > state.best_score - SCORE_NOISE:
                    state.best_epoch = epoch + 1
                    state.best_weights = self._copied(method)
            state.history.append(entry)
            if self.progress is not None:
                shown = ", ".join(f"{key} {value:.3f}" for key, value in entry.items() if key != "epoch")
                self.progress(epoch + 1, epochs, f"{note}: {shown}")
            if (epoch + 1) % self.settings.validate_every == 0 or time.monotonic() - saved > CHECKPOINT_SECONDS:
                self._save(stage, method, optimizers, shuffle, state)
                saved = time.monotonic()
        if state.best_weights is not None:
            self._load_weights(method, state.best_weights)
        return method, state

    def _epoch(
        self,
        method: Method,
        train_data: TrainData,
        optimizers: Mapping[str, torch.optim.Optimizer],
        shuffle: torch.Generator,
        epoch: int,
        epochs: int,
    ) -> dict[str, float]:
        """One pass of every phase; mean loss terms of the epoch."""
        method.train()
        moved = {name: _heads_moved(method, optimizer) for name, optimizer in optimizers.items()}
        n_batches = max(1, min(round(len(train_data) / self.config.batch_size), len(train_data) // 2))
        terms: dict[str, list[torch.Tensor]] = {}
        for phase in method.phases(epoch):
            order = torch.randperm(len(train_data), generator=shuffle).to(self.device)
            for number, index in enumerate(order.tensor_split(n_batches)):
                done = (epoch + number / n_batches) / epochs
                rates = dict(method.learning_rates(done))
                if self.tuning is not None:
                    rates[OPTIMIZER] = self.tuning.learning_rate(done)
                for name, rate in rates.items():
                    for group in optimizers[name].param_groups:
                        group["lr"] = rate
                for step in method.steps(train_data.rows(index), phase):
                    loss = torch.stack(list(step.terms.values())).sum()
                    optimizers[step.optimizer].zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizers[step.optimizer].step()
                    if self.tuning is not None:
                        self.tuning.after_step(moved[step.optimizer])
                    for name, term in step.terms.items():
                        terms.setdefault(name, []).append(term.detach())
                if self.tuning is not None:
                    self.tuning.after_batch(optimizers[OPTIMIZER])
            method.end_phase(phase)
        method.end_epoch(epoch)
        return {name: float(torch.stack(values).mean()) for name, values in terms.items()}

    def _validate(self, method: Method) -> dict[str, float]:
        """Score of the validation rows; half of them query, the other half joins the train rows as database.

        With labels: the mean over both directions of MAP@all, which counts twice, NDCG@10 (label overlap) and own-pair
        recall@10 over all these rows, so that neither the wrong neighbours nor a collapse wins. Without: that recall
        alone.
        """
        split, data = self.data.split, self.data
        half = len(split.validation) // 2
        order = np.random.default_rng(self.settings.seed).permutation(split.validation)
        query, database = order[:half], np.concatenate([order[half:], split.train])
        everything = np.concatenate([query, database])
        codes = {
            "image": self._codes("image", method.image_head, everything),
            "text": self._codes("text", method.text_head, everything),
        }
        result = {"distinct": metrics.distinct_share(codes["image"])}
        scores = []
        for one, other in (("image", "text"), ("text", "image")):
            closer, tied = own_pair_ranks(codes[one][:half], codes[other], np.arange(half))
            scores.append(float(metrics.own_pair_recall_at_k(closer, tied, 10).mean()))
            if self._has_labels:
                assert data.labels is not None
                labels = data.labels
                table = distance_table(
                    codes[one][:half], codes[other][half:], labels[query], labels[database], grading="jaccard"
                )
                scores += 2 * [metrics.mean_average_precision(table)]
                scores.append(metrics.mean_over_queries(metrics.ndcg_at_k(table, 10)))
        return result | {"score": float(np.mean(scores))}

    def distinct(self, image_head: HashHead, text_head: HashHead) -> dict[Modality, float]:
        """Distinct codes of the rows learned from, divided by distinct feature rows; of `COLLAPSE_ROWS` at most."""
        rows = np.random.default_rng(0).permutation(
            np.concatenate([self.data.split.train, self.data.split.validation])
        )[:COLLAPSE_ROWS]

        def share(modality: Modality, head: HashHead) -> float:
            features = (self.data.image if modality == "image" else self.data.text)[rows]
            codes = self._codes(modality, head, rows)
            return len(np.unique(codes, axis=0)) / len({row.tobytes() for row in features})

        return {"image": share("image", image_head), "text": share("text", text_head)}

    def _codes(self, modality: Modality, head: HashHead, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        features = None if self.tuning is None else self.tuning.encode(modality, rows)
        if features is None:
            features = (self.data.image if modality == "image" else self.data.text)[rows]
        return pack(binarize(relaxed_codes(head, features)))

    def _save(
        self,
        stage: int,
        method: Method,
        optimizers: Mapping[str, torch.optim.Optimizer],
        shuffle: torch.Generator,
        state: _StageState,
    ) -> None:
        if self.checkpoint is None:
            return
        content = {
            "format": CHECKPOINT_FORMAT,
            "identity": self.identity,
            "stage": stage,
            "method": self._weights(method),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "shuffle": shuffle.get_state(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "state": dataclasses.asdict(state),
            "ended": [vars(selected) for selected in self.ended],
            "seconds": self._seconds(),
        }
        partial = self.checkpoint.with_name(f"{self.checkpoint.name}.partial")
        try:
            self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, partial)
            partial.replace(self.checkpoint)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's word for a full disk
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise ArtefactError(
                f"the checkpoint {self.checkpoint} cannot be written ({getattr(error, 'strerror', None) or error}): "
                "check the space on the disk, and run again to go on from the last one"
            ) from error

    def _seconds(self) -> float:
        """That the run has taken, interruptions left out."""
        return self.seconds_before + time.monotonic() - self.started

    def _resume(
        self,
        stage: int,
        method: Method,
        optimizers: Mapping[str, torch.optim.Optimizer],
        shuffle: torch.Generator,
        state: _StageState,
    ) -> None:
        """Go on from the checkpoint, if there is one of this stage."""
        content, self.left = self.left, None
        if content is None or content["stage"] != stage:
            return
        self._load_weights(method, content["method"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])
        shuffle.set_state(content["shuffle"].cpu())
        torch.set_rng_state(content["random"].cpu())
        if content["cuda_random"]:
            torch.cuda.set_rng_state_all([value.cpu() for value in content["cuda_random"]])
        for key, value in content["state"].items():
            setattr(state, key, value)

    def _checkpoint(self) -> dict[str, Any] | None:
        """The content of the checkpoint, if there is one.

        Raises:
            SettingsError: It is damaged, or of another run.
        """
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        try:
            with zipfile.ZipFile(self.checkpoint) as parts:
                if (part := parts.testzip()) is not None:
                    raise zipfile.BadZipFile(part)
            content = dict(torch.load(self.checkpoint, map_location=self.device, weights_only=True))
        except Exception as error:  # of a kind that differs from damage to damage
            raise SettingsError(f"{self.checkpoint} is no checkpoint, or a damaged one: remove it") from error
        if content.get("format") != CHECKPOINT_FORMAT or content.get("identity") != self.identity:
            raise SettingsError(
                f"{self.checkpoint} belongs to a run with other data or settings: remove it, "
                "or repeat that run's options"
            )
        return content

    def record(self) -> dict[str, Any]:
        """The training record, ready for JSON."""
        return {
            "method": self.method_class.name,
            "supervision": self.method_class.supervision,
            "citation": dataclasses.asdict(self.method_class.citation),
            "config": dataclasses.asdict(self.config),
            "n_bits": self.settings.n_bits,
            "seed": self.settings.seed,
            "backbone_rate": 0.0 if self.tuning is None else self.tuning.rate,
            "refit_on_validation": bool(self.settings.refit and len(self.data.split.validation)),
            "chosen_epoch": self.chosen_epoch,
            "tried": self.tried,
            "history": self.history,
            "data": {
                "name": self.data.name,
                "fingerprint": self.data.fingerprint,
                "split_fingerprint": self.data.split.fingerprint(),
                "n_train": len(self.data.split.train),
                "n_validation": len(self.data.split.validation),
                "n_labels": 0 if self.data.labels is None else self.data.labels.shape[1],
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
            "device": self.device.type,
            "seconds": round(self._seconds(), 2),
        }


def _heads_moved(method: Method, optimizer: torch.optim.Optimizer) -> set[Modality]:
    """Which of the method's heads an optimizer moves."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    heads: dict[Modality, HashHead] = {"image": method.image_head, "text": method.text_head}
    return {name for name, head in heads.items() if any(id(one) in held for one in head.parameters())}


@dataclass(frozen=True)
class _Selected:
    """What a training on the train rows came to; goes into the checkpoint."""

    score: float
    epoch: int
    weights: dict[str, torch.Tensor]
    history: list[dict[str, float]]


@dataclass
class _StageState:
    """Where a stage stands; all of it goes into the checkpoint."""

    epoch: int = 0
    best_score: float = -1.0
    best_epoch: int = 0
    looks_without_gain: int = 0
    best_weights: dict[str, torch.Tensor] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
