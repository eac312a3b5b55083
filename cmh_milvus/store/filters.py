"""Filter expressions: values go into templates here, and nowhere else.

Milvus has templates of its own (`filter_params`) only since 2.5. Server 2.3 cannot parse them, and Milvus Lite 2.5
drops the braces and reads the name as a field, silently. So templates are filled on this side, with literals that
mean the same on every back end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cmh_milvus.errors import SettingsError

_TOKEN = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\\r\n])*"|'(?:\\.|[^'\\\r\n])*')"""
    r"""|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)\}"""
    r"""|(?P<bracket>[()\[\]])"""
    r"""|(?P<stray>["'{}])""",
    re.DOTALL,
)
_CLOSES = {")": "(", "]": "["}


def literal(value: Any) -> str:
    r"""A value as a Milvus literal.

    Args:
        value: A str without line breaks, a bool, a 64-bit int, a finite float, one of these as a numpy scalar, or a
            non-empty list of them.

    Raises:
        SettingsError: The value has no literal that every Milvus understands.

    Example:
        >>> literal('say "hi"'), literal([1, True])
        ('"say \\"hi\\""', '[1, true]')
    """
    if isinstance(value, np.generic):  # np.float64 is a float whose repr no Milvus reads
        value = value.item()
    if isinstance(value, str):
        # Neither "\n" (Lite) nor a raw line break (any) works, and an unpaired surrogate is not UTF-8. All
        # other characters stand for themselves: Lite knows no \u, \x or \t.
        if "\n" in value or "\r" in value or not _is_utf8(value):
            raise SettingsError(
                f"the filter value {value!r} holds a line break or a broken character, which Milvus cannot express"
            )
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int) and abs(value) < 2**63:  # Lite takes -2^63 for another number
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, list | tuple) and value and not any(isinstance(v, list | tuple) for v in value):
        return "[" + ", ".join(literal(v) for v in value) + "]"
    raise SettingsError(
        f"{value!r} cannot be a filter value: give a str, a bool, a 64-bit int, a finite float, or a non-empty "
        "list of these"
    )


def fill(expression: str, params: Mapping[str, Any] | None = None) -> str:
    """Fill the ``{name}`` placeholders of a filter expression with literals, and check its form.

    Braces inside a quoted string are text. The form is checked here because Milvus Lite reads past syntax errors,
    and because an expression is later joined to others by ``and (...)``, which unbalanced brackets would escape.

    Args:
        expression: Milvus boolean expression, such as ``label == {label}``.
        params: Value of each placeholder.

    Raises:
        SettingsError: A placeholder has no value or a value no placeholder, a value has no literal, brackets are not
            balanced, or a string is not closed.

    Example:
        >>> fill("split == {s} and n in {n}", {"s": "data base", "n": [1, 2]})
        'split == "data base" and n in [1, 2]'
    """
    params = params or {}
    used: set[str] = set()
    open_brackets: list[str] = []

    def replace(match: re.Match[str]) -> str:
        if name := match["name"]:
            if name not in params:
                raise SettingsError(f"the filter {expression!r} has a placeholder {{{name}}} without a value")
            used.add(name)
            return literal(params[name])
        if match["stray"]:
            raise SettingsError(
                f"the filter {expression!r} has {match['stray']} at position {match.start()} that opens or closes "
                "nothing: close each string, and write placeholders as {name}"
            )
        if bracket := match["bracket"]:
            if bracket in "([":
                open_brackets.append(bracket)
            elif not open_brackets or open_brackets.pop() != _CLOSES[bracket]:
                raise SettingsError(f"the filter {expression!r} has a {bracket} that closes nothing")
        return match[0]

    filled = _TOKEN.sub(replace, expression)
    if open_brackets:
        raise SettingsError(f"the filter {expression!r} has a {open_brackets[-1]} that is never closed")
    if unused := sorted(set(params) - used):
        raise SettingsError(
            f"the filter {expression!r} has no placeholder for {', '.join(unused)}: write it as {{{unused[0]}}}, "
            "without quotes"
        )
    return filled


def all_of(*expressions: str) -> str:
    """The conjunction of expressions, the empty ones left out.

    Example:
        >>> all_of('modality == "image"', "", "n < 3 or n > 9")
        '(modality == "image") and (n < 3 or n > 9)'
    """
    kept = [expression for expression in expressions if expression.strip()]
    return " and ".join(f"({expression})" for expression in kept) if len(kept) > 1 else "".join(kept)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
