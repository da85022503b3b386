"""The names under which a server is reached, and the secret that opens it."""

import ipaddress
import os

from scribbleseg.errors import InputError

TOKEN = "SCRIBBLESEG_TOKEN"


def read_token() -> str | None:
    """Return what the environment says clients must show; None where it says nothing.

    Raises:
        InputError: it would not pass through a header: nobody could show it.
    """
    # A file that it was read from ends in a line break.
    token = os.environ.get(TOKEN, "").strip()
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError(
            f"{TOKEN}: found other characters than those of ASCII without spaces; set it to a "
            f"secret such as that of: export {TOKEN}=$(openssl rand -hex 32)"
        )
    return token or None


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bracketed(host: str) -> str:
    """Return an address as it stands in a URL."""
    return f"[{host}]" if ":" in host else host


def host_headers(host: str, port: int) -> list[str]:
    """Return what browsers on this machine send as Host to a loopback address."""
    names = list(dict.fromkeys([bracketed(host), "127.0.0.1", "localhost", "[::1]"]))
    # They leave out the port that HTTP has by itself.
    return [f"{name}:{port}" for name in names] + (names if port == 80 else [])
