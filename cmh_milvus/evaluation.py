"""From codes, labels and a split to figures that say what they mean.

Relevant: shares at least one label with the query. Graded: the Jaccard overlap of the label sets. Equal distances are
ties, and every figure is its expectation over all orders of the tied items, so no figure depends on file order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cmh_milvus import metrics
from cmh_milvus.codes import binarize, from_bytes, hamming_distances, pack, to_bytes
from cmh_milvus.datasets.base import PairedFeatures, Split
from cmh_milvus.errors import DataError
from cmh_milvus.metrics import Difference, DistanceTable, Interval
from cmh_milvus.ranking import distance_table, own_pair_ranks

Direction = Literal["image_to_text", "text_to_image", "image_to_image", "text_to_text"]
DIRECTIONS: dict[Direction, tuple[str, str]] = {
    "image_to_text": ("image", "text"),
    "text_to_image": ("text", "image"),
    "image_to_image": ("image", "image"),
    "text_to_text": ("text", "text"),
}
CROSS_MODAL: tuple[Direction, ...] = ("image_to_text", "text_to_image")
DIRECTION_LABELS: dict[Direction, str] = {
    "image_to_text": "I→T",
    "text_to_image": "T→I",
    "image_to_image": "I→I",
    "text_to_text": "T→T",
}
NEAR_BITS, NEAR_RADIUS = 256, 8  # near duplicates: random-projection signs of the features within this radius
EQUAL_SCORES = 1e-12  # cosines of float vectors this close, in double precision, differ by rounding alone
TOP_N = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
FIGURES = ("MAP@all", "NDCG@10", "own R@1", "own R@10")
TABLE_COLUMNS = ("encoder", "n_bits", "direction", "MAP@all", "NDCG@10", "own R@10", "distinct")
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
        estimates: "MAP@all", "NDCG@10", and across modalities "own R@1", "own R@10" by name,
            with 95 % bootstrap intervals over queries.
        map_best: MAP@all if every tie fell out in our favour.
        map_worst: MAP@all if every tie fell out against us.
        own_median_rank: Median rank of the query's own partner among all items; None within one modality.
        top_n: N of the topN-precision curve.
        top_n_precision: Precision among the first N.
        radius_precision: Hash lookup precision at radius 0..n_bits; empty for float vectors, as the next two.
        radius_recall: Hash lookup recall at radius 0..n_bits.
        radius_empty: Share of queries whose lookup is empty at radius 0..n_bits.
        per_query: The values behind `estimates`, float64 (n_query,); not part of the JSON.
        against_first: By figure, this encoder minus the first of the report (paired bootstrap over queries); empty for
            the first itself.
    """

    estimates: dict[str, Interval]
    map_best: float
    map_worst: float
    own_median_rank: float | None
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

    What a perfect MAP of 1 loses is split in two: `model_loss` is what the codes lose even if ranked exactly, and
    `index_loss` what is lost on top because the collection does not return every row.

    Attributes:
        difference: Largest absolute difference of MAP@all over directions.
        missing: Database rows that the collection did not return, summed over queries and directions.
        wrong: (query, distance, grade) counts that differ, summed.
        recall_by_distance: For each exact distance 0..n_bits, the share of the database rows there that the collection
            returned at that distance, over all queries and directions; None where no row lies.
        model_loss: 1 - exact MAP@all, by direction.
        index_loss: Exact MAP@all - MAP@all through the collection, by direction.
    """

    difference: float
    missing: int
    wrong: int
    recall_by_distance: list[float | None]
    model_loss: dict[Direction, float]
    index_loss: dict[Direction, float]


@dataclass(frozen=True)
class EvaluationReport:
    """Figures with all that is needed to read them."""

    data: dict[str, Any]
    chance: float
    results: list[EncoderResult]
    audit: list[Finding]
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
        """One flat row an encoder and direction, for tables (`TABLE_COLUMNS`), CSV and JSON lines."""
        rows: list[dict[str, Any]] = []
        for result in self.results:
            for direction, measured in result.directions.items():
                row: dict[str, Any] = {
                    "encoder": result.name,
                    "n_bits": result.n_bits,
                    "direction": direction,
                }
                for name in FIGURES:  # the last two are None within one modality
                    estimate, difference = measured.estimates.get(name), measured.against_first.get(name)
                    row |= {
                        name: None if estimate is None else estimate.mean,
                        f"{name} low": None if estimate is None else estimate.low,
                        f"{name} high": None if estimate is None else estimate.high,
                        f"{name} p": None if difference is None else difference.p_value,
                    }
                row |= {
                    "MAP@all best": measured.map_best,
                    "MAP@all worst": measured.map_worst,
                    "own median rank": measured.own_median_rank,
                    "distinct": result.distinct,
                    "n_query": self.data["n_query"],
                    "n_database": self.data["n_database"],
                    "chance": self.chance,
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
    """Rank the database split by the query split in all four directions.

    Args:
        name: How the encoder is called in the report.
        codes: "image" and "text" packed codes of all items, uint8 (n, n_bits // 8).
        data: The items' labels and split.
        fingerprint: Of the encoder.
        seconds: Training time.
        seed: Of the bootstrap.

    Raises:
        DataError: No labels, an empty query or database split, or not one row for each item.
    """
    _check_rows(codes, data)
    split, labels = data.split, require_labels(data)
    directions: dict[Direction, DirectionResult] = {}
    for direction, (one, other) in DIRECTIONS.items():
        query, database = codes[one][split.query], codes[other][split.database]

        def table_of(block: slice, query: PackedCodes = query, database: PackedCodes = database) -> DistanceTable:
            return distance_table(
                query[block], database, labels[split.query[block]], labels[split.database], grading="jaccard"
            )

        own = None
        if direction in CROSS_MODAL:  # each query's own partner is ranked among all items, the queries' partners too
            everything = np.concatenate([codes[other][split.query], database])
            own = own_pair_ranks(query, everything, np.arange(len(query)))
        directions[direction] = _measure(table_of, len(query), len(database), own, seed)
    n_bits = codes["image"].shape[1] * 8
    return EncoderResult(name, n_bits, fingerprint, metrics.distinct_share(codes["image"]), seconds, directions)


def evaluate_floats(
    name: str, vectors: Mapping[str, NDArray[np.float32]], data: PairedFeatures, *, seed: int = 0
) -> EncoderResult:
    """The same by cosine of float vectors: the ceiling of what their signs can reach.

    Equal cosines are ties, as equal distances of codes are.

    Args:
        name: In the report.
        vectors: "image" and "text" vectors of all items in one space, float32 (n, dim).
        data: The items' labels and split.
        seed: Of the bootstrap.

    Raises:
        DataError: No labels, an empty query or database split, or not one row for each item.
    """
    _check_rows(vectors, data)
    split, labels = data.split, require_labels(data)
    wide = {key: x.astype(np.float64) for key, x in vectors.items()}
    unit = {key: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for key, x in wide.items()}
    directions: dict[Direction, DirectionResult] = {}
    for direction, (one, other) in DIRECTIONS.items():
        query, database = unit[one][split.query], unit[other][split.database]
        block = max(1, 500_000 // len(database))

        def table_of(
            block: slice, query: NDArray[np.float64] = query, database: NDArray[np.float64] = database
        ) -> DistanceTable:
            scores = query[block] @ database.T  # (m, n)
            order = np.argsort(-scores, axis=1)
            falls = -np.diff(np.take_along_axis(scores, order, axis=1), axis=1, prepend=2.0)
            groups = np.cumsum(falls > EQUAL_SCORES, axis=1) - 1  # from 0 on, as 2 is no cosine
            exact = distance_table(
                _NO_CODE[np.zeros(len(order), dtype=int)],
                _NO_CODE[np.zeros(len(database), dtype=int)],
                labels[split.query[block]],
                labels[split.database],
                grading="jaccard",
            )
            overlap = _jaccard(labels[split.query[block]], labels[split.database])
            grades = np.searchsorted(exact.gains, np.take_along_axis(overlap, order, axis=1) - 1e-9)
            counts = np.zeros((*order.shape, len(exact.gains)), dtype=np.uint32)
            np.add.at(counts, (np.arange(len(order))[:, None], groups, grades), 1)
            return DistanceTable(counts, exact.gains)

        own = None
        if direction in CROSS_MODAL:
            everything = np.concatenate([unit[other][split.query], database])
            own = _own_ranks_by_score(query, everything, block)
        directions[direction] = _measure(table_of, len(query), len(database), own, seed, block, lookups=False)
    dim = vectors["image"].shape[1]
    distinct = len(np.unique(vectors["image"], axis=0)) / len(vectors["image"])
    return EncoderResult(name, 32 * dim, "", distinct, None, directions)


def _own_ranks_by_score(
    query: NDArray[np.float64], database: NDArray[np.float64], block: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As `own_pair_ranks`, by the greatest inner product; row i of the database is query i's own."""
    closer, tied = np.zeros((2, len(query)), dtype=np.int64)
    for start in range(0, len(query), block):
        rows = slice(start, start + block)
        scores = query[rows] @ database.T  # (n_block, n_database)
        lead = scores - np.diagonal(scores, start)[:, None]
        closer[rows] = (lead > EQUAL_SCORES).sum(axis=1)
        tied[rows] = (abs(lead) <= EQUAL_SCORES).sum(axis=1)
    return closer, tied


def _check_rows(arrays: Mapping[str, NDArray[Any]], data: PairedFeatures) -> None:
    for modality in ("image", "text"):
        n = len(arrays[modality]) if modality in arrays else 0
        if n != len(data.ids):
            raise DataError(
                f"there are {n} {modality} rows for the {len(data.ids)} items of {data.name}: give a code or a vector "
                "for each item, in the items' order"
            )


_NO_CODE = np.zeros((1, 1), dtype=np.uint8)
_QUERIES_AT_ONCE = 256  # bounds the tables: queries x distances x grades


def _jaccard(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> NDArray[np.float64]:
    shared = one.astype(np.float32) @ other.T.astype(np.float32)  # (m, n)
    union = one.sum(axis=1)[:, None] + other.sum(axis=1)[None, :] - shared
    return np.asarray(shared / np.maximum(union, 1), dtype=np.float64)


def _measure(
    table_of: Callable[[slice], DistanceTable],
    n_query: int,
    n_database: int,
    own: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    seed: int,
    block: int = _QUERIES_AT_ONCE,
    *,
    lookups: bool = True,
) -> DirectionResult:
    """All figures of one direction, tables made and dropped block by block of queries."""
    top_n = [n for n in TOP_N if n <= n_database]
    parts: dict[str, list[NDArray[np.float64]]] = {}
    for start in range(0, n_query, block):
        table = table_of(slice(start, start + block))
        measured = {
            "MAP@all": metrics.average_precision(table),
            "best": metrics.average_precision(table, ties="best"),
            "worst": metrics.average_precision(table, ties="worst"),
            "NDCG@10": metrics.ndcg_at_k(table, 10),
            "top_n": metrics.topn_precision(table, top_n),
        }
        if lookups:
            lookup = metrics.precision_recall_by_radius(table)
            measured |= {"precision": lookup.precision, "recall": lookup.recall, "empty": lookup.empty.astype(float)}
        for name, values in measured.items():
            parts.setdefault(name, []).append(values)
    whole = {name: np.concatenate(values) for name, values in parts.items()}
    per_query = {name: whole[name] for name in ("MAP@all", "NDCG@10")}
    if own is not None:
        per_query |= {f"own R@{k}": metrics.own_pair_recall_at_k(*own, k) for k in (1, 10)}
    return DirectionResult(
        estimates={key: metrics.bootstrap_interval(values, seed) for key, values in per_query.items()},
        map_best=metrics.mean_over_queries(whole["best"]),
        map_worst=metrics.mean_over_queries(whole["worst"]),
        own_median_rank=None if own is None else float(np.median(metrics.own_pair_rank(*own))),
        top_n=top_n,
        top_n_precision=_curve(whole["top_n"]),
        radius_precision=_curve(whole["precision"]) if lookups else [],
        radius_recall=_curve(whole["recall"]) if lookups else [],
        radius_empty=_curve(whole["empty"]) if lookups else [],
        per_query=per_query,
    )


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


def chance_level(data: PairedFeatures) -> float:
    """MAP@all of a ranking by chance: its exact expectation over all orders, equal in all directions."""
    split, labels = data.split, require_labels(data)
    table = distance_table(
        _NO_CODE[np.zeros(len(split.query), dtype=int)],
        _NO_CODE[np.zeros(len(split.database), dtype=int)],
        labels[split.query],
        labels[split.database],
        grading="binary",
    )
    return metrics.mean_average_precision(table)


@dataclass(frozen=True)
class Finding:
    """What the audit of a split found: one sentence, and whether it is a leak."""

    text: str
    leak: bool


def audit_split(data: PairedFeatures, texts: Sequence[str] | None = None) -> list[Finding]:
    """What a reader must know of the split before believing a figure.

    Leaks: query rows in the database, trained on or selected by; queries whose picture or text is that of a database
    item. Near duplicates and trained database rows are told, and are no leaks.

    Args:
        data: Features and split.
        texts: The items' texts, to find identical ones across the split.
    """
    from cmh_milvus.encoders.tokens import item_vectors  # torch takes a second to import

    split, n = data.split, len(data.split.query)
    shared = len(np.intersect1d(split.query, split.database))
    trained = len(np.intersect1d(split.query, split.train))
    selected = len(np.intersect1d(split.query, split.validation))
    findings = [
        Finding(f"{count} of {n} query rows {what}", True)
        for count, what in (
            (shared, "are in the database"),
            (trained, "were trained on"),
            (selected, "chose the model"),
        )
        if count
    ]
    for modality, features in (("picture", item_vectors(data.image)), ("text", item_vectors(data.text))):
        known = {row.tobytes() for row in features[split.database]}
        twins = np.array([row.tobytes() in known for row in features[split.query]], dtype=np.bool_)
        if twins.any():
            findings.append(Finding(f"{twins.sum()} of {n} queries have the very {modality} of a database item", True))
        near = _near_duplicates(features, split) & ~twins
        if near.any():
            findings.append(
                Finding(
                    f"{near.sum()} of {n} queries have a near duplicate of their {modality} in the database (within "
                    f"{NEAR_RADIUS} of {NEAR_BITS} random-projection bits of the features)",
                    False,
                )
            )
    if texts is not None:
        known_texts = {texts[row].strip().casefold() for row in split.database}
        same = sum(texts[row].strip().casefold() in known_texts for row in split.query)
        if same:
            findings.append(Finding(f"{same} of {n} queries have the caption of a database item", True))
    inside = len(np.intersect1d(split.database, np.concatenate([split.train, split.validation])))
    if inside:
        findings.append(
            Finding(
                f"{inside} of {len(split.database)} database rows were trained or selected on: the field's custom",
                False,
            )
        )
    if not any(finding.leak for finding in findings):
        findings.append(Finding("No query row, nor a copy of one, was seen in training or selection", False))
    return findings


def _near_duplicates(features: NDArray[np.float32], split: Split) -> NDArray[np.bool_]:
    """Which queries have an item of the database within `NEAR_RADIUS`: bool (n_query,)."""
    if not len(split.database):
        return np.zeros(len(split.query), dtype=np.bool_)
    directions = np.random.default_rng(0).standard_normal((features.shape[1], NEAR_BITS)).astype(np.float32)
    centred = features - features[split.database].mean(axis=0)
    codes = pack(binarize(centred @ directions))
    nearest = [
        hamming_distances(codes[rows], codes[split.database]).min(axis=1)
        for rows in np.array_split(split.query, max(1, len(split.query) * len(split.database) // 10**7))
    ]
    return np.concatenate(nearest) <= NEAR_RADIUS


def evaluate_through(ranker: Ranker, codes: Mapping[str, PackedCodes], data: PairedFeatures) -> ThroughCollection:
    """Compare rankings through a collection with brute force, in all directions.

    A collection with BIN_IVF_FLAT is measured by what its searches return (`HashCollection.served`).

    Args:
        ranker: Holds the database items; what else it holds is passed over.
        codes: "image" and "text" packed codes of all items.
        data: Ids, labels and split.

    Raises:
        DataError: Not one code for each item, or the ranker returns a row twice, or a distance that codes of this
            length cannot have.
    """
    from cmh_milvus.store import HashCollection, Row  # pymilvus takes a second to import; most evaluations need none

    rank = ranker.served if isinstance(ranker, HashCollection) else ranker.rank  # in any order: counts have none
    _check_rows(codes, data)
    split, labels = data.split, require_labels(data)
    database_labels = labels[split.database].astype(np.float32)
    n_distances = codes["image"].shape[1] * 8 + 1
    rows_at, returned_at = np.zeros((2, n_distances), dtype=np.int64)
    missing, wrong = 0, 0
    exact_map: dict[Direction, float] = {}
    served_map: dict[Direction, float] = {}
    for direction, (one, other) in DIRECTIONS.items():
        query_codes, database_codes = codes[one][split.query], codes[other][split.database]
        exact = distance_table(
            query_codes, database_codes, labels[split.query], labels[split.database], grading="binary"
        )
        position = {Row(data.ids[row], other, b"").pk: i for i, row in enumerate(split.database)}
        counts = np.zeros(exact.counts.shape, dtype=np.uint32)
        unranked = np.zeros((len(query_codes), 2), dtype=np.uint32)
        rankings = rank(to_bytes(query_codes), modality=other)
        for i, ranking in zip(range(len(query_codes)), rankings, strict=True):
            relevant = (database_labels @ labels[split.query[i]].astype(np.float32) > 0).astype(int)  # (n_database,)
            n_returned = len(ranking.pks)
            places = np.fromiter(map(position.get, ranking.pks, repeat(-1)), dtype=np.int64, count=n_returned)
            distances = ranking.distances[places >= 0].astype(np.int64)
            places = places[places >= 0]
            if len(places) and (np.bincount(places).max() > 1 or distances.max() >= n_distances):
                raise DataError(
                    f"the ranking of the query {data.ids[split.query[i]]!r} has a row twice, or a distance beyond "
                    f"{n_distances - 1} bits: is it of codes of this length?"
                )
            cells = np.bincount(2 * distances + relevant[places], minlength=2 * n_distances)
            counts[i] = cells.reshape(n_distances, 2)
            unranked[i] = np.bincount(relevant, minlength=2) - counts[i].sum(axis=0)
            true = hamming_distances(query_codes[i : i + 1], database_codes)[0]  # (n_database,)
            rows_at += np.bincount(true, minlength=n_distances)
            returned_at += np.bincount(distances[distances == true[places]], minlength=n_distances)
        exact_map[direction] = metrics.mean_average_precision(exact)
        served_map[direction] = metrics.mean_average_precision(DistanceTable(counts, exact.gains, unranked))
        missing += int(unranked.sum())
        wrong += int((counts != exact.counts).sum())
    index_loss = {direction: exact_map[direction] - served_map[direction] for direction in DIRECTIONS}
    return ThroughCollection(
        difference=max(map(abs, index_loss.values())),
        missing=missing,
        wrong=wrong,
        recall_by_distance=[
            int(returned) / int(rows) if rows else None for rows, returned in zip(rows_at, returned_at, strict=True)
        ],
        model_loss={direction: 1 - exact_map[direction] for direction in DIRECTIONS},
        index_loss=index_loss,
    )


def require_labels(data: PairedFeatures) -> NDArray[np.bool_]:
    """The labels of data that can be evaluated.

    Raises:
        DataError: No labels, or an empty query or database split.
    """
    if data.labels is None:
        raise DataError(
            f"{data.name} has no labels, and relevance is defined by them: name the label column, or add labels"
        )
    if len(data.split.query) == 0 or len(data.split.database) == 0:
        raise DataError(
            f"{data.name} has {len(data.split.query)} query and {len(data.split.database)} database rows: "
            "an evaluation needs both"
        )
    return data.labels


def _curve(per_query: NDArray[np.float64]) -> list[float]:
    """Mean over queries of a curve (n_query, n_points), as the rule for queries without a relevant item says."""
    mean: list[float] = metrics.mean_over_queries(per_query).tolist()
    return mean
