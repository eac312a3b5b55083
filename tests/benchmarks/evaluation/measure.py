"""Time and peak memory of our evaluators and of published ones, side by side, on the protocols' sizes.

    OMP_NUM_THREADS=1 python tests/benchmarks/evaluation/measure.py --published FOLDER --memory

FOLDER holds checkouts of the repositories named in PUBLISHED; their functions are taken out of their files and run
as they are, and those that are not found are left out. Published functions and the torch backend are timed on
`--queries` queries and scaled linearly to the protocol; all else runs the protocol whole, the torch backend on CUDA
too, where there is one: its wall time is the one to read. Memory is that above the inputs, each evaluator in a process
of its own (Linux). Both sides get OMP_NUM_THREADS threads.
"""

import argparse
import ast
import ctypes
import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from cmh_milvus import codes, metrics
from cmh_milvus.ranking import distance_table, stable_average_precision

# name: queries, database, labels, mean labels an item, exponent of their Zipf law (it sets the share of relevant items)
PROTOCOLS = {
    "MIRFLICKR": (2000, 18015, 24, 3.80, 0.75),
    "NUS-WIDE": (2085, 193749, 21, 2.18, 0.98),
    "COCO": (5000, 117218, 80, 2.94, 0.98),
}

# repository: file, functions (the first is called), kind of arrays, order of the arguments
PUBLISHED = {
    "WendellGul/DCMH": ("utils.py", ("calc_map_k", "calc_hammingDist"), "torch", "qB rB qL rL"),
    "kalenforn/clip-based-cross-modal-hash": (
        "common/calc_utils.py",
        ("calc_map_k", "calc_hammingDist"),
        "torch",
        "qB rB qL rL",
    ),
    "penghu-cs/UCCH": ("UCCH.py", ("fx_calc_map_multilabel_k",), "numpy", "rB rL qB qL k metric"),
    "Atmegal/DGCPN": ("metric.py", ("calculate_map", "calculate_hamming"), "numpy", "qB rB qL rL"),
    "swuxyj/DeepHash-pytorch": ("utils/tools.py", ("CalcTopMap", "CalcHammingDist"), "numpy", "rB qB rL qL n"),
    "swuxyj/DeepHash-pytorch with PR": (
        "utils/tools.py",
        ("CalcTopMapWithPR", "CalcHammingDist"),
        "numpy",
        "qB qL rB rL n",
    ),
}


def synthetic(protocol, n_bits, seed=0):
    """Packed codes and labels: Zipf label frequencies, codes that follow the labels with noise."""
    m, n, n_labels, mean, exponent = PROTOCOLS[protocol]
    rng = np.random.default_rng(seed)
    weight = np.arange(1, n_labels + 1) ** -exponent
    scales = np.linspace(0, 20, 20001)
    expected = [np.minimum(0.95, scale * weight).sum() for scale in scales]
    labels = rng.random((m + n, n_labels)) < np.minimum(0.95, scales[np.searchsorted(expected, mean)] * weight)
    packed = np.empty((m + n, n_bits // 8), dtype=np.uint8)
    projection = rng.standard_normal((n_labels, n_bits)).astype(np.float32)
    for start in range(0, m + n, 20000):
        rows = labels[start : start + 20000].astype(np.float32)
        noise = 2 * rng.standard_normal((len(rows), n_bits), dtype=np.float32)
        packed[start : start + 20000] = codes.pack(codes.binarize(rows @ projection + noise))
    return packed[:m], packed[m:], labels[:m], labels[m:]


def ours(threads):
    import torch

    def expected(backend, *data, device="cpu"):
        table = distance_table(*data, grading="binary", backend=backend, threads=threads, device=device)
        return metrics.mean_average_precision(table)

    def stable(backend, *data):
        return metrics.mean_over_queries(stable_average_precision(*data, backend=backend, threads=threads))

    evaluators = {
        "ours, compiled": functools.partial(expected, "compiled"),
        "ours, numpy": functools.partial(expected, "numpy"),
        "ours, torch": functools.partial(expected, "torch"),
        "ours, compiled, stable order": functools.partial(stable, "compiled"),
        "ours, numpy, stable order": functools.partial(stable, "numpy"),
    }
    if torch.cuda.is_available():  # on the whole protocol; its wall time counts
        evaluators["ours, torch on CUDA"] = functools.partial(expected, "torch", device="cuda")
    return evaluators


def published(folder):
    """Evaluators found below `folder`: name -> function of unpacked codes and labels."""
    import scipy.spatial
    import torch

    vars(np)["int"] = int  # removed in numpy 1.24; one of them says it
    found = {}
    for name, (file, functions, kind, order) in PUBLISHED.items():
        for path in sorted(folder.rglob(Path(file).name)):
            if not path.as_posix().endswith(file):
                continue
            nodes = [n for n in ast.parse(path.read_text()).body if getattr(n, "name", None) in functions]
            if len(nodes) == len(functions):
                names = {"np": np, "torch": torch, "scipy": scipy, "tqdm": iter}
                exec(compile(ast.Module(nodes, []), str(path), "exec"), names)
                found[name] = functools.partial(call, names[functions[0]], kind, order)
                break
    return found


def call(function, kind, order, arguments):
    value = function(*(arguments[kind][name] for name in order.split()))
    return float(value[0] if isinstance(value, tuple) else value)


def unpacked(data, n_queries):
    """Arguments of published functions: float32 +-1 codes and 0/1 labels."""
    import torch

    query, database, query_labels, database_labels = data
    arrays = {
        "qB": codes.unpack(query[:n_queries]).astype(np.float32),
        "rB": codes.unpack(database).astype(np.float32),
        "qL": query_labels[:n_queries].astype(np.float32),
        "rL": database_labels.astype(np.float32),
    }
    rest = {"n": len(database), "k": 0, "metric": "hamming"}
    return {
        "numpy": arrays | rest,
        "torch": {name: torch.from_numpy(array) for name, array in arrays.items()} | rest,
    }


def peak_above(run):
    """Bytes by which the peak of this process rises above what it holds now."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # peak := now
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def timed(run):
    wall, cpu = time.perf_counter(), time.process_time()
    value = run()
    return time.process_time() - cpu, time.perf_counter() - wall, value


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--published", type=Path, help="folder with checkouts of published evaluators")
    parser.add_argument("--queries", type=int, default=40, help="queries that published functions are timed on")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=PROTOCOLS)
    parser.add_argument("--memory", action="store_true", help="measure peak memory too")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    if not threads:
        parser.error("set OMP_NUM_THREADS, so that the threads of both sides are known")
    import torch

    torch.set_num_threads(threads)
    own, others = ours(threads), published(arguments.published) if arguments.published else {}
    if arguments.memory_of:
        (protocol,), (n_bits,), name = arguments.protocols, arguments.bits, arguments.memory_of
        data = synthetic(protocol, n_bits)
        if name in own:
            own[name](*(part[:50] for part in data))  # compiled before it is measured
            few = arguments.queries if name == "ours, torch" else len(data[0])
            part = data[0][:few], data[1], data[2][:few], data[3]
            print(peak_above(lambda: own[name](*part)))
        else:
            inputs = unpacked(data, arguments.queries)
            print(peak_above(lambda: others[name](inputs)))
        return
    print(f"threads of both sides: {threads}; cores: {os.cpu_count()}; load: {os.getloadavg()[0]:.1f}\n")
    for protocol in arguments.protocols:
        for n_bits in arguments.bits:
            report(protocol, n_bits, own, others, arguments, threads)


def report(protocol, n_bits, own, others, arguments, threads):
    data = synthetic(protocol, n_bits)
    m, n, few = len(data[0]), len(data[1]), arguments.queries
    subset = (data[0][:few], data[1], data[2][:few], data[3])
    inputs = unpacked(data, few)
    relevant = metrics.DistanceTable.n_relevant(distance_table(*subset, grading="binary")).mean() / n
    runs = {name: (functools.partial(run, *data), 1.0) for name, run in own.items() if name != "ours, torch"}
    runs["ours, torch"] = (functools.partial(own["ours, torch"], *subset), m / few)
    runs |= {name: (functools.partial(run, inputs), m / few) for name, run in others.items()}
    best = dict.fromkeys(runs, (np.inf, np.inf, 0.0))
    for repeat in range(arguments.repeats + 1):
        for name, (run, scale) in runs.items():
            cpu, wall, value = timed(run)
            if repeat:  # the first warms up
                old = best[name]
                best[name] = (min(old[0], cpu * scale), min(old[1], wall * scale), value)
    on_subset = {name: run(*subset) for name, run in own.items()}
    which = 0 if threads == 1 else 1
    fastest = min((best[name][which] for name in others), default=np.nan)
    print(f"### {protocol}, {m:,} x {n:,}, {n_bits} bits, {relevant:.3f} relevant\n")
    print("| evaluator | CPU s | wall s | ns a pair | fastest published / this | peak MB | MAP, same queries |")
    print("|---|---|---|---|---|---|---|")
    for name, (cpu, wall, value) in best.items():
        print(
            f"| {name} | {cpu:.3f} | {wall:.3f} | {best[name][which] / m / n * 1e9:.2f} "
            f"| {fastest / best[name][which]:.1f} | {memory(name, protocol, n_bits, arguments)} "
            f"| {on_subset.get(name, value):.6f} |"
        )
    print(flush=True)


def memory(name, protocol, n_bits, arguments):
    """Peak above the inputs in a fresh process, in MB, on as many queries as are timed."""
    if not arguments.memory:
        return ""
    command = [sys.executable, __file__, "--memory-of", name, "--protocols", protocol, "--bits", str(n_bits)]
    command += ["--queries", str(arguments.queries)]
    if arguments.published:
        command += ["--published", str(arguments.published)]
    return round(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1e6)


if __name__ == "__main__":
    main()
