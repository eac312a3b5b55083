"""List groups of pictures whose codes lie near each other.

Any two pictures whose codes lie within the radius are in one group, and so is what a chain of such pairs joins.

python examples/near_duplicates.py demo-output/encoder cmh_milvus/datasets/emoji_data/images --radius 1
"""

import argparse
import sys
import tempfile
from pathlib import Path

from cmh_milvus import CrossModalHashEmbeddingFunction, HashCollection
from cmh_milvus.datasets.files import read_items
from cmh_milvus.ingestion import ingest_items


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path, help="folder of a trained encoder")
    parser.add_argument("pictures", type=Path, help="folder of pictures")
    parser.add_argument("--radius", type=int, default=1, help="in bits")
    options = parser.parse_args(arguments)

    ef = CrossModalHashEmbeddingFunction(options.encoder)
    with (
        tempfile.TemporaryDirectory() as folder,
        HashCollection.create(str(Path(folder) / "codes.db"), "pictures", ef.encoder) as pictures,
    ):
        report = ingest_items(pictures, read_items(options.pictures), ef.encoder)
        for item, reason in report.failures:
            print(f"{item} is left out: {reason}", file=sys.stderr)
        codes = [code for _, code in pictures.codes(modality="image")]
        parent: dict[str, str] = {}  # of a picture in its group; the first of a group has none

        def first(item: str) -> str:
            while item in parent:
                item = parent[item]
            return item

        items = set()
        for hits in pictures.lookup(codes, options.radius, modality="image"):  # the first hit lies at distance 0
            items.update(hit.item_id for hit in hits)
            for hit in hits:
                one, other = sorted((first(hits[0].item_id), first(hit.item_id)))
                if one != other:
                    parent[other] = one
    groups: dict[str, list[str]] = {}
    for item in sorted(items):
        groups.setdefault(first(item), []).append(item)
    for group in groups.values():
        if len(group) > 1:
            print(" ".join(group))


if __name__ == "__main__":
    main()
