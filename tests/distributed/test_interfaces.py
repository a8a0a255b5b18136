"""The network interface of the ranks: found from the first rank's address, or as configured."""

from __future__ import annotations

import os

import pytest

from hcsdl.config import ConfigError
from hcsdl.distributed.interfaces import VARIABLES, interface_addresses, interface_towards, use_interface


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_the_loopback_leads_to_this_host() -> None:
    assert interface_addresses()["lo"] == "127.0.0.1"
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None


def test_a_hosts_own_address_is_reached_by_the_interface_that_has_it() -> None:
    for name, address in interface_addresses().items():
        assert interface_towards(address) == name


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_TCP_IFACE", "mine")
    use_interface(None, "127.0.0.1")
    assert os.environ["FI_TCP_IFACE"] == "mine" and os.environ["GLOO_SOCKET_IFNAME"] == os.environ["CCL_KVS_IFACE"] == "lo"


def test_an_unknown_interface_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="distributed.interface must be an interface of .*lo.*Got 'ib7' instead"):
        use_interface("ib7", "127.0.0.1")
    assert not any(name in os.environ for name in VARIABLES)
