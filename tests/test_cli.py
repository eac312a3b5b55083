"""The command line, as its users meet it: output, errors, exit codes."""

import csv
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from cmh_milvus.cli import cli
from cmh_milvus.codes import from_bytes, hamming_distances

OFFLINE = ["--image-backbone", "efficientnet-lite2", "--text-backbone", "all-minilm-l6-v2"]
QUICK = ["--set", "epochs=2", "--set", "hidden=32", "--bits", "16"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("MILVUS_URI", "MILVUS_TOKEN", "CMH_MODEL"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments, **kwargs):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments], **kwargs)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def lines(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def shop(emoji, tmp_path_factory):
    """A user's own data: 60 pictures, a CSV beside them, two of the pictures bad."""
    folder = tmp_path_factory.mktemp("shop")
    rows = []
    for number, item in enumerate(emoji.items[::31][:60]):
        name = f"{item.id}.webp"
        shutil.copy(item.image, folder / name)
        rows.append(
            {"sku": f"sku-{number}", "photo": name, "title": item.text, "kind": "|".join(item.labels), "price": number}
        )
    (folder / rows[7]["photo"]).write_bytes((folder / rows[7]["photo"]).read_bytes()[:200])
    (folder / rows[8]["photo"]).write_text("I am a text")
    with (folder / "shop.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "shop.csv"


COLUMNS = [
    "--id-column", "sku", "--image-column", "photo", "--text-column", "title",
    "--label-column", "kind", "--label-separator", "|",
]  # fmt: skip


@pytest.fixture(scope="module")
def emoji_db(encoder, emoji_codes, emoji, tmp_path_factory):
    """A collection of every emoji, ingested by the library."""
    from cmh_milvus.codes import to_bytes
    from cmh_milvus.store import HashCollection, Row

    uri = str(tmp_path_factory.mktemp("db") / "emoji.db")
    with HashCollection.create(uri, "items", encoder) as collection:
        for modality, codes in emoji_codes.items():
            collection.upsert(
                Row(item.id, modality, code, {"caption": item.text, "labels": list(item.labels)})
                for item, code in zip(emoji.items, to_bytes(codes), strict=True)
            )
    return uri


def test_own_data_from_csv_to_figures(shop, tmp_path):
    """train, ingest, query, info and evaluate on a user's own table, bad pictures among good ones."""
    cache = ["--cache", tmp_path / "cache"]
    trained = run("train", shop, "-o", "enc", *COLUMNS, *OFFLINE, *QUICK, *cache, "--queries", "0.2")
    assert trained.exit_code == 3, trained.stderr
    (row,) = lines(trained)
    assert row["n_bits"] == 16
    assert row["train"] + row["validation"] < 58
    failed = [json.loads(line) for line in Path("enc.failures.jsonl").read_text().splitlines()]
    assert [failure["id"] for failure in failed] == ["sku-7", "sku-8"]
    assert "2 items failed, listed in enc.failures.jsonl" in trained.stderr
    assert not Path("enc.checkpoint").exists()

    ingested = run("ingest", shop, "-m", "enc", "--uri", "shop.db", *COLUMNS, *cache, "--field", "price")
    assert ingested.exit_code == 3, ingested.stderr
    (row,) = lines(ingested)
    assert (row["ingested"], row["already there"], row["failed"], row["rows"]) == (118, 0, 2, 118)
    again = run("ingest", shop, "-m", "enc", "--uri", "shop.db", *COLUMNS, *cache, "--field", "price")
    (row,) = lines(again)
    assert (row["ingested"], row["already there"], row["rows"]) == (0, 118, 118)

    found = run("query", "-m", "enc", "--uri", "shop.db", "-t", "smile", "-n", "3", "--field", "price")
    assert found.exit_code == 0
    assert [hit["rank"] for hit in lines(found)] == [1, 2, 3]
    assert {hit["modality"] for hit in lines(found)} == {"image"}
    assert all(hit["price"] == int(hit["item"].removeprefix("sku-")) for hit in lines(found))
    cheap = ["-t", "smile", "-n", "60", "--field", "price", "--filter", "price < 5"]
    assert {hit["price"] for hit in lines(run("query", "-m", "enc", "--uri", "shop.db", *cheap))} == {0, 1, 2, 3, 4}

    about = {row["what"]: row["value"] for row in lines(run("info", "enc"))}
    assert (about["method"], about["n_bits"]) == ("duet", 16)
    about = {row["what"]: row["value"] for row in lines(run("info", "--uri", "shop.db"))}
    assert (about["pictures"], about["texts"]) == (58, 60)

    measured = run("evaluate", shop, "-m", "enc", *COLUMNS, *cache, "--uri", "shop.db", "--report", "page.html")
    assert measured.exit_code == 3, measured.stderr
    rows = lines(measured)
    assert {row["encoder"] for row in rows} == {"enc", "enc, not binarised", "CCA-ITQ", "random projection"}
    for row in rows:
        assert 0 <= row["MAP@all worst"] <= row["MAP@all"] + 1e-9
        assert row["MAP@all"] <= row["MAP@all best"] + 1e-9 <= 1 + 1e-9
    assert "MAP differs by 0.0e+00, 0 rows are missing" in measured.stderr
    assert "<svg" in Path("page.html").read_text()
    assert json.loads(Path("enc/evaluation.json").read_text())["data"]["n_query"] == rows[0]["n_query"] == 11


def test_words_and_places_from_csv_to_figures(shop, tmp_path):
    """Token-level backbones through train, ingest, query of either modality, and evaluate."""
    tokens = ["--image-backbone", "efficientnet-lite2-tokens", "--text-backbone", "all-minilm-l6-v2-tokens"]
    cache = ["--cache", tmp_path / "cache"]
    options = [*COLUMNS, *tokens, *cache, "--method", "mith", *QUICK, "--queries", "0.2"]
    assert run("train", shop, "-o", "enc", *options).exit_code == 3
    described = json.loads(Path("enc/config.json").read_text())["towers"]
    assert [tower["head"]["tokens"] for tower in described.values()] == [10, 17]
    assert run("ingest", shop, "-m", "enc", "--uri", "shop.db", *COLUMNS, *cache).exit_code == 3
    item = lines(run("query", "-m", "enc", "--uri", "shop.db", "-t", "smile", "-n", "1"))[0]["item"]
    with shop.open(newline="") as file:
        photo = next(row["photo"] for row in csv.DictReader(file) if row["sku"] == item)
    hits = lines(run("query", "-m", "enc", "--uri", "shop.db", "-i", shop.parent / photo, "--find", "image", "-n", "9"))
    assert item in [hit["item"] for hit in hits if hit["distance"] == 0]
    evaluated = run("evaluate", shop, "-m", "enc", *COLUMNS, *cache)
    assert evaluated.exit_code == 3, evaluated.stderr
    assert {"CCA-ITQ", "random projection"} <= {row["encoder"] for row in lines(evaluated)}


def test_tokens_of_ones_own(tmp_path):
    """An .npz file with token matrices on one side."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (60, 4))
    image = rng.normal(size=(60, 3, 4)) + labels[:, None]
    np.savez("own.npz", image=image, text=labels, labels=labels, query=np.arange(10), database=np.arange(10, 60))
    assert run("train", "own.npz", "-o", "enc", "--method", "dcmh", *QUICK).exit_code == 0
    specs = [tower["backbone"]["spec"] for tower in json.loads(Path("enc/config.json").read_text())["towers"].values()]
    assert specs == ["precomputed:3x4", "precomputed:4"]
    assert run("evaluate", "own.npz", "-m", "enc", "--report", "own.html").exit_code == 0
    assert "picture features, float32</td><td>48</td>" in Path("own.html").read_text()


def test_sweep_gates_and_latex(emoji_features, tmp_path):
    """Methods at several lengths from a features file; the gate and the leak audit end with 5."""
    split = emoji_features.split
    some = np.sort(np.concatenate([split.query[:40], split.database[:200]]))
    query = np.flatnonzero(np.isin(some, split.query))
    arrays = {
        "image": emoji_features.image[some],
        "text": emoji_features.text[some],
        "labels": emoji_features.labels[some],
        "query": query,
        "database": np.setdiff1d(np.arange(len(some)), query),
    }
    np.savez("some.npz", **arrays)
    base = ["evaluate", "some.npz", "--method", "cca_itq", "--no-baselines"]
    swept = run(*base, "--bits", "8,16", "--report", "sweep.html")
    assert swept.exit_code == 0, swept.stderr
    rows = lines(swept)
    assert {(row["encoder"], row["n_bits"]) for row in rows} >= {("CCA-ITQ", 8), ("CCA-ITQ", 16)}
    assert rows[0]["MAP@all p"] is None
    assert 0 <= next(row["MAP@all p"] for row in rows if row["n_bits"] == 16) <= 1
    assert "No query row" in swept.stderr
    latex = run(*base, "--format", "latex", "--min-map", "0.99")
    assert latex.exit_code == 5
    assert "below the gate of 0.99" in latex.stderr
    assert latex.stdout.startswith(r"\begin{tabular}")
    assert latex.stdout.count(r"\\") == 9
    assert r"image\_to\_text" in latex.stdout

    arrays["image"][query[0]] = arrays["image"][arrays["database"][0]]
    np.savez("leaky.npz", **arrays)
    leaky = ["evaluate", "leaky.npz", "--method", "cca_itq", "--no-baselines"]
    assert run(*leaky).exit_code == 0
    strict = run(*leaky, "--strict")
    assert strict.exit_code == 5
    assert "LEAK: 1 of 40 queries have the very picture" in strict.stderr
    fails(run(*base, "--bits", "8,many"), 2, "8,many")
    fails(run(*base, "--bits", "9"), 2, "multiple of 8")


def test_benchmark_resumes(emoji_features):
    """A row a run; what the file has is not run again, a torn last line is."""
    some = np.sort(np.concatenate([emoji_features.split.query[:30], emoji_features.split.database[:150]]))
    query = np.flatnonzero(np.isin(some, emoji_features.split.query))
    np.savez(
        "some.npz",
        image=emoji_features.image[some],
        text=emoji_features.text[some],
        labels=emoji_features.labels[some],
        query=query,
        database=np.setdiff1d(np.arange(len(some)), query),
    )
    base = ["benchmark", "some.npz", "--method", "cca_itq", "--seeds", "2", "-o", "b.jsonl"]
    first = run(*base, "--bits", "8")
    assert first.exit_code == 0, first.stderr
    written = Path("b.jsonl").read_text()
    assert len(written.splitlines()) == 2
    (row,) = lines(first)
    assert (row["data"], row["method"], row["n_bits"], row["seeds"]) == ("some", "cca_itq", 8, 2)
    seeds = [json.loads(line) for line in written.splitlines()]
    both = [(line["MAP@all I→T"] + line["MAP@all T→I"]) / 2 for line in seeds]
    assert row["MAP@all"] == pytest.approx(np.mean(both))
    assert row["MAP@all +-"] == pytest.approx(np.std(both, ddof=1))
    Path("b.jsonl").write_text(written + '{"data": "so')
    assert lines(run(*base, "--bits", "8")) == [row]
    assert Path("b.jsonl").read_text() == written
    assert len(lines(run(*base, "--bits", "8,16"))) == 2
    assert Path("b.jsonl").read_text().startswith(written)
    Path("b.jsonl").write_text("nonsense\n")
    fails(run(*base, "--bits", "8"), 1, "line 1 of b.jsonl")
    fails(run("benchmark", "photos", "-o", "c.jsonl"), 2, "photos")


def save_features(file, **sets):
    """80 random pairs with one of two labels each."""
    rng = np.random.default_rng(0)
    labels = np.eye(2)[np.arange(80) % 2]
    np.savez(file, image=rng.normal(size=(80, 5)), text=rng.normal(size=(80, 4)), labels=labels, **sets)


@pytest.mark.parametrize("width", [80, 120])
def test_tables_are_readable(width, monkeypatch):
    """Whole words and figures, in lines no wider than the terminal."""
    monkeypatch.setenv("COLUMNS", str(width))
    save_features("own.npz", query=np.arange(16), database=np.arange(16, 80))
    table = ["--bits", "8", "--format", "table"]
    evaluated = run("evaluate", "own.npz", "--method", "scm", *table).stdout
    compared = run("benchmark", "own.npz", "--method", "scm", "--method", "random_projection", *table).stdout
    for shown, words in (
        (evaluated, ["16 queries, 64 in the database, chance 0.5", "direction", "image_to_text", "distinct"]),
        (compared, ["method", "MAP@all", "R@10", "scm"]),
    ):
        assert all(word in shown for word in words), shown
        assert max(map(len, shown.splitlines())) <= width
        assert re.search(r" 0\.\d{3} ", shown)
    assert " low" not in evaluated
    assert "MAP@all low" in lines(run("evaluate", "own.npz", "--method", "scm", "--bits", "8"))[0]


def test_a_wide_table_is_not_squeezed(monkeypatch, capsys):
    from cmh_milvus.cli.output import print_rows

    monkeypatch.setenv("COLUMNS", "40")
    print_rows([{f"number {i}": 1234.5 for i in range(20)} | {"address": "x" * 100}], "table")
    shown = capsys.readouterr().out
    assert shown.count("1234.500") == 20
    assert "x" * 13 in shown


def test_a_features_files_own_sets_are_evaluated():
    """44 of its 80 rows are the database and 24 are trained on; the others are neither."""
    save_features("own.npz", query=np.arange(16), database=np.arange(16, 60), train=np.arange(30, 54))
    trained = lines(run("train", "own.npz", "-o", "enc", "--method", "cca_itq", "--bits", "8"))
    assert trained[0]["train"] + trained[0]["validation"] == 24
    measured = run("evaluate", "own.npz", "-m", "enc", "--method", "scm", "--bits", "8,8", "--no-baselines")
    assert "24 of 44" in measured.stderr
    names = [row["encoder"] for row in lines(measured)]
    assert names.count("scm") == names.count("enc") > 0
    assert {row["n_database"] for row in lines(measured)} == {44}


def test_an_encoder_without_queries_is_not_evaluated():
    settings = ["--method", "cca_itq", "--bits", "8", "--queries", "0"]
    assert run("train", "emoji", "-o", "enc", *settings).exit_code == 0
    training = json.loads(Path("enc/training.json").read_text())
    training["split"] = {"query": [], "validation": []}
    Path("enc/training.json").write_text(json.dumps(training))
    fails(run("evaluate", "emoji", "-m", "enc"), 1, "held out no queries")


def test_one_seed_has_no_deviation():
    """JSON has no NaN."""
    save_features("own.npz", query=np.arange(16), database=np.arange(16, 80))
    for output_format in ("json", "jsonl"):
        result = run(
            "benchmark", "own.npz", "--method", "scm", "--bits", "8", "--seeds", "1", "--format", output_format
        )
        assert "NaN" not in result.stdout
        assert '"MAP@all +-": null' in result.stdout


def test_checkpoints_of_dotted_names_are_apart(monkeypatch):
    """`shoes.v1` and `shoes.v2` must not share a checkpoint."""
    import cmh_milvus.training as training

    def interrupted(self, method):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training._Run, "_validate", interrupted)
    for name in ("shoes.v1", "shoes.v2"):
        settings = ["--set", "epochs=6", "--set", "hidden=16", "--bits", "8"]  # tried in 2 each
        assert run("train", "emoji", "-o", name, *settings).exit_code == 130
    assert sorted(path.name for path in Path().glob("shoes*")) == ["shoes.v1.checkpoint", "shoes.v2.checkpoint"]


def test_models_must_hold_out_the_same_queries():
    common = ["train", "emoji", "--set", "epochs=1", "--set", "hidden=16", "--bits", "8"]
    for name in ("a", "b"):
        assert run(*common, "-o", name).exit_code == 0
    both = ["evaluate", "emoji", "-m", "a", "-m", "b", "--no-baselines"]
    assert {row["encoder"] for row in lines(run(*both))} == {"a", "b", "a, not binarised"}
    training = json.loads(Path("b/training.json").read_text())
    training["split"]["query"] = training["split"]["query"][5:]
    Path("b/training.json").write_text(json.dumps(training))
    fails(run(*both), 2, "b was trained on 5 of the queries that a held out")


def test_truncate(encoder, encoder_folder):
    result = run("truncate", "-m", encoder_folder, "--bits", "16", "-o", "short")
    assert result.exit_code == 0
    assert lines(result)[0]["fingerprint"] == encoder.truncated(16).fingerprint[:12]
    assert "not trained with nested codes" in result.stderr
    assert json.loads(Path("short/training.json").read_text())["truncated_from"] == encoder.fingerprint


def test_query_equals_brute_force(encoder, encoder_folder, emoji_db, emoji, emoji_codes):
    result = run("query", "-m", encoder_folder, "--uri", emoji_db, "-t", "red apple fruit", "-n", "5")
    assert result.exit_code == 0, result.stderr
    from cmh_milvus import CrossModalHashEmbeddingFunction

    code = CrossModalHashEmbeddingFunction(encoder).encode_texts(["red apple fruit"])
    exact = hamming_distances(from_bytes(code), emoji_codes["image"])[0]
    expected = sorted((int(d), f"{item.id}#image", item) for d, item in zip(exact, emoji.items, strict=True))[:5]
    hits = lines(result)
    assert [(hit["distance"], hit["item"]) for hit in hits] == [(d, item.id) for d, _, item in expected]
    assert hits[0]["caption"] == expected[0][2].text


def test_query_options(encoder_folder, emoji_db, emoji):
    base = ["query", "-m", encoder_folder, "--uri", emoji_db]
    picture = emoji.items[0].image
    assert {hit["modality"] for hit in lines(run(*base, "-i", picture, "-n", "4"))} == {"text"}
    both = lines(run(*base, "-i", picture, "--find", "both", "-n", "40"))
    assert (both[0]["item"], both[0]["distance"]) == (emoji.items[0].id, 0)
    flags = lines(run(*base, "-t", "a flag", "--filter", 'json_contains(labels, "flags")', "--field", "labels"))
    assert flags
    assert all("flags" in hit["labels"] for hit in flags)
    nearest = lines(run(*base, "-t", "a flag", "-n", "1"))[0]["distance"]
    near = lines(run(*base, "-t", "a flag", "--radius", nearest))
    assert near
    assert {hit["distance"] for hit in near} == {nearest}
    nothing = run(*base, "-t", "a flag", "--filter", 'caption == "no such"')
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "nothing found" in nothing.stderr
    absent = run(*base, "-t", "tree", "--field", "nosuch", "--field", "caption")
    assert "--field nosuch: no hit has a field of that name" in absent.stderr
    assert "--field caption" not in absent.stderr
    two = lines(run(*base, "-t", "-", "-n", "1", input="a ship\n\na tree\n"))
    assert [hit["query"] for hit in two] == ["a ship", "a tree"]
    among = lines(run(*base, "-t", "a dog", "-t", "-", "-t", "-", "-t", "a cat", "-n", "1", input="a ship\na tree\n"))
    assert [hit["query"] for hit in among] == ["a dog", "a ship", "a tree", "a cat"]
    fails(run(*base, "-t", "-", input="\n"), 1, "standard input holds no text")


def test_lines_of_standard_input_end_in_any_way():
    from cmh_milvus.cli.commands import _lines

    assert _lines(io.StringIO("a ship\r\n\r\n a tree \n\na dog", newline="")) == ["a ship", " a tree ", "a dog"]


@pytest.mark.parametrize("output_format", ["table", "json", "jsonl", "csv", "html"])
def test_formats(encoder_folder, emoji_db, output_format):
    result = run("query", "-m", encoder_folder, "--uri", emoji_db, "-t", "tree", "-n", "2", "--format", output_format)
    assert result.exit_code == 0
    if output_format == "json":
        assert len(json.loads(result.stdout)) == 2
    elif output_format == "jsonl":
        assert len(lines(result)) == 2
    elif output_format == "csv":
        assert [row["rank"] for row in csv.DictReader(io.StringIO(result.stdout))] == ["1", "2"]
    elif output_format == "html":
        assert result.stdout.count("<tr>") == 3
    else:
        assert "distance" in result.stdout


def test_pipe_that_closes_early(encoder_folder, emoji_db):
    """`... | head -1` prints one line and nothing else."""
    command = (
        f"{sys.executable} -m cmh_milvus query -m {encoder_folder} --uri {emoji_db} --text tree --radius 64 "
        "--format jsonl | head -n 1"
    )
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
@pytest.mark.parametrize("arguments", [["methods"], ["methods", "--format", "table"], ["methods", "--help"]])
def test_full_disk(arguments):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cmh_milvus", *arguments], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "No space left on device" in done.stderr


def test_help_is_light():
    """No torch, no pymilvus, under a second (three tries: the machine may be busy)."""
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from click.testing import CliRunner; from cmh_milvus.cli import cli\n"
        "for arguments in (['--help'], ['train', '--help'], ['query', '--help']):\n"
        "    assert CliRunner().invoke(cli, arguments).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'pymilvus', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import cmh_milvus; assert not {'torch', 'pymilvus'} & set(sys.modules)\n"
        "print(time.process_time())"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 1


def test_methods():
    rows = lines(run("methods"))
    assert {"duet", "dcmh", "cca_itq", "random_projection"} <= {row["method"] for row in rows}
    assert all(row["title"] and row["published"] for row in rows)


def test_demo(monkeypatch):
    """All of the quick start but for the length of the trainings."""
    import dataclasses

    import cmh_milvus.comparison as comparison
    import cmh_milvus.demo as demo
    from cmh_milvus.training import train

    def quick(data, settings, **kwargs):
        epochs = {} if settings.method in ("cca_itq", "random_projection") else {"epochs": 20, "hidden": 64}
        return train(data, dataclasses.replace(settings, method_settings=epochs, refit=False), **kwargs)

    monkeypatch.setattr(demo, "train", quick)
    monkeypatch.setattr(comparison, "train", quick)
    result = run("demo", "-o", "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "out/demo.html\n"
    assert "MAP through Milvus equals MAP in numpy to 0e+00 (0 rows missing)" in result.stderr
    page = Path("out/demo.html").read_text()
    for shown in ("red apple fruit", "random projection", "hash code of 64 bits", "held-out", "not binarised"):
        assert shown in page
    assert page.count("data:image/") >= 8 * 8
    assert json.loads(Path("out/encoder/evaluation.json").read_text())["through_collection"]["missing"] == 0


# Bad input: a clear sentence and the documented exit code


def fails(result, exit_code, *words):
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def test_second_encoder_is_refused(shop, emoji_db, tmp_path):
    run("train", shop, "-o", "other", *COLUMNS, *OFFLINE, *QUICK, "--cache", tmp_path / "cache")
    before = run("info", "--uri", emoji_db).stdout
    for command in (["ingest", shop, *COLUMNS], ["query", "-t", "x"]):
        fails(
            run(*command, "-m", "other", "--uri", emoji_db), 4, "64-bit codes", "16-bit codes", "into a new collection"
        )
    assert run("info", "--uri", emoji_db).stdout == before


def test_bits_not_a_multiple_of_8():
    fails(run("train", "emoji", "-o", "x", "--bits", "60"), 2, "60 bits", "multiple of 8")


def test_unknown_method():
    fails(run("train", "emoji", "-o", "x", "--method", "magic"), 2, "magic", "duet")


def test_unknown_setting():
    fails(run("train", "emoji", "-o", "x", "--set", "speed=11"), 2, "speed", "pair_weight")
    fails(run("train", "emoji", "-o", "x", "--set", "speed"), 2, "NAME=VALUE")
    fails(run("train", "emoji", "-o", "x", "--set", "epochs=many"), 2, "epochs", "int")
    fails(run("train", "emoji", "-o", "x", "--method", "dcmh", "--set", "similarity=some"), 2, "any, jaccard, cosine")


def test_missing_source():
    fails(run("train", "nothing.csv", "-o", "x", *OFFLINE), 1, "nothing.csv")


def test_empty_folder(encoder_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    fails(run("train", "empty", "-o", "x", *OFFLINE), 1, "empty")
    fails(run("ingest", "empty", "-m", encoder_folder, "--uri", "x.db"), 1, "empty")


def test_wrong_column(shop):
    fails(run("train", shop, "-o", "x", "--text-column", "name", *OFFLINE), 2, "'name'", "'title'")


def test_unknown_backbone(shop):
    fails(run("train", shop, "-o", "x", *COLUMNS, "--image-backbone", "resnet"), 2, "resnet", "efficientnet-lite2")


def test_hub_out_of_reach(shop):
    fails(run("train", shop, "-o", "x", *COLUMNS), 1, "clip", "efficientnet-lite2")


def test_no_encoder(emoji_db):
    fails(run("query", "-m", "nothing", "--uri", emoji_db, "-t", "x"), 1, "nothing", "no encoder folder")


def test_absent_server(encoder_folder):
    fails(run("query", "-m", encoder_folder, "--uri", "http://127.0.0.1:9", "-t", "x"), 1, "127.0.0.1:9")


def test_absent_collection(encoder_folder, emoji_db):
    fails(run("query", "-m", encoder_folder, "--uri", emoji_db, "-c", "cats", "-t", "x"), 1, "cats", "items")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere: run as another user to test this")
def test_read_only_folder_by_mode(encoder_folder, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    fails(run("train", "emoji", "-o", "locked/x", *QUICK), 1, "locked")


@pytest.mark.skipif(not Path("/proc/1").is_dir(), reason="needs /proc, where not even root can make files")
def test_read_only_folder():
    fails(run("train", "emoji", "-o", "/proc/enc", *QUICK), 1, "/proc")


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (".", "names no folder of its own"),
        ("/", "names no folder of its own"),
        ("notes.txt", "no encoder folder"),
        ("notes.txt/enc", "no folder that may be written to"),
        ("model", "no encoder folder"),
    ],
)
def test_where_no_encoder_can_be_written(output, words, monkeypatch):
    """It is said before anything is read or trained, and nothing is lost."""
    Path("notes.txt").write_text("mine")
    Path("model").mkdir()
    Path("model/config.json").write_text('{"architectures": []}')
    monkeypatch.setattr("cmh_milvus.cli.commands.training_source", lambda *_, **__: pytest.fail("data were read"))
    fails(run("train", "emoji", "-o", output), 1, words)
    assert Path("notes.txt").read_text() == "mine"
    assert Path("model/config.json").exists()


def test_where_no_file_can_be_written():
    Path("notes.txt").write_text("mine")
    save_features("own.npz", query=np.arange(16), database=np.arange(16, 80))
    base = ["own.npz", "--method", "scm", "--bits", "8"]
    fails(run("benchmark", *base, "-o", "notes.txt/b.jsonl"), 1, "notes.txt")
    for command in ("evaluate", "benchmark"):
        result = run(command, *base, "--report", "notes.txt/page.html")
        assert (result.exit_code, "notes.txt" in result.stderr) == (1, True)
        assert "MAP@all" in result.stdout  # the figures are not lost


def test_wrong_methods_and_lengths_are_said_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr("cmh_milvus.cli.commands.training_source", lambda *_, **__: pytest.fail("data were read"))
    base = ["evaluate", "own.npz", "--method", "scm"]
    fails(run(*base, "--method", "magic"), 2, "magic", "duet")
    fails(run(*base, "--bits", "16,9"), 2, "multiple of 8")
    for gate in ("nan", "-0.1", "1.5"):
        fails(run(*base, "--min-map", gate), 2, "--min-map is a MAP between 0 and 1")


def test_milvus_uri_may_be_a_file(encoder_folder, emoji_db):
    """pymilvus reads the variable too, as a server's address, when it is imported: in a process of its own."""
    code = "import sys; from cmh_milvus.cli import main; sys.argv[1:] = {!r}; main()"

    def called(*arguments, uri=emoji_db):
        command = [sys.executable, "-c", code.format(list(map(str, arguments)))]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MILVUS_URI": uri})

    found = called("query", "-m", encoder_folder, "-t", "cat", "-n", "2")
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 2
    assert "pictures" in called("info").stdout
    about = called("info", encoder_folder, uri="http://127.0.0.1:1")
    assert about.returncode == 0, about.stderr
    assert '"n_bits"' in about.stdout


@pytest.mark.parametrize("name", ["training.json", "evaluation.json"])
def test_records_that_are_damaged(name, encoder_folder):
    shutil.copytree(encoder_folder, "enc")
    Path("enc", name).write_text("{}")
    fails(run("info", "enc"), 1, "is damaged")


def test_bad_picture_as_query(encoder_folder, emoji_db):
    Path("cat.jpg").write_text("meow")
    fails(run("query", "-m", encoder_folder, "--uri", emoji_db, "-i", "cat.jpg"), 1, "cat.jpg")
    fails(run("query", "-m", encoder_folder, "--uri", emoji_db, "-i", "absent.jpg"), 1, "absent.jpg")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["query", "-m", "x"], "--text or --image"),
        (["query", "-m", "x", "-t", "a", "-n", "3", "-r", "2"], "--top and --radius"),
        (["query", "-m", "x", "-t", "a", "-n", "0"], "0 is not in the range"),
        (["info"], "encoder's folder"),
        (["evaluate", "emoji"], "--model or --method"),
        (["evaluate", "emoji", "--method", "duet", "--uri", "x.db"], "--uri needs --model"),
        (["train", "emoji"], "--output"),
        (["train", "emoji", "-o", "x", "--seed", "-1"], "-1 is not in the range"),
        (["benchmark", "emoji", "--seeds", "0"], "0 is not in the range"),
        (["train", "emoji", "-o", "x", "--device", "meta"], "nothing can be computed on device"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_wrong_usage(arguments, words):
    fails(run(*arguments), 2, words)


def huge_png(path, side):
    """A one-bit PNG of side x side pixels, small on disk."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    squeeze = zlib.compressobj(9)
    row = b"\0" * (1 + (side + 7) // 8)
    data = b"".join(squeeze.compress(row * 100) for _ in range(side // 100)) + squeeze.flush()
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def test_one_bad_item_never_ends_an_ingest(encoder_folder, emoji, tmp_path):
    """Truncated, mislabelled, huge, missing, empty, duplicate, outside: all listed, the good ones stored."""
    good = emoji.items[3].image
    shutil.copy(good, "good.webp")
    Path("short.webp").write_bytes(good.read_bytes()[:300])
    Path("text.jpg").write_text("I am a text")
    Path("empty.png").touch()
    huge_png(tmp_path / "huge.png", 30_000)
    rows = [
        {"id": "good", "image": "good.webp", "text": "a face"},
        {"id": "short", "image": "short.webp", "text": "b"},
        {"id": "mislabelled", "image": "text.jpg"},
        {"id": "empty", "image": "empty.png"},
        {"id": "huge", "image": "huge.png"},
        {"id": "missing", "image": "absent.jpg"},
        {"id": "no caption", "image": "good.webp", "text": ""},
        {"id": "good", "text": "again"},
        {"id": "outside", "image": "../../etc/passwd"},
        {"id": "x" * 600, "text": "an id that Milvus has no room for"},
        {"id": "number", "text": "n", "size": 10**24},
        {"id": "last", "text": "the end", "size": 7},
    ]
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--field", "size", "--field", "sise"]
    result = run("ingest", "items.jsonl", "-m", encoder_folder, "--uri", "bad.db", *asked)
    assert result.exit_code == 3, result.stderr
    assert "--field sise: no item has a column of that name" in result.stderr
    assert "--field size" not in result.stderr
    listed = [json.loads(line) for line in Path("bad.items.failures.jsonl").read_text().splitlines()]
    assert {row["id"] for row in listed} == {row["id"] for row in rows} - {"last"}
    assert all(row["reason"] for row in listed)
    hits = lines(run("query", "-m", encoder_folder, "--uri", "bad.db", "-t", "the end", "--find", "both"))
    assert {(hit["item"], hit["modality"]) for hit in hits} == {
        ("good", "image"), ("good", "text"), ("last", "text"), ("short", "text"),
    }  # fmt: skip


def test_ingest_from_stdin(encoder_folder):
    rows = [{"id": "1", "text": "a cat"}, {"id": "2", "text": "a dog"}]
    stdin = "".join(json.dumps(row) + "\n" for row in rows)
    result = run("ingest", "-", "-m", encoder_folder, "--uri", "in.db", input=stdin)
    assert result.exit_code == 0, result.stderr
    assert lines(result)[0]["rows"] == 2


def test_interrupted_training_goes_on(tmp_path, monkeypatch):
    """Ctrl-C: exit code 130, a checkpoint; the same command ends with the codes of an unbroken run."""
    arguments = ["train", "emoji", "--set", "epochs=30", "--set", "hidden=16", "--bits", "8"]
    whole = lines(run(*arguments, "-o", "whole"))[0]

    import cmh_milvus.training as training

    validate = training._Run._validate
    calls = []

    def interrupted(self, method):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(self, method)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_validate", interrupted)
        broken = run(*arguments, "-o", "enc")
    assert broken.exit_code == 130
    assert "run the same command again" in broken.stderr
    assert Path("enc.checkpoint").exists()
    assert not Path("enc").exists()
    assert lines(run(*arguments, "-o", "enc"))[0]["fingerprint"] == whole["fingerprint"]
    assert not Path("enc.checkpoint").exists()


def test_backbones_that_were_trained_too(shop, clip_folder):
    """Learned, stored and searched with the very backbones; a cache keeps theirs apart from the original ones."""
    clip = f"clip:{clip_folder}"
    options = ("--bits", "16", "--set", "epochs=2", "--set", "hidden=16", "--cache", "features", *COLUMNS)
    both = ("--image-backbone", clip, "--text-backbone", clip)
    done = run("train", shop, "-o", "full", "--full", "--backbone-rate", "1e-3", *both, *options)
    assert done.exit_code == 3  # two pictures are bad
    assert json.loads(Path("full/training.json").read_text())["backbone_rate"] == 1e-3
    caches = len(list(Path("features").iterdir()))
    stored = run("ingest", shop, "-m", "full", "--uri", "full.db", "--cache", "features", *COLUMNS)
    assert lines(stored)[0]["ingested"] > 100
    assert len(list(Path("features").iterdir())) == caches + 2
    text = lines(run("query", "-m", "full", "--uri", "full.db", "--text", "red", "--top", "3"))
    assert [hit["rank"] for hit in text] == [1, 2, 3]
    evaluated = run("evaluate", shop, "-m", "full", "--cache", "features", "--uri", "full.db", *COLUMNS)
    assert "MAP differs by 0.0e+00, 0 rows are missing" in evaluated.stderr
    assert "fine-tuned" in run("info", "full").stdout


def test_backbones_cannot_be_trained(tmp_path, shop):
    np.savez("f.npz", image=np.eye(8), text=np.eye(8), query=[0], database=np.arange(1, 8))
    fails(run("train", "f.npz", "-o", "x", "--full"), 2, "pictures and texts")
    fails(run("train", shop, "-o", "x", "--full", "--method", "cmfh", *COLUMNS), 2, "closed form")
    fails(run("train", shop, "-o", "x", "--backbone-rate", "1e-4", *COLUMNS), 2, "--full")
    fails(run("train", shop, "-o", "x", "--full", "--backbone-rate", "0", *COLUMNS), 2, "backbone-rate")
