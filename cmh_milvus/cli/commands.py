"""The commands. Each reads its options, calls the library, and prints; none computes anything itself."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click
from click.core import ParameterSource

from cmh_milvus.cli.output import FORMATS, print_rows, progress_bar, say, write_failures
from cmh_milvus.cli.sources import (
    benchmark_sources,
    evaluation_source,
    feature_cache,
    iterate_items,
    training_source,
)
from cmh_milvus.errors import ArtefactError, CmhError, DataError, QualityGateMissed, SettingsError

if TYPE_CHECKING:
    from cmh_milvus.datasets.base import Item
    from cmh_milvus.store import Hit

ALL = "all"  # in place of a method's name
EXIT_SOME_FAILED = 3
EXIT_INTERRUPTED = 130
BACKBONES = {
    "image": "clip, clip:<hub id or folder>, efficientnet-lite0, efficientnet-lite2; with the places of a picture: "
    "clip-tokens:<hub id or folder>, efficientnet-lite2-tokens, ...",
    "text": "clip, clip:<hub id or folder>, all-minilm-l6-v2, bag-of-words; with the words of a text: "
    "clip-tokens:<hub id or folder>, all-minilm-l6-v2-tokens",
}
EXIT_CODES = """\b
Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but some items failed (they are listed in a failures file);
4 refused (another encoder's collection, an unsafe file); 5 a quality gate was missed; 130 interrupted (run the same
command again to go on)."""


class _Command(click.Command):
    """A command whose docstring, raw as linters want it, may hold click's mark of a block that is not wrapped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.help = (self.help or "").replace(r"\b", "\b")


class _Group(click.Group):
    """The one place where errors become text and exit codes."""

    command_class = _Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CmhError as error:
            say(f"Error: {error}")
            ctx.exit(error.exit_code)
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            if error.filename is None:  # as where the disk is full
                say(f"Error: something cannot be read or written: {error.strerror or error}")
                _give_up_stdout()
            else:
                say(f"Error: {error.filename!r} cannot be used: {error.strerror}")
            ctx.exit(CmhError.exit_code)
        except (KeyboardInterrupt, click.Abort):
            say("interrupted: run the same command again to go on where it stopped")
            ctx.exit(EXIT_INTERRUPTED)


def _give_up_stdout() -> None:
    """If stdout takes no more, let go of what it has not taken: Python would try again at its end, and say so."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=_Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cmh-milvus")
@click.option("-v", "--verbose", is_flag=True, help="Log what the library does to stderr.")
def cli(verbose: bool) -> None:
    """Learned binary codes that pictures and texts share, served from Milvus.

    Learn codes on your own picture-text pairs (train), store them (ingest), search by text or picture (query), and
    measure what they are worth (evaluate). `cmh-milvus demo` shows all of it on data that come with the package.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s"
    )


def _options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    return lambda command: functools.reduce(lambda wrapped, option: option(wrapped), reversed(decorators), command)


source_argument = click.argument("source")
column_options = _options(
    click.option("--id-column", help="Column of the items' ids."),
    click.option("--image-column", help="Column of the pictures' paths."),
    click.option("--text-column", help="Column of the texts."),
    click.option("--label-column", help="Column of the labels."),
    click.option("--label-separator", default=",", show_default=True, help="Between the labels of one cell."),
)
model_option = click.option(
    "-m", "--model", required=True, envvar="CMH_MODEL", help="Folder of the encoder.", show_envvar=True
)
store_options = _options(
    click.option(
        "--uri",
        default="./cmh-milvus.db",
        envvar="MILVUS_URI",
        show_default=True,
        show_envvar=True,
        help="A file ending in .db (embedded Milvus Lite) or a server's address, such as http://localhost:19530.",
    ),
    click.option("--token", envvar="MILVUS_TOKEN", show_envvar=True, help="Of a server that asks for one."),
    click.option("-c", "--collection", default="items", show_default=True, help="Name of the collection."),
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
cache_option = click.option(
    "--cache", type=click.Path(path_type=Path, file_okay=False), help="Folder that keeps backbone features."
)
format_option = click.option(
    "--format",
    "output_format",
    type=click.Choice(FORMATS),
    help="Of the results.  [default: table on a terminal, JSON lines otherwise]",
)


@cli.command()
@source_argument
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the encoder.")
@click.option("--method", help="How to learn; see `cmh-milvus methods`.  [default: duet with labels, canon without]")
@click.option("--bits", default=64, show_default=True, help="Code length, a multiple of 8.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of the method; repeatable.")
@click.option("--image-backbone", help=f"{BACKBONES['image']}.  [default: clip]")
@click.option("--text-backbone", help=f"{BACKBONES['text']}.  [default: clip]")
@click.option("--full", is_flag=True, help="Train the backbones too, end to end; it takes a GPU, or hours.")
@click.option(
    "--backbone-rate",
    type=click.FloatRange(min=0, min_open=True),
    help="With --full: their peak rate.  [default: 1e-5]",
)
@click.option("--queries", default=0.1, show_default=True, help="Share of pairs held out for `evaluate`.")
@click.option("--validation", default=0.1, show_default=True, help="Share of the rest that chooses the epoch.")
@click.option("--patience", default=0, help="Stop after so many looks at the validation rows without gain.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of everything random.")
@column_options
@device_option
@cache_option
@format_option
def train(
    source: str,
    output: Path,
    method: str | None,
    bits: int,
    settings: Sequence[str],
    image_backbone: str | None,
    text_backbone: str | None,
    full: bool,
    backbone_rate: float | None,
    queries: float,
    validation: float,
    patience: int,
    seed: int,
    device: str,
    cache: Path | None,
    output_format: str | None,
    **columns: str,
) -> None:
    r"""Learn an encoder on SOURCE and write it to a folder.

    SOURCE is a folder of pictures (with a .txt of the same name beside each), a CSV, TSV, JSONL or Parquet file with
    a row a pair, an .npz of features, or `emoji` (pairs that come with the package).

    An interrupted run leaves OUTPUT.checkpoint; the same command goes on from there.

    \b
    Examples:
      cmh-milvus train products.csv --label-column category -o products-64
      cmh-milvus train photos/ --image-backbone efficientnet-lite2 --text-backbone all-minilm-l6-v2 -o photos-64
      cmh-milvus train products.csv --label-column category --full --device cuda -o products-full
    """
    from cmh_milvus.codes import check_n_bits
    from cmh_milvus.encoders.encoder import CrossModalHashEncoder, Tower, check_target
    from cmh_milvus.fine_tuning import RATE, FineTuning, check_tunable
    from cmh_milvus.methods import get_method, make_config
    from cmh_milvus.training import TrainingSettings
    from cmh_milvus.training import train as train_heads

    check_n_bits(bits)
    check_target(output)
    changed = _settings(settings)
    if backbone_rate is not None and not full:
        raise click.UsageError("--backbone-rate needs --full: otherwise the backbones stay as they are")
    if method is not None:  # before any picture is read
        make_config(get_method(method), changed)
        if full:
            check_tunable(get_method(method))
    loaded = training_source(
        source,
        columns,
        image_backbone=image_backbone,
        text_backbone=text_backbone,
        queries=queries,
        validation=validation,
        seed=seed,
        device=device,
        cache=cache,
    )
    data = loaded.features
    wanted = TrainingSettings(method, bits, changed, seed=seed, device=device, patience=patience)
    checkpoint = output.with_name(f"{output.name}.checkpoint")
    tuning = None
    if full:
        if loaded.pictures is None or loaded.texts is None:
            raise SettingsError(f"{source} holds features, and --full trains on pictures and texts: give those")
        tuning = FineTuning(*loaded.backbones, loaded.pictures, loaded.texts, backbone_rate or RATE)
    with progress_bar("training") as progress:
        trained = train_heads(data, wanted, tuning=tuning, checkpoint=checkpoint, progress=progress)
    record = trained.record
    record["split"] = {
        "query": [data.ids[row] for row in data.split.query],
        "validation": [data.ids[row] for row in data.split.validation],
    }
    encoder = CrossModalHashEncoder(
        Tower.of(trained.backbones.get("image", loaded.backbones[0]), trained.image_head),
        Tower.of(trained.backbones.get("text", loaded.backbones[1]), trained.text_head),
        device="cpu",
    )
    encoder.save_pretrained(output, training=record)
    checkpoint.unlink(missing_ok=True)
    failures_file = output.with_name(f"{output.name}.failures.jsonl")
    write_failures(failures_file, loaded.failures)
    row = {
        "encoder": str(output),
        "method": record["method"],
        "n_bits": bits,
        "train": record["data"]["n_train"],
        "validation": record["data"]["n_validation"],
        "epochs": record["chosen_epoch"],
        "seconds": record["seconds"],
        "fingerprint": encoder.fingerprint[:12],
    }
    print_rows([row], output_format)
    _end(loaded.failures, failures_file)


@cli.command()
@source_argument
@model_option
@store_options
@click.option("--field", "fields", multiple=True, help="A further column to store; repeatable.")
@column_options
@device_option
@cache_option
@click.option(
    "--failures", "failures_path", type=click.Path(path_type=Path, dir_okay=False), help="File that lists bad items."
)
@format_option
def ingest(
    source: str,
    model: str,
    uri: str,
    token: str | None,
    collection: str,
    fields: Sequence[str],
    device: str,
    cache: Path | None,
    failures_path: Path | None,
    output_format: str | None,
    **columns: str,
) -> None:
    r"""Encode SOURCE and store the codes in a Milvus collection.

    SOURCE is as for `train`, or `-` for JSON lines on stdin; items may lack the picture or the text. A run that was
    interrupted goes on where it stopped, and what is stored already is not encoded again. Items that cannot be used
    are listed in the failures file; they do not end the run.

    \b
    Examples:
      cmh-milvus ingest products.csv -m products-64 --uri ./products.db
      cmh-milvus ingest photos/ -m photos-64 --uri http://localhost:19530 -c photos
    """
    from cmh_milvus.encoders.encoder import CrossModalHashEncoder
    from cmh_milvus.ingestion import check_fields, ingest_items
    from cmh_milvus.store import HashCollection, manifest_path

    check_fields(fields)
    encoder = CrossModalHashEncoder.from_pretrained(model, device=device)
    failures: list[tuple[str, str]] = []
    missing = set(fields)

    def items() -> Iterator[Item]:
        for item in iterate_items(source, columns, failures, fields):
            missing.difference_update(item.fields)
            yield item

    manifest_file = manifest_path(uri, collection)
    with (
        HashCollection.open_or_create(uri, collection, encoder, token=token) as target,
        progress_bar("ingesting") as progress,
    ):
        report = ingest_items(
            target,
            items(),
            encoder,
            manifest=manifest_file,
            cache=feature_cache(source, cache),
            fields=fields,
            progress=lambda done: progress(done, None),
        )
        stored = target.count()
    for name in sorted(missing):
        say(f"--field {name}: no item has a column of that name, so none is stored")
    failures += report.failures
    failures_file = failures_path or manifest_file.with_name(
        manifest_file.name.replace(".manifest.jsonl", ".failures.jsonl")
    )
    write_failures(failures_file, failures)
    if not report.sent and not report.skipped:
        item, reason = failures[0]
        raise DataError(
            f"nothing of {source} can be stored: {_count(failures)} failed, listed in {failures_file}; the first: "
            f"{item}: {reason}"
        )
    row = {
        "collection": collection,
        "uri": uri,
        "ingested": report.sent,
        "already there": report.skipped,
        "failed": len(failures),
        "rows": stored,
    }
    print_rows([row], output_format)
    _end(failures, failures_file)


@cli.command()
@model_option
@store_options
@click.option("-t", "--text", "texts", multiple=True, help="Text to look for; repeatable; `-` reads lines from stdin.")
@click.option("-i", "--image", "images", multiple=True, help="Picture to look for; repeatable.")
@click.option("-n", "--top", type=click.IntRange(1, 16_384), help="Number of hits.  [default: 10]")
@click.option("-r", "--radius", type=int, help="All hits within so many bits, in place of the nearest.")
@click.option(
    "--find",
    type=click.Choice(["image", "text", "both"]),
    help="What to look among.  [default: pictures for a text, texts for a picture]",
)
@click.option("--filter", "filter_expression", help="Milvus filter, such as 'price < 20'.")
@click.option("--field", "fields", multiple=True, help="Stored column to show; repeatable.  [default: caption and uri]")
@device_option
@format_option
def query(
    model: str,
    uri: str,
    token: str | None,
    collection: str,
    texts: Sequence[str],
    images: Sequence[str],
    top: int | None,
    radius: int | None,
    find: str | None,
    filter_expression: str | None,
    fields: Sequence[str],
    device: str,
    output_format: str | None,
) -> None:
    r"""Search a collection by text or picture.

    The nearest codes by Hamming distance, ties by key; with --radius every code within so many bits.

    \b
    Examples:
      cmh-milvus query -m products-64 --uri ./products.db --text "red leather shoe"
      cmh-milvus query -m photos-64 --image cat.jpg --find both --radius 12 --format jsonl | head
    """
    from cmh_milvus.embedding import CrossModalHashEmbeddingFunction
    from cmh_milvus.encoders.encoder import CrossModalHashEncoder
    from cmh_milvus.store import HashCollection

    if not texts and not images:
        raise click.UsageError("give --text or --image, or both")
    if top is not None and radius is not None:
        raise click.UsageError("--top and --radius exclude each other: the nearest, or all within a radius")
    texts = [text for given in texts for text in (_lines(sys.stdin) if given == "-" else [given])]
    if not texts and not images:
        raise DataError("standard input holds no text to look for: give one a line")
    encoder = CrossModalHashEncoder.from_pretrained(model, device=device)
    shown = list(fields) or ["caption", "uri"]
    rows: list[dict[str, Any]] = []
    with HashCollection.open(uri, collection, encoder, token=token) as target:
        ef = CrossModalHashEmbeddingFunction(encoder)
        for asked, codes, other in (
            (texts, ef.encode_texts(list(texts)), "image"),
            (images, ef.encode_images([Path(image) for image in images]), "text"),
        ):
            if not asked:
                continue
            modality = {None: other, "both": None}.get(find, find)
            if radius is None:
                found = target.search(
                    codes, limit=top or 10, modality=modality, filter=filter_expression, output_fields=shown
                )
            else:
                found = target.lookup(codes, radius, modality=modality, filter=filter_expression, output_fields=shown)
            for question, hits in zip(asked, found, strict=True):
                rows += [_hit_row(question, rank, hit, shown) for rank, hit in enumerate(hits, start=1)]
    if not rows:
        say("nothing found")
    for name in fields:
        if rows and all(row[name] is None for row in rows):
            say(f"--field {name}: no hit has a field of that name")
    print_rows(rows, output_format)


def _lines(file: TextIO) -> list[str]:
    return [line.rstrip("\r\n") for line in file if line.strip()]


def _hit_row(question: str, rank: int, hit: Hit, shown: Sequence[str]) -> dict[str, Any]:
    row = {"query": question, "rank": rank, "distance": hit.distance, "item": hit.item_id, "modality": hit.modality}
    return row | {name: hit.fields.get(name) for name in shown}


@cli.command()
@source_argument
@click.option("-m", "--model", "models", multiple=True, help="Folder of an encoder; repeatable.")
@click.option("--method", "methods_", multiple=True, help="Method to train and measure beside; repeatable.")
@click.option("--bits", "bits_list", help="Code lengths of --method and the baselines, such as 16,32,64,128.")
@click.option("--baselines/--no-baselines", default=True, show_default=True, help="Train the baselines beside.")
@click.option("--uri", help="Measure through the collection there as well.")
@click.option("--token", envvar="MILVUS_TOKEN", show_envvar=True, help="Of a server that asks for one.")
@click.option("-c", "--collection", default="items", show_default=True, help="Name of the collection.")
@click.option("--report", "page", type=click.Path(path_type=Path, dir_okay=False), help="HTML page to write.")
@click.option(
    "--min-map", type=float, help="Exit with 5 if the first encoder's mean MAP@all of both directions is less."
)
@click.option("--strict", is_flag=True, help="Exit with 5 if the split leaks.")
@click.option("--image-backbone", help="Without --model, as for train.")
@click.option("--text-backbone", help="Without --model, as for train.")
@column_options
@device_option
@cache_option
@click.option(
    "--format",
    "output_format",
    type=click.Choice((*FORMATS, "latex")),
    help="Of the results.  [default: table on a terminal, JSON lines otherwise]",
)
def evaluate(
    source: str,
    models: Sequence[str],
    methods_: Sequence[str],
    bits_list: str | None,
    baselines: bool,
    uri: str | None,
    token: str | None,
    collection: str,
    page: Path | None,
    min_map: float | None,
    strict: bool,
    image_backbone: str | None,
    text_backbone: str | None,
    device: str,
    cache: Path | None,
    output_format: str | None,
    **columns: str,
) -> None:
    r"""Measure encoders and methods on the held-out queries of SOURCE.

    SOURCE needs labels: relevant is what shares one with the query. The queries are those that `train` held out, or
    those of SOURCE's own split. Figures go to stdout, to evaluation.json in the first encoder's folder, and to the page
    of --report; what is wrong with the split goes to stderr. A table leaves out intervals and more that csv and json
    have. With --uri the same rankings are read through the collection and compared with brute force.

    \b
    Examples:
      cmh-milvus evaluate products.csv --label-column category -m products-64 --report products.html
      cmh-milvus evaluate features.npz --method duet --method dcmh --bits 16,32,64,128 --format latex
    """
    from cmh_milvus.comparison import BASELINES, Candidate, compare, encode_pairs, packed, train_candidate
    from cmh_milvus.encoders.encoder import CrossModalHashEncoder, read_json, write_json
    from cmh_milvus.evaluation import CROSS_MODAL, TABLE_COLUMNS
    from cmh_milvus.methods import get_method
    from cmh_milvus.report.page import SizeLine, render_page, write_page
    from cmh_milvus.store import HashCollection

    if not models and not methods_:
        raise click.UsageError("give --model or --method, or both")
    if uri is not None and not models:
        raise click.UsageError("--uri needs --model: a collection holds the codes of an encoder folder")
    if min_map is not None and not 0 <= min_map <= 1:  # nor nan
        raise click.UsageError(f"--min-map is a MAP between 0 and 1, got {min_map}")
    for method in methods_:
        get_method(method)
    given_lengths = None if bits_list is None else _bits(bits_list)
    encoders = [CrossModalHashEncoder.from_pretrained(model, device=device) for model in models]
    records = [read_json(Path(model) / "training.json") for model in models]
    for model, encoder in zip(models[1:], encoders[1:], strict=True):
        for modality, tower in encoder.towers.items():
            if tower.backbone_config != encoders[0].towers[modality].backbone_config:
                raise SettingsError(f"{model} and {models[0]} have different backbones: evaluate them one by one")
    for model, record in zip(models[1:], records[1:], strict=True):
        seen = set(records[0].get("split", {}).get("query", ())) - set(record.get("split", {}).get("query", ()))
        if seen:
            raise SettingsError(
                f"{model} was trained on {len(seen)} of the queries that {models[0]} held out: train both on the same "
                "data with the same --seed and --queries, or evaluate them one by one"
            )
    if encoders:
        loaded = evaluation_source(source, columns, encoders[0], records[0].get("split"), cache=cache)
    else:
        loaded = training_source(
            source,
            columns,
            image_backbone=image_backbone,
            text_backbone=text_backbone,
            queries=0.1,
            validation=0.1,
            seed=0,
            device=device,
            cache=cache,
        )
    data = loaded.features
    candidates = []
    for model, encoder, record in zip(models, encoders, records, strict=True):
        relaxed = encode_pairs(encoder, data)
        name = Path(model).resolve().name
        candidates.append(Candidate(name, packed(relaxed), encoder.fingerprint, record.get("seconds"), relaxed))
    lengths = sorted({encoder.n_bits for encoder in encoders}) if given_lengths is None else given_lengths
    for method in dict.fromkeys((*methods_, *(BASELINES if baselines else ()))):  # each once
        for n_bits in lengths or [64]:
            with progress_bar(f"training {method}, {n_bits} bits") as progress:
                candidates.append(train_candidate(data, method, n_bits, device=device, progress=progress))
    if uri is None:
        report = compare(data, candidates, texts=loaded.texts)
    else:
        with HashCollection.open(uri, collection, encoders[0], token=token) as served:
            report = compare(data, candidates, texts=loaded.texts, through=served)
        through = report.through_collection
        assert through is not None
        say(f"through the collection: MAP differs by {through.difference:.1e}, {through.missing} rows are missing")
    for finding in report.audit:
        say(f"{'LEAK: ' if finding.leak else ''}{finding.text}")
    about = f"{report.data['n_query']} queries, {report.data['n_database']} in the database, chance {report.chance:.3f}"
    print_rows(report.rows(), output_format, about, TABLE_COLUMNS)  # first, as no file may be writable
    if models:
        write_json(Path(models[0]) / "evaluation.json", report.to_json())
    if page is not None:
        n_bits = report.results[0].n_bits
        sizes = [
            SizeLine(f"hash code of {n_bits} bits", n_bits // 8),
            SizeLine("text features, float32", data.text[0].nbytes),
            SizeLine("picture features, float32", data.image[0].nbytes),
        ]
        write_page(page, render_page(f"Evaluation on {data.name}", report, sizes=sizes))
        say(f"page: {page}")
    reached = sum(report.results[0].directions[d].estimates["MAP@all"].mean for d in CROSS_MODAL) / len(CROSS_MODAL)
    if min_map is not None and reached < min_map:
        raise QualityGateMissed(
            f"the mean MAP@all of {candidates[0].name} is {reached:.4f}, below the gate of {min_map}"
        )
    if strict and any(finding.leak for finding in report.audit):
        raise QualityGateMissed("the split leaks (see above), so the figures cannot be trusted: mend the split")
    if loaded.failures:
        say(f"{_count(loaded.failures)} left out; the first: {': '.join(loaded.failures[0])}")
        click.get_current_context().exit(EXIT_SOME_FAILED)


def _bits(text: str) -> list[int]:
    from cmh_milvus.codes import check_n_bits

    try:
        return list(dict.fromkeys(check_n_bits(int(part)) for part in text.split(",")))
    except ValueError as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"--bits takes numbers with commas between, such as 16,32,64; got {text!r}") from error


@cli.command()
@click.argument("sources", nargs=-1, required=True)
@click.option(
    "--method",
    "methods_",
    multiple=True,
    metavar="NAME[:SETTING=VALUE,...]",
    help="Method to run, maybe with settings; `all` is each with its defaults; repeatable.  [default: all]",
)
@click.option("--bits", "bits_list", default="16,32,64,128", show_default=True, help="Code lengths.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each.")
@click.option("--text-key", default="text", show_default=True, help="Array of an .npz that holds the text features.")
@click.option(
    "-o",
    "--output",
    default="benchmark.jsonl",
    show_default=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of results; what it has is not run again.",
)
@click.option(
    "--report", "page", type=click.Path(path_type=Path, dir_okay=False), help="HTML page of tables and plots to write."
)
@device_option
@format_option
def benchmark(
    sources: Sequence[str],
    methods_: Sequence[str],
    bits_list: str,
    seeds: int,
    text_key: str,
    output: Path,
    page: Path | None,
    device: str,
    output_format: str | None,
) -> None:
    r"""Train and measure methods x code lengths x data sets x seeds; prints means and deviations over seeds.

    SOURCES are .npz files of features with a split, or `emoji`; a file's array of text features may be named after a
    colon. An interrupted run goes on where it stopped. A table leaves out columns that csv and json have.

    \b
    Examples:
      cmh-milvus benchmark features.npz emoji --method duet --method dcmh --bits 16,64 --seeds 3
      cmh-milvus benchmark features.npz:text_minilm --method duet --method duet:pair_weight=0.1 --report page.html
    """
    from cmh_milvus.benchmark import TABLE_COLUMNS, Cell, run_benchmark, summary
    from cmh_milvus.methods import list_methods
    from cmh_milvus.report.benchmark import render_benchmark
    from cmh_milvus.report.page import write_page

    lengths = _bits(bits_list)
    chosen = [name for given in methods_ or [ALL] for name in (list_methods() if given == ALL else [given])]
    data_sets = benchmark_sources(sources, text_key)
    with progress_bar("benchmark") as progress:

        def done(cell: Cell, number: int, total: int) -> None:
            progress(number, total, cell.key)

        rows = run_benchmark(data_sets, chosen, lengths, seeds, output, device=device, done=done)
    lines = list(summary(rows))
    print_rows(lines, output_format, "benchmark", TABLE_COLUMNS)
    if page is not None:
        write_page(page, render_benchmark("Methods side by side", lines))
        say(f"page: {page}")


@cli.command()
@model_option
@click.option("--bits", required=True, type=int, help="Code length to keep.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for the shorter encoder.")
@format_option
def truncate(model: str, bits: int, output: Path, output_format: str | None) -> None:
    r"""Keep the first bits of an encoder that was trained with nested codes.

    \b
    Example:
      cmh-milvus train products.csv --bits 128 --set nested=true -o products-128
      cmh-milvus truncate -m products-128 --bits 32 -o products-32
    """
    from cmh_milvus.encoders.encoder import CrossModalHashEncoder, read_json

    encoder = CrossModalHashEncoder.from_pretrained(model, device="cpu")
    training = read_json(Path(model) / "training.json")
    if not training.get("config", {}).get("nested"):
        say(f"{model} was not trained with nested codes (--set nested=true): its first {bits} bits may be worth little")
    short = encoder.truncated(bits)
    short.save_pretrained(output, training=training | {"n_bits": bits, "truncated_from": encoder.fingerprint})
    print_rows([{"encoder": str(output), "n_bits": bits, "fingerprint": short.fingerprint[:12]}], output_format)


@cli.command()
@format_option
def methods(output_format: str | None) -> None:
    """List the methods of learning codes."""
    from cmh_milvus.methods import get_method, list_methods

    rows = []
    for name in list_methods():
        method = get_method(name)
        rows.append(
            {
                "method": name,
                "learns from": method.supervision,
                "title": method.citation.title,
                "published": f"{method.citation.venue} {method.citation.year}",
                "settings": ", ".join(f"{key}={value}" for key, value in asdict(method.Config()).items()),
            }
        )
    print_rows(rows, output_format, "methods")


@cli.command()
@click.argument("model", required=False)
@click.option("--uri", envvar="MILVUS_URI", show_envvar=True, help="Of a Milvus, to show a collection there.")
@click.option("--token", envvar="MILVUS_TOKEN", show_envvar=True, help="Of a server that asks for one.")
@click.option("-c", "--collection", default="items", show_default=True, help="Name of the collection.")
@format_option
def info(model: str | None, uri: str | None, token: str | None, collection: str, output_format: str | None) -> None:
    r"""Show an encoder's folder, or a collection.

    \b
    Examples:
      cmh-milvus info products-64
      cmh-milvus info --uri ./products.db -c items
    """
    if model is not None and click.get_current_context().get_parameter_source("uri") is ParameterSource.ENVIRONMENT:
        uri = None
    if (model is None) == (uri is None):
        raise click.UsageError("give an encoder's folder, or --uri of a Milvus; not both")
    facts: dict[str, Any]
    if model is not None:
        from cmh_milvus.encoders.encoder import CrossModalHashEncoder, read_json

        encoder = CrossModalHashEncoder.from_pretrained(model, device="cpu")
        facts = {"encoder": model, "n_bits": encoder.n_bits, "fingerprint": encoder.fingerprint}
        for modality, tower in encoder.towers.items():
            facts[f"{modality} backbone"] = f"{tower.backbone_config['name']} @ {tower.backbone_config['revision']}"
        try:
            if (Path(model) / "training.json").exists():
                training = read_json(Path(model) / "training.json")
                facts |= {key: training[key] for key in ("method", "seed", "chosen_epoch", "seconds")}
                facts["data"] = training["data"]["name"]
            if (Path(model) / "evaluation.json").exists():
                report = read_json(Path(model) / "evaluation.json")
                for direction, measured in report["results"][0]["directions"].items():
                    facts |= {f"{k} {direction}": v["mean"] for k, v in measured["estimates"].items()}
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ArtefactError(
                f"training.json or evaluation.json of {model} is damaged ({error}): train or evaluate again"
            ) from error
    else:
        from cmh_milvus.store import HashCollection

        assert uri is not None
        with HashCollection.open(uri, collection, token=token) as opened:
            facts = {
                "collection": collection,
                "uri": uri,
                "n_bits": opened.n_bits,
                "fingerprint": opened.fingerprint,
                "index": opened.index,
                "pictures": opened.count(modality="image"),
                "texts": opened.count(modality="text"),
            }
    print_rows([{"what": key, "value": value} for key, value in facts.items()], output_format)


@cli.command()
@click.option(
    "-o",
    "--output",
    default="demo-output",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the encoder, the database and the page.",
)
def demo(output: Path) -> None:
    """Train, ingest, search and measure on the emoji that come with the package; ends with an HTML page."""
    from cmh_milvus.demo import run_demo

    page = run_demo(output, say)
    click.echo(str(page))


def _end(failures: Sequence[tuple[str, str]], failures_file: Path) -> None:
    """Exit with 3 where items failed, and say where they are listed."""
    if failures:
        item, reason = failures[0]
        say(f"{_count(failures)} failed, listed in {failures_file}; the first: {item}: {reason}")
        click.get_current_context().exit(EXIT_SOME_FAILED)


def _count(failures: Sequence[tuple[str, str]]) -> str:
    return "1 item" if len(failures) == 1 else f"{len(failures)} items"


def _settings(pairs: Sequence[str]) -> dict[str, str]:
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise SettingsError(f"--set takes NAME=VALUE, got {pair!r}")
        settings[name] = value
    return settings
