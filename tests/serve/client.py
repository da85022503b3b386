"""A client that needs nothing but the standard library."""

import http.client
from collections.abc import Mapping

BOUNDARY = "-----boundary-of-the-parts"


def multipart(parts: Mapping[str, bytes | str]) -> tuple[bytes, str]:
    """Return a body of files (bytes) and fields (text), and its content type."""
    lines: list[bytes] = []
    for name, content in parts.items():
        is_file = isinstance(content, bytes)
        described = f'form-data; name="{name}"' + ('; filename="a.png"' if is_file else "")
        lines += [
            f"--{BOUNDARY}\r\nContent-Disposition: {described}\r\n\r\n".encode(),
            content if isinstance(content, bytes) else content.encode(),
            b"\r\n",
        ]
    return b"".join([*lines, f"--{BOUNDARY}--\r\n".encode()]), (
        f"multipart/form-data; boundary={BOUNDARY}"
    )


def post(
    port: int, parts: Mapping[str, bytes | str], *, path: str = "/predict", timeout: float = 120
) -> tuple[int, bytes]:
    """Send a request to this machine; return the status and the body of the answer."""
    body, kind = multipart(parts)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("POST", path, body, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
