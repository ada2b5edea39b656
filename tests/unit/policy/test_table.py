"""The documentation is drawn from the tables."""

from __future__ import annotations

from pathlib import Path

from resilience.policy import EXIT_RULES, RULES
from resilience.policy.table import as_markdown

DOCS = Path(__file__).parents[3] / "docs" / "policy.md"
MARK = "<!-- drawn by resilience.policy.table.as_markdown() -->\n"


def test_the_documentation_holds_the_tables() -> None:
    assert DOCS.read_text(encoding="utf-8").partition(MARK)[2] == as_markdown(), (
        "docs/policy.md is out of date: replace what follows its mark by the output of\n"
        '  python -c "from resilience.policy.table import as_markdown; print(as_markdown(), end=str())"'
    )


def test_names_are_unique_and_every_row_has_words() -> None:
    rows = [(row.name, row.text) for row in RULES] + [(row.name, row.text) for row in EXIT_RULES]
    assert len({name for name, _ in rows}) == len(rows)
    assert all(len(text) > 20 for _, text in rows)
