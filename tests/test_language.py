"""One language: the field's terms in natural English, in names, docstrings, comments, messages and documents.

The banned words are those of a private dialect that the project once had; CONTRIBUTING.md lists what to write instead.
This file is left out, because it has to contain them.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for pattern in ("*.md", "Makefile", "pyproject.toml", "docs/*.md", "{}/**/*.py", "{}/**/*.md")
    for folder in (("xpo_jax", "configs", "tools", "tests") if "{}" in pattern else ("",))
    for path in ROOT.glob(pattern.format(folder))
    if ".venv" not in path.parts and path != Path(__file__)
)
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
BANNED = re.compile(
    r"\b(?:told|told_of|tells?|anew|for ever|so many|mend(?:s|ed|ing)?|in haste|hasty|part batch(?:es)?|unreal"
    r"|announced?|announces|patience|in hand|nats per answer|draws?_ahead|drawn ahead|ahead of time"
    r"|(?:go|goes|going|went|gone) on|rising numbers|whoever|whatever)\b",
    re.IGNORECASE,
)
# What a name must say instead: what it is (`samples`, `model_folder`, `metrics`).
BANNED_NAMES = {
    "found", "each", "some", "kept", "there", "theirs", "mine", "own", "told", "together", "hasty", "said", "asked",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_text_banned_word_is_absent(name):
    lines = (ROOT / name).read_text().splitlines()
    if name == "CONTRIBUTING.md":  # its glossary names them
        lines = [line for line in lines if not line.startswith("|")]
    hits = [f"{name}:{n}: {m.group()}" for n, line in enumerate(lines, 1) for m in BANNED.finditer(line)]
    assert hits == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".py")])
def test_name_says_what_it_is(name):
    tree = ast.parse((ROOT / name).read_text())
    bound = {
        n.id: n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    bound |= {n.arg: n.lineno for n in ast.walk(tree) if isinstance(n, ast.arg)}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bound |= {n.name: n.lineno for n in ast.walk(tree) if isinstance(n, kinds)}
    assert {word: line for word, line in bound.items() if word in BANNED_NAMES} == {}


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".py")])
def test_function_name_has_no_banned_word(name):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [n for n in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(n, kinds)]
    assert {n.name: n.lineno for n in functions if BANNED.search(n.name.replace("_", " "))} == {}
