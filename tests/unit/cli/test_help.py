"""The help of every verb: examples that parse, exit codes, and no word lost to markup."""

from __future__ import annotations

import shlex

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from resilience.cli.examples import HELP
from resilience.cli.main import app

from .conftest import Command

pytestmark = pytest.mark.usefixtures("here")
EXAMPLES = [command for each in HELP.values() for command, _ in each.examples]


@pytest.mark.parametrize("words", HELP)
def test_help_has_purpose_options_examples_and_exit_codes(command: Command, words: str) -> None:
    code, out, err = command(*words.split(), "--help")
    assert (code, err) == (0, "")
    assert f"Usage: resilience {words} " in out
    for example, what in HELP[words].examples:
        # Long lines are folded; their words stay in order.
        assert "".join(example.split()) in "".join(out.split())
        assert "".join(what.split()) in "".join(out.split())
    assert "Exit codes: " in out
    assert "/cyan" not in out


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_parse(example: str) -> None:
    """Each is taken apart as the shell and typer would, down to its verb; nothing is run."""
    name, *words = shlex.split(example.partition(" && ")[0])
    assert name == "resilience"
    group = get_command(app)
    context = group.make_context(name, list(words), resilient_parsing=False)
    while isinstance(context.command, TyperGroup):
        rest = [*context._protected_args, *context.args]
        found, command, rest = context.command.resolve_command(context, rest)
        assert command is not None
        context = command.make_context(found, rest, parent=context)
    assert context.command.name in example


def test_the_list_of_verbs_is_by_purpose(command: Command) -> None:
    out = command("--help")[1]
    panels = [out.index(title) for title in ("Look at a run", "Steer a run", "Checkpoints")]
    assert panels[0] < panels[1]
    assert out.index(" top ") < panels[1] < out.index(" drain ")
