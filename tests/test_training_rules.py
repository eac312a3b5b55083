"""The trainer's rules in detail, on random features: the score, rates, batches, looks, checkpoints."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from cmh_milvus import metrics, training
from cmh_milvus.codes import unpack
from cmh_milvus.datasets.base import PairedFeatures, Split
from cmh_milvus.errors import SettingsError
from cmh_milvus.methods import get_method, make_config
from cmh_milvus.methods.duet import Duet
from cmh_milvus.training import TrainingSettings, train


@pytest.fixture
def random_data(rng):
    """120 pairs of random features: 10 queries, 80 to train on, 30 to validate on."""
    labels = rng.random((120, 5)) < 0.3
    rows = rng.permutation(120)
    split = Split(*(np.sort(r) for r in (rows[:10], rows[10:], rows[10:90], rows[90:])))
    x, y = (rng.standard_normal((120, d)).astype(np.float32) for d in (6, 7))
    return PairedFeatures("random", [str(i) for i in range(120)], x, y, labels, tuple("abcde"), split, "f")


OPEN = {"epochs": 6, "hidden": 8, "batch_size": 16, "pair_weight": 0.3}


def settings(**changes):
    defaults = {"n_bits": 8, "method_settings": OPEN, "device": "cpu", "validate_every": 2, "refit": False}
    return TrainingSettings(**(defaults | changes))


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("method", ["duet", "ucch"])
def test_score_is_made_of_both_directions_by_definition(random_data, rng, monkeypatch, seed, method):
    """MAP twice, NDCG@10 by label overlap, own R@10 among all these rows; that recall alone without labels."""
    data, chosen = random_data, settings(seed=seed, method=method, method_settings={})
    codes = {name: rng.integers(0, 256, (120, 1), dtype=np.uint8) for name in ("image", "text")}
    codes["text"][:60], codes["text"][60:80] = codes["image"][:60], 7
    monkeypatch.setattr(training._Run, "_codes", lambda run, modality, head, rows: codes[modality][rows])
    kind = get_method(method)
    run = training._Run(data, chosen, kind, make_config(kind, {}), None, None, None)
    found = run._validate(SimpleNamespace(image_head=None, text_head=None))

    order = np.random.default_rng(seed).permutation(data.split.validation)
    query, database = order[:15], np.concatenate([order[15:], data.split.train])
    bits = {name: unpack(c) for name, c in codes.items()}
    scores = []
    for one, other in (("image", "text"), ("text", "image")):
        recall, maps, ndcg = [], [], []
        for row in query:
            far = (bits[one][row] != bits[other]).sum(axis=1)
            among = far[np.concatenate([query, database])]
            recall.append(np.clip((10 - (among < far[row]).sum()) / (among == far[row]).sum(), 0, 1))
            shared = (data.labels[row] & data.labels[database]).sum(axis=1)
            gain = shared / np.maximum((data.labels[row] | data.labels[database]).sum(axis=1), 1)
            grades, level = np.unique(np.append(gain, 0.0)), far[database]
            counts = np.zeros((1, 9, len(grades)), dtype=np.uint32)
            np.add.at(counts[0], (level, np.searchsorted(grades, gain)), 1)
            table = metrics.DistanceTable(counts, grades)
            maps.append(np.nan_to_num(metrics.average_precision(table)[0]))
            ndcg.append(np.nan_to_num(metrics.ndcg_at_k(table, 10)[0]))
        scores += [np.mean(recall)] + ([np.mean(maps)] * 2 + [np.mean(ndcg)] if method == "duet" else [])
    assert found["score"] == pytest.approx(np.mean(scores))
    everything = codes["image"][np.concatenate([query, database])]
    assert found["distinct"] == len(np.unique(everything)) / 110


def test_rates_move_with_every_batch(random_data, monkeypatch):
    seen, rates = [], Duet.learning_rates
    monkeypatch.setattr(Duet, "learning_rates", lambda self, progress: seen.append(progress) or rates(self, progress))
    train(random_data, settings(method_settings=OPEN | {"epochs": 2}))
    assert seen == pytest.approx(np.arange(10) / 10)


@pytest.mark.parametrize(("batch_size", "sizes"), [(16, [16] * 5), (32, [40, 40]), (30, [27, 27, 26]), (500, [80])])
def test_batches_come_near_to_the_size_asked_for(random_data, monkeypatch, batch_size, sizes):
    seen, steps = [], Duet.steps
    monkeypatch.setattr(Duet, "steps", lambda self, batch, phase: seen.append(len(batch)) or steps(self, batch, phase))
    train(random_data, settings(method_settings=OPEN | {"epochs": 1, "batch_size": batch_size}))
    assert seen == sizes


def test_the_last_epoch_is_looked_at(random_data):
    history = train(random_data, settings(method_settings=OPEN | {"epochs": 5})).record["history"]
    assert [entry["epoch"] for entry in history if "score" in entry] == [2, 4, 5]


def test_the_later_of_two_epochs_that_score_alike_is_kept(random_data, monkeypatch):
    scores = iter([0.3, 0.8, 0.795, 0.7, 0.1, 0.1])
    monkeypatch.setattr(training._Run, "_validate", lambda run, method: {"score": next(scores), "distinct": 1.0})
    assert train(random_data, settings(validate_every=1)).record["chosen_epoch"] == 3


def test_a_look_that_scores_the_same_is_no_gain(random_data, monkeypatch):
    scores = iter([0.5, 0.5, 0.5, 0.9])
    monkeypatch.setattr(training._Run, "_validate", lambda run, method: {"score": next(scores), "distinct": 1.0})
    assert len(train(random_data, settings(validate_every=1, patience=2)).record["history"]) == 3


class Interrupted(Exception):
    pass


def broken_off(data, chosen, checkpoint, epoch=3):
    def progress(done, of, line):
        if done == epoch:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(data, chosen, checkpoint=checkpoint, progress=progress)
    assert checkpoint.exists()


def test_checkpoint_of_other_data_or_another_split_is_refused(random_data, tmp_path):
    broken_off(random_data, settings(), tmp_path / "run.pt")
    split = random_data.split
    moved = dataclasses.replace(split, train=split.train[1:])
    for other in (dataclasses.replace(random_data, split=moved), dataclasses.replace(random_data, fingerprint="g")):
        with pytest.raises(SettingsError, match="other data or settings"):
            train(other, settings(), checkpoint=tmp_path / "run.pt")


def test_a_run_may_go_on_on_another_device(random_data, tmp_path):
    broken_off(random_data, settings(device="auto"), tmp_path / "run.pt")
    assert (
        train(random_data, settings(device="cpu"), checkpoint=tmp_path / "run.pt").record["history"][-1]["epoch"] == 6
    )


def test_checkpoints_come_by_the_clock_too(random_data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    broken_off(random_data, settings(validate_every=100), tmp_path / "run.pt")


@pytest.mark.parametrize(("n", "chooses"), [(3, False), (4, True)])
def test_few_validation_rows_choose_nothing(random_data, n, chooses):
    split = dataclasses.replace(random_data.split, validation=random_data.split.validation[:n])
    record = train(dataclasses.replace(random_data, split=split), settings()).record
    assert any("score" in entry for entry in record["history"]) == chooses


def test_the_history_holds_the_mean_of_the_batches_terms(random_data, monkeypatch):
    seen, steps = [], Duet.steps

    def spy(self, batch, phase):
        for step in steps(self, batch, phase):
            seen.append(step.terms["label"].item())
            yield step

    monkeypatch.setattr(Duet, "steps", spy)
    (entry,) = train(random_data, settings(method_settings=OPEN | {"epochs": 1})).record["history"]
    assert len(seen) == 5
    assert entry["label"] == pytest.approx(np.mean(seen))


def test_heads_come_back_at_rest_and_refits_are_not_validated(random_data, monkeypatch):
    looks = []
    validate = training._Run._validate
    monkeypatch.setattr(training._Run, "_validate", lambda run, method: looks.append(1) or validate(run, method))
    trained = train(random_data, settings(method="ucch", method_settings={"epochs": 4, "hidden": 8}, refit=True))
    assert not trained.image_head.training
    assert not trained.text_head.training
    assert len(looks) == 2


def test_collapse_is_reported_below_half(random_data, caplog, monkeypatch):
    for distinct, said in ((0.49, True), (0.51, False)):
        caplog.clear()
        shares = {"image": 1.0, "text": distinct}
        monkeypatch.setattr(training._Run, "distinct", lambda run, *heads, found=shares: found)
        trained = train(random_data, settings())
        assert trained.record["distinct"] == shares
        assert ("there are 49 distinct codes for 100 different texts" in caplog.text) == said
