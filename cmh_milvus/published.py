"""MAP that the literature prints for our methods, for data that say which protocol they follow.

`published_map.csv` has a row a protocol, method, code length and direction, with the sizes of the sets, the cut-off
("all": the whole database, as it is measured here) and the table that the figure was read from.
"""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from importlib.resources import files

from cmh_milvus.datasets.base import PairedFeatures
from cmh_milvus.evaluation import Direction


@dataclass(frozen=True)
class PublishedMap:
    """A figure of a paper.

    Attributes:
        value: MAP over the whole database.
        source: Paper and table, and the features there.
    """

    value: float
    source: str


def published_map(data: PairedFeatures, method: str, n_bits: int, direction: Direction) -> PublishedMap | None:
    """The paper's MAP on `data`, or None.

    None unless `data.protocol` names a protocol of the file and the sets have the paper's sizes: rows cut from train
    for validation count as train rows.

    Args:
        data: Its protocol and split are looked at.
        method: Name of a method with its default settings.
        n_bits: Code length.
        direction: Across modalities.
    """
    split = data.split
    sizes = (len(split.query), len(split.train) + len(split.validation), len(split.database))
    return _published().get((data.protocol, sizes, method, n_bits, direction))


@functools.cache
def _published() -> dict[tuple[str, tuple[int, ...], str, int, str], PublishedMap]:
    with files("cmh_milvus").joinpath("published_map.csv").open(encoding="utf-8") as file:
        return {
            (
                row["protocol"],
                tuple(int(row[size]) for size in ("query", "train", "database")),
                row["method"],
                int(row["bits"]),
                row["direction"],
            ): PublishedMap(float(row["map"]), row["source"])
            for row in csv.DictReader(file)
        }
