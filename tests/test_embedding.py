"""The embedding function, and its use in plain pymilvus."""

import inspect
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cmh_milvus
from cmh_milvus import CrossModalHashEmbeddingFunction
from cmh_milvus.codes import from_bytes, hamming_distances
from cmh_milvus.errors import PictureError, SettingsError


@pytest.fixture(scope="module")
def ef(encoder):
    return CrossModalHashEmbeddingFunction(encoder)


def test_codes_are_bytes_of_dim_bits(ef, emoji):
    codes = ef.encode_texts(["red apple fruit", "a ship"])
    assert ef.dim == 64
    assert [type(code) for code in codes] == [bytes, bytes]
    assert {len(code) for code in codes} == {8}
    assert ef.encode_texts([]) == []
    assert ef([]) == []
    assert ef.fingerprint == ef.encoder.fingerprint


def test_every_kind_of_item_in_the_order_they_came(ef, emoji):
    path = emoji.items[10].image
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    items = [path, "a ship", path.read_bytes(), picture, "a ship"]
    codes = ef(items)
    assert codes[0] == codes[2] == codes[3] == ef.encode_images([path])[0]
    assert codes[1] == codes[4] == ef.encode_texts(["a ship"])[0]
    assert ef.encode_queries(items) == ef.encode_documents(items) == codes


def test_codes_equal_those_of_the_encoder(ef, emoji, emoji_features, emoji_codes):
    rows = [5, 50, 500]
    live = from_bytes(ef.encode_images([emoji.items[row].image for row in rows]))
    distances = np.diag(hamming_distances(live, emoji_codes["image"][rows]))
    assert (distances <= 2).all(), "shipped features are float16: an undecided bit may fall the other way"


@pytest.mark.parametrize("single", ["a ship", b"bytes", Path("a.png"), Image.new("RGB", (2, 2))])
def test_a_single_item_is_a_type_error(ef, single):
    with pytest.raises(TypeError, match=r"\[item\]"):
        ef(single)


def test_generators(ef, emoji):
    paths = [item.image for item in emoji.items[:3]]
    assert ef.encode_documents(path for path in paths) == ef.encode_images(iter(paths)) == ef(paths)
    assert ef.encode_queries(text for text in ["a", "b"]) == ef.encode_texts(iter(["a", "b"])) == ef(["a", "b"])


def test_names_of_files_are_no_pictures(ef):
    with pytest.raises(SettingsError, match=r"give Path\('apple\.jpg'\)"):
        ef.encode_images(["apple.jpg"])
    for single in ("apple.jpg", Path("apple.jpg"), b""):
        with pytest.raises(TypeError, match=r"\[item\]"):
            ef.encode_images(single)


def test_what_is_no_item(ef):
    with pytest.raises(SettingsError, match="cannot encode a int"):
        ef([3])


def test_unreadable_picture(ef):
    with pytest.raises(PictureError):
        ef([b"no picture"])


def test_has_what_functions_of_pymilvus_model_have(ef):
    """The duck type: `__call__` and `encode_queries` of one positional argument, `encode_documents`, `dim`."""
    for name, argument in (("encode_queries", "queries"), ("encode_documents", "documents")):
        assert list(inspect.signature(getattr(ef, name)).parameters) == [argument]
    assert len(inspect.signature(ef).parameters) == 1
    assert isinstance(ef.dim, int)


def test_ten_lines_of_plain_pymilvus(encoder_folder, emoji, tmp_path):
    """README's library example: no HashCollection."""
    from pymilvus import DataType, MilvusClient

    ef = CrossModalHashEmbeddingFunction(encoder_folder)
    client = MilvusClient(str(tmp_path / "plain.db"))
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("code", DataType.BINARY_VECTOR, dim=ef.dim)
    index = client.prepare_index_params()
    index.add_index("code", index_type="BIN_FLAT", metric_type="HAMMING")
    client.create_collection("emoji", schema=schema, index_params=index)
    some = emoji.items[::40]
    codes = ef.encode_documents([item.image for item in some])
    client.insert("emoji", [{"id": i, "code": code} for i, code in enumerate(codes)])
    (hits,) = client.search("emoji", data=ef.encode_queries(["red apple fruit"]), limit=5)
    client.close()

    exact = hamming_distances(from_bytes(ef.encode_texts(["red apple fruit"])), from_bytes(codes))[0]
    assert [int(hit["distance"]) for hit in hits] == sorted(exact)[:5]
    for hit in hits:
        assert exact[hit["id"]] == hit["distance"]


def test_public_names_are_what_can_be_imported():
    assert cmh_milvus.__all__ == sorted(cmh_milvus.__all__, key=str.lower) or set(cmh_milvus.__all__) == set(
        dir(cmh_milvus)
    )
    for name in cmh_milvus.__all__:
        assert getattr(cmh_milvus, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = cmh_milvus.nonsense
