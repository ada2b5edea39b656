"""Leaf functions of the launch: exit codes, messages of dead ranks, devices, ports, the copy to the console."""

from __future__ import annotations

import io
import signal
import socket
from pathlib import Path

import pytest

from resilience.config import CoordinatorConfig
from resilience.errors import UsageError
from resilience.launch.devices import identify, parse_nvidia_smi
from resilience.launch.embedded import choose_metrics_port, choose_port
from resilience.launch.network import free_port, is_free, is_loopback, local_address_towards
from resilience.launch.ranks import last_line
from resilience.launch.supervision import run_exit_code
from resilience.launch.tee import Tee


@pytest.mark.parametrize(
    ("agents", "received", "code"),
    [
        (0, None, 0),
        (0, signal.SIGTERM, 0),
        (75, None, 75),
        (93, None, 93),
        (64, None, 64),
        (69, None, 69),
        (93, signal.SIGINT, 75),
        (1, None, 75),
        (255, None, 75),
        (-9, None, 75),
        (-9, signal.SIGTERM, 75),
    ],
)
def test_run_exit_code_is_one_of_the_five(agents: int, received: signal.Signals | None, code: int) -> None:
    assert run_exit_code(agents, received)[0] == code


TRACEBACK = 'Traceback (most recent call last):\n  File "train.py", line 3, in <module>\n    step()\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ""),
        ("warning: nothing is wrong\n", ""),
        (f"{TRACEBACK}ValueError: bad data: 3\n", "ValueError: bad data: 3"),
        (f"{TRACEBACK}ValueError: bad data: 3\nDestroying process group\n", "ValueError: bad data: 3"),
        (f"{TRACEBACK}KeyError: 1\n\nDuring handling\n\n{TRACEBACK}torch.cuda.OutOfMemoryError: 1 GiB\n", "torch.cuda"),
        (f"{TRACEBACK}KeyboardInterrupt\n", "KeyboardInterrupt"),
        ("".join(f"[rank1]: {line}\n" for line in f"{TRACEBACK}RuntimeError: closed".splitlines()), "RuntimeError: cl"),
        ("x" * 100_000 + f"\n{TRACEBACK}MemoryError\n", "MemoryError"),
    ],
)
def test_message_of_a_dead_rank(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rank-0.err"
    path.write_text(text)
    assert last_line(path).startswith(message)
    assert bool(last_line(path)) == bool(message)


def test_message_of_a_rank_that_never_wrote(tmp_path: Path) -> None:
    assert last_line(tmp_path / "absent") == ""


def test_devices_of_a_gpu_node() -> None:
    text = "0, GPU-aaaa, NVIDIA H200\n1, GPU-bbbb, NVIDIA H200, special\nError: something\n"
    assert {slot: (d.device, d.name) for slot, d in parse_nvidia_smi(text).items()} == {
        0: ("GPU-aaaa", "NVIDIA H200"),
        1: ("GPU-bbbb", "NVIDIA H200, special"),
    }


def test_devices_of_a_cpu_node_are_distinct_and_stable() -> None:
    host = socket.gethostname()
    assert [d.device for d in identify([0, 3], node="localhost", use_gpu=False)] == [f"cpu:{host}:0", f"cpu:{host}:3"]
    assert [d.device for d in identify([0], node="worker-1", use_gpu=False)] == ["cpu:worker-1:0"]


def test_explicit_ports_that_are_busy_are_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free("127.0.0.1", port)
        with pytest.raises(UsageError, match=rf"coordinator\.port = {port}: in use"):
            choose_port(CoordinatorConfig(port=port))
        with pytest.raises(UsageError, match=rf"coordinator\.metrics_port = {port}: in use"):
            choose_metrics_port(CoordinatorConfig(metrics_port=port))
    assert choose_port(CoordinatorConfig(port=port)) == port
    assert choose_port(CoordinatorConfig()) != choose_port(CoordinatorConfig())


def test_addresses() -> None:
    assert is_free("127.0.0.1", free_port())
    assert local_address_towards("127.0.0.1") == "127.0.0.1"
    assert is_loopback("localhost")
    assert is_loopback("127.0.0.53")
    assert not is_loopback("10.0.0.1")
    assert not is_loopback("worker-0")


def test_console_gets_every_byte_in_order(tmp_path: Path) -> None:
    path, stream = tmp_path / "rank-0.out", io.BytesIO()
    tee = Tee([(path, stream), (tmp_path / "never", io.BytesIO())])
    written = b""
    with path.open("wb", buffering=0) as file:
        for number in range(200):
            chunk = b"\xff partial %d\r" % number if number % 2 else b"line %d\n" % number
            written += chunk
            file.write(chunk)
    tee.stop()
    assert stream.getvalue() == written
