"""The encoder and its folder."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cmh_milvus.codes import binarize, pack
from cmh_milvus.device import resolve_device
from cmh_milvus.encoders.encoder import CrossModalHashEncoder, Tower
from cmh_milvus.encoders.hash_head import Dropout, HashHead, HashHeadConfig
from cmh_milvus.errors import ArtefactError, PictureError, SettingsError, UnsafeFile


@pytest.fixture
def folder(encoder_folder, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(encoder_folder, tmp_path / "copy")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_loaded_encoder_gives_the_saved_codes(encoder, trained, emoji_features):
    from cmh_milvus.training import relaxed_codes

    for modality, head, features in (
        ("image", trained.image_head, emoji_features.image),
        ("text", trained.text_head, emoji_features.text),
    ):
        np.testing.assert_array_equal(
            encoder.packed_codes(modality, features), pack(binarize(relaxed_codes(head, features)))
        )


def test_code_depends_on_the_item_alone(encoder, emoji, emoji_features):
    """Not on the batch, not on the other modality (the towers share nothing)."""
    pictures = [item.image for item in emoji.items[:5]]
    texts = [item.text for item in emoji.items[:5]]
    for encode, items in ((encoder.encode_images, pictures), (encoder.encode_texts, texts)):
        together = encode(items)
        alone = np.concatenate([encode([item]) for item in items])
        np.testing.assert_allclose(together, alone, atol=1e-4)
        decided = np.abs(together) > 1e-3
        np.testing.assert_array_equal(binarize(together)[decided], binarize(alone)[decided])
    features = emoji_features.image
    shuffled = np.random.default_rng(0).permutation(len(features))
    whole = encoder.encode_features("image", features)
    np.testing.assert_allclose(encoder.encode_features("image", features[shuffled]), whole[shuffled], atol=1e-5)


def test_pixels_and_words_lead_to_the_codes_of_the_cached_features(encoder, emoji, emoji_features):
    rows = [3, 700, 1500]
    live_image = encoder.encode_images([emoji.items[row].image for row in rows])
    live_text = encoder.encode_texts([emoji.items[row].text for row in rows])
    np.testing.assert_allclose(live_image, encoder.encode_features("image", emoji_features.image[rows]), atol=0.05)
    np.testing.assert_allclose(live_text, encoder.encode_features("text", emoji_features.text[rows]), atol=0.05)


def test_folder_holds_no_pickle_and_what_the_design_says(encoder_folder):
    assert sorted(path.name for path in encoder_folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "training.json",
    ]  # fmt: skip
    for path in encoder_folder.iterdir():
        assert b"\x80\x04" not in path.read_bytes()[:2], "a pickle starts so"
    config = json.loads((encoder_folder / "config.json").read_text())
    assert config["format_version"] == 1
    assert (config["n_bits"], config["bit_order"], config["binarize"]) == (64, "msb_first", "h >= 0")
    assert config["towers"]["image"]["backbone"]["name"] == "efficientnet-lite2"
    assert "DUET" in (encoder_folder / "README.md").read_text()


def test_fingerprint_follows_weights_and_config_but_not_the_package_version(encoder, folder):
    same = CrossModalHashEncoder.from_pretrained(folder)
    assert same.fingerprint == encoder.fingerprint
    edit_config(folder, cmh_milvus_version="99")
    assert CrossModalHashEncoder.from_pretrained(folder).fingerprint == encoder.fingerprint
    weights = load_file(folder / "model.safetensors")
    weights["text.output.bias"] += 1e-3
    save_file(weights, folder / "model.safetensors")
    assert CrossModalHashEncoder.from_pretrained(folder).fingerprint != encoder.fingerprint


def test_unknown_format_names_the_release_that_reads_it(folder):
    edit_config(folder, format_version=7, cmh_milvus_version="3.1")
    with pytest.raises(ArtefactError, match=r"format 7.*reads format 1.*3\.1"):
        CrossModalHashEncoder.from_pretrained(folder)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_file(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ArtefactError, match=missing):
        CrossModalHashEncoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"[]"),
        ("config.json", b'{"format_version": 1}'),
        ("config.json", ("towers", "image", "head", "n_bits", 7)),
        ("config.json", ("towers", "text", "head", "dropout", 2)),
        ("config.json", ("towers", "text", "backbone", None)),
        ("model.safetensors", b"garbage"),
        ("model.safetensors", b""),
    ],
)
def test_damaged_file(folder, file, content):
    if isinstance(content, tuple):  # a path to a value, and the value
        config = json.loads((folder / file).read_text())
        *above, last, value = content
        functools.reduce(dict.__getitem__, above, config)[last] = value
        content = json.dumps(config).encode()
    (folder / file).write_bytes(content)
    with pytest.raises(ArtefactError):
        CrossModalHashEncoder.from_pretrained(folder)


def test_weights_of_another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["image.output.weight"] = weights["image.output.weight"][:32].contiguous()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ArtefactError, match="damaged"):
        CrossModalHashEncoder.from_pretrained(folder)


def test_other_bit_order(folder):
    edit_config(folder, bit_order="lsb_first")
    with pytest.raises(ArtefactError, match="lsb_first"):
        CrossModalHashEncoder.from_pretrained(folder)


def test_pickle_in_the_folder_is_refused(folder):
    torch.save({"a": 1}, folder / "extra.pt")
    with pytest.raises(UnsafeFile, match=r"extra\.pt") as caught:
        CrossModalHashEncoder.from_pretrained(folder)
    assert caught.value.exit_code == 4


def test_no_folder(tmp_path):
    with pytest.raises(ArtefactError, match="no encoder folder"):
        CrossModalHashEncoder.from_pretrained(tmp_path / "nothing")


def test_save_replaces_an_encoder_but_nothing_else(encoder, folder, tmp_path):
    (folder / "evaluation.json").write_text("{}")
    encoder.save_pretrained(folder)
    assert not (folder / "evaluation.json").exists(), "figures of the old encoder must not stay"
    assert not (folder / "training.json").exists()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_bytes(b"1")
    with pytest.raises(ArtefactError, match="no encoder folder"):
        encoder.save_pretrained(other)
    assert (other / "cat.jpg").exists()
    (other / "config.json").write_text('{"architectures": ["CLIPModel"]}')  # of another kind of model
    with pytest.raises(ArtefactError, match="no encoder folder"):
        encoder.save_pretrained(other)
    assert (other / "cat.jpg").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "photos"], "nothing half-written stays"


def test_save_into_a_file_says_so(encoder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot be written"):
        encoder.save_pretrained(tmp_path / "file" / "encoder")


def test_towers_of_two_lengths():
    def tower(n_bits):
        return Tower({}, HashHead(HashHeadConfig(4, n_bits)))

    with pytest.raises(SettingsError, match="one code length"):
        CrossModalHashEncoder(tower(8), tower(16))


@pytest.mark.parametrize("n_bits", [0, 7, 12, 40_000])
def test_impossible_code_length(n_bits):
    with pytest.raises(SettingsError, match="multiple of 8"):
        HashHeadConfig(4, n_bits)


def test_features_of_another_dimension(encoder):
    with pytest.raises(SettingsError, match=r"\(n, 1280\)"):
        encoder.encode_features("image", np.zeros((2, 3), dtype=np.float32))


def test_no_items(encoder):
    assert encoder.encode_features("text", np.zeros((0, 384), dtype=np.float32)).shape == (0, 64)
    assert encoder.packed_codes("text", np.zeros((0, 384), dtype=np.float32)).shape == (0, 8)


def test_single_item_is_a_type_error(encoder):
    with pytest.raises(TypeError, match=r"\[item\]"):
        encoder.encode_texts("a cat")


@pytest.mark.parametrize("single", [Path("a.png"), b"", Image.new("RGB", (2, 2))])
def test_single_picture_is_a_type_error(encoder, single):
    with pytest.raises(TypeError, match=r"\[item\]"):
        encoder.encode_images(single)


def test_few_pictures_are_in_memory_at_a_time(encoder, emoji, monkeypatch):
    paths = [item.image for item in emoji.items[::300]]
    whole = encoder.encode_images(paths)
    monkeypatch.setattr("cmh_milvus.encoders.encoder.PICTURES_AT_ONCE", 2)
    batches = []
    backbone = encoder.backbone("image")
    monkeypatch.setattr(backbone, "encode", lambda some, of=backbone.encode: batches.append(len(some)) or of(some))
    np.testing.assert_allclose(encoder.encode_images(path for path in paths), whole, atol=1e-5)
    assert batches == [2, 2, 2, 1]
    assert encoder.encode_images([]).shape == (0, 64)


def test_a_device_that_is_not_there_is_no_damage(folder):
    with pytest.raises(SettingsError, match="unknown device"):
        CrossModalHashEncoder.from_pretrained(folder, device="toaster")


def test_save_that_fails_leaves_the_old_encoder(encoder, folder, monkeypatch):
    def full_disk(weights, path):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: File too large (os error 27)")

    monkeypatch.setattr("cmh_milvus.encoders.encoder.save_file", full_disk)
    with pytest.raises(ArtefactError, match="File too large"):
        encoder.save_pretrained(folder)
    assert CrossModalHashEncoder.from_pretrained(folder).fingerprint == encoder.fingerprint
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_bad_picture(encoder, tmp_path):
    (tmp_path / "cat.jpg").write_text("meow")
    with pytest.raises(PictureError, match=r"cat\.jpg"):
        encoder.encode_images([tmp_path / "cat.jpg"])


def test_backbone_of_another_kind_is_refused(encoder, backbones):
    with pytest.raises(SettingsError, match="another backbone"):
        encoder.use_backbone("text", backbones[0])


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(SettingsError, match="unknown device"):
        resolve_device("toaster")
    for name in ("meta", "hpu"):
        with pytest.raises(SettingsError, match=f"computed on device '{name}'"):
            resolve_device(name)
    with pytest.raises(SettingsError, match="no device"):
        resolve_device("cuda:99")


def test_scaling_kinds():
    dense = HashHead(HashHeadConfig(3, 8)).scaling
    x = torch.tensor([[1.0, 5.0, 2.0], [3.0, 5.0, -2.0], [5.0, 5.0, 0.0]])
    dense.fit(x)
    scaled = dense(x)
    torch.testing.assert_close(scaled.mean(dim=0), torch.zeros(3))
    torch.testing.assert_close(scaled.std(dim=0, unbiased=False), torch.tensor([1.0, 0.0, 1.0]))

    words = torch.zeros(4, 6)
    words[:, 0] = 1  # in every text: says nothing
    words[0, 1] = 1
    words[1, 2] = 2
    sparse = HashHead(HashHeadConfig(6, 8)).scaling
    sparse.fit(words)
    assert bool(sparse.unit_length)
    assert sparse.weight[0] == 0
    assert sparse.weight[1] == pytest.approx(np.log(5 / 2))
    torch.testing.assert_close(sparse(words).norm(dim=1)[0], sparse(words).norm(dim=1)[1])
    assert torch.isfinite(sparse(torch.zeros(1, 6))).all()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(64, 301), (3, 5, 7), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_is_that_of_torch(share, shape, dtype):
    """Values, gradients, and what the generator gives next."""
    results = []
    for kind in (torch.nn.Dropout, Dropout):
        torch.manual_seed(1)
        features = torch.randn(shape, dtype=dtype).requires_grad_()
        dropped = kind(share)(features)
        (gradient,) = torch.autograd.grad(dropped.square().sum(), features)
        results.append([dropped.tolist(), gradient.tolist(), torch.rand(1).item()])
        assert torch.equal(kind(share).eval()(features), features)
    assert results[0] == results[1]


def test_truncated_codes_are_prefixes(encoder, emoji_features, tmp_path):
    short = encoder.truncated(16)
    short.save_pretrained(tmp_path / "short")
    loaded = CrossModalHashEncoder.from_pretrained(tmp_path / "short")
    for modality, features in (("image", emoji_features.image), ("text", emoji_features.text)):
        np.testing.assert_array_equal(
            loaded.packed_codes(modality, features), encoder.packed_codes(modality, features)[:, :2]
        )
    assert short.fingerprint == loaded.fingerprint != encoder.fingerprint
    with pytest.raises(SettingsError, match="no first 72"):
        encoder.truncated(72)
    with pytest.raises(SettingsError, match="multiple of 8"):
        encoder.truncated(12)
