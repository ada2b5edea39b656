"""Under which host a coordinator is told to others."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from resilience.coordinator.access import dialled_host


@pytest.mark.parametrize("bind", ["127.0.0.1", "10.1.2.3", "node-a", "[::1]"])
def test_one_address_is_told_as_it_is(bind: str) -> None:
    assert dialled_host(bind) == bind


@pytest.mark.parametrize("bind", ["0.0.0.0", "::", "[::]"])
def test_every_address_is_told_as_one_that_can_be_dialled(bind: str) -> None:
    host = dialled_host(bind)
    assert host == socket.gethostname() or not ipaddress.ip_address(host).is_unspecified
