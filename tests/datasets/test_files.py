"""Items from a user's own files."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cmh_milvus.datasets.files import ItemFailure, load_paired, read_items
from cmh_milvus.errors import DataError, SettingsError


def read(source, **options):
    failures = []
    items = list(read_items(source, on_failure=failures.append, **options))
    return items, {failure.id: failure.reason for failure in failures}


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def write_rows(path, rows):
    """Rows of one set of columns, in the format of the path's suffix."""
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


SUFFIXES = [".csv", ".tsv", ".jsonl", ".parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_format(tmp_path, suffix):
    picture(tmp_path / "img" / "a.png")
    rows = [
        {"id": "007", "image": "img/a.png", "caption": 'a "cat", sitting', "labels": "pet,animal", "price": "3"},
        {"id": "b", "image": "img/b.png", "caption": "zwei\nZeilen", "labels": "", "price": "4"},
    ]
    items, failures = read(write_rows(tmp_path / f"data{suffix}", rows))
    assert failures == {}
    assert [item.id for item in items] == ["007", "b"]
    assert items[0].image == (tmp_path / "img" / "a.png").resolve()
    assert items[0].text == 'a "cat", sitting'
    assert items[0].labels == ("pet", "animal")
    assert items[0].fields == {"price": "3"}
    assert items[1].text == "zwei\nZeilen"
    assert items[1].labels == ()


def test_folder_with_sidecars(tmp_path):
    for name in ("b.JPG", "a.png", "sub/c.webp", ".hidden.png", ".git/d.png"):
        picture(tmp_path / name)
    write(tmp_path / "a.txt", "\ufeffa red square \n")
    write(tmp_path / "notes.txt", "no picture has my name")
    items, failures = read(tmp_path)
    assert failures == {}
    assert [(item.id, item.text) for item in items] == [
        ("a.png", "a red square"),
        ("b.JPG", None),
        ("sub/c.webp", None),
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_bad_rows_are_listed_and_the_rest_goes_on(tmp_path, suffix):
    rows = [
        {"id": "good", "image": "a.png", "text": "fine"},
        {"id": "empty", "image": "a.png", "text": ""},
        {"id": "blank", "image": "a.png", "text": " \n"},
        {"id": "good", "image": "b.png", "text": "again"},
        {"id": "nul", "image": "a.png", "text": "a\0b"},
        {"id": "nul path", "image": "a\0.png", "text": "x"},
        {"id": " ", "image": "a.png", "text": "x"},
        {"id": "two\nlines", "image": "a.png", "text": "x"},
        {"id": "last", "image": "", "text": "text alone"},
    ]
    items, failures = read(write_rows(tmp_path / f"data{suffix}", rows))
    assert [item.id for item in items] == ["good", "last"]
    assert items[0].text == "fine"
    assert failures["good"] == "its id occurs earlier in the source; the first item was kept"
    assert failures["empty"] == failures["blank"] == "its text is empty"
    assert "NUL" in failures["nul"]
    assert "leads nowhere" in failures["nul path"]
    assert failures["row 7"] == "its id is empty"
    assert "control character" in failures["row 8"]
    assert len(failures) == 7


def test_paths_stay_below_the_data(tmp_path):
    outside = picture(tmp_path / "outside.png")
    root = tmp_path / "data"
    inside = picture(root / "in.png")
    (root / "link.png").symlink_to(outside)
    (root / "friend.png").symlink_to(inside)
    (root / "linked").symlink_to(tmp_path)
    (root / "loop.png").symlink_to(root / "loop.png")
    paths = {
        "up": "../outside.png",
        "absolute": str(outside),
        "link": "link.png",
        "linked": "linked/outside.png",
        "etc": "/etc/passwd",
        "loop": "loop.png",
        "ok": "in.png",
        "ok absolute": str(inside),
        "ok link": "friend.png",
        "ok up and down": "linked/data/../data/in.png",
    }
    file = write_rows(root / "data.csv", [{"id": key, "image": path} for key, path in paths.items()])
    items, failures = read(file)
    assert [item.id for item in items] == ["ok", "ok absolute", "ok link", "ok up and down"]
    assert {item.image for item in items} == {inside.resolve()}
    for key in ("up", "absolute", "link", "linked", "etc"):
        assert "leads out of the data's folder" in failures[key]
    assert "leads nowhere" in failures["loop"]
    items, failures = read(root)
    assert [item.id for item in items] == ["friend.png", "in.png"]
    assert set(failures) == {"link.png", "loop.png"}


def test_sidecar_that_leads_out(tmp_path):
    write(tmp_path / "secret.txt", "secret")
    picture(tmp_path / "data" / "a.png")
    picture(tmp_path / "data" / "b.png")
    (tmp_path / "data" / "a.txt").symlink_to(tmp_path / "secret.txt")
    items, failures = read(tmp_path / "data")
    assert [item.id for item in items] == ["b.png"]
    assert "leads out" in failures["a.png"]


def test_folder_failures(tmp_path):
    picture(tmp_path / "good.png")
    picture(tmp_path / "empty.png")
    write(tmp_path / "empty.txt", "\n")
    picture(tmp_path / "latin.png")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    picture(tmp_path / os.fsdecode(b"odd\xff.png"))
    picture(tmp_path / "two\nlines.png")
    items, failures = read(tmp_path)
    assert [item.id for item in items] == ["good.png"]
    assert failures["empty.png"] == "its text is empty"
    assert "cannot be read" in failures["latin.png"]
    assert "not valid UTF-8" in failures["odd\\udcff.png"]
    assert "control character" in failures["two\\nlines.png"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("part", ["id", "image", "text", "label"])
def test_wrong_column_lists_those_that_exist(tmp_path, suffix, part):
    path = write_rows(tmp_path / f"data{suffix}", [{"name": "a", "words": "b"}])
    with pytest.raises(SettingsError, match=rf"no column 'nope' for the {part}; its columns are 'name', 'words'"):
        read(path, **{f"{part}_column": "nope"})
    assert SettingsError.exit_code == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_named_columns(tmp_path, suffix):
    rows = [{"sku": 5, "photo": "x.png", "words": "shoe", "kinds": "a|b", "text": "not me"}]
    items, _ = read(
        write_rows(tmp_path / f"data{suffix}", rows), id_column="sku", image_column="photo", text_column="words",
        label_column="kinds", label_separator="|",
    )  # fmt: skip
    assert (items[0].id, items[0].image.name, items[0].text, items[0].labels) == ("5", "x.png", "shoe", ("a", "b"))
    assert items[0].fields == {"text": "not me"}


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_no_known_column(tmp_path, suffix):
    path = write_rows(tmp_path / f"data{suffix}", [{"a": "1", "b": "2"}])
    with pytest.raises(SettingsError, match=r"no column that is known to hold pictures .*its columns are 'a', 'b'"):
        read(path)


def test_column_names_in_capitals_and_default_ids(tmp_path):
    items, _ = read(write(tmp_path / "a.csv", "Caption,TAGS\nx,p\ny,q\n"))
    assert [(item.id, item.text, item.labels) for item in items] == [("1", "x", ("p",)), ("2", "y", ("q",))]


def test_json_rows_may_lack_what_is_missing(tmp_path):
    lines = [
        {"id": 1, "image": "a.png"},
        {"id": 2, "text": "b", "labels": ["x", 3, "x", " "]},
        {"id": 3, "image": None, "text": None},
        {"id": 4, "image": 5},
        {"id": 5, "text": ["b"]},
        {"id": 6, "text": "b", "labels": {"x": 1}},
        {"id": 1.5, "text": "b"},
        {"id": True, "text": "b"},
        {"text": "no id"},
        {"id": "half", "text": "\ud83d"},
        [1, 2],
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n{broken\n" + "[" * 100_000)
    items, failures = read(path, text_column="text")
    assert [item.id for item in items] == ["1", "2", "9"]
    assert items[1].labels == ("x", "3")
    expected = {
        "3": "neither a picture nor a text", "4": "path of a file, got a int", "5": "must be text, got a list",
        "6": "labels must be", "row 7": "its id must be", "row 8": "its id must be", "half": "not valid UTF-8",
        "row 11": "a JSON list, not an object", "row 12": "line 13 is not JSON", "row 13": "is not JSON",
    }  # fmt: skip
    assert failures.keys() == expected.keys()
    for key, reason in expected.items():
        assert reason in failures[key]


def test_column_named_in_later_json_rows_only(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"image": "a.png"}\n{"words": "b"}\n')
    items, failures = read(path, text_column="words")
    assert [item.text for item in items] == [None, "b"]
    assert failures == {}


def test_csv_rows_that_cannot_be_read(tmp_path):
    long = "x" * (csv.field_size_limit() + 1)
    path = tmp_path / "a.csv"
    content = f'\ufeffid,text\n1,a\n2,b,c\n3\n\n4,{long}\n5,"a ""b"""\n6,"x"y\n7,ok\n'.encode()
    path.write_bytes(content.replace(b"7,ok", b"7,caf\xe9\n8,ok"))
    items, failures = read(path)
    assert [(item.id, item.text) for item in items] == [("1", "a"), ("5", 'a "b"'), ("8", "ok")]
    assert "3 fields where the first line names 2" in failures["row 2"]
    assert "1 fields" in failures["row 3"]
    assert "field limit" in failures["row 4"]
    assert "cannot be read" in failures["row 6"]
    assert failures["7"] == "its text is not valid UTF-8"


def test_quotes_that_are_not_closed(tmp_path):
    """The failure tells which lines were swallowed; where a later cell has quotes, up to there."""
    good = "".join(f"{i},text {i}\n" for i in range(2, 11))
    rest = "".join(f"{i},text {i}\n" for i in range(12, 62))
    path = write(tmp_path / "a.csv", f'id,text\n{good}11,"open\n{rest}')
    items, failures = read(path)
    assert [item.id for item in items] == [str(i) for i in range(2, 11)]
    assert failures == {"row 10": "lines 11 to 61: a quote opened on line 11 is not closed"}

    write(path, path.read_text().replace("text 40", '"text 40"'))
    items, failures = read(path)
    assert [item.id for item in items] == [str(i) for i in range(2, 62) if not 11 <= i <= 40]
    assert "lines 11 to 40 cannot be read as one row" in failures["row 10"]

    write(path, path.read_text().replace('"text 40"', 'text 40",x'))
    assert read(path)[1] == {"row 10": "it has 3 fields where the first line names 2 (lines 11 to 40)"}

    write(path, 'id,text\n1,a\n2,"b')
    assert read(path)[1] == {"row 2": "line 3: a quote opened on line 3 is not closed"}


COLUMNS_OF_NUMBERS = {
    ("59", "", "-3"): [59, None, -3],
    ("0", "2.5", "7"): [0.0, 2.5, 7.0],
    (".5", "1e-3", "-0.25"): [0.5, 0.001, -0.25],
    (str(2**63 - 1), str(-(2**63)), "1"): [2**63 - 1, -(2**63), 1],
}
COLUMNS_OF_TEXTS = [
    *[("1", cell, "2") for cell in ("007", "1_000", "nan", "inf", "1e999", "20 EUR", " 3", "+4", "5.", "0x1F", "٣")],
    ("1", str(2**63), "2"),
    ("1.5", "1" + "0" * 5000, "2"),
    ("", "", ""),
    ("n/a", "1", "2"),
]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("cells", [*COLUMNS_OF_NUMBERS, *COLUMNS_OF_TEXTS], ids=lambda cells: f"{cells}"[:40])
def test_columns_of_numbers(tmp_path, suffix, cells):
    rows = [["id", "text", "n"], *([str(i), "a", cell] for i, cell in enumerate(cells))]
    with (tmp_path / f"a.{suffix}").open("w", newline="") as file:
        csv.writer(file, delimiter="," if suffix == "csv" else "\t").writerows(rows)
    for asked in (["n", "id", "absent"], []):
        expected = COLUMNS_OF_NUMBERS.get(cells, list(cells)) if asked else list(cells)
        items, _ = read(tmp_path / f"a.{suffix}", number_columns=asked)
        values = [item.fields["n"] for item in items]
        assert (values, list(map(type, values))) == (expected, list(map(type, expected)))
        assert [item.id for item in items] == ["0", "1", "2"]


def test_parts_of_an_item_are_no_columns_of_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("id,text,labels\n1e3,1.50,7\n2.0,3,8\n")
    items, failures = read(tmp_path / "a.csv", number_columns=["id", "text", "labels"])
    assert not failures
    assert [(item.id, item.text, item.labels) for item in items] == [("1e3", "1.50", ("7",)), ("2.0", "3", ("8",))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "needs a first line"),
        ("a.csv", b"id,text\n", "no usable item; there are no items at all"),
        ("a.csv", b"id,text,text\n", "more than one column 'text'"),
        ("a.csv", "id,text\n1,a\n".encode("utf-16"), "UTF-16"),
        ("a.csv", b"id,text\n1,\n", r"all 1 were left out, the first \(1\) because: its text is empty"),
        ("a.jsonl", b"", "no usable item"),
        ("a.jsonl", b"not json\n", r"first \(row 1\) because: line 1 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n', "neither a picture nor a text .*'a'"),
        ("a.parquet", b"PAR1 no", "cannot be read as Parquet"),
        ("a.parquet", b"", "cannot be read as Parquet"),
    ],
)
def test_files_without_usable_items(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_parquet_times_that_python_has_not(tmp_path):
    table = pa.table({"text": ["a"], "at": pa.array([10**18], pa.timestamp("ms"))})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(tmp_path / "a.parquet")


def test_parquet_texts_that_are_not_utf8(tmp_path):
    texts = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(tmp_path / "a.parquet")


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"no file '.*nothing\.csv'"):
        read_items(tmp_path / "nothing.csv")  # before the first item is asked for
    with pytest.raises(DataError, match="no folder"):
        read_items(tmp_path / "nothing", format="folder")
    with pytest.raises(DataError, match="holds no usable item; there are no items at all"):
        read(tmp_path)
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match="not a regular file"):
        read_items(tmp_path / "pipe.csv")
    with pytest.raises(DataError, match=r"no file|cannot be read"):
        read_items(tmp_path / "a\0b.csv")


def test_wrong_settings(tmp_path):
    path = write(tmp_path / "data.xml", "<a/>")
    cases = [
        ({"source": path}, "suffix of .* does not tell its format"),
        ({"source": path, "format": "xml"}, "unknown data format 'xml'"),
        ({"source": tmp_path, "format": "csv"}, "is a folder and cannot be read as csv"),
        ({"source": tmp_path, "id_column": "id"}, "a folder of pictures has no columns"),
        ({"source": "-", "format": "csv"}, "standard input is read as jsonl"),
        ({"source": path, "format": "csv", "label_separator": ""}, "label separator is empty"),
    ]
    for options, message in cases:
        with pytest.raises(SettingsError, match=message):
            read_items(options.pop("source"), **options)


def test_format_says_what_the_suffix_does_not(tmp_path):
    items, _ = read(write(tmp_path / "data", "id\ttext\n1\ta,b\n"), format="tsv")
    assert items[0].text == "a,b"


def test_standard_input(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    stdin = io.TextIOWrapper(io.BytesIO('\ufeff{"image": "a.png"}\n{"image": "../b.png"}\n'.encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    items, failures = read("-")
    assert [item.image for item in items] == [(tmp_path / "a.png").resolve()]
    assert "leads out" in failures["2"]
    assert not stdin.closed


def test_failures_are_logged_by_default(tmp_path, caplog):
    path = write(tmp_path / "a.csv", "id,text\n1,a\n2,\n")
    assert len(list(read_items(path))) == 1
    assert "2 is left out: its text is empty" in caplog.text


def test_items_are_read_one_by_one(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' * 5 + "broken")
    failures = []
    items = read_items(path, on_failure=failures.append)
    assert next(items).id == "1"
    assert failures == []
    items.close()


def test_pairs(tmp_path):
    rows = [
        {"id": 1, "image": "a.png", "text": "a", "labels": ["z", "b"]},
        {"id": 2, "text": "b"},
        {"id": 3, "image": "c.png"},
        {"id": 4, "image": "d.png", "text": "d", "labels": ["c"]},
        {"id": 4, "image": "d.png", "text": "d"},
    ]
    path = write(tmp_path / "shop.jsonl", "\n".join(map(json.dumps, rows)))
    dataset, failures = load_paired(path)
    assert dataset.name == "shop"
    assert dataset.ids == ["1", "4"]
    assert dataset.label_names == ("b", "c", "z")
    assert dataset.labels().tolist() == [[True, False, True], [False, True, False]]
    assert dataset.split is None
    assert failures[0] == ItemFailure("2", "it has no picture, and pairs are needed")
    assert failures[1] == ItemFailure("3", "it has no text, and pairs are needed")
    assert failures[2].id == "4"
    with pytest.raises(DataError, match=r"no item of .* has both"):
        load_paired(write(tmp_path / "texts.csv", "text\na\n"))


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20).filter(
    str.strip
)
LABEL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0|"), min_size=1, max_size=8).filter(
    lambda label: label == label.strip()
)
ID = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).filter(str.strip)
ROWS = st.lists(
    st.fixed_dictionaries({"id": ID, "text": TEXT, "labels": st.lists(LABEL, unique=True, max_size=3)}),
    min_size=1, max_size=6, unique_by=lambda row: row["id"],
)  # fmt: skip


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_round_trip(tmp_path_factory, suffix, rows):
    path = tmp_path_factory.mktemp("data") / f"data{suffix}"
    items, failures = read(
        write_rows(path, [{**row, "labels": "|".join(row["labels"])} for row in rows]), label_separator="|"
    )
    assert failures == {}
    assert [{"id": i.id, "text": i.text, "labels": list(i.labels)} for i in items] == rows


@settings(max_examples=200, deadline=None)
@given(suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]), content=st.binary(max_size=60))
def test_any_bytes_give_items_or_our_own_errors(tmp_path_factory, suffix, content):
    path = tmp_path_factory.mktemp("data") / f"data{suffix}"
    path.write_bytes((b"id,text\n" if suffix == ".csv" else b"") + content)
    with suppress(DataError, SettingsError):
        read(path)
