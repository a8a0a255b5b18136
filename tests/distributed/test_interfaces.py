"""The network interface of the ranks: found from the first rank's address, or as configured."""

from __future__ import annotations

import os

import pytest

from hcsdl.config import ConfigError
from hcsdl.distributed import interfaces
from hcsdl.distributed.interfaces import ELSEWHERE, VARIABLES, common_interface, interface_addresses, interface_towards, use_interface


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "SLURM_STEP_NODELIST"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_the_loopback_leads_to_this_host() -> None:
    assert interface_addresses()["lo"] == "127.0.0.1"
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("::1") is None, "no IPv4 address"


def test_a_hosts_own_address_is_reached_by_the_interface_that_has_it() -> None:
    for name, address in interface_addresses().items():
        assert interface_towards(address) == name


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "localhost"])
def test_the_loopback_is_taken_where_every_rank_was_given_it(host: str) -> None:
    assert common_interface(host) == "lo"


def test_a_host_name_that_leads_to_the_loopback_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Debian rank 0's own name is 127.0.1.1; the others, for whom it is another address, could not connect to what listens there."""
    ways = {"node1": "lo", "node2": "ib0", ELSEWHERE: "eth0"}
    monkeypatch.setattr(interfaces, "interface_towards", ways.get)
    assert common_interface("node2") == "ib0"
    assert common_interface("node1") == "eth0", "the default route's: nobody says who the others are"
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-8]")
    assert common_interface("node1") == "ib0", "towards another node"
    monkeypatch.setitem(ways, "node2", "lo")
    assert common_interface("node1") == "eth0"
    del ways[ELSEWHERE]
    use_interface(None, "node1")
    assert not any(name in os.environ for name in VARIABLES)


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FI_TCP_IFACE", "lo")
    use_interface(None, "127.0.0.1")
    assert os.environ["FI_TCP_IFACE"] == "lo" and os.environ["GLOO_SOCKET_IFNAME"] == os.environ["CCL_KVS_IFACE"] == "lo"


def test_the_loopback_does_not_lead_to_another_host() -> None:
    """Ranks of several hosts that meet at this one's loopback, through a tunnel, say, do not talk over it."""
    use_interface(None, "127.0.0.1", one_host=False)
    assert not any(name in os.environ for name in VARIABLES)
    use_interface(None, "127.0.0.1")
    assert all(os.environ[name] == "lo" for name in VARIABLES)


def test_an_unknown_interface_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="distributed.interface must be an interface of .*lo.*Got 'ib7' instead"):
        use_interface("ib7", "127.0.0.1")
    assert not any(name in os.environ for name in VARIABLES)


def test_an_interface_in_the_environment_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,nowhere0")
    with pytest.raises(ConfigError, match="GLOO_SOCKET_IFNAME must name interfaces of .* Got 'lo,nowhere0'"):
        use_interface(None, "127.0.0.1")
