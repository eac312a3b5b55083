"""Pictures from strangers."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cmh_milvus import pictures
from cmh_milvus.errors import PictureError


def encoded(image, file_type="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_type, **options)
    return buffer.getvalue()


def gradient(width=32, height=16):
    x = np.linspace(0, 255, width).astype(np.uint8)
    return Image.fromarray(np.stack([np.tile(x, (height, 1))] * 3, axis=2))


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bilevel_png(width, height):
    """A black 1-bit PNG of any size that takes few bytes: the rows are compressed piecewise."""
    row = b"\0" * (1 + (width + 7) // 8)
    compressor = zlib.compressobj(9)
    body = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("file_type", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_reads_each_allowed_format_from_path_bytes_and_image(tmp_path, file_type):
    data = encoded(gradient(), file_type)
    path = tmp_path / "no_suffix_needed"
    path.write_bytes(data)
    for source in (path, data, Image.open(io.BytesIO(data))):
        image = pictures.open_picture(source)
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - np.asarray(gradient())).mean() < 8


@pytest.mark.parametrize("file_type", ["TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(file_type):
    with pytest.raises(PictureError, match="not a picture in JPEG, PNG, WebP, GIF or BMP format"):
        pictures.open_picture(encoded(gradient(), file_type))


def test_exif_orientation_is_applied():
    image = gradient(32, 16)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate 90 degrees clockwise to see it upright
    upright = pictures.open_picture(encoded(image, "JPEG", exif=exif))
    assert upright.size == (16, 32)
    top, bottom = np.asarray(upright)[0].mean(), np.asarray(upright)[-1].mean()
    assert top < 40
    assert bottom > 200  # dark left edge now on top


def test_damaged_exif_leaves_the_pixels_and_says_nothing():
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 4)
    assert pictures.open_picture(data).size == (32, 16)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_on_white(mode):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)
    source = clear if mode == "PA" else encoded(clear)
    assert np.asarray(pictures.open_picture(source)).min() == 255


def test_palette_with_transparent_entries_is_laid_on_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    data = encoded(image, transparency=bytes([255, 128]))  # entry 1: red, half clear
    assert np.asarray(pictures.open_picture(data))[0, 0].tolist() == [255, 127, 127]
    image.info["transparency"] = bytes([255, 0])
    assert np.asarray(pictures.open_picture(image)).min() == 255


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 32_896, 65_535]], dtype=np.uint16)
    image = pictures.open_picture(encoded(Image.fromarray(values)))
    assert np.asarray(image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_cmyk_and_grey():
    assert pictures.open_picture(encoded(gradient().convert("CMYK"), "JPEG")).mode == "RGB"
    assert pictures.open_picture(encoded(gradient().convert("1"))).mode == "RGB"


def test_first_frame_of_an_animation():
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    for file_type in ("GIF", "PNG", "WEBP"):
        data = encoded(red, file_type, save_all=True, append_images=[blue])
        r, g, b = np.asarray(pictures.open_picture(data))[0, 0]
        assert r > 240
        assert g < 15
        assert b < 15


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 20_000)])
def test_extreme_shapes(width, height):
    assert pictures.open_picture(bilevel_png(width, height)).size == (width, height)


@pytest.mark.parametrize(("width", "height"), [(8_000, 6_251), (10_000, 10_000), (30_000, 30_000)])
def test_too_many_pixels_are_refused_before_decoding(tmp_path, width, height, monkeypatch):
    # 50.0, 100 and 900 million pixels: Pillow itself is silent, warns, raises
    path = tmp_path / "bomb.png"
    path.write_bytes(bilevel_png(width, height))
    assert path.stat().st_size < 200_000
    decoded = []
    monkeypatch.setattr(Image.Image, "convert", lambda *a, **k: decoded.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PictureError, match="50,000,000"):
            pictures.open_picture(path)
    assert not decoded


def test_pixel_cap_holds_for_pillow_images_too():
    with pytest.raises(PictureError, match="8,000 x 6,251"):
        pictures.open_picture(Image.new("1", (8_000, 6_251)))


@pytest.mark.parametrize("file_type", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1, 0.01])
def test_truncated_files(file_type, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, file_type)
    with pytest.raises(PictureError, match=r"damaged|cut off"):
        pictures.open_picture(data[: int(len(data) * share)])


def test_text_named_jpg(tmp_path):
    path = tmp_path / "note.jpg"
    path.write_text("I am no picture")
    with pytest.raises(PictureError, match=r"note\.jpg' is not a picture in JPEG"):
        pictures.open_picture(path)


def test_zero_bytes(tmp_path):
    path = tmp_path / "empty.jpg"
    path.touch()
    for source in (path, b""):
        with pytest.raises(PictureError, match=r"empty \(0 bytes\)"):
            pictures.open_picture(source)


def test_missing_directory_pipe_and_device(tmp_path):
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    cases = {
        tmp_path / "missing.jpg": "does not exist",
        tmp_path: "is a directory",
        pipe: "is a named pipe",
        pictures.Path("/dev/zero"): "is a device",
        tmp_path / "a\0b.jpg": r"cannot be read|does not exist",
        tmp_path / ("x" * 300 + ".jpg"): "File name too long",
    }
    for path, message in cases.items():
        with pytest.raises(PictureError, match=message) as caught:
            pictures.open_picture(path)
        assert "\n" not in str(caught.value)


def test_link_to_itself(tmp_path):
    loop = tmp_path / "loop.jpg"
    loop.symlink_to(loop)
    with pytest.raises(PictureError, match="cannot be read"):
        pictures.open_picture(loop)


def test_names_with_line_ends_and_stray_bytes_stay_on_one_line(tmp_path):
    path = tmp_path / os.fsdecode(b"bad\n\xff.jpg")
    path.write_bytes(b"text")
    with pytest.raises(PictureError) as caught:
        pictures.open_picture(path)
    str(caught.value).encode("utf-8")
    assert "\n" not in str(caught.value)


def test_file_size_cap(tmp_path):
    path = tmp_path / "sparse.bmp"
    with path.open("wb") as file:
        file.truncate(pictures.MAX_FILE_BYTES + 1)
    with pytest.raises(PictureError, match="536,870,912 at most"):
        pictures.open_picture(path)


def test_png_text_chunk_bomb():
    bomb = b"k\0\0" + zlib.compress(b"\0" * 50_000_000, 9)
    data = encoded(gradient())
    end_of_header = 8 + 25
    data = data[:end_of_header] + png_chunk(b"zTXt", bomb) + data[end_of_header:]
    with pytest.raises(PictureError):
        pictures.open_picture(data)


SEEDS = [encoded(gradient(), f) for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_bytes_give_a_picture_or_a_picture_error(data):
    bytes_ = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 8))):
        bytes_[data.draw(st.integers(0, len(bytes_) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = pictures.open_picture(bytes(bytes_))
    except PictureError:
        return
    assert image.mode == "RGB"


def test_thumbnail_and_hash(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(gradient(300, 100)))
    uri = pictures.thumbnail_data_uri(path, size=60)
    assert uri.startswith("data:image/jpeg;base64,/9j/")
    small = pictures.open_picture(pictures.base64.b64decode(uri.partition(",")[2]))
    assert small.size == (60, 20)
    assert pictures.content_hash(path) == pictures.content_hash(path.read_bytes())
    assert pictures.content_hash(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
