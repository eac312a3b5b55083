"""Peak memory of training on 200,000 pairs, for every method.

Run it as `python tests/benchmarks/training/memory.py`, or with names of methods.

Each method trains in a process of its own, through the trainer, on random features (1280-d pictures, 384-d texts,
float32), 24 labels and 64 bits: the closed form, or one epoch. The figure is the largest resident set of that process,
with the interpreter, the features (1.3 GB) and the trainer's copy of the train rows (another 1.3 GB) in it.

What takes n^2 time is cut short, and what it allocates is allocated in full: an epoch updates on `STEPS` batches a
phase, and the search for neighbours and thresholds among the rows runs on the first `BLOCKS` blocks. `--whole` leaves
both uncut. The program fails where a method needs more than 8 GB.
"""

import argparse
import collections
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from cmh_milvus.datasets.base import PairedFeatures, Split
from cmh_milvus.methods import base, cirh, dgcpn, get_method, list_methods, ugach
from cmh_milvus.training import TrainingSettings, train

N, IMAGE_DIM, TEXT_DIM, N_LABELS, N_BITS = 200_000, 1280, 384, 24, 64
STEPS, BLOCKS, LIMIT_GB = 10, 2, 8.0


def random_pairs():
    """Features without structure, all rows for training, in an order of their own."""
    random = np.random.default_rng(0)
    image = random.standard_normal((N, IMAGE_DIM), dtype=np.float32)
    text = random.standard_normal((N, TEXT_DIM), dtype=np.float32)
    labels = random.random((N, N_LABELS), dtype=np.float32) < 0.1
    none = np.zeros(0, dtype=np.int64)
    split = Split(none, np.arange(N), random.permutation(N), none)
    return PairedFeatures("random", [str(i) for i in range(N)], image, text, labels, (), split, "")


def cut_short(method_class):
    """Make what takes n^2 time stop early; memory is as before."""
    taken = collections.Counter()
    steps = method_class.steps

    def first_steps(self, batch, phase):
        taken[phase] += 1
        if taken[phase] <= STEPS:
            yield from steps(self, batch, phase)

    def first_neighbours(unit, k, block=1024):
        n = len(unit)
        values, rows = unit.new_zeros(n, k), torch.zeros(n, k, dtype=torch.int32)
        some = BLOCKS * base.rows_at_a_time(n, block)
        for start in range(0, some, some // BLOCKS):
            end = start + some // BLOCKS
            values[start:end], rows[start:end] = (unit[start:end] @ unit.T).topk(k, dim=1)
        return values, rows

    def first_thresholds(unit, kept, block=1024):
        n = len(unit)
        dropped, block = n - round(kept * n), base.rows_at_a_time(n, block)
        for rows in torch.split(unit[: BLOCKS * block], block):
            (rows @ unit.T).kthvalue(dropped + 1, dim=1)
        return unit.new_zeros(n)

    method_class.steps = first_steps
    for module in (dgcpn, ugach):
        module.nearest_rows = first_neighbours
    cirh.row_thresholds = first_thresholds


def measure(name, whole):
    """Train once and report."""
    torch.set_num_threads(1)
    method_class = get_method(name)
    if not whole:
        cut_short(method_class)
    data = random_pairs()
    started = time.process_time()
    train(data, TrainingSettings(name, N_BITS, {"epochs": 1}, device="cpu"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"method": name, "peak_gb": round(peak, 2), "seconds": round(time.process_time() - started)}))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("methods", nargs="*", default=list_methods())
    parser.add_argument("--whole", action="store_true", help="nothing is cut short")
    parser.add_argument("--here", action="store_true", help="measure the one method in this process")
    arguments = parser.parse_args()
    if arguments.here:
        measure(arguments.methods[0], arguments.whole)
        return 0
    failed = False
    for name in arguments.methods:
        command = [sys.executable, __file__, name, "--here", *(["--whole"] if arguments.whole else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        print(done.stdout.strip() or f"{name} failed", flush=True)
        failed |= done.returncode != 0 or json.loads(done.stdout)["peak_gb"] > LIMIT_GB
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
