"""Codes: signs, packing and distances against loops and properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cmh_milvus import codes
from cmh_milvus.errors import SettingsError
from tests.reference import ranking as reference

signs = st.tuples(st.integers(0, 6), st.integers(1, 20)).flatmap(
    lambda shape: arrays(np.int8, (shape[0], shape[1] * 8), elements=st.sampled_from([-1, 1]))
)
packed = st.tuples(st.integers(1, 6), st.integers(1, 20)).flatmap(lambda shape: arrays(np.uint8, shape))


@pytest.mark.parametrize("n_bits", [8, 16, 128, codes.MAX_BITS])
def test_possible_code_lengths(n_bits):
    assert codes.check_n_bits(n_bits) == n_bits


@pytest.mark.parametrize("n_bits", [-8, 0, 1, 12, 63, codes.MAX_BITS + 8, 16.0, "16", None])
def test_impossible_code_lengths(n_bits):
    with pytest.raises(SettingsError, match="multiple of 8"):
        codes.check_n_bits(n_bits)


def test_binarize_has_no_zero():
    b = codes.binarize(np.array([[-1.0, -0.0, 0.0, 1e-30, -1e-30]]))
    assert b.dtype == np.int8
    assert b.tolist() == [[-1, 1, 1, 1, -1]]
    with pytest.raises(SettingsError, match="NaN"):
        codes.binarize(np.array([0.0, np.nan]))


@given(signs)
def test_unpack_undoes_pack(b):
    rows = codes.pack(b)
    assert rows.dtype == np.uint8
    assert rows.shape == (len(b), b.shape[1] // 8)
    np.testing.assert_array_equal(codes.unpack(rows), b)
    assert codes.unpack(rows).dtype == np.int8


@given(signs)
def test_pack_puts_the_first_bit_highest(b):
    for row, bits in zip(codes.pack(b).tolist(), b.tolist(), strict=True):
        text = "".join("1" if bit > 0 else "0" for bit in bits)
        assert row == [int(text[j : j + 8], 2) for j in range(0, len(text), 8)]


@pytest.mark.parametrize(
    ("b", "words"),
    [
        (np.ones(8), "shape"),
        (np.ones((2, 12)), "multiple of 8"),
        (np.zeros((1, 8)), "-1 and"),
        (np.full((1, 8), 0.5), "-1 and"),
    ],
)
def test_pack_refuses(b, words):
    with pytest.raises(SettingsError, match=words):
        codes.pack(b)


@given(packed)
def test_bytes_round_trip(rows):
    as_bytes = codes.to_bytes(rows)
    assert all(type(row) is bytes and len(row) == rows.shape[1] for row in as_bytes)
    np.testing.assert_array_equal(codes.from_bytes(as_bytes), rows)
    np.testing.assert_array_equal(codes.from_bytes(codes.to_bytes(np.asfortranarray(rows))), rows)


@pytest.mark.parametrize("rows", [[], [b"a", b"ab"]])
def test_from_bytes_refuses(rows):
    with pytest.raises(SettingsError, match="of one length"):
        codes.from_bytes(rows)


@given(packed, st.randoms(use_true_random=False))
def test_hamming_distances(rows, random):
    d = codes.hamming_distances(rows, rows)
    n_bits = rows.shape[1] * 8
    assert d.dtype == np.uint16
    assert d.tolist() == [[reference.hamming(a, b) for b in rows] for a in rows]
    b = codes.unpack(rows).astype(int)
    np.testing.assert_array_equal(d, (n_bits - b @ b.T) // 2)  # as +-1 products
    np.testing.assert_array_equal(d, d.T)
    np.testing.assert_array_equal(d == 0, (rows[:, None] == rows[None]).all(axis=2))
    assert (d[:, None, :] <= d[:, :, None] + d[None, :, :].transpose(0, 2, 1)).all()  # triangle inequality
    k = random.randrange(n_bits + 1)
    flipped = b[:1].copy()
    flipped[0, random.sample(range(n_bits), k)] *= -1
    assert codes.hamming_distances(rows[:1], codes.pack(flipped)).tolist() == [[k]]


def test_hamming_distances_of_unequal_lengths():
    with pytest.raises(SettingsError, match="64 and 32 bits"):
        codes.hamming_distances(np.zeros((1, 8), np.uint8), np.zeros((1, 4), np.uint8))


@pytest.mark.parametrize("wrong", [np.zeros((1, 8)), np.zeros((1, 8), np.int64), np.zeros(8, np.uint8)])
def test_hamming_distances_of_what_is_not_packed(wrong):
    packed = np.zeros((1, 8), np.uint8)
    for pair in ((packed, wrong), (wrong, packed)):
        with pytest.raises(SettingsError, match="codes are packed, uint8"):
            codes.hamming_distances(*pair)


def test_longest_code():
    assert codes.check_n_bits(32_768) == 32_768
