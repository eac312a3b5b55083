"""UCCH, ours and the authors' code, on the same features and the same train rows.

    OMP_NUM_THREADS=1 python tests/benchmarks/training/ucch_published.py FEATURES.npz --published FOLDER

FOLDER holds a checkout of https://github.com/penghu-cs/UCCH. Its nets, memory and losses are taken out of their files
and run as they are, on the CPU; the loop around them is this file's, with the authors' optimizer and defaults but for
the width of the hidden layers (1,024 for 8,192) and the number of negatives (1,024 for 4,096), which need hours on a
CPU, and for smaller batches, which do better here. Features are scaled for it as our heads scale them, bags of words to
unit length. Ours trains with its defaults.

Both train on the train rows, and on all database rows, as the authors do. Printed is MAP@all of the query rows against
the database, of the authors' code after each number of epochs in EPOCHS: it stops early by labels of database rows, so
the best of these is an upper bound of what it would choose.
"""

import argparse
import ast
import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cmh_milvus import metrics
from cmh_milvus.codes import binarize, pack
from cmh_milvus.comparison import codes_of
from cmh_milvus.datasets.base import Split
from cmh_milvus.datasets.features import load_features
from cmh_milvus.encoders.hash_head import FeatureScaling
from cmh_milvus.ranking import distance_table
from cmh_milvus.training import TrainingSettings, train

CLASSES = {
    "nets/ImageNet.py": "ImageNet",
    "nets/TextNet.py": "TextNet",
    "NCE/alias_multinomial.py": "AliasMethod",
    "NCE/NCEAverage.py": "NCEAverage",
    "NCE/NCECriterion.py": "NCESoftmaxLoss",
    "src/utils.py": "ContrastiveLoss",
}
EPOCHS = (4, 8, 12, 16, 20)
WIDTH, NEGATIVES = 1024, 1024
ALPHA, SHIFT, MARGIN, TEMPERATURE, MOMENTUM, RATE, DECAY = 0.9, 1.0, 0.2, 0.9, 0.4, 1e-4, 1e-6


def published(folder):
    """The authors' classes by name."""
    names = {"torch": torch, "nn": nn, "F": F, "math": math}
    for file, name in CLASSES.items():
        (path,) = (path for path in folder.rglob(Path(file).name) if path.as_posix().endswith(file))
        nodes = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == name]
        exec(compile(ast.Module(nodes, []), str(path), "exec"), names)
    return names


def both_maps(codes, data):
    """MAP@all from pictures to texts and from texts to pictures."""
    query, database = data.split.query, data.split.database
    labels = data.labels[query], data.labels[database]
    return [
        metrics.mean_average_precision(distance_table(codes[one][query], codes[other][database], *labels))
        for one, other in (("image", "text"), ("text", "image"))
    ]


def scaled(features, rows):
    """Features on the scale of the train rows."""
    everything = torch.from_numpy(features)
    scaling = FeatureScaling(features.shape[1])
    scaling.fit(everything[torch.from_numpy(rows)])
    result = scaling(everything)
    return F.normalize(result, dim=1) if scaling.unit_length else result


def train_published(names, data, rows, n_bits, batch):
    """Yields (epochs, codes of all items) at each of EPOCHS."""
    torch.manual_seed(0)
    features = {"image": scaled(data.image, rows), "text": scaled(data.text, rows)}
    nets = {
        "image": names["ImageNet"](features["image"].shape[1], n_bits, True, WIDTH, WIDTH, 3),
        "text": names["TextNet"](features["text"].shape[1], n_bits, True, WIDTH, WIDTH, 2),
    }
    parameters = [parameter for net in nets.values() for parameter in net.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=RATE, weight_decay=DECAY)
    memory = names["NCEAverage"](n_bits, len(rows), NEGATIVES, TEMPERATURE, MOMENTUM)
    contrast, ranking = names["NCESoftmaxLoss"](), names["ContrastiveLoss"](MARGIN, shift=SHIFT)
    kept = torch.from_numpy(rows)
    for epoch in range(max(EPOCHS)):
        for index in torch.randperm(len(rows)).split(batch)[: len(rows) // batch]:
            image, text = (nets[modality](features[modality][kept[index]]) for modality in ("image", "text"))
            of_image, of_text = memory(image, text, index, epoch=epoch - 1)  # one epoch of warm-up
            loss = ALPHA * (contrast(of_image) + contrast(of_text)) + (1 - ALPHA) * ranking(image, text)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        if epoch + 1 in EPOCHS:
            with torch.no_grad():
                codes = {name: pack(binarize(net(features[name]).numpy())) for name, net in nets.items()}
            yield epoch + 1, codes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", type=Path)
    parser.add_argument("--published", type=Path, required=True, help="folder with the authors' checkout")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256], help="batch sizes of the authors' code")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.Tensor.cuda = lambda self: self  # the authors' sampler asks for a GPU
    names, data = published(arguments.published), load_features(arguments.features)
    none = np.zeros(0, dtype=np.int64)

    def line(rows, n_bits, side, epochs, codes, started):
        maps = both_maps(codes, data)
        seconds = time.perf_counter() - started
        shown = " | ".join(f"{value:.3f}" for value in [*maps, sum(maps) / 2])
        print(f"| {len(rows):,} | {n_bits} | {side} | {epochs} | {shown} | {seconds:.0f} |", flush=True)

    print("| train rows | bits | code | epochs | I→T | T→I | mean | s |\n|---|---|---|---|---|---|---|---|")
    for rows in (data.split.train, data.split.database):
        for n_bits in arguments.bits:
            for batch in arguments.batches:
                started = time.perf_counter()
                for epochs, codes in train_published(names, data, rows, n_bits, batch):
                    line(rows, n_bits, f"authors', batch {batch}", epochs, codes, started)
            started = time.perf_counter()
            split = Split(data.split.query, data.split.database, rows, none)
            trained = train(dataclasses.replace(data, split=split), TrainingSettings("ucch", n_bits, device="cpu"))
            line(rows, n_bits, "ours", trained.record["chosen_epoch"], codes_of(trained, data), started)


if __name__ == "__main__":
    main()
