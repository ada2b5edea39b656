"""What the help of each verb ends with: examples that work as they stand, and the exit codes that it has of its own.

Attached by `main` to the verbs, by the words with which they are called. Tests parse every example.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator

import typer

__all__ = ["HELP", "Help", "teach", "verbs"]

SEE, STEER, CARE, SETUP = "Look at a run", "Steer a run", "Checkpoints", "This machine, and before a run"
_CODES = "0; 1 not found or not good; 64 wrong command line or token; 69 the coordinator does not answer"


@dataclasses.dataclass(frozen=True, slots=True)
class Help:
    """The end of a verb's help.

    Attributes:
        panel: heading under which `resilience --help` lists it.
        examples: (command line, what it does).
        codes: exit codes, where they differ from those of all verbs.
    """

    panel: str
    examples: tuple[tuple[str, str], ...]
    codes: str = _CODES

    def epilog(self) -> str:
        """In rich's markup."""
        shown = [f"  [cyan]{command}[/cyan]\n      {what}" for command, what in self.examples]
        return "\n".join(["Examples:", *shown, "", f"Exit codes: {self.codes}."])


HELP: dict[str, Help] = {
    "status": Help(
        SEE,
        (
            ("resilience status", "the run in ./resilience-runs/latest"),
            ("resilience status --run-dir resilience-runs/20260101-093000-1", "another run"),
            ("resilience status --address head:9463 --token-file token --json", "from elsewhere, for a program"),
        ),
    ),
    "top": Help(
        SEE,
        (
            ("resilience top", "the whole screen, until q is pressed"),
            ("resilience top --interval 5", "asks every five seconds"),
            ("resilience top --once", "one picture as text, for a mail or a log"),
        ),
        f"{_CODES}; 143 after SIGTERM",
    ),
    "watch": Help(
        SEE,
        (
            ("resilience watch", "the newest ten events, then each new one"),
            ("resilience watch --lines 0 --json", "all events, an object to a line"),
            ("resilience watch && sbatch next.sh", "goes on only if the run ended well"),
        ),
        "that of the run (0 done, 75 requeue, 93 do not requeue); 64; 69 when the coordinator is gone for 30 s "
        "without having told the run's end",
    ),
    "ranks": Help(SEE, (("resilience ranks", "one line per rank"), ("resilience ranks --json", "for a program"))),
    "detections": Help(
        SEE,
        (
            ("resilience detections", "what the checks saw, oldest first"),
            ("resilience detections --limit 5 --all", "the newest five, propagated alarms too"),
        ),
    ),
    "decisions": Help(
        SEE,
        (
            ("resilience decisions", "all of them, oldest first"),
            ("resilience decisions -n 1 --json", "the newest, for a program"),
        ),
    ),
    "explain": Help(
        SEE, (("resilience explain g1-s5-a0", "the decision of generation 1 about step 5, first attempt"),)
    ),
    "events": Help(
        SEE,
        (
            ("resilience events", "the story so far"),
            ("resilience events --follow --after 120", "what came after event 120, and goes on"),
        ),
    ),
    "snapshots": Help(SEE, (("resilience snapshots", "newest first, with what each would survive"),)),
    "devices": Help(SEE, (("resilience devices", "faults over all jobs, and what is out of use"),)),
    "report": Help(
        SEE,
        (
            ("resilience report --html run.html", "the latest run as one page"),
            ("resilience report resilience-runs/20260101-093000-1 --json", "another one, as report.json has it"),
        ),
    ),
    "cordon": Help(
        STEER,
        (
            ("resilience cordon GPU-6d1f --reason 'ECC errors'", "a device, for coming generations and jobs"),
            ("resilience cordon node-17", "all devices of a node"),
        ),
    ),
    "uncordon": Help(STEER, (("resilience uncordon GPU-6d1f --reason 'board replaced'", "back into use"),)),
    "drain": Help(
        STEER,
        (("resilience drain --reason 'maintenance at 18:00'", "ends with 75 after the next checkpoint"),),
    ),
    "snapshot now": Help(STEER, (("resilience snapshot now", "before something risky"),)),
    "rewind": Help(
        STEER,
        (
            ("resilience rewind", "to the newest snapshot that is known to be clean"),
            ("resilience rewind --step 1200 --reason 'loss went up'", "to that of step 1200"),
        ),
    ),
    "checkpoints list": Help(
        CARE,
        (
            ("resilience checkpoints list", "what the run reported"),
            ("resilience checkpoints list checkpoints", "what lies in ./checkpoints; asks nobody"),
        ),
    ),
    "checkpoints verify": Help(
        CARE,
        (
            ("resilience checkpoints verify", "those of the run, every byte"),
            ("resilience checkpoints verify checkpoints/global_step100", "one"),
        ),
    ),
    "checkpoints prune": Help(
        CARE,
        (
            ("resilience checkpoints prune checkpoints --keep 2 --dry-run", "what would go, and why"),
            ("resilience checkpoints prune checkpoints --keep 2 --keep-every 1000", "keep every thousandth as well"),
        ),
        "0; 1 no checkpoint there; 64 wrong command line",
    ),
    "checkpoints convert": Help(
        CARE,
        (("resilience checkpoints convert checkpoints --world-size 6", "so that six ranks can load the latest"),),
        "0; 1 the source is not good; 64 wrong command line",
    ),
    "digest": Help(
        CARE,
        (
            ("resilience digest checkpoints", "of what `latest` names"),
            ("resilience digest checkpoints/global_step100", "of one tag"),
        ),
        "0; 1 not found or not good; 64 wrong command line",
    ),
    "doctor": Help(
        SETUP,
        (
            ("resilience doctor", "before the first run on a machine"),
            ("resilience doctor --address head:9463 --token-file token", "the way to that coordinator too"),
        ),
        "0; 1 something would keep a run from working; 64; 69 the coordinator does not answer",
    ),
    "policy show": Help(
        SETUP,
        (("resilience policy show", "the table that decides"), ("resilience policy show --markdown", "for a page")),
        "0; 64 wrong command line",
    ),
    "policy check": Help(
        SETUP, (("resilience policy check resilience.toml", "valid, and what each setting means"),), "0; 64 not valid"
    ),
    "policy simulate": Help(
        SETUP,
        (
            ("resilience policy simulate --site attention.scores --kind inf", "what that would lead to"),
            ("resilience policy simulate --attempt 2 --config resilience.toml", "after two replays, with your limits"),
        ),
        "0; 64 wrong command line or configuration",
    ),
    "coordinator serve": Help(
        SETUP,
        (
            ("resilience coordinator serve --run-id gpt", "on this machine alone; goes on from its journal"),
            (
                "resilience coordinator serve --run-id gpt --bind 0.0.0.0 --port 9463 --token-file token",
                "for other machines",
            ),
        ),
        "0 after SIGTERM; 1 the journal cannot be used; 64 wrong command line, or the port is in use",
    ),
    "calibrate": Help(
        SETUP,
        (("resilience calibrate --output profile.toml -- train.py --steps 200", "thresholds from your own job"),),
        "that of the job; 1 no rank left a histogram; 64 wrong command line",
    ),
}


def teach(app: typer.Typer) -> None:
    """Give every verb that is registered with `app` the end of its help, and its panel."""
    for words, verb in verbs(app):
        assert verb.callback is not None
        paragraphs = inspect.cleandoc(verb.callback.__doc__ or "").split("\n\n")
        verb.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        verb.epilog = HELP[words].epilog()
        if " " not in words:
            verb.rich_help_panel = HELP[words].panel
    for group in app.registered_groups:
        group.rich_help_panel = next(each.panel for words, each in HELP.items() if words.startswith(f"{group.name} "))


def verbs(app: typer.Typer, before: str = "") -> Iterator[tuple[str, typer.models.CommandInfo]]:
    """Every verb of `app` and its groups, by the words with which it is called."""
    for verb in app.registered_commands:
        name = verb.name or verb.callback.__name__.replace("_", "-")  # type: ignore[union-attr]  # commands have one
        yield f"{before}{name}", verb
    groups: Iterable[typer.models.TyperInfo] = app.registered_groups
    for group in groups:
        assert group.typer_instance is not None
        yield from verbs(group.typer_instance, f"{before}{group.name} ")
