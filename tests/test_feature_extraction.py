"""Features of pairs: what their fingerprint is made of, and pairs that cannot be read."""

import numpy as np

from cmh_milvus.datasets.base import Item, PairedDataset, Split
from cmh_milvus.feature_extraction import extract_pairs
from tests.encoders.test_feature_cache import CountingBackbone, png


def extracted(folder, split):
    items = tuple(Item(str(i), image=folder / f"{i}.png", text=f"text {i}") for i in range(4))
    return extract_pairs(PairedDataset("own", items), CountingBackbone("image"), CountingBackbone("text"), split=split)


def test_fingerprint_follows_the_pictures_and_which_pairs_were_read(tmp_path):
    """A checkpoint of other pictures under the same names must be told from its own."""
    rows = np.arange(4)
    split = Split(query=rows[:1], database=rows[1:], train=rows[1:], validation=rows[:0])
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(grey=i))
    first = extracted(tmp_path, split).features.fingerprint
    assert extracted(tmp_path, split).features.fingerprint == first
    (tmp_path / "2.png").write_bytes(png(grey=99))
    second = extracted(tmp_path, split).features.fingerprint
    (tmp_path / "2.png").write_bytes(b"no picture")
    third = extracted(tmp_path, split)
    assert len({first, second, third.features.fingerprint}) == 3
    assert [item for item, _ in third.failures] == ["2"]
    assert third.features.ids == ["0", "1", "3"]
    assert third.features.split.train.tolist() == [1, 2]
