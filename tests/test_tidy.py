"""House rules that no linter knows: sizes, heads, words, links."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
GENERATED = ROOT / "resilience" / "rpc" / "v1"
TEXT_SUFFIXES = {".py", ".md", ".toml", ".json", ".proto", ".txt", ".yaml", ".yml", ".sh", ""}
FOLDERS = ("resilience", "kernels", "scripts", "tests", "proto", "docs", "deploy", "constraints", ".ci")

LOOSE_ENDS = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK)\b")
ONE_MACHINE = re.compile(r"(?<![\w.}<])/(home|root|Users|work)/\w")
"""Absolute paths that exist on one machine only."""
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


def files() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in TEXT_SUFFIXES and "__pycache__" not in path.parts:
                yield path
    yield from sorted(path for path in ROOT.iterdir() if path.is_file() and path.suffix in TEXT_SUFFIXES)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


SOURCES = [path for path in files() if path.suffix == ".py" and GENERATED not in path.parents]
DOCUMENTS = [path for path in files() if path.suffix == ".md"]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_source_is_of_human_size_and_has_a_head(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    tree = ast.parse(text)
    assert not text.strip() or ast.get_docstring(tree), "the file does not say what lives in it"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_error_is_swallowed_whole(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {ast.unparse(kind) if kind is not None else "everything" for kind in caught}
            ends_by_raising = isinstance(node.body[-1], ast.Raise)
            broad = names & {"everything", "Exception", "BaseException"}
            assert ends_by_raising or not broad, f"line {node.lineno} catches {broad}"


def test_no_loose_ends_and_no_paths_of_one_machine() -> None:
    found = []
    for path in files():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if LOOSE_ENDS.search(line) or ONE_MACHINE.search(line):
                found.append(f"{name(path)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    local = [target for target, _ in LINK.findall(text) if "://" not in target and not target.startswith("mailto:")]
    missing = [target for target in local if not (path.parent / target).exists()]
    assert not missing, f"{name(path)} links to {missing}"


def test_scripts_are_thin_and_can_be_run() -> None:
    for path in sorted((ROOT / "scripts").iterdir()):
        if path.is_file() and not path.suffix:
            text = path.read_text(encoding="utf-8")
            assert text.startswith("#!"), name(path)
            assert path.stat().st_mode & 0o111, f"{name(path)} is not executable"
            assert len(text.splitlines()) <= 40, f"{name(path)}: logic belongs into a Python file beside it"
