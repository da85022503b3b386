"""The names under which a server is reached."""

import ipaddress


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
