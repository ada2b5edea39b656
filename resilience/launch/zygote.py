"""The standby process of a node: it has imported what the ranks had, and forks a rank from itself when it is asked to.

A fork is clean while the process has one thread and has never used a device: both are looked at before every one. What
a rank gets by its start (environment, arguments, folder, session, streams) it gets here as it would from an `exec`, and
the script is read from its file then. Never here: a module of the script's own, or anything that starts a thread.
"""

from __future__ import annotations

import array
import builtins
import ctypes
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import os
import socket
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from resilience.imported import Imported, read, shared_name

__all__ = ["MESSAGE_BYTES", "TITLE_BYTES", "main"]

MESSAGE_BYTES = 1 << 20
TITLE_BYTES = 1 << 14
"""Room that the agent leaves on this process's command line for that of a rank."""
_LOADED_EARLY = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "MALLOC_", "LD_", "CUDA_", "GLIBC_")
"""Variables with these prefixes are read by compiled code when it is loaded."""
_ADOPTION_S = 5.0
_PR_SET_PDEATHSIG = 1
_SIGKILL = 9


class _RefusedError(Exception):
    """This process cannot stand in; one line says why."""


def main() -> None:
    """Serve the agent until it closes its end; in a forked process, run the rank's script and return."""
    descriptor, agent_pid, note_path, _ = sys.argv[1:]
    _die_with(int(agent_pid))
    agent = socket.socket(fileno=int(descriptor))
    environment = dict(os.environ)
    note = read(Path(note_path))
    assert note is not None, "started before a rank had noted its imports"
    try:
        warm(note, pause=time.sleep)
        require_clean_fork()
    except _RefusedError as refusal:
        agent.send(json.dumps({"refused": str(refusal)}).encode())
        return
    gc.collect()
    gc.freeze()
    print(f"ready with {len(sys.modules)} modules", file=sys.stderr)
    agent.send(json.dumps({"ready": True}).encode())
    rank = _serve(agent, environment, int(agent_pid))
    if rank is not None:
        run_script(rank["command"])


def _die_with(parent_pid: int) -> None:
    """Be killed when the parent dies."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os._exit(1)


# --- before the first rank is asked for


def warm(note: Imported, *, pause: Callable[[float], None]) -> None:
    """Import what ranks had imported, at half speed, because ranks are at work meanwhile.

    Args:
        note: what the ranks had.
        pause: called after each import with the processor seconds that it took.

    Raises:
        _RefusedError: an import depends on a variable that ranks do not share, or that the script sets itself.
    """
    before = dict(os.environ)
    with _Reads() as reads:
        for name in note.modules:
            started_at = time.process_time()
            try:
                importlib.import_module(name)
            except ImportError as error:
                print(f"{name}: left to the ranks ({error})", file=sys.stderr)
            pause(time.process_time() - started_at)
    own = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
    _require_same_reads(reads.found, set(note.changed_variables) - own)
    if note.operators:
        from resilience.deepspeed.operators import load

        load(note.operators)


def _require_same_reads(found: Mapping[str, str], changed: set[str]) -> None:
    """Refuse what a module may have decided otherwise in a rank."""
    for name, where in found.items():
        if not shared_name(name) or name in changed:
            raise _RefusedError(f"{where} reads {name} while it is imported, and each rank has its own")
    early = sorted(name for name in changed if shared_name(name) and name.startswith(_LOADED_EARLY))
    if early:
        raise _RefusedError(f"the script sets {early[0]} itself, which libraries read when they are loaded")


class _Reads:
    """Notes which environment variables are read from Python, and by which file first."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def __enter__(self) -> _Reads:
        kind = type(os.environ)
        self._original = original = kind.__getitem__

        def noting(environ: Any, name: Any) -> Any:  # `os.environb` is of this class, too
            if isinstance(name, (str, bytes)) and (text := os.fsdecode(name)) not in self.found:
                self.found[text] = _importing_file()
            return original(environ, name)

        kind.__getitem__ = noting  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        type(os.environ).__getitem__ = self._original  # type: ignore[method-assign]


def _importing_file() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith("<frozen"):
        frame = frame.f_back
    return frame.f_code.co_filename


def require_clean_fork() -> None:
    """Refuse to fork a process with threads or an open device.

    Raises:
        _RefusedError: there is one.
    """
    num_threads = len(os.listdir("/proc/self/task"))
    if num_threads != 1:
        raise _RefusedError(f"the imported modules have started {num_threads - 1} threads")
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue  # that of the listing itself
        if target.startswith(("/dev/nvidia", "/dev/kfd")):
            raise _RefusedError(f"an imported module has opened {target}")


# --- a rank is asked for


def _serve(agent: socket.socket, environment: dict[str, str], agent_pid: int) -> dict[str, Any] | None:
    """Fork a rank for each request. Returns its plan in the rank, and None when the agent is gone."""
    while True:
        message, descriptors = _receive(agent)
        if not message:
            return None
        rank = json.loads(message)
        reply = socket.socket(fileno=descriptors[0])
        try:
            require_clean_fork()
            require_same_environment(environment, rank["environment"])
            require_no_shadow(rank["command"], rank["folder"], sys.modules)
        except _RefusedError as refusal:
            reply.send(json.dumps({"refused": str(refusal)}).encode())
        else:
            if _fork_orphan():
                agent.close()
                _become(rank, descriptors, reply, agent_pid)
                return dict(rank)
        reply.close()
        for descriptor in descriptors[1:]:
            os.close(descriptor)


def _receive(agent: socket.socket) -> tuple[bytes, list[int]]:
    received = array.array("i")
    message, ancillary, _, _ = agent.recvmsg(MESSAGE_BYTES, socket.CMSG_LEN(4 * received.itemsize))
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received.frombytes(content[: len(content) - len(content) % received.itemsize])
    return message, list(received)


def require_same_environment(mine: Mapping[str, str], ranks: Mapping[str, str]) -> None:
    """Refuse a rank with other variables than this process was started with, beyond those that differ by design.

    Raises:
        _RefusedError: a variable differs.
    """
    for name in sorted({*mine, *ranks}):
        if shared_name(name) and mine.get(name) != ranks.get(name):
            raise _RefusedError(f"the environment variable {name} has changed since")


def require_no_shadow(command: list[str], folder: str, loaded: Iterable[str]) -> None:
    """Refuse a script beside which lies a module of the name of one that is imported here.

    Raises:
        _RefusedError: the script would import its own.
    """
    path = Path(folder)
    if command[2] != "-m":
        path = (path / command[2]).resolve().parent
    names = {name for name in loaded if "." not in name}
    suffixes = tuple(importlib.machinery.all_suffixes())
    for entry in path.iterdir():
        name = entry.name.partition(".")[0]
        if name not in names or name in sys.builtin_module_names:
            continue
        if entry.name.endswith(suffixes) or (entry / "__init__.py").is_file():
            raise _RefusedError(f"{entry} is imported by the script in place of an installed module")


def _fork_orphan() -> bool:
    """Fork twice: the new process is adopted by the agent, which is its parent then as of any rank. True in it."""
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return False
    if os.fork():
        os._exit(0)
    return True


def _become(rank: Mapping[str, Any], descriptors: list[int], reply: socket.socket, agent_pid: int) -> None:
    """All that lies between a fork and a script: this process is the rank when it returns, or is gone."""
    _, standard_out, standard_error = descriptors
    os.setsid()
    deadline = time.monotonic() + _ADOPTION_S
    while os.getppid() != agent_pid:
        if time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.0005)
    _die_with(agent_pid)
    for source, target in ((standard_out, 1), (standard_error, 2)):
        os.dup2(source, target)
        os.close(source)
    if rank["log"] is not None:
        descriptor = os.open(rank["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    for name in [name for name in os.environ if not shared_name(name) and name not in rank["environment"]]:
        del os.environ[name]
    os.environ.update({name: value for name, value in rank["environment"].items() if not shared_name(name)})
    os.chdir(rank["folder"])
    _show_command(rank["command"])
    _seed_anew()
    reply.send(json.dumps({"pid": os.getpid()}).encode())
    if not reply.recv(1):
        os._exit(1)  # the agent has given this process up
    reply.close()


def _show_command(command: list[str]) -> None:
    """Let `ps` show the rank's command in the place of this process's, as far as there is room."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end: fields 48 and 49 of proc(5)
    text = b"\0".join(os.fsencode(word) for word in command)
    ctypes.memmove(start, text[: end - start - 1].ljust(end - start, b"\0"), end - start)


def _seed_anew() -> None:
    """Give generators that modules seed by chance when they are imported another chance in each rank."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


# --- the script


def run_script(command: list[str]) -> None:
    """Run `python -u SCRIPT …` or `python -u -m MODULE …` in this process, as Python does after its own start.

    Args:
        command: the rank's command line; its first two words are the interpreter and `-u`.
    """
    if "deepspeed" in sys.modules and "RESILIENCE_CONTEXT" in os.environ:
        from resilience._boot import install_in_rank

        install_in_rank(sys.modules["deepspeed"])
    sys.orig_argv = list(command)
    main_module = types.ModuleType("__main__")
    vars(main_module).update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main_module
    if command[2] == "-m":
        _run_module(command[3], command[4:])
    else:
        _run_file(main_module, command[2], command[3:])


def _run_module(name: str, arguments: list[str]) -> None:
    import runpy

    sys.argv = ["-m", *arguments]
    _search_first(os.getcwd())
    try:
        runpy._run_module_as_main(name)  # type: ignore[attr-defined]  # what Python itself calls for `-m`
    except Exception as error:  # noqa: BLE001 - a script may raise anything; it is shown as Python would show it
        _show(error)
        raise SystemExit(1) from None


def _run_file(main_module: types.ModuleType, script: str, arguments: list[str]) -> None:
    path = os.path.abspath(script)
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    vars(main_module).update(__file__=path, __loader__=loader, __cached__=None)
    sys.argv = [script, *arguments]
    _search_first(os.path.dirname(os.path.realpath(script)))
    try:
        exec(loader.source_to_code(loader.get_data(path), path), vars(main_module))
    except Exception as error:  # noqa: BLE001 - a script may raise anything; it is shown as Python would show it
        _show(error)
        raise SystemExit(1) from None


def _search_first(folder: str) -> None:
    if not sys.flags.safe_path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()


def _show(error: Exception) -> None:
    """Report as Python would: only with the script's own frames."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    error.__traceback__ = traceback  # it is shown in preference to the argument
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, traceback
    sys.excepthook(type(error), error, traceback)
