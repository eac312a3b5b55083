"""What a user sees when Milvus cannot be reached or breaks. Milvus Lite and absent servers; no server is needed."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from pymilvus import MilvusException

from cmh_milvus.errors import MissingExtra, SettingsError, StoreError
from cmh_milvus.store import HashCollection, Row
from cmh_milvus.store.connection import ConnectionLost, lite_file, milvus_errors
from tests.store.conftest import Encoder


def lite_process(path):
    from milvus_lite.server_manager import server_manager_instance

    return server_manager_instance._servers[str(path)]._p


# Where


@pytest.mark.parametrize("uri", ["photos", "photos.sqlite", "", "ftp://host", "localhost:19530"])
def test_impossible_uris(uri):
    with pytest.raises(SettingsError, match=r"give http://host:19530, or a path that ends in \.db"):
        HashCollection.open(uri, "photos")


def test_uris_of_servers_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert [lite_file(uri) for uri in ("http://a", "https://a:1", "tcp://a", "unix:/a.sock")] == [None] * 4
    assert lite_file("./a.db") == tmp_path.resolve() / "a.db"
    assert lite_file("~/a.db") == tmp_path.resolve() / "home" / "a.db"


def test_passwords_are_not_repeated():
    with pytest.raises(StoreError) as refusal:
        HashCollection.open("http://me:secret@127.0.0.1:1", "photos")
    assert "http://127.0.0.1:1" in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_impossible_port():
    with pytest.raises(StoreError, match="refused connect: Port"):
        HashCollection.open("http://host:port", "photos")


@pytest.mark.parametrize("name", ["", "my photos", "1a", "a'b", "é"])
def test_impossible_collection_names(tmp_path, name):
    for opening in (HashCollection.open, HashCollection.create, HashCollection.open_or_create):
        with pytest.raises(SettingsError, match="cannot be named"):
            opening(str(tmp_path / "a.db"), name, Encoder())


@pytest.mark.parametrize("name", ["a b.db", "é.db", "x" * 34 + ".db", "a'.db"])
def test_impossible_file_names(tmp_path, name):
    with pytest.raises(SettingsError, match="at most 36 letters"):
        HashCollection.create(str(tmp_path / name), "photos", Encoder())


def test_missing_folder(tmp_path):
    with pytest.raises(StoreError, match=r"absent does not exist, make it first"):
        HashCollection.create(str(tmp_path / "absent" / "a.db"), "photos", Encoder())


def test_a_folder_instead_of_a_file(tmp_path):
    (tmp_path / "a.db").mkdir()
    with pytest.raises(StoreError, match="is a folder, maybe a Milvus Lite 3 database"):
        HashCollection.create(str(tmp_path / "a.db"), "photos", Encoder())


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / "a.db").write_bytes(b"no database" * 100)
    with pytest.raises(StoreError, match="not a Milvus Lite 2 database, or it is damaged"):
        HashCollection.open(str(tmp_path / "a.db"), "photos")


@pytest.mark.skipif(sys.platform != "linux", reason="/sys is Linux's; root may write in any ordinary folder")
def test_read_only_folder():
    with pytest.raises(StoreError, match="in a folder that you may write to"):
        HashCollection.create("/sys/a.db", "photos", Encoder())


def test_milvus_lite_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "milvus_lite", None)
    monkeypatch.setitem(sys.modules, "milvus_lite.server_manager", None)
    with pytest.raises(MissingExtra, match=r'pip install "cmh-milvus\[lite\]"'):
        HashCollection.create(str(tmp_path / "a.db"), "photos", Encoder())


def test_absent_server_is_reported_in_seconds():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(StoreError, match=rf"no Milvus answers at {uri} .*check the address"):
            HashCollection.open(uri, "photos")
    assert time.monotonic() - started < 15


def test_a_server_that_never_answers_is_reported_in_seconds(monkeypatch):
    monkeypatch.setattr("cmh_milvus.store.connection.CONNECT_TIMEOUT", 2.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(StoreError, match="no Milvus answers"):
            HashCollection.open(f"http://127.0.0.1:{silent.getsockname()[1]}", "photos")
    assert time.monotonic() - started < 15


# Which process has the file

OTHER = """
import sys
from cmh_milvus.errors import StoreError
from cmh_milvus.store import HashCollection, connection
connection.LITE_LOCK_WAIT = 0.3
for _ in range(2):
    try:
        with HashCollection.open(sys.argv[1], "photos") as photos:
            print("opened", photos.count())
    except StoreError as error:
        print(error)
"""


def other_process(path):
    command = [sys.executable, "-c", OTHER, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout


def test_a_file_belongs_to_one_process_until_it_is_closed(lite_path):
    """Milvus Lite itself lets the third process in: the second, refused, deletes the lock."""
    with HashCollection.create(str(lite_path), "photos", Encoder()) as photos:
        photos.upsert([Row("a", "image", b"ab")])
        with HashCollection.open(str(lite_path), "photos") as second:
            assert second.count() == 1
        assert photos.count() == 1
        assert other_process(lite_path).count("is open in another process") == 2
    assert other_process(lite_path) == "opened 1\nopened 1\n"
    with HashCollection.open(str(lite_path), "photos") as again:
        assert again.count() == 1


def test_a_write_that_outlives_its_process_is_waited_for(lite_path):
    """Milvus Lite's child ends the last call of a killed process, and no lock of Lite's says so."""
    with HashCollection.create(str(lite_path), "photos", Encoder()) as photos:
        photos.upsert([Row("a", "image", b"ab")])
    with closing(sqlite3.connect(lite_path)) as database:
        database.execute("BEGIN IMMEDIATE")
        assert other_process(lite_path).count("is open in another process") == 2
    with closing(sqlite3.connect(lite_path, check_same_thread=False)) as database:
        database.execute("BEGIN IMMEDIATE")
        end = threading.Timer(0.5, database.rollback)
        end.start()
        with HashCollection.open(str(lite_path), "photos") as photos:
            assert photos.count() == 1
        end.join()


IN_TURNS = """
import sys, time
from cmh_milvus.errors import StoreError
from cmh_milvus.store import HashCollection, Row
acknowledged, end = 0, time.monotonic() + 6
while time.monotonic() < end:
    try:
        with HashCollection.open(sys.argv[1], "photos") as photos:
            assert photos.count() >= acknowledged, "opened beside another process"
            photos.upsert([Row(f"{sys.argv[2]}{acknowledged}", "image", b"ab")])
            acknowledged += 1
    except StoreError as error:
        assert "open in another process" in str(error), error
print(acknowledged)
"""


def test_processes_that_open_a_file_in_turns_lose_nothing(lite_path):
    """By Milvus Lite's own lock alone they sometimes have it open at once, and see an empty database."""
    HashCollection.create(lite_path, "photos", Encoder()).close()
    commands = [[sys.executable, "-c", IN_TURNS, str(lite_path), name] for name in "abc"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    acknowledged = [int(process.communicate(timeout=60)[0]) for process in processes]
    with HashCollection.open(lite_path, "photos") as photos:
        assert photos.count() == sum(acknowledged) > 0


def test_threads_open_and_close_a_file_at_once(lite_path):
    HashCollection.create(lite_path, "photos", Encoder()).close()
    barrier = threading.Barrier(3)

    def opened(_):
        for _ in range(3):
            barrier.wait(timeout=30)
            with HashCollection.open(lite_path, "photos") as photos:
                assert photos.count() == 0

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(opened, range(3)))


# Connections that break


def test_milvus_lite_that_died_before_it_was_asked(lite_path):
    from milvus_lite.server_manager import server_manager_instance

    HashCollection.create(lite_path, "photos", Encoder()).close()
    assert server_manager_instance.start_and_get_uri(str(lite_path))
    lite_process(lite_path).kill()
    lite_process(lite_path).wait()
    with HashCollection.open(lite_path, "photos") as photos:
        assert photos.count() == 0


def test_milvus_lite_that_something_else_ended(lite_path):
    from milvus_lite.server_manager import server_manager_instance

    HashCollection.create(lite_path, "photos", Encoder())
    server_manager_instance.release_server(str(lite_path))
    with HashCollection.open(lite_path, "photos") as photos:
        assert photos.count() == 0


def test_milvus_lite_killed(lite_path):
    one = HashCollection.create(str(lite_path), "photos", Encoder())
    with one, HashCollection.open(str(lite_path), "photos") as other:
        one.upsert(Row(str(i), "image", b"ab") for i in range(10))
        for _ in range(2):
            lite_process(lite_path).kill()
            lite_process(lite_path).wait()
            assert one.count() == 10
            assert other.count() == 10
            assert one.upsert([Row("0", "image", b"cd")]) == 1
            assert [hit.item_id for hit in other.lookup([b"cd"], 0)[0]] == ["0"]


def test_threads_share_a_collection_whose_back_end_dies(lite_path):
    with HashCollection.create(lite_path, "photos", Encoder()) as photos:
        photos.upsert(Row(str(i), "image", b"ab") for i in range(10))
        done = threading.Event()

        def search():
            answers = set()
            while not done.is_set():
                answers.add(len(photos.search([b"ab"])[0]))
            return answers

        with ThreadPoolExecutor(6) as threads:
            searches = [threads.submit(search) for _ in range(6)]
            try:
                for _ in range(3):
                    time.sleep(0.5)
                    photos.count()  # so that there is a process again
                    lite_process(lite_path).kill()
            finally:
                done.set()
            assert {frozenset(one.result()) for one in searches} == {frozenset({10})}


def test_a_misspelt_file_is_not_made(lite_path):
    with pytest.raises(StoreError, match=r"no collection 'photos' at .*no such file"):
        HashCollection.open(lite_path, "photos")
    assert not lite_path.exists()


def test_a_filter_that_may_end_milvus_lite(lite_path, monkeypatch):
    """It reads memory that is not its own: mostly it dies, sometimes it refuses."""
    monkeypatch.setattr("cmh_milvus.store.connection.RECONNECT_WAITS", (0.0,))
    with HashCollection.create(str(lite_path), "photos", Encoder()) as photos:
        photos.upsert([Row("a", "image", b"ab", {"labels": ["x"]})])
        with pytest.raises(StoreError):
            photos.count(filter="json_contains(labels)")
        assert photos.count() == 1


def test_a_broken_connection_is_told_from_a_refusal():
    error = MilvusException(2, "Fail connecting to server on unix:/a.sock")
    for uri, said in [
        ("a.db", r"broke during query \(a malformed filter can end it too\)"),
        ("http://a", "broke during q"),
    ]:
        with pytest.raises(ConnectionLost, match=said), milvus_errors(uri, "query"):
            raise error


def test_close_may_be_repeated(lite_path):
    photos = HashCollection.create(str(lite_path), "photos", Encoder())
    photos.close()
    photos.close()
    assert not Path(f"{lite_path.parent}/.{lite_path.name}.lock").exists()


# Words


class Refused(grpc.RpcError):
    """As grpc raises it for what a server does not implement; pymilvus lets it through."""

    def code(self):
        return grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("raised", "uri", "said"),
    [
        (
            # Milvus Lite 3.2.2, word for word
            MilvusException(
                6,
                "field 'code' uses Milvus type BinaryVector which MilvusLite does not support. Phase 10.2 supports: "
                "BOOL, INT8/16/32/64, FLOAT, DOUBLE, VARCHAR, JSON, ARRAY, GEOMETRY, TIMESTAMPTZ, FLOAT_VECTOR, "
                "SPARSE_FLOAT_VECTOR.",
            ),
            "a.db",
            r'has no BINARY_VECTOR fields. Install `pip install "milvus-lite==2.5.2rc1"` \(2.x .db files only; 3.x '
            r"folders cannot be reused\), or give a server: http://host:19530",
        ),
        (MilvusException(1100, "invalid\n  expression"), "http://a", "Milvus at http://a refused query: invalid expre"),
        (MilvusException(grpc.StatusCode.UNKNOWN, "Retry timeout: 20s"), "a.db", "check the free space .* the filter"),
        (MilvusException(grpc.StatusCode.DEADLINE_EXCEEDED, "late"), "http://a", "did not answer query in time"),
        (Refused("unimplemented"), "http://a", "refused query: unimplemented"),
        (PermissionError(13, "Permission denied"), "a.db", "Permission denied"),
    ],
)
def test_what_pymilvus_raises_is_translated(raised, uri, said):
    with pytest.raises(StoreError, match=said) as caught, milvus_errors(uri, "query"):
        raise raised
    assert not isinstance(caught.value, ConnectionLost)
    assert caught.value.__cause__ is raised


def test_a_back_end_that_hangs_is_reported_in_time(lite_path):
    created = HashCollection.create(str(lite_path), "photos", Encoder())
    with created, HashCollection.open(str(lite_path), "photos", timeout=1.0) as photos:
        lite_process(lite_path).send_signal(signal.SIGSTOP)
        started = time.monotonic()
        try:
            for ask in (lambda: photos.search([b"ab"]), lambda: photos.upsert([Row("a", "image", b"ab")])):
                with pytest.raises(StoreError, match="did not answer"):
                    ask()
        finally:
            lite_process(lite_path).send_signal(signal.SIGCONT)
        assert time.monotonic() - started < 10
        assert created.upsert([Row("a", "image", b"ab")]) == created.count() == 1


def test_a_user_sees_one_sentence_not_pymilvus_tracebacks(lite_path):
    code = (
        "import sys\nfrom cmh_milvus.store import HashCollection\nfrom cmh_milvus.errors import StoreError\n"
        "try: HashCollection.open('http://127.0.0.1:1', 'photos')\nexcept StoreError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.stdout.startswith("no Milvus answers at http://127.0.0.1:1")
    assert done.stderr == ""
