"""Training backbones along with heads: the gradient, who learns from what, and the encoder that comes out."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import mse_loss

from cmh_milvus.codes import binarize
from cmh_milvus.datasets.base import PairedFeatures, Split
from cmh_milvus.encoders.backbones import BagOfWords, load_backbone
from cmh_milvus.encoders.encoder import CrossModalHashEncoder, Tower
from cmh_milvus.encoders.hash_head import relaxed_codes
from cmh_milvus.errors import ArtefactError, SettingsError
from cmh_milvus.fine_tuning import MAX_GRADIENT, WEIGHT_DECAY, FineTuning
from cmh_milvus.methods import get_method, list_methods
from cmh_milvus.methods.base import TrainData
from cmh_milvus.methods.ugach import UGACH
from cmh_milvus.training import TrainingSettings, train
from tests.methods.conftest import small_settings

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 210)}
N = 36
LEARNERS = [name for name in list_methods() if not get_method(name).closed_form]


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """Noisy pictures of three colours, and a text on each."""
    rng = np.random.default_rng(0)
    folder, pictures, texts = tmp_path_factory.mktemp("colours"), [], []
    for i in range(N):
        name = list(COLOURS)[i % 3]
        noise = rng.integers(-30, 31, (32, 32, 3))
        pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        pictures.append(folder / f"{i}.png")
        Image.fromarray(pixels).save(pictures[-1])
        texts.append(f"{name} no {rng.integers(100)}")
    return pictures, texts


def backbones_of(folder, tokens=False, device="cpu"):
    spec = f"clip{'-tokens' if tokens else ''}:{folder}"
    return load_backbone(spec, "image", device), load_backbone(spec, "text", device)


def features_of(items, backbones, n_validation=6):
    pictures, texts = items
    order = np.random.default_rng(0).permutation(N)
    query, validation, rest = order[:6], order[6 : 6 + n_validation], order[6 + n_validation :]
    return PairedFeatures(
        name="colours",
        ids=[str(i) for i in range(N)],
        image=backbones[0].encode([Image.open(path) for path in pictures]),
        text=backbones[1].encode(texts),
        labels=np.eye(3, dtype=bool)[np.arange(N) % 3],
        label_names=tuple(COLOURS),
        split=Split(*(np.sort(rows) for rows in (query, order[6:], rest, validation))),
        fingerprint="colours",
    )


@pytest.fixture(scope="module")
def clip(clip_folder, items):
    backbones = backbones_of(clip_folder)
    return backbones, features_of(items, backbones)


def settings(method="duet", **changed):
    small = small_settings(get_method(method)) | {"epochs": 2, "batch_size": 16}
    first = {"pretraining": 1} if "pretraining" in small else {}  # UGACH's rounds must get their turn
    chosen = small | first | changed
    left_open = {"pair_weight": 0.12} if method == "duet" else {}
    return TrainingSettings(method, 16, left_open | chosen, device="cpu", validate_every=1)


def weights_of(backbone):
    return {key: value.clone() for key, value in backbone.weights().items()}


def changed(before, after):
    return {key for key in after if not torch.equal(before[key], after[key])}


def test_one_update_is_that_of_the_whole_graph(clip, items):
    """Against torch's own gradient through backbones, heads and two updates; the batch is larger than a backbone's."""
    backbones, data = clip
    rows = np.arange(20)
    index = torch.tensor([3, 0, 19, 7, 11, 2, 5, 8, 12, 1, 4])
    torch.manual_seed(0)
    heads = [torch.nn.Linear(12, 8) for _ in range(2)]

    def losses(image, text):
        """Of two updates; the second would see moved heads, were there an optimizer."""
        a, b = torch.tanh(heads[0](image)), torch.tanh(heads[1](text))
        yield 30 * mse_loss(a, b)
        yield 30 * (a @ b.T).square().mean()

    tuning = FineTuning(*backbones, *items, rate=1e-3)
    optimizer = tuning.start()
    kept = TrainData(torch.from_numpy(data.image[rows]), torch.from_numpy(data.text[rows]), None)
    batch = tuning.train_data(kept, rows).rows(index)
    for position in range(2):
        list(losses(batch.image, batch.text))[position].backward()
        tuning.after_step({"image", "text"})
    tuning.after_batch(optimizer)

    whole = [backbone.trainable() for backbone in backbones]
    pictures = [Image.open(items[0][rows[i]]).convert("RGB") for i in index]
    image, text = (
        whole[0].features(whole[0].inputs(pictures)),
        whole[1].features(whole[1].inputs([items[1][rows[i]] for i in index])),
    )
    sum(losses(image, text)).backward()
    parameters = [parameter for one in whole for parameter in one.net.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT)
    assert norm > 2 * MAX_GRADIENT, "the gradient is not cut: the test would not see whether it is"
    torch.optim.AdamW(parameters, lr=1e-3, weight_decay=WEIGHT_DECAY).step()
    for name, expected in zip(("image", "text"), whole, strict=True):
        assert changed(backbones[name == "text"].weights(), tuning.learning[name].weights())
        for mine, other in zip(tuning.learning[name].net.parameters(), expected.net.parameters(), strict=True):
            if other.grad is not None:
                torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-7)


def test_backbone_learns_only_from_updates_that_move_its_head(clip, items):
    backbones, _ = clip
    tuning = FineTuning(*backbones, *items, rate=1e-2)
    for moved in (set(), {"image"}, {"text"}):
        optimizer = tuning.start()
        batch = tuning.train_data(TrainData(torch.zeros(N, 12), torch.zeros(N, 12), None), np.arange(N)).rows(
            torch.arange(8)
        )
        (batch.image * batch.text).sum().backward()
        tuning.after_step(moved)
        before = {name: weights_of(one) for name, one in tuning.learning.items()}
        tuning.after_batch(optimizer)
        learned = {name for name, one in tuning.learning.items() if changed(before[name], one.weights())}
        assert learned == moved


def test_targets_stay_and_only_what_is_read_is_computed(clip, items, monkeypatch):
    backbones, data = clip
    tuning = FineTuning(*backbones, *items)
    tuning.start()
    kept = TrainData(torch.from_numpy(data.image), torch.from_numpy(data.text), torch.from_numpy(data.labels).float())
    fresh = tuning.train_data(kept, np.arange(N))
    with torch.no_grad():
        for parameter in tuning.learning["image"].net.parameters():
            parameter.add_(0.1)
    monkeypatch.setattr(tuning.learning["text"], "features", lambda inputs: pytest.fail("texts were not asked for"))
    batch = fresh.rows(torch.tensor([4, 2]))
    assert len(batch) == 2
    assert torch.equal(batch.labels, kept.labels[[4, 2]])
    assert torch.equal(batch.image_vectors, kept.image[[4, 2]])
    assert torch.equal(batch.text_vectors, kept.text[[4, 2]])
    assert not torch.allclose(batch.image, kept.image[[4, 2]], atol=1e-2)
    assert batch.image.requires_grad
    assert batch.image is batch.image
    assert torch.equal(fresh.image, kept.image)


def test_rows_beyond_the_batch_are_fresh_too(clip, items, monkeypatch):
    """UGACH's positives go through the same net as the batch."""
    backbones, data = clip
    steps, moved = UGACH.steps, []

    def spied(method, batch, phase):
        positives = method.train_data.rows(batch.index.flip(0))
        torch.testing.assert_close(positives.image, batch.image.flip(0))
        torch.testing.assert_close(positives.text, batch.text.flip(0))
        moved.append(not torch.equal(batch.image_vectors, batch.image.flatten(1)))
        yield from steps(method, batch, phase)

    monkeypatch.setattr(UGACH, "steps", spied)
    train(data, settings("ugach"), tuning=FineTuning(*backbones, *items, rate=1e-3))
    assert any(moved)


def test_validation_sees_the_tuned_backbones(clip, items):
    """Features that training began with tell two kinds of items apart; the backbones tell more."""
    backbones, data = clip
    two = {name: getattr(data, name)[np.arange(N) % 2] for name in ("image", "text")}
    trained = train(dataclasses.replace(data, **two), settings(), tuning=FineTuning(*backbones, *items, rate=1e-3))
    assert min(entry["distinct"] for entry in trained.record["history"]) > 3 / N


@pytest.mark.parametrize("method", LEARNERS)
def test_every_method_that_learns_by_epochs(clip, items, method, tmp_path):
    """The encoder's folder gives the codes that training ended with, for each item alone."""
    backbones = clip[0]
    data = features_of(items, backbones, n_validation=0)
    before = [weights_of(one) for one in backbones]
    tuning = FineTuning(*backbones, *items, rate=1e-3)
    trained = train(data, settings(method), tuning=tuning)
    assert trained.record["backbone_rate"] == 1e-3
    assert set(trained.backbones) == {"image", "text"}
    for one, old in zip(backbones, before, strict=True):
        assert not changed(old, one.weights()), "the backbone that was given has changed"
        assert len(changed(old, trained.backbones[one.modality].weights())) > 10
    everything = np.arange(N)
    expected = {
        "image": relaxed_codes(trained.image_head, tuning.encode("image", everything)),
        "text": relaxed_codes(trained.text_head, tuning.encode("text", everything)),
    }
    encoder = CrossModalHashEncoder(
        Tower.of(trained.backbones["image"], trained.image_head),
        Tower.of(trained.backbones["text"], trained.text_head),
        device="cpu",
    )
    encoder.save_pretrained(tmp_path / "encoder", training=trained.record)
    loaded = CrossModalHashEncoder.from_pretrained(tmp_path / "encoder", device="cpu")
    assert loaded.fingerprint == encoder.fingerprint
    np.testing.assert_allclose(loaded.encode_images(items[0]), expected["image"], atol=1e-5)
    np.testing.assert_allclose(loaded.encode_texts(items[1]), expected["text"], atol=1e-5)
    np.testing.assert_allclose(loaded.encode_texts(items[1][:1]), expected["text"][:1], atol=1e-5)


def test_learns_what_heads_alone_cannot(clip, items):
    """The same small heads, on features that hardly tell the colours apart, and with their backbones."""
    backbones = clip[0]
    data = features_of(items, backbones, n_validation=0)
    chosen = settings("dcmh", epochs=40, hidden=8, dropout=0.0)
    loss = {}
    for name, tuning in (("head", None), ("full", FineTuning(*backbones, *items, rate=1e-3))):
        last = train(data, chosen, tuning=tuning).record["history"][-1]
        loss[name] = sum(value for term, value in last.items() if term != "epoch")
    assert loss["full"] < 0.95 * loss["head"]


def test_tokens_are_tuned_too(clip_folder, items):
    backbones = backbones_of(clip_folder, tokens=True)
    trained = train(features_of(items, backbones), settings("mith"), tuning=FineTuning(*backbones, *items, rate=1e-3))
    for one in backbones:
        assert changed(one.weights(), trained.backbones[one.modality].weights())


def test_words_stay_and_pictures_are_tuned(clip_folder, items):
    """DCMH's own setting: a network for pictures, a bag of words for texts."""
    backbones = load_backbone(f"clip:{clip_folder}", "image", "cpu"), BagOfWords().fit(items[1])
    trained = train(features_of(items, backbones), settings("dcmh"), tuning=FineTuning(*backbones, *items, rate=1e-3))
    assert set(trained.backbones) == {"image"}


def test_packaged_networks_are_tuned(backbones, items):
    """EfficientNet and MiniLM keep their statistics of batch normalisation."""
    tuning = FineTuning(*backbones, *items, rate=1e-3)
    optimizer = tuning.start()
    kept = TrainData(torch.zeros(N, 1280), torch.zeros(N, 384), None)
    batch = tuning.train_data(kept, np.arange(N)).rows(torch.arange(3))
    (batch.image.square().mean() + batch.text.square()[:, :5].mean()).backward()
    tuning.after_step({"image", "text"})
    tuning.after_batch(optimizer)
    for one in backbones:
        keys = changed(one.weights(), tuning.learning[one.modality].weights())
        assert len(keys) > 50
        assert not [key for key in keys if "running_" in key or "num_batches" in key]


def test_resumed_run_is_the_unbroken_one(clip, items, tmp_path):
    backbones, data = clip
    chosen = settings("dsph", epochs=4)

    def run(checkpoint=None, progress=None):
        tuning = FineTuning(*backbones, *items, rate=1e-3)
        return train(data, chosen, tuning=tuning, checkpoint=checkpoint, progress=progress)

    for broken in ("select", "refit"):
        checkpoint = tmp_path / f"{broken}.pt"

        def stop(epoch, epochs, note, broken=broken):
            if epoch == 3 and note.startswith(broken):
                raise KeyboardInterrupt

        unbroken = run()
        if unbroken.record["chosen_epoch"] < 3 and broken == "refit":
            pytest.fail("the refit is too short to be interrupted: choose another seed")
        with pytest.raises(KeyboardInterrupt):
            run(checkpoint, stop)
        resumed = run(checkpoint)
        for name, one in unbroken.backbones.items():
            assert not changed(one.weights(), resumed.backbones[name].weights())
            assert one.revision == resumed.backbones[name].revision
    checkpoint.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, stop)
    with pytest.raises(SettingsError, match="other data or settings"):
        train(data, chosen, checkpoint=checkpoint)  # without its backbones


def test_without_refit_the_chosen_epochs_backbones_are_kept(clip, items):
    """Also where another setting was tried after the chosen one."""
    backbones, data = clip
    tuning = FineTuning(*backbones, *items, rate=1e-3)
    both = TrainingSettings("duet", 16, {"hidden": 16, "epochs": 2}, device="cpu", refit=False)
    trained = train(data, both, tuning=tuning)
    alone = {"pair_weight": trained.record["config"]["pair_weight"], "hidden": 16, "epochs": 2}
    again = train(
        data,
        TrainingSettings("duet", 16, alone, device="cpu", refit=False),
        tuning=FineTuning(*backbones, *items, rate=1e-3),
    )
    assert trained.backbones["image"].revision == again.backbones["image"].revision
    assert trained.backbones["text"].revision == again.backbones["text"].revision


@pytest.fixture(scope="module")
def tuned_folder(clip, items, tmp_path_factory):
    backbones, data = clip
    trained = train(data, settings(), tuning=FineTuning(*backbones, *items, rate=1e-3))
    folder = tmp_path_factory.mktemp("tuned") / "encoder"
    heads = {"image": trained.image_head, "text": trained.text_head}
    towers = (Tower.of(trained.backbones[name], head) for name, head in heads.items())
    CrossModalHashEncoder(*towers, device="cpu").save_pretrained(folder, training=trained.record)
    return folder


def test_description_says_that_it_is_tuned(tuned_folder, clip):
    config = json.loads((tuned_folder / "config.json").read_text())["towers"]["image"]["backbone"]
    original = clip[0][0].config()
    assert config["name"] == f"{original['name']}, fine-tuned"
    assert config["revision"].startswith(f"{original['revision']}+")
    assert {k: v for k, v in config.items() if k not in ("name", "revision")} == {
        k: v for k, v in original.items() if k not in ("name", "revision")
    }
    assert "fine-tuned" in (tuned_folder / "README.md").read_text()
    loaded = CrossModalHashEncoder.from_pretrained(tuned_folder, device="cpu")
    assert loaded.backbone("image").config() == config


def test_shorter_codes_keep_the_tuned_backbones(tuned_folder, items):
    whole = CrossModalHashEncoder.from_pretrained(tuned_folder, device="cpu")
    texts = binarize(whole.truncated(8).encode_texts(items[1]))
    assert np.array_equal(texts, binarize(whole.encode_texts(items[1]))[:, :8])


def test_tuned_weights_that_are_gone_or_changed(tuned_folder, tmp_path):
    import shutil

    weights = load_file(tuned_folder / "model.safetensors")
    key = next(k for k in weights if k.startswith("text_backbone."))
    own = {k: v for k, v in weights.items() if not k.startswith("text_backbone.")}
    cases = {
        "not in the encoder's folder": own,
        "do not fit": {k: v for k, v in weights.items() if k != key},
        "damaged": weights | {key: weights[key] + 1},
    }
    for number, (message, content) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        shutil.copytree(tuned_folder, folder)
        save_file(content, folder / "model.safetensors")
        encoder = CrossModalHashEncoder.from_pretrained(folder, device="cpu")
        assert encoder.backbone("image")
        with pytest.raises(ArtefactError, match=message):
            encoder.encode_texts(["red"])


def test_refusals(clip, items):
    backbones, data = clip
    with pytest.raises(SettingsError, match="closed form"):
        train(data, TrainingSettings("cca_itq", 8), tuning=FineTuning(*backbones, *items))
    with pytest.raises(SettingsError, match="above 0"):
        FineTuning(*backbones, *items, rate=0)
    with pytest.raises(SettingsError, match="nothing to fine-tune"):
        FineTuning(load_backbone("precomputed:12", "image"), BagOfWords().fit(items[1]), *items)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", LEARNERS)
def test_trains_on_cuda(clip_folder, items, method):
    backbones = backbones_of(clip_folder, device="cuda")
    data = features_of(items, backbones)
    chosen = dataclasses.replace(settings(method), device="cuda")
    trained = train(data, chosen, tuning=FineTuning(*backbones, *items, rate=1e-3))
    for one in backbones:
        assert changed(one.weights(), trained.backbones[one.modality].weights())
