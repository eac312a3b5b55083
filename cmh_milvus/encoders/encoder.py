"""The cross-modal hash encoder: two towers of backbone and hash head, and its folder on disk.

The folder of a trained encoder::

    config.json         format_version, n_bits, bit_order, binarize rule, towers (backbone, hash head), package version
    model.safetensors   the hash heads; nothing in the folder is a pickle
    training.json       how it was trained
    evaluation.json     what it reached (written by `evaluate`)
    README.md           model card made of the above

The fingerprint is the SHA-256 over the canonical config (less the package version) and the weights.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cmh_milvus.codes import BINARIZE_RULE, BIT_ORDER, binarize, check_n_bits, pack
from cmh_milvus.device import resolve_device
from cmh_milvus.encoders.backbones import Backbone, NetworkBackbone, is_tuned, load_backbone, weights_digest
from cmh_milvus.encoders.hash_head import HashHead, HashHeadConfig, relaxed_codes
from cmh_milvus.errors import ArtefactError, SettingsError, UnsafeFile
from cmh_milvus.pictures import PictureSource, open_picture

FORMAT_VERSION = 1
PICTURES_AT_ONCE = 32  # in memory
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".npy")

Modality = Literal["image", "text"]
T = TypeVar("T")


@dataclass
class Tower:
    """A backbone, loaded when first used, and the hash head on it.

    Attributes:
        backbone_config: What `load_backbone` makes the backbone of.
        head: The trained head, in eval mode.
        weights: Of the backbone, where it was fine-tuned.
        loaded: The backbone by device, once it is loaded.
    """

    backbone_config: Mapping[str, Any]
    head: HashHead
    weights: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)
    loaded: dict[str, Backbone] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, backbone: Backbone, head: HashHead) -> Tower:
        """The tower of a backbone, fine-tuned or not, and the head that was trained on it."""
        config = backbone.config()
        weights = backbone.weights() if isinstance(backbone, NetworkBackbone) and is_tuned(config) else None
        return cls(config, head, weights)

    def backbone(self, modality: Modality, device: torch.device) -> Backbone:
        """The backbone on `device`."""
        key = str(device)
        if key not in self.loaded:
            self.loaded[key] = load_backbone(self.backbone_config, modality, key, self.weights)
        return self.loaded[key]


class CrossModalHashEncoder:
    """Pictures and texts to codes that can be compared with each other.

    The code of an item depends on that item alone: not on the other modality, not on the batch it came in.

    Args:
        image: Tower of pictures.
        text: Tower of texts.
        device: Where to compute: "auto", "cpu", "cuda", ...

    Raises:
        SettingsError: The towers' code lengths differ.

    Example:
        >>> encoder = CrossModalHashEncoder.from_pretrained("my-encoder")  # doctest: +SKIP
        >>> encoder.encode_texts(["red apple fruit"]).shape  # doctest: +SKIP
        (1, 64)
    """

    def __init__(self, image: Tower, text: Tower, *, device: str = "auto") -> None:
        if image.head.config.n_bits != text.head.config.n_bits:
            raise SettingsError(
                f"the image tower gives {image.head.config.n_bits} bits and the text tower {text.head.config.n_bits}: "
                "both towers of an encoder have one code length"
            )
        self.towers: dict[Modality, Tower] = {"image": image, "text": text}
        self.device = resolve_device(device)
        for tower in self.towers.values():
            tower.head.to(self.device).eval()

    @property
    def n_bits(self) -> int:
        """Code length K."""
        return self.towers["image"].head.config.n_bits

    def backbone(self, modality: Modality) -> Backbone:
        """The backbone of a modality, loaded."""
        return self.towers[modality].backbone(modality, self.device)

    def use_backbone(self, modality: Modality, backbone: Backbone) -> None:
        """Use a backbone that is loaded already.

        Raises:
            SettingsError: It is not the one that the tower was trained on.
        """
        tower = self.towers[modality]
        if backbone.config() != dict(tower.backbone_config):
            raise SettingsError(f"the {modality} tower was trained on features of another backbone or revision")
        tower.loaded[str(self.device)] = backbone

    def encode_images(self, images: Iterable[PictureSource]) -> NDArray[np.float32]:
        """Relaxed codes of pictures; a few are in memory at a time.

        Args:
            images: n pictures: `pathlib.Path`, encoded image `bytes`, or `PIL.Image.Image`.

        Returns:
            float32 (n, n_bits) in (-1, 1).

        Raises:
            PictureError: A picture cannot be read.
            SettingsError: An item is no picture.
            TypeError: `images` is a single item.
        """
        waiting, backbone = iter(several(images)), self.backbone("image")
        features = []
        while some := [open_picture(image) for image in islice(waiting, PICTURES_AT_ONCE)]:
            features.append(backbone.encode(some))
        return self.encode_features("image", np.concatenate(features) if features else backbone.encode([]))

    def encode_texts(self, texts: Iterable[str]) -> NDArray[np.float32]:
        """Relaxed codes of n texts: float32 (n, n_bits) in (-1, 1).

        Raises:
            SettingsError: An item is no text.
            TypeError: `texts` is a single item.
        """
        return self.encode_features("text", self.backbone("text").encode(list(several(texts))))

    def encode_features(self, modality: Modality, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Relaxed codes of backbone features.

        Args:
            modality: "image" or "text".
            features: float32 (n, in_dim of that tower), or (n, tokens, in_dim) where its backbone gives tokens.

        Returns:
            float32 (n, n_bits) in (-1, 1).

        Raises:
            SettingsError: The features are of another shape.
        """
        head = self.towers[modality].head
        if not head.config.takes(features.shape):
            tokens = f"{head.config.tokens}, " if head.config.tokens else ""
            raise SettingsError(
                f"the {modality} tower takes features of shape (n, {tokens}{head.config.in_dim}), got {features.shape}"
            )
        return relaxed_codes(head, np.ascontiguousarray(features, dtype=np.float32))

    def packed_codes(self, modality: Modality, features: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Packed codes of backbone features: uint8 (n, n_bits // 8)."""
        if len(features) == 0:
            return np.empty((0, self.n_bits // 8), dtype=np.uint8)
        return pack(binarize(self.encode_features(modality, features)))

    def truncated(self, n_bits: int) -> CrossModalHashEncoder:
        """An encoder of the codes' first bits; good where the method trained nested codes.

        Its codes are prefixes of this encoder's, so stored codes can be cut instead of encoded again.

        Args:
            n_bits: Code length to keep, a multiple of 8, at most this encoder's.

        Raises:
            SettingsError: The length is impossible.
        """
        if check_n_bits(n_bits) > self.n_bits:
            raise SettingsError(f"a code of {self.n_bits} bits has no first {n_bits}: give fewer")
        towers = []
        for tower in self.towers.values():
            head = HashHead(replace(tower.head.config, n_bits=n_bits))
            weights = {key: value.cpu() for key, value in tower.head.state_dict().items()}
            for key in ("output.weight", "output.bias"):
                weights[key] = weights[key][:n_bits].clone()
            head.load_state_dict(weights)
            towers.append(Tower(tower.backbone_config, head, tower.weights))
        return CrossModalHashEncoder(*towers, device=str(self.device))

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "format_version": FORMAT_VERSION,
            "cmh_milvus_version": version("cmh-milvus"),
            "n_bits": self.n_bits,
            "bit_order": BIT_ORDER,
            "binarize": BINARIZE_RULE,
            "towers": {
                modality: {"backbone": dict(tower.backbone_config), "head": tower.head.config.describe()}
                for modality, tower in self.towers.items()
            },
        }

    def _weights(self) -> dict[str, torch.Tensor]:
        return {
            f"{modality}.{key}": value.detach().cpu().contiguous()
            for modality, tower in self.towers.items()
            for key, value in tower.head.state_dict().items()
        }

    def _backbone_weights(self) -> dict[str, torch.Tensor]:
        return {
            f"{modality}_backbone.{key}": value
            for modality, tower in self.towers.items()
            for key, value in (tower.weights or {}).items()
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over canonical config and weights, hexadecimal: equal codes for equal items have equal ones.

        Fine-tuned weights of backbones are in it through the revisions that the config names.
        """
        config = self.config()
        del config["cmh_milvus_version"]
        return weights_digest(self._weights(), json.dumps(config, sort_keys=True, ensure_ascii=False).encode())

    def save_pretrained(self, folder: Path | str, *, training: Mapping[str, Any] | None = None) -> None:
        """Write the encoder's folder; it appears whole or not at all.

        Args:
            folder: Where to; an encoder that is there already is replaced, any other folder is refused.
            training: The training record, as `training.train` gives it, for training.json and the model card.

        Raises:
            ArtefactError: The folder exists and is no encoder, or cannot be written.
        """
        target = check_target(folder)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
            try:
                partial.chmod(0o755)
                write_json(partial / "config.json", self.config())
                save_file(self._weights() | self._backbone_weights(), partial / "model.safetensors")
                (partial / "model.safetensors").chmod(0o644)  # safetensors makes it private
                if training is not None:
                    write_json(partial / "training.json", training)
                (partial / "README.md").write_text(model_card(self, target.name, training), encoding="utf-8")
                replaced = partial.with_name(f"{partial.name}-replaced")
                if target.exists():
                    target.rename(replaced)
                partial.rename(target)
                shutil.rmtree(replaced, ignore_errors=True)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except (OSError, SafetensorError) as error:  # SafetensorError: its word for a full disk
            reason = getattr(error, "strerror", None) or error
            raise ArtefactError(f"the encoder cannot be written to {target}: {reason}") from error

    @classmethod
    def from_pretrained(cls, folder: Path | str, *, device: str = "auto") -> CrossModalHashEncoder:
        """Load an encoder folder; backbones load when they are first needed.

        Args:
            folder: As `save_pretrained` wrote it.
            device: Where to compute.

        Raises:
            ArtefactError: Something is missing, damaged or of an unknown format.
            SettingsError: There is no such device.
            UnsafeFile: The folder holds a pickle.
        """
        source, chosen = Path(folder), resolve_device(device)
        if not source.is_dir():
            raise ArtefactError(
                f"{source} is no encoder folder: give the folder that `cmh-milvus train --output` wrote"
            )
        for file in source.iterdir():
            if file.suffix in PICKLE_SUFFIXES:
                raise UnsafeFile(f"{file} may hold a pickle, which runs code when read; an encoder folder has none")
        config = read_json(source / "config.json")
        if config.get("format_version") != FORMAT_VERSION:
            raise ArtefactError(
                f"{source} has encoder format {config.get('format_version')!r}; this release "
                f"({version('cmh-milvus')}) reads format {FORMAT_VERSION}: use the release that wrote it "
                f"({config.get('cmh_milvus_version', 'unknown')})"
            )
        try:
            weights = load_file(source / "model.safetensors")
            towers: list[Tower] = []
            for modality in ("image", "text"):
                described = config["towers"][modality]
                head_config = described["head"] | {"hidden": tuple(described["head"]["hidden"])}
                head = HashHead(HashHeadConfig(**head_config))
                head.load_state_dict(_below(f"{modality}.", weights))
                towers.append(
                    Tower(dict(described["backbone"]), head, _below(f"{modality}_backbone.", weights) or None)
                )
            encoder = cls(*towers, device=str(chosen))
        except FileNotFoundError as error:
            raise ArtefactError(f"{source} has no model.safetensors: the encoder folder is incomplete") from error
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ArtefactError(f"the encoder in {source} is damaged: {error}") from error
        packing = config.get("bit_order"), config.get("binarize")
        if packing != (BIT_ORDER, BINARIZE_RULE):
            raise ArtefactError(f"{source} packs bits in another way ({packing[0]}, {packing[1]})")
        return encoder


def check_target(folder: Path | str) -> Path:
    """The folder, if an encoder may be written there: it does not exist yet, is empty, or is an encoder's.

    Raises:
        ArtefactError: It is none of these.
    """
    target = Path(folder)
    if target.name in ("", ".."):
        raise ArtefactError(f"{str(folder)!r} names no folder of its own for the encoder: give a name, such as shop-64")
    try:
        if target.exists() and not (target.is_dir() and (_is_encoder(target) or not any(target.iterdir()))):
            raise ArtefactError(f"{target} exists and is no encoder folder: give another name")
        above = next(parent for parent in target.absolute().parents if parent.exists())
    except OSError as error:
        raise ArtefactError(f"the encoder cannot be written to {target}: {error.strerror}") from error
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ArtefactError(f"the encoder cannot be written to {target}: {above} is no folder that may be written to")
    return target


def _is_encoder(folder: Path) -> bool:
    try:
        return {"format_version", "towers"} <= read_json(folder / "config.json").keys()
    except ArtefactError:
        return False


def _below(prefix: str, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def several(items: Iterable[T]) -> Iterable[T]:
    """The items, if they are several and not one.

    Raises:
        TypeError: It is a single text or picture.
    """
    if isinstance(items, (str, bytes, Path, Image.Image)):
        raise TypeError("give a list of items, [item] for a single one")
    return items


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that a person can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of an encoder folder.

    Raises:
        ArtefactError: The file is missing, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{path.parent} is no encoder folder: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} holds no JSON object: the encoder folder is damaged")
    return content


def model_card(encoder: CrossModalHashEncoder, name: str, training: Mapping[str, Any] | None) -> str:
    """README.md of an encoder folder."""
    backbones = {m: tower.backbone_config.get("name", "?") for m, tower in encoder.towers.items()}
    lines = [
        f"# {name}",
        "",
        f"A cross-modal hash encoder of [cmh-milvus](https://github.com/cmh-milvus/cmh-milvus): pictures and texts to "
        f"{encoder.n_bits}-bit codes ({encoder.n_bits // 8} bytes) that are compared by Hamming distance.",
        "",
        f"- pictures: {backbones['image']}; texts: {backbones['text']}",
        f"- fingerprint: `{encoder.fingerprint}`",
    ]
    if training is not None:
        data, citation = training["data"], training["citation"]
        lines += [
            f"- method: {training['method']} ({citation['title']}, {citation['venue']} {citation['year']}, "
            f"{citation['url']}), seed {training['seed']}, {training['chosen_epoch']} epochs",
            f"- data: {data['name']}, {data['n_train']} train and {data['n_validation']} validation pairs, "
            f"split `{data['split_fingerprint'][:12]}`",
            f"- trained in {training['seconds']} s on {training['device']}",
        ]
    lines += [
        "",
        "```python",
        "from cmh_milvus import CrossModalHashEmbeddingFunction",
        "",
        f'ef = CrossModalHashEmbeddingFunction("{name}")',
        'ef.encode_queries(["a red apple"])',
        "```",
        "",
    ]
    return "\n".join(lines)
