"""Retrieval metrics: pure functions of a table of counts [query, distance, grade], exact under ties.

With K bits there are only K + 1 distances, so whole groups of items tie. `ties` says what is done about it:

- ``expected`` (default) mean over all orders within a distance, in closed form (McSherry and Najork, "Computing
  information retrieval performance measures efficiently in the presence of tied scores", ECIR 2008);
- ``best`` and ``worst``: the highest and lowest value that any order within a distance gives.

The value of one concrete order is that of the table `ranked_table` makes of it, where nothing ties.

Functions return one value a query. NaN marks a query without a relevant item; `mean_over_queries` says what
becomes of it. Relevant is an item of positive gain. Nothing here knows a direction or a modality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, wraps
from typing import Any, Concatenate, Literal, ParamSpec, get_args

import numpy as np
from numpy.typing import NDArray

from cmh_milvus.errors import DataError, SettingsError

Ties = Literal["expected", "best", "worst"]
NoRelevant = Literal["zero", "skip", "error"]
Gain = Literal["linear", "exponential"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
P = ParamSpec("P")

_BLOCK_CELLS = 1 << 15  # cells of a table worked on at once: temporaries of 256 KB


@dataclass(frozen=True)
class DistanceTable:
    """For each query, how many database items lie at each distance with each grade of relevance.

    Attributes:
        counts: Unsigned integers (n_query, n_bits + 1, n_grades), by distance ascending.
        gains: float64 (n_grades,), the relevance of each grade, ascending, the first 0.
        unranked: Unsigned integers (n_query, n_grades): items that the ranking never returned. They count among
            the relevant items of a query, at no rank. None where the ranking is complete.

    Raises:
        SettingsError: The shapes do not fit, or the gains do not ascend from 0.
    """

    counts: NDArray[np.unsignedinteger[Any]]
    gains: Floats
    unranked: NDArray[np.unsignedinteger[Any]] | None = field(default=None)

    def __post_init__(self) -> None:
        if self.counts.ndim != 3 or self.gains.shape != self.counts.shape[2:]:
            raise SettingsError(
                f"a table has counts (n_query, n_bits + 1, n_grades) and gains (n_grades,), got "
                f"{self.counts.shape} and {self.gains.shape}"
            )
        if len(self.gains) == 0 or self.gains[0] != 0 or (np.diff(self.gains) <= 0).any():
            raise SettingsError(f"gains must ascend from 0, one a grade, got {self.gains.tolist()}")
        if self.unranked is not None and self.unranked.shape != (len(self.counts), len(self.gains)):
            raise SettingsError(
                f"`unranked` must be (n_query, n_grades) = {(len(self.counts), len(self.gains))}, "
                f"got {self.unranked.shape}"
            )
        sizes = self.grade_totals().sum(axis=1)
        if len(sizes) and (sizes != sizes[0]).any():
            raise SettingsError(
                f"each query counts the same database, got {sizes.min()} to {sizes.max()} items: count what a "
                "ranking did not return in `unranked`"
            )

    @property
    def n_query(self) -> int:
        """Number of queries."""
        return len(self.counts)

    @property
    def n_bits(self) -> int:
        """Greatest distance."""
        return int(self.counts.shape[1]) - 1

    @property
    def n_database(self) -> int:
        """Number of database items, unranked ones among them (0 for a table without queries)."""
        return int(self.grade_totals()[0].sum()) if self.n_query else 0

    def total(self) -> Ints:
        """Items at each distance: int64 (n_query, n_bits + 1)."""
        return _over_grades(self.counts, 0)

    def relevant(self) -> Ints:
        """Relevant items at each distance: int64 (n_query, n_bits + 1)."""
        return _over_grades(self.counts, 1)

    def grade_totals(self) -> Ints:
        """Database items of each grade, unranked ones among them: int64 (n_query, n_grades)."""
        return self._grade_totals

    @cached_property
    def _grade_totals(self) -> Ints:
        totals = np.stack([self.counts[:, :, g].sum(axis=1, dtype=np.int64) for g in range(len(self.gains))], axis=1)
        return totals if self.unranked is None else totals + self.unranked.astype(np.int64)

    def n_relevant(self) -> Ints:
        """Relevant database items of each query: int64 (n_query,)."""
        return np.asarray(self.grade_totals()[:, 1:].sum(axis=1))

    def binary(self) -> DistanceTable:
        """The same with two grades: relevant or not."""
        if np.array_equal(self.gains, [0.0, 1.0]):
            return self
        unranked = None if self.unranked is None else _two_grades(self.unranked)
        return DistanceTable(_two_grades(self.counts), np.array([0.0, 1.0]), unranked)

    def collapsed(self) -> DistanceTable:
        """All distances as one: expected metrics of it are those of a ranking by chance."""
        wide = np.promote_types(self.counts.dtype, np.uint32)
        return replace(self, counts=self.counts.sum(axis=1, keepdims=True, dtype=wide))

    def query_blocks(self) -> Iterator[DistanceTable]:
        """The table in pieces of a bounded number of cells, in query order; at least one piece."""
        step = max(1, _BLOCK_CELLS // max(1, self.counts.shape[1] * self.counts.shape[2]))
        for start in range(0, max(1, self.n_query), step):
            rows = slice(start, start + step)
            unranked = None if self.unranked is None else self.unranked[rows]
            yield DistanceTable(self.counts[rows], self.gains, unranked)


def _over_grades(counts: NDArray[Any], first: int) -> Ints:
    """Sum over the grades from `first` on: a plane at a time, many times faster than a reduction of a short axis."""
    total = np.zeros(counts.shape[:2], dtype=np.int64)
    for grade in range(first, counts.shape[2]):
        total += counts[:, :, grade]
    return total


def _two_grades(counts: NDArray[Any]) -> NDArray[Any]:
    wide = np.promote_types(counts.dtype, np.uint32)
    return np.stack([counts[..., 0], counts[..., 1:].sum(axis=-1, dtype=wide)], axis=-1)


def ranked_table(grades: NDArray[np.integer[Any]], gains: Floats) -> DistanceTable:
    """The table of one concrete order: rank takes the place of distance, and nothing ties.

    It needs n_query * n * n_grades * 4 bytes: for many queries, call it block by block.

    Args:
        grades: Integers (n_query, n), the grade at each rank, from the first on.
        gains: float64 (n_grades,).

    Returns:
        A table of n distances.
    """
    counts = (grades[:, :, None] == np.arange(len(gains))).astype(np.uint32)  # (n_query, n, n_grades)
    return DistanceTable(counts, gains)


def _by_query_blocks(
    per_query: Callable[Concatenate[DistanceTable, P], Floats],
) -> Callable[Concatenate[DistanceTable, P], Floats]:
    """Run a metric on bounded pieces of a table, so that its temporaries stay in cache."""

    @wraps(per_query)
    def run(table: DistanceTable, /, *args: P.args, **kwargs: P.kwargs) -> Floats:
        return np.concatenate([per_query(block, *args, **kwargs) for block in table.query_blocks()])

    return run


def _check(ties: str, k: int = 1) -> None:
    if ties not in get_args(Ties):
        hint = " (for a stable order, take ranking.stable_average_precision or metrics.ranked_table)"
        raise SettingsError(
            f"tie rule {ties!r} is unknown here: give one of {', '.join(get_args(Ties))}"
            + (hint if ties == "stable" else "")
        )
    if k < 1:
        raise SettingsError(f"a cut-off must be at least 1, got {k}")


@lru_cache(maxsize=1)
def _harmonic(n: int) -> Floats:
    """Harmonic numbers 0 to n, read-only."""
    numbers = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, n + 1))])
    numbers.flags.writeable = False
    return numbers


def _nan_where_none_relevant(values: Floats, table: DistanceTable) -> Floats:
    none = (table.n_relevant() == 0).reshape(-1, *[1] * (values.ndim - 1))
    return np.where(none, np.nan, values)


def _expected_weight(n0: Any, w0: Any, m: Any, r: Any, w: Any, harmonic: Floats) -> Any:
    """Expected sum, over the relevant items of a group of ties, of (weight down to it) / rank.

    Position i of the group is relevant with probability r / m; of the i - 1 items before it,
    (i - 1)(r - 1) / (m - 1) are expected to be relevant too. Summed over i with sum 1 / (n0 + i) = H(n0 + m) - H(n0).

    Args:
        n0: Items before the group.
        w0: Summed weight before it.
        m: Items in the group.
        r: Relevant ones among them.
        w: Mean weight of a relevant one.
        harmonic: Harmonic numbers.
    """
    slope = w * np.maximum(r - 1, 0) / np.maximum(m - 1, 1)
    inner = slope * m + (w0 + w - slope * (n0 + 1)) * (harmonic[n0 + m] - harmonic[n0])
    return r / np.maximum(m, 1) * inner


def _run_weight(n0: Any, w0: Any, c: Any, w: Any, harmonic: Floats) -> Any:
    """Sum of (weight down to it) / rank over a run of c items of weight w each, after n0 items of weight w0."""
    return w * c + (w0 - w * n0) * (harmonic[n0 + c] - harmonic[n0])


def _group_weights(table: DistanceTable, ties: Ties, harmonic: Floats) -> Floats:
    """Sum, over the relevant items of each distance, of (gain down to it) / rank: float64 (n_query, n_bits + 1)."""
    if ties == "expected":
        m, r = table.total(), table.relevant()
        weight = table.counts @ table.gains  # (n_query, n_bits + 1)
        n0, w0 = np.cumsum(m, axis=1) - m, np.cumsum(weight, axis=1) - weight
        return np.asarray(_expected_weight(n0, w0, m, r, weight / np.maximum(r, 1), harmonic))
    order = np.arange(len(table.gains))[:: -1 if ties == "best" else 1]
    runs = table.counts[:, :, order].astype(np.int64)
    c = runs.reshape(len(runs), -1)  # (n_query, (n_bits + 1) * n_grades)
    w = np.tile(table.gains[order], table.counts.shape[1])
    n0, w0 = np.cumsum(c, axis=1) - c, np.cumsum(c * w, axis=1) - c * w
    sums = np.where(w > 0, _run_weight(n0, w0, c, w, harmonic), 0.0)
    return np.asarray(sums.reshape(runs.shape).sum(axis=2))


# Average precision


@_by_query_blocks
def weighted_average_precision(table: DistanceTable, ties: Ties = "expected") -> Floats:
    """WAP over the whole ranking: mean over the relevant items of (gain down to it) / rank.

    With two grades it is average precision. Zhao et al., "Deep semantic ranking based hashing for multi-label image
    retrieval", CVPR 2015.

    Args:
        table: Counts.
        ties: Tie rule.

    Returns:
        float64 (n_query,), NaN without a relevant item.
    """
    _check(ties)
    harmonic = _harmonic(table.n_database)
    sums = _group_weights(table, ties, harmonic).sum(axis=1)
    return _nan_where_none_relevant(sums / np.maximum(table.n_relevant(), 1), table)


def average_precision(table: DistanceTable, ties: Ties = "expected") -> Floats:
    """AP over the whole ranking: mean over the relevant items of (its rank among relevant ones) / rank.

    Args:
        table: Counts.
        ties: Tie rule.

    Returns:
        float64 (n_query,) in [0, 1], NaN without a relevant item.

    Example:
        >>> counts = np.array([[[0, 1], [2, 1]]], dtype=np.uint32)  # one relevant item, then three tied
        >>> average_precision(DistanceTable(counts, np.array([0.0, 1.0]))).round(4)
        array([0.8611])
    """
    return weighted_average_precision(table.binary(), ties)


def _hypergeometric(low: int, high: int, m: int, r: int, s: int) -> Floats:
    """P(t relevant among s drawn of m that hold r), for t from low to high, the whole support."""
    t = np.arange(low, high)
    ratios = np.log((r - t) * (s - t)) - np.log((t + 1.0) * (m - r - s + t + 1))
    return _from_log_ratios(ratios)


def _from_log_ratios(ratios: Floats) -> Floats:
    logs = np.concatenate([[0.0], np.cumsum(ratios)])
    p = np.exp(logs - logs.max())
    return np.asarray(p / p.sum())


@_by_query_blocks
def weighted_average_precision_at_k_cut(table: DistanceTable, k: int, ties: Ties = "expected") -> Floats:
    """WAP of the first k ranks, divided by the relevant items among those k (0 where there is none).

    A group of ties that straddles rank k is cut: its share of relevant items above the cut is hypergeometric, and
    the value is summed (expected) or the extreme taken (best, worst) over that share.

    Args:
        table: Counts.
        k: Cut-off rank; beyond the last rank it is no cut.
        ties: Tie rule.

    Returns:
        float64 (n_query,), NaN where the database holds no relevant item.
    """
    _check(ties, k)
    harmonic = _harmonic(table.n_database)
    total, relevant = table.total(), table.relevant()
    weight = table.counts @ table.gains
    sums = np.cumsum(_group_weights(table, ties, harmonic), axis=1)
    ends = np.cumsum(total, axis=1)
    values = np.zeros(table.n_query)
    for i in range(table.n_query):
        b = int(np.searchsorted(ends[i], min(k, ends[i, -1])))  # the group that holds rank k
        m, r = int(total[i, b]), int(relevant[i, b])
        n0, r0 = int(ends[i, b]) - m, int(relevant[i, :b].sum())
        w0, before = float(weight[i, :b].sum()), float(sums[i, b - 1]) if b else 0.0
        s = min(k - n0, m)
        low, high = max(0, s - (m - r)), min(s, r)
        t = np.arange(low, high + 1)
        if ties == "expected":
            inside = _expected_weight(n0, w0, s, t, weight[i, b] / max(r, 1), harmonic)
        else:
            inside = _extreme_weights(n0, w0, s, t, table.counts[i, b], table.gains, ties, harmonic)
        value = np.where(r0 + t > 0, (before + inside) / np.maximum(r0 + t, 1), 0.0)
        if ties == "expected":
            values[i] = value @ _hypergeometric(low, high, m, r, s)
        else:
            values[i] = value.max() if ties == "best" else value.min()
    return _nan_where_none_relevant(values, table)


def _extreme_weights(
    n0: int, w0: float, s: int, t: Ints, counts: NDArray[Any], gains: Floats, ties: Ties, harmonic: Floats
) -> Floats:
    """As `_run_weight`, for the first s items of a group, t of them relevant: highest gains first, or lowest last."""
    base = np.full_like(t, n0) if ties == "best" else n0 + s - t
    sums = np.zeros(len(t))
    left, w = t.copy(), np.full(len(t), w0)
    for grade in range(1, len(gains)) if ties == "worst" else range(len(gains) - 1, 0, -1):
        c = np.minimum(left, int(counts[grade]))
        sums += _run_weight(base, w, c, gains[grade], harmonic)
        base, w, left = base + c, w + gains[grade] * c, left - c
    return sums


def average_precision_at_k_cut(table: DistanceTable, k: int, ties: Ties = "expected") -> Floats:
    """AP of the first k ranks, divided by the relevant items among those k (0 where there is none).

    What DJSRH, DGCPN and CIRH call MAP@k. `best` and `worst` are over all orders within a distance; since the
    divisor moves with the order, they are not the orders with all relevant items first or last.

    Args:
        table: Counts.
        k: Cut-off rank.
        ties: Tie rule.

    Returns:
        float64 (n_query,), NaN where the database holds no relevant item.
    """
    return weighted_average_precision_at_k_cut(table.binary(), k, ties)


def _still_waiting(m: int, r: int, s: int) -> Floats:
    """P(the s-th relevant of r among m in random order lies beyond position p), for p from 0 to m."""
    p = np.arange(s, m - r + s, dtype=np.float64)
    first = _from_log_ratios(np.log(p * (m - p - r + s)) - np.log((p - s + 1) * (m - p)))
    at = np.concatenate([np.zeros(s), first, np.zeros(r - s)])  # positions 0 to m
    return np.asarray(1.0 - np.cumsum(at))


def _first_relevant_weight(n0: int, r0: int, m: int, r: int, s: int) -> float:
    """Expected sum of (rank among relevant) / rank over the first s of the r > s relevant items of a group of m."""
    i = np.arange(1, m + 1)
    fewer = _still_waiting(m - 1, r - 1, s)  # of the i - 1 items before i, fewer than s are relevant
    pairs = np.zeros(m)  # the same, counting a relevant item before i
    if s > 1:
        pairs[1:] = _still_waiting(m - 2, r - 2, s - 1)
    share = (i - 1) * (r - 1) / (m - 1)  # expected relevant items before i
    return float(r / m * (((1 + r0) * fewer + share * pairs) / (n0 + i)).sum())


@_by_query_blocks
def average_precision_first_k_relevant(table: DistanceTable, k: int, ties: Ties = "expected") -> Floats:
    """AP over the first min(k, number of relevant) relevant items, wherever they rank.

    What DCMH's ports, DCHMT and MITH call MAP@k; with k not below the number of relevant items it is AP.

    Args:
        table: Counts.
        k: Number of relevant items that count.
        ties: Tie rule.

    Returns:
        float64 (n_query,) in [0, 1], NaN where the database holds no relevant item.
    """
    _check(ties, k)
    table = table.binary()
    harmonic = _harmonic(table.n_database)
    total, relevant = table.total(), table.relevant()
    ends, found = np.cumsum(total, axis=1), np.cumsum(relevant, axis=1)
    sums = np.cumsum(_group_weights(table, ties, harmonic), axis=1)
    values = np.zeros(table.n_query)
    for i, wanted in enumerate(np.minimum(k, found[:, -1])):
        if wanted == 0:
            continue
        b = int(np.searchsorted(found[i], wanted))  # the group that holds the last one that counts
        m, r = int(total[i, b]), int(relevant[i, b])
        n0, r0 = int(ends[i, b]) - m, int(found[i, b]) - r
        s = int(wanted) - r0
        if ties == "expected" and s < r:
            inside = _first_relevant_weight(n0, r0, m, r, s)
        elif ties == "expected":
            inside = float(_expected_weight(n0, r0, m, r, 1.0, harmonic))
        else:
            inside = float(_run_weight(n0 + (m - r) * (ties == "worst"), r0, s, 1.0, harmonic))
        values[i] = (sums[i, b - 1] if b else 0.0) + inside
    return _nan_where_none_relevant(values / np.maximum(np.minimum(k, table.n_relevant()), 1), table)


# Graded relevance


@_by_query_blocks
def ndcg_at_k(table: DistanceTable, k: int, ties: Ties = "expected", gain: Gain = "linear") -> Floats:
    """Normalised discounted cumulative gain of the first k ranks, discount 1 / log2(1 + rank).

    Args:
        table: Counts.
        k: Cut-off rank.
        ties: Tie rule.
        gain: ``linear`` takes the table's gains, ``exponential`` 2^gain - 1.

    Returns:
        float64 (n_query,) in [0, 1], NaN without a relevant item.
    """
    _check(ties, k)
    if gain not in get_args(Gain):
        raise SettingsError(f"gain {gain!r} is unknown: give one of {', '.join(get_args(Gain))}")
    if gain == "exponential":
        table = replace(table, gains=np.exp2(table.gains) - 1)
    ranks = np.arange(1, min(k, table.n_database) + 1)
    discount = np.concatenate([[0.0], np.cumsum(1 / np.log2(1 + ranks))])
    ideal = _runs_gain(table.grade_totals()[:, ::-1], table.gains[::-1], discount)
    values = _cumulative_gain(table, ties, discount) / np.where(ideal > 0, ideal, 1)
    return _nan_where_none_relevant(values, table)


@_by_query_blocks
def acg_at_k(table: DistanceTable, k: int, ties: Ties = "expected") -> Floats:
    """Average cumulative gain: mean gain of the first k ranks (of all, where there are fewer).

    Args:
        table: Counts; with the grading ``shared``, gains are numbers of shared labels.
        k: Cut-off rank.
        ties: Tie rule.

    Returns:
        float64 (n_query,), NaN without a relevant item.
    """
    _check(ties, k)
    ranks = min(k, table.n_database)
    values = _cumulative_gain(table, ties, np.arange(ranks + 1, dtype=np.float64)) / max(ranks, 1)
    return _nan_where_none_relevant(values, table)


def _runs_gain(counts: NDArray[Any], gains: Floats, discount: Floats) -> Floats:
    """Sum of gain * discount over runs of equal gain; `discount` is cumulative, its last entry the cut-off's."""
    last = len(discount) - 1
    ends = np.cumsum(counts, axis=1, dtype=np.int64)
    starts = np.minimum(ends - counts.astype(np.int64), last)
    return np.asarray(((discount[np.minimum(ends, last)] - discount[starts]) * gains).sum(axis=1))


def _cumulative_gain(table: DistanceTable, ties: Ties, discount: Floats) -> Floats:
    """Sum of gain * discount down to the cut-off: float64 (n_query,)."""
    if ties == "expected":
        total = table.total()
        return _runs_gain(total, (table.counts @ table.gains) / np.maximum(total, 1), discount)
    order = np.arange(len(table.gains))[:: -1 if ties == "best" else 1]
    runs = table.counts[:, :, order].reshape(table.n_query, -1)
    return _runs_gain(runs, np.tile(table.gains[order], table.counts.shape[1]), discount)


# Precision at ranks and radii


def _relevant_at(table: DistanceTable, ranks: Ints, ties: Ties) -> Floats:
    """Relevant items among the first ranks[query, j] items: float64 (n_query, n_ranks)."""
    relevant = np.cumsum(table.relevant(), axis=1)
    ends = np.cumsum(table.total(), axis=1)
    found = np.zeros(ranks.shape)
    for i in range(table.n_query):
        b = np.searchsorted(ends[i], np.minimum(ranks[i], ends[i, -1]))
        n0 = np.where(b > 0, ends[i, b - 1], 0)
        r0 = np.where(b > 0, relevant[i, b - 1], 0)
        m, r, s = ends[i, b] - n0, relevant[i, b] - r0, np.minimum(ranks[i], ends[i, -1]) - n0
        if ties == "expected":
            inside = s * r / np.maximum(m, 1)
        else:
            inside = np.minimum(s, r) if ties == "best" else np.maximum(0, s - (m - r))
        found[i] = r0 + inside
    return found


@_by_query_blocks
def topn_precision(table: DistanceTable, cuts: Sequence[int], ties: Ties = "expected") -> Floats:
    """Precision of the first N ranks, for each N of `cuts` (topN-precision curve).

    Args:
        table: Counts.
        cuts: The values of N, each between 1 and the size of the database.
        ties: Tie rule.

    Returns:
        float64 (n_query, n_cuts), NaN in the rows of queries without a relevant item.

    Raises:
        SettingsError: A cut-off lies beyond the database.
    """
    _check(ties, min(cuts, default=1))
    if table.n_query and max(cuts, default=1) > table.n_database:
        raise SettingsError(f"top {max(cuts)} cannot be taken of {table.n_database} items: give smaller cut-offs")
    ranks = np.tile(np.asarray(cuts, dtype=np.int64), (table.n_query, 1))
    return _nan_where_none_relevant(_relevant_at(table, ranks, ties) / ranks, table)


@_by_query_blocks
def r_precision(table: DistanceTable, ties: Ties = "expected") -> Floats:
    """Precision of the first R ranks, R being the query's number of relevant items.

    Args:
        table: Counts.
        ties: Tie rule.

    Returns:
        float64 (n_query,) in [0, 1], NaN without a relevant item.
    """
    _check(ties)
    n_relevant = table.n_relevant()
    found = _relevant_at(table, n_relevant[:, None], ties)[:, 0]
    return _nan_where_none_relevant(found / np.maximum(n_relevant, 1), table)


@dataclass(frozen=True)
class LookupCurve:
    """Hash lookup at each radius 0..n_bits; ties do not matter to it. Arrays (n_query, n_bits + 1).

    Attributes:
        precision: float64; 0 where nothing lies within the radius. NaN for a query without a relevant item.
        recall: float64, NaN likewise.
        f1: float64, NaN likewise; 0 where precision and recall are.
        empty: bool, nothing lies within the radius.
    """

    precision: Floats
    recall: Floats
    f1: Floats
    empty: NDArray[np.bool_]


def precision_recall_by_radius(table: DistanceTable) -> LookupCurve:
    """Precision, recall, F1 and emptiness of looking up all items within each Hamming radius.

    Args:
        table: Counts.
    """
    retrieved = np.cumsum(table.total(), axis=1)
    hits = np.cumsum(table.relevant(), axis=1)
    n_relevant = table.n_relevant()[:, None]
    precision = _nan_where_none_relevant(hits / np.maximum(retrieved, 1), table)
    recall = _nan_where_none_relevant(hits / np.maximum(n_relevant, 1), table)
    f1 = _nan_where_none_relevant(2 * hits / np.maximum(retrieved + n_relevant, 1), table)
    return LookupCurve(precision, recall, f1, retrieved == 0)


# A query's own pair


def own_pair_rank(closer: Ints, tied: Ints, ties: Ties = "expected") -> Floats:
    """Rank, from 1, of each query's own pair.

    Args:
        closer: Integers (n_query,), items strictly closer than the pair.
        tied: Integers (n_query,), items at the pair's distance, itself among them, so at least 1.
        ties: Tie rule.

    Returns:
        float64 (n_query,).

    Example:
        >>> own_pair_rank(np.array([0, 3]), np.array([1, 4]))
        array([1. , 5.5])
    """
    _check(ties)
    if ties == "expected":
        return np.asarray(closer + (tied + 1) / 2)
    return (closer + (tied if ties == "worst" else 1)).astype(np.float64)


def own_pair_recall_at_k(closer: Ints, tied: Ints, k: int, ties: Ties = "expected") -> Floats:
    """Whether each query's own pair is among the first k: a probability where it ties across rank k.

    Args:
        closer: Integers (n_query,), items strictly closer than the pair.
        tied: Integers (n_query,), items at the pair's distance, itself among them.
        k: Cut-off rank.
        ties: Tie rule.

    Returns:
        float64 (n_query,) in [0, 1].

    Example:
        >>> own_pair_recall_at_k(np.array([0, 8]), np.array([1, 4]), k=10)
        array([1. , 0.5])
    """
    _check(ties, k)
    if ties == "expected":
        return np.asarray(np.clip((k - closer) / tied, 0.0, 1.0))
    return (own_pair_rank(closer, tied, ties) <= k).astype(np.float64)


def distinct_share(packed: NDArray[np.uint8]) -> float:
    """Distinct codes divided by codes: near 0 for a collapsed encoder.

    Args:
        packed: uint8 (n, n_bits // 8), n >= 1.

    Raises:
        DataError: There are no codes.
    """
    if not len(packed):
        raise DataError("the share of distinct codes needs at least one code, got none")
    return len(np.unique(packed, axis=0)) / len(packed)


# Over queries


def apply_no_relevant(per_query: Floats, no_relevant: NoRelevant = "zero") -> Floats:
    """Per-query values with the rule for queries without a relevant item carried out.

    Args:
        per_query: float64 (n_query, ...), NaN for a query without a relevant item.
        no_relevant: ``zero`` counts it as 0, ``skip`` drops it, ``error`` refuses.

    Returns:
        float64 without NaN, shorter under ``skip``.

    Raises:
        DataError: There is such a query and the rule is ``error``, or no query is left.
        SettingsError: The rule is unknown.
    """
    if no_relevant not in get_args(NoRelevant):
        raise SettingsError(f"rule {no_relevant!r} is unknown: give one of {', '.join(get_args(NoRelevant))}")
    none = np.asarray(np.isnan(per_query).any(axis=tuple(range(1, per_query.ndim))))
    if no_relevant == "error" and none.any():
        raise DataError(
            f"{int(none.sum())} of {len(none)} queries have no relevant item in the database: choose "
            "no_relevant='zero' or 'skip', or mend the split"
        )
    if no_relevant == "skip":
        per_query = per_query[~none]
    if not len(per_query):
        raise DataError("no query is left to take the mean over: the split has none with a relevant item")
    return np.nan_to_num(per_query, nan=0.0)


def mean_over_queries(per_query: Floats, no_relevant: NoRelevant = "zero") -> Any:
    """Mean over queries, under a rule for queries without a relevant item.

    Args:
        per_query: float64 (n_query, ...), NaN for a query without a relevant item.
        no_relevant: As for `apply_no_relevant`.

    Returns:
        float, or float64 (...) for curves.
    """
    mean = apply_no_relevant(per_query, no_relevant).mean(axis=0)
    return float(mean) if mean.ndim == 0 else mean


def mean_average_precision(table: DistanceTable, ties: Ties = "expected", no_relevant: NoRelevant = "zero") -> float:
    """MAP over the whole database ("MAP@all"): mean of `average_precision`."""
    return float(mean_over_queries(average_precision(table, ties), no_relevant))


def map_at_k_cut(table: DistanceTable, k: int, ties: Ties = "expected", no_relevant: NoRelevant = "zero") -> float:
    """MAP@k, ranking cut at rank k: mean of `average_precision_at_k_cut`."""
    return float(mean_over_queries(average_precision_at_k_cut(table, k, ties), no_relevant))


def map_first_k_relevant(
    table: DistanceTable, k: int, ties: Ties = "expected", no_relevant: NoRelevant = "zero"
) -> float:
    """MAP@k, first k relevant items: mean of `average_precision_first_k_relevant`."""
    return float(mean_over_queries(average_precision_first_k_relevant(table, k, ties), no_relevant))


@dataclass(frozen=True)
class Interval:
    """A mean over queries and its bootstrap interval.

    Attributes:
        mean: Of the values.
        low: Lower end.
        high: Upper end.
        level: Of confidence, such as 0.95.
    """

    mean: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class Difference(Interval):
    """Mean of first minus second over the same queries, its interval, and how often chance does as much.

    Attributes:
        p_value: Two-sided, from the share of resamples on the other side of 0.
    """

    p_value: float


def _resampled_means(values: Floats, seed: int, n_resamples: int) -> Floats:
    rng = np.random.default_rng(seed)
    step = max(1, (1 << 20) // len(values))
    blocks = [
        values[rng.integers(0, len(values), (min(step, n_resamples - start), len(values)))].mean(axis=1)
        for start in range(0, n_resamples, step)
    ]
    return np.concatenate(blocks)


def _ends(means: Floats, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise SettingsError(f"a confidence level lies between 0 and 1, got {level}")
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    per_query: Floats,
    seed: int,
    level: float = 0.95,
    n_resamples: int = 2000,
    no_relevant: NoRelevant = "zero",
) -> Interval:
    """Percentile bootstrap interval of a mean, resampling queries.

    Args:
        per_query: float64 (n_query,).
        seed: Of the resampling.
        level: Of confidence.
        n_resamples: Number of resamples.
        no_relevant: As for `apply_no_relevant`.
    """
    values = apply_no_relevant(per_query, no_relevant)
    return Interval(float(values.mean()), *_ends(_resampled_means(values, seed, n_resamples), level), level)


def paired_bootstrap(
    first: Floats,
    second: Floats,
    seed: int,
    level: float = 0.95,
    n_resamples: int = 2000,
    no_relevant: NoRelevant = "zero",
) -> Difference:
    """Bootstrap of the difference of two encoders on the same queries, in the same order.

    Args:
        first: float64 (n_query,), of one encoder.
        second: float64 (n_query,), of the other.
        seed: Of the resampling.
        level: Of confidence.
        n_resamples: Number of resamples; the p-value is no smaller than 2 / (n_resamples + 1).
        no_relevant: As for `apply_no_relevant`.

    Raises:
        DataError: The two are not of the same queries.
    """
    if first.shape != second.shape or not np.array_equal(np.isnan(first), np.isnan(second)):
        raise DataError("a paired comparison needs the values of the same queries, in the same order")
    values = apply_no_relevant(first - second, no_relevant)
    values[np.abs(values) < 1e-12] = 0.0  # rounding, in the sums of the two
    means = _resampled_means(values, seed, n_resamples)
    tail = min((means <= 0).sum(), (means >= 0).sum())
    p_value = min(1.0, 2 * (int(tail) + 1) / (n_resamples + 1))
    return Difference(float(values.mean()), *_ends(means, level), level, p_value)
