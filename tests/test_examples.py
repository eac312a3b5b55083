"""The examples run as their docstrings say."""

import runpy
import shutil
from pathlib import Path

import pytest

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


def test_near_duplicates(encoder_folder, pictures, emoji, capsys):
    example("near_duplicates.py")([str(encoder_folder), str(pictures), "--radius", "0"])
    groups = [set(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"copy.webp", emoji.items[0].image.name} in groups
