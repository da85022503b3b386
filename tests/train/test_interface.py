"""The interface that gloo is told to use."""

import socket

import psutil
import pytest
import ray.util

from train.interface import GLOO, interface_of, name_interface

ADDRESSES = [
    (name, each.address)
    for name, addresses in psutil.net_if_addrs().items()
    for each in addresses
    if each.family == socket.AF_INET
]


@pytest.mark.parametrize(("name", "address"), ADDRESSES)
def test_an_address_leads_to_its_interface(name, address):
    assert interface_of(address) == name


@pytest.mark.parametrize(
    ("users", "address", "told"),
    [
        (None, "127.0.0.1", interface_of("127.0.0.1")),
        ("ib0", "127.0.0.1", "ib0"),
        # An address of documentation, which no interface has.
        (None, "192.0.2.1", None),
    ],
)
def test_gloo_uses_the_nodes_interface_unless_the_user_named_one(monkeypatch, users, address, told):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    monkeypatch.delenv(GLOO, raising=False)
    environment = {} if users is None else {GLOO: users}
    monkeypatch.setattr("os.environ", environment)
    name_interface()
    assert environment.get(GLOO) == told
