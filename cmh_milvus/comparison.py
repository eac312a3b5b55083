"""Several encoders side by side on one data set, with baselines trained at equal bits on the same features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmh_milvus.codes import binarize, pack
from cmh_milvus.datasets.base import PairedFeatures
from cmh_milvus.encoders.encoder import CrossModalHashEncoder
from cmh_milvus.evaluation import (
    EncoderResult,
    EvaluationReport,
    Ranker,
    against,
    audit_split,
    chance_level,
    evaluate_codes,
    evaluate_through,
)
from cmh_milvus.training import Trained, TrainingSettings, relaxed_codes, train

BASELINES = ("cca_itq", "random_projection")
TITLES = {"cca_itq": "CCA-ITQ", "random_projection": "random projection", "dcmh": "DCMH", "duet": "DUET"}

Codes = Mapping[str, NDArray[np.uint8]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Candidate:
    """What is compared.

    Attributes:
        name: In the report.
        codes: "image" and "text" packed codes of all items, uint8 (n, n_bits // 8).
        fingerprint: Of the encoder, or "".
        seconds: Training time, or None.
    """

    name: str
    codes: Codes
    fingerprint: str = ""
    seconds: float | None = None


def encode_pairs(encoder: CrossModalHashEncoder, data: PairedFeatures) -> Codes:
    """Packed codes of all items by modality."""
    return {"image": encoder.packed_codes("image", data.image), "text": encoder.packed_codes("text", data.text)}


def codes_of(trained: Trained, data: PairedFeatures) -> Codes:
    """Packed codes of all items by modality, of heads that were just trained."""
    return {
        "image": pack(binarize(relaxed_codes(trained.image_head, data.image))),
        "text": pack(binarize(relaxed_codes(trained.text_head, data.text))),
    }


def train_candidate(
    data: PairedFeatures, method: str, n_bits: int, *, seed: int = 0, progress: Progress | None = None
) -> Candidate:
    """Train a method with its default settings and encode all items."""
    trained = train(data, TrainingSettings(method=method, n_bits=n_bits, seed=seed), progress=progress)
    return Candidate(TITLES.get(method, method), codes_of(trained, data), seconds=trained.record["seconds"])


def compare(
    data: PairedFeatures,
    candidates: Sequence[Candidate],
    *,
    texts: Sequence[str] | None = None,
    through: Ranker | None = None,
    seed: int = 0,
) -> EvaluationReport:
    """Measure candidates on the query split.

    Args:
        data: Labels and split.
        candidates: The first is the one that `through` serves.
        texts: The items' texts, for the audit of the split.
        through: A collection that holds the first candidate's codes of the database.
        seed: Of the bootstrap.

    Raises:
        DataError: No labels, or an empty query or database split.
    """
    results: list[EncoderResult] = [
        evaluate_codes(one.name, one.codes, data, fingerprint=one.fingerprint, seconds=one.seconds, seed=seed)
        for one in candidates
    ]
    split = data.split
    assert data.labels is not None, "evaluate_codes has checked it"
    return EvaluationReport(
        data={
            "name": data.name,
            "fingerprint": data.fingerprint,
            "split_fingerprint": split.fingerprint(),
            "n_query": len(split.query),
            "n_database": len(split.database),
            "n_train": len(np.intersect1d(np.concatenate([split.train, split.validation]), split.database)),
            "n_labels": data.labels.shape[1],
        },
        chance=chance_level(data),
        results=[results[0], *(against(results[0], other, seed) for other in results[1:])],
        audit=audit_split(data, texts),
        through_collection=None if through is None else evaluate_through(through, candidates[0].codes, data),
    )
