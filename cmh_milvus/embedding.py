"""What pymilvus users import: an embedding function whose vectors are packed binary codes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from cmh_milvus.codes import binarize, pack, to_bytes
from cmh_milvus.encoders.encoder import CrossModalHashEncoder, several
from cmh_milvus.errors import SettingsError
from cmh_milvus.pictures import PictureSource

Item = str | PictureSource
"""`str` is a text; `pathlib.Path`, `PIL.Image.Image` and encoded image `bytes` are pictures."""


class CrossModalHashEmbeddingFunction:
    """Packed codes of texts and pictures, for BINARY_VECTOR fields with the HAMMING metric.

    It has the methods of `pymilvus.model`'s embedding functions and needs nothing of that package. A code is `bytes`
    of `dim // 8`, the one form that pymilvus takes in insert, upsert and search alike.

    Args:
        encoder: A trained encoder, or the folder of one.
        device: Where to compute, if a folder is given: "auto", "cpu", "cuda", ...

    Raises:
        ArtefactError: The folder holds no encoder.

    Example:
        >>> ef = CrossModalHashEmbeddingFunction("my-encoder")  # doctest: +SKIP
        >>> ef.encode_queries(["a red apple", Path("apple.jpg")])  # doctest: +SKIP
        [b'...', b'...']
    """

    def __init__(self, encoder: CrossModalHashEncoder | Path | str, *, device: str = "auto") -> None:
        if isinstance(encoder, (str, Path)):
            encoder = CrossModalHashEncoder.from_pretrained(encoder, device=device)
        self.encoder = encoder

    @property
    def dim(self) -> int:
        """Code length in bits: the `dim` of the BINARY_VECTOR field."""
        return self.encoder.n_bits

    @property
    def fingerprint(self) -> str:
        """The encoder's fingerprint: codes of equal fingerprints can be compared."""
        return self.encoder.fingerprint

    def encode_texts(self, texts: Iterable[str]) -> list[bytes]:
        """Packed codes of n texts: n `bytes` of length dim // 8.

        Raises:
            SettingsError: An item is no text.
            TypeError: `texts` is a single item.
        """
        listed = list(several(texts))
        return to_bytes(pack(binarize(self.encoder.encode_texts(listed)))) if listed else []

    def encode_images(self, images: Iterable[PictureSource]) -> list[bytes]:
        """Packed codes of n pictures: n `bytes` of length dim // 8.

        Raises:
            PictureError: A picture cannot be read.
            SettingsError: An item is no picture.
            TypeError: `images` is a single item.
        """
        listed = list(several(images))
        return to_bytes(pack(binarize(self.encoder.encode_images(listed)))) if listed else []

    def __call__(self, items: Iterable[Item]) -> list[bytes]:
        """Packed codes of texts and pictures, mixed as they come.

        Args:
            items: n items; `str` is a text, the other types of `Item` are pictures.

        Returns:
            n `bytes` of length dim // 8, in the items' order.

        Raises:
            PictureError: A picture cannot be read.
            TypeError: `items` is a single item.
            SettingsError: An item is neither text nor picture.
        """
        listed = list(several(items))
        is_text = [_is_text(item) for item in listed]
        texts = iter(self.encode_texts([item for item in listed if isinstance(item, str)]))
        images = iter(self.encode_images([item for item in listed if not isinstance(item, str)]))
        return [next(texts) if text else next(images) for text in is_text]

    def encode_queries(self, queries: Iterable[Item]) -> list[bytes]:
        """Packed codes of queries; the same as `encode_documents`, since both meet in one code space."""
        return self(queries)

    def encode_documents(self, documents: Iterable[Item]) -> list[bytes]:
        """Packed codes of documents; see `__call__`."""
        return self(documents)


def _is_text(item: object) -> bool:
    if isinstance(item, str):
        return True
    if isinstance(item, (bytes, Path, Image.Image)):
        return False
    raise SettingsError(
        f"cannot encode a {type(item).__name__}: a text is a str; a picture is a pathlib.Path, a PIL.Image.Image "
        "or the bytes of an image file"
    )
