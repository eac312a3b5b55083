"""A connection to Milvus: clear errors, a timeout on every call, a new client after a broken connection."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc  # type: ignore[import-untyped]
from pymilvus import MilvusClient, MilvusException

from cmh_milvus.errors import MissingExtra, SettingsError, StoreError
from cmh_milvus.store import raw_search

TIMEOUT = 30.0  # seconds, for each call
CONNECT_TIMEOUT = 10.0  # seconds
RECONNECT_WAITS = (0.2, 1.0, 3.0)  # seconds before each new client, once a connection has broken
LITE_LOCK_WAIT = 5.0  # seconds; Milvus Lite's child outlives a killed process by up to 3

KEEPALIVE_MS = 300_000  # pymilvus's 10 s is more than a Milvus allows: it breaks connections that wait on an encoder

LITE_PIN = "milvus-lite==2.5.2rc1"
_starting = threading.Lock()  # of starting and ending Milvus Lite's processes: this process has one for a file
_owned: dict[Path, int] = {}  # descriptors of the locks on the files that are open here

_T = TypeVar("_T")
_SERVER_SCHEMES = ("http://", "https://", "tcp://", "unix:")
_LITE_NAME = re.compile(r"[A-Za-z0-9._-]{1,36}")  # Lite's own rule, which it states in a RuntimeError

# These log each error with its traceback, to handlers of pymilvus's own, before they raise it.
for _name in ("pymilvus.decorators", "pymilvus.client.connection_manager"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class ConnectionLost(StoreError):
    """The connection broke; a new client may work. All calls of the store may be repeated safely."""


class Connection:
    """A client for one URI, made anew when it breaks.

    Args:
        uri: Path that ends in `.db` (Milvus Lite), or `http://host:19530`.
        token: Of the server, such as `user:password`.
        timeout: Seconds, for each call.

    Raises:
        SettingsError: The URI has an impossible form.
        StoreError: Nothing answers there, or the file cannot be opened.
        MissingExtra: Milvus Lite is not installed.
    """

    def __init__(self, uri: str | Path, token: str | None = None, timeout: float = TIMEOUT) -> None:
        self.lite_file = lite_file(uri)
        self._target = str(uri if self.lite_file is None else self.lite_file)
        self.uri = re.sub(r"//[^/@]*@", "//", self._target)  # without user and password: it goes into messages
        self.timeout = timeout
        self._token = token or ""
        self._lock = threading.Lock()  # of the client's making and closing
        self._client: MilvusClient | None = None
        self._connected()

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of `MilvusClient`, with the timeout; repeat it over a new client if the connection broke.

        Raises:
            StoreError: Milvus refused, or did not answer.
        """
        return self._over_a_client(
            method, lambda client: getattr(client, method)(*args, timeout=self.timeout, **kwargs)
        )

    def search_columns(self, *args: Any, **kwargs: Any) -> list[raw_search.Columns]:
        """`MilvusClient.search` for keys and distances alone, otherwise as `call`: many times faster.

        Raises:
            StoreError: Milvus refused, or did not answer.
        """
        return self._over_a_client(
            "search", lambda client: raw_search.search(client, *args, timeout=self.timeout, **kwargs)
        )

    def _over_a_client(self, action: str, do: Callable[[MilvusClient], _T]) -> _T:
        for wait in (*RECONNECT_WAITS, None):
            client = None
            try:
                client = self._connected()
                with milvus_errors(self.uri, action):
                    return do(client)
            except ConnectionLost:
                self._close(client, broken=True)
                if wait is None:
                    raise
                time.sleep(wait)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Close the client; Milvus Lite's process ends too, unless another client of this process uses the file."""
        self._close(self._client, broken=False)

    def _close(self, client: MilvusClient | None, *, broken: bool) -> None:
        with self._lock:
            if client is not None and client is self._client:  # else another thread has closed it
                self._client = None
                self._end(client, broken=broken)

    def _end(self, client: MilvusClient, *, broken: bool) -> None:
        address = client._config.address
        client.close()
        if self.lite_file is None:
            return
        with _starting:
            connections = client._manager.get_stats()["connections"]
            shared = any(other["address"] == address and other["client_count"] for other in connections)
            server = _lite_server(self.lite_file)
            if server is not None and server.uds_path == address and (broken or not shared):
                _end_lite_server(self.lite_file)

    def _connected(self) -> MilvusClient:
        """The client; a new one where there is none."""
        with self._lock:
            if self._client is None:
                if self.lite_file is None:
                    self._client = self._new_client()
                else:
                    with _starting, _lite_file_for_us(self.lite_file):
                        self._client = self._new_client()
            return self._client

    def _new_client(self) -> MilvusClient:
        with milvus_errors(self.uri, "connect"):
            # A connection of its own: pymilvus keeps a broken shared one in its registry.
            client = MilvusClient(
                self._target,
                token=self._token,
                timeout=CONNECT_TIMEOUT,
                dedicated=True,
                grpc_options={"grpc.keepalive_time_ms": KEEPALIVE_MS},
            )
            raw_search.tap(client)
        return client


def lite_file(uri: str | Path) -> Path | None:
    """The file that a Milvus Lite URI names, absolute; None for a server's URI.

    Raises:
        SettingsError: The URI is neither a server's nor a path that ends in `.db`.

    Example:
        >>> lite_file("http://localhost:19530") is None
        True
    """
    uri = os.fspath(uri)
    if uri.startswith(_SERVER_SCHEMES):
        return None
    if not uri.endswith(".db"):
        raise SettingsError(
            f"{uri!r} is neither a server nor a Milvus Lite file: give http://host:19530, or a path that ends in .db"
        )
    return Path(uri).expanduser().resolve()


@contextmanager
def milvus_errors(uri: str, action: str) -> Iterator[None]:
    """Turn what pymilvus raises into `StoreError`: the one place that does."""
    try:
        yield
    except (MilvusException, grpc.RpcError, OSError, RuntimeError, ValueError) as error:
        raise _translated(error, uri, action) from error


def _translated(error: Exception, uri: str, action: str) -> StoreError:
    code = error.code() if isinstance(error, grpc.RpcError) else getattr(error, "code", None)
    message = " ".join(str(getattr(error, "message", "") or error).split())[:400]
    is_lite = uri.endswith(".db")
    if "BinaryVector" in message and "MilvusLite" in message:
        return StoreError(
            f'Milvus Lite {_lite_version()} has no BINARY_VECTOR fields. Install `pip install "{LITE_PIN}"` '
            "(2.x .db files only; 3.x folders cannot be reused), or give a server: http://host:19530"
        )
    if "Open local milvus failed" in message:
        if _lite_version() >= "3":
            return StoreError(
                f"{uri} could not be opened by Milvus Lite {_lite_version()}, which cannot read files of 2.x and has "
                f'no BINARY_VECTOR fields. Install `pip install "{LITE_PIN}"`, or give a server: http://host:19530'
            )
        return StoreError(f"{uri} could not be opened: it is not a Milvus Lite 2 database, or it is damaged")
    if isinstance(error, OSError):
        return StoreError(
            f"{uri} could not be opened ({error.strerror}): Milvus Lite writes beside its file, even to read it, so "
            "give a file in a folder that you may write to"
        )
    if code in (2, grpc.StatusCode.UNAVAILABLE) or "closed channel" in message:  # closed by another thread
        if action == "connect":
            return ConnectionLost(
                f"no Milvus answers at {uri} within {CONNECT_TIMEOUT:g} s: check the address, and that the server runs"
            )
        hint = " (a malformed filter can end it too)" if is_lite else ""
        return ConnectionLost(f"the connection to Milvus at {uri} broke during {action}{hint}: {message}")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return StoreError(f"Milvus at {uri} did not answer {action} in time: {message}")
    if code == grpc.StatusCode.UNKNOWN and is_lite:
        return StoreError(
            f"Milvus Lite failed in {action}, repeatedly ({message}): check the free space on the disk of {uri}, and "
            "the filter if there is one"
        )
    return StoreError(f"Milvus at {uri} refused {action}: {message}")


def _check_lite_file(path: Path) -> None:
    """Refuse what Milvus Lite would refuse with a riddle, and what it would not refuse but should."""
    try:
        _lite_servers()
    except ImportError as error:
        if (error.name or "").startswith("milvus_lite"):
            raise MissingExtra(
                f'{path} is a Milvus Lite file, and Milvus Lite is not installed: `pip install "cmh-milvus[lite]"` '
                "(Linux and macOS), or give a server: http://host:19530"
            ) from None
        raise StoreError(
            f'Milvus Lite {_lite_version()} cannot be imported ({error}): install `pip install "{LITE_PIN}"`'
        ) from error
    if not _LITE_NAME.fullmatch(path.name):
        raise SettingsError(
            f"{path.name!r} cannot be the name of a Milvus Lite file: give at most 36 letters, digits, dots, hyphens "
            "and underscores"
        )
    if not path.parent.is_dir():
        raise StoreError(f"{path} could not be made: the folder {path.parent} does not exist, make it first")
    if path.is_dir() and _lite_version() < "3":
        raise StoreError(
            f"{path} is a folder, maybe a Milvus Lite 3 database, which has no BINARY_VECTOR fields: give another name"
        )


@contextmanager
def _lite_file_for_us(path: Path) -> Iterator[None]:
    """Refuse other processes while a server of the file runs here, from before it is started until it has ended."""
    _check_lite_file(path)
    server = _lite_server(path)
    if server is not None and server._p.poll() is not None:  # it died before a client could notice
        _end_lite_server(path)
        server = None
    if server is None:
        _give_up(path)  # what a server had that was ended past us; its lock would refuse us too
        with milvus_errors(str(path), "connect"):
            _owned[path] = _owner_lock(path)
    try:
        yield
    finally:
        if _lite_server(path) is None:  # it could not be started
            _give_up(path)


def _owner_lock(path: Path) -> int:
    """The locked descriptor of a file beside `path`, once no other process has the database open.

    Lite has a lock of its own, but it deletes the lock's file whenever a server ends, even one that was refused, and
    who has opened that file just before gets in beside the next one. So this lock's file stays, and Lite's lock is
    looked at for the sake of programs that open the database by themselves.
    """
    import fcntl  # not on Windows, where there is no Milvus Lite either

    deadline = time.monotonic() + LITE_LOCK_WAIT
    descriptor = os.open(path.with_name(f".{path.name}.owner"), os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _locked(path) and not _written(path):
                    return descriptor
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{path} is open in another process: close that one, or use a Milvus server, which many processes "
                    "may share"
                )
            time.sleep(0.1)
    except BaseException:
        os.close(descriptor)
        raise


def _give_up(path: Path) -> None:
    descriptor = _owned.pop(path, None)
    if descriptor is not None:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing it is not enough where a forked process has it too
        os.close(descriptor)


def _lite_server(path: Path) -> Any:
    """The running server of this process for the file, if any; Lite 3 has none of that kind."""
    return getattr(_lite_servers(), "_servers", {}).get(str(path))


def _end_lite_server(path: Path) -> None:
    """MilvusClient never ends Lite's process, nor starts another one when it is dead."""
    _lite_servers().release_server(str(path))
    _give_up(path)


def _locked(path: Path) -> bool:
    """Whether Lite's lock is taken; not to be asked of a file that is open here, as the lock would be lost."""
    import fcntl

    try:
        with (path.parent / f".{path.name}.lock").open("r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _written(path: Path) -> bool:
    """Whether a write is under way: the child of a killed process ends its last one without Lite's lock."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=0)) as database:
            database.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:  # what else is wrong with the file, Lite finds out
        return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
    return False


def _lite_servers() -> Any:
    from milvus_lite.server_manager import server_manager_instance

    return server_manager_instance


def _lite_version() -> str:
    try:
        return importlib.metadata.version("milvus-lite")
    except importlib.metadata.PackageNotFoundError:
        return "(unknown)"
