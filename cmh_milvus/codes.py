"""Hash codes: the one place that takes a sign and the one place that packs bits.

A relaxed code ``h`` is float, in (-1, 1); a hash code ``b`` is +1 where ``h >= 0``, else -1; a packed code has
bit 1 for +1, most significant bit first, eight bits a byte (`numpy.packbits`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmh_milvus.errors import SettingsError

BIT_ORDER = "msb_first"
BINARIZE_RULE = "h >= 0"
MAX_BITS = 32_768  # Milvus's limit for a BINARY_VECTOR field


def check_n_bits(n_bits: int) -> int:
    """Return `n_bits` if it is a possible code length.

    Args:
        n_bits: Code length in bits.

    Raises:
        SettingsError: `n_bits` is no integer, or not a multiple of 8 between 8 and 32,768.

    Example:
        >>> check_n_bits(64)
        64
    """
    if not isinstance(n_bits, int | np.integer) or n_bits < 8 or n_bits > MAX_BITS or n_bits % 8:
        raise SettingsError(
            f"a code of {n_bits!r} bits is not possible: Milvus stores whole bytes, so give an int, a multiple of "
            f"8 between 8 and {MAX_BITS}, such as 32, 64 or 128"
        )
    return n_bits


def binarize(h: NDArray[np.floating[Any]]) -> NDArray[np.int8]:
    """Hash codes of relaxed codes: +1 where ``h >= 0``, else -1.

    Args:
        h: Float, any shape. NaN has no sign and is refused.

    Returns:
        int8 of the same shape, values -1 and +1 only.

    Raises:
        SettingsError: `h` holds NaN.

    Example:
        >>> binarize(np.array([-0.5, 0.0, 0.5]))
        array([-1,  1,  1], dtype=int8)
    """
    if np.isnan(h).any():
        raise SettingsError("a relaxed code holds NaN, which has no sign: the encoder's input or weights are broken")
    return np.where(np.asarray(h) >= 0, np.int8(1), np.int8(-1))


def pack(b: NDArray[Any]) -> NDArray[np.uint8]:
    """Pack hash codes, eight bits a byte, most significant bit first.

    Args:
        b: Hash codes (n, n_bits) of -1 and +1, any integer or float dtype.

    Returns:
        uint8 (n, n_bits // 8).

    Raises:
        SettingsError: The shape is not (n, multiple of 8), or a value is not -1 or +1.

    Example:
        >>> pack(np.array([[1, -1, -1, -1, -1, -1, -1, 1]]))
        array([[129]], dtype=uint8)
    """
    b = np.asarray(b)
    if b.ndim != 2:
        raise SettingsError(f"hash codes have shape (n, n_bits), got {b.shape}")
    check_n_bits(b.shape[1])
    if not np.isin(b, (-1, 1)).all():
        raise SettingsError("hash codes hold only -1 and +1: binarize relaxed codes first")
    return np.packbits(b > 0, axis=1)


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Undo `pack`.

    Args:
        packed: uint8 (n, n_bits // 8).

    Returns:
        int8 (n, n_bits) of -1 and +1.

    Example:
        >>> unpack(np.array([[129]], dtype=np.uint8))
        array([[ 1, -1, -1, -1, -1, -1, -1,  1]], dtype=int8)
    """
    return (np.unpackbits(packed, axis=1).astype(np.int8) * 2 - 1).astype(np.int8)


def to_bytes(packed: NDArray[np.uint8]) -> list[bytes]:
    """Packed codes as the rows that pymilvus takes for BINARY_VECTOR.

    Args:
        packed: uint8 (n, n_bits // 8).

    Returns:
        n `bytes` of length n_bits // 8.
    """
    return [row.tobytes() for row in np.ascontiguousarray(packed, dtype=np.uint8)]


def from_bytes(rows: list[bytes]) -> NDArray[np.uint8]:
    """Undo `to_bytes`.

    Args:
        rows: n `bytes`, all of one length, n >= 1.

    Returns:
        uint8 (n, n_bits // 8).

    Raises:
        SettingsError: The rows are empty or differ in length.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) != 1:
        raise SettingsError(f"packed codes must be non-empty and of one length, got lengths {sorted(lengths)}")
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), lengths.pop())


def check_packed(query: NDArray[np.uint8], database: NDArray[np.uint8]) -> None:
    """Check that two sets of codes are packed, uint8 (m, n_bits // 8) and (n, n_bits // 8), and can be compared.

    Raises:
        SettingsError: They are not.
    """
    for name, codes in (("query", query), ("database", database)):
        if codes.ndim != 2 or codes.dtype != np.uint8 or codes.shape[1] == 0:
            raise SettingsError(
                f"{name} codes are packed, uint8 (n, n_bits // 8); got {codes.dtype} {codes.shape}: use codes.pack"
            )
    if query.shape[1] != database.shape[1]:
        raise SettingsError(
            f"codes of {query.shape[1] * 8} and {database.shape[1] * 8} bits cannot be compared: "
            "encode both sides with one encoder"
        )


def hamming_distances(query: NDArray[np.uint8], database: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """All Hamming distances between two sets of packed codes.

    Args:
        query: uint8 (m, n_bits // 8).
        database: uint8 (n, n_bits // 8).

    Returns:
        uint16 (m, n), in bits, 0..n_bits.

    Raises:
        SettingsError: They are not packed codes, or of different lengths.

    Example:
        >>> hamming_distances(np.array([[255]], dtype=np.uint8), np.array([[254], [0]], dtype=np.uint8))
        array([[1, 8]], dtype=uint16)
    """
    check_packed(query, database)
    width = next(w for w in (8, 4, 2, 1) if query.shape[1] % w == 0)
    word = np.dtype(f"u{width}")
    q = np.ascontiguousarray(query).view(word)  # (m, words)
    d = np.ascontiguousarray(database).view(word)  # (n, words)
    distances = np.zeros((len(q), len(d)), dtype=np.uint16)
    for j in range(q.shape[1]):
        distances += np.bitwise_count(q[:, j, None] ^ d[None, :, j])
    return distances
