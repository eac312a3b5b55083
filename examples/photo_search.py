"""Search a folder of pictures by text.

    python examples/photo_search.py demo-output/encoder cmh_milvus/datasets/emoji_data/images "a ship at sea"

The codes are kept in ./photo-search.db, a collection for each folder; only new and changed pictures are encoded on the
next run.
"""

import argparse
import hashlib
from pathlib import Path

from cmh_milvus import CrossModalHashEmbeddingFunction, HashCollection
from cmh_milvus.datasets.files import read_items
from cmh_milvus.ingestion import ingest_items
from cmh_milvus.store import manifest_path

URI = "./photo-search.db"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path, help="folder of a trained encoder")
    parser.add_argument("pictures", type=Path, help="folder of pictures")
    parser.add_argument("text", help="what to look for")
    options = parser.parse_args(arguments)

    ef = CrossModalHashEmbeddingFunction(options.encoder)
    folder = options.pictures.resolve()
    collection = f"photos_{hashlib.sha256(bytes(folder)).hexdigest()[:16]}"
    with HashCollection.open_or_create(URI, collection, ef.encoder) as photos:
        report = ingest_items(photos, read_items(folder), ef.encoder, manifest=manifest_path(URI, collection))
        print(f"{report.sent} pictures encoded, {report.skipped} known, {len(report.failures)} unreadable")
        (hits,) = photos.search(ef.encode_queries([options.text]), limit=5, modality="image", output_fields=["uri"])
        for hit in hits:
            print(f"{hit.distance:3d} bits  {hit.fields['uri']}")


if __name__ == "__main__":
    main()
