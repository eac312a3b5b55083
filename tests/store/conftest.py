"""One suite, two back ends: Milvus Lite here; the real server in the run that `test_server.py` starts."""

import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

import numpy as np
import pytest

from cmh_milvus.codes import hamming_distances
from cmh_milvus.store import HashCollection, Row

SERVER_FOLDER = "CMH_TEST_SERVER_FOLDER"  # set inside the network namespace


@dataclass(frozen=True)
class Encoder:
    """What a collection needs to know of an encoder."""

    fingerprint: str = "a1" * 32
    n_bits: int = 16


@pytest.fixture(scope="session")
def on_server() -> bool:
    return SERVER_FOLDER in os.environ


@pytest.fixture(scope="session")
def uri(on_server, tmp_path_factory):
    """Where the suite's collections go."""
    if not on_server:
        yield str(tmp_path_factory.mktemp("lite") / "test.db")
        return
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:  # ip link set lo up
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", 0x1 | 0x40))
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", "import milvus; milvus.main()", "--data", os.environ[SERVER_FOLDER]],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not _healthy():
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)
        yield "http://127.0.0.1:19530"
    finally:
        os.killpg(server.pid, 9)  # the wrapper leaves its child `milvus run standalone` alive
        server.wait()


def _healthy() -> bool:
    try:
        with urllib.request.urlopen("http://127.0.0.1:9091/healthz", timeout=2) as answer:
            return b"OK" in answer.read()
    except (urllib.error.URLError, OSError):
        return False


N_ROWS = 1_200
SPLITS = ("query", "database")


@pytest.fixture(scope="session")
def rows():
    """Rows of 16 bits, so that ties abound; ids in an order unlike that of their insertion."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(N_ROWS)
    packed = rng.integers(0, 256, (N_ROWS, 2), dtype=np.uint8)
    packed[: N_ROWS // 4] = packed[0]  # a collapsed quarter
    return [
        Row(
            f"{ids[i]:04d}.jpg",
            ("image", "text")[i % 2],
            packed[i].tobytes(),
            {"n": i, "split": SPLITS[i % 3 == 0], "labels": ["fruit", "red"] if i % 5 == 0 else ["sea"]}
            | ({"caption": f"caption {i}"} if i % 2 else {}),
        )
        for i in range(N_ROWS)
    ]


@pytest.fixture(scope="session")
def filled(uri, rows):
    with HashCollection.create(uri, "filled", Encoder()) as collection:
        assert collection.upsert(rows) == N_ROWS
        yield collection


@pytest.fixture
def empty(uri, request):
    """A collection of its own for each test that writes."""
    collection = HashCollection.create(uri, f"t_{abs(hash(request.node.nodeid)):x}", Encoder())
    yield collection
    collection.drop()


def expected(rows, code, *, limit=None, radius=None, keep=lambda row: True):
    """Brute force: (distance, pk), sorted."""
    kept = [row for row in rows if keep(row)]
    packed = np.frombuffer(b"".join(row.code for row in kept), dtype=np.uint8).reshape(-1, len(code))
    distances = hamming_distances(np.frombuffer(code, dtype=np.uint8)[None], packed)[0]
    found = sorted((int(d), row.pk) for d, row in zip(distances, kept, strict=True))
    return [hit for hit in found if radius is None or hit[0] <= radius][:limit]


@pytest.fixture
def lite_path(tmp_path):
    if sys.platform == "win32" or shutil.which("true") is None:
        pytest.skip("Milvus Lite runs on Linux and macOS")
    return tmp_path / "lite.db"
