"""The documentation keeps up with the code: everything is mentioned, every Python block runs, every command exists."""

import contextlib
import importlib.util
import inspect
import io
import re
import shlex
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from markdown import Markdown

import cmh_milvus
from cmh_milvus import errors
from cmh_milvus.cli import cli
from cmh_milvus.methods import ENTRY_POINT_GROUP, get_method, list_methods
from cmh_milvus.training import TrainingSettings, train

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$(?:\n\n```output\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
COMMANDS = sorted(cli.commands)
OPTIONS = [
    pytest.param(name, parameter, id=f"{name} {parameter.opts[-1]}")
    for name in COMMANDS
    for parameter in cli.commands[name].params
    if isinstance(parameter, click.Option)
]
ERRORS = [kind for _, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.CmhError)]


def blocks(text, language):
    """(content, expected output or None) of a page's fenced blocks."""
    return [(found[2], found[3]) for found in FENCE.finditer(text) if found[1] == language]


@pytest.fixture(scope="session")
def hooks():
    """docs/hooks.py, as MkDocs loads it."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="session")
def expanded(hooks):
    """The pages as the site shows them, without the parts that mkdocstrings and mkdocs-click make."""
    return {name: hooks.on_page_markdown(text) for name, text in PAGES.items()}


def as_html(hooks, markdown):
    """The page as MkDocs shows it, for the Markdown extensions that formulas need."""
    extensions = {"pymdownx.arithmatex": {"generic": True}, "pymdownx.superfences": {}, "md_in_html": {}, "tables": {}}
    text = hooks.on_page_markdown(markdown)
    return hooks.on_page_content(Markdown(extensions=list(extensions), extension_configs=extensions).convert(text))


@pytest.fixture
def checkout(encoder_folder, tmp_path, monkeypatch):
    """A working folder like a clone in which `make demo` was run."""
    (tmp_path / "cmh_milvus").symlink_to(ROOT / "cmh_milvus")
    (tmp_path / "demo-output").mkdir()
    (tmp_path / "demo-output" / "encoder").symlink_to(encoder_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_blocks(text):
    namespace = {}
    for code, expected in blocks(text, "python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "<page>", "exec"), namespace)
        if expected is not None:
            assert printed.getvalue() == expected


@pytest.mark.parametrize(
    "page", [name for name in PAGES if blocks(PAGES[name], "python") and name != "docs/adding-a-method.md"]
)
def test_python_of_the_pages_runs_and_prints_what_they_say(page, checkout):
    run_blocks(PAGES[page])


def test_python_of_the_readme_runs(checkout):
    run_blocks(README)


def test_the_method_of_the_tutorial_is_found_and_learns(emoji_features, tmp_path, monkeypatch):
    page = PAGES["docs/adding-a-method.md"]
    ((code, _),) = blocks(page, "python")
    ((settings, _),) = blocks(page, "toml")
    ((name, target),) = tomllib.loads(settings)["project"]["entry-points"][ENTRY_POINT_GROUP].items()
    (tmp_path / f"{target.partition(':')[0]}.py").write_text(code)
    installed = tmp_path / "tutorial-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: tutorial\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(f"[{ENTRY_POINT_GROUP}]\n{name} = {target}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    assert name in list_methods()
    assert get_method(name).name == name
    changed = {"epochs": 3, "hidden": 64}
    trained = train(emoji_features, TrainingSettings(name, 16, changed, device="cpu", validate_every=3, refit=False))
    (*_, last) = trained.record["history"]
    assert last["pairs"] < trained.record["history"][0]["pairs"]
    assert last["score"] > 0.02, "own-partner recall@10 of chance is 10 / 1,652"


@pytest.mark.parametrize("name", COMMANDS)
def test_command_is_explained(name):
    assert cli.commands[name].help
    assert f"cmh-milvus {name}" in "".join(PAGES.values())
    shown = CliRunner().invoke(cli, [name, "--help"])
    assert shown.exit_code == 0
    assert r"\b" not in shown.output, "click's mark of a block, as text"


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_option_has_help(name, option):
    assert option.help
    assert option.opts[-1] in CliRunner().invoke(cli, [name, "--help"]).output


def commands_in(text):
    """The `cmh-milvus` command lines of a page's console blocks, as lists of words."""
    for block, _ in blocks(text, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"[;|<>]", re.sub(r"""("[^"]*"|'[^']*')""", "QUOTED", line)):
                words = shlex.split(part, comments=True)
                if "cmh-milvus" in words and "pip" not in words:
                    yield words[words.index("cmh-milvus") + 1 :]


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_commands_of_the_pages_exist(page):
    for name, *words in commands_in(PAGES.get(page, README)):
        command = cli.commands[name]
        parser = command.make_parser(click.Context(command))
        _, positional, _ = parser.parse_args(list(words))
        assert len(positional) <= len([p for p in command.params if isinstance(p, click.Argument)])
        given = {word.partition("=")[0] for word in words if word.startswith("-") and word != "-"}
        required = [p for p in command.params if isinstance(p, click.Option) and p.required]
        assert all(given & set(option.opts) for option in required), (name, words)


def test_console_blocks_are_looked_at():
    assert len(list(commands_in(PAGES["docs/own-data.md"]))) >= 8


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_error_and_its_exit_code_are_documented(kind, expanded):
    page = expanded["docs/cli.md"]
    assert re.search(rf"{kind.__name__} +{kind.exit_code} ", page)
    assert f"\n| {kind.exit_code} | " in page


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 130])
def test_exit_code_is_documented(code):
    assert f"\n| {code} | " in PAGES["docs/cli.md"]
    assert re.search(rf"\b{code}\b", CliRunner().invoke(cli, ["--help"]).output)


def test_environment_variables_are_documented():
    variables = {p.envvar for command in cli.commands.values() for p in command.params if p.envvar}
    table = set(re.findall(r"^\| `([A-Z_]+)` \|", PAGES["docs/cli.md"], re.MULTILINE))
    assert table == variables == {"MILVUS_URI", "MILVUS_TOKEN", "CMH_MODEL"}


@pytest.mark.parametrize("name", list_methods())
def test_method_is_documented(name, expanded):
    assert re.search(rf"^\| \[`{name}`\]", PAGES["docs/methods/index.md"], re.MULTILINE), (
        "a row in docs/methods/index.md"
    )
    page = expanded[f"docs/methods/{name}.md"]
    (docstring,) = re.findall(r"^```text\n(.*?)\n```$", page, re.MULTILINE | re.DOTALL)
    assert docstring == inspect.getdoc(sys.modules[get_method(name).__module__])
    assert "\n## What it optimises\n" in page
    assert "\n## When to choose it\n" in page


@pytest.mark.parametrize("name", list_methods())
def test_equations_of_a_method_have_the_numbers_of_its_module(name):
    numbers = set(re.findall(r"\b(\d+)[.)]", inspect.getdoc(sys.modules[get_method(name).__module__])))
    assert set(re.findall(r"\\tag\{(\w+)\}", PAGES[f"docs/methods/{name}.md"])) <= numbers


def test_every_setting_of_a_method_is_explained(expanded):
    """The tables of settings come from the `Attributes:` of each Config; epochs and batch_size explain themselves."""
    pages = "\n".join(expanded[f"docs/methods/{name}.md"] for name in list_methods())
    rows = re.findall(r"^\| `(\w+)` \| `.*?` \| (.*) \|$", pages, re.MULTILINE)
    assert len(rows) > 50
    assert {name for name, meaning in rows if not meaning} <= {"epochs", "batch_size"}


@pytest.mark.parametrize("name", cmh_milvus.__all__)
def test_public_name_is_documented(name):
    assert f"`{name}`" in PAGES["docs/reference.md"]


def test_pages_are_reachable():
    config = (ROOT / "docs" / "mkdocs.yml").read_text()
    missing = [name for name in PAGES if f": {name.removeprefix('docs/')}\n" not in config]
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", PAGES.get(page, README), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://")):
            assert (ROOT / Path(page).parent / target).exists(), target


def test_formulas_become_mathml(hooks):
    page = as_html(
        hooks, "Where $x < \\tau$ and `$HOME`:\n\n$$\nL = \\frac{a}{b_{ij}} \\tag{2}\n$$\n\n```console\n$ ls $x\n```\n"
    )
    assert page.count("<math ") == 2
    assert re.search(r"<p>Where <math [^>]*display=\"inline\">.*<mi>x</mi><mo>&#x0003C;</mo><mi>&#x003C4;</mi>", page)
    assert re.search(
        r'<div class="equation"><math [^>]*display="block">.*<mfrac>.*</math><span class="number">\(2\)', page
    )
    assert "<code>$HOME</code>" in page
    assert '<span class="gp">$ </span>ls' in page
    assert "tag" not in page


@pytest.mark.parametrize("wrong", [r"\nosuchcommand x", r"\begin{aligned} a &= b \end{aligned}"])
def test_a_formula_that_cannot_be_shown_ends_the_build(wrong, hooks):
    with pytest.raises(ValueError, match="no MathML"):
        hooks.mathml(wrong)


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "$$" in text])
def test_formulas_of_the_pages_can_be_shown(page, hooks):
    html = as_html(hooks, PAGES[page])
    assert html.count('display="block"') == PAGES[page].count("$$") / 2
    assert "arithmatex" not in html


def test_pages_without_a_benchmark_say_so(hooks, monkeypatch, tmp_path):
    monkeypatch.setattr(hooks, "FIGURES", tmp_path / "none.csv")
    for mark in ("figures scm", "benchmark runs", "benchmark means", "benchmark tables", "benchmark bits"):
        assert hooks.on_page_markdown(f"[[{mark}]]") == "Not measured yet."


def test_figures_come_from_the_benchmarks_file(hooks, monkeypatch, tmp_path):
    """Tables and plots of a small file: means as printed, one length in the plots, a method's rows on its own page."""
    columns = ["data", "method", "n_bits", "seeds", "MAP@all", "MAP@all +-"]
    columns += [f"{f} {d}{e}" for f in ("MAP@all", "NDCG@10", "own R@10") for d in ("I→T", "T→I") for e in ("", " +-")]
    columns += ["distinct", "seconds", "device", "chance", "paper I→T", "paper T→I"]
    lines = [",".join(columns)]
    for number, (data, method, n_bits) in enumerate(
        [("shop", "scm", 16), ("shop", "scm", 64), ("shop", "scm:ridge=9", 64), ("zoo", "scm", 64), ("zoo", "dcmh", 64)]
    ):
        figures = [0.5, 0.01, 0.4 + number / 1000, 0.02, *[0.3, 0.01] * 5]
        lines.append(",".join(map(str, [data, method, n_bits, 3, *figures, 0.9, 1.5, "cpu", 0.123, "", ""])))
    (tmp_path / "methods.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(hooks, "FIGURES", tmp_path / "methods.csv")

    scm = hooks.on_page_markdown("[[figures scm]]")
    assert scm.count("<tr>") == 5
    assert all(f"0.{400 + number} <small>± 0.020</small>" in scm for number in range(4))
    assert "scm:ridge=9" in scm
    dcmh = hooks.on_page_markdown("[[figures dcmh]]")
    assert dcmh.count("<tr>") == 2
    assert "0.404" in dcmh
    assert hooks.on_page_markdown("[[figures ucch]]") == "Not measured yet."
    means = hooks.on_page_markdown("[[benchmark means]]")
    assert '<th colspan="2">shop</th><th colspan="1">zoo</th>' in means
    assert "<tr><th>16 bits</th><th>64 bits</th><th>64 bits</th></tr>" in means
    cell = "<td>0.500 <small>± 0.010</small></td>"
    assert f"<td><code>dcmh</code></td><td>labels</td><td></td><td></td>{cell}</tr>" in means
    assert f"<td><code>scm</code></td><td>labels</td>{cell * 3}</tr>" in means
    assert "<td>chance</td><td></td><td>0.123</td>" in means
    assert "ridge" not in means, "default settings only"
    page = as_html(hooks, PAGES["docs/methods/comparison.md"])
    plots = re.findall("<svg.*?</svg>", page, re.DOTALL)
    assert ["ridge=9" in plot for plot in plots] == [True, False, False], "lengths and seconds of default settings only"
    assert page.count('class="dense"') == 2
    assert "0.400" not in page, "16 bits are in the plot of code lengths only"
    assert page.count("MAP@all of 0.123") == 2
    assert "<code>scm:ridge=9</code>" in page
    assert "[[" not in page
