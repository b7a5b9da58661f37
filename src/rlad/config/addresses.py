"""Addresses of servers, and names of the variables with their keys. Imports no torch."""

import re
import socket
from functools import lru_cache
from ipaddress import ip_address
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from rlad.errors import UserError

_ADDRESS = re.compile(
    r"https?://(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:[1-9][0-9]{0,4})?(/[\w./~:@%+=,-]*)?"
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _server_url(url: str) -> str:
    """Check an address, and remove a slash at its end."""
    import httpx2  # slow to import, and only needed if there is a server

    try:
        is_address = _ADDRESS.fullmatch(url) and (httpx2.URL(url).port or 1) <= 65_535
    except httpx2.InvalidURL:  # a host that only looks like an IP address
        is_address = False
    if not is_address:
        raise UserError(
            "it must be an address such as http://127.0.0.1:8000/v1, and may hold no user, "
            "password, query or fragment, as it is stored with the run; put a key into the "
            "environment variable that api_key_variable names"
        )
    return url.rstrip("/")


def _variable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise UserError(
            "it must be the name of an environment variable, in capitals, not the key itself; "
            "correct it"
        )
    return name


ServerURL = Annotated[str, AfterValidator(_server_url)]
VariableName = Annotated[str, AfterValidator(_variable_name)]


def is_this_machine(url: str) -> bool:
    """Return whether an address belongs to this machine, in any notation."""
    host = urlsplit(url).hostname or ""
    if host in LOOPBACK or host == socket.gethostname().lower():
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified or str(address) in _own_addresses()


@lru_cache(maxsize=1)
def _own_addresses() -> frozenset[str]:
    import psutil

    return frozenset(
        one.address.partition("%")[0] for each in psutil.net_if_addrs().values() for one in each
    )
