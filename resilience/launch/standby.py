"""The agent's side of warm standby: keeps one zygote (zygote.py), and has ranks forked from it where that is the same.

torch elastic starts ranks with `subprocess`. While a `Standby` is installed, its factory of processes is this one's: it
asks the zygote first and starts the process anew where the zygote cannot stand in. Either way the result is a child of
the agent in a session of its own, which torch elastic polls, waits for and kills as it always does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from resilience import imported
from resilience.clock import SystemClock
from resilience.context import RunContext
from resilience.events import Mode
from resilience.launch.zygote import MESSAGE_BYTES, TITLE_BYTES

__all__ = ["Adopted", "Standby"]

_ANSWER_S = 10.0
"""How long the zygote may take for one rank; it takes some hundredths of a second."""
_POLL_S = 0.005
_FACTORY = "get_subprocess_handler"
"""torch elastic's, in the module that starts processes."""
_START = "import sys; '' in sys.path[:1] and sys.path.pop(0); from resilience.launch.zygote import main; main()"


class Standby:
    """One node's zygote, its start, its end, and its use."""

    def __init__(self, *, note: Path, log: Path, is_wanted: bool = True) -> None:
        """Have none yet.

        Args:
            note: where a rank writes what it has imported (resilience/imported.py).
            log: takes what the zygote says.
            is_wanted: False where ranks are always started anew.
        """
        self._note = note
        self._log = log
        self._is_useless = not is_wanted
        self._zygote: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._is_ready = False
        self._said: set[str] = set()
        self._environment: dict[str, str] = {}
        self._title_bytes = 0

    @classmethod
    def of(cls, context: RunContext, *, node: str, logs: Path) -> Standby:
        """That of a node of the run, as its configuration says. Without a guard, nobody notes what ranks import."""
        config = context.config
        return cls(
            note=imported.path_of(context.run_dir, node),
            log=logs / f"standby-{node}.log",
            is_wanted=config.launch.warm_standby and config.mode is not Mode.OFF,
        )

    # --- the zygote

    def keep_ready(self) -> None:
        """Start a zygote as soon as a rank has noted its imports; hear what it says. Call it often: it is cheap."""
        if self._zygote is None:
            if not self._is_useless and self._environment and self._note.exists():
                self._start()
        elif self._zygote.poll() is not None:
            self._lost(f"it ended with {self._zygote.returncode}; {self._log} may say why")
        elif not self._is_ready:
            self._hear()

    @property
    def is_ready(self) -> bool:
        """Whether a rank can be asked for."""
        return self._is_ready

    def _start(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
        with its, self._log.open("ab") as log:
            command = [sys.executable, "-u", "-c", _START, str(its.fileno()), str(os.getpid()), str(self._note)]
            self._zygote = subprocess.Popen(
                [*command, " " * max(TITLE_BYTES, self._title_bytes)],
                env={name: value for name, value in self._environment.items() if imported.shared_name(name)},
                stdout=log,
                stderr=log,
                pass_fds=[its.fileno()],
                start_new_session=True,
            )
        self._line = ours

    def _hear(self) -> None:
        assert self._line is not None
        if not select.select([self._line], [], [], 0)[0]:
            return
        message = json.loads(self._line.recv(MESSAGE_BYTES) or b"{}")
        if "refused" in message:
            self._is_useless = True
            self._lost(message["refused"])
        elif message.get("ready"):
            self._is_ready = True

    def _lost(self, why: str) -> None:
        self._say(f"the standby process is gone, ranks are started without it: {why}")
        self.close()

    def _say(self, text: str) -> None:
        """Each text once in a run."""
        if text not in self._said:
            self._said.add(text)
            print(f"resilience: {text}", file=sys.stderr)

    def close(self) -> None:
        """End the zygote."""
        if self._line is not None:
            self._line.close()
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote.wait()
        self._zygote, self._line, self._is_ready = None, None, False

    # --- ranks

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Let torch elastic start its processes through this one."""
        names = vars(api)
        original = names[_FACTORY]

        def get_handler(**kwargs: Any) -> SubprocessHandler:
            return _Handler(self, **kwargs)

        names[_FACTORY] = get_handler
        try:
            yield
        finally:
            names[_FACTORY] = original

    def take(self, plan_path: Path, environment: dict[str, str], streams: tuple[int, int]) -> Adopted | None:
        """A rank forked from the zygote; None where it has to be started anew.

        Args:
            plan_path: the plan of its generation (ranks.py).
            environment: what torch elastic gives it.
            streams: descriptors for its standard output and error.
        """
        plan = json.loads(plan_path.read_text(encoding="utf-8"))["ranks"][int(environment["LOCAL_RANK"])]
        command: list[str] = plan["command"]
        environment = {**environment, **plan["environment"]}
        self._title_bytes = max(self._title_bytes, sum(len(os.fsencode(word)) + 1 for word in command) + 1)
        if self._is_useless:
            return None
        if not _is_python(command):
            self._is_useless = True
            return None
        if self._zygote is None or not self._is_ready:
            self._environment = self._environment or environment
            return None
        request = {
            "command": command,
            "environment": environment,
            "folder": os.getcwd(),
            "log": plan["log"],
        }
        with _Reply() as reply:
            answer = self._ask(json.dumps(request).encode(), reply, streams)
            if "pid" in answer:
                reply.ours.send(b"+")
                return Adopted(answer["pid"])
        if "refused" in answer:
            self._say(f"a rank is started without the standby process: {answer['refused']}")
        else:
            self._lost("it does not answer")
        return None

    def _ask(self, request: bytes, reply: _Reply, streams: tuple[int, int]) -> dict[str, Any]:
        assert self._line is not None
        try:
            socket.send_fds(self._line, [request], [reply.its.fileno(), *streams])
            reply.its.close()
            if select.select([reply.ours], [], [], _ANSWER_S)[0]:
                return cast("dict[str, Any]", json.loads(reply.ours.recv(MESSAGE_BYTES) or b"{}"))
        except OSError as error:
            print(f"resilience: the standby process cannot be asked ({error.strerror})", file=sys.stderr)
        return {}


class _Reply:
    """A line for one answer; closing it without a word ends the process at its other end."""

    def __init__(self) -> None:
        self.ours, self.its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def __enter__(self) -> _Reply:
        return self

    def __exit__(self, *_: object) -> None:
        self.ours.close()
        self.its.close()


def _is_python(command: list[str]) -> bool:
    """Whether the command is one that a zygote can stand in for: this interpreter, and a module or a file of source."""
    if command[:2] != [sys.executable, "-u"]:
        return False
    return command[2] == "-m" or (command[2].endswith(".py") and Path(command[2]).is_file())


class _Handler(SubprocessHandler):
    """torch elastic's handle of one rank, with another way to start the process."""

    def __init__(self, standby: Standby, **kwargs: Any) -> None:
        self._standby = standby
        super().__init__(**kwargs)

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen[bytes]:
        streams = [stream.fileno() for stream in (self._stdout, self._stderr) if stream is not None]
        if len(streams) == 2:
            adopted = self._standby.take(Path(args[-1]), env, (streams[0], streams[1]))
            if adopted is not None:
                return cast("subprocess.Popen[bytes]", adopted)
        return cast("subprocess.Popen[bytes]", super()._popen(args, env))


class Adopted:
    """A child that this process did not start itself: what torch elastic uses of a `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = self.pid, 0  # somebody else has waited for it; `subprocess` says 0 then, too
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: `timeout` seconds were not enough.
        """
        clock = SystemClock()
        deadline = None if timeout is None else clock.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and clock.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            select.select([], [], [], _POLL_S)
        return code

    def send_signal(self, number: signal.Signals | int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)
