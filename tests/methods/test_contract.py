"""What every method keeps to, found by `list_methods()`: a new one is tested without an edit here."""

import dataclasses
import importlib
import json
import math
import sys
import typing

import numpy as np
import pytest
import torch

import cmh_milvus.methods
from cmh_milvus.codes import binarize, pack
from cmh_milvus.encoders.encoder import CrossModalHashEncoder, Tower
from cmh_milvus.errors import SettingsError
from cmh_milvus.methods import get_method, list_methods, make_config
from cmh_milvus.methods.base import Method, TrainData
from cmh_milvus.metrics import mean_average_precision
from cmh_milvus.ranking import distance_table
from cmh_milvus.training import TrainingSettings, relaxed_codes, train
from tests.methods.conftest import small_settings

N_BITS = 16
BLIND = {"random_projection"}  # at chance across modalities by construction
METHODS = list_methods()
ITERATIVE = [name for name in METHODS if not get_method(name).closed_form]
FROM_PAIRS = [name for name in METHODS if get_method(name).supervision == "pairs"]


class UntouchableLabels(torch.Tensor):
    """Labels that may be handed on by rows, and raise when anything is computed with them."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__getitem__, torch.Tensor.__len__, torch.Tensor.__repr__):
            return super().__torch_function__(function, types, args, kwargs)
        raise AssertionError(f"labels were touched by {function}")


@pytest.fixture(scope="module")
def trained(small_emoji):
    """Every method, trained once on the small set."""
    made = {}

    def get(name):
        if name not in made:
            settings = small_settings(get_method(name))
            made[name] = train(small_emoji, TrainingSettings(name, N_BITS, settings, device="cpu"))
        return made[name]

    return get


def make(name, data):
    torch.manual_seed(0)
    method = get_method(name)
    return method(data, N_BITS, make_config(method, small_settings(method)))


def batches_of_each_phase(method, data):
    """Two batches of each phase of the first and last epochs, with the optimizers stepped."""
    optimizers = method.optimizers()
    for epoch in (0, method.epochs(method.config, len(data)) - 1):
        for phase in method.phases(epoch):
            for index in torch.arange(64).split(32):
                for step in method.steps(data.rows(index), phase):
                    yield optimizers, step
                    optimizers[step.optimizer].zero_grad()
                    torch.stack(list(step.terms.values())).sum().backward()
                    optimizers[step.optimizer].step()
            method.end_phase(phase)
        method.end_epoch(epoch)


@pytest.mark.parametrize("name", METHODS)
def test_says_what_it_is(name):
    method = get_method(name)
    assert method.name == name
    assert method.supervision in typing.get_args(typing.Literal["labels", "pairs"])
    assert method.citation.url.startswith("https://")
    assert method.citation.authors
    assert method.citation.title
    assert 1990 < method.citation.year < 2100
    assert sys.modules[method.__module__].__doc__
    assert "Departures" in sys.modules[method.__module__].__doc__


@pytest.mark.parametrize("name", METHODS)
def test_config_is_frozen_documented_and_round_trips_through_json(name):
    method = get_method(name)
    config = method.Config()
    assert method.Config(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert make_config(method, {key: str(value) for key, value in dataclasses.asdict(config).items()}) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.epochs = 1
    for field in dataclasses.fields(config):
        assert method.closed_form or f"{field.name}:" in method.Config.__doc__, field.name
    with pytest.raises(SettingsError, match="no setting"):
        make_config(method, {"no_such": 1})


@pytest.mark.parametrize("name", METHODS)
def test_a_number_that_cannot_be_is_refused_by_name(name):
    method = get_method(name)
    for field in dataclasses.fields(method.Config):
        if isinstance(field.default, float):
            impossible = (-0.1, math.nan, math.inf)
        elif isinstance(field.default, int) and not isinstance(field.default, bool):
            impossible = (-1,)
        else:
            continue
        for value in impossible:
            with pytest.raises(SettingsError, match=rf"setting {field.name} of method {name} is .*, got {value}"):
                make_config(method, {field.name: value})


@pytest.mark.parametrize(
    ("name", "setting", "value", "expected"),
    [
        ("duet", "hidden", 0, "at least 1"),
        ("duet", "tau_label", 0, "above 0"),
        ("cca_itq", "ridge", 0.0, "above 0"),
        ("ucch", "epochs", 0, "at least 1"),
        ("dcmh", "dropout", 1.5, "between 0 and 1"),
        ("cirh", "kept", 1.1, "between 0 and 1"),
    ],
)
def test_bounds_of_a_setting(name, setting, value, expected):
    with pytest.raises(SettingsError, match=f"{setting} of method {name} is {expected}, got {value}"):
        make_config(get_method(name), {setting: value})
    assert make_config(get_method("duet"), {"epochs": 0}).epochs == 0, "0 is a choice of its own there"


def test_a_batch_of_one_is_refused_before_anything_runs():
    with pytest.raises(SettingsError, match="batch_size is at least 2, got 1"):
        make_config(get_method("dcmh"), {"batch_size": "1"})
    assert make_config(get_method("cca_itq"), {"batch_size": 1}).batch_size == 1, "a closed form has no batches"


@pytest.mark.parametrize("name", ITERATIVE)
def test_steps_have_finite_terms_and_name_declared_optimizers(name, small_train_data):
    method = make(name, small_train_data).train()
    seen = 0
    for optimizers, step in batches_of_each_phase(method, small_train_data):
        seen += 1
        assert step.optimizer in optimizers
        assert step.terms
        for term, value in step.terms.items():
            assert value.ndim == 0, term
            assert torch.isfinite(value), term
        assert sum(value.requires_grad for value in step.terms.values())
    assert seen
    for progress in (0.0, 0.3, 0.999):
        rates = method.learning_rates(progress)
        assert rates.keys() <= method.optimizers().keys()
        assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize("name", ITERATIVE)
def test_each_optimizer_moves_weights_and_none_moves_buffers_of_the_features(name, small_train_data):
    method = make(name, small_train_data).train()
    scalings = [head.scaling for head in (method.image_head, method.text_head)]
    before = {key: value.clone() for key, value in method.named_parameters()}
    statistics = [{key: value.clone() for key, value in s.state_dict().items()} for s in scalings]
    used = {step.optimizer for _, step in batches_of_each_phase(method, small_train_data)}
    assert used == set(method.optimizers())
    assert any(not torch.equal(before[key], value) for key, value in method.image_head.named_parameters("image_head"))
    assert any(not torch.equal(before[key], value) for key, value in method.text_head.named_parameters("text_head"))
    for scaling, kept in zip(scalings, statistics, strict=True):
        assert all(torch.equal(value, kept[key]) for key, value in scaling.state_dict().items())


@pytest.mark.parametrize("name", FROM_PAIRS)
def test_methods_of_pairs_never_touch_labels(name, small_train_data):
    labels = small_train_data.labels.as_subclass(UntouchableLabels)
    with pytest.raises(AssertionError, match="touched"):
        _ = labels + 1
    data = TrainData(small_train_data.image, small_train_data.text, labels)
    method = make(name, data)
    if method.closed_form:
        method.fit(data, torch.Generator().manual_seed(0))
    else:
        for _, _ in batches_of_each_phase(method.train(), data):
            pass


@pytest.mark.parametrize("name", METHODS)
def test_saved_heads_give_identical_codes(name, trained, small_emoji, tmp_path):
    heads = {"image": trained(name).image_head, "text": trained(name).text_head}
    features = {"image": small_emoji.image, "text": small_emoji.text}
    towers = [Tower({"name": "features"}, head) for head in heads.values()]
    CrossModalHashEncoder(*towers, device="cpu").save_pretrained(tmp_path / "encoder", training=trained(name).record)
    loaded = CrossModalHashEncoder.from_pretrained(tmp_path / "encoder", device="cpu")
    for modality, head in heads.items():
        expected = pack(binarize(relaxed_codes(head, features[modality])))
        assert np.array_equal(loaded.packed_codes(modality, features[modality]), expected)


@pytest.mark.parametrize("name", METHODS)
def test_code_of_an_item_does_not_depend_on_its_batch(name, trained, small_emoji):
    for head, features in ((trained(name).image_head, small_emoji.image), (trained(name).text_head, small_emoji.text)):
        rows = small_emoji.split.query
        with torch.inference_mode():
            whole = head(torch.from_numpy(features[rows]))
            single = torch.cat([head(torch.from_numpy(features[row : row + 1])) for row in rows])
        # Sums are taken in another order; only activations within rounding of 0 may change their side.
        scale = min(1.0, float(whole.std()))
        assert torch.allclose(whole, single, atol=1e-4 * scale, rtol=1e-4)
        decided = whole.abs() > 1e-3 * scale
        assert decided.float().mean() > 0.95
        assert torch.equal((whole >= 0)[decided], (single >= 0)[decided])


@pytest.mark.parametrize("name", METHODS)
def test_training_beats_chance(name, trained, small_emoji):
    split, labels = small_emoji.split, small_emoji.labels
    heads = {
        "image": (trained(name).image_head, small_emoji.image),
        "text": (trained(name).text_head, small_emoji.text),
    }
    codes = {key: pack(binarize(relaxed_codes(head, features))) for key, (head, features) in heads.items()}
    for one, other in (("image", "text"), ("text", "image")):
        query_labels, database_labels = labels[split.query], labels[split.database]
        codes_of = codes[one][split.query], codes[other][split.database]
        score = mean_average_precision(distance_table(*codes_of, query_labels, database_labels))
        shuffled = np.random.default_rng(0).permutation(codes_of[1])
        chance = mean_average_precision(distance_table(codes_of[0], shuffled, query_labels, database_labels))
        if name not in BLIND:
            assert score > chance + 0.03, f"{one} to {other}: {score:.3f} against {chance:.3f}"
        assert 0 < score <= 1


@pytest.mark.parametrize("name", METHODS)
def test_tokens_are_trained_on_saved_and_encoded_alone(name, small_tokens, tmp_path):
    settings = small_settings(get_method(name)) | ({} if get_method(name).closed_form else {"epochs": 2})
    trained = train(small_tokens, TrainingSettings(name, N_BITS, settings, device="cpu"))
    assert all(np.isfinite(value) for entry in trained.record["history"] for value in entry.values())
    towers = [
        Tower({"spec": f"precomputed:5x{features.shape[2]}", "name": "precomputed"}, head)
        for head, features in ((trained.image_head, small_tokens.image), (trained.text_head, small_tokens.text))
    ]
    CrossModalHashEncoder(*towers, device="cpu").save_pretrained(tmp_path / "encoder")
    loaded = CrossModalHashEncoder.from_pretrained(tmp_path / "encoder", device="cpu")
    rows = small_tokens.split.query[:9]
    for modality, head, features in (
        ("image", trained.image_head, small_tokens.image[rows]),
        ("text", trained.text_head, small_tokens.text[rows]),
    ):
        together = loaded.encode_features(modality, features)
        np.testing.assert_array_equal(together, relaxed_codes(head, features))
        alone = np.concatenate([loaded.encode_features(modality, item[None]) for item in features])
        np.testing.assert_allclose(together, alone, atol=1e-4)


def test_unknown_method_is_refused_with_the_known_names():
    with pytest.raises(SettingsError, match="duet"):
        get_method("no_such_method")


SEVENTH = '''
"""A method in a file of its own. Departures: none."""
from dataclasses import dataclass
import torch
from cmh_milvus.encoders.hash_head import HashHead, HashHeadConfig
from cmh_milvus.methods.base import Citation, Method, Step

@dataclass(frozen=True)
class Config:
    epochs: int = 2
    batch_size: int = 50

class Seventh(Method):
    name = "{name}"
    supervision = "pairs"
    citation = Citation("A", "T", "V", 2026, "https://example.org")
    Config = Config

    def __init__(self, train, n_bits, config):
        super().__init__(train, n_bits, config)
        self.image_head = HashHead(HashHeadConfig(train.image.shape[1], n_bits))
        self.text_head = HashHead(HashHeadConfig(train.text.shape[1], n_bits))

    def optimizers(self):
        return {{"both": torch.optim.Adam(self.parameters(), lr=1e-3)}}

    def steps(self, batch, phase):
        image, text = torch.tanh(self.image_head(batch.image)), torch.tanh(self.text_head(batch.text))
        yield Step("both", {{"distance": (image - text).square().mean()}})
'''


def test_method_file_dropped_into_the_package_is_found(tmp_path, monkeypatch, small_emoji):
    (tmp_path / "seventh.py").write_text(SEVENTH.format(name="seventh"))
    monkeypatch.setattr(cmh_milvus.methods, "__path__", [*cmh_milvus.methods.__path__, str(tmp_path)])
    assert list_methods() == sorted([*METHODS, "seventh"])
    assert get_method("seventh").name == "seventh"
    trained = train(small_emoji, TrainingSettings("seventh", N_BITS, device="cpu"))
    assert trained.record["method"] == "seventh"
    monkeypatch.delitem(sys.modules, "cmh_milvus.methods.seventh")


def test_method_of_an_installed_plugin_is_found(tmp_path, monkeypatch):
    (tmp_path / "their_plugin.py").write_text(SEVENTH.format(name="theirs"))
    metadata = tmp_path / "their_plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-plugin\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[cmh_milvus.methods]\ntheirs = their_plugin:Seventh\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert "theirs" in list_methods()
    method = get_method("theirs")
    assert issubclass(method, Method)
    assert method.name == "theirs"
    monkeypatch.delitem(sys.modules, "their_plugin")
    (tmp_path / "their_plugin.py").write_text("import a_package_that_is_gone")
    importlib.invalidate_caches()
    with pytest.raises(SettingsError, match=r"'theirs' of an installed plugin .*a_package_that_is_gone"):
        get_method("theirs")
