"""What the pages take from the code when they are built, so that it cannot go stale.

`[[methods]]` in a page becomes every method with its module's docstring and settings; `[[method NAME]]` one of them;
`[[errors]]` the tree of errors. Equations become MathML, which browsers draw themselves.
"""

from __future__ import annotations

import dataclasses
import html as entities
import inspect
import re
import sys
from typing import Any

from latex2mathml.converter import convert

from cmh_milvus import errors
from cmh_milvus.methods import get_method, list_methods

_MARK = re.compile(r"^\[\[(methods|method|errors) ?(\w*)\]\]$", re.MULTILINE)
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)  # as pymdownx.arithmatex writes them
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def expand(markdown: str) -> str:
    """A page's text with its marks replaced."""
    return _MARK.sub(lambda mark: _content(mark[1], mark[2]), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for each page."""
    return expand(markdown)


def on_page_content(html: str, **_: Any) -> str:
    """MkDocs calls this for each page; mends what mkdocs-click makes of a missing default and of examples."""
    html = html.replace("<code>Sentinel.UNSET</code>", "")
    html = re.sub(r"<p>(Examples?:)\n(.*?)</p>", r"<p>\1</p><pre><code>\2</code></pre>", html, flags=re.DOTALL)
    html = _INLINE.sub(lambda found: mathml(entities.unescape(found[1])), html)
    return _BLOCK.sub(lambda found: _equation(entities.unescape(found[1]).strip()), html)


def mathml(latex: str, display: str = "inline") -> str:
    """MathML of a formula; what the converter would pass on unread is an error."""
    made: str = convert(latex, display=display)
    if re.search(r"\\|&(?!#?\w+;)", made):
        raise ValueError(f"no MathML for {latex!r}: {made}")
    return made


def _equation(latex: str) -> str:
    r"""A formula on a line of its own, with the number of its \tag."""
    tag = re.search(r"\s*\\tag\{(.*?)\}$", latex)
    number = f'<span class="number">({entities.escape(tag[1])})</span>' if tag else ""
    formula = mathml(latex[: tag.start()] if tag else latex, "block")
    return f'<div class="equation">{formula}{number}</div>'


def _content(kind: str, name: str) -> str:
    if kind == "methods":
        return "\n\n".join(f"## {one} {{ #{one} }}\n\n{_method(one)}" for one in list_methods())
    return _fence(_tree()) if kind == "errors" else _method(name)


def _method(name: str) -> str:
    method = get_method(name)
    cited = method.citation
    config = inspect.getdoc(method.Config) or ""
    defaults = "\n".join(
        f"| `{field.name}` | `{field.default!r}` | {_meaning(config, field.name)} |"
        for field in dataclasses.fields(method.Config)
    )
    source = f"[{cited.title}]({cited.url}), {cited.venue} {cited.year}"
    return (
        f"{cited.authors}: {source}. Learns from {method.supervision}.\n\n"
        f"{_fence(inspect.getdoc(sys.modules[method.__module__]) or '')}\n\n"
        f"| setting (`--set NAME=VALUE`) | default | meaning |\n|---|---|---|\n{defaults}"
    )


def _meaning(docstring: str, field: str) -> str:
    """A field's line of the `Attributes:` section."""
    found = re.search(rf"^ {{4}}{field}: (.*(?:\n {{8}}.*)*)", docstring, re.MULTILINE)
    return " ".join(found[1].split()).replace("|", "\\|") if found else ""


def _tree() -> str:
    tree = inspect.getdoc(errors) or ""
    return inspect.cleandoc(tree.split("::", 1)[1].split("\n\nEach message", 1)[0])


def _fence(text: str) -> str:
    return f"```text\n{text.strip()}\n```"
