"""The address of a Ray: its forms, and whether something listens there; imports no Ray."""

import os
import socket

from neuronal_ray.cli.errors import BadInput, shown

_REACH_TIMEOUT_S = 10.0
_WITHOUT_PORT = ("none", "local", "auto")
_EXPECTED = "none, local, auto, HOST:PORT or ray://HOST:PORT"


def check_form(address: str, *, name: str = "--address") -> None:
    """Raise BadInput, beginning with the flag or variable `name`, for an address of another form."""
    if address in _WITHOUT_PORT:
        return
    if address.startswith(("http://", "https://")):
        raise BadInput(
            f"{name}: {shown(address)} is where jobs are submitted: ray job submit --address {address} -- python -m "
            f"neuronal_ray.COMMAND ..; to run workers from here give {_EXPECTED}"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port[:6]) < 65_536:
        raise BadInput(f"{name}: {shown(address)} is not an address, expected {_EXPECTED}")


def check_reachable(address: str) -> None:
    """Raise BadInput when nothing listens at the address; Ray itself would try for minutes.

    `auto` is what RAY_ADDRESS says, or whatever Ray finds on this machine.
    """
    name = "--address"
    if address == "auto" and os.environ.get("RAY_ADDRESS"):
        address, name = os.environ["RAY_ADDRESS"], "RAY_ADDRESS"
    check_form(address, name=name)
    if address in _WITHOUT_PORT:
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_TIMEOUT_S).close()
    except (OSError, UnicodeError) as error:
        raise BadInput(f"{name}: nothing to join at {shown(address)} ({error}); is Ray running there?") from error
