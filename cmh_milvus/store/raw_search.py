"""Searches whose replies are read as columns: the one place that reaches inside pymilvus.

`MilvusClient.search` makes two dicts and a `Hit` of each row found, which is most of a client's time where many are.
It has no way to leave them out, so the reply is taken from below: the gRPC stub's `Search` hands it over, and gives
pymilvus one without rows. All else (consistency, retries, timeouts, errors) is pymilvus's own. With a pymilvus that
this does not know, or that it has renewed its stub, its own result is read: the same columns, more slowly.
"""

from __future__ import annotations

import importlib.metadata
import re
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pymilvus import MilvusClient

KNOWN_PYMILVUS = re.compile(r"(2\.6|3\.0)\.")  # read and tested: 2.6.17 and 3.0.2

Columns = tuple[list[str], NDArray[np.uint16]]  # primary keys, distances

_replies: ContextVar[list[Any] | None] = ContextVar("replies", default=None)  # of the search under way


def tap(client: MilvusClient) -> bool:
    """Make `search` read the replies of a client directly, if this pymilvus is known.

    Args:
        client: New, with a connection of its own.

    Returns:
        Whether it will.
    """
    stub: Any = getattr(getattr(client, "_handler", None), "_stub", None)
    if not KNOWN_PYMILVUS.match(importlib.metadata.version("pymilvus")) or not callable(getattr(stub, "Search", None)):
        return False
    stub.Search = _tapped(stub.Search)
    return True


def search(client: MilvusClient, *args: Any, **kwargs: Any) -> list[Columns]:
    """`MilvusClient.search` for keys and distances alone.

    Args:
        client: Best one that `tap` has seen.
        args: Of `MilvusClient.search`.
        kwargs: Likewise, without output fields; the primary key is a string and distances are whole numbers.

    Returns:
        For each query, primary keys and distances, uint16 (n_hits,), in Milvus's order: nearest first.
    """
    replies: list[Any] = []
    token = _replies.set(replies)
    try:
        answer = client.search(*args, **kwargs)
    finally:
        _replies.reset(token)
    if not replies:
        return [(list(hits.ids), np.array(hits.distances).astype(np.uint16)) for hits in answer]
    results = replies[-1].results  # pymilvus repeats some calls that fail
    distances = np.array(results.scores).astype(np.uint16)
    keys = results.ids.str_id.data
    columns: list[Columns] = []
    start = 0
    for n_hits in results.topks:
        columns.append((keys[start : start + n_hits], distances[start : start + n_hits]))
        start += n_hits
    return columns


def _tapped(call: Any) -> Any:
    def search_rpc(*args: Any, **kwargs: Any) -> Any:
        reply, replies = call(*args, **kwargs), _replies.get()
        if reply is None or replies is None:
            return reply
        replies.append(reply)
        return type(reply)(status=reply.status)

    return search_rpc
