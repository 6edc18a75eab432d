"""Where the dashboard listens and whose pages it trusts, without starting a server that stays."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from workbench.errors import InputError
from workbench.store import Store
from workbench.view import dashboard


def test_loopback_trusts_loopback_names_of_its_own_port_only() -> None:
    assert dashboard._origins("127.0.0.1", 5006) == ["127.0.0.1:5006", "localhost:5006"]
    assert dashboard._origins("10.1.2.3", 80) == ["10.1.2.3:80"]


def test_every_interface_trusts_this_machine_and_no_wildcard() -> None:
    origins = dashboard._origins("0.0.0.0", 5006)
    assert "127.0.0.1:5006" in origins
    assert all(origin.endswith(":5006") and "*" not in origin for origin in origins)


@pytest.mark.parametrize(("address", "port"), [("127.0.0.1", 0), ("127.0.0.1", 65536), ("::1", 5006)])
def test_impossible_addresses_are_named(tmp_path: Path, address: str, port: int) -> None:
    with Store(tmp_path) as store, pytest.raises(InputError, match=r"give"):
        dashboard.serve(store, address=address, port=port)


def test_taken_port_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken, Store(tmp_path) as store:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"Port {port} of 127.0.0.1 is taken"):
            dashboard.serve(store, port=port)


def test_foreign_address_is_named(tmp_path: Path) -> None:
    with Store(tmp_path) as store, pytest.raises(InputError, match="an address of this machine"):
        dashboard.serve(store, address="192.0.2.1", port=5006)
