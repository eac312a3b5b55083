"""The examples run as their docstrings say."""

import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

from cmh_milvus.codes import hamming_distances
from cmh_milvus.pictures import open_picture

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def pictures(emoji, tmp_path, monkeypatch):
    """Twelve pictures, one of them twice."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for item in emoji.items[::160]:
        shutil.copy(item.image, folder)
    shutil.copy(emoji.items[0].image, folder / "copy.webp")
    monkeypatch.chdir(tmp_path)
    return folder


def example(name):
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_photo_search(encoder_folder, pictures, capsys):
    main = example("photo_search.py")
    main([str(encoder_folder), str(pictures), "smiling face"])
    first = capsys.readouterr().out
    assert first.startswith("13 pictures encoded, 0 known, 0 unreadable")
    assert len(first.splitlines()) == 6
    main([str(encoder_folder), str(pictures), "smiling face"])
    assert capsys.readouterr().out.replace("0 pictures encoded, 13 known", "13 pictures encoded, 0 known") == first

    other = pictures.with_name("other")
    other.mkdir()
    shutil.copy(pictures / "copy.webp", other)
    main([str(encoder_folder), str(other), "smiling face"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "1 pictures encoded, 0 known, 0 unreadable"
    assert [line.split()[-1] for line in shown[1:]] == [str(other / "copy.webp")]


def test_near_duplicates(encoder_folder, pictures, emoji, capsys):
    example("near_duplicates.py")([str(encoder_folder), str(pictures), "--radius", "0"])
    groups = [set(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"copy.webp", emoji.items[0].image.name} in groups


def test_no_near_duplicate_is_left_out(encoder, encoder_folder, pictures, capsys):
    """Groups are what chains of pairs within the radius join; other pictures are in none."""
    (pictures / "broken.webp").write_text("no picture")
    (pictures / "copy.txt").write_text("a text beside it is no picture")
    radius = 20
    example("near_duplicates.py")([str(encoder_folder), str(pictures), "--radius", str(radius)])
    printed = capsys.readouterr()
    assert "broken.webp is left out: " in printed.err

    paths = sorted(path for path in pictures.glob("*.webp") if path.name != "broken.webp")
    codes = encoder.packed_codes("image", encoder.backbone("image").encode([open_picture(path) for path in paths]))
    near = hamming_distances(codes, codes) <= radius
    joined = np.linalg.matrix_power(near.astype(int), len(paths)) > 0
    assert (joined != near).any()
    names = np.array([path.name for path in paths])
    expected = {frozenset(names[row]) for row in joined if row.sum() > 1}
    groups = [frozenset(line.split()) for line in printed.out.splitlines()]
    assert len(groups) == len(expected)
    assert set(groups) == expected
