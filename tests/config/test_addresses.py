"""Which addresses are this machine's own, and what is said of a proxy."""

import socket

import pytest

from rlad.config.addresses import is_this_machine
from rlad.replicas import own_hosts, proxy_of


def test_an_address_of_this_machine_in_every_way_of_writing():
    hosts = ["127.0.0.1", "127.0.0.2", "0.0.0.0", "localhost", "[::1]", "[::]"]
    hosts.append(socket.gethostname())
    for host in hosts:
        assert is_this_machine(f"http://{host}:8000/v1"), host
    for host in ("192.0.2.1", "example.org", "128.0.0.1", "localhost.example.org", "[2001:db8::1]"):
        assert not is_this_machine(f"http://{host}:8000/v1"), host


def test_no_proxy_sees_it_and_others_name_theirs(monkeypatch: pytest.MonkeyPatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    urls = ("http://0.0.0.0:8000", "http://[::]:8000", "http://example.org")
    assert own_hosts(urls) == {"127.0.0.1", "localhost", "[::1]", "0.0.0.0", "[::]"}
    assert proxy_of("http://0.0.0.0:8000/v1") == ""
    assert proxy_of("http://example.org/v1") == " (by the proxy of HTTP_PROXY)"
    assert proxy_of("https://example.org/v1") == ""
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert proxy_of("http://example.org/v1") == ""
