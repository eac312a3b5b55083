"""Methods x code lengths x data sets x seeds: runs, published figures, tables and plots."""

import csv
import json
import math
import re
from dataclasses import replace
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure

from cmh_milvus import benchmark
from cmh_milvus.benchmark import parse_method, run_benchmark, summary
from cmh_milvus.cli import cli
from cmh_milvus.datasets.base import Split
from cmh_milvus.errors import DataError, SettingsError
from cmh_milvus.methods import duet, list_methods
from cmh_milvus.published import published_map
from cmh_milvus.report.benchmark import benchmark_table, plotted_length, read_rows, render_benchmark
from cmh_milvus.report.plots import _label_points, bits_plot, recall_plot, seconds_plot
from tests.test_report import parse

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = list(csv.DictReader(files("cmh_milvus").joinpath("published_map.csv").read_text().splitlines()))


@pytest.fixture
def small(emoji_features):
    """220 emoji, 40 of them queries."""
    split = Split(np.arange(40), np.arange(40, 220), np.arange(40, 220), np.arange(0))
    take = np.arange(220)
    return replace(
        emoji_features, ids=emoji_features.ids[:220], image=emoji_features.image[take], text=emoji_features.text[take],
        labels=emoji_features.labels[take], split=split,
    )  # fmt: skip


def row(data="shop", method="duet", n_bits=64, *, value=0.6, recall=0.3, deviation=0.01, seconds=9.0, paper=None):
    """A row of `summary`."""
    made = {"data": data, "method": method, "n_bits": n_bits, "seeds": 2, "MAP@all": value, "MAP@all +-": deviation}
    for label in ("I→T", "T→I"):
        for figure, mean in (("MAP@all", value), ("NDCG@10", 0.5), ("own R@10", recall)):
            made |= {f"{figure} {label}": mean, f"{figure} {label} +-": deviation}
        made[f"paper {label}"] = paper
    return made | {"distinct": 0.9, "seconds": seconds, "device": "cpu", "chance": 0.1}


ROWS = [
    row(n_bits=16, value=0.5), row(), row(n_bits=128, value=0.62), row(method="duet:pair_weight=0.1", value=0.7),
    row(method="dcmh", value=0.71, recall=0.05), row("zoo", "dcmh", deviation=math.nan),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("duet", ("duet", {})),
        ("duet:pair_weight=0.1", ("duet", {"pair_weight": "0.1"})),
        ("duet:nested=true,epochs=40", ("duet", {"nested": "true", "epochs": "40"})),
    ],
)
def test_a_method_with_settings(text, expected):
    assert parse_method(text) == expected


@pytest.mark.parametrize("text", ["duet:0.1", "duet:=1", "duet:epochs=", "duet:epochs=2,,hidden=3"])
def test_a_method_that_cannot_be_read(text):
    with pytest.raises(SettingsError, match=re.escape(text)):
        parse_method(text)


@pytest.mark.parametrize("text", ["dueet", "cca_itq:rigde=1", "cca_itq:ridge=much"])
def test_wrong_methods_end_a_benchmark_before_it_trains(text, small, tmp_path):
    with pytest.raises(SettingsError):
        run_benchmark({"a": small}, ["cca_itq", text], [16], 1, tmp_path / "r.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_variants_are_methods_of_their_own(small, tmp_path):
    """They stand under their own name, with their own settings, and others' figures stay."""
    asked = ["cca_itq", "cca_itq:ridge=10"]
    rows = run_benchmark({"a": small}, asked, [16], 2, tmp_path / "r.jsonl", device="cpu")
    plain, changed = summary(rows)
    assert [plain["method"], changed["method"]] == asked
    assert plain["MAP@all"] != changed["MAP@all"]
    assert [json.loads(line["settings"])["ridge"] for line in rows] == [3.0, 3.0, 10.0, 10.0]
    alone = run_benchmark(
        {"a": small}, ["cca_itq"], [16], 2, tmp_path / "s.jsonl", settings={"ridge": 10}, device="cpu"
    )
    assert next(summary(alone))["MAP@all"] == changed["MAP@all"]


def test_summary_is_the_mean_and_the_sample_deviation_over_seeds():
    """By hand: sqrt(sum((x - mean)^2) / (n - 1)); rows of a group need not stand together."""
    figures = {
        f"{name} {label}": values
        for label, shift in (("I→T", 0.0), ("T→I", 0.2))
        for name, values in (
            ("MAP@all", [0.5 + shift, 0.54 + shift, 0.64 + shift]),
            ("NDCG@10", [0.3, 0.5, 0.4]),
            ("own R@10", [0.1 + shift, 0.1 + shift, 0.4 + shift]),
        )
    }
    shared = {"n_bits": 16, "chance": 0.1, "paper I→T": None, "paper T→I": None}

    def seed_row(method, seed, device):
        values = {name: values[seed] for name, values in figures.items()}
        return shared | values | {
            "data": "a", "method": method, "distinct": seed / 2, "seconds": 3.0 * seed, "device": device,
        }  # fmt: skip

    several = [seed_row("dcmh", seed, device) for seed, device in enumerate(("cuda", "cpu", "cpu"))]
    one, alone = summary([several[0], seed_row("scm", 2, "cpu"), *several[1:]])
    assert (one["method"], one["seeds"], one["device"]) == ("dcmh", 3, "cpu, cuda")
    assert (one["distinct"], one["seconds"]) == (0.5, 3.0)
    assert one["MAP@all"] == pytest.approx(0.66)
    assert one["MAP@all +-"] == pytest.approx(math.sqrt((0.06**2 + 0.02**2 + 0.08**2) / 2))
    for label, mean in (("I→T", 0.2), ("T→I", 0.4)):
        assert one[f"own R@10 {label}"] == pytest.approx(mean)
        assert one[f"own R@10 {label} +-"] == pytest.approx(math.sqrt((0.1**2 + 0.1**2 + 0.2**2) / 2))
        assert one[f"NDCG@10 {label} +-"] == pytest.approx(0.1)
    assert (alone["seeds"], alone["MAP@all"]) == (1, pytest.approx(0.74))
    assert math.isnan(alone["MAP@all +-"])
    assert math.isnan(alone["own R@10 T→I +-"])


def test_all_methods_and_more(monkeypatch):
    """`all` stands for each method, also beside others."""
    asked = []
    monkeypatch.setattr(benchmark, "run_benchmark", lambda data, methods, *_, **__: asked.append(methods) or [row()])
    monkeypatch.setattr("cmh_milvus.cli.commands.benchmark_sources", lambda *_: {})
    for given in ([], ["--method", "all", "--method", "duet:pair_weight=1"]):
        assert CliRunner().invoke(cli, ["benchmark", "emoji", *given]).exit_code == 0
    assert asked == [list_methods(), [*list_methods(), "duet:pair_weight=1"]]


def test_a_method_or_a_length_asked_for_twice_runs_once(small, tmp_path):
    rows = run_benchmark({"a": small}, ["scm", "scm"], [8, 8], 1, tmp_path / "r.jsonl", device="cpu")
    assert len(rows) == 1


def test_another_split_of_the_same_features_is_run(small, tmp_path):
    split = small.split
    database = split.database[: len(split.database) // 2]
    halved = replace(small, split=replace(split, database=database, train=database))
    fresh = run_benchmark({"a": halved}, ["scm"], [8], 1, tmp_path / "fresh.jsonl", device="cpu")
    run_benchmark({"a": small}, ["scm"], [8], 1, tmp_path / "r.jsonl", device="cpu")
    again = run_benchmark({"a": halved}, ["scm"], [8], 1, tmp_path / "r.jsonl", device="cpu")
    assert again[0]["MAP@all I→T"] == fresh[0]["MAP@all I→T"]
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "content",
    [b'{"my": 1}', b'{"data": 1}\n3\n', b"{}\n", b"null\n", b"\xff\xfe", b"a\nb", b'{"key": {}}\n', b"[" * 100_000],
)
def test_another_file_is_not_written_to(content, small, tmp_path):
    (tmp_path / "mine").write_bytes(content)
    with pytest.raises(DataError, match="mine"):
        run_benchmark({"a": small}, ["scm"], [8], 1, tmp_path / "mine", device="cpu")
    assert (tmp_path / "mine").read_bytes() == content


def test_data_without_labels_end_a_benchmark_before_it_trains(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = {"a": small, "b": replace(small, labels=None)}
    monkeypatch.setattr("cmh_milvus.cli.commands.benchmark_sources", lambda *_: sources)
    result = CliRunner().invoke(cli, ["benchmark", "a.npz", "b.npz", "--method", "cca_itq", "--report", "page.html"])
    assert result.exit_code == 1
    assert "has no labels" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_another_share_of_validation_rows_is_another_run(small, tmp_path):
    """Where no rows can choose, the settings do not claim that they did."""
    results = tmp_path / "r.jsonl"
    given = {"epochs": 3, "hidden": 16}

    def run(validation):
        (made,) = run_benchmark(
            {"a": small}, ["duet"], [16], 1, results, validation=validation, device="cpu", settings=given
        )
        return json.loads(made["settings"])["pair_weight"]

    assert run(0.4) == list(duet.PAIR_WEIGHTS)
    assert run(0.0) == duet.DuetConfig().pair_weight
    assert len(results.read_text().splitlines()) == 2
    run(0.4)
    assert len(results.read_text().splitlines()) == 2


def test_a_line_that_another_process_left_unfinished_costs_its_run_alone(small, tmp_path):
    results = tmp_path / "r.jsonl"
    run_benchmark({"a": small}, ["cca_itq"], [16], 1, results, device="cpu")
    with results.open("a") as other:
        other.write('{"data": "a", "meth')
    benchmark._append(results, {"data": "a", "key": "last"})
    assert [row["key"] for row in benchmark._read(results)] == ["a/cca_itq/16/0", "last"]


def test_a_new_default_is_run_again(small, tmp_path, monkeypatch):
    runs = []
    measured = benchmark._measured
    monkeypatch.setattr(benchmark, "_measured", lambda *given: runs.append(given) or measured(*given))
    for ridge in (1.0, 1.0, 2.0):
        run_benchmark({"a": small}, ["scm"], [8], 1, tmp_path / "r.jsonl", settings={"ridge": ridge}, device="cpu")
    assert [given[2]["ridge"] for given in runs] == [1.0, 2.0]


def test_what_a_method_leaves_open_is_chosen_unless_it_is_given(small, tmp_path, monkeypatch):
    """The default's row is that of what `train` does by default; rows of other alternatives are run again."""
    trained = []

    def train(data, settings):
        trained.append(dict(settings.method_settings))
        return real(data, settings)

    def run(*methods):
        return run_benchmark({"a": small}, methods, [16], 1, tmp_path / "r.jsonl", settings={"epochs": 1}, device="cpu")

    real = benchmark.train
    monkeypatch.setattr(benchmark, "train", train)
    rows = run("duet", "duet:pair_weight=0.5")
    assert trained == [{"epochs": 1}, {"epochs": 1, "pair_weight": "0.5"}]
    assert [json.loads(line["settings"])["pair_weight"] for line in rows] == [list(duet.PAIR_WEIGHTS), 0.5]
    monkeypatch.setattr(duet, "PAIR_WEIGHTS", (0.3, 0.4))
    run("duet", "duet:pair_weight=0.5")
    assert len(trained) == 3


def test_the_papers_figure_needs_its_protocol_its_sizes_and_default_settings(small, tmp_path, monkeypatch):
    """The real tables are of sets too large for a test, so that a table of one figure stands in."""
    sizes = (40, 180, 180)
    table = {("tiny", sizes, "scm", 16, "image_to_text"): SimpleNamespace(value=0.777, source="x")}
    monkeypatch.setattr("cmh_milvus.published._published", lambda: table)

    def papers(data, method="scm", **given):
        (line,) = summary(run_benchmark({"a": data}, [method], [16], 1, tmp_path / "r.jsonl", device="cpu", **given))
        return line["paper I→T"], line["paper T→I"]

    tiny = replace(small, protocol="tiny")
    assert papers(tiny) == (0.777, None)
    assert papers(small) == (None, None)
    assert papers(replace(small, protocol="other")) == (None, None)
    assert papers(replace(tiny, split=replace(tiny.split, train=np.arange(50, 220)))) == (None, None)
    assert papers(tiny, "scm:ridge=2") == (None, None)
    assert papers(tiny, settings={"ridge": 2}) == (None, None)
    kept = replace(tiny.split, train=np.arange(50, 220), validation=np.arange(40, 50))
    assert papers(replace(tiny, split=kept)) == (0.777, None), "validation rows are cut from the paper's train rows"


def test_published_figures_are_sound():
    keys = [tuple(line[key] for key in ("protocol", "query", "train", "database", "method", "bits", "direction"))
            for line in PUBLISHED]  # fmt: skip
    assert len(set(keys)) == len(keys)
    for line in PUBLISHED:
        assert line["method"] in list_methods()
        assert line["direction"] in ("image_to_text", "text_to_image")
        assert 0.3 < float(line["map"]) < 0.9
        assert line["cut_off"] == "all", "MAP@all is what is measured beside it"
        assert line["source"]
        assert int(line["train"]) <= int(line["database"])


def test_published_protocols_are_documented():
    """With the sizes and the methods of each."""
    page = (ROOT / "docs" / "own-data.md").read_text()
    documented, protocol = set(), ""
    for name, sizes, methods in re.findall(r"^\| (?:`([\w-]+)` )?\| ([\d, /]+) \| ([\w, ]+) \|$", page, re.MULTILINE):
        protocol = name or protocol
        numbers = sizes.replace(",", "").split(" / ")
        documented |= {(protocol, *numbers, method) for method in methods.split(", ")}
    keys = ("protocol", "query", "train", "database", "method")
    assert documented == {tuple(line[key] for key in keys) for line in PUBLISHED}


def test_published_figures_as_printed():
    """Spot checks against the papers' tables."""

    def figure(protocol, sizes, method, n_bits, direction):
        query, train, database = sizes
        split = SimpleNamespace(query=range(query), train=range(train), validation=(), database=range(database))
        found = published_map(SimpleNamespace(protocol=protocol, split=split), method, n_bits, direction)
        return None if found is None else found.value

    dcmh = ("mirflickr-20015", (2000, 10_000, 18_015), "dcmh")
    assert figure(*dcmh, 64, "image_to_text") == 0.7485
    assert figure(*dcmh, 16, "text_to_image") == 0.7827
    assert figure(*dcmh, 128, "text_to_image") is None
    assert figure("coco-122218", (5000, 10_000, 117_218), "mith", 32, "image_to_text") == 0.7359
    assert figure("nus-wide-10-186557", (2100, 184_457, 184_457), "ucch", 128, "text_to_image") == 0.750
    assert figure("nus-wide-10-186557", (2100, 5000, 184_457), "ucch", 128, "text_to_image") is None


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_plot_of_bits_has_a_panel_a_data_set_and_a_line_a_method():
    svg = bits_plot(ROWS)
    parse(svg)
    shown = texts(svg)
    assert shown.count("shop") == shown.count("zoo") == 1
    for name in ("duet", "duet:pair_weight=0.1", "dcmh", "chance"):
        assert shown.count(name) == 1, name
    assert {"16", "64", "128"} <= set(shown)


@pytest.mark.parametrize("plot", [recall_plot, seconds_plot])
def test_points_are_named_and_of_one_length(plot):
    svg = plot(ROWS, 64)
    parse(svg)
    assert texts(svg).count("duet") == 1, "16 and 128 bits are left out"
    assert texts(svg).count("pair_weight=0.1") == 1
    assert texts(svg).count("dcmh") == 2
    assert "at 64 bits" in svg


def test_points_of_one_method_are_joined():
    """A line more than the same points of different methods have."""

    def segments(rows):
        return len(
            re.findall(
                r'<path d="M [\d.-]+ [\d.-]+ \nL [\d.-]+ [\d.-]+ \n"[^>]*clip-path[^>]*stroke-linecap',
                recall_plot(rows, 64),
            )
        )

    apart = [row(method="duet"), row(method="dcmh", recall=0.05, value=0.7)]
    joined = [row(method="duet"), row(method="duet:pair_weight=0.1", recall=0.05, value=0.7)]
    assert segments(joined) == segments(apart) + 1


def test_points_are_named_by_the_settings_that_differ():
    shared = ("duet:hidden=64", "duet:hidden=64,pair_weight=0", "duet:hidden=64,pair_weight=1")
    shown = texts(recall_plot([row(method=method) for method in ("duet", *shared, "dcmh:hidden=64")], 64))
    named = [text for text in shown if "duet" in text or "=" in text]
    assert named == ["duet", "hidden=64", "pair_weight=0", "pair_weight=1", "hidden=64"]


def test_close_points_do_not_hide_each_others_names():
    figure = Figure(figsize=(10, 4))
    axes = figure.subplots()
    points = [(f"method_{number}", 0.5, 0.6 + 1e-4 * number) for number in range(6)]
    axes.set(xlim=(0, 1), ylim=(0, 1))
    figure.draw_without_rendering()
    _label_points(axes, points)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == [name for name, _, _ in points]
    middles = [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in boxes]
    for (one, (x, y)), (other, (beside, above)) in combinations(zip(boxes, middles, strict=True), 2):
        assert abs(x - beside) > 0.9 * (one.width + other.width) / 2 or abs(y - above) > 0.7 * one.height


def test_table_of_a_benchmark():
    html = benchmark_table(ROWS, ("method", "n_bits"))
    parse(html)
    assert html.count("<tr>") == len(ROWS) + 1
    assert "0.710 <small>± 0.010</small>" in html
    assert "paper" not in html
    assert "<th>seeds</th>" in html
    single = benchmark_table([row(deviation=math.nan, paper=0.7123)], ("data", "n_bits"))
    assert "±" not in single
    assert "0.712 / 0.712" in single
    assert "the paper's" in single
    assert "<td>shop</td>" in single


def test_page_is_self_contained_and_escapes():
    html = render_benchmark("<b>Methods</b>", [*ROWS, row("<i>x</i>", paper=0.5)])
    tags = parse(html)
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe", "img", "b", "i"}
    assert sum(tag == "svg" for tag, _ in tags) == 3
    for _, attributes in tags:
        assert attributes.get("xlink:href", "#").startswith("#")
    assert html.count("<table") == 3


def test_which_length_is_plotted():
    assert plotted_length(ROWS) == 64
    assert plotted_length([row(n_bits=16), row(n_bits=32)]) == 32


def test_command_writes_page_and_csv(small, tmp_path, monkeypatch):
    """The CSV that it prints is read back as the very rows, from two arrays of one file."""
    monkeypatch.chdir(tmp_path)
    split = small.split
    np.savez(
        "some.npz", image=small.image, text=small.text, other=small.text[:, :20], labels=small.labels,
        query=split.query, database=split.database,
    )  # fmt: skip
    arguments = ["benchmark", "some.npz", "some.npz:other", "--method", "scm", "--method", "scm:ridge=9", "--bits", "8",
                 "--seeds", "1", "--report", "page.html"]  # fmt: skip
    printed = CliRunner().invoke(cli, [*arguments, "--format", "csv"])
    assert printed.exit_code == 0, printed.stderr
    assert "page: page.html" in printed.stderr
    (tmp_path / "rows.csv").write_text(printed.stdout)
    rows = read_rows(tmp_path / "rows.csv")
    assert [(one["data"], one["method"]) for one in rows] == [
        ("some", "scm"), ("some", "scm:ridge=9"), ("some:other", "scm"), ("some:other", "scm:ridge=9"),
    ]  # fmt: skip
    again = [json.loads(line) for line in CliRunner().invoke(cli, arguments).stdout.splitlines()]
    unknown = [{k: math.nan if v is None and k.endswith("+-") else v for k, v in one.items()} for one in again]
    np.testing.assert_equal(rows, unknown)
    assert (tmp_path / "page.html").read_text() == render_benchmark("Methods side by side", rows)
    table = CliRunner().invoke(cli, [*arguments, "--format", "html"]).stdout
    assert "paper" not in table, "no column without a value"
    assert "+-" not in table
    twice = CliRunner().invoke(cli, ["benchmark", "some.npz", "./some.npz"])
    assert twice.exit_code == 2
    assert "'some'" in twice.stderr
