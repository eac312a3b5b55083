"""The quick start's data: 1,852 emoji, each a picture, a text and labels, inside the package.

Pictures are Microsoft's Fluent Emoji, names and groups come from unicode-emoji-json, keywords from emojilib; all
under the MIT licence. `emoji_data/PROVENANCE.md` says how they were made.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cmh_milvus.datasets.base import Item, PairedDataset, Split
from cmh_milvus.errors import DataError

EMOJI_FOLDER = Path(__file__).resolve().parent / "emoji_data"
EMOJI_FEATURES = EMOJI_FOLDER / "features"  # a feature cache of EfficientNet-Lite2 and all-MiniLM-L6-v2, float16


def load_emoji() -> PairedDataset:
    """The emoji pairs in Unicode order, 67 labels, with a fixed split: 200 queries, the rest is database and train.

    No validation rows are cut; `cut_validation` does that.

    Raises:
        DataError: The package's data files are missing or changed.

    Example:
        >>> emoji = load_emoji()
        >>> len(emoji), emoji.items[0].id, emoji.items[0].text, emoji.items[0].labels
        (1852, '1f600', 'grinning face smile happy joy :D smiley', ('face', 'smile', 'smileys_emotion'))
    """
    try:
        lines = (EMOJI_FOLDER / "emoji.jsonl").read_text(encoding="utf-8").splitlines()
        held_out = set((EMOJI_FOLDER / "query_ids.txt").read_text(encoding="ascii").split())
        rows = [json.loads(line) for line in lines]
        items = tuple(
            Item(
                id=row["id"],
                image=EMOJI_FOLDER / row["image"],
                text=row["text"],
                labels=tuple(row["labels"]),
                fields={key: row[key] for key in ("emoji", "name", "group")},
            )
            for row in rows
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the emoji data of the package are damaged ({error}): install cmh-milvus again") from error
    is_query = np.array([item.id in held_out for item in items], dtype=np.bool_)
    database = np.flatnonzero(~is_query).astype(np.int64)
    return PairedDataset(
        name="emoji",
        items=items,
        label_names=tuple(sorted({label for item in items for label in item.labels})),
        split=Split(
            query=np.flatnonzero(is_query).astype(np.int64),
            database=database,
            train=database,
            validation=np.zeros(0, dtype=np.int64),
        ),
    )
