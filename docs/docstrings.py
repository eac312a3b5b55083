"""Makes what the docstrings say for Sphinx-like readers legible to mkdocstrings."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """`Example:` sections hold doctests, and `::` announces a literal block."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Griffe calls this for each object that it has read."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"^( *)::$", "", text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
