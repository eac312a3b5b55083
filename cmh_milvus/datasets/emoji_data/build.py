"""Build the quick-start data in this folder from three npm packages; see PROVENANCE.md.

Run it as ``python cmh_milvus/datasets/emoji_data/build.py [folder with the npm tarballs]``; without an argument
the tarballs are fetched with ``npm pack``. It needs the extra ``cmh-milvus[demo]`` for the features (minutes on one
core), and writes `images/`, `emoji.jsonl`, `features/` and two of the licence files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmh_milvus.encoders.backbones import load_backbone
from cmh_milvus.encoders.feature_cache import FeatureCache, content_digest, extract_features
from cmh_milvus.pictures import open_picture

HERE = Path(__file__).resolve().parent
PACKAGES = {  # npm package -> SHA-256 of its tarball
    "@lobehub/fluent-emoji-3d@1.1.0": "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    "unicode-emoji-json@0.9.0": "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
    "emojilib@4.0.3": "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
}
LABEL_MIN_EMOJI = 25
PIXELS = 256


def main(tarballs: Path | None) -> None:
    """Make everything."""
    with tempfile.TemporaryDirectory() as name:
        assets, groups, keywords = unpack(tarballs, Path(name))
        rows = make_rows(assets, groups, keywords)
        write_images(assets, rows)
        for package, folder in (("unicode-emoji-json", groups), ("emojilib", keywords)):
            shutil.copyfile(folder / "LICENSE", HERE / f"LICENSE-{package}")
    with (HERE / "emoji.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    shutil.rmtree(HERE / "features", ignore_errors=True)
    add_features("efficientnet-lite2", [HERE / row["image"] for row in rows])
    add_features("all-minilm-l6-v2", [row["text"] for row in rows])


def unpack(tarballs: Path | None, temporary: Path) -> list[Path]:
    """Folders of the three packages, fetched where they are not given, checked against their digests."""
    if tarballs is None:
        tarballs = temporary
        subprocess.run(["npm", "pack", *PACKAGES], cwd=tarballs, check=True, stdout=subprocess.DEVNULL)
    folders = []
    for package, sha256 in PACKAGES.items():
        tarball = tarballs / (package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz")
        found = hashlib.sha256(tarball.read_bytes()).hexdigest()
        if found != sha256:
            raise SystemExit(f"{tarball} has SHA-256 {found}, expected {sha256}")
        folder = temporary / tarball.stem
        with tarfile.open(tarball) as archive:
            archive.extractall(folder, filter="data")
        folders.append(folder / "package")
    return folders


def make_rows(assets: Path, groups: Path, keywords: Path) -> list[dict[str, Any]]:
    """One row an emoji that has a picture, in Unicode order.

    Labels are the emoji's group and each of its keywords that at least 25 emoji have beyond their first keyword
    (which repeats the name). The text is the name and the keywords that the name does not contain.
    """
    described = json.loads((groups / "data-by-emoji.json").read_text(encoding="utf-8"))
    words = json.loads((keywords / "dist" / "emoji-en-US.json").read_text(encoding="utf-8"))
    counts = Counter(word for own in words.values() for word in set(own[1:]))
    kept = {word for word, count in counts.items() if count >= LABEL_MIN_EMOJI}
    rows = []
    for emoji, about in described.items():
        stem = "-".join(f"{ord(character):04x}" for character in emoji)
        if not (assets / "assets" / f"{stem}.webp").exists():
            continue
        own = [word.replace("_", " ") for word in words[emoji]]
        group = about["group"].lower().replace(" & ", "_")
        text = " ".join([about["name"], *(word for word in own if word not in about["name"].lower())])
        rows.append(
            {
                "id": stem,
                "emoji": emoji,
                "name": about["name"],
                "keywords": own,
                "group": about["group"],
                "labels": sorted({group, *kept.intersection(words[emoji])}),
                "image": f"images/{stem}.webp",
                "text": text,
            }
        )
    return rows


def write_images(assets: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Pictures of 256 x 256 on white; WebP quality 75."""
    shutil.rmtree(HERE / "images", ignore_errors=True)
    (HERE / "images").mkdir()
    for row in rows:
        image = open_picture(assets / "assets" / f"{row['id']}.webp")
        if image.size != (PIXELS, PIXELS):
            image = image.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)
        image.save(HERE / row["image"], "WEBP", quality=75, method=6)


def add_features(name: str, sources: Sequence[Path] | Sequence[str]) -> None:
    """Backbone features of all items, as one file of the feature cache in half precision."""
    backbone = load_backbone(name, "text" if isinstance(sources[0], str) else "image", "cpu")

    def progress(done: int, total: int) -> None:
        print(f"\r{name}: {done} of {total}", end="", file=sys.stderr, flush=True)

    extracted = extract_features(backbone, sources, None, progress)
    if extracted.failures:
        raise SystemExit(f"{name} could not encode {extracted.failures}")
    items: Sequence[Path | str] = sources
    unique = {content_digest(backbone, source): row for row, source in enumerate(items)}
    cache = FeatureCache(HERE / "features", dtype="float16")
    cache.add(backbone, list(unique), extracted.features[np.array(list(unique.values()))])


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else None)
