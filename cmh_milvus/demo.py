"""The quick start: train, store, search and measure on the emoji that come with the package."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cmh_milvus.codes import to_bytes
from cmh_milvus.comparison import BASELINES, Candidate, compare, encode_pairs, packed, train_candidate
from cmh_milvus.datasets.base import PairedDataset, PairedFeatures, cut_validation
from cmh_milvus.datasets.emoji import EMOJI_FEATURES, load_emoji
from cmh_milvus.embedding import CrossModalHashEmbeddingFunction
from cmh_milvus.encoders.backbones import Backbone
from cmh_milvus.encoders.encoder import CrossModalHashEncoder, Tower, write_json
from cmh_milvus.encoders.feature_cache import FeatureCache, extract_features
from cmh_milvus.errors import DataError
from cmh_milvus.feature_extraction import extract_pairs, load_backbones
from cmh_milvus.pictures import thumbnail_data_uri
from cmh_milvus.report.page import Answer, SizeLine, Strip, render_page, write_page
from cmh_milvus.store import HashCollection, Hit, Row
from cmh_milvus.training import TrainingSettings, train

IMAGE_BACKBONE, TEXT_BACKBONE = "efficientnet-lite2", "all-minilm-l6-v2"
N_BITS = 64
N_VALIDATION = 200
LIVE_SAMPLE = 40  # database pictures encoded live beside the queries, to check the cache
AGREEMENT = 0.999  # least cosine of a live feature and its cached one
TEXT_QUERIES = (
    "red apple fruit",
    "animal living in the sea",
    "musical instrument",
    "something sweet to eat",
    "rain and thunderstorm",
    "feeling sick",
    "sport with a ball",
    "flying machine",
)
N_PICTURE_QUERIES = 8
TOP = 8

Say = Callable[[str], None]


def run_demo(output: Path, say: Say) -> Path:
    """Run the demo.

    Args:
        output: Folder for the encoder, the database and the page.
        say: Takes each line on the progress.

    Returns:
        The page.

    Raises:
        MissingExtra: The backbones' packages or Milvus Lite are not installed.
    """
    started = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    dataset = load_emoji()
    assert dataset.split is not None
    split = cut_validation(dataset.split, N_VALIDATION)
    backbones = load_backbones(IMAGE_BACKBONE, TEXT_BACKBONE, "auto")
    data = extract_pairs(dataset, *backbones, split=split, cache=FeatureCache(EMOJI_FEATURES, read_only=True)).features
    say(
        f"{len(dataset)} emoji pictures with names and keywords; {len(split.query)} held out as queries, "
        f"{len(split.validation)} of the others choose the epoch"
    )
    data = _with_live_queries(dataset, data, backbones, say)

    candidates = [_default_encoder(data, backbones, output / "encoder", say)]
    for method in ("dcmh", *BASELINES):
        candidates.append(train_candidate(data, method, N_BITS))
        say(f"trained {candidates[-1].name} in {candidates[-1].seconds:.0f} s")

    encoder = CrossModalHashEncoder.from_pretrained(output / "encoder")
    encoder.use_backbone("image", backbones[0])
    encoder.use_backbone("text", backbones[1])
    for leftover in output.glob("demo*.db*"):
        leftover.unlink()
    with HashCollection.create(str(output / "demo.db"), "emoji", encoder) as collection:
        stored = collection.upsert(_rows(dataset, candidates[0]))
        say(f"stored {stored} codes of {N_BITS // 8} bytes in Milvus Lite ({output / 'demo.db'})")
        texts = [item.text or "" for item in dataset.items]
        report = compare(data, candidates, texts=texts, through=collection)
        assert report.through_collection is not None
        say(
            f"MAP through Milvus equals MAP in numpy to {report.through_collection.difference:.0e} "
            f"({report.through_collection.missing} rows missing)"
        )
        text_strips = _text_strips(collection, encoder, dataset)
        picture_strips = _picture_strips(collection, encoder, dataset)

    write_json(output / "encoder" / "evaluation.json", report.to_json())
    page = output / "demo.html"
    html = render_page(
        f"Emoji in {N_BITS} bits",
        report,
        intro=(
            f"An encoder learned on {report.data['n_train']} pairs of an emoji and its name with keywords, in "
            f"{candidates[0].seconds:.0f} s. Pictures and texts became codes of {N_BITS // 8} bytes, which Milvus Lite "
            "searched by Hamming distance for the strips below."
        ),
        text_queries=text_strips,
        picture_queries=picture_strips,
        sizes=[
            SizeLine(f"hash code of {N_BITS} bits", N_BITS // 8),
            SizeLine(f"text features of {TEXT_BACKBONE}, float32", data.text.shape[1] * 4),
            SizeLine("CLIP ViT-B/32 features, float32", 512 * 4),
            SizeLine(f"picture features of {IMAGE_BACKBONE}, float32", data.image.shape[1] * 4),
        ],
    )
    write_page(page, html)
    say(f"done in {time.perf_counter() - started:.0f} s; the page:")
    return page


def _with_live_queries(
    dataset: PairedDataset, data: PairedFeatures, backbones: Sequence[Backbone], say: Say
) -> PairedFeatures:
    """The features, those of the queries encoded live; a sample of the others is compared with the cache."""
    sample = np.random.default_rng(0).choice(data.split.database, LIVE_SAMPLE, replace=False)
    rows = np.concatenate([data.split.query, sample])
    for backbone, cached, sources in (
        (backbones[0], data.image, [dataset.items[row].image for row in rows]),
        (backbones[1], data.text, [dataset.items[row].text for row in rows]),
    ):
        started = time.perf_counter()
        live = extract_features(backbone, [source for source in sources if source is not None]).features
        seconds = time.perf_counter() - started
        known = cached[rows]
        cosine = (live * known).sum(axis=1) / (np.linalg.norm(live, axis=1) * np.linalg.norm(known, axis=1))
        if cosine.min() < AGREEMENT:
            raise DataError(
                f"features of {backbone.name} computed here differ from the shipped ones (cosine {cosine.min():.4f}): "
                "the installed weights or libraries are not those of constraints.txt"
            )
        say(
            f"{backbone.name}: {len(rows)} encoded live in {seconds:.0f} s ({1000 * seconds / len(rows):.0f} ms each); "
            f"least cosine with the shipped cache {cosine.min():.5f}"
        )
        cached[data.split.query] = live[: len(data.split.query)]
    return data


def _default_encoder(data: PairedFeatures, backbones: Sequence[Backbone], folder: Path, say: Say) -> Candidate:
    settings = TrainingSettings(n_bits=N_BITS)
    trained = train(data, settings, progress=_every(20, say))
    encoder = CrossModalHashEncoder(
        Tower(backbones[0].config(), trained.image_head), Tower(backbones[1].config(), trained.text_head)
    )
    encoder.save_pretrained(folder, training=trained.record)
    say(f"trained DUET in {trained.record['seconds']:.0f} s ({trained.record['chosen_epoch']} epochs): {folder}")
    relaxed = encode_pairs(encoder, data)
    return Candidate("DUET (ours)", packed(relaxed), encoder.fingerprint, trained.record["seconds"], relaxed)


def _every(epochs: int, say: Say) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, note: str) -> None:
        if done % epochs == 0:
            say(f"  epoch {done} of {total}, {note}")

    return progress


def _rows(dataset: PairedDataset, candidate: Candidate) -> list[Row]:
    assert dataset.split is not None
    held_out = set(dataset.split.query.tolist())
    rows = []
    for modality in ("image", "text"):
        for number, (item, code) in enumerate(zip(dataset.items, to_bytes(candidate.codes[modality]), strict=True)):
            fields = {
                "caption": item.text,
                "uri": str(item.image),
                "labels": list(item.labels),
                "split": "query" if number in held_out else "database",
            }
            rows.append(Row(item.id, modality, code, fields))
    return rows


def _text_strips(collection: HashCollection, encoder: CrossModalHashEncoder, dataset: PairedDataset) -> list[Strip]:
    codes = CrossModalHashEmbeddingFunction(encoder).encode_texts(TEXT_QUERIES)
    found = collection.search(codes, limit=TOP, modality="image", output_fields=["caption", "split"])
    pictures = {item.id: item.image for item in dataset.items if item.image is not None}
    return [
        Strip(query, [_answer(hit, thumbnail_data_uri(pictures[hit.item_id])) for hit in hits])
        for query, hits in zip(TEXT_QUERIES, found, strict=True)
    ]


def _picture_strips(collection: HashCollection, encoder: CrossModalHashEncoder, dataset: PairedDataset) -> list[Strip]:
    assert dataset.split is not None
    chosen = dataset.split.query[:: len(dataset.split.query) // N_PICTURE_QUERIES][:N_PICTURE_QUERIES]
    pairs = [(item.image, item.text or "") for item in (dataset.items[row] for row in chosen) if item.image is not None]
    codes = CrossModalHashEmbeddingFunction(encoder).encode_images([image for image, _ in pairs])
    found = collection.search(codes, limit=TOP // 2, modality="text", output_fields=["caption", "split"])
    return [
        Strip(text, [_answer(hit) for hit in hits], thumbnail_data_uri(image))
        for (image, text), hits in zip(pairs, found, strict=True)
    ]


def _answer(hit: Hit, picture: str = "") -> Answer:
    return Answer(hit.distance, str(hit.fields["caption"]), picture, held_out=hit.fields["split"] == "query")
