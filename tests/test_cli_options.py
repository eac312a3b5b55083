"""Options of the command line reach what they are for."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmh_milvus.cli.sources import training_source
from cmh_milvus.encoders.backbones import BagOfWords
from tests.test_cli import _own_folder, lines, run  # noqa: F401


def save_features(file, n=80, **sets):
    rng = np.random.default_rng(0)
    labels = np.eye(2)[np.arange(n) % 2]
    np.savez(file, image=rng.normal(size=(n, 5)), text=rng.normal(size=(n, 4)), labels=labels, **sets)


SETS = {"query": np.arange(16), "database": np.arange(16, 80)}
COLUMNS = {"id_column": None, "image_column": None, "text_column": None, "label_column": None, "label_separator": ","}


def test_options_of_train_reach_the_trainer(monkeypatch):
    import cmh_milvus.training as training

    seen, train = [], training.train
    monkeypatch.setattr(
        training, "train", lambda data, settings, **rest: seen.append((data, settings)) or train(data, settings, **rest)
    )
    save_features("own.npz", **SETS)
    options = [
        "--method",
        "ucch",
        "--set",
        "epochs=1",
        "--set",
        "hidden=8",
        "--bits",
        "8",
        "--seed",
        "3",
        "--patience",
        "2",
        "--device",
        "cpu",
        "--validation",
        "0.25",
    ]
    assert run("train", "own.npz", "-o", "enc", *options).exit_code == 0
    ((data, settings),) = seen
    assert (settings.method, settings.n_bits, settings.seed, settings.patience, settings.device) == (
        "ucch",
        8,
        3,
        2,
        "cpu",
    )
    assert settings.method_settings == {"epochs": "1", "hidden": "8"}
    assert len(data.split.validation) == 16
    assert json.loads(Path("enc/training.json").read_text())["seed"] == 3


def pictures_and_texts(n=24):
    with Path("own.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "text"])
        for i in range(n):
            Image.new("RGB", (4, 4), (9 * i, 0, 0)).save(f"{i}.png")
            writer.writerow([f"{i}.png", f"word{i // 2} word{(i + 1) // 2 + 50} thing"])


def test_held_out_rows_are_shares_by_the_seed_and_their_words_are_unseen():
    """Of 24 pairs a half are queries, of the other half a quarter choose; the vocabulary is that of the train texts."""
    pictures_and_texts()
    options = {
        "image_backbone": "efficientnet-lite2",
        "text_backbone": "bag-of-words",
        "device": "cpu",
        "cache": Path("cache"),
    }
    made = [training_source("own.csv", COLUMNS, queries=0.5, validation=0.25, seed=seed, **options) for seed in (0, 1)]
    for source in made:
        split = source.features.split
        assert [len(rows) for rows in (split.query, split.validation, split.train)] == [12, 3, 9]
        texts = [source.texts[row] for row in split.train]
        assert (
            source.backbones[1].vocabulary
            == BagOfWords().fit(texts).vocabulary
            != BagOfWords().fit(source.texts).vocabulary
        )
    assert made[0].features.split.fingerprint() != made[1].features.split.fingerprint()


def test_the_gate_is_the_mean_of_both_directions():
    save_features("own.npz", **SETS)
    base = ["evaluate", "own.npz", "--method", "scm", "--bits", "8", "--no-baselines"]
    rows = {row["direction"]: row["MAP@all"] for row in lines(run(*base)) if row["encoder"] == "scm"}
    assert abs(rows["image_to_text"] - rows["text_to_image"]) > 1e-3
    mean = (rows["image_to_text"] + rows["text_to_image"]) / 2
    assert run(*base, "--min-map", mean - 1e-6).exit_code == 0
    assert run(*base, "--min-map", mean + 1e-6).exit_code == 5


def test_a_clean_split_passes_the_strict_gate():
    save_features("own.npz", **SETS)
    assert run("evaluate", "own.npz", "--method", "scm", "--bits", "8", "--no-baselines", "--strict").exit_code == 0


@pytest.fixture
def words():
    """The folder of an encoder of random heads; its texts are bags of four words."""
    import torch

    from cmh_milvus.encoders.backbones import load_backbone
    from cmh_milvus.encoders.encoder import CrossModalHashEncoder, Tower
    from cmh_milvus.encoders.hash_head import HashHead, HashHeadConfig

    torch.manual_seed(0)
    towers = (
        Tower.of(backbone, HashHead(HashHeadConfig(dim, 8)))
        for backbone, dim in (
            (load_backbone("precomputed:5", "image"), 5),
            (BagOfWords(("red", "green", "blue", "big")), 4),
        )
    )
    CrossModalHashEncoder(*towers, device="cpu").save_pretrained("words")
    return "words"


def write_items(*rows):
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_ten_hits_by_default_and_filters_hold_for_radii_too(words):
    write_items(*({"id": i, "text": f"red {i}", "n": i} for i in range(12)))
    store = ["-m", words, "--uri", "w.db"]
    assert run("ingest", "items.jsonl", *store, "--field", "n").exit_code == 0
    ask = ["query", *store, "-t", "blue", "--find", "text", "--field", "n"]
    assert len(lines(run(*ask))) == 10
    assert len(lines(run(*ask, "--radius", "8"))) == 12
    assert {hit["n"] for hit in lines(run(*ask, "--radius", "8", "--filter", "n < 3"))} == {0, 1, 2}


@pytest.mark.parametrize("name", ["caption", "uri", "labels"])
def test_fields_of_items_are_not_overwritten(words, name):
    write_items({"id": 1, "text": "red", name: "mine"})
    refused = run("ingest", "items.jsonl", "-m", words, "--uri", "w.db", "--field", name)
    assert refused.exit_code == 2
    assert f"cannot be called {name!r}" in refused.stderr
    assert not Path("w.db").exists()


def test_an_ingest_that_stores_nothing_fails(words):
    write_items({"id": 1, "text": "red", "n": 10**24}, {"id": 2, "text": "blue", "n": 10**24})
    failed = run("ingest", "items.jsonl", "-m", words, "--uri", "w.db", "--field", "n")
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert "nothing of items.jsonl can be stored: 2 items failed, listed in " in failed.stderr
    assert "the first: 1: " in failed.stderr
    assert len(Path("w.items.failures.jsonl").read_text().splitlines()) == 2
    write_items({"id": 1, "text": "red", "n": 10**24}, {"id": 3, "text": "green", "n": 1})
    some = run("ingest", "items.jsonl", "-m", words, "--uri", "w.db", "--field", "n")
    assert some.exit_code == 3
    assert "1 item failed" in some.stderr


def test_a_list_of_failures_does_not_outlive_them(words):
    write_items({"id": 1, "text": "red"}, {"id": 2, "text": ""})
    store = ["-m", words, "--uri", "w.db"]
    assert run("ingest", "items.jsonl", *store).exit_code == 3
    assert Path("w.items.failures.jsonl").exists()
    write_items({"id": 1, "text": "red"}, {"id": 2, "text": "blue"})
    assert run("ingest", "items.jsonl", *store).exit_code == 0
    assert not Path("w.items.failures.jsonl").exists()


def test_features_are_refused_where_backbones_were_tuned(words):
    save_features("own.npz", **SETS)
    Path(words, "training.json").write_text('{"split": {"query": ["0"], "validation": []}}')
    config = json.loads(Path(words, "config.json").read_text())
    config["towers"]["text"]["backbone"]["revision"] = "given+0123"
    Path(words, "config.json").write_text(json.dumps(config))
    refused = run("evaluate", "own.npz", "-m", words)
    assert refused.exit_code == 2
    assert "fine-tuned" in refused.stderr


def test_latex_of_any_text():
    from cmh_milvus.cli.output import _latex_escape

    assert _latex_escape("a_b{c}%&$#~^\\") == r"a\_b\{c\}\%\&\$\#\textasciitilde{}\textasciicircum{}\textbackslash{}"


def test_held_out_rows_are_neither_in_the_database_nor_trained_on():
    from cmh_milvus.cli.sources import _split_by_ids

    split = _split_by_ids(list("abcdef"), {"query": ["b", "e"], "validation": ["c"]}, "own.csv", None)
    assert {name: rows.tolist() for name, rows in vars(split).items()} == {
        "query": [1, 4], "database": [0, 2, 3, 5], "train": [0, 3, 5], "validation": [2],
    }  # fmt: skip


def test_html_of_any_text_is_escaped(words):
    evil = "<script>alert(1)</script>"
    write_items({"id": 1, "text": f"red {evil}"})
    store = ["-m", words, "--uri", "w.db"]
    assert run("ingest", "items.jsonl", *store).exit_code == 0
    shown = run("query", *store, "-t", f"red {evil}", "--find", "text", "--format", "html").stdout
    assert shown.count("&lt;script&gt;") == 2
    assert "<script>" not in shown


def test_models_must_have_the_same_backbones(words):
    import shutil

    save_features("own.npz", **SETS)
    Path(words, "training.json").write_text('{"split": {"query": ["0"], "validation": []}}')
    shutil.copytree(words, "other")
    config = json.loads(Path("other/config.json").read_text())
    config["towers"]["image"]["backbone"]["revision"] = "another"
    Path("other/config.json").write_text(json.dumps(config))
    refused = run("evaluate", "own.npz", "-m", words, "-m", "other")
    assert refused.exit_code == 2
    assert "other and words have different backbones" in refused.stderr
