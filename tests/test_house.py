"""The house itself: imports that cost nothing, names that exist, links that lead somewhere."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import pytest

import lorakit
from lorakit.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "examples", "benchmarks")
PAGES = sorted([*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*.md"))])
SOURCES = sorted(ROOT.glob("lorakit/**/*.py"))

#: importing the library, or asking a command for its help, may load none of these
HEAVY = ("torch", "numpy", "transformers", "datasets", "safetensors", "rich", "peft")


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.strip()


def _loaded_after(code: str) -> list[str]:
    asked = f"import sys\n{code}\nprint('loaded', *(n for n in {HEAVY} if n in sys.modules))"
    return _python(asked).splitlines()[-1].split()[1:]


def test_importing_lorakit_loads_nothing_heavy():
    assert _loaded_after("import lorakit") == []


def test_the_help_of_every_command_loads_nothing_heavy():
    calls = "\n".join(f"main([{name!r}, '--help'])" for name in COMMANDS)
    code = f"from lorakit.cli.main import main\nmain(['--help'])\n{calls}"
    assert _loaded_after(code) == []


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_a_help(name):
    shown = io.StringIO()
    with redirect_stdout(shown):
        assert main([name, "--help"]) == 0
    assert f"lorakit {name}" in shown.getvalue()
    assert len(shown.getvalue()) > 200


@pytest.mark.parametrize("name", lorakit.__all__)
def test_every_public_name_exists_and_is_documented(name):
    assert getattr(lorakit, name).__doc__
    assert name in dir(lorakit)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lorakit.nothing  # noqa: B018


def test_the_version_is_said_once_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == lorakit.__version__
    assert f"## {lorakit.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_requirement_of_the_tests_has_its_version_in_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(line for extra in extras for line in extra)]
    names = {re.split(r"[<>=\[]", line)[0].lower().replace("_", "-") for line in wanted}
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in text.splitlines()
        if not line.startswith("#")
    }
    assert names - pinned - {"lorakit"} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_are_there(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    lost = []
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = link.partition("#")
        target = (page.parent / file) if file else page
        if not target.exists() or (heading and heading not in _headings(target)):
            lost.append(link)
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    """`lorakit/….py`, `docs/….md` and the like, written as code."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:lorakit|docs|examples|tests|benchmarks)/[\w./-]*)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_flags_in_a_page_exist(page):
    """Every `lorakit COMMAND --flag …` in a code block is one that the command line knows."""
    helps = {}
    unknown = []
    for line in _shell_lines(page.read_text(encoding="utf-8")):
        words = line.split()
        if words[0] != "lorakit" or words[1].startswith("-"):
            continue
        if words[1] not in COMMANDS:
            unknown.append(line)
            continue
        asked = words[1:3] if words[1] == "images" else words[1:2]  # it has commands of its own
        command = " ".join(asked)
        if command not in helps:
            shown = io.StringIO()
            with redirect_stdout(shown):
                main([*asked, "--help"])
            helps[command] = set(re.findall(r"--[a-z][a-z-]*", shown.getvalue()))
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        unknown += [f"{flag} in {line}" for flag in flags - helps[command]]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_python_in_a_page_parses_and_imports_names_that_exist(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lorakit"):
                module = __import__(str(node.module), fromlist=["_"])
                missing = [a.name for a in node.names if not hasattr(module, a.name)]
                assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is_and_is_one_idea_long(file):
    text = file.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)) or not text.strip(), "it has no docstring"
    # not a gate but a question: over 900 lines a module hardly is one idea
    assert text.count("\n") <= 900


def _shell_lines(text: str) -> list[str]:
    blocks = re.findall(r"```(?:sh|bash|shell)\n(.*?)```", text, re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.split(" #")[0] for line in joined.splitlines() if line.strip()]


def _headings(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in found]
    return {heading.strip().replace(" ", "-") for heading in plain}
