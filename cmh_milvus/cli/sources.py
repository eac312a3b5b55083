"""From a SOURCE argument to items or features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cmh_milvus.cli.output import progress_bar
from cmh_milvus.errors import DataError, SettingsError

if TYPE_CHECKING:
    from cmh_milvus.datasets.base import Item, PairedDataset, PairedFeatures, Split
    from cmh_milvus.encoders.backbones import Backbone
    from cmh_milvus.encoders.encoder import CrossModalHashEncoder
    from cmh_milvus.encoders.feature_cache import FeatureCache

EMOJI = "emoji"
FEATURES_SUFFIX = ".npz"
DEFAULT_BACKBONE = "clip"
EMOJI_BACKBONES = ("efficientnet-lite2", "all-minilm-l6-v2")  # those of the features that come with the package

Failures = list[tuple[str, str]]


@dataclass(frozen=True)
class Source:
    """Features of SOURCE, ready to train on or to evaluate.

    Attributes:
        features: With a split.
        backbones: Of pictures and of texts.
        pictures: The items' picture files, where they are known.
        texts: The items' texts, likewise.
        failures: (item id, reason) of what was left out.
    """

    features: PairedFeatures
    backbones: tuple[Backbone, Backbone]
    pictures: Sequence[Path] | None
    texts: Sequence[str] | None
    failures: Failures


def iterate_items(
    source: str, columns: Mapping[str, Any], failures: Failures, fields: Sequence[str] = ()
) -> Iterator[Item]:
    """Items of SOURCE one by one; what is unusable is added to `failures`.

    Columns among `fields` hold numbers where a table holds nothing else there.
    """
    if source == EMOJI:
        from cmh_milvus.datasets.emoji import load_emoji

        return iter(load_emoji().items)
    if source.endswith(FEATURES_SUFFIX):
        raise SettingsError(f"{source} holds features, and codes are made of pictures and texts: give those")
    from cmh_milvus.datasets.files import read_items

    return read_items(
        source,
        **columns,
        number_columns=fields,
        on_failure=lambda failure: failures.append((failure.id, failure.reason)),
    )


def training_source(
    source: str,
    columns: Mapping[str, Any],
    *,
    image_backbone: str | None,
    text_backbone: str | None,
    queries: float,
    validation: float,
    seed: int,
    device: str,
    cache: Path | None,
) -> Source:
    """Features to train on: SOURCE's own split where it has one, else random shares held out."""
    from cmh_milvus.datasets.base import cut_split, cut_validation
    from cmh_milvus.feature_extraction import load_backbones

    for name, share in (("--queries", queries), ("--validation", validation)):
        if not 0 <= share < 1:
            raise SettingsError(f"{name} is a share between 0 and 1, got {share}")
    if source.endswith(FEATURES_SUFFIX):
        loaded = _features_file(source)
        split = cut_validation(loaded.features.split, round(validation * len(loaded.features.split.train)), seed)
        return _with_split(loaded, split)

    dataset, failures = _pairs(source, columns)
    n_query = round(queries * len(dataset))
    if dataset.split is not None:
        split = cut_validation(dataset.split, round(validation * len(dataset.split.train)), seed)
    else:
        n_validation = round(validation * (len(dataset) - n_query))
        split = cut_split(len(dataset), n_query=n_query, n_validation=n_validation, seed=seed)
    train_texts = [dataset.items[row].text or "" for row in split.train]
    preferred = EMOJI_BACKBONES if source == EMOJI else (DEFAULT_BACKBONE, DEFAULT_BACKBONE)
    names = image_backbone or preferred[0], text_backbone or preferred[1]
    return _extract(dataset, failures, load_backbones(*names, device, train_texts), split, source, cache)


def evaluation_source(
    source: str,
    columns: Mapping[str, Any],
    encoder: CrossModalHashEncoder,
    held_out: Mapping[str, Sequence[str]] | None,
    *,
    cache: Path | None,
) -> Source:
    """Features to evaluate an encoder on.

    Args:
        source: SOURCE.
        columns: Column options.
        encoder: Whose backbones make the features.
        held_out: Ids of its "query" and "validation" rows; None if it keeps none.
        cache: Folder of features.

    Raises:
        DataError: SOURCE has no split of its own, and the encoder's queries are not in it.
        SettingsError: SOURCE holds features, and the encoder makes its own with fine-tuned backbones.
    """
    from cmh_milvus.encoders.backbones import is_tuned

    if source.endswith(FEATURES_SUFFIX):
        if any(is_tuned(tower.backbone_config) for tower in encoder.towers.values()):
            raise SettingsError(
                f"{source} holds features, and this encoder's backbones were fine-tuned: give pictures and texts"
            )
        loaded = _features_file(source)
        own = loaded.features.split
        return _with_split(loaded, _split_by_ids(loaded.features.ids, held_out, source, own) if held_out else own)
    dataset, failures = _pairs(source, columns)
    split = _split_by_ids(dataset.ids, held_out, source, dataset.split) if held_out else dataset.split
    if split is None:
        raise DataError(
            f"nobody knows which rows of {source} are queries: neither the data nor the encoder's training.json say; "
            "train with `cmh-milvus train`, which holds some out"
        )
    backbones = encoder.backbone("image"), encoder.backbone("text")
    return _extract(dataset, failures, backbones, split, source, cache)


def benchmark_sources(sources: Sequence[str], text_key: str) -> dict[str, PairedFeatures]:
    """Features with their own split, by the names they have in a benchmark.

    Args:
        sources: .npz files, each maybe with the array of text features after a colon, or `emoji`.
        text_key: That array where none is named.

    Raises:
        SettingsError: A source is neither, or two have one name.
    """
    named = {}
    for source in sources:
        file, mark, key = source.partition(f"{FEATURES_SUFFIX}:")
        name = f"{Path(file).name}:{key}" if mark else Path(source).stem
        if name in named:
            raise SettingsError(f"two sources of the benchmark are called {name!r}: rename one of the files")
        named[name] = _benchmark_features(file + FEATURES_SUFFIX if mark else source, key or text_key)
    return named


def _benchmark_features(source: str, text_key: str) -> PairedFeatures:
    if source.endswith(FEATURES_SUFFIX):
        from cmh_milvus.datasets.features import load_features

        return load_features(Path(source), text_key=text_key)
    if source != EMOJI:
        raise SettingsError(f"a benchmark runs on .npz files of features, or on {EMOJI}; got {source!r}")
    from cmh_milvus.feature_extraction import load_backbones

    dataset, failures = _pairs(source, {})
    assert dataset.split is not None
    backbones = load_backbones(*EMOJI_BACKBONES, "cpu")
    return _extract(dataset, failures, backbones, dataset.split, source, None).features


def _split_by_ids(ids: Sequence[str], held_out: Mapping[str, Sequence[str]], source: str, own: Split | None) -> Split:
    """What training held out; database and train rows are those of the data's own split, or else all others."""
    from cmh_milvus.datasets.base import Split

    query, validation = set(held_out["query"]), set(held_out["validation"])
    is_query = np.array([item in query for item in ids])
    is_validation = np.array([item in validation for item in ids])
    if not query:
        raise DataError("training held out no queries, so there is nothing to evaluate by: train with --queries")
    if not is_query.any():
        raise DataError(
            f"none of the {len(query)} items that training held out is in {source}: evaluate on the data that the "
            "encoder was trained on, with the same id column"
        )
    in_database, trained_on = np.ones(len(ids), dtype=bool), np.ones(len(ids), dtype=bool)
    if own is not None:
        in_database = np.isin(np.arange(len(ids)), own.database)
        trained_on = np.isin(np.arange(len(ids)), np.concatenate([own.train, own.validation]))
    return Split(
        query=np.flatnonzero(is_query),
        database=np.flatnonzero(in_database & ~is_query),
        train=np.flatnonzero(trained_on & ~is_query & ~is_validation),
        validation=np.flatnonzero(is_validation),
    )


def _pairs(source: str, columns: Mapping[str, Any]) -> tuple[PairedDataset, Failures]:
    if source == EMOJI:
        from cmh_milvus.datasets.emoji import load_emoji

        return load_emoji(), []
    from cmh_milvus.datasets.files import load_paired

    dataset, failures = load_paired(source, **columns)
    return dataset, [(failure.id, failure.reason) for failure in failures]


def feature_cache(source: str, folder: Path | None) -> FeatureCache | None:
    """The cache in `folder`; without one, that of the emoji where they are the source."""
    from cmh_milvus.encoders.feature_cache import FeatureCache

    if folder is not None:
        return FeatureCache(folder)
    if source == EMOJI:
        from cmh_milvus.datasets.emoji import EMOJI_FEATURES

        return FeatureCache(EMOJI_FEATURES, read_only=True)
    return None


def _extract(
    dataset: PairedDataset,
    failures: Failures,
    backbones: tuple[Backbone, Backbone],
    split: Split,
    source: str,
    cache: Path | None,
) -> Source:
    from cmh_milvus.feature_extraction import extract_pairs

    with progress_bar("encoding pictures") as progress:
        extracted = extract_pairs(
            dataset, *backbones, split=split, cache=feature_cache(source, cache), progress=progress
        )
    item_of = {item.id: item for item in dataset.items}
    kept = [item_of[item] for item in extracted.features.ids]
    return Source(
        extracted.features,
        backbones,
        [item.image for item in kept if item.image is not None],
        [item.text for item in kept if item.text is not None],
        failures + extracted.failures,
    )


def _features_file(source: str) -> Source:
    from cmh_milvus.datasets.features import load_features
    from cmh_milvus.encoders.backbones import load_backbone

    features = load_features(Path(source))
    image = load_backbone(f"precomputed:{'x'.join(map(str, features.image.shape[1:]))}", "image", "cpu")
    text = load_backbone(f"precomputed:{'x'.join(map(str, features.text.shape[1:]))}", "text", "cpu")
    return Source(features, (image, text), None, None, [])


def _with_split(loaded: Source, split: Split) -> Source:
    from dataclasses import replace

    return replace(loaded, features=replace(loaded.features, split=split))
