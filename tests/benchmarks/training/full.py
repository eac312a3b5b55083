"""Heads alone against heads and the text backbone, on the emoji.

    OMP_NUM_THREADS=1 python tests/benchmarks/training/full.py

Trains DUET (64 bits, `pair_weight` 0.1, 12 epochs) on the quick start's features, then with MiniLM learning along at
each of the rates; the picture backbone stays, because it takes six times as long on a CPU.
Printed is the trainer's validation score (docs/design.md) after 4, 8 and 12 epochs: nothing is measured on the queries.
"""

import argparse
import time

import torch

from cmh_milvus.datasets.base import cut_validation
from cmh_milvus.datasets.emoji import EMOJI_FEATURES, load_emoji
from cmh_milvus.encoders.backbones import load_backbone
from cmh_milvus.encoders.feature_cache import FeatureCache
from cmh_milvus.feature_extraction import extract_pairs, load_backbones
from cmh_milvus.fine_tuning import FineTuning
from cmh_milvus.training import TrainingSettings, train


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 1e-4], help="peak rates of MiniLM")
    parser.add_argument("--epochs", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    emoji = load_emoji()
    image, text = load_backbones("efficientnet-lite2", "all-minilm-l6-v2", "cpu")
    split, cache = cut_validation(emoji.split, 200), FeatureCache(EMOJI_FEATURES, read_only=True)
    data = extract_pairs(emoji, image, text, split=split, cache=cache).features
    items = [item.image for item in emoji.items], [item.text for item in emoji.items]
    fixed = load_backbone(f"precomputed:{image.dim}", "image")
    settings = TrainingSettings(
        "duet",
        method_settings={"pair_weight": 0.1, "epochs": arguments.epochs},
        device="cpu",
        validate_every=4,
        refit=False,
    )
    for rate in (0.0, *arguments.rates):
        started = time.perf_counter()
        tuning = FineTuning(fixed, text, *items, rate) if rate else None
        record = train(data, settings, tuning=tuning).record
        scores = {entry["epoch"]: round(entry["score"], 3) for entry in record["history"] if "score" in entry}
        print(f"rate {rate:g}: {scores}, {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
