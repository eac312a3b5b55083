"""The trainer's promises, on real emoji features: seeds, resume, validation, refusals."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch

from cmh_milvus import training
from cmh_milvus.codes import binarize, pack
from cmh_milvus.datasets.base import Split
from cmh_milvus.errors import ArtefactError, DataError, SettingsError
from cmh_milvus.methods.duet import Duet
from cmh_milvus.training import TrainingSettings, relaxed_codes, train

OPEN = {"epochs": 6, "hidden": 32, "batch_size": 64}  # the validation rows choose the rest
QUICK = OPEN | {"pair_weight": 0.3}


@pytest.fixture(scope="module")
def data(emoji_features):
    """400 pairs: 40 queries, 300 to train on, 60 to validate on."""
    rows = np.random.default_rng(1).permutation(len(emoji_features.ids))[:400]
    query, validation, rest = np.sort(rows[:40]), np.sort(rows[40:100]), np.sort(rows[100:])
    database = np.sort(rows[40:])
    return dataclasses.replace(emoji_features, split=Split(query, database, rest, validation))


def settings(**changes):
    defaults = {"n_bits": 16, "method_settings": QUICK, "device": "cpu", "validate_every": 2, "refit": False}
    return TrainingSettings(**(defaults | changes))


def weights(trained):
    heads = {"image": trained.image_head, "text": trained.text_head}
    return {f"{name}.{key}": value for name, head in heads.items() for key, value in head.state_dict().items()}


def same(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


class Interrupted(Exception):
    pass


def interrupt_after(epoch, stage="select"):
    def progress(done, of, line):
        if done == epoch and line.startswith(stage):
            raise Interrupted

    return progress


def train_with_interruptions(data, chosen, checkpoint, epochs, stage="select"):
    """Train, killed after each of these epochs' checkpoints; progress is told before the checkpoint is written."""
    for epoch in epochs:
        with pytest.raises(Interrupted):
            train(data, chosen, checkpoint=checkpoint, progress=interrupt_after(epoch, stage))
        assert checkpoint.exists()
    return train(data, chosen, checkpoint=checkpoint)


def test_equal_seeds_give_equal_weights_and_leave_the_global_random_state_alone(data):
    torch.manual_seed(7)
    first = train(data, settings(seed=3))
    drawn = torch.rand(1)
    torch.manual_seed(8)
    assert same(first, train(data, settings(seed=3)))
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    assert not same(first, train(data, settings(seed=4)))


@pytest.mark.parametrize("method", ["duet", "ugach"])
def test_resumed_run_gives_exactly_the_unbroken_runs_weights(data, tmp_path, method):
    quick = QUICK if method == "duet" else OPEN | {"pretraining": 1}
    chosen = settings(method=method, method_settings=quick)
    unbroken = train(data, chosen)
    checkpoint = tmp_path / "deep" / "run.pt"
    resumed = train_with_interruptions(data, chosen, checkpoint, [3, 5])
    assert same(unbroken, resumed)
    assert resumed.record["history"] == unbroken.record["history"]
    assert resumed.record["chosen_epoch"] == unbroken.record["chosen_epoch"]
    assert checkpoint.exists()  # until the heads are saved; so far it leads to them again
    assert same(unbroken, train(data, chosen, checkpoint=checkpoint))


def test_run_resumed_while_it_refits_is_the_unbroken_run(data, tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.2] * 2)
    monkeypatch.setattr(training._Run, "_validate", lambda run, method: {"score": next(scores), "distinct": 1.0})
    chosen = settings(method="ucch", refit=True, validate_every=1, method_settings=OPEN | {"epochs": 3})
    unbroken = train(data, chosen)
    resumed = train_with_interruptions(data, chosen, tmp_path / "run.pt", [2], stage="refit")
    assert unbroken.record["chosen_epoch"] == resumed.record["chosen_epoch"] == 2
    assert same(unbroken, resumed)
    assert resumed.record["history"] == unbroken.record["history"]


def test_run_that_patience_ended_is_not_trained_further_when_resumed(data, tmp_path, monkeypatch):
    scores = [0.5, 0.4, 0.3, 0.9]
    seen = []

    def validate(run, method):
        seen.append(scores[len(seen)])
        return {"score": seen[-1], "distinct": 1.0}

    monkeypatch.setattr(training._Run, "_validate", validate)
    chosen = settings(method="ucch", method_settings=OPEN, patience=2, validate_every=1, refit=True)
    with pytest.raises(Interrupted):
        train(data, chosen, checkpoint=tmp_path / "run.pt", progress=interrupt_after(1, "refit"))
    assert seen == [0.5, 0.4, 0.3]
    resumed = train(data, chosen, checkpoint=tmp_path / "run.pt")
    assert seen == [0.5, 0.4, 0.3]
    assert resumed.record["chosen_epoch"] == 1


@pytest.mark.parametrize("change", [{"seed": 9}, {"n_bits": 24}, {"method_settings": QUICK | {"hidden": 40}}])
def test_checkpoint_of_another_run_is_refused(data, tmp_path, change):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        train(data, settings(), checkpoint=checkpoint, progress=interrupt_after(3))
    before = checkpoint.read_bytes()
    with pytest.raises(SettingsError, match="other data or settings"):
        train(data, settings(**change), checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before


def test_damaged_checkpoint_is_refused_in_words(data, tmp_path):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        train(data, settings(), checkpoint=checkpoint, progress=interrupt_after(3))
    sound = checkpoint.read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1  # a weight
    torch.save([1, 2], tmp_path / "list.pt")
    for damaged in (
        b"no checkpoint",
        b"",
        sound[: len(sound) // 2],
        bytes(flipped),
        (tmp_path / "list.pt").read_bytes(),
    ):
        checkpoint.write_bytes(damaged)
        with pytest.raises(SettingsError, match=r"run\.pt.* damaged"):
            train(data, settings(), checkpoint=checkpoint)
        assert checkpoint.read_bytes() == damaged


def test_closed_form_methods_refuse_the_checkpoint_of_another_run(data, tmp_path):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        train(data, settings(), checkpoint=checkpoint, progress=interrupt_after(3))
    with pytest.raises(SettingsError, match="other data or settings"):
        train(data, settings(method="cca_itq", method_settings={}), checkpoint=checkpoint)


def test_checkpoint_that_cannot_be_written_leaves_the_last_one(data, tmp_path, monkeypatch):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        train(data, settings(), checkpoint=checkpoint, progress=interrupt_after(3))
    before = checkpoint.read_bytes()

    def full_disk(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(ArtefactError, match=r"run\.pt cannot be written"):
        train(data, settings(), checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_training_that_diverges_ends_in_words(data):
    quick = OPEN | {"learning_rate": 1e30}
    with pytest.raises(SettingsError, match=r"diverged.* smaller learning rate"):
        train(data, settings(method="ucch", refit=True, method_settings=quick))


def test_seconds_of_a_resumed_run_are_those_of_all_its_parts(data, tmp_path, monkeypatch):
    now = iter(range(0, 10**6, 10))
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(now)))
    unbroken = train(data, settings()).record["seconds"]
    resumed = train_with_interruptions(data, settings(), tmp_path / "run.pt", [3, 5]).record["seconds"]
    assert resumed > 0.8 * unbroken
    assert train(data, settings(), checkpoint=tmp_path / "run.pt").record["seconds"] > 0.8 * unbroken


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "1", None])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(SettingsError, match="seed"):
        TrainingSettings(seed=seed)


@pytest.mark.parametrize("name", ["n_bits", "validate_every", "patience"])
def test_settings_that_are_no_int_are_refused(name):
    for value in (16.0, "16", None):
        with pytest.raises(SettingsError, match=f"{name} is an int, got"):
            TrainingSettings(**{name: value})


def test_closed_form_methods_train_at_once_on_train_and_validation_rows(data, tmp_path):
    trained = train(data, settings(method="cca_itq", method_settings={}), checkpoint=tmp_path / "run.pt")
    split = data.split
    both = np.sort(np.concatenate([split.train, split.validation]))
    merged = dataclasses.replace(data, split=dataclasses.replace(split, train=both, validation=both[:0]))
    assert same(trained, train(merged, settings(method="cca_itq", method_settings={})))
    assert trained.record["history"] == []
    assert not (tmp_path / "run.pt").exists()


def test_query_rows_change_nothing(data):
    poisoned = dataclasses.replace(data, image=data.image.copy(), text=data.text.copy(), labels=data.labels.copy())
    rng = np.random.default_rng(0)
    query = data.split.query
    poisoned.image[query] = 1e4 * rng.standard_normal(data.image[query].shape)
    poisoned.text[query] = -1e4
    poisoned.labels[query] = ~data.labels[query]
    for method in ("duet", "cca_itq"):
        clean = train(data, settings(method=method, method_settings=QUICK if method == "duet" else {}))
        other = train(poisoned, settings(method=method, method_settings=QUICK if method == "duet" else {}))
        assert same(clean, other)
        assert clean.record["history"] == other.record["history"]


def test_labels_change_nothing_for_methods_of_pairs(data):
    flipped = dataclasses.replace(data, labels=~data.labels)
    quick = {"method": "ucch", "method_settings": OPEN | {"negatives": 32}}
    clean, other = (train(which, settings(**quick)) for which in (data, flipped))
    assert same(clean, other)
    assert clean.record["history"] == other.record["history"]


def test_best_epoch_on_validation_rows_is_kept(data, monkeypatch):
    scores = [0.3, 0.8, 0.5, 0.4, 0.1, 0.1]
    snapshots = []

    def validate(run, method):
        snapshots.append({key: value.clone() for key, value in method.image_head.state_dict().items()})
        return {"score": scores[len(snapshots) - 1], "distinct": 1.0}

    monkeypatch.setattr(training._Run, "_validate", validate)
    trained = train(data, settings(validate_every=1))
    assert trained.record["chosen_epoch"] == 2
    kept = trained.image_head.state_dict()
    assert all(torch.equal(kept[key], value) for key, value in snapshots[1].items())
    assert not all(torch.equal(kept[key], value) for key, value in snapshots[3].items())


def test_refit_trains_afresh_on_train_and_validation_rows(data, monkeypatch):
    scores = iter([0.3, 0.8, 0.5, 0.4, 0.1, 0.1])
    monkeypatch.setattr(training._Run, "_validate", lambda run, method: {"score": next(scores), "distinct": 1.0})
    made = []
    make = training._Run._make

    def record(run, rows, epochs):
        made.append((len(rows), epochs))
        return make(run, rows, epochs)

    monkeypatch.setattr(training._Run, "_make", record)
    trained = train(data, settings(method="ucch", method_settings=OPEN, validate_every=1, refit=True))
    assert made == [(300, 6), (360, 2)]
    assert trained.record["chosen_epoch"] == 2
    assert trained.record["refit_on_validation"]


def test_validation_rows_choose_what_the_method_leaves_open(data, monkeypatch):
    values = Duet.left_open(has_labels=True)["pair_weight"]
    scores = iter([0.9, 0.1])
    monkeypatch.setattr(training._Run, "_validate", lambda run, method: {"score": next(scores), "distinct": 1.0})
    trained = train(data, settings(validate_every=6, refit=True, method_settings=OPEN))
    assert trained.record["config"]["pair_weight"] == values[0]
    tried = [{"pair_weight": v, "score": s} for v, s in zip(values, [0.9, 0.1], strict=True)]
    assert trained.record["tried"] == tried
    monkeypatch.undo()
    given = train(data, settings(validate_every=6, refit=True, method_settings=OPEN | {"pair_weight": values[0]}))
    assert given.record["tried"] == [{"score": given.record["history"][-1]["score"]}]
    assert same(trained, given)


def test_choice_is_tried_in_a_third_of_the_epochs_and_trained_in_full(data, monkeypatch):
    """The trial's best look was the first of two epochs; the whole run takes that share of six."""
    scores = iter([0.9, 0.5, 0.1, 0.2])
    monkeypatch.setattr(training._Run, "_validate", lambda run, method: {"score": next(scores), "distinct": 1.0})
    shown = []
    trained = train(
        data,
        settings(validate_every=1, refit=True, method_settings=OPEN),
        progress=lambda done, epochs, note: shown.append((note.split(":")[0], done, epochs)),
    )
    last = [max(line for line in shown if line[0] == note) for note in ("try 1/2", "try 2/2", "refit")]
    assert last == [("try 1/2", 2, 2), ("try 2/2", 2, 2), ("refit", 3, 3)]
    assert trained.record["chosen_epoch"] == 3
    assert [entry["score"] for entry in trained.record["history"]] == [0.9, 0.5]


@pytest.mark.parametrize(
    ("refit", "expected"), [(True, [("select", 2, 2), ("refit", 3, 3)]), (False, [("select", 6, 6)])]
)
def test_a_value_that_is_given_is_tried_as_long_as_one_that_is_chosen(data, monkeypatch, refit, expected):
    """A third of the epochs, of which the first scores highest; in full at once where no refit follows."""
    scores = iter([0.9, 0.5, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(training._Run, "_validate", lambda run, method: {"score": next(scores), "distinct": 1.0})
    shown = []
    train(
        data,
        settings(validate_every=1, refit=refit, method_settings=OPEN | {"pair_weight": 0.02}),
        progress=lambda done, epochs, note: shown.append((note.split(":")[0], done, epochs)),
    )
    assert [line for line in shown if line[1] == line[2]] == expected


def test_a_method_is_told_how_long_each_of_its_trainings_takes(data, monkeypatch):
    """Two trials of a third of the epochs; the refit of the share of all of them that did best there."""
    scores = iter([0.9, 0.5, 0.1, 0.2])
    monkeypatch.setattr(training._Run, "_validate", lambda run, method: {"score": next(scores), "distinct": 1.0})
    told, make = [], Duet.__init__

    def noting(method, train_data, n_bits, config):
        told.append((len(train_data), config.epochs))
        make(method, train_data, n_bits, config)

    monkeypatch.setattr(Duet, "__init__", noting)
    trained = train(data, settings(validate_every=1, refit=True, method_settings=OPEN))
    n, validation = len(data.split.train), len(data.split.validation)
    assert told == [(n, 2), (n, 2), (n + validation, 3)]
    assert trained.record["config"]["epochs"] == OPEN["epochs"]


def test_without_refit_the_choice_is_trained_in_full_on_the_train_rows(data, monkeypatch):
    scores = iter([0.9, 0.1, 0.8])
    monkeypatch.setattr(training._Run, "_validate", lambda run, method: {"score": next(scores), "distinct": 1.0})
    trained = train(data, settings(validate_every=6, method_settings=OPEN))
    assert trained.record["chosen_epoch"] == OPEN["epochs"]
    assert [entry["score"] for entry in trained.record["tried"]] == [0.9, 0.1]
    monkeypatch.undo()
    weight = trained.record["config"]["pair_weight"]
    assert weight == Duet.left_open(has_labels=True)["pair_weight"][0]
    assert same(trained, train(data, settings(validate_every=6, method_settings=OPEN | {"pair_weight": weight})))


def test_map_counts_twice_in_the_score(data, monkeypatch):
    monkeypatch.setattr(training.metrics, "mean_average_precision", lambda *_: 0.8)
    monkeypatch.setattr(training.metrics, "mean_over_queries", lambda *_: 0.4)
    monkeypatch.setattr(training.metrics, "own_pair_recall_at_k", lambda closer, tied, k: np.full(len(closer), 0.2))
    trained = train(data, settings(validate_every=6))
    assert trained.record["history"][-1]["score"] == pytest.approx((2 * 0.8 + 0.4 + 0.2) / 4)


@pytest.mark.parametrize(("scores", "best"), [([0.895, 0.9, 0.9], 1), ([0.9, 0.895, 0.9], 0)])
def test_the_setting_of_the_highest_score_wins_by_however_little(data, monkeypatch, scores, best):
    looks = iter(scores)
    monkeypatch.setattr(training._Run, "_validate", lambda run, method: {"score": next(looks), "distinct": 1.0})
    trained = train(data, settings(validate_every=6, method_settings=OPEN))
    assert trained.record["config"]["pair_weight"] == Duet.left_open(has_labels=True)["pair_weight"][best]


def test_nothing_is_left_open_without_labels_or_validation_rows(data):
    unlabelled = dataclasses.replace(data, labels=None)
    split = dataclasses.replace(data.split, validation=data.split.validation[:0])
    for few in (unlabelled, dataclasses.replace(data, split=split)):
        record = train(few, settings(method="duet", method_settings=OPEN)).record
        assert len(record["tried"]) == 1
        assert record["config"]["pair_weight"] == Duet.Config().pair_weight


def test_default_method_suits_what_the_data_have(data):
    quick = settings(method_settings={"epochs": 1, "hidden": 32})
    assert train(data, quick).record["method"] == "duet"
    assert train(dataclasses.replace(data, labels=None), quick).record["method"] == "canon"


@pytest.mark.parametrize(("epoch", "stage"), [(2, "try 1/2"), (1, "try 2/2"), (2, "refit")])
def test_run_that_chooses_is_resumed_where_it_stopped(data, tmp_path, epoch, stage):
    chosen = settings(validate_every=1, refit=True, method_settings=OPEN)
    unbroken = train(data, chosen)
    resumed = train_with_interruptions(data, chosen, tmp_path / "run.pt", [epoch], stage=stage)
    assert same(unbroken, resumed)
    assert {**unbroken.record, "seconds": 0} == {**resumed.record, "seconds": 0}


def test_run_that_trains_its_choice_without_refit_is_resumed(data, tmp_path):
    chosen = settings(validate_every=1, method_settings=OPEN | {"epochs": 4})
    unbroken = train(data, chosen)
    resumed = train_with_interruptions(data, chosen, tmp_path / "run.pt", [3], stage="select")
    assert same(unbroken, resumed)
    assert {**unbroken.record, "seconds": 0} == {**resumed.record, "seconds": 0}


def test_without_validation_rows_the_last_epoch_is_kept(data):
    split = dataclasses.replace(data.split, validation=data.split.validation[:0])
    trained = train(dataclasses.replace(data, split=split), settings(refit=True))
    assert trained.record["chosen_epoch"] == QUICK["epochs"]
    assert all("score" not in entry for entry in trained.record["history"])


def test_patience_stops_early(data, monkeypatch):
    scores = iter([0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr(training._Run, "_validate", lambda run, method: {"score": next(scores), "distinct": 1.0})
    trained = train(data, settings(validate_every=1, patience=2))
    assert len(trained.record["history"]) == 3
    assert trained.record["chosen_epoch"] == 1


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("modality", ["image", "text"])
def test_collapse_is_reported(modality, refit, data, caplog, monkeypatch):
    """A head whose outputs are all alike, with validation rows or after them: the trainer says so."""
    epochs = []

    def collapse(method, epoch):
        epochs.append(epoch)
        if not refit or len(epochs) > 2:  # of the refit alone
            head = getattr(method, f"{modality}_head")
            with torch.no_grad():
                head.output.weight.zero_()
                head.output.bias.fill_(1.0)

    monkeypatch.setattr(Duet, "end_epoch", collapse)
    given = {"epochs": 2, "pair_weight": 0.1}
    with caplog.at_level(logging.WARNING):
        trained = train(data, settings(n_bits=64, refit=refit, method_settings=given))
    (warning,) = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    assert f"distinct codes for 100 different {'pictures' if modality == 'image' else 'texts'}" in warning
    assert trained.record["distinct"][modality] < 0.02


def test_collapse_of_a_closed_form_is_reported(data, caplog):
    one_word = dataclasses.replace(data, text=(data.text[:, :1] > np.median(data.text[:, 0])).astype(np.float32))
    noisy = one_word.text + np.arange(len(data.text), dtype=np.float32)[:, None] * 1e-3
    for text, said in ((one_word.text, False), (noisy, True)):  # two codes of two texts are no collapse
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            train(dataclasses.replace(data, text=text), settings(method="cca_itq", method_settings={}))
        assert ("different texts" in caplog.text) == said


def test_healthy_codes_are_not_reported(data, caplog):
    with caplog.at_level(logging.WARNING):
        train(data, settings(n_bits=64))
    assert "collapsed" not in caplog.text


def test_validation_database_is_partly_untrained(data):
    """MAP of the recorded score is of half of the validation rows against the other half and the train rows."""
    seen = []
    table = training.distance_table

    def spy(query_codes, database_codes, query_labels, database_labels, **options):
        seen.append((query_labels, database_labels))
        return table(query_codes, database_codes, query_labels, database_labels, **options)

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(training, "distance_table", spy)
        train(data, settings(method_settings=QUICK | {"epochs": 1}))
    query_labels, database_labels = seen[0]
    assert len(query_labels) == 30
    assert len(database_labels) == 330
    rows = np.concatenate([data.split.validation, data.split.train])
    expected = np.sort(data.labels[rows].sum(axis=0))
    assert np.array_equal(np.sort(query_labels.sum(axis=0) + database_labels.sum(axis=0)), expected)


def test_record_is_json_and_says_how(data):
    record = train(data, settings(seed=5)).record
    assert json.loads(json.dumps(record)) == record
    assert record["method"] == "duet"
    assert record["seed"] == 5
    assert record["config"]["hidden"] == 32
    assert record["data"]["n_train"] == 300
    assert record["data"]["split_fingerprint"] == data.split.fingerprint()
    assert [entry["epoch"] for entry in record["history"]] == [1, 2, 3, 4, 5, 6]
    assert {"label", "pair", "soft"} <= record["history"][0].keys()


def test_code_of_an_item_is_its_own(data):
    head = train(data, settings()).image_head
    features = data.image[:50]
    whole = pack(binarize(relaxed_codes(head, features)))
    single = np.concatenate([pack(binarize(relaxed_codes(head, features[i : i + 1]))) for i in range(50)])
    assert np.array_equal(whole, single)
    assert np.array_equal(whole, pack(binarize(relaxed_codes(head, features, batch_size=7))))
    assert relaxed_codes(head, features[:0]).shape == (0, 16)


def test_no_batch_is_one_row(data, monkeypatch):
    seen = []
    steps = Duet.steps
    monkeypatch.setattr(Duet, "steps", lambda self, batch, phase: seen.append(len(batch)) or steps(self, batch, phase))
    odd = dataclasses.replace(data, split=dataclasses.replace(data.split, train=data.split.train[:7]))
    train(odd, settings(method_settings=QUICK | {"batch_size": 2, "epochs": 1}, refit=False))
    assert seen == [3, 2, 2]


def test_impossible_runs_are_refused_in_words(data):
    with pytest.raises(SettingsError, match="no method 'dream'"):
        train(data, settings(method="dream"))
    with pytest.raises(SettingsError, match="no setting 'colour'"):
        train(data, settings(method_settings={"colour": 1}))
    with pytest.raises(SettingsError, match="epochs of method duet is int"):
        train(data, settings(method_settings={"epochs": "many"}))
    with pytest.raises(SettingsError, match="batch_size is at least 2, got 1"):
        train(data, settings(method_settings={"batch_size": 1}))
    with pytest.raises(DataError, match=r"text features .* alike in all train rows"):
        train(dataclasses.replace(data, text=np.ones_like(data.text)), settings())
    with pytest.raises(DataError, match=r"image features .* float64: give float32"):
        train(dataclasses.replace(data, image=data.image.astype(np.float64)), settings())
    with pytest.raises(SettingsError, match="epochs of method duet is int"):
        train(data, settings(method_settings={"epochs": 2.7}))
    with pytest.raises(SettingsError):
        settings(n_bits=12)
    with pytest.raises(SettingsError):
        settings(validate_every=0)
    with pytest.raises(DataError, match="train rows"):
        train(dataclasses.replace(data, split=dataclasses.replace(data.split, train=data.split.train[:1])), settings())
    with pytest.raises(DataError, match="none"):
        train(dataclasses.replace(data, labels=None), settings(method="dcmh", method_settings={}))
    broken = data.image.copy()
    broken[3, 4] = np.nan
    with pytest.raises(DataError, match="NaN"):
        train(dataclasses.replace(data, image=broken), settings())
