"""Learned cross-modal hash codes for pictures and texts, served from Milvus.

The names below load on first use, so that `import cmh_milvus` needs neither torch nor pymilvus.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmh_milvus.embedding import CrossModalHashEmbeddingFunction
    from cmh_milvus.encoders.encoder import CrossModalHashEncoder
    from cmh_milvus.errors import CmhError
    from cmh_milvus.store import HashCollection

__all__ = [
    "CmhError",
    "CrossModalHashEmbeddingFunction",
    "CrossModalHashEncoder",
    "HashCollection",
    "__version__",
]

__version__ = version("cmh-milvus")

_HOME = {
    "CmhError": "cmh_milvus.errors",
    "CrossModalHashEmbeddingFunction": "cmh_milvus.embedding",
    "CrossModalHashEncoder": "cmh_milvus.encoders.encoder",
    "HashCollection": "cmh_milvus.store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
