"""The directory of a run: made, found, kept apart from an earlier run's, and what lies where in it.

Nothing here starts processes. Secrets lie in files of mode 0600 only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from resilience.context import RunContext
from resilience.errors import UsageError
from resilience.launch.lease import Holder
from resilience.rpc.tls import Tls

__all__ = ["Endpoint", "RunDirectory", "default_directory"]

RUNS = Path("resilience-runs")
_OF_A_RUN = (
    "context.json",
    "coordinator.json",
    "token",
    "journal.db",
    "report.json",
    "strikes",
    "calibration",
    "logs",
    "launcher.lease",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the ranks of a generation met."""

    master_addr: str
    master_port: int


def default_directory(run_id: str) -> Path:
    """`./resilience-runs/<run id>`, absolute."""
    return Path.cwd() / RUNS / run_id


class RunDirectory:
    """Paths of one run, and the files that the launcher and its agents write there."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.context = self.path / "context.json"
        self.coordinator = self.path / "coordinator.json"
        self.token = self.path / "token"
        self.logs = self.path / "logs"
        self.report = self.path / "report.json"

    def make(self) -> None:
        """Make the directory; put what an earlier run left there into `previous/<its run id>`.

        Raises:
            UsageError: it cannot be written, or a run is going on in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.logs_probe()
            self._refuse_running()
            self._keep_previous()
            self.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"--resilience-dir {self.path}: cannot be written ({error.strerror}); "
                "choose a directory that you may write to"
            ) from None
        self._link_latest()

    def logs_probe(self) -> None:
        """Raise OSError unless files can be created here, whatever the mode bits say."""
        probe = self.path / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()

    def _refuse_running(self) -> None:
        holder = Holder.read(self.path)
        if holder is not None and not holder.is_gone():
            raise UsageError(
                f"--resilience-dir {self.path}: the run of pid {holder.pid} on {holder.host} is going on there; "
                f"choose another directory, or remove {self.path / 'launcher.lease'} if that run is dead"
            )

    def _keep_previous(self) -> None:
        if not self.context.exists():
            return
        previous = self.path / "previous"
        previous.mkdir(exist_ok=True)
        name = RunContext.read(self.context).run_id
        target, number = previous / name, 1
        while target.exists():
            number += 1
            target = previous / f"{name}.{number}"
        target.mkdir()
        for entry in _OF_A_RUN:
            if (self.path / entry).exists():
                (self.path / entry).rename(target / entry)

    def _link_latest(self) -> None:
        """`latest` beside the run names the newest one. Two launches at the same moment: either may win."""
        link = self.path.parent / "latest"
        temporary = self.path.parent / f".latest.{os.getpid()}"
        try:
            temporary.symlink_to(self.path.name)
            temporary.replace(link)
        except OSError:
            # The parent may not be ours to write to (the run directory may): the run goes on without the convenience.
            temporary.unlink(missing_ok=True)

    def create_token(self) -> Path:
        """A fresh token for this run, in a file that only this user can read."""
        descriptor = os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32))
        return self.token

    def write_coordinator(
        self, *, address: str, metrics_address: str | None, pid: int | None, context: RunContext
    ) -> None:
        """`coordinator.json`: how people and tools find the coordinator. The pid is None for an external one."""
        content = {
            "address": address,
            "metrics_address": metrics_address,
            "pid": pid,
            "token_file": None if context.token_file is None else str(context.token_file),
            "tls": None if (tls := Tls.of(context.config.coordinator)) is None else tls.told(),
            "run_id": context.run_id,
        }
        temporary = self.path / f".coordinator.json.{os.getpid()}"
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.coordinator)

    def generation_logs(self, generation: int) -> Path:
        """Directory of a generation's logs, made where it is missing."""
        path = self.logs / f"generation-{generation}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def write_endpoint(self, generation: int, node: str, endpoint: Endpoint) -> None:
        """Remember where a generation met, so that its leftovers can be found even when its agent was killed."""
        path = self.generation_logs(generation) / f"endpoint-{node}.json"
        path.write_text(json.dumps(dataclasses.asdict(endpoint)), encoding="utf-8")

    def endpoints(self) -> Iterator[Endpoint]:
        """Where every generation of this run met. One that was torn by a full disk is left out: no rank was started."""
        for path in sorted(self.logs.glob("generation-*/endpoint-*.json")):
            with contextlib.suppress(ValueError):
                yield Endpoint(**json.loads(path.read_text(encoding="utf-8")))
