"""Client CPU of search replies: `MilvusClient.search` against ours, side by side on Milvus Lite.

    OMP_NUM_THREADS=1 python tests/benchmarks/store/decode.py

Milvus Lite's server is a process of its own, so `time.process_time` counts the client alone: building the request,
receiving the reply, decoding it. "Received" is that without decoding: our search with the reply dropped. In each
repeat the ways take turns; the best of five counts. Codes are random, keys look like file names.
"""

import argparse
import gc
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pymilvus

from cmh_milvus.store import HashCollection, Row, raw_search


@dataclass(frozen=True)
class Encoder:
    """What a collection needs to know of an encoder."""

    fingerprint: str = "0" * 64
    n_bits: int = 64


def cpu_ms(work):
    gc.collect()
    start = time.process_time()
    answer = work()
    seconds = time.process_time() - start
    del answer
    return 1e3 * seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=16_000, help="below 16,384, so that one call gives them all")
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 10], help="codes of one call")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()

    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (given.rows, 8), dtype=np.uint8)
    numbers = rng.permutation(given.rows)
    with (
        tempfile.TemporaryDirectory(prefix="decode-") as folder,
        HashCollection.create(str(Path(folder) / "decode.db"), "codes", Encoder()) as collection,
    ):
        collection.upsert(Row(f"{numbers[i]:08d}.jpg", "image", codes[i].tobytes()) for i in range(given.rows))
        client = collection._connection._client  # pymilvus itself, over the same channel
        print(f"pymilvus {pymilvus.__version__}, {given.rows} rows of 64 bits, limit {given.limit}, client CPU in ms")
        for n in given.queries:
            measure(collection, client, [code.tobytes() for code in codes[:n]], given)


def measure(collection, client, questions, given):
    ask = {"data": questions, "limit": given.limit, "anns_field": "code", "timeout": 60}

    def received():
        token = raw_search._replies.set([])
        try:
            return client.search("codes", **ask)
        finally:
            raw_search._replies.reset(token)

    ways = {
        "received, not decoded": received,
        "MilvusClient.search": lambda: client.search("codes", **ask),
        "keys and distances (raw_search)": lambda: raw_search.search(client, "codes", **ask),
        "HashCollection.search, ties cut by key": lambda: collection.search(questions, limit=given.limit),
        "  and a Hit made of each row": lambda: [list(h) for h in collection.search(questions, limit=given.limit)],
        "HashCollection.served, all rows": lambda: list(collection.served(questions)),
        "HashCollection.rank, all rows sorted": lambda: list(collection.rank(questions)),
    }
    times = {name: [] for name in ways}
    for _ in range(given.repeats):
        for name, way in ways.items():
            times[name].append(cpu_ms(way))
    best = {name: min(values) for name, values in times.items()}
    print(f"\n{len(questions)} queries in one call")
    for name, value in best.items():
        print(f"  {name:42} {value:8.2f}  {best['MilvusClient.search'] / value:6.1f}x")
    floor = best["received, not decoded"]
    theirs, ours = best["MilvusClient.search"] - floor, best["keys and distances (raw_search)"] - floor
    print(f"  decoding alone: {theirs:.2f} against {ours:.2f}, {theirs / ours:.1f}x")


if __name__ == "__main__":
    main()
