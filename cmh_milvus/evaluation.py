"""From codes, labels and a split to figures that say what they mean.

Relevant: shares at least one label with the query. Graded: the Jaccard overlap of the label sets. Equal distances are
ties, and every figure is its expectation over all orders of the tied items, so no figure depends on file order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cmh_milvus import metrics
from cmh_milvus.codes import from_bytes, hamming_distances, to_bytes
from cmh_milvus.datasets.base import PairedFeatures, Split
from cmh_milvus.errors import DataError
from cmh_milvus.metrics import Difference, DistanceTable, Interval
from cmh_milvus.ranking import distance_table, own_pair_ranks

Direction = Literal["image_to_text", "text_to_image"]
DIRECTIONS: dict[Direction, tuple[str, str]] = {
    "image_to_text": ("image", "text"),
    "text_to_image": ("text", "image"),
}
DIRECTION_LABELS: dict[Direction, str] = {"image_to_text": "I→T", "text_to_image": "T→I"}
TOP_N = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
RULES = {
    "relevant": "shares at least one label with the query",
    "graded": "Jaccard overlap of the label sets",
    "ties": "expected value over all orders of equal distances",
    "no_relevant": "a query without a relevant item counts as 0",
    "cut_off": "MAP over the whole database; NDCG and recall at 10",
}
PackedCodes = NDArray[np.uint8]


@dataclass(frozen=True)
class DirectionResult:
    """One encoder, one direction.

    Attributes:
        estimates: "MAP@all", "NDCG@10", "own R@1", "own R@10" by name, with 95 % bootstrap intervals over queries.
        map_best: MAP@all if every tie fell out in our favour.
        map_worst: MAP@all if every tie fell out against us.
        own_median_rank: Median rank of the query's own partner among all items.
        top_n: N of the topN-precision curve.
        top_n_precision: Precision among the first N.
        radius_precision: Hash lookup precision at radius 0..n_bits.
        radius_recall: Hash lookup recall at radius 0..n_bits.
        radius_empty: Share of queries whose lookup is empty at radius 0..n_bits.
        per_query: The values behind `estimates`, float64 (n_query,); not part of the JSON.
        against_first: By figure, this encoder minus the first of the report (paired bootstrap over queries); empty for
            the first itself.
    """

    estimates: dict[str, Interval]
    map_best: float
    map_worst: float
    own_median_rank: float
    top_n: list[int]
    top_n_precision: list[float]
    radius_precision: list[float]
    radius_recall: list[float]
    radius_empty: list[float]
    per_query: dict[str, NDArray[np.float64]] = field(repr=False)
    against_first: dict[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class EncoderResult:
    """One encoder in all directions.

    Attributes:
        name: Of the method or the encoder.
        n_bits: Code length.
        fingerprint: Of the encoder; "" for codes without one.
        distinct: Share of distinct codes among all pictures.
        seconds: Training time, or None.
        directions: Results by direction.
    """

    name: str
    n_bits: int
    fingerprint: str
    distinct: float
    seconds: float | None
    directions: dict[Direction, DirectionResult]


@dataclass(frozen=True)
class ThroughCollection:
    """The same figures through a collection against brute force.

    Attributes:
        difference: Largest absolute difference of MAP@all over directions.
        missing: Database rows that the collection did not return, summed over queries and directions.
        wrong: (query, distance, grade) counts that differ, summed.
    """

    difference: float
    missing: int
    wrong: int


@dataclass(frozen=True)
class EvaluationReport:
    """Figures with all that is needed to read them."""

    data: dict[str, Any]
    chance: dict[Direction, float]
    results: list[EncoderResult]
    audit: list[str]
    rules: dict[str, str] = field(default_factory=lambda: dict(RULES))
    through_collection: ThroughCollection | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON types."""
        content = dataclasses.asdict(self)
        for result in content["results"]:
            for measured in result["directions"].values():
                del measured["per_query"]
        return content

    def rows(self) -> list[dict[str, Any]]:
        """One flat row an encoder and direction, for tables, CSV and JSON lines."""
        rows: list[dict[str, Any]] = []
        for result in self.results:
            for direction, measured in result.directions.items():
                row: dict[str, Any] = {
                    "encoder": result.name,
                    "n_bits": result.n_bits,
                    "direction": direction,
                }
                for name, estimate in measured.estimates.items():
                    row |= {name: estimate.mean, f"{name} low": estimate.low, f"{name} high": estimate.high}
                    difference = measured.against_first.get(name)
                    row[f"{name} p"] = None if difference is None else difference.p_value
                row |= {
                    "MAP@all best": measured.map_best,
                    "MAP@all worst": measured.map_worst,
                    "own median rank": measured.own_median_rank,
                    "distinct": result.distinct,
                    "n_query": self.data["n_query"],
                    "n_database": self.data["n_database"],
                    "chance": self.chance[direction],
                }
                rows.append(row)
        return rows


class RankedKeys(Protocol):
    """A complete ranking: primary keys (`store.Row.pk`), and their distances in bits, (n,)."""

    @property
    def pks(self) -> list[str]:
        """Keys, nearest first."""

    @property
    def distances(self) -> NDArray[np.uint16]:
        """Distances, ascending."""


class Ranker(Protocol):
    """Anything that ranks all it holds by Hamming distance: `BruteForceRanker`, `HashCollection`."""

    def rank(self, codes: Sequence[bytes], *, modality: str | None = None) -> Iterator[RankedKeys]:
        """A ranking of the items of `modality` for each packed code."""


@dataclass(frozen=True)
class _Ranked:
    pks: list[str]
    distances: NDArray[np.uint16]


@dataclass(frozen=True)
class BruteForceRanker:
    """The oracle: ranks codes in memory by (distance, key).

    Attributes:
        ids: n item ids.
        codes: "image" and "text" packed codes, uint8 (n, n_bits // 8).
    """

    ids: Sequence[str]
    codes: Mapping[str, PackedCodes]

    def rank(self, codes: Sequence[bytes], *, modality: str | None = None) -> Iterator[_Ranked]:
        """See `Ranker`."""
        from cmh_milvus.store import Row

        modalities = [modality] if modality else sorted(self.codes)
        keys = np.array([Row(item, name, b"").pk for name in modalities for item in self.ids])
        database = np.concatenate([self.codes[name] for name in modalities])
        for code in codes:
            distances = hamming_distances(from_bytes([code]), database)[0]
            order = np.lexsort((keys, distances))
            yield _Ranked(keys[order].tolist(), distances[order])


def evaluate_codes(
    name: str,
    codes: Mapping[str, PackedCodes],
    data: PairedFeatures,
    *,
    fingerprint: str = "",
    seconds: float | None = None,
    seed: int = 0,
) -> EncoderResult:
    """Rank the database split by the query split in both directions.

    Args:
        name: How the encoder is called in the report.
        codes: "image" and "text" packed codes of all items, uint8 (n, n_bits // 8).
        data: The items' labels and split.
        fingerprint: Of the encoder.
        seconds: Training time.
        seed: Of the bootstrap.

    Raises:
        DataError: No labels, or an empty query or database split.
    """
    split, labels = data.split, require_labels(data)
    everything = np.concatenate([split.query, split.database])  # each query's own partner is ranked with the database
    directions: dict[Direction, DirectionResult] = {}
    for direction, (one, other) in DIRECTIONS.items():
        query_codes = codes[one][split.query]
        table = _table(query_codes, codes[other][split.database], labels, split)
        closer, tied = own_pair_ranks(query_codes, codes[other][everything], np.arange(len(split.query)))
        per_query = {
            "MAP@all": metrics.average_precision(table),
            "NDCG@10": metrics.ndcg_at_k(table, 10),
            "own R@1": metrics.own_pair_recall_at_k(closer, tied, 1),
            "own R@10": metrics.own_pair_recall_at_k(closer, tied, 10),
        }
        top_n = [n for n in TOP_N if n <= len(split.database)]
        lookup = metrics.precision_recall_by_radius(table)
        directions[direction] = DirectionResult(
            estimates={key: metrics.bootstrap_interval(values, seed) for key, values in per_query.items()},
            map_best=metrics.mean_average_precision(table, ties="best"),
            map_worst=metrics.mean_average_precision(table, ties="worst"),
            own_median_rank=float(np.median(metrics.own_pair_rank(closer, tied))),
            top_n=top_n,
            top_n_precision=_curve(metrics.topn_precision(table, top_n)),
            radius_precision=_curve(lookup.precision),
            radius_recall=_curve(lookup.recall),
            radius_empty=lookup.empty.mean(axis=0).tolist(),
            per_query=per_query,
        )
    n_bits = codes["image"].shape[1] * 8
    return EncoderResult(name, n_bits, fingerprint, metrics.distinct_share(codes["image"]), seconds, directions)


def against(first: EncoderResult, other: EncoderResult, seed: int = 0) -> EncoderResult:
    """`other` with its differences to `first`, measured on the same queries.

    Args:
        first: The encoder to compare with.
        other: Another one.
        seed: Of the paired bootstrap.
    """
    directions: dict[Direction, DirectionResult] = {}
    for direction, measured in other.directions.items():
        theirs = first.directions[direction].per_query
        differences = {
            name: metrics.paired_bootstrap(values, theirs[name], seed) for name, values in measured.per_query.items()
        }
        directions[direction] = dataclasses.replace(measured, against_first=differences)
    return dataclasses.replace(other, directions=directions)


def chance_level(data: PairedFeatures) -> dict[Direction, float]:
    """MAP@all of a random ranking, to first order: the mean share of relevant items, by direction."""
    split, labels = data.split, require_labels(data)
    counts = labels[split.query].astype(np.float32) @ labels[split.database].T.astype(np.float32)  # (m, n)
    share = float((counts > 0).mean())
    return dict.fromkeys(DIRECTIONS, share)


def audit_split(data: PairedFeatures, texts: Sequence[str] | None = None) -> list[str]:
    """What a reader must know of the split before believing a figure: one sentence a finding.

    Args:
        data: Features and split.
        texts: The items' texts, to find identical ones across the split.
    """
    split = data.split
    findings = []
    shared = np.intersect1d(split.query, split.database)
    if len(shared):
        findings.append(f"WARNING: {len(shared)} query rows are in the database")
    trained = np.intersect1d(split.query, np.concatenate([split.train, split.validation]))
    if len(trained):
        findings.append(f"WARNING: {len(trained)} query rows were trained or validated on")
    for modality, features in (("picture", data.image), ("text", data.text)):
        known = {row.tobytes() for row in features[split.database]}
        twins = sum(row.tobytes() in known for row in features[split.query])
        if twins:
            findings.append(f"{twins} of {len(split.query)} queries have the {modality} features of a database item")
    if texts is not None:
        known_texts = {texts[row].strip().casefold() for row in split.database}
        twins = sum(texts[row].strip().casefold() in known_texts for row in split.query)
        if twins:
            findings.append(f"{twins} of {len(split.query)} queries have the text of a database item")
    inside = len(np.intersect1d(split.database, np.concatenate([split.train, split.validation])))
    findings.append(
        f"{inside} of {len(split.database)} database rows were trained or validated on, as is the custom of the field; "
        "no query row was seen in training or selection"
        if not len(trained)
        else f"{inside} database rows were trained on"
    )
    return findings


def evaluate_through(ranker: Ranker, codes: Mapping[str, PackedCodes], data: PairedFeatures) -> ThroughCollection:
    """Compare rankings through a collection with brute force.

    Args:
        ranker: Holds the database items; what else it holds is passed over.
        codes: "image" and "text" packed codes of all items.
        data: Ids, labels and split.
    """
    from cmh_milvus.store import Row  # pymilvus takes a second to import, and most evaluations need none

    split, labels = data.split, require_labels(data)
    database_labels = labels[split.database].astype(np.float32)
    difference, missing, wrong = 0.0, 0, 0
    for one, other in DIRECTIONS.values():
        query_codes = codes[one][split.query]
        exact = distance_table(
            query_codes, codes[other][split.database], labels[split.query], labels[split.database], grading="binary"
        )
        position = {Row(data.ids[row], other, b"").pk: i for i, row in enumerate(split.database)}
        counts = np.zeros(exact.counts.shape, dtype=np.uint32)
        unranked = np.zeros((len(query_codes), 2), dtype=np.uint32)
        for i, ranking in enumerate(ranker.rank(to_bytes(query_codes), modality=other)):
            relevant = (database_labels @ labels[split.query[i]].astype(np.float32) > 0).astype(int)  # (n_database,)
            places = np.array([position.get(pk, -1) for pk in ranking.pks], dtype=np.int64)
            found = places >= 0
            np.add.at(counts[i], (ranking.distances[found], relevant[places[found]]), 1)
            unranked[i] = np.bincount(np.delete(relevant, places[found]), minlength=2)
        served = DistanceTable(counts, exact.gains, unranked)
        gap = metrics.mean_average_precision(served) - metrics.mean_average_precision(exact)
        difference = max(difference, abs(gap))
        missing += int(unranked.sum())
        wrong += int((counts != exact.counts).sum())
    return ThroughCollection(difference, missing, wrong)


def require_labels(data: PairedFeatures) -> NDArray[np.bool_]:
    """The labels of data that can be evaluated.

    Raises:
        DataError: No labels, or an empty query or database split.
    """
    if data.labels is None:
        raise DataError(f"{data.name} has no labels, and relevance is defined by them: name the label column")
    if len(data.split.query) == 0 or len(data.split.database) == 0:
        raise DataError(
            f"{data.name} has {len(data.split.query)} query and {len(data.split.database)} database rows: "
            "an evaluation needs both"
        )
    return data.labels


def _table(query: PackedCodes, database: PackedCodes, labels: NDArray[np.bool_], split: Split) -> DistanceTable:
    return distance_table(query, database, labels[split.query], labels[split.database], grading="jaccard")


def _curve(per_query: NDArray[np.float64]) -> list[float]:
    """Mean over queries of a curve (n_query, n_points), as the rule for queries without a relevant item says."""
    mean: list[float] = metrics.mean_over_queries(per_query).tolist()
    return mean
