"""List groups of pictures whose codes lie within a few bits of each other, complete and exact.

python examples/near_duplicates.py demo-output/encoder cmh_milvus/datasets/emoji_data/images --radius 1
"""

import argparse
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
        ingest_items(pictures, read_items(options.pictures), ef.encoder)
        rows = list(pictures.codes(modality="image"))
        seen: set[str] = set()
        for (pk, _), hits in zip(rows, pictures.lookup([code for _, code in rows], options.radius), strict=True):
            group = [hit.item_id for hit in hits if hit.pk not in seen]
            if pk not in seen and len(group) > 1:
                print(" ".join(group))
            seen.update(hit.pk for hit in hits)


if __name__ == "__main__":
    main()
