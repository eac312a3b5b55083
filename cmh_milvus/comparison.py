"""Several encoders side by side on one data set, with baselines trained at equal bits on the same features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmh_milvus.codes import binarize, pack
from cmh_milvus.datasets.base import PairedFeatures
from cmh_milvus.encoders.encoder import CrossModalHashEncoder
from cmh_milvus.encoders.hash_head import relaxed_codes
from cmh_milvus.evaluation import (
    EncoderResult,
    EvaluationReport,
    Ranker,
    against,
    audit_split,
    chance_level,
    evaluate_codes,
    evaluate_floats,
    evaluate_through,
)
from cmh_milvus.training import Trained, TrainingSettings, train

BASELINES = ("cca_itq", "random_projection")
TITLES = {"cca_itq": "CCA-ITQ", "random_projection": "random projection", "dcmh": "DCMH", "duet": "DUET"}

Codes = Mapping[str, NDArray[np.uint8]]
Relaxed = Mapping[str, NDArray[np.float32]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Candidate:
    """What is compared.

    Attributes:
        name: In the report.
        codes: "image" and "text" packed codes of all items, uint8 (n, n_bits // 8).
        fingerprint: Of the encoder, or "".
        seconds: Training time, or None.
        relaxed: Relaxed codes by modality, float32 (n, n_bits), for the ceiling that binarisation takes away from.
    """

    name: str
    codes: Codes
    fingerprint: str = ""
    seconds: float | None = None
    relaxed: Relaxed | None = None


def encode_pairs(encoder: CrossModalHashEncoder, data: PairedFeatures) -> Relaxed:
    """Relaxed codes of all items by modality."""
    return {"image": encoder.encode_features("image", data.image), "text": encoder.encode_features("text", data.text)}


def packed(relaxed: Relaxed) -> Codes:
    """Packed codes by modality."""
    return {modality: pack(binarize(h)) for modality, h in relaxed.items()}


def codes_of(trained: Trained, data: PairedFeatures) -> Codes:
    """Packed codes of all items by modality, of heads that were just trained."""
    return packed(_relaxed_of(trained, data))


def _relaxed_of(trained: Trained, data: PairedFeatures) -> Relaxed:
    return {
        "image": relaxed_codes(trained.image_head, data.image),
        "text": relaxed_codes(trained.text_head, data.text),
    }


def train_candidate(
    data: PairedFeatures, method: str, n_bits: int, *, device: str = "auto", progress: Progress | None = None
) -> Candidate:
    """Train a method with its default settings and encode all items."""
    trained = train(data, TrainingSettings(method=method, n_bits=n_bits, device=device), progress=progress)
    relaxed = _relaxed_of(trained, data)
    return Candidate(TITLES.get(method, method), packed(relaxed), seconds=trained.record["seconds"], relaxed=relaxed)


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
        candidates: The first is the one that `through` serves; its relaxed codes are measured too, as the ceiling.
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
    ceiling = candidates[0].relaxed
    if ceiling is not None:
        results.append(evaluate_floats(f"{candidates[0].name}, not binarised", ceiling, data, seed=seed))
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
